//! The store on disks that fail: what was acknowledged is there, what was not is there whole or not
//! at all.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redb::StorageBackend;
use shoal_protocol::id::Role;

use crate::control::store::{ProposeError, ReadError};

use super::core::COMPACT_EVERY;
use super::*;
use crate::control::state::{
    Change, ClusterState, KeyFingerprint, NodeCommand, Refusal, TokenCommand, TokenHash,
};

const C1: NodeId = NodeId::coordinator(1);

fn start(opener: Opener) -> Result<(ControlStore, RaftStore), StartError> {
    open_with(opener, C1, WhenEmpty::Found, 7, Box::new(|_| {}))
}

fn open(folder: &Path) -> Result<(ControlStore, RaftStore), OpenError> {
    super::open(folder, C1, WhenEmpty::Found, Box::new(|_| {}))
}

/// A disk in memory that can be told to fail, and that remembers what was not synced.
#[derive(Debug, Default)]
struct Platter {
    bytes: Mutex<Bytes>,
    /// Operations until every further one fails; `u64::MAX` is never.
    left: AtomicU64,
    /// Whether a failure is a panic, as redb's are where a page makes no sense.
    panics: AtomicBool,
}

#[derive(Clone, Debug, Default)]
struct Bytes {
    current: Vec<u8>,
    synced: Vec<u8>,
    /// Since the last sync: where, and what.
    loose: Vec<(usize, Vec<u8>)>,
}

impl Platter {
    fn new(bytes: Vec<u8>, left: u64) -> Arc<Self> {
        let bytes = Bytes { current: bytes.clone(), synced: bytes, loose: Vec::new() };
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            left: AtomicU64::new(left),
            panics: AtomicBool::new(false),
        })
    }

    fn operation(&self) -> io::Result<()> {
        let step = |left: u64| match left {
            u64::MAX => Some(u64::MAX),
            left => left.checked_sub(1),
        };
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step) {
            Ok(_) => Ok(()),
            Err(_) if self.panics.load(Ordering::SeqCst) => panic!("a page that makes no sense"),
            Err(_) => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }

    /// What is there after kill -9: all that was written.
    fn after_kill(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().current.clone()
    }

    /// What is there after a power cut: what was synced, and some of the rest, the last of it torn.
    fn after_power_cut(&self, dice: u64) -> Vec<u8> {
        let bytes = self.bytes.lock().unwrap();
        let mut platter = bytes.synced.clone();
        for (i, (at, data)) in bytes.loose.iter().enumerate() {
            let kept = match dice >> (2 * i % 60) & 3 {
                0 => 0,
                1 => data.len() / 2,
                _ => data.len(),
            };
            if platter.len() < at + kept {
                platter.resize(at + kept, 0);
            }
            platter[*at..at + kept].copy_from_slice(&data[..kept]);
        }
        platter.resize(platter.len().max(bytes.synced.len()), 0);
        platter
    }

    fn opener(self: &Arc<Self>) -> Opener {
        let platter = Arc::clone(self);
        Arc::new(move || Database::builder().create_with_backend(Shared(Arc::clone(&platter))))
    }
}

#[derive(Debug)]
struct Shared(Arc<Platter>);

impl StorageBackend for Shared {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.bytes.lock().unwrap().current.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.bytes.lock().unwrap();
        let end = offset as usize + out.len();
        let found = bytes.current.get(offset as usize..end);
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.operation()?;
        let mut bytes = self.0.bytes.lock().unwrap();
        bytes.current.resize(len as usize, 0);
        bytes.synced.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.operation()?;
        let mut bytes = self.0.bytes.lock().unwrap();
        bytes.synced = bytes.current.clone();
        bytes.loose.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.operation()?;
        let mut bytes = self.0.bytes.lock().unwrap();
        let offset = offset as usize;
        let end = offset + data.len();
        if bytes.current.len() < end {
            bytes.current.resize(end, 0);
        }
        bytes.current[offset..end].copy_from_slice(data);
        bytes.loose.push((offset, data.to_vec()));
        Ok(())
    }
}

fn enrol() -> Change {
    Change::Node(NodeCommand::Enrol { role: Role::Worker, key: KeyFingerprint([0; 32]) })
}

fn token(n: u32) -> Change {
    let hash = TokenHash::of(&[n as u8; 32]);
    let expires = std::time::Duration::from_secs(3600);
    Change::Token(TokenCommand::Create { hash, role: Role::Worker, uses: 1, expires })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap()
}

fn workers(store: &ControlStore) -> usize {
    store.state().nodes.workers().count()
}

#[test]
fn everything_is_there_again_after_each_command() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = ClusterState::default();
    for n in 0..6 {
        let (store, owner) = open(folder.path()).unwrap();
        assert_eq!(*store.state(), expected, "before command {n}");
        let change = if n % 2 == 0 { enrol() } else { token(n) };
        runtime().block_on(store.propose(change)).unwrap();
        expected = ClusterState::clone(&store.state());
        owner.close();
    }
    assert_eq!(expected.nodes.workers().count(), 3);
    assert_eq!(expected.tokens.iter().count(), 3);
}

#[test]
fn two_coordinators_on_one_folder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (_store, owner) = open(folder.path()).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("another coordinator is running on this data folder"), "{error}");
    owner.close();
    assert!(open(folder.path()).is_ok());
}

#[test]
fn the_log_is_compacted_and_nothing_is_lost() {
    let platter = Platter::new(Vec::new(), u64::MAX);
    let (store, owner) = start(platter.opener()).unwrap();
    let total = COMPACT_EVERY * 3;
    runtime().block_on(async {
        for _ in 0..total {
            store.propose(enrol()).await.unwrap();
        }
    });
    let state = store.state();
    drop(store);
    owner.close();
    let (disk, found) = Disk::open(&platter.opener()).unwrap();
    let saved = found.saved.unwrap();
    assert!(saved.entries.len() < COMPACT_EVERY, "the log was not compacted");
    disk.close();
    let (store, _owner) = start(platter.opener()).unwrap();
    assert_eq!(*store.state(), *state);
    assert_eq!(store.state().nodes.workers().count(), total);
}

/// Kills the store at every operation of the disk, by kill -9 and by a power cut.
#[test]
fn what_was_acknowledged_survives_a_crash_at_any_point() {
    for left in 0..140 {
        let platter = Platter::new(Vec::new(), left);
        let mut acknowledged = 0;
        if let Ok((store, owner)) = start(platter.opener()) {
            runtime().block_on(async {
                for n in 0..8 {
                    match store.propose(enrol()).await {
                        Ok(_) => acknowledged = n + 1,
                        Err(ProposeError::Storage { .. }) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
            });
            assert!(workers(&store) >= acknowledged, "reads do not go on");
            owner.close();
        }
        let mut images = vec![platter.after_kill()];
        images.extend((1..4).map(|n| platter.after_power_cut(left.wrapping_mul(0x9E37_79B9) * n)));
        for (i, image) in images.into_iter().enumerate() {
            let healed = Platter::new(image, u64::MAX);
            // Before the first commit there may be nothing that can be opened, and nothing is lost.
            let Ok((store, owner)) = start(healed.opener()) else {
                assert_eq!(acknowledged, 0, "crash after {left} operations, image {i}");
                continue;
            };
            let found = workers(&store);
            assert!(
                found == acknowledged || found == acknowledged + 1,
                "crash after {left} operations, image {i}: {acknowledged} acknowledged, {found} found"
            );
            runtime().block_on(store.propose(enrol())).unwrap();
            owner.close();
        }
    }
}

#[test]
fn a_full_disk_refuses_changes_and_heals() {
    let platter = Platter::new(Vec::new(), u64::MAX);
    let (store, owner) = start(platter.opener()).unwrap();
    runtime().block_on(async {
        store.propose(enrol()).await.unwrap();
        platter.left.store(1, Ordering::SeqCst);
        for _ in 0..3 {
            let error = store.propose(enrol()).await.unwrap_err();
            assert!(matches!(error, ProposeError::Storage { .. }), "{error}");
            assert_eq!(WireErrorCode::of(error), "storage_failed");
            assert_eq!(workers(&store), 1);
        }
        // Nobody is to look for it in the network.
        let error = store.read().await.unwrap_err();
        assert!(matches!(error, ReadError::Storage { .. }), "{error}");
        assert!(error.to_string().contains("disk under the data folder"), "{error}");
        platter.left.store(u64::MAX, Ordering::SeqCst);
        store.propose(enrol()).await.unwrap();
        // A refusal is not an error of the disk.
        let node = NodeId::worker(9);
        let start =
            NodeCommand::Start { node, incarnation: Default::default(), build: String::new() };
        let refused = store.propose(Change::Node(start)).await;
        assert_eq!(refused, Err(ProposeError::Refused(Refusal::UnknownNode { node })));
    });
    let count = workers(&store);
    owner.close();
    let (again, _owner) = start(platter.opener()).unwrap();
    assert_eq!(workers(&again), count);
}

/// At each operation of a change, and of a change with a compaction behind it.
#[test]
fn a_panic_of_the_library_is_an_error_and_heals() {
    // The second stands right before a compaction: a founder's entries are one and what was proposed.
    for before in [1, COMPACT_EVERY + 254] {
        for left in 0..16 {
            let platter = Platter::new(Vec::new(), u64::MAX);
            let (store, owner) = start(platter.opener()).unwrap();
            runtime().block_on(async {
                for _ in 0..before {
                    store.propose(enrol()).await.unwrap();
                }
                platter.panics.store(true, Ordering::SeqCst);
                platter.left.store(left, Ordering::SeqCst);
                match store.propose(enrol()).await {
                    // It took fewer operations than that, or the compaction behind it failed.
                    Ok(_) => {}
                    Err(ProposeError::Storage { why }) => {
                        assert!(why.contains("makes no sense"), "{why}");
                    }
                    Err(error) => panic!("after {left} operations: {error}"),
                }
                platter.left.store(u64::MAX, Ordering::SeqCst);
                store.propose(enrol()).await.unwrap();
            });
            let found = workers(&store);
            assert!(found == before + 1 || found == before + 2, "{found} after {left} operations");
            owner.close();
        }
    }
}

/// A leader that says that more is committed than this voter ever had: the algorithm gives up. The thread
/// ends, whoever asks is told, and what was acknowledged is on the disk.
#[test]
fn a_panic_of_the_algorithm_ends_the_store_and_loses_nothing() {
    let platter = Platter::new(Vec::new(), u64::MAX);
    let (store, owner) = start(platter.opener()).unwrap();
    runtime().block_on(async {
        store.propose(enrol()).await.unwrap();
        let mut message = ::raft::prelude::Message {
            from: 2,
            to: 1,
            term: 99,
            commit: 999,
            ..Default::default()
        };
        message.set_msg_type(::raft::prelude::MessageType::MsgHeartbeat);
        owner.network().send(NetworkEvent::Message(Box::new(message))).await.unwrap();
        let mut state = store.watch();
        // Its sender goes with the thread.
        while state.changed().await.is_ok() {}
        assert_eq!(store.propose(enrol()).await, Err(ProposeError::Stopped));
        assert_eq!(store.read().await, Err(ReadError::Stopped));
        assert_eq!(workers(&store), 1, "reads of this copy go on");
    });
    owner.close();
    let (again, _owner) = start(platter.opener()).unwrap();
    assert_eq!(workers(&again), 1);
}

struct WireErrorCode;

impl WireErrorCode {
    fn of(error: ProposeError) -> &'static str {
        shoal_protocol::error::WireError::from(error).code.label()
    }
}

#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE_NAME);
    let (store, owner) = open(folder.path()).unwrap();
    runtime().block_on(store.propose(enrol())).unwrap();
    drop(store);
    owner.close();
    let sound = std::fs::read(&path).unwrap();
    let check = |bytes: &[u8], what: &str| {
        std::fs::write(&path, bytes).unwrap();
        match open(folder.path()) {
            Err(error) => assert!(error.to_string().contains("state.redb"), "{error}"),
            Ok((store, owner)) => {
                assert_eq!(workers(&store), 1, "{what}: something else was read");
                drop(store);
                owner.close();
            }
        }
    };
    check(b"hello, this is no database", "another file");
    check(&sound[..sound.len() / 2], "half of it");
    for at in (0..sound.len().min(64 << 10)).step_by(2039) {
        let mut damaged = sound.clone();
        damaged[at] ^= 0xff;
        check(&damaged, &format!("byte {at}"));
    }
}
