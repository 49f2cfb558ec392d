//! Coordinators that are there and do not speak with each other: that is said as what it is, and not with each try.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use shoal_protocol::admin::{AdminCall, AdminReply};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::Incarnation;
use shoal_protocol::peer::{MESSAGE_LEN_MAX, PeerHello, PeerReply, PeerRequest};
use shoal_protocol::quic::{Accepting, Alpn, Endpoint, Expect, Identity};
use shoal_protocol::version::VersionRange;
use tokio::task::{JoinHandle, JoinSet};
use tracing::field::{Field, Visit};
use tracing::span;

use super::cluster::{C, Cluster, LOOK};
use crate::control_support::*;

/// A version that nobody speaks.
const OTHER: VersionRange = VersionRange { min: 99, max: 99 };

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_refused_says_by_whom_and_why_and_both_sides_say_it_once() {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let mut cluster = Cluster::of_three().await;
    let (second, third) =
        (Refuses::instead(&mut cluster, 1).await, Refuses::instead(&mut cluster, 2).await);
    within("what is wrong", async {
        loop {
            let words = no_majority(&cluster).await.unwrap_or_default();
            let said = [C[1], C[2]].map(|node| format!("{node} refuses this one: upgrade it"));
            if said.iter().all(|said| words.contains(said)) {
                assert!(words.contains("a change needs 2 of the 3 that vote"), "{words}");
                assert!(!words.contains("recover-alone"), "they are there: {words}");
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    // It tries on.
    within("many tries", async {
        while second.times() < 6 || third.times() < 6 {
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    assert_eq!(log.count("another coordinator refuses this one: upgrade it"), 2, "once of each");

    for _ in 0..5 {
        let refused = second.greet(&cluster).await;
        assert_eq!(refused.code, ErrorCode::VersionMismatch, "{refused}");
    }
    assert_eq!(log.count("a coordinator was refused: "), 1, "once");

    second.end().await;
    cluster.restart(1).await;
    cluster.leader(0).await;
    within("a majority", async {
        while no_majority(&cluster).await.is_some() {
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    third.end().await;
}

/// What the first coordinator says of it.
async fn no_majority(cluster: &Cluster) -> Option<String> {
    match cluster.operator(0).await.call(AdminCall::Presence).await {
        AdminReply::Presence(view) => view.no_majority,
        other => panic!("{other:?}"),
    }
}

/// Stands where a coordinator was, under its name, and refuses all others.
struct Refuses {
    me: usize,
    endpoint: Endpoint,
    times: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Refuses {
    async fn instead(cluster: &mut Cluster, index: usize) -> Self {
        let identity = Identity::load(&cluster.data(index).join("identity")).unwrap().unwrap();
        cluster.kill(index);
        let identity = Arc::new(identity);
        let address = cluster.addresses[index];
        let endpoint = within("its port", async {
            loop {
                match Endpoint::bind(address, Arc::clone(&identity), &[Alpn::Raft]) {
                    Ok(endpoint) => return endpoint,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        let times = Arc::<AtomicUsize>::default();
        let (accepting, counted) = (endpoint.clone(), Arc::clone(&times));
        let task = tokio::spawn(async move {
            let mut conversations = JoinSet::new();
            while let Some(incoming) = accepting.accept().await {
                conversations.spawn(refuse(incoming, Arc::clone(&counted)));
            }
        });
        Self { me: index, endpoint, times, task }
    }

    fn times(&self) -> usize {
        self.times.load(Ordering::Relaxed)
    }

    /// What the first coordinator says to it.
    async fn greet(&self, cluster: &Cluster) -> WireError {
        let (address, expect) = (cluster.addresses[0], Expect::Node(C[0]));
        let connection =
            self.endpoint.connect(address, expect, Alpn::Raft, DEADLINE).await.unwrap();
        let (mut sender, mut receiver) = connection.open_bi().await.unwrap();
        let hello = PeerRequest::Log(PeerHello {
            versions: OTHER,
            node: C[self.me],
            incarnation: Incarnation(99),
            boot: 1,
            cluster: self.endpoint.local_address(),
            build: "test".into(),
        });
        sender.send_message(&hello, MESSAGE_LEN_MAX).await.unwrap();
        match receiver.message(MESSAGE_LEN_MAX).await.unwrap() {
            Some(PeerReply::Refused(refused)) => refused,
            other => panic!("not refused: {other:?}"),
        }
    }

    async fn end(self) {
        self.task.abort();
        self.endpoint.close(0, "over");
        self.endpoint.drained(DEADLINE).await;
    }
}

async fn refuse(incoming: Accepting, times: Arc<AtomicUsize>) {
    let Ok(connection) = incoming.establish().await else { return };
    let Ok((mut sender, mut receiver)) = connection.accept_bi().await else { return };
    if let Ok(Some(PeerRequest::Log(_))) = receiver.message(MESSAGE_LEN_MAX).await {
        times.fetch_add(1, Ordering::Relaxed);
        let refused = WireError::new(ErrorCode::VersionMismatch, "upgrade it");
        let _ = sender.send_message(&PeerReply::Refused(refused), MESSAGE_LEN_MAX).await;
        sender.finish();
    }
    connection.closed().await;
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn count(&self, words: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|line| line.contains(words)).count()
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("shoal")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
