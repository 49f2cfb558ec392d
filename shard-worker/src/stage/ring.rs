//! ○ Who stands where among the shards of a replica, as one of them sees it: worked out from its
//! assignment alone.
//! The rule is in `shoal_protocol::neighbours`.

use std::net::SocketAddr;

use shoal_protocol::activation::LinkHello;
use shoal_protocol::id::{Generation, NodeId, RankIndex, ReplicaId, StageIndex};
use shoal_protocol::model::Split;
use shoal_protocol::neighbours::{Place, feeder, places, ranks};
use shoal_protocol::plan::{Assignment, RANKS_MAX, ReplicaLimits};

/// Who stands where, as one shard sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPlan {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// This stage.
    pub stage: StageIndex,
    /// This rank of how many.
    pub split: Split,
    /// Who dials us with steps, or the head's shard with samples; nobody where the head has one stage.
    pub upstream: Option<Neighbour>,
    /// The other ranks of the first stage, where the head is beside us: they take what it gives.
    pub mirrors: Vec<Neighbour>,
    /// Whom we dial with our results.
    pub downstream: Vec<Neighbour>,
    /// The other ranks of this stage, in rank order.
    pub siblings: Vec<Neighbour>,
    /// What frames are checked against.
    pub limits: ReplicaLimits,
}

/// A shard beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its worker.
    pub node: NodeId,
    /// Its stage.
    pub stage: StageIndex,
    /// Its rank.
    pub rank: RankIndex,
    /// Its worker's `shoal-act` endpoint.
    pub address: SocketAddr,
}

impl std::fmt::Display for Neighbour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank.0 {
            0 => write!(f, "{} ({} at {})", self.node, self.stage, self.address),
            rank => write!(f, "{} ({} rank {rank} at {})", self.node, self.stage, self.address),
        }
    }
}

/// An assignment that names no way to a neighbour.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRing {
    /// The stage is not in the layout.
    #[error("the assignment's {0} is not in its layout")]
    NoStage(StageIndex),
    /// The rank is not in its stage.
    #[error("the assignment's rank {1} is not in {0}")]
    NoRank(StageIndex, u32),
    /// A stage has no shard.
    #[error("{0} has no shard")]
    NoShard(StageIndex),
    /// A stage has more ranks than links can name.
    #[error("{0} has {1} tensor ranks; at most {RANKS_MAX} are possible")]
    Ranks(StageIndex, usize),
    /// A peer has no address.
    #[error("no address is given for {0}, which has {1}")]
    NoAddress(NodeId, StageIndex),
}

impl LinkPlan {
    /// What is around this shard; `None` where it is the only one.
    pub fn of(assignment: &Assignment) -> Result<Option<Self>, BadRing> {
        let replica = &assignment.replica;
        check(assignment)?;
        let me: Place = (assignment.stage.0, assignment.rank.0);
        let places = places(replica);
        if places.len() == 1 {
            return Ok(None);
        }
        let neighbour = |(stage, rank): Place| neighbour(assignment, StageIndex(stage), rank);
        let all = |wanted: &dyn Fn(&Place) -> bool| -> Result<Vec<_>, BadRing> {
            places.iter().copied().filter(wanted).map(neighbour).collect()
        };
        let is_fed = |place: &Place| feeder(replica, *place) == Some(me);
        Ok(Some(Self {
            replica: replica.id,
            generation: replica.generation,
            stage: assignment.stage,
            split: Split { rank: me.1, ranks: ranks(replica, me.0) },
            upstream: feeder(replica, me).map(neighbour).transpose()?,
            mirrors: all(&|place| is_fed(place) && place.0 == me.0)?,
            downstream: all(&|place| is_fed(place) && place.0 != me.0)?,
            siblings: all(&|place| place.0 == me.0 && *place != me)?,
            limits: replica.limits.clone(),
        }))
    }

    /// How many links come up before the shard is linked.
    pub fn links(&self) -> usize {
        let ends = [&self.mirrors, &self.downstream, &self.siblings];
        usize::from(self.upstream.is_some()) + ends.iter().map(|ends| ends.len()).sum::<usize>()
    }

    /// How this shard says which link it is.
    pub(super) fn hello_to(&self, to: &Neighbour, of_ranks: bool) -> LinkHello {
        LinkHello {
            generation: self.generation.0,
            replica: self.replica.0,
            from_stage: self.stage.0,
            to_stage: to.stage.0,
            ranks: LinkHello::ranks_of(RankIndex(self.split.rank), to.rank, of_ranks),
        }
    }
}

fn check(assignment: &Assignment) -> Result<(), BadRing> {
    let replica = &assignment.replica;
    for (stage, plan) in (0..).map(StageIndex).zip(&replica.stages) {
        match plan.shards.len() {
            0 => return Err(BadRing::NoShard(stage)),
            ranks if ranks > RANKS_MAX as usize => return Err(BadRing::Ranks(stage, ranks)),
            _ => {}
        }
    }
    match ranks(replica, assignment.stage.0) {
        0 => Err(BadRing::NoStage(assignment.stage)),
        ranks if assignment.rank.0 >= ranks => {
            Err(BadRing::NoRank(assignment.stage, assignment.rank.0))
        }
        _ => Ok(()),
    }
}

fn neighbour(assignment: &Assignment, stage: StageIndex, rank: u32) -> Result<Neighbour, BadRing> {
    let node = assignment.replica.stages[stage.0 as usize].shards[rank as usize].node;
    let peer = assignment.peers.iter().find(|peer| peer.node == node);
    let address = peer.ok_or(BadRing::NoAddress(node, stage))?.activations;
    Ok(Neighbour { node, stage, rank: RankIndex(rank), address })
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
            assert_eq!(plan.upstream.unwrap().node.to_string(), upstream);
            assert_eq!(plan.downstream[0].node.to_string(), downstream);
            assert_eq!((plan.downstream.len(), plan.links()), (1, 2));
        }
        let pair = LinkPlan::of(&assignment(0, 2)).unwrap().unwrap();
        assert_eq!(pair.upstream.unwrap(), pair.downstream[0]);
        assert_eq!(pair.downstream[0].to_string(), "w2 (stage 1 at 127.0.0.1:4001)");
        assert_eq!(LinkPlan::of(&assignment(0, 1)), Ok(None));
    }

    /// Where a place of a mesh dials to and is dialled from, in words.
    fn around(mesh: &[u32], stage: u32, rank: u32) -> String {
        let mut assignment = assignment(0, mesh.len() as u32);
        let mut number = 0;
        for (stage, ranks) in assignment.replica.stages.iter_mut().zip(mesh) {
            let shard = stage.shards[0].clone();
            let mut next = |rank| {
                number += 1;
                ShardPlan { rank: RankIndex(rank), node: NodeId::worker(number), ..shard.clone() }
            };
            stage.shards = (0..*ranks).map(&mut next).collect();
        }
        let address = assignment.peers[0].clone();
        assignment.peers = (1..=number)
            .map(|n| PeerAddress { node: NodeId::worker(n), ..address.clone() })
            .collect();
        (assignment.stage, assignment.rank) = (StageIndex(stage), RankIndex(rank));
        let plan = LinkPlan::of(&assignment).unwrap().unwrap();
        let names = |all: &[Neighbour]| {
            all.iter().map(|n| n.node.to_string()).collect::<Vec<_>>().join("+")
        };
        let from = plan.upstream.map_or("head".to_owned(), |n| n.node.to_string());
        let (mirrors, down) = (names(&plan.mirrors), names(&plan.downstream));
        format!("{from} > {mirrors} > {down} | {}", names(&plan.siblings))
    }

    #[test]
    fn every_rank_has_one_that_feeds_it_and_pairs_with_its_siblings() {
        // 2x2: w1 w2 | w3 w4.
        assert_eq!(around(&[2, 2], 0, 0), "w3 > w2 > w3 | w2");
        assert_eq!(around(&[2, 2], 0, 1), "w1 >  > w4 | w1");
        assert_eq!(around(&[2, 2], 1, 0), "w1 >  > w1 | w4");
        assert_eq!(around(&[2, 2], 1, 1), "w2 >  >  | w3");
        // One stage: the head gives the others what it has.
        assert_eq!(around(&[3], 0, 0), "head > w2+w3 >  | w2+w3");
        assert_eq!(around(&[3], 0, 2), "w1 >  >  | w1+w2");
        // Stages of different numbers of ranks: w1 | w2 w3 w4 | w5.
        assert_eq!(around(&[1, 3, 1], 0, 0), "w5 >  > w2+w3+w4 | ");
        assert_eq!(around(&[1, 3, 1], 1, 0), "w1 >  > w5 | w3+w4");
        assert_eq!(around(&[1, 3, 1], 1, 2), "w1 >  >  | w2+w3");
        assert_eq!(around(&[1, 3, 1], 2, 0), "w2 >  > w1 | ");
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
        check(|a| a.rank.0 = 1, "the assignment's rank 1 is not in stage 1");
        check(
            |a| a.peers.retain(|peer| peer.node != NodeId::worker(3)),
            "no address is given for w3, which has stage 2",
        );
    }
}
