//! The coordinators as text for people and JSON for scripts: what the log says of them, and which of them the
//! answering one hears. Every function is pure.

use serde::Serialize;
use shoal_protocol::admin::{ClusterView, CoordinatorView, DeploymentView, PeerView, WorkerView};
use shoal_protocol::plan::Plan;
use shoal_protocol::presence::{HeardView, PresenceView};

use super::table::{Shared, Table, shared};

const NOTHING: &str = "-";

/// The coordinators: who is there, who votes, who leads. Without `presence` an older build has answered.
pub fn table(view: &ClusterView, presence: Option<&PresenceView>) -> Table {
    let mut table = Table::new(&["COORDINATOR", "ADDRESS", "BUILD", "VOTE", "LEADS", "LINK"]);
    for peer in &view.coordinators {
        let heard = presence.and_then(|presence| presence.of(peer.id));
        table.row([
            peer.id.to_string(),
            peer.cluster.to_string(),
            peer.build.clone(),
            peer.vote.as_str().to_owned(),
            if peer.leads { "leads" } else { NOTHING }.to_owned(),
            heard.map_or(NOTHING.to_owned(), link),
        ]);
    }
    table
}

fn link(heard: &HeardView) -> String {
    match (heard.up, heard.heard_ms_ago) {
        (true, _) => "up".to_owned(),
        (false, Some(ms)) => format!("silent for {}", age(ms / 1_000)),
        (false, None) => "not heard yet".to_owned(),
    }
}

/// `12 s`, `3 min`, `5 h`: what a person can tell apart.
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3_600),
    }
}

/// A coordinator in JSON: nulls where an older build has answered.
#[derive(Debug, Serialize)]
pub struct Coordinator<'a> {
    #[serde(flatten)]
    peer: &'a PeerView,
    up: Option<bool>,
    heard_ms_ago: Option<u64>,
}

/// `shoal coordinators list --json`.
pub fn list<'a>(view: &'a ClusterView, presence: Option<&PresenceView>) -> Vec<Coordinator<'a>> {
    let one = |peer: &'a PeerView| {
        let heard = presence.and_then(|presence| presence.of(peer.id));
        let heard_ms_ago = heard.and_then(|heard| heard.heard_ms_ago);
        Coordinator { peer, up: heard.map(|heard| heard.up), heard_ms_ago }
    };
    view.coordinators.iter().map(one).collect()
}

/// `shoal status --json`.
#[derive(Debug, Serialize)]
pub struct Status<'a> {
    coordinator: &'a CoordinatorView,
    workers: &'a [WorkerView],
    deployments: Vec<Deployment<'a>>,
    plan: &'a Plan,
    coordinators: Vec<Coordinator<'a>>,
    /// Who is missing; null where nobody is, or an older build has answered.
    no_majority: Option<&'a str>,
}

/// A deployment in JSON.
#[derive(Debug, Serialize)]
struct Deployment<'a> {
    #[serde(flatten)]
    view: &'a DeploymentView,
    /// The workers whose loss takes several of its replicas.
    shared: Vec<Shared>,
}

impl<'a> Status<'a> {
    /// The cluster, and who is heard.
    pub fn new(view: &'a ClusterView, presence: Option<&'a PresenceView>) -> Self {
        let ClusterView { coordinator, workers, deployments, plan, .. } = view;
        let no_majority = presence.and_then(|presence| presence.no_majority.as_deref());
        let coordinators = list(view, presence);
        let one = |deployment| Deployment { view: deployment, shared: shared(view, deployment) };
        let deployments = deployments.iter().map(one).collect();
        Self { coordinator, workers, deployments, plan, coordinators, no_majority }
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::NodeId;

    use super::*;

    #[test]
    fn silence_is_said_in_what_a_person_can_tell_apart() {
        let check = |up, heard_ms_ago, expected: &str| {
            assert_eq!(
                link(&HeardView { node: NodeId::coordinator(2), up, heard_ms_ago }),
                expected
            );
        };
        check(true, Some(1_700), "up");
        check(false, Some(2_100), "silent for 2 s");
        check(false, Some(119_999), "silent for 119 s");
        check(false, Some(120_000), "silent for 2 min");
        check(false, Some(7_200_000), "silent for 2 h");
        check(false, None, "not heard yet");
    }
}
