//! Random walks: whatever happens, no worker is promised more than it has, no number names two layouts,
//! and once nothing happens any more everything comes to rest.

use std::collections::BTreeMap;

use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::plan::StagesAsked;

use super::tests::World;
use super::*;
use crate::control::state::check::violations;
use crate::control::state::{Change, DeploymentCommand, DrainCommand};

const WALKS: u64 = 150;
const STEPS: u64 = 60;

/// An LCG's high bits.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// All layouts that there have been, by replica and number.
type Seen = BTreeMap<(ReplicaId, Generation), ReplicaPlan>;

struct Walk {
    world: World,
    dice: Dice,
    incarnations: BTreeMap<u32, u64>,
    seen: Seen,
    deployed: u32,
}

fn name(number: u32) -> DeploymentName {
    DeploymentName::new(format!("d{number}")).unwrap()
}

impl Walk {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let workers = 2 + dice.below(5) as u32;
        let world = World::empty(workers, Bytes::mib(45 + dice.below(200)));
        let incarnations = (1..=workers).map(|number| (number, 1)).collect();
        Self { world, dice, incarnations, seen: Seen::new(), deployed: 0 }
    }

    fn some_worker(&mut self) -> u32 {
        1 + self.dice.below(self.incarnations.len() as u64) as u32
    }

    fn some_stages(&mut self) -> Option<u32> {
        Some(self.dice.below(4) as u32).filter(|stages| *stages > 0)
    }

    fn change(&mut self, change: Change) {
        // A refusal is an answer, too.
        let _ = self.world.try_apply(change);
    }

    fn happen(&mut self) {
        let number = self.some_worker();
        let node = NodeId::worker(number);
        match self.dice.below(12) {
            0 => self.world.lose_if_there(number),
            1 | 2 => {
                let restarted = self.dice.below(2);
                let incarnation = self.incarnations.entry(number).or_default();
                *incarnation += restarted;
                let incarnation = *incarnation;
                self.world.connect(number, incarnation);
            }
            3 => self.change(Change::Drain(DrainCommand::Begin { node })),
            4 => self.change(Change::Drain(DrainCommand::End { node })),
            5 if self.deployed < 4 => {
                self.deployed += 1;
                let (stages, replicas) = (self.some_stages(), 1 + self.dice.below(3) as u32);
                let name = format!("d{}", self.deployed);
                self.world.deploy_many(&name, stages, replicas, (1 + self.dice.below(10)) << 20);
            }
            6 => {
                let replicas = Some(1 + self.dice.below(4) as u32);
                let stages = match self.some_stages() {
                    Some(stages) => StagesAsked::Exactly(stages),
                    None => StagesAsked::Auto,
                };
                let name = name(1 + self.dice.below(4) as u32);
                let scale = DeploymentCommand::Scale { name, replicas, stages };
                self.change(Change::Deployment(scale));
            }
            7 if self.dice.below(4) == 0 => {
                let name = name(1 + self.dice.below(4) as u32);
                self.change(Change::Deployment(DeploymentCommand::Remove { name }));
            }
            8 if self.dice.below(4) == 0 => {
                // Another coordinator takes over, and knows nothing.
                let now = self.world.observed.now;
                self.world.observed = Observed { now, since: now, ..Observed::default() };
            }
            9 => self.world.fail_if_there(number, ErrorCode::ComputeFailed),
            10 => self.world.fail_if_there(number, ErrorCode::WorkerLost),
            _ => self.world.report_if_there(number, ShardState::Ready),
        }
        let pause = 1 + self.dice.below(8_000);
        self.world.observed.now = self.world.observed.now + Duration::from_millis(pause);
    }

    fn round(&mut self) -> Decision {
        let drains = self.world.state.drains.clone();
        let decision = self.world.round();
        for action in &decision.actions {
            if let Action::Adopt { plan, .. } | Action::Prepare { plan, .. } = action {
                let drained = plan.nodes().find(|node| drains.contains(*node));
                assert_eq!(drained, None, "a new layout on a drained worker: {action}");
            }
        }
        assert_eq!(violations(&self.world.state), []);
        let mut held: BTreeMap<NodeId, Bytes> = BTreeMap::new();
        for plan in self.world.state.plans.all() {
            let first = self.seen.entry((plan.id, plan.generation)).or_insert_with(|| plan.clone());
            assert_eq!(first, plan, "two layouts under one number");
            for shard in plan.stages.iter().flat_map(|stage| &stage.shards) {
                let of = held.entry(shard.node).or_default();
                *of = *of + shard.memory.total();
            }
        }
        for (node, bytes) in held {
            assert!(bytes <= self.world.memory, "{node} is promised {bytes}");
        }
        decision
    }

    /// Everybody is there and does what it is told, as soon as it is told.
    fn rest(&mut self) {
        for number in self.incarnations.clone().into_keys() {
            let incarnation = self.incarnations[&number];
            self.world.connect_if_gone(number, incarnation);
        }
        let mut quiet = 0;
        for _ in 0..400 {
            let decision = self.round();
            for number in self.incarnations.clone().into_keys() {
                self.world.report_if_there(number, ShardState::Ready);
            }
            self.world.observed.now = self.world.observed.now + Duration::from_secs(2);
            quiet = if decision.actions.is_empty() { quiet + 1 } else { 0 };
            // Longer than the longest wait after a failure.
            if quiet > 20 {
                return self.check_rest(&decision);
            }
        }
        panic!("it does not come to rest: {}", self.round());
    }

    fn check_rest(&self, decision: &Decision) {
        assert_eq!(self.world.state.plans.nexts().count(), 0, "{decision}");
        for (id, stand) in &decision.replicas {
            let waits = stand.phase == DeploymentPhase::Waiting
                || stand.phase == DeploymentPhase::Failed
                || (stand.phase == DeploymentPhase::Ready && stand.reason.contains(", but "));
            assert!(stand.settled || waits, "{id}: {stand:?}");
        }
    }
}

#[test]
fn whatever_happens_it_comes_to_rest_and_no_worker_is_promised_more_than_it_has() {
    let mut settled = 0;
    for seed in 0..WALKS {
        let mut walk = Walk::new(seed);
        for _ in 0..STEPS {
            walk.happen();
            walk.round();
        }
        walk.rest();
        let last = walk.round();
        settled += last.replicas.values().filter(|stand| stand.settled).count();
    }
    assert!(settled > WALKS as usize, "the walks are lopsided: {settled} replicas are served");
}
