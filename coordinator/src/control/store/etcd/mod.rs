//! ◇ etcd as the command log, for sites that run one already.
//!
//! ```text
//! voter (●) ─► client (●) ══gRPC══► etcd: PREFIX/cmd/<n>, head, leader, snapshot
//!    └► tail (○): what was heard ─► the state │ load again
//! election (●): who leads ─► standing
//! ```
//!
//! The same commands, the same `apply`, as in every other store. The CA's key is never here.

mod chunks;
mod client;
mod election;
mod entry;
mod keys;
mod options;
mod tail;
pub mod url;
mod voter;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use etcd_client::Client;
use shoal_protocol::id::{Incarnation, NodeId};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::client::{Etcd, EtcdError, timely};
use self::election::Election;
use self::keys::Keys;
pub use self::options::{EtcdConfig, OptionsError, TlsFiles};
pub use self::voter::Clock;
use self::voter::{Follow, Voter};
use super::{ControlStore, Heard, Members, Message, PROPOSALS_MAX, Presence, Standing};

/// Commands that stand in etcd beside the snapshot, at most, while a coordinator leads: half of them
/// again for a snapshot that fails once.
pub const LOG_LEN_MAX: u64 = tail::COMPACT_EVERY * 3 / 2;

/// How long a leader that has died keeps others from leading.
pub const LEASE_TTL: Duration = election::LEASE_TTL;

/// How long a start waits for an etcd that does not answer: one that starts with this machine.
const START_PATIENCE: Duration = Duration::from_secs(15);

/// How long to wait after etcd did not answer.
const RETRY: Duration = Duration::from_millis(300);

/// How long the end may take: a request to give up the lease.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It was not said how.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// It does not answer, or not as it should.
    #[error(
        "the cluster's state at {url}: {source}; see that etcd runs, is healthy (`etcdctl endpoint \
         health`), can be reached from here, and, for etcds://, that --store-ca signed its \
         certificate"
    )]
    Etcd {
        /// Which.
        url: String,
        /// Why.
        #[source]
        source: EtcdError,
    },
}

/// The tasks behind the handles. Dropping it leaves them to end with the last handle; `close` waits
/// for them.
#[derive(Debug)]
pub struct EtcdStore {
    proposals: mpsc::Sender<Message>,
    incarnation: Incarnation,
    voter: JoinHandle<()>,
    election: JoinHandle<()>,
}

/// Loads the state and takes part in the election. `client` is the coordinator that proposes.
pub async fn open(
    config: &EtcdConfig,
    client: NodeId,
) -> Result<(ControlStore, EtcdStore), OpenError> {
    // A client of tonic's is large; boxed, it is not part of every future above.
    Box::pin(open_with(config, client, Arc::new(SystemTime::now))).await
}

/// The same with another clock.
pub async fn open_with(
    config: &EtcdConfig,
    client: NodeId,
    clock: Clock,
) -> Result<(ControlStore, EtcdStore), OpenError> {
    let options = options::read(config)?;
    let until = Instant::now() + START_PATIENCE;
    let (etcd, tail) = loop {
        let connected = async {
            let options = Some(options.clone());
            let client = timely(Client::connect(config.endpoints(), options)).await?;
            let etcd = Etcd::new(client, Keys::new(&config.url.prefix));
            let tail = etcd.load().await?;
            Ok((etcd, tail))
        };
        match connected.await {
            Ok(connected) => break connected,
            // Time does not mend what is damaged, only an etcd that does not answer yet.
            Err(source @ (EtcdError::TimedOut | EtcdError::Failed(_)))
                if Instant::now() + RETRY < until =>
            {
                tracing::info!(error = %source, "waiting for etcd at {}", config.url);
                tokio::time::sleep(RETRY).await;
            }
            Err(source) => return Err(OpenError::Etcd { url: config.url.to_string(), source }),
        }
    };
    Ok(start(etcd, tail, client, clock))
}

fn start(etcd: Etcd, tail: tail::Tail, client: NodeId, clock: Clock) -> (ControlStore, EtcdStore) {
    let (proposals, inbox) = mpsc::channel(PROPOSALS_MAX);
    let (published, state) = watch::channel(Arc::clone(tail.state()));
    let (told, standing) = watch::channel(Standing::default());
    let (stop, stopping) = watch::channel(false);
    // A count of this start: what an earlier one may still have on its way is not taken for ours.
    let incarnation = Incarnation(tail.state().last_incarnation(client).0 + 1);
    // Whoever has the password takes part: there are no voters of our own.
    let (_, members) = watch::channel(Members::default());
    let doubt = Arc::new(Notify::new());
    let election =
        Election { etcd: etcd.clone(), me: client, standing: told, doubt: Arc::clone(&doubt) };
    let election = tokio::spawn(election.run(stopping));
    let voter = Voter {
        proposer: (client, incarnation),
        clock,
        etcd,
        tail,
        published,
        standing: standing.clone(),
        doubt,
        follow: Follow::Lost(Instant::now()),
        broken: None,
        compact_at: 0,
    };
    let voter = tokio::spawn(async move {
        Box::pin(voter.run(inbox)).await;
        stop.send_replace(true);
    });
    let store = ControlStore {
        proposals: proposals.clone(),
        state,
        standing,
        members,
        heard: Heard::default(),
        me: client,
        presence: Presence::default(),
        origin: std::time::Instant::now(),
        elsewhere: true,
    };
    (store, EtcdStore { proposals, incarnation, voter, election })
}

impl EtcdStore {
    /// The number of this start.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Lets the changes that wait be made, then gives up the lead.
    pub async fn close(self) {
        let ended = async {
            // Either fails only where the task has ended already.
            let _ = self.proposals.send(Message::Stop).await;
            let _ = self.voter.await;
            let _ = self.election.await;
        };
        if tokio::time::timeout(STOP_PATIENCE, ended).await.is_err() {
            tracing::warn!("etcd does not answer; the lead ends with its lease");
        }
    }

    /// Ends at once, as kill -9 would: the lease lasts on.
    pub fn kill(self) {
        self.voter.abort();
        self.election.abort();
    }
}
