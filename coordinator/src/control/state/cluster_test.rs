//! A cluster as its log makes it: what the tests of the state's parts begin with.

use shoal_protocol::id::{Incarnation, NodeId, Role};

use super::{
    Change, ClusterState, Command, CoordinatorCommand, Effect, KeyFingerprint, NodeCommand,
    Refusal, Timestamp, VersionCommand, snapshot,
};

/// The first coordinator, whose commands all of them are.
pub(super) const C1: NodeId = NodeId::coordinator(1);

/// A state, and the number of its last command.
pub(super) struct Cluster {
    pub state: ClusterState,
    sequence: u64,
}

impl Cluster {
    /// Nodes of these roles, none of which has been started.
    pub fn of(roles: &[Role]) -> Self {
        let mut cluster = Self { state: ClusterState::default(), sequence: 0 };
        for &role in roles {
            let key = KeyFingerprint([7; 32]);
            cluster.apply(Change::Node(NodeCommand::Enrol { role, key })).unwrap();
        }
        cluster
    }

    /// Applies a change, behind which a snapshot holds the very state.
    pub fn apply(&mut self, change: Change) -> Result<Vec<Effect>, Refusal> {
        self.sequence += 1;
        let (incarnation, sequence, at) = (Incarnation(1), self.sequence, Timestamp(0));
        let result = self.state.apply(&Command { client: C1, incarnation, sequence, at, change });
        let bytes = snapshot::encode(&self.state).unwrap();
        assert_eq!(snapshot::decode(&bytes).as_ref(), Ok(&self.state), "the snapshot differs");
        result
    }

    /// A coordinator says its start.
    pub fn announce(&mut self, node: NodeId, start: u64, boot: u64) {
        let (incarnation, cluster) = (Incarnation(start), "127.0.0.1:1".parse().unwrap());
        let build = "0.1.0".to_owned();
        let announce = CoordinatorCommand::Announce { node, incarnation, boot, cluster, build };
        self.apply(Change::Coordinator(announce)).unwrap();
    }

    /// The leader has heard that these starts speak a version.
    pub fn raise(&mut self, to: u16, heard: &[(NodeId, u64)]) -> Result<Vec<Effect>, Refusal> {
        let heard = heard.iter().copied().collect();
        self.apply(Change::Version(VersionCommand::Raise { to, heard }))
    }
}
