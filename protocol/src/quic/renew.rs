//! A node's side of `shoal-renew`: a new certificate for one that has expired.
//!
//! An expired certificate opens nothing, so this conversation has none. The coordinator proves itself
//! against the CA that the node has on disk; the node proves itself by the signature of its request,
//! which is made with the key that the cluster has on record. Whoever copies a request gets a
//! certificate for a key that it does not have.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use super::alpn::Alpn;
use super::error::ConnectError;
use super::identity::{Identity, NoNode};
use super::join::{JoinError, ask};
use crate::error::WireError;
use crate::join::{JoinReply, RenewRequest};
use crate::trust::Trust;
use crate::version::VersionRange;

/// How long before its end a certificate counts as expired, since clocks differ. Members renew theirs
/// 16 hours before.
const MARGIN: Duration = Duration::from_secs(3600);

/// A certificate that was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// No coordinator of this node's CA at that address.
    #[error("cannot renew the expired certificate: {0}")]
    Connect(#[source] ConnectError),
    /// The coordinator said no.
    #[error("the expired certificate is not renewed: {0}")]
    Refused(#[source] WireError),
    /// Anything else on the way.
    #[error("cannot renew the expired certificate: {0}")]
    Broken(String),
    /// What came is not for this node.
    #[error("the renewed certificate cannot be used: {0}")]
    NotMine(#[from] NoNode),
}

impl From<JoinError> for RenewError {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Connect(error) => RenewError::Connect(error),
            JoinError::Refused(error) => RenewError::Refused(error),
            other => RenewError::Broken(other.to_string()),
        }
    }
}

/// Whether the certificate has expired, or is about to.
pub fn is_due(identity: &Identity, now: SystemTime) -> bool {
    identity.expires().is_none_or(|end| now + MARGIN >= end)
}

/// The same identity with a new certificate of the coordinator at `address`, within `deadline`.
pub async fn renew(
    address: SocketAddr,
    identity: &Identity,
    deadline: Duration,
) -> Result<Identity, RenewError> {
    let csr = identity.renewal_request().map_err(|error| RenewError::Broken(error.to_string()))?;
    let request = RenewRequest { versions: VersionRange::OURS, node: identity.node, csr };
    let ca = *blake3::hash(&identity.ca).as_bytes();
    match ask(address, ca, Alpn::Renew, &request, deadline).await? {
        JoinReply::Joined { certificate, .. } => Ok(identity.renewed(certificate)?),
        // TLS has led from a CA that this node knows to the coordinator that says so.
        JoinReply::Admitted { certificate, trust, .. } => {
            trust.check().map_err(|bad| RenewError::Broken(bad.to_string()))?;
            Ok(believing(identity, trust).renewed(certificate)?)
        }
        JoinReply::Refused(error) => Err(RenewError::Refused(error)),
    }
}

/// A coordinator that lags behind leads nobody back to a CA that was believed before.
fn believing(identity: &Identity, trust: Trust) -> Identity {
    match trust.revision > identity.trust.revision {
        true => identity.trusting(trust),
        false => identity.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::NodeId;
    use crate::quic::ca::CertificateAuthority;

    #[test]
    fn a_coordinator_that_lags_behind_leads_nobody_back() {
        let now = SystemTime::now();
        let [old, new] = [(); 2].map(|()| CertificateAuthority::create(now).unwrap());
        let trust = |revision, ca: &CertificateAuthority| Trust {
            revision,
            cas: vec![ca.certificate().to_vec()],
            ..Trust::default()
        };
        let shown = new.issue_identity(NodeId::worker(1), now).unwrap().trusting(trust(3, &new));
        let back = believing(&shown, trust(2, &old));
        assert_eq!(back.trust, shown.trust);
        let csr = shown.renewal_request().unwrap();
        let stale = old.issue(&csr, shown.node, now).unwrap();
        assert!(back.renewed(stale).is_err(), "what it signs is worth nothing either");
        assert_eq!(believing(&shown, trust(4, &new)).trust.revision, 4);
    }
}
