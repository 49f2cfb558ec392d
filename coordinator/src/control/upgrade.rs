//! ● Upgrades, from the operator's side: who speaks what, and that no older build comes back.

use shoal_protocol::error::WireError;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::upgrade::{SpeakerView, UpgradeCall, UpgradeView};
use shoal_protocol::version::PROTOCOL_VERSION;

use super::agents::Agents;
use super::state::{Change, ClusterState, Node, VersionCommand};
use super::store::ControlStore;

/// One call.
pub(super) async fn answer(
    store: &ControlStore,
    agents: &Agents,
    operator: NodeId,
    call: UpgradeCall,
) -> Result<UpgradeView, WireError> {
    let state = store.read().await?;
    if call == UpgradeCall::Status {
        return Ok(view(&state, store, agents));
    }
    store.propose(Change::Version(VersionCommand::Finish { to: PROTOCOL_VERSION })).await?;
    tracing::info!(%operator, "the upgrade to protocol version {PROTOCOL_VERSION} is complete");
    Ok(view(&store.state(), store, agents))
}

fn view(state: &ClusterState, store: &ControlStore, agents: &Agents) -> UpgradeView {
    let seen = agents.observe();
    let spoken = |id: NodeId, node: &Node| {
        if let Some(record) = state.coordinators.get(id) {
            let at_least = Some(state.versions.log()).filter(|log| *log > 1);
            return store.heard().of(id, record.boot).or(at_least);
        }
        let incarnation = node.incarnation?;
        let registered = seen.get(&id).map(|worker| &worker.register);
        let registered = registered.filter(|register| register.incarnation == incarnation);
        let said = registered.map(|register| register.versions.max);
        said.or_else(|| state.versions.spoken(id, incarnation))
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
