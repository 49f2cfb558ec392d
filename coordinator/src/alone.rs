//! ● One coordinator goes on alone, because a majority of them is lost for ever. What etcd calls
//! `--force-new-cluster`: the operator says who is lost, and nobody answers in their names.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shoal_protocol::id::NodeId;
use shoal_protocol::quic::ca::{CaError, CertificateAuthority};
use shoal_protocol::quic::identity::IdentityError;
use shoal_protocol::quic::{Alpn, Endpoint, EndpointError, Expect, Identity, close_code};
use shoal_protocol::trust::Trust;

use crate::begin::IDENTITY_FILE;
use crate::control::authority::{CA_FILE, CaFiles};
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
        "{} does not hold the key of the cluster's CA that signs ({CA_FILE}), which every coordinator that votes is given: \
         without it nobody can be let in again; restore the folder of one that has it", path.display()
    )]
    NoKey {
        /// The data folder.
        path: PathBuf,
    },
    /// The CA's key cannot be read.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// Nor its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
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
    // As the next start will have it: another coordinator may have said more than came through the log.
    let heard = Identity::load(&data.join(IDENTITY_FILE))?.map(|identity| identity.trust);
    let trust = survey.state.authorities.trust().unwrap_or_default().or_newer(heard.as_ref());
    let ca = signing_key(data, &trust)?;
    let identity = Arc::new(ca.issue_identity(survey.me, now)?.trusting(trust));
    for node in &survey.others {
        let Some(record) = survey.state.coordinators.get(*node) else { continue };
        let address = record.cluster;
        let from = match address {
            std::net::SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
            std::net::SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let endpoint = Endpoint::bind(from, Arc::clone(&identity), &[])?;
        let expect = Expect::Node(*node);
        match endpoint.connect(address, expect, Alpn::Raft, ANSWER_TIMEOUT).await {
            Ok(there) => {
                there.close(close_code::DONE, "");
                endpoint.drained(Duration::from_millis(200)).await;
            }
            // Whoever does not believe this one is there, and may lead the others.
            Err(error) if error.is_distrust() => {}
            Err(_) => continue,
        }
        return Err(AloneError::Alive { node: *node, address });
    }
    let (copy, epoch) = raft::go_on_alone(data, Timestamp::of(now), give_up)?;
    Ok(Alone { me: survey.me, epoch, copy })
}

/// The key of the CA that signs, which is the first that is believed; none there: that of the founding. It may
/// not have taken the place of the one before it on this disk yet.
fn signing_key(data: &Path, trust: &Trust) -> Result<CertificateAuthority, AloneError> {
    let found = match trust.signing() {
        Some(ca) => CaFiles::of(data).load()?.into_iter().find(|key| key.fingerprint() == ca),
        None => CertificateAuthority::load(&data.join(CA_FILE))?,
    };
    found.ok_or_else(|| AloneError::NoKey { path: data.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_of_the_ca_that_signs_suffices_whichever_file_it_is_in() {
        let data = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let [founding, newer, newest] =
            [(); 3].map(|()| CertificateAuthority::create(now).unwrap());
        let found = |signing: Option<&CertificateAuthority>| {
            let cas = signing.map(|ca| ca.certificate().to_vec());
            let trust = Trust { cas: cas.into_iter().collect(), ..Trust::default() };
            let key = signing_key(data.path(), &trust);
            key.map(|key| key.fingerprint())
        };
        assert!(matches!(found(None), Err(AloneError::NoKey { .. })));
        let files = CaFiles::of(data.path());
        files.save(&founding).unwrap();
        files.save_next(&newer).unwrap();
        assert_eq!(found(None).unwrap(), founding.fingerprint());
        assert_eq!(found(Some(&newer)).unwrap(), newer.fingerprint());
        assert!(matches!(found(Some(&newest)), Err(AloneError::NoKey { .. })));
    }
}
