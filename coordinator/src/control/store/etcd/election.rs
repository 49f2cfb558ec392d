//! ● Who leads: one key, taken under a lease by whoever finds it free.
//!
//! ```text
//! campaign ─► taken by me ─► hold: renew and look, every third of the lease ─► lost ─┐
//!    ▲    └─► another has it ─► watch it until it is gone ──────────────────────────┤
//!    └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A lease says when another may try, never that nobody else leads: what is appended compares the
//! key's create-revision, and what workers are told carries it.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::EventType;
use shoal_protocol::id::NodeId;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::client::{Etcd, EtcdError};
use crate::control::store::Standing;

/// How long a leader that has died keeps others from leading. etcd itself grants no less than about
/// two seconds.
pub const LEASE_TTL: Duration = Duration::from_secs(3);

/// How often a leader renews its lease and looks whether the key is still its own.
const RENEW_PERIOD: Duration = Duration::from_secs(1);

/// How long to wait after etcd did not answer.
const RETRY: Duration = Duration::from_millis(250);

/// How long a watch of the leader's key is believed that says nothing.
const WATCH_PATIENCE: Duration = Duration::from_secs(10);

/// One coordinator's part in it.
pub struct Election {
    /// The requests.
    pub etcd: Etcd,
    /// Who campaigns.
    pub me: NodeId,
    /// Where it is told.
    pub standing: watch::Sender<Standing>,
    /// Somebody has found out that the leader is not who was told.
    pub doubt: Arc<Notify>,
}

impl Election {
    /// Campaigns, holds, waits, until `stop` becomes true. Then the key is given up.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut lease = None;
        tokio::select! {
            () = self.take_part(&mut lease) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        self.say(None, 0);
        if let Some(lease) = lease
            && let Err(error) = self.etcd.revoke(lease).await
        {
            tracing::debug!(%error, "the lease was not given up; it ends by itself");
        }
    }

    async fn take_part(&self, lease: &mut Option<i64>) {
        let mut silent = true;
        loop {
            match self.round(lease).await {
                Ok(()) => silent = true,
                Err(error) => {
                    self.say(None, 0);
                    // Once is enough.
                    if std::mem::take(&mut silent) {
                        tracing::warn!(%error, "nobody can be heard of who leads; trying on");
                    }
                    self.etcd.sign_in().await;
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// One leadership, of this coordinator or another.
    async fn round(&self, lease: &mut Option<i64>) -> Result<(), EtcdError> {
        // While another leads, no lease is needed.
        if let (Some(holder), at) = self.etcd.leader().await? {
            self.say(holder.node, holder.epoch);
            return self.until_gone(at).await;
        }
        let granted_at = Instant::now();
        let granted = self.etcd.grant(LEASE_TTL).await?;
        *lease = Some(granted);
        let (holder, at) = self.etcd.campaign(self.me, granted).await?;
        if holder.lease != granted {
            self.say(holder.node, holder.epoch);
            return self.until_gone(at).await;
        }
        tracing::info!(epoch = holder.epoch, "{} leads", self.me);
        let leading = Standing { leader: Some(self.me), epoch: holder.epoch as u64, leading: true };
        self.standing.send_replace(leading);
        let why = self.hold(granted, holder.epoch, granted_at + LEASE_TTL).await;
        tracing::warn!(epoch = holder.epoch, "{} leads no more: {why}", self.me);
        self.say(None, 0);
        Ok(())
    }

    /// Returns when this coordinator cannot be sure any more that it leads.
    async fn hold(&self, lease: i64, epoch: i64, mut until: Instant) -> EtcdError {
        let mut next = Instant::now() + RENEW_PERIOD;
        loop {
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.doubt.notified() => {}
            }
            next = Instant::now() + RENEW_PERIOD;
            let sent_at = Instant::now();
            let renewed = async {
                self.etcd.renew(lease).await?;
                self.etcd.leader().await
            };
            match timeout_at(until, renewed).await {
                Ok(Ok((Some(holder), _))) if holder.epoch == epoch => until = sent_at + LEASE_TTL,
                Ok(Ok(_)) => return EtcdError::Failed("another has taken its place".into()),
                // It may have been a moment's trouble; the lease lasts a while.
                Ok(Err(error)) if sent_at + RETRY >= until => return error,
                Ok(Err(_)) => next = sent_at + RETRY,
                Err(_) => return EtcdError::TimedOut,
            }
        }
    }

    /// Returns when the leader's key may be free.
    async fn until_gone(&self, at: i64) -> Result<(), EtcdError> {
        let mut watch = self.etcd.watch_leader(at).await?;
        let patience = Instant::now() + WATCH_PATIENCE;
        loop {
            let message = tokio::select! {
                message = watch.message() => message?,
                () = self.doubt.notified() => return Ok(()),
                () = sleep_until(patience) => return Ok(()),
            };
            let Some(message) = message.filter(|message| !message.canceled()) else {
                return Err(EtcdError::Failed("the watch has ended".into()));
            };
            if message.events().iter().any(|event| event.event_type() == EventType::Delete) {
                return Ok(());
            }
        }
    }

    /// Tells who leads, where it is not this coordinator. With nobody known the epoch stays: it
    /// never falls.
    fn say(&self, leader: Option<NodeId>, epoch: i64) {
        self.standing.send_if_modified(|standing| {
            let epoch = standing.epoch.max(epoch as u64);
            let told = Standing { leader, epoch, leading: false };
            std::mem::replace(standing, told) != told
        });
    }
}
