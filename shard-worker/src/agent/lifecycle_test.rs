//! The life of shards as dialogs: what is told, and all that follows.

use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{DeploymentName, NodeId, RankIndex, StageIndex};
use shoal_protocol::plan::{
    ModelRef, ModelSource, Numerics, PeerAddress, Precision, ReplicaLimits, ReplicaPlan, ShardPlan,
    StagePlan,
};
use shoal_protocol::units::LayerRange;

use super::*;

/// A shard of so many bytes with layers 0..`layers`.
fn assignment(replica: u32, generation: u64, layers: u32, bytes: u64) -> Assignment {
    let memory = ShardMemory { weights: Bytes(bytes), ..ShardMemory::default() };
    let device = "cpu".to_owned();
    let shard = ShardPlan { rank: RankIndex(0), node: NodeId::worker(1), device, memory };
    let stage = StagePlan { layers: LayerRange::new(0, layers), shards: vec![shard] };
    let source = ModelSource::Folder { path: "/model".to_owned() };
    let limits = ReplicaLimits {
        kv_blocks: 1,
        context_max: 16,
        step_rows_max: 1,
        sequences_max: 1,
        steps_in_flight_max: 1,
    };
    let replica = ReplicaPlan {
        id: ReplicaId(replica),
        deployment: DeploymentName::new("d").unwrap(),
        generation: Generation(generation),
        model: ModelRef { source, fingerprint: [0; 32] },
        precision: Precision::F32,
        numerics: Numerics::N1,
        stages: vec![stage],
        limits,
    };
    Assignment { replica, stage: StageIndex(0), rank: RankIndex(0), peers: Vec::new() }
}

const UNWANTED: &str = "r1 g1 is not wanted on this worker any more";
const REPLACED: &str = "g2 takes the place of r1 g1";

fn key(replica: u32, generation: u64) -> ShardKey {
    ShardKey { replica: ReplicaId(replica), generation: Generation(generation) }
}

fn states(lifecycle: &Lifecycle) -> Vec<(u64, ShardState)> {
    let report = lifecycle.report(|_| ShardCounters::default());
    report.into_iter().map(|shard| (shard.generation.0, shard.state)).collect()
}

fn loading(done: u64, total: u64) -> ShardState {
    ShardState::Loading { done: Bytes(done), total: Bytes(total) }
}

fn error() -> WireError {
    WireError::new(ErrorCode::WorkerLost, "w2 is gone")
}

/// A refusal that names the newest generation.
fn stale(newest: u64) -> ShardState {
    let error = is_stale(key(1, 1), Generation(newest));
    assert_eq!(error.code, ErrorCode::StaleGeneration);
    ShardState::Failed(error)
}

/// A worker with a budget of 100 whose shard of generation 1 is ready.
fn ready(layers: u32, bytes: u64) -> Lifecycle {
    let mut life = Lifecycle::new(Bytes(100));
    let first = assignment(1, 1, layers, bytes);
    let actions = life.handle(Event::Assigned(vec![first.clone()]));
    assert_eq!(actions, [Action::Load(LoadId(0), first.clone())]);
    assert_eq!(life.handle(Event::Loaded(LoadId(0))), [Action::Start(LoadId(0), first)]);
    assert_eq!(life.handle(Event::Linked(key(1, 1))), []);
    life
}

#[test]
fn a_shard_lives_from_load_to_drain() {
    let mut life = Lifecycle::new(Bytes(100));
    let first = assignment(1, 1, 4, 60);
    life.handle(Event::Assigned(vec![first.clone()]));
    assert_eq!(states(&life), [(1, loading(0, 60))]);
    assert_eq!(life.handle(Event::Progress(LoadId(0), Bytes(20), Bytes(30))), []);
    assert_eq!(states(&life), [(1, loading(20, 30))]);
    life.handle(Event::Loaded(LoadId(0)));
    assert_eq!(states(&life), [(1, ShardState::Linking)]);
    life.handle(Event::Linked(key(1, 1)));
    assert_eq!(states(&life), [(1, ShardState::Ready)]);

    assert_eq!(life.handle(Event::Assigned(vec![first])), [], "it is that already");
    let stop = Action::Stop(key(1, 1), Stop::Retire, UNWANTED.to_owned());
    assert_eq!(life.handle(Event::Assigned(vec![])), [stop]);
    assert_eq!(states(&life), [(1, ShardState::Draining)]);
    assert!(!life.is_empty());
    assert_eq!(life.handle(Event::Stopped { key: key(1, 1), kept: false }), []);
    assert!(life.is_empty());
}

#[test]
fn the_past_does_not_come_back() {
    let mut life = ready(4, 60);
    let second = assignment(1, 2, 2, 30);
    let stop = Action::Stop(key(1, 1), Stop::Now, REPLACED.to_owned());
    let load = Action::Load(LoadId(1), second.clone());
    assert_eq!(life.handle(Event::Assigned(vec![second.clone()])), [stop, load]);
    let old = assignment(1, 1, 4, 60);
    assert_eq!(life.handle(Event::Assigned(vec![old.clone()])), []);
    assert_eq!(life.handle(Event::Broken(key(1, 1), error())), [], "of the old one");
    assert_eq!(states(&life), [(1, ShardState::Draining), (2, stale(2))]);
    assert_eq!(life.handle(Event::Assigned(vec![second.clone()])), [], "what it is already");
    assert_eq!(
        states(&life),
        [(1, ShardState::Draining), (2, loading(0, 30))],
        "the second generation stays what is wanted"
    );
    assert_eq!(
        life.handle(Event::Assigned(vec![])),
        [Action::Cancel(LoadId(1))],
        "it is not wanted any more"
    );
    life.handle(Event::LoadFailed(LoadId(1), error()));
    life.handle(Event::Stopped { key: key(1, 1), kept: false });
    assert_eq!(life.handle(Event::Assigned(vec![old])), []);
    assert!(life.is_empty());
    assert_eq!(states(&life), [(2, stale(2))], "nothing runs, and it says why");
    // The newest one may come again: a coordinator that restarted had forgotten it.
    let again = Action::Load(LoadId(2), second.clone());
    assert_eq!(life.handle(Event::Assigned(vec![second])), [again]);
}

#[test]
fn another_layout_under_a_number_that_is_taken_is_refused() {
    let mut life = ready(4, 60);
    // A coordinator whose data were restored from a backup may have counted to 1 in another way.
    assert_eq!(life.handle(Event::Assigned(vec![assignment(1, 1, 2, 30)])), []);
    assert_eq!(states(&life), [(1, stale(1))]);
    // It was told what is known, and its next layout takes the weights over.
    let second = assignment(1, 2, 4, 60);
    let stop = Action::Stop(key(1, 1), Stop::Keep, REPLACED.to_owned());
    assert_eq!(life.handle(Event::Assigned(vec![second])), [stop]);
    assert_eq!(states(&life), [(1, ShardState::Draining), (2, loading(0, 60))]);
}

#[test]
fn equal_weights_are_kept_for_the_next_generation() {
    let mut life = ready(4, 60);
    life.handle(Event::Broken(key(1, 1), error()));
    assert_eq!(states(&life), [(1, ShardState::Failed(error()))]);
    let second = assignment(1, 2, 4, 60);
    let stop = Action::Stop(key(1, 1), Stop::Keep, REPLACED.to_owned());
    assert_eq!(life.handle(Event::Assigned(vec![second.clone()])), [stop]);
    let adopt = Action::Adopt(key(1, 1), second);
    assert_eq!(life.handle(Event::Stopped { key: key(1, 1), kept: true }), [adopt]);
    assert_eq!(states(&life), [(2, ShardState::Linking)]);
}

#[test]
fn weights_that_were_lost_are_loaded_again() {
    let mut life = ready(4, 60);
    let second = assignment(1, 2, 4, 60);
    life.handle(Event::Assigned(vec![second.clone()]));
    let load = Action::Load(LoadId(1), second);
    assert_eq!(life.handle(Event::Stopped { key: key(1, 1), kept: false }), [load]);
}

#[test]
fn weights_without_an_heir_are_dropped() {
    let mut life = ready(4, 60);
    life.handle(Event::Assigned(vec![assignment(1, 2, 4, 60)]));
    assert_eq!(life.handle(Event::Assigned(vec![])), []);
    let forget = Action::Forget(key(1, 1));
    assert_eq!(life.handle(Event::Stopped { key: key(1, 1), kept: true }), [forget]);
    assert!(life.is_empty());
}

#[test]
fn a_load_goes_on_where_only_the_generation_changes() {
    let mut life = Lifecycle::new(Bytes(100));
    life.handle(Event::Assigned(vec![assignment(1, 1, 4, 60)]));
    let second = assignment(1, 2, 4, 60);
    assert_eq!(life.handle(Event::Assigned(vec![second.clone()])), []);
    let start = Action::Start(LoadId(0), second);
    assert_eq!(life.handle(Event::Loaded(LoadId(0))), [start]);
}

#[test]
fn a_load_that_nobody_wants_is_cancelled_and_dropped() {
    let mut life = Lifecycle::new(Bytes(100));
    life.handle(Event::Assigned(vec![assignment(1, 1, 4, 60)]));
    let second = assignment(1, 2, 2, 70);
    // Both do not fit at once: the second waits for the first to be gone.
    assert_eq!(life.handle(Event::Assigned(vec![second.clone()])), [Action::Cancel(LoadId(0))]);
    assert_eq!(
        life.handle(Event::Loaded(LoadId(0))),
        [Action::Discard(LoadId(0)), Action::Load(LoadId(1), second)]
    );
}

#[test]
fn what_does_not_fit_is_refused_with_the_arithmetic() {
    let mut life = ready(4, 60);
    let both = vec![assignment(1, 1, 4, 60), assignment(2, 1, 4, 50)];
    assert_eq!(life.handle(Event::Assigned(both.clone())), []);
    let [_, (1, ShardState::Failed(error))] = &states(&life)[..] else {
        panic!("{:?}", states(&life))
    };
    assert_eq!(error.code, ErrorCode::DoesNotFit);
    for words in ["layers 0..4 of /model", "need 50 B", "budget is 100 B", "hold 60 B", "10 B are"]
    {
        assert!(error.message.contains(words), "{words:?} is not in {:?}", error.message);
    }
    assert_eq!(life.handle(Event::Assigned(both)), [], "it stays refused");
}

#[test]
fn memory_is_given_when_it_is_free() {
    let mut life = ready(4, 60);
    let next = assignment(2, 1, 4, 50);
    let stop = Action::Stop(key(1, 1), Stop::Retire, UNWANTED.to_owned());
    assert_eq!(life.handle(Event::Assigned(vec![next.clone()])), [stop]);
    let load = Action::Load(LoadId(1), next);
    assert_eq!(life.handle(Event::Stopped { key: key(1, 1), kept: false }), [load]);
}

#[test]
fn a_draining_worker_takes_nothing_new() {
    let mut life = ready(4, 60);
    assert_eq!(
        life.handle(Event::Drain),
        [Action::Stop(key(1, 1), Stop::Drain, UNWANTED.to_owned())]
    );
    assert_eq!(life.handle(Event::Assigned(vec![assignment(2, 1, 4, 10)])), []);
    life.handle(Event::Stopped { key: key(1, 1), kept: false });
    assert!(life.is_empty());
}

#[test]
fn a_failed_load_says_why_until_there_is_a_new_layout() {
    let mut life = Lifecycle::new(Bytes(100));
    let first = assignment(1, 1, 4, 60);
    life.handle(Event::Assigned(vec![first.clone()]));
    assert_eq!(life.handle(Event::LoadFailed(LoadId(0), error())), []);
    assert_eq!(life.handle(Event::Assigned(vec![first])), []);
    assert_eq!(states(&life), [(1, ShardState::Failed(error()))]);
    let second = assignment(1, 2, 4, 60);
    let load = Action::Load(LoadId(1), second.clone());
    assert_eq!(life.handle(Event::Assigned(vec![second])), [load]);
}

#[test]
fn a_replaced_shard_is_told_who_was_lost() {
    let peer = |number, port| PeerAddress {
        node: NodeId::worker(number),
        activations: ([127, 0, 0, 1], port).into(),
    };
    let mut life = Lifecycle::new(Bytes(100));
    let mut first = assignment(1, 1, 4, 60);
    first.peers = vec![peer(1, 1), peer(2, 2), peer(3, 3)];
    life.handle(Event::Assigned(vec![first]));
    life.handle(Event::Loaded(LoadId(0)));
    let mut second = assignment(1, 2, 4, 60);
    second.peers = vec![peer(1, 1), peer(2, 9)];
    let words = "w2, w3 was lost or restarted: g2 takes the place of r1 g1".to_owned();
    let stop = Action::Stop(key(1, 1), Stop::Keep, words);
    assert_eq!(life.handle(Event::Assigned(vec![second])), [stop]);
}

#[test]
fn a_neighbour_with_another_address_makes_no_other_layout() {
    // As after a restart of the coordinator together with a neighbour.
    let mut life = ready(4, 60);
    let peer = PeerAddress {
        node: NodeId::worker(2),
        activations: std::net::SocketAddr::from(([127, 0, 0, 1], 4002)),
    };
    let again = Assignment { peers: vec![peer], ..assignment(1, 1, 4, 60) };
    assert_eq!(life.handle(Event::Assigned(vec![again.clone()])), []);
    assert_eq!(states(&life), [(1, ShardState::Ready)]);
    // What its links have told stays to be seen.
    life.handle(Event::Broken(key(1, 1), error()));
    life.handle(Event::Assigned(vec![again]));
    assert_eq!(states(&life), [(1, ShardState::Failed(error()))]);
}

#[test]
fn the_next_generation_is_made_beside_the_one_that_serves() {
    let mut life = ready(4, 40);
    let (first, second) = (assignment(1, 1, 4, 40), assignment(1, 2, 4, 40));
    let both = vec![second.clone(), first.clone()];
    let load = Action::Load(LoadId(1), second.clone());
    assert_eq!(life.handle(Event::Assigned(both.clone())), [load]);
    assert_eq!(states(&life), [(1, ShardState::Ready), (2, loading(0, 40))]);
    life.handle(Event::Loaded(LoadId(1)));
    life.handle(Event::Linked(key(1, 2)));
    assert_eq!(states(&life), [(1, ShardState::Ready), (2, ShardState::Ready)]);
    assert_eq!(life.handle(Event::Assigned(both)), [], "it is both already");
    // It takes over: what runs in the old one may finish.
    let stop = Action::Stop(key(1, 1), Stop::Retire, UNWANTED.to_owned());
    assert_eq!(life.handle(Event::Assigned(vec![second])), [stop]);
    assert_eq!(states(&life), [(1, ShardState::Draining), (2, ShardState::Ready)]);
    assert_eq!(life.handle(Event::Assigned(vec![first])), [], "the past does not come back");
    assert_eq!(states(&life), [(1, ShardState::Draining), (2, stale(2))]);
}

#[test]
fn a_next_generation_that_is_given_up_leaves_the_one_that_serves_alone() {
    let mut life = ready(4, 40);
    let (first, second) = (assignment(1, 1, 4, 40), assignment(1, 2, 2, 30));
    life.handle(Event::Assigned(vec![first.clone(), second]));
    assert_eq!(life.handle(Event::Assigned(vec![first.clone()])), [Action::Cancel(LoadId(1))]);
    assert_eq!(states(&life), [(1, ShardState::Ready)]);
    life.handle(Event::LoadFailed(LoadId(1), error()));
    // The one after it is made beside, too.
    let third = assignment(1, 3, 2, 30);
    let load = Action::Load(LoadId(2), third.clone());
    assert_eq!(life.handle(Event::Assigned(vec![first, third])), [load]);
}

#[test]
fn a_third_generation_replaces_both() {
    let mut life = ready(4, 40);
    let (first, second) = (assignment(1, 1, 4, 40), assignment(1, 2, 2, 30));
    life.handle(Event::Assigned(vec![first, second]));
    life.handle(Event::Loaded(LoadId(1)));
    let third = assignment(1, 3, 2, 30);
    let words = |old: &str| format!("g3 takes the place of r1 {old}");
    assert_eq!(
        life.handle(Event::Assigned(vec![third.clone()])),
        [
            Action::Stop(key(1, 2), Stop::Keep, words("g2")),
            Action::Stop(key(1, 1), Stop::Now, words("g1")),
        ]
    );
    let adopt = Action::Adopt(key(1, 2), third);
    assert_eq!(life.handle(Event::Stopped { key: key(1, 2), kept: true }), [adopt]);
}
