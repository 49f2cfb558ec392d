//! ◇ Which store serves the handle.

use std::path::Path;

use shoal_protocol::id::NodeId;

use super::ControlStore;
use super::etcd::{self, EtcdConfig, EtcdStore};
use super::raft::{self, RaftStore, WhenEmpty};

/// Where the replicated state is to be kept.
#[derive(Clone, Debug, Default)]
pub enum StoreConfig {
    /// In the data folders of the coordinators.
    #[default]
    Raft,
    /// In an etcd.
    Etcd(Box<EtcdConfig>),
}

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The one in the data folder.
    #[error(transparent)]
    Raft(#[from] raft::OpenError),
    /// The one in etcd.
    #[error(transparent)]
    Etcd(#[from] etcd::OpenError),
}

/// What is behind the handles.
#[derive(Debug)]
pub enum StoreOwner {
    /// In the data folder.
    Raft(RaftStore),
    /// In an etcd.
    Etcd(EtcdStore),
}

/// Opens it. `client` is the coordinator that proposes through it.
pub async fn open(
    config: &StoreConfig,
    folder: &Path,
    client: NodeId,
) -> Result<(ControlStore, StoreOwner), OpenError> {
    match config {
        StoreConfig::Raft => {
            let (store, owner) = raft::open(folder, client, WhenEmpty::Found, Box::new(|_| {}))?;
            Ok((store, StoreOwner::Raft(owner)))
        }
        StoreConfig::Etcd(config) => {
            let (store, owner) = etcd::open(config, client).await?;
            Ok((store, StoreOwner::Etcd(owner)))
        }
    }
}

impl StoreOwner {
    /// Lets the changes that wait be made, then closes it.
    pub async fn close(self) {
        match self {
            StoreOwner::Raft(store) => {
                // It fails only where the runtime ends; then the file is closed with the process.
                let _ = tokio::task::spawn_blocking(move || store.close()).await;
            }
            StoreOwner::Etcd(store) => store.close().await,
        }
    }
}
