//! Raft with three voters: real files and threads, and a network that this fixture can stop.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use shoal_coordinator::control::state::{Change, CoordinatorCommand, KeyFingerprint, NodeCommand};
use shoal_coordinator::control::store::ControlStore;
use shoal_coordinator::control::store::raft::{
    self, NetworkEvent, RaftStore, SendMessage, WhenEmpty,
};
use shoal_protocol::id::{Incarnation, NodeId, Role};
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::contract::{Clock, Fixture, coordinator, within};

const VOTERS: u32 = 3;

/// Three folders, and a network between those who have them open.
pub struct RaftFixture {
    folders: Vec<TempDir>,
    network: Arc<Network>,
}

#[derive(Default)]
struct Network {
    stopped: AtomicBool,
    inboxes: Mutex<HashMap<u64, mpsc::Sender<NetworkEvent>>>,
}

impl Network {
    fn sender(self: &Arc<Self>) -> SendMessage {
        let network = Arc::clone(self);
        Box::new(move |message| {
            if network.stopped.load(Ordering::SeqCst) {
                return;
            }
            if let Some(inbox) = network.inboxes.lock().unwrap().get(&message.to) {
                // A full inbox loses it, as a network may.
                let _ = inbox.try_send(NetworkEvent::Message(Box::new(message)));
            }
        })
    }
}

impl RaftFixture {
    /// Opens a folder; one whose thread has not ended yet is tried again.
    async fn open_when_free(&self, who: NodeId, empty: WhenEmpty) -> (ControlStore, RaftStore) {
        let folder = self.folders[who.number as usize - 1].path();
        loop {
            match raft::open(folder, who, empty, self.network.sender()) {
                Ok((store, owner)) => {
                    let number = u64::from(who.number);
                    self.network.inboxes.lock().unwrap().insert(number, owner.network());
                    return (store, owner);
                }
                Err(error) if error.to_string().contains("another coordinator is running") => {
                    tokio::task::yield_now().await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn found(&self) {
        let (store, first) = self.open_when_free(coordinator(1), WhenEmpty::Found).await;
        for number in 1..=VOTERS {
            let (role, key) = (Role::Coordinator, KeyFingerprint([0; 32]));
            store.propose(Change::Node(NodeCommand::Enrol { role, key })).await.unwrap();
            let announce = CoordinatorCommand::Announce {
                node: coordinator(number),
                incarnation: Incarnation(1),
                boot: 1,
                cluster: SocketAddr::from(([127, 0, 0, 1], 1)),
                build: String::new(),
            };
            store.propose(Change::Coordinator(announce)).await.unwrap();
        }
        let voters: BTreeSet<_> = (1..=VOTERS).map(coordinator).collect();
        let change = CoordinatorCommand::SetVoters { voters };
        store.propose(Change::Coordinator(change)).await.unwrap();
        let mut owners = vec![first];
        let mut others = Vec::new();
        for number in 2..=VOTERS {
            let (store, owner) = self.open_when_free(coordinator(number), WhenEmpty::Wait).await;
            owners.push(owner);
            others.push(store);
        }
        let mut members = store.members();
        within("they vote", members.wait_for(|m| m.voters.len() == VOTERS as usize)).await.unwrap();
        drop((store, others, members));
        for owner in owners {
            self.close(owner).await;
        }
    }
}

impl Fixture for RaftFixture {
    type Owner = RaftStore;

    const COORDINATORS: u32 = VOTERS;

    const NEEDED: u32 = 2;

    const STALLS: bool = true;

    async fn new() -> Option<Self> {
        let folders = (0..VOTERS).map(|_| tempfile::tempdir().expect("a folder")).collect();
        let fixture = Self { folders, network: Arc::default() };
        fixture.found().await;
        Some(fixture)
    }

    async fn open(&self, who: NodeId, _: Clock) -> (ControlStore, RaftStore) {
        self.open_when_free(who, WhenEmpty::Wait).await
    }

    async fn close(&self, owner: RaftStore) {
        tokio::task::spawn_blocking(|| owner.close()).await.expect("it closes");
    }

    // Nothing of it is heard from now on; its thread ends with its handles.
    async fn kill(&self, owner: RaftStore) {
        let mut inboxes = self.network.inboxes.lock().unwrap();
        let inbox = owner.network();
        inboxes.retain(|_, other| !other.same_channel(&inbox));
        drop(owner);
    }

    async fn stall(&self) {
        self.network.stopped.store(true, Ordering::SeqCst);
    }

    async fn mend(&self) {
        self.network.stopped.store(false, Ordering::SeqCst);
    }
}
