//! The executor beside a store that hangs and a reconciliation that panics.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use shoal_protocol::id::{Generation, Incarnation, Role};
use shoal_protocol::quic::ca::CertificateAuthority;
use tokio::sync::mpsc;

use super::*;
use crate::control::authority::Authority;
use crate::control::state::{CoordinatorCommand, KeyFingerprint, NodeCommand};
use crate::control::store::raft::{self, RaftStore, SendMessage, WhenEmpty};

const DEADLINE: Duration = Duration::from_secs(10);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: too late"))
}

/// An executor with a store in a folder, and where it shows what is.
struct Setup {
    _folder: tempfile::TempDir,
    _owner: RaftStore,
    store: ControlStore,
    table: watch::Receiver<Arc<ServingTable>>,
    agents: Agents,
    executor: Executor,
}

fn set_up(reconcile: Reconcile, send: SendMessage) -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let me = NodeId::coordinator(1);
    let (store, owner) = raft::open(folder.path(), me, WhenEmpty::Found, send).unwrap();
    let authority = Authority::holding(CertificateAuthority::create(SystemTime::now()).unwrap());
    let agents = Agents::new(store.clone(), authority);
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let coordinator = CoordinatorView {
        id: me,
        pid: 1,
        build: String::new(),
        api: address,
        cluster: address,
        tls: false,
    };
    let shown = Shown {
        table: watch::Sender::new(Arc::new(ServingTable {
            workers_total: 7,
            ..Default::default()
        })),
        view: watch::Sender::new(Arc::new(view(
            &coordinator,
            &ClusterState::default(),
            &Stands::default(),
            &BTreeMap::new(),
        ))),
    };
    let table = shown.table.subscribe();
    let models = Models::new(folder.path().to_owned(), Vec::new());
    let mut executor = Executor::new(store.clone(), agents.clone(), models, coordinator, shown);
    executor.reconcile = reconcile;
    Setup { _folder: folder, _owner: owner, store, table, agents, executor }
}

/// Nothing that is served is taken away, and it does not spin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_reconciliation_leaves_what_is_shown_as_it_was() {
    static CALLS: Mutex<Vec<std::time::Instant>> = Mutex::new(Vec::new());
    fn panics(_: &ClusterState, _: &Observed) -> Decision {
        CALLS.lock().unwrap().push(std::time::Instant::now());
        panic!("a bug in a rule");
    }
    let Setup { table, executor, store, .. } = set_up(panics, Box::new(|_| {}));
    let (_stop, stopping) = watch::channel(false);
    let running = tokio::spawn(executor.run(stopping));
    within("three rounds", async {
        while CALLS.lock().unwrap().len() < 3 {
            // Changes do not make it hurry.
            let key = KeyFingerprint([0; 32]);
            let enrol = NodeCommand::Enrol { role: Role::Worker, key };
            store.propose(Change::Node(enrol)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(table.borrow().workers_total, 7, "something else is shown");
    let calls = CALLS.lock().unwrap().clone();
    assert!(calls[2] - calls[0] >= PERIOD * 2, "it spins");
    running.abort();
}

/// What hangs is the store's thread: a disk that takes its time, say. Looking goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_waits_keeps_nobody_from_looking() {
    static SHUT: AtomicBool = AtomicBool::new(false);
    // Rounds that were remembered, and all of them.
    static WANTED: AtomicUsize = AtomicUsize::new(0);
    static LOOKED: AtomicUsize = AtomicUsize::new(0);
    static FOLLOWED: AtomicBool = AtomicBool::new(false);
    fn wants(_: &ClusterState, observed: &Observed) -> Decision {
        let mut history = observed.history.clone();
        LOOKED.fetch_add(1, Ordering::SeqCst);
        if observed.follows {
            FOLLOWED.fetch_or(!history.is_empty(), Ordering::SeqCst);
            return Decision { history, ..Decision::default() };
        }
        WANTED.store(history.len() + 1, Ordering::SeqCst);
        history.insert(ReplicaId(history.len() as u32), History::default());
        let (replica, generation) = (ReplicaId(1), Generation(1));
        let actions = vec![Action::Confirm { replica, generation, asked: 1 }];
        Decision { actions, history, ..Decision::default() }
    }
    // One word that it hangs is enough.
    let (hung, mut hangs) = mpsc::channel(1);
    let send: SendMessage = Box::new(move |_| {
        while SHUT.load(Ordering::SeqCst) {
            let _ = hung.try_send(());
            std::thread::park_timeout(Duration::from_millis(1));
        }
    });
    let Setup { executor, store, agents: _agents, .. } = set_up(wants, send);
    // Somebody who is written to at each change, so that the thread comes by the gate.
    for number in 1..=2 {
        let (role, key) = (Role::Coordinator, KeyFingerprint([0; 32]));
        store.propose(Change::Node(NodeCommand::Enrol { role, key })).await.unwrap();
        let announce = CoordinatorCommand::Announce {
            node: NodeId::coordinator(number),
            incarnation: Incarnation(1),
            boot: 1,
            cluster: SocketAddr::from(([127, 0, 0, 1], 1)),
            build: String::new(),
        };
        store.propose(Change::Coordinator(announce)).await.unwrap();
    }
    let (_stop, stopping) = watch::channel(false);
    let running = tokio::spawn(executor.run(stopping));
    within("it wants something", async {
        while WANTED.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    SHUT.store(true, Ordering::SeqCst);
    within("the store hangs", hangs.recv()).await;
    let (wanted, looked) = (WANTED.load(Ordering::SeqCst), LOOKED.load(Ordering::SeqCst));
    within("two more looks", async {
        while LOOKED.load(Ordering::SeqCst) < looked + 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(WANTED.load(Ordering::SeqCst) <= wanted + 2, "it decided while it acted");
    assert!(!FOLLOWED.load(Ordering::SeqCst), "it leads, and looked as one that follows");
    SHUT.store(false, Ordering::SeqCst);
    running.abort();
}
