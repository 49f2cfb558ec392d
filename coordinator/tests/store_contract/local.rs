//! The store in a data folder: Raft with one voter.

use shoal_coordinator::control::store::ControlStore;
use shoal_coordinator::control::store::raft::{self, RaftStore, WhenEmpty};
use shoal_protocol::id::NodeId;
use tempfile::TempDir;

use crate::contract::{Clock, Fixture};

/// One folder.
pub struct Local(TempDir);

impl Fixture for Local {
    type Owner = RaftStore;

    const COORDINATORS: u32 = 1;

    // A disk that fails is played in the store's own tests.
    const STALLS: bool = false;

    async fn new() -> Option<Self> {
        Some(Self(tempfile::tempdir().expect("a folder")))
    }

    async fn open(&self, who: NodeId, _: Clock) -> (ControlStore, RaftStore) {
        raft::open(self.0.path(), who, WhenEmpty::Found, Box::new(|_| {})).expect("it opens")
    }

    async fn close(&self, owner: RaftStore) {
        tokio::task::spawn_blocking(|| owner.close()).await.expect("it closes");
    }

    // A thread cannot be killed; the store's own tests play what a killed process leaves on the disk.
    async fn kill(&self, owner: RaftStore) {
        self.close(owner).await;
    }
}
