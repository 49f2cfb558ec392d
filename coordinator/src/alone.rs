//! ● One coordinator goes on alone, because a majority of them is lost for ever. What etcd calls
//! `--force-new-cluster`: the operator says who is lost, and nobody answers in their names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::ca::{CaError, CertificateAuthority};
use shoal_protocol::quic::{Alpn, Endpoint, EndpointError, Expect, close_code};

use crate::begin::CA_FILE;
use crate::control::state::Timestamp;
use crate::control::store::raft::{self, OpenError, Survey};

/// How long each of those who are said to be lost may take to answer: longer than a busy machine needs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a coordinator does not go on alone. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// There is no log.
    #[error(
        "{} has no {}: name the data folder of the coordinator that is left (where --store names an \
         etcd, the state is there, and any one coordinator suffices)", path.display(), raft::FILE_NAME
    )]
    NoState {
        /// The data folder.
        path: PathBuf,
    },
    /// It could let nobody in, itself included.
    #[error(
        "{} does not hold the cluster's CA key ({CA_FILE}), which every coordinator that votes is given: \
         without it nobody can be let in again; restore the folder of one that has it", path.display()
    )]
    NoKey {
        /// The data folder.
        path: PathBuf,
    },
    /// The CA's key cannot be read.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The log cannot be used like that.
    #[error(transparent)]
    Log(#[from] OpenError),
    /// Nobody can be asked.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// Somebody who is said to be lost is there.
    #[error(
        "{node} answers at {address}, so it is not lost: with a majority of the coordinators use \
         `shoal coordinators add … --replace …`; without one stop {node} first, and for good"
    )]
    Alive {
        /// Who.
        node: NodeId,
        /// Where.
        address: std::net::SocketAddr,
    },
}

/// What came of it.
#[derive(Debug)]
pub struct Alone {
    /// Who votes alone.
    pub me: NodeId,
    /// The epoch above which it leads.
    pub epoch: u64,
    /// The log as it was.
    pub copy: PathBuf,
}

/// What is in the data folder of a coordinator that does not run.
pub fn survey(data: &Path) -> Result<Survey, AloneError> {
    if !data.join(raft::FILE_NAME).exists() {
        return Err(AloneError::NoState { path: data.to_owned() });
    }
    Ok(raft::survey(data)?)
}

/// Makes the coordinator of this data folder, which does not run, the only one of its cluster. All
/// others must be named in `give_up`, and none of them may answer.
pub async fn go_on_alone(data: &Path, give_up: &[NodeId]) -> Result<Alone, AloneError> {
    let survey = survey(data)?;
    let now = SystemTime::now();
    let ca = CertificateAuthority::load(&data.join(CA_FILE))?;
    let ca = ca.ok_or_else(|| AloneError::NoKey { path: data.to_owned() })?;
    let identity = Arc::new(ca.issue_identity(survey.me, now)?);
    for node in &survey.others {
        let Some(record) = survey.state.coordinators.get(*node) else { continue };
        let address = record.cluster;
        let from = match address {
            std::net::SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
            std::net::SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let endpoint = Endpoint::bind(from, Arc::clone(&identity), &[])?;
        let expect = Expect::Node(*node);
        if let Ok(there) = endpoint.connect(address, expect, Alpn::Raft, ANSWER_TIMEOUT).await {
            there.close(close_code::DONE, "");
            endpoint.drained(Duration::from_millis(200)).await;
            return Err(AloneError::Alive { node: *node, address });
        }
    }
    let (copy, epoch) = raft::go_on_alone(data, Timestamp::of(now), give_up)?;
    Ok(Alone { me: survey.me, epoch, copy })
}
