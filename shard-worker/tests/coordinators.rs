//! A worker among several coordinators, all played by the test: who is obeyed, who is missed, who is
//! found again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cluster;

use std::sync::Arc;

use cluster::*;
use shoal_protocol::control::{CoordinatorAddress, CoordinatorMessage, ShardState, WorkerMessage};
use shoal_protocol::id::NodeId;
use shoal_protocol::plan::{Assignment, ModelSource, PeerAddress};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::{Alpn, Endpoint, Expect, Identity, close_code};
use shoal_protocol::request::HeadEvent;
use shoal_protocol::trust::Trust;
use shoal_protocol::units::Bytes;
use shoal_shard_worker::{DrainHandle, Worker, WorkerConfig};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Much less than a coordinator that nobody names may take part.
const AT_ONCE: std::time::Duration = std::time::Duration::from_secs(1);

/// One coordinator and its conversation with the worker.
struct Talk {
    to: mpsc::Sender<CoordinatorMessage>,
    said: watch::Receiver<Said>,
    peer: PeerAddress,
    requests: std::net::SocketAddr,
}

impl Talk {
    async fn assign(&self, epoch: u64, assignments: Vec<Assignment>) {
        self.to.send(CoordinatorMessage::Assign { epoch, assignments }).await.unwrap();
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Said) -> bool) -> Said {
        let mut heard = self.said.clone();
        let waited = tokio::time::timeout(PATIENCE, heard.wait_for(|said| holds(said))).await;
        match waited {
            Ok(said) => said.unwrap().clone(),
            Err(_) => panic!("never: {what}; {:?}", self.said.borrow()),
        }
    }

    async fn until_ready(&mut self, generation: u64) -> Said {
        self.until("ready", |said| {
            let shards = &said.report.shards;
            shards.len() == 1
                && shards[0].generation.0 == generation
                && shards[0].state == ShardState::Ready
        })
        .await
    }

    async fn probe(&mut self, probe: u64) {
        let source = ModelSource::Pretend(SPEC);
        self.to.send(CoordinatorMessage::Probe { probe, source }).await.unwrap();
        self.until("an answer", |said| {
            let of = |p: &WorkerMessage| matches!(p, WorkerMessage::Probed { probe: n, .. } if *n == probe);
            said.probed.iter().any(of)
        })
        .await;
    }

    /// Waits until the worker has dropped this conversation.
    async fn until_dropped(&mut self) {
        within(async { while self.said.changed().await.is_ok() {} }).await;
    }
}

/// c`number` at any port.
fn coordinator(cluster: &Cluster, number: u32) -> Endpoint {
    cluster.endpoint(NodeId::coordinator(number), &[Alpn::Control])
}

fn named(number: u32, endpoint: &Endpoint) -> CoordinatorAddress {
    CoordinatorAddress { node: NodeId::coordinator(number), cluster: endpoint.local_address() }
}

async fn talk(endpoint: &Endpoint, list: &[CoordinatorAddress]) -> Talk {
    let (register, to, said) = welcome_with(endpoint, list.to_vec()).await;
    let peer = PeerAddress { node: register.node, activations: register.activations };
    Talk { to, said, peer, requests: register.requests }
}

/// c1 and c2, and where they are.
struct Two {
    cluster: Cluster,
    c1: Endpoint,
    c2: Endpoint,
    list: [CoordinatorAddress; 2],
}

fn two() -> Two {
    let cluster = Cluster::new();
    let (c1, c2) = (coordinator(&cluster, 1), coordinator(&cluster, 2));
    let list = [named(1, &c1), named(2, &c2)];
    Two { cluster, c1, c2, list }
}

struct Running {
    drain: DrainHandle,
    task: JoinHandle<Option<String>>,
    data: Arc<TempDir>,
}

/// Starts w1, in a folder of its own or in that of its last life.
async fn start(cluster: &Cluster, join: &[&Endpoint], data: Option<Arc<TempDir>>) -> Running {
    let data = data.unwrap_or_else(|| {
        let data = TempDir::new().unwrap();
        let identity = cluster.identity(NodeId::worker(1));
        identity.save(&data.path().join("identity")).unwrap();
        Arc::new(data)
    });
    let config = WorkerConfig {
        join: join.iter().map(|endpoint| endpoint.local_address()).collect(),
        token: None,
        addresses: Default::default(),
        data: data.path().to_owned(),
        memory: Some(Bytes::mib(100)),
        threads: std::num::NonZeroUsize::new(1),
        cpus: Default::default(),
        device: "cpu".to_owned(),
        builtin: Vec::new(),
        zone: None,
        ranks_apart: false,
        tracer: shoal_protocol::trace::Tracer::off(),
    };
    let worker = Worker::start(config).await.unwrap();
    let drain = worker.drain_handle();
    Running { drain, task: tokio::spawn(worker.run_until_drained()), data }
}

impl Running {
    async fn stop(self) -> Arc<TempDir> {
        self.drain.drain();
        within(self.task).await.unwrap();
        self.data
    }

    /// Waits until the file in the data folder says this.
    async fn until_kept(&self, list: &[CoordinatorAddress]) {
        let text: String = list.iter().map(|c| format!("{} {}\n", c.node, c.cluster)).collect();
        within(async {
            while std::fs::read_to_string(self.data.path().join("coordinators")).ok().as_ref()
                != Some(&text)
            {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// Four tokens from w1's head.
async fn ask(cluster: &Cluster, talk: &Talk) -> Vec<u32> {
    let expect = Expect::Node(NodeId::worker(1));
    let asker = cluster.endpoint(NodeId::coordinator(9), &[]);
    let head = asker.connect(talk.requests, expect, Alpn::Requests, PATIENCE).await.unwrap();
    let (tokens, end) = Stream::open(&head, &request(&[1, 2], 4)).await.finish().await;
    assert!(matches!(end, HeadEvent::Done { .. }), "{end:?}");
    tokens
}

/// The whole pretend model on w1.
fn whole(generation: u64, peer: &PeerAddress) -> Vec<Assignment> {
    vec![assignment(&layout(generation, &[peer.node]), 0, std::slice::from_ref(peer))]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_coordinator_hears_everything_and_the_latest_leader_alone_is_obeyed() {
    let Two { cluster, c1, c2, list } = two();
    let worker = start(&cluster, &[&c1], None).await;
    let mut first = talk(&c1, &list).await;
    // c1 has named c2, so c2 is found.
    let mut second = talk(&c2, &list).await;
    first.assign(3, whole(1, &first.peer)).await;
    first.until_ready(1).await;
    second.until_ready(1).await;
    assert_eq!(ask(&cluster, &first).await, continuation(&SPEC, &[1, 2], 4));
    let counted = |said: &Said| said.report.shards.iter().any(|s| s.counters.steps >= 4);
    let before = second.until("counted", counted).await.report.shards[0].clone();

    // c2 leads now and says the same: nothing is loaded again, and nothing begins anew.
    let mut elsewhere = whole(1, &first.peer);
    elsewhere[0].peers[0].activations = ([127, 0, 0, 1], 9).into();
    second.assign(4, elsewhere).await;
    // What is said in one conversation is taken in that order, so this answer means that it was taken.
    second.probe(1).await;
    // An old leader that has not heard of it is told, and changes nothing.
    first.assign(3, vec![]).await;
    first.until("outranked", |said| said.outranked == [4]).await;
    first.to.send(CoordinatorMessage::Drain { epoch: 3 }).await.unwrap();
    first.until("outranked again", |said| said.outranked == [4, 4]).await;
    // The counters begin anew with a shard.
    let after = second.until_ready(1).await.report.shards[0].clone();
    assert_eq!((after.generation, &after.state), (before.generation, &before.state));
    assert!(after.counters.steps >= before.counters.steps, "{before:?} {after:?}");
    assert_eq!(ask(&cluster, &first).await, continuation(&SPEC, &[1, 2], 4));

    // The new one is obeyed.
    second.assign(4, vec![]).await;
    first.until("freed", |said| said.report.shards.is_empty()).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_dies_is_not_missed_and_is_found_again() {
    let Two { cluster, c1, c2, list } = two();
    let worker = start(&cluster, &[&c1, &c2], None).await;
    let (first, mut second) = tokio::join!(talk(&c1, &list), talk(&c2, &list));
    first.assign(3, whole(1, &first.peer)).await;
    second.until_ready(1).await;
    drop(first.to);
    let mut first = talk(&c1, &list).await;
    assert_eq!(ask(&cluster, &second).await, continuation(&SPEC, &[1, 2], 4));
    first.until_ready(1).await;

    // All are away, and it serves; whoever is back first is told all there is to tell.
    c1.close(close_code::DONE, "away");
    c2.close(close_code::DONE, "away");
    second.until_dropped().await;
    assert_eq!(ask(&cluster, &second).await, continuation(&SPEC, &[1, 2], 4));
    let address = c2.local_address();
    within(c2.drained(PATIENCE)).await;
    // Its socket is free once nobody holds on to it.
    drop((first, second, c1, c2));
    let back = within(async {
        let identity = Arc::new(cluster.identity(NodeId::coordinator(2)));
        loop {
            match Endpoint::bind(address, Arc::clone(&identity), &[Alpn::Control]) {
                Ok(endpoint) => return endpoint,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    })
    .await;
    let mut second = talk(&back, &list).await;
    second.until_ready(1).await;
    second.probe(7).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_is_answered_to_whoever_asked() {
    let Two { cluster, c1, c2, list } = two();
    let worker = start(&cluster, &[&c1], None).await;
    let mut first = talk(&c1, &list).await;
    let mut second = talk(&c2, &list).await;
    for (number, talk) in [(1, &mut first), (2, &mut second)] {
        talk.probe(number).await;
    }
    assert_eq!((first.said.borrow().probed.len(), second.said.borrow().probed.len()), (1, 1));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_is_followed_and_nobody_else_is_taken_for_who_is_on_it() {
    let cluster = Cluster::new();
    let (c1, c2, c3) =
        (coordinator(&cluster, 1), coordinator(&cluster, 2), coordinator(&cluster, 3));
    let (one, two, three) = (named(1, &c1), named(2, &c2), named(3, &c3));
    let worker = start(&cluster, &[&c1], None).await;
    let first = talk(&c1, &[one]).await;
    worker.until_kept(&[one]).await;
    first.to.send(CoordinatorMessage::Coordinators(vec![one, two])).await.unwrap();
    let mut second = talk(&c2, &[one, two]).await;
    worker.until_kept(&[one, two]).await;
    // c2 leaves, and c1 says so; what c2 says of itself does not count.
    first.to.send(CoordinatorMessage::Coordinators(vec![one, three])).await.unwrap();
    second.until_dropped().await;
    let third = talk(&c3, &[one, three]).await;
    worker.until_kept(&[one, three]).await;
    // An address at which somebody else listens is no way to c4.
    let four = CoordinatorAddress { node: NodeId::coordinator(4), cluster: two.cluster };
    first.to.send(CoordinatorMessage::Coordinators(vec![one, three, four])).await.unwrap();
    worker.until_kept(&[one, three, four]).await;
    let knock = within(c2.accept()).await.unwrap();
    // It may be gone before the handshake is over on this side.
    if let Ok(knock) = within(knock.establish()).await {
        within(knock.closed()).await;
        assert!(knock.accept_bi().await.is_err(), "it told c2 who it is");
    }
    drop(third);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_worker_finds_the_coordinator_that_lives() {
    let Two { cluster, c1, c2, list } = two();
    let worker = start(&cluster, &[&c1], None).await;
    let talks = (talk(&c1, &list).await, talk(&c2, &list).await);
    worker.until_kept(&list).await;
    let data = worker.stop().await;
    drop(talks);
    // The one that it joined through is gone for good.
    c1.close(close_code::DONE, "gone");
    let again = start(&cluster, &[&c1], Some(data)).await;
    let second = talk(&c2, &list[1..]).await;
    again.until_kept(&list[1..]).await;
    drop(second);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_removed_coordinator_has_begun_ends_when_the_others_name_it_no_more() {
    let cluster = Cluster::new();
    let (c1, c2) = (coordinator(&cluster, 1), coordinator(&cluster, 2));
    let list = [named(1, &c1), named(2, &c2)];
    let worker = start(&cluster, &[&c1, &c2], None).await;
    let (first, _second) = tokio::join!(talk(&c1, &list), talk(&c2, &list));
    let requests = async |endpoint: &Endpoint| {
        let expect = Expect::Node(NodeId::worker(1));
        endpoint.connect(first.requests, expect, Alpn::Requests, PATIENCE).await.unwrap()
    };
    let (kept, ended) = (requests(&c1).await, requests(&c2).await);
    first.to.send(CoordinatorMessage::Coordinators(vec![named(1, &c1)])).await.unwrap();
    let reason = within(ended.closed()).await.to_string();
    assert!(reason.contains("removed from the cluster"), "{reason}");
    assert!(kept.close_reason().is_none());
    // It dials again, and is out at once.
    let again = requests(&c2).await;
    let ended = tokio::time::timeout(AT_ONCE, again.closed()).await;
    assert!(ended.expect("at once").to_string().contains("removed from the cluster"));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_hears_of_its_removal_ends_and_says_so_and_one_that_is_refused_goes_on() {
    let cluster = Cluster::new();
    let c1 = coordinator(&cluster, 1);
    let worker = start(&cluster, &[&c1], None).await;
    for (code, words) in [(close_code::REFUSED, "not now"), (close_code::REMOVED, "w1 was removed")]
    {
        let connection = within(c1.accept()).await.unwrap().establish().await.unwrap();
        assert!(!worker.task.is_finished());
        connection.close(code, words);
    }
    let ended = within(worker.task).await.unwrap();
    assert_eq!(ended.as_deref(), Some("w1 was removed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_removed_while_a_worker_was_off_is_out_once_others_have_not_named_it_for_a_while() {
    let Two { cluster, c1, c2, list } = two();
    let worker = start(&cluster, &[&c1], None).await;
    let first = talk(&c1, &list[..1]).await;
    let requests = async |endpoint: &Endpoint| {
        let expect = Expect::Node(NodeId::worker(1));
        endpoint.connect(first.requests, expect, Alpn::Requests, PATIENCE).await.unwrap()
    };
    let (kept, stranger) = (requests(&c1).await, requests(&c2).await);
    let ended = tokio::time::timeout(PATIENCE * 2, stranger.closed()).await;
    let reason = ended.expect("its time is up").to_string();
    assert!(reason.contains("removed from the cluster"), "{reason}");
    let again = requests(&c2).await;
    let ended = tokio::time::timeout(AT_ONCE, again.closed()).await;
    assert!(ended.expect("at once").to_string().contains("removed from the cluster"));
    // Somebody names it: it is one.
    first.to.send(CoordinatorMessage::Coordinators(list.to_vec())).await.unwrap();
    worker.until_kept(&list).await;
    let named = requests(&c2).await;
    let open = tokio::time::timeout(AT_ONCE, named.closed()).await;
    assert!(open.is_err() && kept.close_reason().is_none(), "{open:?}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_list_of_cas_is_believed_and_who_lags_behind_leads_nobody_back() {
    let cluster = Cluster::new();
    let (c1, c2) = (coordinator(&cluster, 1), coordinator(&cluster, 2));
    let list = [named(1, &c1), named(2, &c2)];
    let worker = start(&cluster, &[&c1, &c2], None).await;
    let (mut first, mut second) = tokio::join!(talk(&c1, &list), talk(&c2, &list));
    let now = std::time::SystemTime::now();
    let next = CertificateAuthority::create(now).unwrap();
    let [old, new] = [cluster.ca.certificate(), next.certificate()].map(<[u8]>::to_vec);
    let introduction = cluster.ca.introduce(&next, now).unwrap();
    let trust = |revision, cas: [&Vec<u8>; 2]| Trust {
        revision,
        cas: cas.map(Clone::clone).to_vec(),
        lineage: vec![introduction.clone()],
    };
    let file = worker.data.path().join("identity");
    let kept = || Identity::load(&file).unwrap().unwrap();
    let tell = async |talk: &Talk, trust| {
        let message = CoordinatorMessage::Trust { trust, signs: true };
        talk.to.send(message).await.unwrap();
    };

    tell(&second, trust(2, [&new, &old])).await;
    second.probe(1).await;
    tell(&first, trust(1, [&old, &new])).await;
    first.probe(2).await;
    assert_eq!((kept().trust.revision, kept().shows()), (2, cluster.ca.fingerprint()));

    let csr = kept().renewal_request().unwrap();
    let certificate = next.issue(&csr, NodeId::worker(1), now).unwrap();
    second.to.send(CoordinatorMessage::Renewed { certificate }).await.unwrap();
    let shows = Some(next.fingerprint());
    // It says so to all of them.
    first.until("shown", |said| said.shows == shows).await;
    second.until("shown", |said| said.shows == shows).await;
    assert_eq!(kept().shows(), next.fingerprint());
    // Who knows the old CA alone still reaches it.
    second.assign(3, whole(1, &second.peer)).await;
    second.until_ready(1).await;
    assert_eq!(ask(&cluster, &second).await, continuation(&SPEC, &[1, 2], 4));
    worker.stop().await;
}
