//! The store in etcd, on an etcd that is killed, frozen, compacted, emptied and cut off.

use std::net::SocketAddr;
use std::time::Duration;

use etcd_client::{DeleteOptions, Txn, TxnOp};
use rustix::process::Signal;
use shoal_coordinator::Coordinator;
use shoal_coordinator::config::{CoordinatorConfig, StoreConfig};
use shoal_coordinator::control::store::etcd::{self, EtcdStore, LEASE_TTL, LOG_LEN_MAX};
use shoal_coordinator::control::store::{ControlStore, ProposeError};
use shoal_protocol::id::NodeId;
use tokio::time::Instant;

use crate::contract::{
    Clock, Fixture, added, coordinator, enrol, insist, right_clock, standing, within, workers,
};
use crate::process::{EtcdProcess, Flags, config, is_skipped};
use crate::proxy::{Proxy, Way};

/// One etcd with one member.
pub struct EtcdFixture(EtcdProcess);

impl Fixture for EtcdFixture {
    type Owner = EtcdStore;

    const COORDINATORS: u32 = 3;

    const STALLS: bool = true;

    async fn new() -> Option<Self> {
        (!is_skipped()).then(|| Self(EtcdProcess::start(1, Flags::default())))
    }

    async fn open(&self, who: NodeId, clock: Clock) -> (ControlStore, EtcdStore) {
        etcd::open_with(&self.0.config(), who, clock).await.expect("the store opens")
    }

    async fn close(&self, owner: EtcdStore) {
        owner.close().await;
    }

    async fn kill(&self, owner: EtcdStore) {
        owner.kill();
    }

    async fn stall(&self) {
        self.0.signal(0, Signal::STOP);
    }

    async fn mend(&self) {
        self.0.signal(0, Signal::CONT);
    }

    async fn log_len(&self) -> Option<(u64, u64)> {
        Some((self.0.count("test/shoal/cmd/").await, LOG_LEN_MAX))
    }
}

async fn open(process: &EtcdProcess, number: u32) -> (ControlStore, EtcdStore) {
    let config = process.config();
    within("the start", etcd::open(&config, coordinator(number))).await.expect("the store opens")
}

/// A coordinator behind a way that can be cut.
async fn open_behind(process: &EtcdProcess, number: u32) -> (Proxy, ControlStore, EtcdStore) {
    let proxy = Proxy::to(process.address(0)).await;
    let config = config(&proxy.address());
    let opened = etcd::open_with(&config, coordinator(number), right_clock());
    let (store, owner) = within("the start", opened).await.expect("the store opens");
    (proxy, store, owner)
}

/// A change that can be made is made within so long, also on a busy machine.
const ANSWER_LOST: std::time::Duration = std::time::Duration::from_secs(5);

async fn shows(store: &ControlStore, count: usize) {
    let mut watch = store.watch();
    let shown = watch.wait_for(|state| workers(state) == count);
    drop(within(&format!("{count} workers"), shown).await.expect("it runs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_killed_and_started_again_is_used_again_and_nothing_is_lost() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (one, _one) = open(&process, 1).await;
    let (other, _other) = open(&process, 2).await;
    for round in 1..=3 {
        process.kill(0);
        let error = one.propose(enrol()).await.expect_err("nobody can have taken it");
        assert!(matches!(error, ProposeError::Unavailable { .. }), "{error}");
        process.start_member(0);
        insist(&one, enrol()).await;
        // The other one hears of it by itself.
        shows(&other, workers(&one.state())).await;
        assert!(workers(&one.state()) >= round);
    }
    standing(&one, |standing| standing.leader.is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_without_a_majority_is_said_and_goes_on_when_it_has_one() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(3, Flags::default());
    let (store, _owner) = open(&process, 1).await;
    insist(&store, enrol()).await;
    // One of three is no loss.
    process.kill(0);
    insist(&store, enrol()).await;
    let before = store.read().await.expect("a majority answers");
    process.signal(1, Signal::STOP);
    let error = store.propose(enrol()).await.expect_err("no majority");
    assert!(matches!(error, ProposeError::Unavailable { .. }), "{error}");
    assert!(store.read().await.is_err());
    assert_eq!(*store.state(), *before, "what is there can be read");
    process.signal(1, Signal::CONT);
    insist(&store, enrol()).await;
    let found = workers(&store.read().await.expect("a majority answers"));
    assert!((3..=4).contains(&found), "{found}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_missed_a_compaction_of_etcd_catches_up() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (one, _one) = open(&process, 1).await;
    let (proxy, other, _other) = open_behind(&process, 2).await;
    added(one.propose(enrol()).await);
    shows(&other, 1).await;
    // The log still has what it missed; the history that its watch would ask for is gone.
    proxy.set(Way::Cut);
    for _ in 0..20 {
        added(one.propose(enrol()).await);
    }
    process.compact().await;
    proxy.set(Way::Open);
    shows(&other, 21).await;
    // The log has not: it is in a snapshot.
    proxy.set(Way::Cut);
    for _ in 0..LOG_LEN_MAX {
        added(one.propose(enrol()).await);
    }
    process.compact().await;
    assert_eq!(workers(&other.state()), 21);
    proxy.set(Way::Open);
    shows(&other, 21 + LOG_LEN_MAX as usize).await;
    assert_eq!(*other.read().await.expect("a read"), *one.state());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_whose_answer_is_lost_is_made_once() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (proxy, store, _owner) = open_behind(&process, 1).await;
    let (other, _other) = open(&process, 2).await;
    insist(&store, enrol()).await;
    let (mut lost, mut tries) = (0, 0);
    while lost < 3 {
        tries += 1;
        assert!(tries <= 12, "only {lost} answers were lost");
        let had = workers(&other.read().await.expect("a read"));
        shows(&other, had).await;
        proxy.set(Way::Mute);
        let proposer = tokio::spawn({
            let store = store.clone();
            async move { store.propose(enrol()).await }
        });
        // It is made, and nobody is told; unless something else was written just before it, so that it has
        // to ask again where the log ends, and is told nothing.
        let mut watch = other.watch();
        let made = watch.wait_for(|state| workers(state) == had + 1);
        let made = tokio::time::timeout(ANSWER_LOST, made).await.is_ok();
        assert!(!proposer.is_finished());
        proxy.set(Way::Cut);
        proxy.set(Way::Open);
        let result = within("an answer", proposer).await.expect("it runs");
        assert_eq!(added(result), NodeId::worker(had as u32 + 1));
        insist(&store, enrol()).await;
        assert_eq!(workers(&other.read().await.expect("a read")), had + 2);
        lost += usize::from(made);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_leader_wants_that_leads_no_more_is_not_made() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (store, _owner) = open(&process, 1).await;
    let mut client = process.client().await;
    let key = "test/shoal/leader";
    for _ in 0..10 {
        let before = standing(&store, |standing| standing.leading).await;
        // As if its lease had ended while it was frozen: another leads, and it does not know.
        client.delete(key, None).await.expect("it answers");
        client.put(key, "c9", None).await.expect("it answers");
        let believed = *store.standing().borrow();
        let epoch = Some(believed.epoch).filter(|_| believed.leading);
        let proof = store.prove(believed.epoch).await;
        let result = store.propose_under(enrol(), epoch).await;
        let after = standing(&store, |standing| standing.epoch > before.epoch).await;
        assert_eq!((after.leader, after.leading), (Some(coordinator(9)), false));
        client.delete(key, None).await.expect("it answers");
        if believed != before {
            // It had looked just then, so nothing was shown.
            continue;
        }
        let error = result.expect_err("another leads").to_string();
        assert!(error.contains("another coordinator leads now"), "{error}");
        let error = proof.expect_err("another leads").to_string();
        assert!(error.contains("another coordinator leads now"), "{error}");
        assert_eq!(workers(&store.state()), 0);
        return;
    }
    panic!("it looked just then ten times");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_knows_it_before_another_leads() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (proxy, one, _one) = open_behind(&process, 1).await;
    let first = standing(&one, |standing| standing.leading).await;
    let (other, _other) = open(&process, 2).await;
    assert_eq!(standing(&other, |s| s.leader.is_some()).await.leader, Some(coordinator(1)));
    proxy.set(Way::Mute);
    let cut_at = Instant::now();
    standing(&one, |standing| !standing.leading).await;
    assert!(!other.standing().borrow().leading, "two lead");
    assert!(cut_at.elapsed() < LEASE_TTL + Duration::from_secs(1), "{:?}", cut_at.elapsed());
    // Its requests still arrive, so its lease lasts until they end.
    proxy.set(Way::Cut);
    let second = standing(&other, |standing| standing.leading).await;
    assert!(second.epoch > first.epoch);
    println!("another led {:?} after the cut", cut_at.elapsed());
    proxy.set(Way::Open);
    let told = standing(&one, |standing| standing.epoch == second.epoch).await;
    assert_eq!(told.leader, Some(coordinator(2)));
    insist(&one, enrol()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_emptied_is_not_believed() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (store, _owner) = open(&process, 1).await;
    insist(&store, enrol()).await;
    let mut client = process.client().await;
    let options = DeleteOptions::new().with_prefix();
    client.delete("test/shoal/", Some(options)).await.expect("it answers");
    // The leader's key went with the rest, so it may first have to lead anew.
    let mut error = String::new();
    for _ in 0..2 {
        error = store.propose(enrol()).await.expect_err("it went back").to_string();
    }
    assert!(error.contains("restored from an old backup, or emptied"), "{error}");
    assert!(store.read().await.is_err());
    assert_eq!(workers(&store.state()), 1, "what is there can be read");
}

/// A leader that is behind must not write its snapshot over one that holds more: the commands between the
/// two are in that one alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_holds_more_is_left_alone() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (store, _owner) = open(&process, 1).await;
    standing(&store, |standing| standing.leading).await;
    let mut client = process.client().await;
    let later = br#"{"index":1000000,"folder":"later","parts":1,"len":1}"#.to_vec();
    client.put("test/shoal/snapshot", later.clone(), None).await.expect("it answers");
    client.put("test/shoal/snap/later/0", vec![7], None).await.expect("it answers");
    let total = LOG_LEN_MAX + 100;
    for _ in 0..total {
        added(store.propose(enrol()).await);
    }
    let found = client.get("test/shoal/snapshot", None).await.expect("it answers");
    assert_eq!(found.kvs()[0].value(), later, "it was written over");
    assert_eq!(process.count("test/shoal/snap/later/").await, 1);
    assert_eq!(process.count("test/shoal/cmd/").await, total, "commands were trimmed");
}

/// Both find it empty, and both would be the first coordinator, each with a CA of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_found_a_cluster_in_one_etcd_at_once_one_does() {
    if is_skipped() {
        return;
    }
    for _ in 0..5 {
        let process = EtcdProcess::start(1, Flags::default());
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let [one, other] = folders.each_ref().map(|folder| CoordinatorConfig {
            data: folder.path().to_owned(),
            store: StoreConfig::Etcd(Box::new(process.config())),
            listen: any,
            tls: None,
            cluster: any,
            advertise: None,
            join: Vec::new(),
            token: None,
            builtin: Vec::new(),
            policy: Default::default(),
            prefix_affinity: false,
            runtime_adapters: false,
            tracer: shoal_protocol::trace::Tracer::off(),
        });
        let both = async { tokio::join!(Coordinator::start(one), Coordinator::start(other)) };
        let (one, other) = within("the starts", both).await;
        let (founder, error) = match (one, other) {
            (Ok(founder), Err(error)) | (Err(error), Ok(founder)) => (founder, error),
            (Ok(_), Ok(_)) => panic!("both founded a cluster"),
            (Err(one), Err(other)) => panic!("nobody did: {one}; {other}"),
        };
        // One that finds it founded and announced is told so by what is there.
        let words = ["another coordinator is founding", "not the CA's key"];
        assert!(words.iter().any(|words| error.to_string().contains(words)), "{error}");
        assert_eq!(founder.id(), coordinator(1));
        // Its operator has a number too, whatever the other one left.
        let (store, owner) = open(&process, 9).await;
        assert!(store.state().nodes.get(NodeId::admin(1)).is_some());
        drop(store);
        owner.close().await;
        founder.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_named_at_the_start() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let (store, owner) = open(&process, 1).await;
    for _ in 0..3 {
        insist(&store, enrol()).await;
    }
    drop(store);
    owner.close().await;
    let mut client = process.client().await;
    let key = |n: u32| format!("test/shoal/cmd/{n:020}");
    let second = client.get(key(2), None).await.expect("it answers");
    let sound = second.kvs()[0].value().to_vec();
    let mut torn = sound.clone();
    torn[40] ^= 1;
    for (op, words) in [
        (TxnOp::put(key(2), torn, None), "command 2 is damaged: its checksum"),
        (TxnOp::delete(key(2), None), "the log jumps from command 1 to 3"),
        (TxnOp::put("test/shoal/snapshot", "{}", None), "its manifest cannot be read"),
    ] {
        client.txn(Txn::new().and_then([op])).await.expect("it answers");
        let error = etcd::open(&process.config(), coordinator(1)).await.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        client.delete("test/shoal/snapshot", None).await.expect("it answers");
        client.put(key(2), sound.clone(), None).await.expect("it answers");
    }
    let (store, _owner) = open(&process, 1).await;
    assert_eq!(workers(&store.state()), 3);
}
