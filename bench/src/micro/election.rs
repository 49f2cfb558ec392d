//! How long the coordinators are without a leader when theirs dies: three voters with real files and
//! threads, whose messages this process carries.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use shoal_coordinator::control::state::{Change, CoordinatorCommand, KeyFingerprint, NodeCommand};
use shoal_coordinator::control::store::ControlStore;
use shoal_coordinator::control::store::raft::{
    self, NetworkEvent, RaftStore, SendMessage, WhenEmpty,
};
use shoal_protocol::id::{Incarnation, NodeId, Role};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::measure::report::Section;
use crate::measure::{Report, Series};

const VOTERS: u32 = 3;

/// Deaths that are measured.
const DEATHS: usize = 60;

/// A bound on everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// What issue and arithmetic promise, in milliseconds.
const MEDIAN_MS: f64 = 400.0;
const P99_MS: f64 = 700.0;

/// Runs it.
pub fn run(report: &mut Report) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let took = runtime.block_on(measure())?;
    let mut section = Section::new(
        "A new leader",
        "Three voters, of which the leader's messages are lost from one moment on; until another leads. \
         Ticks of 10 ms, heartbeats of 50 ms, elections after 200 to 360 ms: the arithmetic is 253 ms in \
         the mean less the age of the last heartbeat, and two round trips with two syncs.",
    );
    let (median, p99) = (took.median(), took.quantile(0.99));
    section.at_most(
        format!("median of {DEATHS} deaths"),
        median,
        format!("{median:.0} ms"),
        MEDIAN_MS,
    );
    section.at_most("p99", p99, format!("{p99:.0} ms"), P99_MS);
    report.sections.push(section);
    Ok(())
}

/// The voters' messages, but those of and to the one that is dead.
#[derive(Default)]
struct Network {
    inboxes: Mutex<HashMap<u64, mpsc::Sender<NetworkEvent>>>,
    dead: Mutex<Option<u64>>,
}

impl Network {
    fn sender(self: &Arc<Self>) -> SendMessage {
        let network = Arc::clone(self);
        Box::new(move |message| {
            let dead = *network.dead.lock().unwrap_or_else(PoisonError::into_inner);
            if dead.is_some_and(|dead| dead == message.from || dead == message.to) {
                return;
            }
            let inboxes = network.inboxes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(inbox) = inboxes.get(&message.to) {
                let _ = inbox.try_send(NetworkEvent::Message(Box::new(message)));
            }
        })
    }

    fn open(
        self: &Arc<Self>,
        folder: &TempDir,
        number: u32,
        empty: WhenEmpty,
    ) -> Result<(ControlStore, RaftStore)> {
        let node = NodeId::coordinator(number);
        let (store, owner) = raft::open(folder.path(), node, empty, self.sender())?;
        let mut inboxes = self.inboxes.lock().unwrap_or_else(PoisonError::into_inner);
        inboxes.insert(u64::from(number), owner.network());
        Ok((store, owner))
    }

    fn kill(&self, dead: Option<u64>) {
        *self.dead.lock().unwrap_or_else(PoisonError::into_inner) = dead;
    }
}

async fn measure() -> Result<Series> {
    let network = Arc::new(Network::default());
    let folders: Vec<TempDir> =
        (0..VOTERS).map(|_| tempfile::tempdir()).collect::<std::io::Result<_>>()?;
    let (first, owner) = network.open(&folders[0], 1, WhenEmpty::Found)?;
    for number in 1..=VOTERS {
        let key = KeyFingerprint([0; 32]);
        let enrol = NodeCommand::Enrol { role: Role::Coordinator, key };
        first.propose(Change::Node(enrol)).await?;
        let announce = CoordinatorCommand::Announce {
            node: NodeId::coordinator(number),
            incarnation: Incarnation(1),
            boot: 1,
            cluster: SocketAddr::from(([127, 0, 0, 1], 1)),
            build: String::new(),
        };
        first.propose(Change::Coordinator(announce)).await?;
    }
    let voters: BTreeSet<_> = (1..=VOTERS).map(NodeId::coordinator).collect();
    first.propose(Change::Coordinator(CoordinatorCommand::SetVoters { voters })).await?;
    let (mut stores, mut owners) = (vec![first], vec![owner]);
    for number in 2..=VOTERS {
        let (store, owner) =
            network.open(&folders[number as usize - 1], number, WhenEmpty::Wait)?;
        stores.push(store);
        owners.push(owner);
    }
    let mut members = stores[0].members();
    timeout(PATIENCE, members.wait_for(|m| m.voters.len() == VOTERS as usize)).await??;
    let mut took = Series::default();
    for death in 0..DEATHS {
        let leader = agreed(&stores).await?;
        // Deaths come at any moment between two heartbeats.
        tokio::time::sleep(Duration::from_millis(100 + 7 * (death as u64 % 13))).await;
        network.kill(Some(u64::from(leader.number)));
        let begun = Instant::now();
        let others = stores.iter().enumerate().filter(|(i, _)| *i != leader.number as usize - 1);
        let leads = others.map(|(_, store)| {
            let mut standing = store.standing();
            Box::pin(async move { standing.wait_for(|s| s.leading).await.map(drop) })
        });
        let next = timeout(PATIENCE, futures_select(leads.collect())).await;
        next.context("nobody leads")??;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        network.kill(None);
    }
    drop(stores);
    tokio::task::spawn_blocking(move || owners.into_iter().for_each(RaftStore::close)).await?;
    Ok(took)
}

/// Resolves with the first of them.
async fn futures_select<F: Future + Unpin>(mut all: Vec<F>) -> F::Output {
    std::future::poll_fn(|context| {
        for one in &mut all {
            if let std::task::Poll::Ready(output) = std::pin::Pin::new(one).poll(context) {
                return std::task::Poll::Ready(output);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// The leader, once all agree on it.
async fn agreed(stores: &[ControlStore]) -> Result<NodeId> {
    let agree = async {
        loop {
            let all: Vec<_> = stores.iter().map(|store| *store.standing().borrow()).collect();
            let leader = all[0].leader;
            if let Some(leader) = leader
                && all.iter().all(|s| s.leader == Some(leader) && s.epoch == all[0].epoch)
                && all[leader.number as usize - 1].leading
            {
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, agree).await.context("they do not agree on a leader")
}
