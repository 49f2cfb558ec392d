//! A cluster of several coordinators in this process, and what its tests ask of it.

use std::net::SocketAddr;
use std::path::Path;

use shoal_coordinator::config::CoordinatorConfig;
use shoal_coordinator::{Coordinator, StartError};
use shoal_protocol::access::{AccessCall, AccessReply, CaView};
use shoal_protocol::admin::{AdminCall, AdminReply, PeerView, Vote};
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::plan::ModelSource;
use shoal_protocol::quic::Identity;

use crate::control_support::*;

pub(super) const C: [NodeId; 4] = [
    NodeId::coordinator(1),
    NodeId::coordinator(2),
    NodeId::coordinator(3),
    NodeId::coordinator(4),
];

pub(super) struct Cluster {
    pub(super) folders: Vec<tempfile::TempDir>,
    pub(super) nodes: Vec<Option<Coordinator>>,
    pub(super) addresses: Vec<SocketAddr>,
}

impl Cluster {
    pub(super) async fn of_one() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let first = start(config(folder.path())).await.unwrap();
        let addresses = vec![first.cluster_address()];
        Self { folders: vec![folder], nodes: vec![Some(first)], addresses }
    }

    pub(super) async fn of_three() -> Self {
        let mut cluster = Self::of_one().await;
        cluster.join(0).await;
        cluster.join(0).await;
        let add = vec![C[1], C[2]];
        let reply =
            cluster.operator(0).await.call(AdminCall::ChangeVoters { add, remove: vec![] }).await;
        assert!(matches!(reply, AdminReply::Accepted), "{reply:?}");
        for index in 0..3 {
            cluster.until_votes(index, &C[..3]).await;
        }
        cluster
    }

    pub(super) fn node(&self, index: usize) -> &Coordinator {
        self.nodes[index].as_ref().expect("it runs")
    }

    pub(super) fn data(&self, index: usize) -> &Path {
        self.folders[index].path()
    }

    pub(super) async fn operator(&self, index: usize) -> Operator {
        let context = self.node(index).admin_context().to_owned();
        // It is written when the CA's key is there.
        within("the operator's context", async {
            while !context.exists() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        Operator::of(self.node(index))
    }

    /// Another coordinator joins through one that is there.
    pub(super) async fn join(&mut self, through: usize) {
        let token = self.operator(0).await.token(Role::Coordinator, 1, 60).await;
        let folder = tempfile::tempdir().unwrap();
        let address = self.node(through).cluster_address();
        let config =
            CoordinatorConfig { join: vec![address], token: Some(token), ..config(folder.path()) };
        let node = start(config).await.unwrap();
        self.addresses.push(node.cluster_address());
        self.nodes.push(Some(node));
        self.folders.push(folder);
    }

    /// As kill -9 does: nobody is told.
    pub(super) fn kill(&mut self, index: usize) {
        drop(self.nodes[index].take());
    }

    /// Under the address that the others know.
    pub(super) async fn restart(&mut self, index: usize) {
        let cluster = self.addresses[index];
        let config = CoordinatorConfig { cluster, ..config(self.data(index)) };
        self.nodes[index] = Some(start_when_free(config).await);
    }

    pub(super) async fn until_votes(&self, index: usize, expected: &[NodeId]) {
        until(self.node(index), "do they vote", |view| {
            let votes = |peer: &&PeerView| peer.vote == Vote::Voter;
            view.coordinators.iter().filter(votes).map(|peer| peer.id).eq(expected.iter().copied())
        })
        .await;
    }

    /// Who leads, as the coordinator at `index` sees it.
    pub(super) async fn leader(&self, index: usize) -> usize {
        let view = until(self.node(index), "does somebody lead", |view| {
            view.coordinators
                .iter()
                .any(|peer| peer.leads && self.nodes[peer.id.number as usize - 1].is_some())
        })
        .await;
        view.coordinators.iter().position(|peer| peer.leads).unwrap()
    }

    pub(super) async fn access(&self, index: usize, call: AccessCall) -> AdminReply {
        self.operator(index).await.call(AdminCall::Access(call)).await
    }

    pub(super) async fn cas(&self, index: usize) -> CaView {
        match self.access(index, AccessCall::ListCas).await {
            AdminReply::Access(AccessReply::Cas(view)) => view,
            other => panic!("no list: {other:?}"),
        }
    }

    /// Begins a rotation, as soon as all are known to understand it.
    pub(super) async fn rotate(&self, index: usize, skip_absent: bool) {
        within("the beginning", async {
            loop {
                match self.access(index, AccessCall::RotateCa { skip_absent }).await {
                    AdminReply::Access(AccessReply::Done) => return,
                    AdminReply::Refused(error) if error.code == ErrorCode::VersionMismatch => {
                        tokio::task::yield_now().await;
                    }
                    other => panic!("not rotated: {other:?}"),
                }
            }
        })
        .await;
    }

    /// Waits until as many CAs are believed no more, and none is on its way.
    pub(super) async fn until_rotated(&self, index: usize, times: usize) -> CaView {
        let rotated = async {
            loop {
                let view = self.cas(index).await;
                if view.rotation.is_none() && view.past.len() == times {
                    return view;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        match tokio::time::timeout(DEADLINE * 4, rotated).await {
            Ok(view) => view,
            Err(_) => panic!("not rotated: {:#?}", self.cas(index).await),
        }
    }

    /// The CA of the certificate that a coordinator keeps, in hexadecimal.
    pub(super) fn shows(&self, index: usize) -> String {
        let identity = Identity::load(&self.data(index).join("identity")).unwrap().unwrap();
        hex(&identity.shows())
    }

    pub(super) async fn deploy(&self, index: usize, name: &str) -> AdminReply {
        self.operator(index).await.deploy(name, ModelSource::Pretend(pretend()), Some(1)).await
    }
}

/// How often a test looks at what nobody announces.
pub(super) const LOOK: std::time::Duration = std::time::Duration::from_millis(50);

pub(super) fn hex(bytes: &[u8; 32]) -> String {
    shoal_protocol::join::Hex(bytes).to_string()
}

/// The folder's lock goes with the thread that had it, a moment after its coordinator.
pub(super) async fn start_when_free(config: CoordinatorConfig) -> Coordinator {
    within("the folder", async {
        loop {
            match Coordinator::start(config.clone()).await {
                Ok(coordinator) => return coordinator,
                Err(StartError::Store(_) | StartError::Cluster(_)) => {
                    tokio::task::yield_now().await
                }
                Err(error) => panic!("{error}"),
            }
        }
    })
    .await
}
