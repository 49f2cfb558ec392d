//! ● What keeps a coordinator's certificates fresh: whom it believes, the keys of the CAs, and a new
//! certificate for itself and its operator every few hours, or when another CA signs.
//!
//! ```text
//! state ──► whom to believe ─► keys (disk, or another coordinator) ─► own certificate ─► context file
//!   ▲                                                                        │
//!   └──────────── how far this one has come with a new CA ◄──────────────────┘
//! ```
//!
//! Every step is taken again whenever anything changes, and is nothing where it was taken: a crash
//! between any two of them is gone on from. All coordinators take them at the same moments, each step with
//! writes that are synced, so these are made aside: on threads that carry nothing of the log.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::id::NodeId;
use shoal_protocol::outcast::{Outcast, Verdict};
use shoal_protocol::quic::identity::IdentityError;
use shoal_protocol::quic::renew::RenewError;
use shoal_protocol::quic::{AdminContext, Endpoint, EndpointError, Identity, aside};
use shoal_protocol::trust::{CaFingerprint, Trust};
use shoal_protocol::units;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::begin::{IDENTITY_FILE, OPERATOR};
use crate::control::agents::Agents;
use crate::control::authority::{Authority, CaFiles, CertifyError};
use crate::control::peers::Peers;
use crate::control::rotation::entitled;
use crate::control::state::{
    AuthorityCommand, CaStep, Change, ClusterState, CoordinatorCommand, KeyFingerprint, Rotation,
};
use crate::control::store::ControlStore;
use crate::start_error::StartError;

/// How often this coordinator renews its own certificate and its operator's: a third of their life,
/// so that one failure is not the end.
const RENEW_PERIOD: Duration = Duration::from_secs(8 * 3600);

/// How often to look even if nothing changes, and to ask again for what did not come: by the clock that
/// certificates go by, since that goes on while the machine sleeps.
const LOOK: Duration = Duration::from_secs(1);

/// How often another coordinator is asked for a certificate, and a key of its own is put on record.
const ASK_EVERY: Duration = Duration::from_secs(5);

/// Whose certificates, and where they go.
pub(crate) struct Renewal {
    pub me: NodeId,
    pub data: PathBuf,
    pub authority: Authority,
    pub endpoint: Endpoint,
    pub context: PathBuf,
    pub peers: Peers,
    pub store: ControlStore,
    pub agents: Agents,
}

/// What is on its way.
#[derive(Debug)]
struct Progress {
    /// When the certificate that is shown was made.
    issued: SystemTime,
    /// The key that is known to be on the disk as that of the CA that signs.
    kept: Option<CaFingerprint>,
    /// When another coordinator was last asked for a certificate.
    asked: Option<Instant>,
    /// When this coordinator's key was last put on record.
    enrolled: Option<Instant>,
    /// Somebody did not believe a certificate since then.
    distrusted: bool,
    /// The state had this coordinator: if it has it no more, it was removed.
    was_member: bool,
    /// Who refuses it, and the time that counts for that.
    outcast: Outcast,
    began: Instant,
}

/// A certificate that is not shown.
#[derive(Debug, thiserror::Error)]
enum ShowError {
    #[error(transparent)]
    Certify(#[from] CertifyError),
    #[error(transparent)]
    Keep(#[from] IdentityError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

impl Renewal {
    /// Keeps everything fresh until `stop` becomes true.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            () = self.work() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    async fn work(&self) {
        let (mut changes, mut distrust) = (self.store.watch(), self.peers.distrust());
        let mut progress = Progress {
            issued: SystemTime::now(),
            kept: None,
            asked: None,
            enrolled: None,
            distrusted: false,
            was_member: false,
            outcast: Outcast::default(),
            began: Instant::now(),
        };
        loop {
            let state = Arc::clone(&changes.borrow_and_update());
            let is_member = state.nodes.get(self.me).is_some();
            if progress.was_member && !is_member {
                // Where another service does the voting it could go on to lead those who hear it no more.
                self.peers.end(format!(
                    "{} was removed from the cluster: delete its data folder, and join anew on an empty \
                     one to take part again",
                    self.me
                ));
                return std::future::pending().await;
            }
            progress.was_member |= is_member;
            self.believe(&state);
            self.get_keys(&state, &mut progress).await;
            self.refresh(&mut progress).await;
            let trust = self.authority.trust();
            self.agents.set_trust(trust, self.authority.current().is_some());
            self.report(&state, &mut progress).await;
            tokio::select! {
                // The store ends after this.
                changed = changes.changed() => if changed.is_err() { return },
                _ = distrust.changed() => progress.distrusted = true,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Believes whom the state says, or whom another coordinator named, where that is newer: this
    /// copy of the state may lag behind.
    fn believe(&self, state: &ClusterState) {
        let known = state.authorities.trust().unwrap_or_default();
        let shown = self.endpoint.identity();
        let newest = known.or_newer(shown.as_ref().map(|identity| &identity.trust));
        if newest.revision > 0 {
            self.authority.follow(newest);
        }
    }

    /// Gets the keys that this coordinator is to have: of the CA that signs, and of one to come.
    async fn get_keys(&self, state: &ClusterState, progress: &mut Progress) {
        let rotation = state.authorities.rotation().filter(|rotation| rotation.signs.is_none());
        let next = rotation.map(Rotation::ca);
        let signing = self.authority.fingerprint();
        for ca in [Some(signing), next].into_iter().flatten() {
            if self.authority.key_of(&ca).is_none() {
                self.get_key(state, ca, ca == signing).await;
            }
        }
        if progress.kept != Some(signing)
            && let Some(key) = self.authority.current()
        {
            let files = CaFiles::of(&self.data);
            let keep = move || if files.has(&signing) { Ok(()) } else { files.save(&key) };
            match aside(keep).await {
                Ok(()) => progress.kept = Some(signing),
                Err(error) => tracing::error!(%error, "the CA's key cannot be kept"),
            }
        }
    }

    async fn get_key(&self, state: &ClusterState, ca: CaFingerprint, signs: bool) {
        let files = CaFiles::of(&self.data);
        let on_disk = files.clone();
        let kept = aside(move || on_disk.load()).await.unwrap_or_default();
        if let Some(key) = kept.into_iter().find(|key| key.fingerprint() == ca) {
            return self.authority.keep(key);
        }
        if !entitled(&self.store, state).contains(&self.me) {
            return;
        }
        let founding = state.authorities.is_empty();
        let Some(key) = self.peers.ask_for_key(&ca, founding).await else { return };
        let keep = move || match signs {
            true => files.save(&key).map(|()| key),
            false => files.save_next(&key).map(|()| key),
        };
        match aside(keep).await {
            Ok(key) => {
                self.authority.keep(key);
                tracing::info!("this coordinator holds the CA's key now");
            }
            Err(error) => tracing::error!(%error, "the CA's key cannot be kept"),
        }
    }

    /// Sees to it that the certificate that is shown is of the CA that signs, and young.
    async fn refresh(&self, progress: &mut Progress) {
        let Some(shown) = self.endpoint.identity() else { return };
        let told = self.authority.told();
        let age = SystemTime::now().duration_since(progress.issued).unwrap_or_default();
        let signed = shown.shows() == self.authority.fingerprint();
        let fresh = signed && shown.trust == told && age < RENEW_PERIOD;
        let context_missing = self.authority.current().is_some() && !self.context.exists();
        if (!fresh || context_missing)
            && let Err(error) = self.renew(&shown, told, progress).await
        {
            tracing::error!(%error, "certificates could not be renewed; trying again");
        }
        let Some(shown) = self.endpoint.identity() else { return };
        let signed = shown.shows() == self.authority.fingerprint();
        let left = shown.expires().and_then(|end| end.duration_since(SystemTime::now()).ok());
        let ends_soon = left.is_none_or(|left| left < 2 * RENEW_PERIOD);
        let asks = (progress.distrusted || !signed || ends_soon)
            && progress.asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY);
        if asks {
            progress.asked = Some(Instant::now());
            progress.distrusted = false;
            self.ask(&shown, ends_soon, progress).await;
        }
    }

    /// With the key of its own.
    async fn renew(
        &self,
        shown: &Identity,
        told: Trust,
        progress: &mut Progress,
    ) -> Result<(), ShowError> {
        match self.authority.certify(shown, SystemTime::now())? {
            Some(renewed) => {
                self.show(renewed, progress).await?;
                let (authority, path) = (self.authority.clone(), self.context.clone());
                let cluster = self.endpoint.local_address();
                aside(move || write_context(&authority, cluster, &path)).await?;
            }
            None if shown.trust != told => self.show(shown.trusting(told), progress).await?,
            None => {}
        }
        Ok(())
    }

    /// With that of another coordinator.
    async fn ask(&self, shown: &Identity, ends_soon: bool, progress: &mut Progress) {
        let renewed = match self.peers.ask_for_certificate(shown).await {
            Ok(renewed) => renewed,
            Err(said) => return self.refused(said, progress).await,
        };
        progress.outcast.believed();
        let newer = renewed.trust.revision > shown.trust.revision;
        // A coordinator that lags behind signs what is worth no more than what is here.
        let signing = renewed.trust.signing().is_none_or(|ca| ca == renewed.shows());
        if newer || (signing && renewed.shows() != shown.shows()) || ends_soon {
            tracing::info!("another coordinator has renewed this one's certificate");
            if let Err(error) = self.show(renewed, progress).await {
                tracing::error!(%error, "the new certificate cannot be used");
            }
        }
    }

    /// Nobody has renewed its certificate. Whoever was removed hears it from the first who knows; whom nobody
    /// has to do with any more says so, and ends.
    async fn refused(&self, said: Vec<(String, RenewError)>, progress: &mut Progress) {
        let now = units::Instant::default() + progress.began.elapsed();
        for (who, error) in &said {
            match error {
                RenewError::Removed(removed) => return self.peers.leave(removed.message.clone()),
                error if error.refuses_the_node() => {
                    progress.outcast.refused(who, &error.to_string(), now);
                }
                _ => progress.outcast.otherwise(who),
            }
        }
        let known = said.into_iter().map(|(who, _)| who).collect();
        let verdict = progress.outcast.look(&self.me.to_string(), &known, now);
        // What the others' addresses lead to now is nothing to one that has a majority, or workers.
        if verdict != Verdict::Wait
            && (self.agents.any_connected() || self.store.read().await.is_ok())
        {
            return progress.outcast.believed();
        }
        match verdict {
            Verdict::Wait => {}
            Verdict::Say(words) => tracing::warn!("{words}"),
            Verdict::End(words) => self.peers.leave(words),
        }
    }

    async fn show(&self, identity: Identity, progress: &mut Progress) -> Result<(), ShowError> {
        let identity = Arc::new(identity);
        self.keep(&identity).await?;
        self.endpoint.renew(identity)?;
        progress.issued = SystemTime::now();
        Ok(())
    }

    async fn keep(&self, identity: &Arc<Identity>) -> Result<(), IdentityError> {
        let (identity, path) = (Arc::clone(identity), self.data.join(IDENTITY_FILE));
        aside(move || identity.save(&path)).await
    }

    /// Writes down how far this coordinator has come.
    async fn report(&self, state: &ClusterState, progress: &mut Progress) {
        let Some(record) = state.coordinators.get(self.me) else { return };
        if !record.holds_key && progress.kept == Some(self.authority.fingerprint()) {
            let received = CoordinatorCommand::KeyReceived { node: self.me };
            self.propose(Change::Coordinator(received)).await;
        }
        let Some(shown) = self.endpoint.identity() else { return };
        self.report_own_key(state, &shown, progress).await;
        let Some(rotation) = state.authorities.rotation() else { return };
        let (ca, me) = (rotation.ca(), self.me);
        let believes = shown.roots().contains(&rotation.next);
        let holds = self.authority.key_of(&ca).is_some();
        if !holds && rotation.maker == me && rotation.signs.is_none() {
            // Its making broke off before the key was on this disk: nobody has it.
            tracing::error!("the key of the CA to come is lost; the rotation is given up");
            return self.propose(Change::Authority(AuthorityCommand::Abandon { ca })).await;
        }
        for (step, reached, known) in [
            (CaStep::Trusts, believes, &rotation.trusting),
            (CaStep::Holds, holds, &rotation.holding),
            (CaStep::Shows, shown.shows() == ca, &rotation.showing),
        ] {
            if reached && !known.contains(&me) {
                let nodes = [me].into();
                self.propose(Change::Authority(AuthorityCommand::Reached { ca, step, nodes }))
                    .await;
            }
        }
    }

    /// One that founded a cluster before coordinators kept keys of their own has none on record.
    async fn report_own_key(
        &self,
        state: &ClusterState,
        shown: &Arc<Identity>,
        progress: &mut Progress,
    ) {
        let own = shown.key_fingerprint().map(KeyFingerprint);
        let recorded = state.nodes.get(self.me).map(|node| node.key);
        let waits = progress.enrolled.is_some_and(|last| last.elapsed() < ASK_EVERY);
        let (Some(key), false) = (own.filter(|_| recorded.is_some() && recorded != own), waits)
        else {
            return;
        };
        progress.enrolled = Some(Instant::now());
        // It must be here to be of use.
        if self.data.join(IDENTITY_FILE).exists() || self.keep(shown).await.is_ok() {
            let own = AuthorityCommand::OwnKey { node: self.me, key };
            self.propose(Change::Authority(own)).await;
        }
    }

    async fn propose(&self, change: Change) {
        if let Err(error) = self.store.propose(change).await {
            tracing::debug!("this coordinator's certificates: not written down yet: {error}");
        }
    }
}

/// Writes what the operator needs. An address that listens everywhere is reached by loopback.
fn write_context(authority: &Authority, cluster: SocketAddr, path: &Path) -> Result<(), ShowError> {
    let Some(ca) = authority.current() else { return Ok(()) };
    let ip = match cluster.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let identity = ca.issue_identity(OPERATOR, SystemTime::now()).map_err(CertifyError::from)?;
    let identity = identity.trusting(authority.told());
    let address = SocketAddr::new(ip, cluster.port());
    Ok(AdminContext { address, identity }.save(path)?)
}

/// The operator's first context, before anybody can ask for it.
pub(crate) fn first_context(
    authority: &Authority,
    cluster: SocketAddr,
    path: &Path,
) -> Result<(), StartError> {
    write_context(authority, cluster, path).map_err(|error| match error {
        ShowError::Certify(error) => error.into(),
        ShowError::Keep(error) => error.into(),
        ShowError::Endpoint(error) => error.into(),
    })
}
