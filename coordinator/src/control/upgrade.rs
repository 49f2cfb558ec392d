//! ● Upgrades, from the operator's side: who speaks what, and that no older build comes back.

use shoal_protocol::error::WireError;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::upgrade::{SpeakerView, UpgradeCall, UpgradeView};
use shoal_protocol::version::PROTOCOL_VERSION;

use super::state::{Change, ClusterState, Node, VersionCommand};
use super::store::ControlStore;

/// One call.
pub(super) async fn answer(
    store: &ControlStore,
    operator: NodeId,
    call: UpgradeCall,
) -> Result<UpgradeView, WireError> {
    let state = store.read().await?;
    if call == UpgradeCall::Status {
        return Ok(view(&state, store));
    }
    store.propose(Change::Version(VersionCommand::Finish { to: PROTOCOL_VERSION })).await?;
    tracing::info!(%operator, "the upgrade to protocol version {PROTOCOL_VERSION} is complete");
    Ok(view(&store.state(), store))
}

fn view(state: &ClusterState, store: &ControlStore) -> UpgradeView {
    let spoken = |id: NodeId, node: &Node| {
        let recorded = match state.coordinators.get(id) {
            // At least: no less takes part.
            Some(_) => Some(state.versions.log()).filter(|log| *log > 1),
            None => node.incarnation.and_then(|start| state.versions.spoken(id, start)),
        };
        store.heard().of(state, id).or(recorded)
    };
    let members = state.nodes.iter().filter(|(id, _)| id.role != Role::Admin);
    let speaker = |(id, node): (NodeId, &Node)| SpeakerView {
        node: id,
        build: node.build.clone(),
        protocol: spoken(id, node),
    };
    UpgradeView {
        newest: PROTOCOL_VERSION,
        lowest: state.lowest_protocol(),
        log: state.versions.log(),
        workers: state.versions.workers(),
        nodes: members.map(speaker).collect(),
    }
}
