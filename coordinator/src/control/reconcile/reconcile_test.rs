//! Reconciliation as stories: what happens, and the whole list of actions that follows.

use shoal_protocol::control::{DeviceInfo, ShardCounters, ShardReport, ShardState};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::Role;
use shoal_protocol::plan::{ModelRef, ModelSource, Numerics, ShardMemory};
use shoal_protocol::version::VersionRange;

use super::*;
use crate::control::shape::small_pretend;
use crate::control::state::{
    Change, Command, DeploymentCommand, KeyFingerprint, NodeCommand, Refusal, Timestamp,
};

const MS: u64 = 1000;

/// A state, what is observed, and hands that do what a decision says.
pub(super) struct World {
    pub(super) state: ClusterState,
    pub(super) observed: Observed,
    sequence: u64,
    /// Of each worker that connects.
    pub(super) memory: Bytes,
}

impl World {
    /// A cluster with `n` workers that are connected, and the deployment `m` of 6 layers of 100 MiB.
    pub(super) fn new(n: u32, stages: Option<u32>) -> Self {
        let mut world = Self::empty(n, Bytes::mib(420));
        world.deploy("m", stages);
        world
    }

    /// A cluster with `n` workers of so much memory.
    pub(super) fn empty(n: u32, memory: Bytes) -> Self {
        let (state, observed) = (ClusterState::default(), Observed::default());
        let mut world = World { state, observed, sequence: 0, memory };
        (1..=n).for_each(|number| world.join(number));
        world
    }

    pub(super) fn join(&mut self, number: u32) {
        let key = KeyFingerprint([0; 32]);
        self.apply(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }));
        self.connect(number, 1);
    }

    pub(super) fn deploy(&mut self, name: &str, stages: Option<u32>) {
        self.deploy_many(name, stages, 1, 100 << 20);
    }

    pub(super) fn deploy_many(
        &mut self,
        name: &str,
        stages: Option<u32>,
        replicas: u32,
        layer: u64,
    ) {
        let shape = small_pretend(6, layer);
        let spec = DeploymentSpec {
            name: DeploymentName::new(name).unwrap(),
            model: ModelRef {
                source: ModelSource::Pretend(shape.clone()),
                fingerprint: shape.fingerprint(),
            },
            stages,
            precision: None,
        };
        let shape = ModelShape::Pretend(shape);
        self.apply(Change::Deployment(DeploymentCommand::Create { spec, shape, replicas }));
    }

    pub(super) fn apply(&mut self, change: Change) {
        self.try_apply(change).unwrap();
    }

    pub(super) fn try_apply(&mut self, change: Change) -> Result<(), Refusal> {
        self.sequence += 1;
        let command = Command {
            client: NodeId::coordinator(1),
            incarnation: Incarnation(1),
            sequence: self.sequence,
            at: Timestamp(0),
            change,
        };
        self.state.apply(&command).map(drop)
    }

    pub(super) fn connect(&mut self, number: u32, incarnation: u64) {
        let device = DeviceInfo {
            name: "cpu".into(),
            description: String::new(),
            memory: self.memory,
            threads: 1,
        };
        let address = |port: u16| {
            let port = port + number as u16 + 100 * incarnation as u16;
            std::net::SocketAddr::from(([127, 0, 0, 1], port))
        };
        let register = Register {
            versions: VersionRange::OURS,
            build: "test".into(),
            node: NodeId::worker(number),
            incarnation: Incarnation(incarnation),
            pid: number,
            requests: address(9000),
            activations: address(4000),
            devices: vec![device],
            numerics: vec![Numerics::N1],
        };
        let report = Report::default();
        let worker = ObservedWorker {
            connected: true,
            silent_for: Duration::ZERO,
            register,
            report,
            pushed: None,
        };
        self.observed.workers.insert(NodeId::worker(number), worker);
    }

    pub(super) fn worker(&mut self, number: u32) -> &mut ObservedWorker {
        self.observed.workers.get_mut(&NodeId::worker(number)).unwrap()
    }

    pub(super) fn lose(&mut self, number: u32) {
        self.worker(number).connected = false;
    }

    /// The worker reports this state for all that it was told to be.
    pub(super) fn report(&mut self, number: u32, state: ShardState) {
        let worker = self.worker(number);
        let shards = worker.pushed.iter().flatten().map(|assignment| ShardReport {
            replica: assignment.replica.id,
            generation: assignment.replica.generation,
            stage: assignment.stage,
            state: state.clone(),
            memory: ShardMemory::default(),
            counters: ShardCounters::default(),
        });
        worker.report.shards = shards.collect();
    }

    pub(super) fn lose_if_there(&mut self, number: u32) {
        if self.observed.workers.contains_key(&NodeId::worker(number)) {
            self.lose(number);
        }
    }

    pub(super) fn connect_if_gone(&mut self, number: u32, incarnation: u64) {
        let worker = self.observed.workers.get(&NodeId::worker(number));
        if worker.is_none_or(|worker| !worker.connected) {
            self.connect(number, incarnation);
        }
    }

    pub(super) fn report_if_there(&mut self, number: u32, state: ShardState) {
        if self.observed.workers.contains_key(&NodeId::worker(number)) {
            self.report(number, state);
        }
    }

    pub(super) fn fail_if_there(&mut self, number: u32, code: ErrorCode) {
        self.report_if_there(number, ShardState::Failed(WireError::new(code, "it broke")));
    }

    pub(super) fn fail(&mut self, number: u32, code: ErrorCode, message: &str) {
        self.report(number, ShardState::Failed(WireError::new(code, message)));
    }

    /// One round: what it decides, which is also done.
    pub(super) fn round(&mut self) -> Decision {
        let decision = reconcile(&self.state, &self.observed);
        self.observed.history = decision.history.clone();
        for action in &decision.actions {
            if let Some(command) = action.proposal() {
                self.apply(Change::Plan(command));
            } else if let Action::Assign { node, assignments, .. } = action.clone() {
                let worker = self.observed.workers.get_mut(&node).unwrap();
                worker.pushed = Some(assignments);
            }
        }
        decision
    }

    /// A round at this time must print as exactly these lines.
    #[track_caller]
    pub(super) fn expect(&mut self, at_ms: u64, lines: &[&str]) {
        self.observed.now = Instant(at_ms * MS);
        let decision = self.round();
        let printed = decision.to_string();
        assert_eq!(printed.lines().collect::<Vec<_>>(), lines);
        let again = reconcile(&self.state, &self.observed).actions;
        let adopts = |actions: &[Action]| {
            actions.iter().filter(|action| matches!(action, Action::Adopt { .. })).count()
        };
        assert_eq!(adopts(&again), 0, "a second layout for the same observation: {again:?}");
    }

    /// Every worker is what it was told to be, until nothing changes.
    pub(super) fn settle(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        for _ in 0..40 {
            let decision = self.round();
            let numbers: Vec<_> = self.observed.workers.keys().map(|node| node.number).collect();
            numbers.into_iter().for_each(|number| self.report(number, ShardState::Ready));
            if decision.actions.is_empty() {
                return said;
            }
            said.extend(decision.actions.iter().map(ToString::to_string));
            self.observed.now = self.observed.now + Duration::from_millis(100);
        }
        panic!("it does not come to rest: {said:#?}");
    }

    /// Brings `m` up on all workers, by `at_ms`.
    pub(super) fn ready(n: u32, stages: Option<u32>, at_ms: u64) -> Self {
        let mut world = Self::new(n, stages);
        world.observed.now = Instant(at_ms * MS);
        world.round();
        world.round();
        for number in 1..=n {
            world.report(number, ShardState::Ready);
        }
        let decision = world.round();
        assert_eq!(decision.actions, []);
        world
    }
}

#[test]
fn a_deployment_is_planned_then_told_then_ready() {
    let mut world = World::new(3, None);
    world.expect(
        0,
        &[
            "adopt r1 g1 (3x1 on w1, w2, w3): it has no layout yet",
            "assign w1 0 shards: it has just connected",
            "assign w2 0 shards: it has just connected",
            "assign w3 0 shards: it has just connected",
            "m is Loading: g1 is being made: 3x1 on w1, w2, w3",
        ],
    );
    world.expect(
        1,
        &[
            "assign w1 1 shard: r1 g1: stage 0 with layers 0..2",
            "assign w2 1 shard: r1 g1: stage 1 with layers 2..4",
            "assign w3 1 shard: r1 g1: stage 2 with layers 4..6",
            "m is Loading: g1: w1 is told, w2 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Loading { done: Bytes::mib(50), total: Bytes::mib(200) });
    world.report(3, ShardState::Linking);
    world.expect(2, &["m is Loading: g1: w2 has loaded 25 % of 200.0 MiB, w3 links"]);
    world.report(2, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(3, &["m is Ready: g1 3x1 on w1, w2, w3"]);
    let told = world.worker(2).pushed.clone().unwrap();
    let ports: Vec<_> = told[0].peers.iter().map(|peer| peer.activations.port()).collect();
    assert_eq!(ports, [4101, 4102, 4103]);
}

#[test]
fn a_coordinator_that_was_away_waits_for_all_of_its_workers() {
    let mut world = World::ready(3, None, 10_000);
    (1..=3).for_each(|number| world.lose(number));
    world.expect(10_100, &["m is Loading: no worker of it is connected; this coordinator waits a moment for w1, w2, w3"]);
    // The first one back does not get all of the layers.
    world.worker(2).connected = true;
    world.expect(
        10_200,
        &["m is Loading: no worker of it is connected; this coordinator waits a moment for w1, w3"],
    );
    world.worker(1).connected = true;
    world.worker(3).connected = true;
    world.expect(10_300, &["m is Ready: g1 3x1 on w1, w2, w3"]);
    // From then on a lost worker is a lost worker again.
    world.lose(2);
    world.observed.now = Instant(10_400 * MS);
    let decision = world.round();
    assert!(decision.actions.iter().any(|action| matches!(action, Action::Adopt { .. })));
}

#[test]
fn a_lost_worker_is_planned_around_at_once() {
    let mut world = World::ready(3, None, 10_000);
    world.lose(2);
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (2x1 on w1, w3): w2 was lost",
            "m is Loading: g2 is being made: 2x1 on w1, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..3",
            "assign w3 1 shard: r1 g2: stage 1 with layers 3..6",
            "m is Loading: g2: w1 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(10_200, &["m is Ready: g2 2x1 on w1, w3"]);
    // It comes back: told to be nothing, and what runs is left alone.
    world.connect(2, 2);
    world.expect(
        10_300,
        &["assign w2 0 shards: it has just connected", "m is Ready: g2 2x1 on w1, w3"],
    );
}

#[test]
fn a_removed_worker_is_replaced_or_nobody_goes_on_with_it() {
    let mut world = World::ready(3, None, 10_000);
    let remove = |number| Change::Node(NodeCommand::Remove { node: NodeId::worker(number) });
    world.apply(remove(2));
    world.observed.workers.remove(&NodeId::worker(2));
    // The others keep what they have until the next round, which has the new layout.
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (2x1 on w1, w3): w2 was removed",
            "m is Loading: g2 is being made: 2x1 on w1, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..3",
            "assign w3 1 shard: r1 g2: stage 1 with layers 3..6",
            "m is Loading: g2: w1 is told, w3 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(3, ShardState::Ready);
    world.expect(10_200, &["m is Ready: g2 2x1 on w1, w3"]);
    world.apply(remove(3));
    world.observed.workers.remove(&NodeId::worker(3));
    world.observed.now = Instant(60_000 * MS);
    let decision = world.round().to_string();
    assert!(decision.starts_with("assign w1 0 shards: no more r1 g2\n"), "{decision}");
    assert!(decision.contains("m is Waiting: w3 was removed; "), "{decision}");
}

#[test]
fn a_worker_that_was_started_again_gets_its_layers_back_in_a_new_generation() {
    let mut world = World::ready(3, Some(3), 10_000);
    world.connect(2, 2);
    world.expect(
        10_100,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w2 was started again",
            "assign w2 1 shard: it has just connected; r1 g1: stage 1 with layers 2..4",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
    world.expect(
        10_101,
        &[
            "assign w1 1 shard: r1 g2: stage 0 with layers 0..2",
            "assign w2 1 shard: r1 g2: stage 1 with layers 2..4",
            "assign w3 1 shard: r1 g2: stage 2 with layers 4..6",
            "m is Loading: g2: w1 is told, w2 is told, w3 is told",
        ],
    );
}

#[test]
fn what_does_not_fit_waits_for_a_worker() {
    let mut world = World::ready(3, Some(3), 10_000);
    world.lose(3);
    let refusal = "m is Waiting: w3 was lost; 3 stages were asked for, but 2 workers are connected and each takes one stage of a replica; start 1 more, or give --stages 2";
    world.expect(10_100, &[refusal]);
    world.fail(1, ErrorCode::WorkerLost, "the link to w3 broke");
    world.expect(10_200, &[refusal]);
    world.connect(3, 2);
    world.expect(
        60_000,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w3 was started again",
            "assign w3 1 shard: it has just connected; r1 g1: stage 2 with layers 4..6",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_broken_link_waits_for_its_cause_and_is_then_replaced() {
    let mut world = World::ready(3, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.expect(10_000, &["m is Loading: w1: the link to w2 broke"]);
    let wake_at = world.round().wake_at;
    assert_eq!(wake_at, Some(Instant(10_020 * MS)));
    // One that is silent since may be found dead any moment; two seconds are enough for that.
    world.worker(2).silent_for = Duration::from_millis(40);
    world.expect(10_030, &["m is Loading: w1: the link to w2 broke"]);
    world.worker(2).silent_for = Duration::from_millis(2010);
    world.expect(11_999, &["m is Loading: w1: the link to w2 broke"]);
    world.expect(
        12_000,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w1: the link to w2 broke",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_broken_link_between_two_that_are_heard_is_replaced_at_once() {
    let mut world = World::ready(3, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.expect(10_000, &["m is Loading: w1: the link to w2 broke"]);
    world.worker(2).silent_for = Duration::from_millis(9);
    // The same workers, linked anew.
    world.expect(
        10_020,
        &[
            "adopt r1 g2 (3x1 on w1, w2, w3): w1: the link to w2 broke; all its workers were heard \
             since, so it is a link or a shard",
            "m is Loading: g2 is being made: 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn repeated_failures_are_spaced_out_and_forgotten_after_a_while() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::ComputeFailed, "not finite");
    let adopt = |generation: u64| format!("adopt r1 g{generation} (2x1 on w1, w2): w1: not finite");
    let mut now = 10_000;
    for (generation, wait) in [(2, 0), (3, 250), (4, 500), (5, 1000)] {
        world.observed.now = Instant(now * MS);
        if wait > 0 {
            let decision = world.round();
            assert_eq!(decision.actions, []);
            assert_eq!(decision.wake_at, Some(Instant((now + wait) * MS)));
        }
        now += wait;
        world.observed.now = Instant(now * MS);
        let adopted = world.round();
        assert_eq!(adopted.actions[0].to_string(), adopt(generation));
        world.round();
        world.fail(1, ErrorCode::ComputeFailed, "not finite");
    }
    now += 2000;
    world.observed.now = Instant(now * MS);
    assert_eq!(world.round().actions[0].to_string(), adopt(6));
    world.round();
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.round();
    now += STABLE_AFTER.as_millis() as u64;
    world.observed.now = Instant(now * MS);
    world.round();
    world.fail(1, ErrorCode::ComputeFailed, "not finite");
    assert_eq!(world.round().actions[0].to_string(), adopt(7));
}

#[test]
fn what_no_layout_can_mend_fails_with_the_workers_words() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::WorkerLost, "the link to w2 broke");
    world.fail(2, ErrorCode::BadModel, "model.safetensors: truncated");
    world.observed.now = Instant(20_000 * MS);
    // The other worker's copy is good, and it has no room for all of it.
    let printed = world.round().to_string();
    let words = "m is Failed: w2: model.safetensors: truncated; the model does not fit";
    assert!(printed.starts_with(words), "{printed}");
    // A worker that was started again may have better files.
    world.connect(2, 2);
    let decision = world.round();
    assert_eq!(
        decision.actions[0].to_string(),
        "adopt r1 g2 (2x1 on w1, w2): w2 was started again"
    );
}

#[test]
fn a_new_coordinator_waits_for_the_workers_and_disturbs_nothing() {
    let mut world = World::ready(3, None, 0);
    let before = std::mem::take(&mut world.observed);
    world.observed.since = Instant(100_000 * MS);
    let waits = "m is Loading: this coordinator has just started and waits for";
    world.expect(100_000, &[&format!("{waits} w1, w2, w3")]);
    for number in [1, 3] {
        world.connect(number, 1);
        let report = before.workers[&NodeId::worker(number)].report.clone();
        world.worker(number).report = report;
    }
    // They are not told to drop what they have while w2 may still come.
    world.expect(101_000, &[&format!("{waits} w2")]);
    world.connect(2, 1);
    world.worker(2).report = before.workers[&NodeId::worker(2)].report.clone();
    world.expect(
        102_000,
        &[
            "assign w1 1 shard: it has just connected; r1 g1: stage 0 with layers 0..2",
            "assign w2 1 shard: it has just connected; r1 g1: stage 1 with layers 2..4",
            "assign w3 1 shard: it has just connected; r1 g1: stage 2 with layers 4..6",
            "m is Ready: g1 3x1 on w1, w2, w3",
        ],
    );
}

#[test]
fn a_new_coordinator_goes_on_without_a_worker_that_does_not_come() {
    let mut world = World::ready(3, None, 0);
    world.observed = Observed { since: Instant(100_000 * MS), ..Observed::default() };
    world.connect(1, 1);
    world.connect(3, 1);
    world.expect(104_999, &["m is Loading: this coordinator has just started and waits for w2"]);
    assert_eq!(world.round().wake_at, Some(Instant(105_000 * MS)));
    world.observed.now = Instant(105_000 * MS);
    let decision = world.round();
    assert_eq!(
        decision.actions[0].to_string(),
        "adopt r1 g2 (2x1 on w1, w3): w2 did not come back"
    );
}

#[test]
fn deployments_share_memory_and_leave_each_other_alone() {
    let mut world = World::ready(2, Some(2), 10_000);
    // 300 of 420 MiB are taken on each: a second one does not fit.
    world.deploy("n", Some(2));
    world.observed.now = Instant(10_000 * MS);
    let decision = world.round();
    assert_eq!(decision.actions, []);
    let name = |text| DeploymentName::new(text).unwrap();
    assert_eq!(decision.phases[&name("n")].phase, DeploymentPhase::Waiting);
    assert_eq!(decision.phases[&name("m")].phase, DeploymentPhase::Ready);
    let reason = &decision.phases[&name("n")].reason;
    assert!(reason.contains("420.0 MiB, of which other models have"), "{reason}");
    // With more workers it fits, and the first one's generation stays.
    let key = KeyFingerprint([0; 32]);
    for number in [3, 4] {
        world.apply(Change::Node(NodeCommand::Enrol { role: Role::Worker, key }));
        world.connect(number, 1);
    }
    let decision = world.round();
    let printed: Vec<_> = decision.actions.iter().map(|action| action.to_string()).collect();
    assert_eq!(
        printed,
        [
            "adopt r2 g1 (2x1 on w3, w4): it has no layout yet",
            "assign w3 0 shards: it has just connected",
            "assign w4 0 shards: it has just connected",
        ]
    );
    let remove = DeploymentCommand::Remove { name: name("m") };
    world.apply(Change::Deployment(remove));
    world.expect(
        11_000,
        &[
            "assign w1 0 shards: no more r1 g1",
            "assign w2 0 shards: no more r1 g1",
            "assign w3 1 shard: r2 g1: stage 0 with layers 0..3",
            "assign w4 1 shard: r2 g1: stage 1 with layers 3..6",
            "n is Loading: g1: w3 is told, w4 is told",
        ],
    );
}

#[test]
fn a_state_from_an_old_backup_goes_on_after_what_the_workers_have_seen() {
    let mut world = World::ready(2, None, 10_000);
    // The workers have seen four more layouts than the state, and w1 even one more.
    for (number, generation) in [(1, 6), (2, 5)] {
        world.fail(number, ErrorCode::StaleGeneration, "the coordinator's data is older");
        world.worker(number).report.shards[0].generation = Generation(generation);
    }
    world.expect(
        10_000,
        &[
            "adopt r1 g7 (2x1 on w1, w2): w1: the coordinator's data is older",
            "m is Loading: g7 is being made: 2x1 on w1, w2",
        ],
    );
    // What they say until they have read of it is no news.
    world.expect(
        10_001,
        &[
            "assign w1 1 shard: r1 g7: stage 0 with layers 0..3",
            "assign w2 1 shard: r1 g7: stage 1 with layers 3..6",
            "m is Loading: g7: w1 is told, w2 is told",
        ],
    );
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.expect(10_002, &["m is Ready: g7 2x1 on w1, w2"]);
}

#[test]
fn another_layout_under_the_same_number_is_made_anew_and_nonsense_is_not_believed() {
    let mut world = World::ready(2, None, 10_000);
    world.fail(1, ErrorCode::StaleGeneration, "taken");
    world.worker(2).report.shards[0].generation = Generation(u64::MAX);
    world.expect(
        10_000,
        &[
            "adopt r1 g2 (2x1 on w1, w2): w1: taken",
            "m is Loading: g2 is being made: 2x1 on w1, w2",
        ],
    );
}

#[test]
fn a_worker_that_is_silent_about_what_it_was_told_ends_the_generation() {
    let mut world = World::ready(2, None, 10_000);
    world.worker(1).report.shards.clear();
    world.expect(10_000, &["m is Loading: g1: w1 is told"]);
    assert_eq!(world.round().wake_at, Some(Instant(20_000 * MS)));
    world.expect(19_999, &["m is Loading: g1: w1 is told"]);
    let silent = "w1 was told its shard and has not begun to load it for 10s";
    world.expect(
        20_000,
        &[
            &format!("adopt r1 g2 (2x1 on w1, w2): {silent}"),
            "m is Loading: g2 is being made: 2x1 on w1, w2",
        ],
    );
    // The next one has all of its time.
    world.observed.now = Instant(20_001 * MS);
    world.round();
    world.report(2, ShardState::Ready);
    world.expect(30_000, &["m is Loading: g2: w1 is told"]);
}

#[test]
fn a_load_may_take_as_long_as_it_goes_on() {
    let mut world = World::ready(2, None, 0);
    let loaded = |done| ShardState::Loading { done: Bytes::mib(done), total: Bytes::mib(300) };
    let mut now = 0;
    for done in 0..10 {
        world.report(1, loaded(done));
        world.report(2, ShardState::Linking);
        world.observed.now = Instant(now * MS);
        assert_eq!(world.round().actions, []);
        now += 119_000;
    }
    world.observed.now = Instant(now * MS);
    assert_eq!(world.round().actions, [], "w2 waits for w1, whose time has not passed");
    world.observed.now = Instant((now + 1000) * MS);
    let action = world.round().actions[0].to_string();
    let words = "w1 has loaded 9.0 MiB and nothing more for 120s";
    assert_eq!(action, format!("adopt r1 g2 (2x1 on w1, w2): {words}"));
}

#[test]
fn a_link_that_does_not_come_up_ends_the_generation() {
    let mut world = World::ready(3, None, 10_000);
    world.report(1, ShardState::Linking);
    world.report(2, ShardState::Linking);
    world.expect(50_000, &["m is Loading: g1: w1 links, w2 links"]);
    world.report(2, ShardState::Ready);
    world.observed.now = Instant(70_000 * MS);
    let action = world.round().actions[0].to_string();
    let words = "w1 has loaded its shard and has not linked it for 20s";
    assert_eq!(action, format!("adopt r1 g2 (3x1 on w1, w2, w3): {words}"));
}

#[test]
fn a_follower_foresees_and_blames_nobody() {
    let mut world = World::ready(3, None, 0);
    world.observed.follows = true;
    world.lose(2);
    for at_ms in [10_000, 20_000, 60_000] {
        world.observed.now = Instant(at_ms * MS);
        let decision = world.round();
        assert_eq!(decision.actions, [], "only the leader acts");
        let history = decision.history.values().next().unwrap();
        assert_eq!((history.failures, history.not_before), (0, Instant(0)), "{decision}");
    }
    // It becomes the leader, and acts at once.
    world.observed.follows = false;
    world.observed.now = Instant(60_001 * MS);
    let actions = world.round().actions;
    assert!(matches!(actions.first(), Some(Action::Adopt { .. })), "{actions:?}");
}

#[test]
fn a_new_leader_gives_a_layout_that_nobody_was_told_its_whole_time() {
    let mut world = World::new(2, Some(2));
    world.observed.now = Instant(0);
    // The leader made a layout and died before it told anybody.
    world.round();
    world.observed.follows = true;
    for at_ms in [10, 20_000, 40_000] {
        world.observed.now = Instant(at_ms * MS);
        let decision = world.round();
        assert_eq!(decision.actions, [], "{decision}");
        let phase = decision.phases.values().next().unwrap();
        assert!(phase.reason.starts_with("g1: ") && phase.reason.contains("is told"), "{phase:?}");
    }
    world.observed.follows = false;
    world.observed.now = Instant(40_001 * MS);
    let actions = world.round().actions;
    assert!(!actions.is_empty());
    assert!(actions.iter().all(|a| matches!(a, Action::Assign { .. })), "g1 is told: {actions:?}");
}

#[test]
fn whoever_follows_takes_restarted_workers_as_their_leader_does() {
    let mut world = World::ready(2, None, 10_000);
    world.observed.follows = true;
    let told: Vec<_> = (1..=2).map(|number| world.worker(number).pushed.clone()).collect();
    world.connect(1, 2);
    world.connect(2, 2);
    let words = "w1 was started again, w2 was started again";
    world.expect(10_100, &[&format!("m is Loading: {words}; g2 is for the leader to make")]);
    // The leader had not seen them before their new start, and tells them the layout that there is.
    for (number, told) in (1..).zip(told) {
        world.worker(number).pushed = told;
        world.report(number, ShardState::Linking);
    }
    world.expect(10_200, &["m is Loading: g1: w1 links, w2 links"]);
    world.report(1, ShardState::Ready);
    world.report(2, ShardState::Ready);
    world.expect(10_300, &["m is Ready: g1 2x1 on w1, w2"]);
}
