use shoal_protocol::adapters::DeploymentAdapters;
use shoal_protocol::id::{Generation, ReplicaId};

use super::*;

const BUDGET: Bytes = Bytes(1000);

/// What the shard itself takes.
const MEMORY: Bytes = Bytes(400);

fn base() -> DeploymentName {
    DeploymentName::new("base").unwrap()
}

fn key(replica: u32, generation: u64) -> ShardKey {
    ShardKey { replica: ReplicaId(replica), generation: Generation(generation) }
}

/// Adapter `id` in a folder of its own.
fn spec(id: u32) -> AdapterSpec {
    let name = DeploymentName::new(format!("a{id}")).unwrap();
    AdapterSpec { id: AdapterId(id), name, path: format!("/adapters/{id}"), fingerprint: [7; 32] }
}

/// A ledger with a clock.
struct Worker {
    ledger: Ledger,
    now: Now,
}

impl Worker {
    fn new(shards: &[ShardKey]) -> Self {
        let mut ledger = Ledger::new(BUDGET);
        shards.iter().for_each(|key| ledger.begin(*key, (base(), MEMORY), None));
        Self { ledger, now: Now { at: Instant(0), unix_s: 34_200 } }
    }

    fn want(&mut self, adapters: &[AdapterSpec]) -> Vec<(ShardKey, AdapterId)> {
        let revision = self.ledger.wanted.revision + 1;
        let one = DeploymentAdapters { deployment: base(), adapters: adapters.to_vec() };
        self.ledger.want(WantedAdapters { revision, deployments: vec![one] })
    }

    fn after(&mut self, s: u64) -> Option<Next> {
        self.now.at = self.now.at + Duration::from_secs(s);
        self.now.unix_s += s;
        self.ledger.next(self.now)
    }

    /// The next thing is to read this one.
    fn read(&mut self, after_s: u64, id: u32) -> ReadId {
        match self.after(after_s) {
            Some(Next::Read(read, _, spec)) if spec.id.0 == id => read,
            other => panic!("{other:?} instead of reading {id}"),
        }
    }

    fn fail(&mut self, read: ReadId, words: &str) {
        let error = WireError::new(ErrorCode::BadModel, words);
        self.ledger.done(self.now, read, Err(NotLoaded::Refused(error)));
    }

    /// It has read so many bytes, and the shard takes them.
    fn load(&mut self, read: ReadId, bytes: u64) {
        self.ledger.reserve(read, Bytes(bytes)).unwrap();
        assert!(self.ledger.may_take(read));
        self.ledger.done(self.now, read, Ok(()));
    }

    /// Why there is no room for what is read, and it fails with it.
    fn no_room(&mut self, read: ReadId, bytes: u64) -> String {
        match self.ledger.reserve(read, Bytes(bytes)) {
            Err(NotLoaded::Refused(error)) => {
                let words = error.message.clone();
                self.ledger.done(self.now, read, Err(NotLoaded::Refused(error)));
                words
            }
            other => panic!("{other:?}"),
        }
    }

    fn failed(&self, at: ShardKey) -> Vec<(u32, String)> {
        let said = self.ledger.said().into_iter().find(|said| said.replica == at.replica).unwrap();
        said.failed.into_iter().map(|(id, error)| (id.0, error.message)).collect()
    }

    fn held(&self) -> Vec<u32> {
        self.ledger.said().iter().flat_map(|said| said.held.iter().map(|(id, _)| id.0)).collect()
    }

    fn wakes_in(&self) -> Option<u64> {
        self.ledger.wake_at().map(|at| at.since(self.now.at).as_secs())
    }
}

#[test]
fn what_failed_is_tried_again_after_a_second_doubling_to_60_and_says_when() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1)]);
    let mut read = worker.read(0, 1);
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        worker.fail(read, "there is no such folder");
        assert_eq!((worker.after(wait - 1), worker.wakes_in()), (None, Some(1)));
        read = worker.read(1, 1);
    }
    // While it is tried again it still counts as failed.
    let words = "there is no such folder (tried 8 times; the next try is at 09:33:03 UTC)";
    assert_eq!(worker.failed(key(1, 1)), [(1, words.to_owned())]);
    worker.load(read, 10);
    assert_eq!((worker.held(), worker.failed(key(1, 1))), (vec![1], vec![]));
    assert_eq!((worker.after(1000), worker.wakes_in()), (None, None));
}

#[test]
fn another_list_brings_the_next_try_at_once_and_forgets_what_it_does_not_name() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1), spec(2)]);
    for id in [1, 2] {
        let read = worker.read(0, id);
        worker.fail(read, "no");
    }
    assert_eq!(worker.after(0), None);
    worker.want(&[spec(2), spec(3)]);
    // What was never tried comes first.
    worker.read(0, 3);
    worker.read(0, 2);
    assert_eq!(worker.failed(key(1, 1)), [(2, "no".to_owned())]);
}

#[test]
fn a_read_that_hangs_is_said_by_name_and_the_others_go_on() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1), spec(2)]);
    let hangs = worker.read(0, 1);
    let other = worker.read(0, 2);
    worker.load(other, 10);
    assert_eq!((worker.held(), worker.wakes_in()), (vec![2], Some(60)));
    assert_eq!(worker.after(59), None);
    assert_eq!(worker.failed(key(1, 1)), []);
    assert_eq!(worker.after(1), None);
    let words = worker.failed(key(1, 1)).remove(0).1;
    assert!(words.starts_with("reading /adapters/1 has taken 60 s and goes on"), "{words}");
    // Others come and go meanwhile.
    worker.want(&[spec(1)]);
    assert_eq!(worker.after(0), Some(Next::Unload(key(1, 1), AdapterId(2))));
    // The mount is back: what was read at last is taken.
    worker.load(hangs, 10);
    assert_eq!((worker.held(), worker.failed(key(1, 1))), (vec![1], vec![]));
}

#[test]
fn one_folder_hangs_once_and_four_that_hang_are_the_last() {
    let mut worker = Worker::new(&[key(1, 1), key(2, 1)]);
    worker.want(&[spec(1)]);
    // Both shards read it; neither ends.
    let first = worker.read(0, 1);
    worker.read(0, 1);
    assert_eq!(worker.after(60), None);
    // A layout that follows does not read there a third time.
    worker.ledger.end(key(2, 1));
    worker.ledger.begin(key(2, 2), (base(), MEMORY), Some(key(2, 1)));
    assert_eq!(worker.after(0), None);
    let words = worker.failed(key(2, 2)).remove(0).1;
    assert!(words.contains("reading /adapters/1 for another try or shard goes on"), "{words}");
    // The other two places go the same way; then nothing is begun.
    worker.want(&[spec(1), spec(2), spec(3), spec(4)]);
    worker.read(0, 2);
    worker.read(0, 3);
    assert_eq!(worker.after(1), None, "there is no place for another one");
    assert_eq!(worker.failed(key(1, 1)).len(), 1, "and it waits, as long as it may yet come");
    assert_eq!((worker.wakes_in(), worker.after(60)), (Some(59), None));
    let all = worker.failed(key(1, 1));
    let words = &all.iter().find(|(id, _)| *id == 4).unwrap().1;
    assert!(
        words.contains(
            "4 reads of adapters hang at this worker (/adapters/1, /adapters/2, /adapters/3)"
        ),
        "{all:?}"
    );
    assert!(worker.wakes_in().is_some_and(|s| s > 0), "it does not spin");
    // One ends, and its place is free.
    worker.fail(first, "stale file handle");
    worker.read(60, 4);
}

#[test]
fn an_adapter_that_goes_counts_until_its_last_answer_has_ended() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1)]);
    let read = worker.read(0, 1);
    worker.load(read, 500);
    assert_eq!(worker.want(&[spec(2)]), [(key(1, 1), AdapterId(1))], "no head begins with it");
    assert_eq!(worker.after(0), Some(Next::Unload(key(1, 1), AdapterId(1))));
    let read = worker.read(0, 2);
    let words = worker.no_room(read, 101);
    assert!(
        words.contains("`a2` takes 101 B here, and 900 B of this worker's 1000 B are in use"),
        "{words}"
    );
    assert!(words.contains("(500 B of it by adapters that are unloaded and wait"), "{words}");
    // Its last answer has ended: what did not fit is tried at once.
    assert_eq!(worker.after(0), None);
    worker.ledger.unloaded(key(1, 1), AdapterId(1));
    let read = worker.read(0, 2);
    worker.load(read, 600);
    assert_eq!(worker.held(), [2]);
}

#[test]
fn what_is_being_read_and_what_is_being_stopped_counts_too() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1), spec(2)]);
    let (first, second) = (worker.read(0, 1), worker.read(0, 2));
    worker.ledger.reserve(first, Bytes(400)).unwrap();
    let words = worker.no_room(second, 300);
    assert!(words.contains("800 B of this worker's 1000 B are in use;"), "{words}");
    worker.load(first, 400);
    // The layout goes; until its model is dropped it takes what it took.
    worker.ledger.end(key(1, 1));
    worker.want(&[spec(3)]);
    worker.ledger.begin(key(2, 1), (base(), Bytes(100)), None);
    let third = worker.read(0, 3);
    let words = worker.no_room(third, 101);
    assert!(words.contains("900 B of this worker's"), "{words}");
    worker.ledger.gone(key(1, 1));
    let third = worker.read(0, 3);
    worker.load(third, 101);
}

#[test]
fn the_layout_that_takes_a_model_over_knows_what_lies_in_it_whoever_stopped_meanwhile() {
    let mut worker = Worker::new(&[key(1, 1), key(2, 1)]);
    worker.want(&[spec(1)]);
    for _ in 0..2 {
        let read = worker.read(0, 1);
        worker.load(read, 50);
    }
    // Both replicas get another layout at once.
    worker.ledger.end(key(1, 1));
    worker.ledger.end(key(2, 1));
    worker.want(&[]);
    worker.ledger.begin(key(1, 2), (base(), MEMORY), Some(key(1, 1)));
    worker.ledger.begin(key(2, 2), (base(), MEMORY), Some(key(2, 1)));
    assert_eq!(worker.after(0), Some(Next::Unload(key(1, 2), AdapterId(1))));
    assert_eq!(worker.after(0), Some(Next::Unload(key(2, 2), AdapterId(1))));
    assert_eq!(worker.after(0), None);
}

#[test]
fn what_lies_in_a_model_of_a_layout_before_is_not_counted_twice_nor_taken_for_another() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1)]);
    let read = worker.read(0, 1);
    worker.load(read, 500);
    worker.ledger.end(key(1, 1));
    worker.ledger.begin(key(1, 2), (base(), MEMORY), Some(key(1, 1)));
    let read = worker.read(0, 1);
    worker.load(read, 500);
    assert_eq!(worker.held(), [1]);
    // A state that was restored gives the number to other files: the ones that are there go first.
    let other = AdapterSpec { fingerprint: [8; 32], ..spec(1) };
    worker.want(&[other]);
    assert_eq!(worker.after(0), Some(Next::Unload(key(1, 2), AdapterId(1))));
    assert_eq!(worker.after(100), None);
    worker.ledger.unloaded(key(1, 2), AdapterId(1));
    worker.read(0, 1);
}

#[test]
fn one_that_is_handed_over_while_its_shard_stops_is_known_to_the_next_layout() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1)]);
    let read = worker.read(0, 1);
    worker.ledger.reserve(read, Bytes(50)).unwrap();
    assert!(worker.ledger.may_take(read));
    worker.want(&[]);
    assert_eq!(worker.after(0), None, "it is not let go before it is there");
    worker.ledger.end(key(1, 1));
    worker.ledger.begin(key(1, 2), (base(), MEMORY), Some(key(1, 1)));
    worker.ledger.done(worker.now, read, Err(NotLoaded::Moot));
    assert_eq!(worker.after(0), Some(Next::Unload(key(1, 2), AdapterId(1))));
}

#[test]
fn what_is_not_wanted_any_more_when_it_has_been_read_is_not_taken() {
    let mut worker = Worker::new(&[key(1, 1)]);
    worker.want(&[spec(1)]);
    let read = worker.read(0, 1);
    worker.want(&[]);
    assert!(matches!(worker.ledger.reserve(read, Bytes(1)), Err(NotLoaded::Moot)));
    assert!(!worker.ledger.may_take(read));
    worker.ledger.done(worker.now, read, Err(NotLoaded::Moot));
    assert_eq!((worker.after(100), worker.failed(key(1, 1))), (None, vec![]));
    // Nor is it tried again where it fails.
    worker.want(&[spec(2)]);
    let read = worker.read(0, 2);
    worker.want(&[]);
    worker.fail(read, "no");
    assert_eq!((worker.failed(key(1, 1)), worker.wakes_in()), (vec![], None));
}
