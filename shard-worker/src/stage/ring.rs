//! ○ Who stands where in the ring of stages, as one stage of it sees it: worked out from its
//! assignment alone.

use std::net::SocketAddr;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::id::{Generation, NodeId, ReplicaId, StageIndex};
use shoal_protocol::plan::{Assignment, ReplicaLimits};

/// Who stands where in the ring, as one stage sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPlan {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// This stage.
    pub stage: StageIndex,
    /// Who dials us.
    pub upstream: Neighbour,
    /// Whom we dial.
    pub downstream: Neighbour,
    /// What frames are checked against.
    pub limits: ReplicaLimits,
}

/// A stage beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its worker.
    pub node: NodeId,
    /// Its number.
    pub stage: StageIndex,
    /// Its worker's `shoal-act` endpoint.
    pub address: SocketAddr,
}

impl std::fmt::Display for Neighbour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} at {})", self.node, self.stage, self.address)
    }
}

/// An assignment that names no way to a neighbour.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRing {
    /// The stage is not in the layout.
    #[error("the assignment's {0} is not in its layout")]
    NoStage(StageIndex),
    /// A stage has no shard.
    #[error("{0} has no shard")]
    NoShard(StageIndex),
    /// A stage has several ranks, which this version does not run.
    #[error("{0} has {1} tensor ranks; this version runs one")]
    Ranks(StageIndex, usize),
    /// A peer has no address.
    #[error("no address is given for {0}, which has {1}")]
    NoAddress(NodeId, StageIndex),
}

impl LinkPlan {
    /// The ring around this shard; `None` where it is the only stage.
    pub fn of(assignment: &Assignment) -> Result<Option<Self>, BadRing> {
        let replica = &assignment.replica;
        let count = replica.stages.len() as u32;
        if assignment.stage.0 >= count {
            return Err(BadRing::NoStage(assignment.stage));
        }
        for (index, stage) in replica.stages.iter().enumerate() {
            match stage.shards.len() {
                1 => {}
                0 => return Err(BadRing::NoShard(StageIndex(index as u32))),
                ranks => return Err(BadRing::Ranks(StageIndex(index as u32), ranks)),
            }
        }
        if count == 1 {
            return Ok(None);
        }
        let neighbour = |stage: u32| {
            let node = replica.stages[stage as usize].shards[0].node;
            let stage = StageIndex(stage);
            let peer = assignment.peers.iter().find(|peer| peer.node == node);
            let address = peer.ok_or(BadRing::NoAddress(node, stage))?.activations;
            Ok(Neighbour { node, stage, address })
        };
        let me = assignment.stage.0;
        Ok(Some(Self {
            replica: replica.id,
            generation: replica.generation,
            stage: assignment.stage,
            upstream: neighbour((me + count - 1) % count)?,
            downstream: neighbour((me + 1) % count)?,
            limits: replica.limits.clone(),
        }))
    }

    /// How this stage says which link it is.
    pub(super) fn hello_to(&self, to: StageIndex) -> LinkHello {
        LinkHello {
            generation: self.generation.0,
            replica: self.replica.0,
            from_stage: self.stage.0,
            to_stage: to.0,
            reserved: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::{DeploymentName, RankIndex};
    use shoal_protocol::plan::{
        ModelRef, ModelSource, Numerics, PeerAddress, Precision, ReplicaPlan, ShardMemory,
        ShardPlan, StagePlan,
    };
    use shoal_protocol::units::LayerRange;

    use super::*;

    /// Stage `stage` of a layout of w1, w2 …, one stage each.
    fn assignment(stage: u32, stages: u32) -> Assignment {
        let shard = |number| ShardPlan {
            rank: RankIndex(0),
            node: NodeId::worker(number),
            device: "cpu".to_owned(),
            memory: ShardMemory::default(),
        };
        let stage_of =
            |i| StagePlan { layers: LayerRange::new(i, i + 1), shards: vec![shard(i + 1)] };
        let peer = |i: u32| PeerAddress {
            node: NodeId::worker(i + 1),
            activations: SocketAddr::from(([127, 0, 0, 1], 4000 + i as u16)),
        };
        let source = ModelSource::Builtin { name: "demo".to_owned() };
        let replica = ReplicaPlan {
            id: ReplicaId(7),
            deployment: DeploymentName::new("demo").unwrap(),
            generation: Generation(3),
            model: ModelRef { source, fingerprint: [0; 32] },
            precision: Precision::F32,
            numerics: Numerics::N1,
            stages: (0..stages).map(stage_of).collect(),
            limits: ReplicaLimits {
                kv_blocks: 1,
                context_max: 1,
                step_rows_max: 1,
                sequences_max: 1,
                steps_in_flight_max: 1,
            },
        };
        let peers = (0..stages).map(peer).collect();
        Assignment { replica, stage: StageIndex(stage), rank: RankIndex(0), peers }
    }

    #[test]
    fn each_stage_is_dialled_by_the_one_before_and_the_head_by_the_last() {
        for (stage, upstream, downstream) in [(0, "w3", "w2"), (1, "w1", "w3"), (2, "w2", "w1")] {
            let plan = LinkPlan::of(&assignment(stage, 3)).unwrap().unwrap();
            assert_eq!(plan.upstream.node.to_string(), upstream);
            assert_eq!(plan.downstream.node.to_string(), downstream);
        }
        let pair = LinkPlan::of(&assignment(0, 2)).unwrap().unwrap();
        assert_eq!(pair.upstream, pair.downstream);
        assert_eq!(pair.downstream.to_string(), "w2 (stage 1 at 127.0.0.1:4001)");
        assert_eq!(LinkPlan::of(&assignment(0, 1)), Ok(None));
    }

    #[test]
    fn an_assignment_without_a_ring_is_refused() {
        let check = |change: fn(&mut Assignment), expected: &str| {
            let mut assignment = assignment(1, 3);
            change(&mut assignment);
            assert_eq!(LinkPlan::of(&assignment).unwrap_err().to_string(), expected);
        };
        check(|a| a.stage.0 = 3, "the assignment's stage 3 is not in its layout");
        check(|a| a.replica.stages[2].shards.clear(), "stage 2 has no shard");
        check(
            |a| {
                let shard = a.replica.stages[0].shards[0].clone();
                a.replica.stages[0].shards.push(shard);
            },
            "stage 0 has 2 tensor ranks; this version runs one",
        );
        check(
            |a| a.peers.retain(|peer| peer.node != NodeId::worker(3)),
            "no address is given for w3, which has stage 2",
        );
    }
}
