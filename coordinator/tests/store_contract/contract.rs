//! The sentences. To show a store: implement [`Fixture`] and write `contract!(its_name, ItsFixture);`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_coordinator::control::state::{
    Change, ClusterState, Effect, KeyFingerprint, NodeCommand, Refusal, TokenCommand, TokenHash,
};
use shoal_coordinator::control::store::{ControlStore, ProposeError, Standing};
use shoal_protocol::id::{NodeId, Role};
use tokio::time::{Instant, timeout};

/// Every wait of a test ends by then.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Tells a coordinator the time.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// One log and the coordinators that have it open.
#[allow(async_fn_in_trait)] // Nobody else calls it.
pub trait Fixture: Sized {
    /// What is behind a coordinator's handle.
    type Owner;

    /// How many coordinators may have one log open at once, from 1 up. They are c1, c2 …
    const COORDINATORS: u32;

    /// How many of them must live for changes to be made.
    const NEEDED: u32 = 1;

    /// Whether [`Fixture::stall`] can take the majority (or the disk) away.
    const STALLS: bool;

    /// An empty log; `None` where this machine cannot, and that has been said.
    async fn new() -> Option<Self>;

    /// Starts a coordinator on it, with a clock; one that cannot be told the time ignores that.
    async fn open(&self, who: NodeId, clock: Clock) -> (ControlStore, Self::Owner);

    /// Ends one in order. All its handles are gone by then.
    async fn close(&self, owner: Self::Owner);

    /// Ends one as kill -9 does. All its handles are gone by then.
    async fn kill(&self, owner: Self::Owner);

    /// Lets no change through, until `mend`.
    async fn stall(&self) {}

    /// Lets changes through again.
    async fn mend(&self) {}

    /// Commands that are kept beside the snapshot, and the most that may be; `None` where nobody can
    /// see.
    async fn log_len(&self) -> Option<(u64, u64)> {
        None
    }
}

/// Several coordinators on one log.
pub struct Cluster<F: Fixture> {
    pub fixture: F,
    pub stores: Vec<ControlStore>,
    pub owners: Vec<F::Owner>,
}

pub fn coordinator(number: u32) -> NodeId {
    NodeId::coordinator(number)
}

pub fn right_clock() -> Clock {
    Arc::new(SystemTime::now)
}

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

impl<F: Fixture> Cluster<F> {
    /// All that the store can have.
    pub async fn new() -> Option<Self> {
        let fixture = F::new().await?;
        let mut cluster = Self { fixture, stores: Vec::new(), owners: Vec::new() };
        for number in 1..=F::COORDINATORS {
            cluster.start(number, right_clock()).await;
        }
        Some(cluster)
    }

    pub async fn start(&mut self, number: u32, clock: Clock) {
        let opened = self.fixture.open(coordinator(number), clock);
        let (store, owner) = within("the start", opened).await;
        self.stores.push(store);
        self.owners.push(owner);
    }

    /// Ends all in order.
    pub async fn close(&mut self) {
        self.stores.clear();
        for owner in self.owners.drain(..) {
            within("the end", self.fixture.close(owner)).await;
        }
    }

    /// Ends one as kill -9 does.
    pub async fn kill(&mut self, index: usize) {
        drop(self.stores.remove(index));
        within("the end", self.fixture.kill(self.owners.remove(index))).await;
    }

    pub fn first(&self) -> &ControlStore {
        &self.stores[0]
    }

    pub fn last(&self) -> &ControlStore {
        &self.stores[self.stores.len() - 1]
    }
}

pub fn enrol() -> Change {
    Change::Node(NodeCommand::Enrol { role: Role::Worker, key: KeyFingerprint([0; 32]) })
}

pub fn token(n: u8, uses: u32) -> Change {
    let (hash, expires) = (TokenHash::of(&[n; 32]), Duration::from_secs(3600));
    Change::Token(TokenCommand::Create { hash, role: Role::Worker, uses, expires })
}

fn join(n: u8) -> Change {
    let token = TokenHash::of(&[n; 32]);
    Change::Node(NodeCommand::Join { token, key: KeyFingerprint([n; 32]) })
}

pub fn workers(state: &ClusterState) -> usize {
    state.nodes.workers().count()
}

pub fn added(result: Result<Vec<Effect>, ProposeError>) -> NodeId {
    match result.as_deref() {
        Ok([Effect::NodeAdded { node }]) => *node,
        other => panic!("no node was added: {other:?}"),
    }
}

/// Waits until somebody is as wanted in the eyes of a coordinator.
pub async fn standing(store: &ControlStore, wanted: impl Fn(&Standing) -> bool) -> Standing {
    let mut told = store.standing();
    let found = within("a leader", told.wait_for(|standing| wanted(standing))).await;
    *found.expect("the store runs")
}

/// Proposes until it is taken: for changes right after something was mended.
pub async fn insist(store: &ControlStore, change: Change) -> Vec<Effect> {
    let until = Instant::now() + DEADLINE;
    loop {
        match store.propose(change.clone()).await {
            Ok(effects) => return effects,
            Err(error) if Instant::now() > until => panic!("not within {DEADLINE:?}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

pub async fn a_change_is_shown_when_it_returns_or_refused_in_words<F: Fixture>() {
    let Some(cluster) = Cluster::<F>::new().await else { return };
    for (n, store) in (1..).zip(&cluster.stores) {
        assert_eq!(added(store.propose(enrol()).await), NodeId::worker(n));
        assert!(store.state().nodes.get(NodeId::worker(n)).is_some());
        let before = store.state();
        let node = NodeId::worker(99);
        let start = NodeCommand::Start { node, incarnation: Default::default(), build: "".into() };
        let refused = store.propose(Change::Node(start)).await;
        assert_eq!(refused, Err(ProposeError::Refused(Refusal::UnknownNode { node })));
        assert_eq!(store.state().nodes, before.nodes);
    }
}

pub async fn all_see_all_changes_in_one_order_and_each_once<F: Fixture>() {
    const EACH: usize = 20;
    let Some(cluster) = Cluster::<F>::new().await else { return };
    let mut proposers = tokio::task::JoinSet::new();
    for store in &cluster.stores {
        // Two of each coordinator at once.
        for _ in 0..2 {
            let store = store.clone();
            proposers.spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..EACH {
                    ids.push(added(store.propose(enrol()).await));
                }
                assert!(ids.is_sorted(), "{ids:?}");
                ids
            });
        }
    }
    let mut ids: Vec<NodeId> = within("all", proposers.join_all()).await.concat();
    ids.sort();
    let total = (2 * EACH * cluster.stores.len()) as u32;
    assert_eq!(ids, (1..=total).map(NodeId::worker).collect::<Vec<_>>());
    let state = cluster.first().read().await.expect("a read");
    for store in &cluster.stores {
        assert_eq!(*store.read().await.expect("a read"), *state);
    }
}

pub async fn a_read_sees_what_another_was_promised_before<F: Fixture>() {
    let Some(cluster) = Cluster::<F>::new().await else { return };
    for round in 1..=20 {
        let node = added(cluster.first().propose(enrol()).await);
        let state = cluster.last().read().await.expect("a read");
        assert!(state.nodes.get(node).is_some(), "round {round}: {node} is not there");
        assert_eq!(workers(&cluster.last().state()), round);
    }
}

pub async fn a_refusal_is_never_of_an_old_picture<F: Fixture>() {
    let Some(cluster) = Cluster::<F>::new().await else { return };
    for n in 0..10 {
        cluster.first().propose(token(n, 1)).await.expect("a token");
        added(cluster.last().propose(join(n)).await);
        let again = cluster.first().propose(join(n)).await;
        assert_eq!(again, Err(ProposeError::Refused(Refusal::BadToken)));
    }
}

pub async fn of_two_that_race_for_one_use_one_gets_it<F: Fixture>() {
    let Some(cluster) = Cluster::<F>::new().await else { return };
    for n in 0..10 {
        cluster.first().propose(token(n, 1)).await.expect("a token");
        let (one, other) =
            tokio::join!(cluster.first().propose(join(n)), cluster.last().propose(join(n)));
        let refused = Err(ProposeError::Refused(Refusal::BadToken));
        let (won, lost) = if one.is_ok() { (one, other) } else { (other, one) };
        added(won);
        assert_eq!(lost, refused, "round {n}");
    }
}

pub async fn a_start_finds_everything<F: Fixture>() {
    let Some(mut cluster) = Cluster::<F>::new().await else { return };
    for round in 0..4 {
        added(cluster.last().propose(enrol()).await);
        cluster.first().propose(token(round, 3)).await.expect("a token");
        let expected = cluster.last().read().await.expect("a read");
        if round % 2 == 0 {
            cluster.close().await;
        }
        while !cluster.stores.is_empty() {
            cluster.kill(0).await;
        }
        for number in 1..=F::COORDINATORS {
            cluster.start(number, right_clock()).await;
        }
        for store in &cluster.stores {
            assert_eq!(*store.read().await.expect("a read"), *expected, "round {round}");
        }
    }
}

pub async fn a_long_log_is_compacted_and_nothing_is_lost<F: Fixture>() {
    const TOTAL: usize = 700;
    let Some(mut cluster) = Cluster::<F>::new().await else { return };
    for i in 0..TOTAL {
        added(cluster.stores[i % cluster.stores.len()].propose(enrol()).await);
    }
    let state = cluster.first().read().await.expect("a read");
    assert_eq!(workers(&state), TOTAL);
    if let Some((len, max)) = cluster.fixture.log_len().await {
        assert!(len <= max && len < TOTAL as u64, "{len} commands are kept, at most {max} may be");
    }
    for store in &cluster.stores {
        assert_eq!(*store.read().await.expect("a read"), *state);
    }
    cluster.close().await;
    for number in 1..=F::NEEDED {
        cluster.start(number, right_clock()).await;
    }
    assert_eq!(*cluster.first().read().await.expect("a read"), *state);
    assert_eq!(added(cluster.first().propose(enrol()).await), NodeId::worker(TOTAL as u32 + 1));
}

pub async fn one_leads_and_another_does_when_it_dies<F: Fixture>() {
    let Some(mut cluster) = Cluster::<F>::new().await else { return };
    let mut last = 0;
    while cluster.stores.len() >= F::NEEDED as usize {
        // A leader is known before it leads: it first has to have all that was committed before.
        let told = standing(cluster.first(), |s| s.leader.is_some() && s.epoch > last).await;
        last = told.epoch;
        let one = within("one leads", async {
            loop {
                let all = || cluster.stores.iter().map(|store| *store.standing().borrow());
                if all().all(|s| s.leader.is_some() && s.epoch >= last) && all().any(|s| s.leading)
                {
                    return all().collect::<Vec<_>>();
                }
                tokio::task::yield_now().await;
            }
        });
        let all = one.await;
        assert_eq!(all.iter().filter(|s| s.leading).count(), 1, "{all:?}");
        assert!(
            all.iter().all(|s| (s.leader, s.epoch) == (all[0].leader, all[0].epoch)),
            "{all:?}"
        );
        added(cluster.last().propose(enrol()).await);
        let leader = cluster.stores.iter().position(|store| store.standing().borrow().leading);
        cluster.kill(leader.expect("one leads")).await;
        // A change meanwhile is made by those who are left, sooner or later.
        if cluster.stores.len() >= F::NEEDED as usize {
            insist(cluster.first(), enrol()).await;
        }
    }
    assert!(last > 0);
}

pub async fn what_a_leader_wants_is_not_made_under_another_and_the_rest_is<F: Fixture>() {
    let Some(mut cluster) = Cluster::<F>::new().await else { return };
    let led = standing(cluster.first(), |s| s.leader.is_some() && s.epoch > 0).await;
    let one = within("one leads", async {
        loop {
            let leads = |store: &ControlStore| store.standing().borrow().leading;
            match cluster.stores.iter().position(leads) {
                Some(leader) => return leader,
                None => tokio::task::yield_now().await,
            }
        }
    });
    let one = one.await;
    let epoch = cluster.stores[one].standing().borrow().epoch;
    assert!(epoch >= led.epoch);
    cluster.stores[one].prove(epoch).await.expect("it leads");
    added(cluster.stores[one].propose_under(enrol(), Some(epoch)).await);
    if cluster.stores.len() <= F::NEEDED as usize {
        return;
    }
    cluster.kill(one).await;
    for store in &cluster.stores {
        standing(store, |s| s.leader.is_some() && s.epoch > epoch).await;
        // As if the one that was killed had been frozen, and went on where it was.
        let result = store.propose_under(enrol(), Some(epoch)).await;
        let error = result.expect_err("another leads");
        assert!(error.to_string().contains("another coordinator leads now"), "{error}");
        let error = store.prove(epoch).await.expect_err("another leads");
        assert!(error.to_string().contains("another coordinator leads now"), "{error}");
        // What is nobody's in particular is made.
        insist(store, enrol()).await;
    }
}

pub async fn changes_that_wait_at_the_end_are_made<F: Fixture>() {
    const WAITING: usize = 5;
    let Some(mut cluster) = Cluster::<F>::new().await else { return };
    standing(cluster.first(), |standing| standing.leader.is_some()).await;
    let (store, owner) = (cluster.stores.remove(0), cluster.owners.remove(0));
    let changes = (0..WAITING).map(|_| store.propose(enrol()));
    let mut changes = std::pin::pin!(futures_util::future::join_all(changes));
    // All of them are asked for before the end.
    let first = std::future::poll_fn(|context| {
        std::task::Poll::Ready(changes.as_mut().poll(context).is_ready())
    });
    assert!(!first.await, "they were made at once");
    let (results, ()) = tokio::join!(within("answers", changes), cluster.fixture.close(owner));
    for result in results {
        added(result);
    }
}

pub async fn a_store_that_takes_nothing_says_so_reads_on_and_heals<F: Fixture>() {
    let Some(cluster) = Cluster::<F>::new().await else { return };
    if !F::STALLS {
        return;
    }
    let mut least = 0;
    for round in 0..2 {
        for store in &cluster.stores {
            insist(store, enrol()).await;
            least += 1;
        }
        cluster.first().read().await.expect("a read");
        cluster.fixture.stall().await;
        let before = cluster.first().state();
        let (one, other) =
            tokio::join!(cluster.first().propose(enrol()), cluster.last().propose(enrol()));
        for error in [one, other].map(|result| result.expect_err("nobody can have taken it")) {
            assert!(!matches!(error, ProposeError::Refused(_)), "{error}");
            assert!(error.to_string().contains("stored"), "{error}");
        }
        let error = cluster.first().read().await.expect_err("nobody can know");
        assert!(error.to_string().contains("could not be read"), "{error}");
        assert_eq!(*cluster.first().state(), *before, "what is there can be read");
        cluster.fixture.mend().await;
        for store in &cluster.stores {
            insist(store, enrol()).await;
            least += 1;
        }
        // Those that were given up have been made once each, or never.
        let state = within("a read", cluster.first().read()).await.expect("a read");
        let found = workers(&state);
        let most = least + 2 * (round + 1);
        assert!((least..=most).contains(&found), "{found} of {least} to {most}");
        assert_eq!(*cluster.last().read().await.expect("a read"), *state);
    }
}

pub async fn time_in_the_log_never_goes_back<F: Fixture>() {
    let Some(fixture) = F::new().await else { return };
    let mut cluster = Cluster { fixture, stores: Vec::new(), owners: Vec::new() };
    let hours = |n: u64| Duration::from_secs(n * 3600);
    // Each coordinator's clock is an hour behind the one before.
    for number in 1..=F::COORDINATORS {
        let behind = hours(u64::from(number));
        cluster.start(number, Arc::new(move || SystemTime::now() - behind)).await;
    }
    for store in &cluster.stores {
        added(store.propose(enrol()).await);
    }
    // And after a new start.
    cluster.close().await;
    for number in 1..=F::NEEDED {
        cluster.start(number, Arc::new(move || SystemTime::now() - hours(9))).await;
    }
    added(cluster.first().propose(enrol()).await);
    let state = cluster.first().read().await.expect("a read");
    let joined: Vec<_> = state.nodes.workers().map(|(_, node)| node.joined).collect();
    assert_eq!(joined.len(), F::COORDINATORS as usize + 1);
    assert!(joined.is_sorted(), "{joined:?}");
}

/// Each sentence as a test of one store.
macro_rules! contract {
    ($name:ident, $fixture:ty) => {
        contract!(@tests $name, $fixture,
            a_change_is_shown_when_it_returns_or_refused_in_words
            all_see_all_changes_in_one_order_and_each_once
            a_read_sees_what_another_was_promised_before
            a_refusal_is_never_of_an_old_picture
            of_two_that_race_for_one_use_one_gets_it
            a_start_finds_everything
            a_long_log_is_compacted_and_nothing_is_lost
            one_leads_and_another_does_when_it_dies
            what_a_leader_wants_is_not_made_under_another_and_the_rest_is
            changes_that_wait_at_the_end_are_made
            a_store_that_takes_nothing_says_so_reads_on_and_heals
            time_in_the_log_never_goes_back
        );
    };
    (@tests $name:ident, $fixture:ty, $($sentence:ident)*) => {
        mod $name {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $sentence() {
                    crate::contract::$sentence::<$fixture>().await;
                }
            )*
        }
    };
}
