//! A node's side of `shoal-renew`: a new certificate for one that has expired.
//!
//! An expired certificate opens nothing, so this conversation has none. The coordinator proves itself
//! against the CA that the node has on disk; the node proves itself by the signature of its request,
//! which is made with the key that the cluster has on record. Whoever copies a request gets a
//! certificate for a key that it does not have.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use super::alpn::Alpn;
use super::close_code;
use super::endpoint::Endpoint;
use super::error::ConnectError;
use super::identity::{Identity, NoNode};
use super::join::{JoinError, ask};
use crate::error::{ErrorCode, WireError};
use crate::id::NodeId;
use crate::join::{Hex, JoinReply, JoinToken, RenewRequest};
use crate::trust::Trust;
use crate::version::VersionRange;

/// How long before its end a certificate counts as expired, since clocks differ. Members renew theirs
/// 16 hours before.
const MARGIN: Duration = Duration::from_secs(3600);

/// A certificate that was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// No coordinator of this node's CA at that address.
    #[error("cannot renew the certificate: {0}")]
    Connect(#[source] ConnectError),
    /// The coordinator said no.
    #[error("the certificate is not renewed: {0}")]
    Refused(#[source] WireError),
    /// This node was removed from the cluster.
    #[error("{0}")]
    Removed(#[source] WireError),
    /// Anything else on the way.
    #[error("cannot renew the certificate: {0}")]
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
            JoinError::Removed(error) => RenewError::Removed(error),
            other => RenewError::Broken(other.to_string()),
        }
    }
}

impl RenewError {
    /// Whether whoever is there has nothing to do with this node, and not only just now: there is no way from
    /// its CA to one that this node knows, or it has not got this node on record. A certificate out of its
    /// time says something of clocks, and whoever is not there, or has no majority, says nothing.
    pub fn refuses_the_node(&self) -> bool {
        match self {
            Self::Connect(ConnectError::OtherCluster { .. }) | Self::Removed(_) => true,
            Self::Connect(error) => error.is_distrust() && !error.is_of_clocks(),
            Self::Refused(refusal) => {
                [ErrorCode::NotFound, ErrorCode::PermissionDenied].contains(&refusal.code)
            }
            Self::Broken(_) | Self::NotMine(_) => false,
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
        JoinReply::Removed(error) => Err(RenewError::Removed(error)),
    }
}

/// Whether a coordinator of another cluster is at `address`, as far as one can see there within `deadline`.
/// Nothing is asked of it.
pub async fn is_elsewhere(address: SocketAddr, identity: &Identity, deadline: Duration) -> bool {
    let any: SocketAddr = match address.is_ipv4() {
        true => (Ipv4Addr::UNSPECIFIED, 0).into(),
        false => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let Ok(endpoint) = Endpoint::open(any) else { return false };
    match endpoint.connect_pinned(address, identity.shows(), Alpn::Renew, deadline).await {
        Ok(connection) => connection.close(close_code::DONE, "only looking"),
        Err(ConnectError::OtherCluster { .. }) => return true,
        Err(_) => return false,
    }
    endpoint.drained(Duration::from_millis(200)).await;
    false
}

/// A coordinator that lags behind leads nobody back to a CA that was believed before.
fn believing(identity: &Identity, trust: Trust) -> Identity {
    match trust.revision > identity.trust.revision {
        true => identity.trusting(trust),
        false => identity.clone(),
    }
}

/// What is said of an address of `--join` where a coordinator of another cluster is than `me`'s.
pub fn not_joined(address: SocketAddr, me: NodeId) -> String {
    format!(
        "--join {address} leads to another cluster, which is not joined: this data folder is {me}'s, of a \
         cluster of its own, and {me} goes on in that one. To join the other one, start on an empty --data with \
         a token that was made there; to go on with this one, leave the address out"
    )
}

/// What is said of a token in a data folder that needs none. It is no more than said: a token of a cluster whose CA was
/// rotated while this node was off looks like one of another cluster, and this node must come back with it.
pub fn unused_token(me: &Identity, token: &JoinToken) -> String {
    let node = me.node;
    if me.knows(&token.ca_fingerprint) {
        return format!(
            "the token is not used: this data folder is {node}'s, of the same cluster, since it joined"
        );
    }
    let names = |ca: &[u8]| format!("{}…", Hex(&ca[..ca.len().min(6)]));
    format!(
        "the token is not used: this data folder is {node}'s, which belongs to a cluster already (its CA is {}). The \
         token names the CA {}, which {node} does not know: the CA was rotated before or since, or the token is of \
         another cluster. To join another one, start on an empty --data",
        names(&me.shows()),
        names(&token.ca_fingerprint)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
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
