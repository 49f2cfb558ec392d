//! A cluster for stories of the reconciler, and hands that do what it decides.

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

pub(super) const MS: u64 = 1000;

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
            facts: Facts::default(),
            rtt: None,
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
