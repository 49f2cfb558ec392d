//! What is fetched from whom, and what becomes of damage: with an origin and peers in memory.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::AtomicU32;

use super::super::origin::{Checksum, Listing, hex};
use super::*;
use crate::id::NodeId;

const CUT: Cut = Cut { chunk: 100, run: 300 };
const HEAD: usize = 30;

/// 1,050 bytes: ten chunks and a half.
fn data() -> Vec<u8> {
    (0..1050_u32).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// Sends what it is told to, and counts.
#[derive(Debug)]
struct Source {
    data: Vec<u8>,
    sent: Arc<AtomicU64>,
    requests: Arc<AtomicU32>,
    /// Requests that are answered before it breaks for good.
    good: u32,
}

impl Origin for Source {
    fn name(&self) -> &str {
        "the origin"
    }

    fn list(&self, _: &str, _: &AtomicBool) -> Result<Listing, BlobError> {
        Err(BlobError::NotRemote("not asked for here".to_owned()))
    }

    fn read(
        &self,
        _: &str,
        _: &RemoteFile,
        bytes: Range<u64>,
        out: &mut Vec<u8>,
        _: &AtomicBool,
    ) -> Result<(), BlobError> {
        let range = bytes.start as usize..bytes.end as usize;
        if self.requests.fetch_add(1, Ordering::Relaxed) >= self.good {
            // It breaks off behind the first chunk and a bit.
            let part = range.start..range.end.min(range.start + 150);
            self.sent.fetch_add(part.len() as u64, Ordering::Relaxed);
            out.extend_from_slice(&self.data[part]);
            return Err(BlobError::Unreachable {
                origin: "the origin".to_owned(),
                what: "it".to_owned(),
                tries: 1,
                within: Duration::ZERO,
                why: "it broke off".to_owned(),
            });
        }
        self.sent.fetch_add(range.len() as u64, Ordering::Relaxed);
        out.extend_from_slice(&self.data[range]);
        Ok(())
    }
}

struct Bench {
    folder: tempfile::TempDir,
    sent: Arc<AtomicU64>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        SparseFile::create(folder.path(), "m", 1050, &data()[..HEAD]).unwrap();
        Self { folder, sent: Arc::default() }
    }

    /// What a process that starts on this folder has, with an origin that sends this.
    fn model(&self, sends: Vec<u8>, good: u32) -> Model {
        self.sent.store(0, Ordering::Relaxed);
        let origin =
            Source { data: sends, sent: self.sent.clone(), requests: Arc::default(), good };
        let sha = hex(ring::digest::digest(&ring::digest::SHA256, &data()).as_ref());
        let checksum = Some(Checksum::Sha256(sha));
        let remote = RemoteFile { name: "m".to_owned(), len: 1050, checksum };
        let here = SparseFile::open(self.folder.path(), "m", CUT).unwrap();
        let files = vec![Entry { remote, here, head: HEAD as u64 }];
        let (origin, folder) = (Box::new(origin), self.folder.path().to_owned());
        let commit = String::new();
        let (turn, givers) = Default::default();
        Model { origin, commit, files, folder, cut: CUT, turn, givers }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("m")).unwrap()
    }
}

fn fill(model: &Model, bytes: Range<u64>, peers: &dyn Peers) -> Result<(), BlobError> {
    let wanted = [Wanted { file: "m".to_owned(), bytes }];
    let cancel = AtomicBool::new(false);
    let last = AtomicU64::new(0);
    let on_progress = |done: u64, total: u64| {
        assert!(done <= total);
        last.store(done, Ordering::Relaxed);
    };
    model.fill(&wanted, peers, &Filling { on_progress: &on_progress, cancel: &cancel })
}

#[test]
fn only_the_chunks_of_the_ranges_are_fetched_and_only_once() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    fill(&model, 250..420, &Alone).unwrap();
    assert_eq!(bench.sent(), 300);
    assert_eq!(bench.file()[200..500], data()[200..500]);
    assert!(bench.file()[500..].iter().all(|byte| *byte == 0));
    fill(&model, 250..420, &Alone).unwrap();
    assert_eq!(bench.sent(), 300);
    fill(&model, 0..1050, &Alone).unwrap();
    assert_eq!(bench.sent(), 1050);
    assert_eq!(bench.file(), data());
}

#[test]
fn what_came_before_an_end_is_not_fetched_again() {
    let bench = Bench::new();
    let broken = fill(&bench.model(data(), 2), 0..1050, &Alone).unwrap_err();
    assert!(broken.to_string().contains("broke off"), "{broken}");
    let model = bench.model(data(), 100);
    let had = |model: &Model| {
        (0..11).filter(|index| model.files[0].here.held(*index).is_some()).count() as u64
    };
    let before = had(&model);
    assert!((3..11).contains(&before), "{before} chunks");
    fill(&model, 0..1050, &Alone).unwrap();
    assert!(bench.sent() <= 1050 - before.min(10) * 100 + 50, "{} bytes again", bench.sent());
    assert_eq!(bench.file(), data());
}

#[test]
fn a_chunk_that_the_disk_has_changed_is_fetched_again() {
    let bench = Bench::new();
    fill(&bench.model(data(), 100), 0..1050, &Alone).unwrap();
    let mut damaged = bench.file();
    damaged[555] ^= 1;
    std::fs::write(bench.folder.path().join("m"), &damaged).unwrap();
    fill(&bench.model(data(), 100), 0..1050, &Alone).unwrap();
    assert_eq!(bench.sent(), 100);
    assert_eq!(bench.file(), data());
}

#[test]
fn an_origin_with_another_header_or_another_file_is_named_and_nothing_of_it_is_kept() {
    for (at, words) in [(3, "header"), (700, "SHA-256")] {
        let bench = Bench::new();
        let mut other = data();
        other[at] ^= 1;
        let error = fill(&bench.model(other, 100), 0..1050, &Alone).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("the origin") && text.contains(words), "{text}");
        assert!(error.is_final());
        // Another time it sends what it should.
        fill(&bench.model(data(), 100), 0..1050, &Alone).unwrap();
        assert_eq!(bench.file(), data());
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_is_missing() {
    let error = room(Path::new("/data/m"), 5_000, 4_000).unwrap_err().to_string();
    assert!(error.contains("/data/m") && error.contains("1000 are missing"), "{error}");
    room(Path::new("/data/m"), 4_000, 4_000).unwrap();
}

#[test]
fn who_gives_up_is_let_go() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let wanted = [Wanted { file: "m".to_owned(), bytes: 0..1050 }];
    let cancel = AtomicBool::new(true);
    let filling = Filling { on_progress: &|_, _| {}, cancel: &cancel };
    let ended = model.fill(&wanted, &Alone, &filling);
    assert!(matches!(ended, Err(BlobError::Cancelled)), "{ended:?}");
    assert_eq!(bench.sent(), 0);
}

/// What somebody gives of a chunk, in turn.
type Given = VecDeque<(NodeId, Vec<u8>)>;

/// Peers that send what the test says.
#[derive(Debug, Default)]
struct Scripted {
    has: Mutex<BTreeMap<ChunkId, Given>>,
    said: BTreeMap<ChunkId, (NodeId, ChunkHash)>,
    avoided: Mutex<BTreeSet<NodeId>>,
}

impl Peers for Scripted {
    fn begin(&self, _: &BTreeSet<ChunkId>) {}

    fn choose(&self, missing: &BTreeSet<ChunkId>, cut: Cut) -> Choice {
        let has = self.has.lock().unwrap();
        let avoided = self.avoided.lock().unwrap();
        for chunk in missing {
            let first = has.get(chunk).and_then(VecDeque::front);
            if let (Some((node, _)), Some((_, hash))) = (first, self.said.get(chunk))
                && !avoided.contains(node)
            {
                return Choice::Peer(*node, *chunk, *hash);
            }
        }
        Alone.choose(missing, cut)
    }

    fn fetch(&self, node: NodeId, chunk: ChunkId, _: u64) -> Result<Vec<u8>, String> {
        let mut has = self.has.lock().unwrap();
        let queue = has.get_mut(&chunk).and_then(VecDeque::pop_front);
        let (from, data) = queue.ok_or("it has nothing")?;
        assert_eq!(from, node);
        Ok(data)
    }

    fn have(&self, _: ChunkId, _: ChunkHash) {}

    fn said(&self, chunk: ChunkId) -> Option<(NodeId, ChunkHash)> {
        self.said.get(&chunk).copied()
    }

    fn correct(&self, _: ChunkId, _: ChunkHash) {}

    fn avoid(&self, node: NodeId, _: &str) {
        self.avoided.lock().unwrap().insert(node);
    }

    fn failed(&self, node: NodeId) {
        self.avoid(node, "");
    }

    fn wait(&self, _: Duration) {}
}

fn scripted(good: impl Fn(u32) -> bool) -> Scripted {
    let (honest, liar) = (NodeId::worker(1), NodeId::worker(2));
    let mut peers = Scripted::default();
    for index in 0..11 {
        let chunk = ChunkId { file: 0, index };
        let bytes = CUT.bytes(index, 1050);
        let mut sent = data()[bytes.start as usize..bytes.end as usize].to_vec();
        peers.said.insert(chunk, (honest, *blake3::hash(&sent).as_bytes()));
        let from = if good(index) { honest } else { liar };
        if from == liar {
            sent[0] ^= 1;
        }
        peers.has.get_mut().unwrap().entry(chunk).or_default().push_back((from, sent));
    }
    peers
}

#[test]
fn another_worker_saves_the_origin_every_byte() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    fill(&model, 0..1050, &scripted(|_| true)).unwrap();
    assert_eq!((bench.sent(), bench.file()), (0, data()));
}

#[test]
fn a_worker_that_lies_is_avoided_and_what_it_said_is_fetched_elsewhere() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let peers = scripted(|index| index % 4 != 2);
    fill(&model, 0..1050, &peers).unwrap();
    assert_eq!(bench.file(), data());
    assert_eq!(*peers.avoided.lock().unwrap(), BTreeSet::from([NodeId::worker(2)]));
    assert!((100..=300).contains(&bench.sent()), "{}", bench.sent());
}

#[test]
fn who_said_another_hash_than_the_origins_bytes_have_is_avoided() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let mut peers = scripted(|_| true);
    peers.has.get_mut().unwrap().clear();
    peers.said.insert(ChunkId { file: 0, index: 5 }, (NodeId::worker(3), [9; 32]));
    fill(&model, 0..1050, &peers).unwrap();
    assert_eq!(bench.file(), data());
    assert_eq!(*peers.avoided.lock().unwrap(), BTreeSet::from([NodeId::worker(3)]));
}

/// One worker was the first to say a hash of this chunk, and has bytes that fit it.
fn agreed(chunk: ChunkId, lie: Vec<u8>) -> Scripted {
    let mut peers = scripted(|_| true);
    peers.said.insert(chunk, (NodeId::worker(3), *blake3::hash(&lie).as_bytes()));
    peers.has.get_mut().unwrap().insert(chunk, [(NodeId::worker(3), lie)].into());
    peers
}

#[test]
fn chunks_of_workers_that_agree_on_a_lie_do_not_survive_the_origins_sum() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let peers = agreed(ChunkId { file: 0, index: 5 }, vec![7; 100]);
    fill(&model, 0..1050, &peers).unwrap();
    assert_eq!(bench.file(), data());
    assert!(peers.avoided.lock().unwrap().contains(&NodeId::worker(3)));
}

#[test]
fn a_file_that_is_another_is_fetched_whole_again_also_where_a_part_was_wanted_before() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let peers = agreed(ChunkId { file: 0, index: 5 }, vec![7; 100]);
    fill(&model, 0..600, &peers).unwrap();
    assert_ne!(bench.file()[..600], data()[..600]);
    fill(&model, 600..1050, &peers).unwrap();
    assert_eq!(bench.file(), data());
}

#[test]
fn it_is_told_that_a_sum_is_being_compared() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let wanted = [Wanted { file: "m".to_owned(), bytes: 0..1050 }];
    let told = Mutex::new(Vec::new());
    let on_progress = |done: u64, total: u64| told.lock().unwrap().push((done, total));
    let filling = Filling { on_progress: &on_progress, cancel: &AtomicBool::new(false) };
    model.fill(&wanted, &Alone, &filling).unwrap();
    let hashed: Vec<_> = (1..=10).map(|chunk| (1050 + chunk * 100, 2100)).collect();
    let told: Vec<_> = told.into_inner().unwrap().split_off(12);
    assert_eq!(told, [&hashed[..], &[(2100, 2100)]].concat());
    // The next process hashes what is on record, and it is told of that.
    let model = bench.model(data(), 100);
    let count = AtomicU64::new(0);
    let on_progress = |_, _| {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let filling = Filling { on_progress: &on_progress, cancel: &AtomicBool::new(false) };
    model.fill(&wanted, &Alone, &filling).unwrap();
    assert_eq!(count.into_inner(), 11 + 1, "chunks on record, and what is here");
}

#[test]
fn a_sum_that_was_not_compared_is_compared_by_the_next_who_wants_the_file() {
    for is_restarted in [false, true] {
        let bench = Bench::new();
        let model = bench.model(data(), 100);
        let peers = agreed(ChunkId { file: 0, index: 5 }, vec![7; 100]);
        let wanted = [Wanted { file: "m".to_owned(), bytes: 0..1050 }];
        // It is given up behind the last chunk: another file might as well have failed.
        let cancel = AtomicBool::new(false);
        let on_progress = |done: u64, total: u64| cancel.store(done == total, Ordering::Relaxed);
        let filling = Filling { on_progress: &on_progress, cancel: &cancel };
        let ended = model.fill(&wanted, &peers, &filling);
        assert!(matches!(ended, Err(BlobError::Cancelled)), "{ended:?}");
        assert_ne!(bench.file(), data());
        let model = if is_restarted { bench.model(data(), 100) } else { model };
        fill(&model, 0..1050, &peers).unwrap();
        assert_eq!(bench.file(), data(), "restarted: {is_restarted}");
        let is_avoided = peers.avoided.lock().unwrap().contains(&NodeId::worker(3));
        assert!(is_avoided || is_restarted);
    }
}

#[test]
fn a_file_is_compared_once_and_again_where_a_chunk_has_become_another() {
    let bench = Bench::new();
    fill(&bench.model(data(), 100), 0..1050, &Alone).unwrap();
    let mut model = bench.model(data(), 100);
    model.files[0].remote.checksum = Some(Checksum::Sha256("another".to_owned()));
    fill(&model, 0..1050, &Alone).unwrap();
    // A record that claims another chunk is no proof of the file.
    let lie = vec![7; 100];
    model.files[0].here.write(5, &lie, *blake3::hash(&lie).as_bytes()).unwrap();
    fill(&bench.model(data(), 100), 0..1050, &Alone).unwrap();
    assert_eq!(bench.file(), data());
}

#[test]
fn a_worker_whose_chunk_has_another_header_is_avoided_and_the_origin_asked() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let mut lie = data()[..100].to_vec();
    lie[3] ^= 1;
    let peers = agreed(ChunkId { file: 0, index: 0 }, lie);
    fill(&model, 0..1050, &peers).unwrap();
    assert_eq!(bench.file(), data());
    assert!(peers.avoided.lock().unwrap().contains(&NodeId::worker(3)));
}

#[test]
fn who_waits_for_another_to_bring_the_same_is_let_go() {
    let bench = Bench::new();
    let model = bench.model(data(), 100);
    let _busy = model.turn.take(&AtomicBool::new(false)).unwrap();
    let filling = Filling { on_progress: &|_, _| {}, cancel: &AtomicBool::new(true) };
    let ended = model.fill(&[], &Alone, &filling);
    assert!(matches!(ended, Err(BlobError::Cancelled)), "{ended:?}");
}
