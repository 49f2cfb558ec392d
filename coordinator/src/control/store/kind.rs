//! ◇ Which store serves the handle.

use std::path::Path;

use shoal_protocol::id::{Incarnation, NodeId};
use tokio::sync::mpsc;

use super::ControlStore;
use super::etcd::{self, EtcdConfig, EtcdStore};
use super::raft::{self, NetworkEvent, RaftStore, SendMessage, WhenEmpty};

/// Where the replicated state is to be kept.
#[derive(Clone, Debug, Default)]
pub enum StoreConfig {
    /// In the data folders of the coordinators.
    #[default]
    Raft,
    /// In an etcd.
    Etcd(Box<EtcdConfig>),
}

impl StoreConfig {
    /// Whether there can be a state that a coordinator in this folder belongs to.
    pub fn may_have_state(&self, folder: &Path) -> bool {
        match self {
            // redb's file is never empty: one that is has lost everything, its vote too.
            StoreConfig::Raft => {
                std::fs::metadata(folder.join(raft::FILE_NAME)).is_ok_and(|file| file.len() > 0)
            }
            StoreConfig::Etcd(_) => true,
        }
    }
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

/// Opens it. `client` is the coordinator that proposes through it; `empty` and `send` are for a log of
/// the coordinators' own.
pub async fn open(
    config: &StoreConfig,
    folder: &Path,
    client: NodeId,
    empty: WhenEmpty,
    send: SendMessage,
) -> Result<(ControlStore, StoreOwner), OpenError> {
    match config {
        StoreConfig::Raft => {
            let (store, owner) = raft::open(folder, client, empty, send)?;
            Ok((store, StoreOwner::Raft(owner)))
        }
        StoreConfig::Etcd(config) => {
            let (store, owner) = Box::pin(etcd::open(config, client)).await?;
            Ok((store, StoreOwner::Etcd(owner)))
        }
    }
}

impl StoreOwner {
    /// The number of this start.
    pub fn incarnation(&self) -> Incarnation {
        match self {
            StoreOwner::Raft(store) => store.incarnation(),
            StoreOwner::Etcd(store) => store.incarnation(),
        }
    }

    /// Where messages of the other coordinators' logs go: nowhere, where etcd has the log.
    pub fn network(&self) -> mpsc::Sender<NetworkEvent> {
        match self {
            StoreOwner::Raft(store) => store.network(),
            StoreOwner::Etcd(_) => mpsc::channel(1).0,
        }
    }

    /// Lets the changes that wait be made, as long as a majority takes them at once, then closes it.
    pub async fn close(self) {
        match self {
            StoreOwner::Raft(store) => {
                // It fails only where the runtime ends; then the file is closed with the process.
                let _ = tokio::task::spawn_blocking(move || store.close()).await;
            }
            StoreOwner::Etcd(store) => store.close().await,
        }
    }

    /// Closes it, and where the log is in the data folder sees to it that nobody votes with it again.
    pub async fn condemn(self, why: String) {
        match self {
            StoreOwner::Raft(store) => {
                let _ = tokio::task::spawn_blocking(move || store.condemn(&why)).await;
            }
            StoreOwner::Etcd(store) => store.close().await,
        }
    }
}
