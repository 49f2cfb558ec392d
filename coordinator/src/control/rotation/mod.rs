//! ● Drives a rotation of the CA: looks, decides ([`step`]), proposes. Any coordinator could; the leader does.
//!
//! It keeps nothing: whoever leads after a crash goes on from what stands in the state. Where a coordinator
//! was removed during a rotation, it begins another one when that one is over, with the same flag (which
//! alone is lost where all coordinators start again between the two: say it again).

pub mod step;
mod verbs;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use shoal_protocol::id::NodeId;
use shoal_protocol::trust::CaFingerprint;
use tokio::sync::watch;
use tokio::time::Instant;

use self::step::{SeenWorker, Verdict, View};
use super::agents::Agents;
use super::state::{Change, ClusterState, Rotation, Timestamp};
use super::store::ControlStore;

pub use verbs::CaServer;

/// How often to look even if nothing changes.
const LOOK: Duration = Duration::from_secs(1);

/// Changes that follow each other sooner are looked at together: reports of many workers come in bursts.
const PAUSE: Duration = Duration::from_millis(20);

/// How long a worker that is there may take to come to a new leader: some of its retries.
const SETTLE: Duration = Duration::from_secs(3);

/// How often workers that have not come along are told again.
const REMIND_EVERY: Duration = Duration::from_secs(5);

/// The coordinators that are to hold the CA's key: those that vote, and where another service has the log,
/// all of them.
pub fn entitled(store: &ControlStore, state: &ClusterState) -> BTreeSet<NodeId> {
    match store.is_elsewhere() {
        true => state.coordinators.iter().map(|(node, _)| node).collect(),
        false => state.coordinators.voters().clone(),
    }
}

/// What is to be done next, as this coordinator sees it.
fn verdict(
    store: &ControlStore,
    agents: &Agents,
    state: &ClusterState,
    (seen_for, settled): (Duration, bool),
) -> Verdict {
    let workers: BTreeMap<NodeId, SeenWorker> = agents.certificates();
    let entitled = entitled(store, state);
    // What is in the log may be of a clock that is ahead of this one.
    let now = Timestamp::of(SystemTime::now()).max(state.clock());
    View { state, entitled: &entitled, workers: &workers, now, seen_for, settled }.decide()
}

/// Since when the rotation has been seen where it stands.
#[derive(Debug, Default)]
struct Stand(Option<((CaFingerprint, bool), Instant)>);

impl Stand {
    /// How long that is, when this is seen.
    fn see(&mut self, state: &ClusterState, now: Instant) -> Duration {
        let step = |rotation: &Rotation| (rotation.ca(), rotation.signs.is_some());
        let at = state.authorities.rotation().map(step);
        let known = self.0.filter(|(step, _)| Some(*step) == at);
        self.0 = known.or_else(|| at.map(|step| (step, now)));
        self.0.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since))
    }
}

/// Drives rotations while this coordinator leads, until `stop` becomes true, whatever it waits for then: what
/// is begun is gone on from by whoever leads next, as after a crash.
pub async fn drive(ca: CaServer, mut stop: watch::Receiver<bool>) {
    tokio::select! {
        () = go_on(ca) => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

async fn go_on(ca: CaServer) {
    let (store, agents) = (ca.store.clone(), ca.agents.clone());
    let (mut state_changed, mut workers_changed) = (store.watch(), agents.changed());
    let mut reminded = Instant::now();
    let (mut leads_since, mut stand) = (None, Stand::default());
    // Whether the last rotation that was seen here waited for nobody who is off.
    let mut skips = false;
    loop {
        workers_changed.mark_unchanged();
        let state = state_changed.borrow_and_update().clone();
        if state.authorities.rotation().is_some() && reminded.elapsed() >= REMIND_EVERY {
            reminded = Instant::now();
            agents.remind();
        }
        let seen_for = stand.see(&state, Instant::now());
        skips = state.authorities.rotation().map_or(skips, |rotation| rotation.skip_absent);
        let leading = store.standing().borrow().leading;
        leads_since = leading.then(|| leads_since.unwrap_or_else(Instant::now));
        if leading && let Err(error) = ca.rotate_again(&state, skips).await {
            tracing::warn!(
                "another rotation of the CA is to follow, and does not begin yet: {error}"
            );
        }
        let commands = leads_since.map(|since: Instant| {
            verdict(&store, &agents, &state, (seen_for, since.elapsed() >= SETTLE)).commands
        });
        for command in commands.into_iter().flatten() {
            tracing::info!("the CA's rotation: {command}");
            if let Err(error) = store.propose(Change::Authority(command)).await {
                tracing::warn!("the CA's rotation does not go on yet: {error}");
                tokio::time::sleep(LOOK).await;
                break;
            }
        }
        tokio::select! {
            changed = state_changed.changed() => if changed.is_err() { return },
            changed = workers_changed.changed(), if state.authorities.rotation().is_some() => {
                if changed.is_err() { return }
            }
            () = tokio::time::sleep(LOOK) => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}
