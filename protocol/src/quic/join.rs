//! The joiner's side of `shoal-join`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use serde::Serialize;

use super::alpn::Alpn;
use super::close_code;
use super::endpoint::Endpoint;
use super::error::{ConnectError, EndpointError};
use super::identity::Identity;
use super::stream::{RecvError, SendError};
use crate::error::{ErrorCode, WireError};
use crate::id::Role;
use crate::join::{JoinReply, JoinRequest, JoinToken, MESSAGE_LEN_MAX};
use crate::version::VersionRange;

/// A join that failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No coordinator with the token's CA at that address.
    #[error("cannot join: {0}")]
    Connect(#[from] ConnectError),
    /// The request could not be made.
    #[error("cannot make a signing request: {0}")]
    Request(#[from] rcgen::Error),
    /// The conversation broke off.
    #[error("the coordinator at {address} broke off the join: {why}")]
    Broken {
        /// Where.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// The coordinator said no.
    #[error("the coordinator refused: {0}")]
    Refused(#[from] WireError),
    /// The coordinator knows that this node was removed.
    #[error("{0}")]
    Removed(#[source] WireError),
    /// There is nobody to ask.
    #[error("no coordinator's address was given: say `--join ADDRESS`")]
    Nowhere,
}

impl JoinError {
    /// Whether another coordinator may say something else: this one is not there, is full, or does not
    /// hold the CA's key yet, which it finds before it looks at the token.
    pub fn is_of_the_coordinator(&self) -> bool {
        let busy = [ErrorCode::NotReady, ErrorCode::Overloaded, ErrorCode::Draining];
        match self {
            JoinError::Connect(_) => true,
            JoinError::Refused(refusal) => busy.contains(&refusal.code),
            JoinError::Endpoint(_)
            | JoinError::Request(_)
            | JoinError::Broken { .. }
            | JoinError::Removed(_)
            | JoinError::Nowhere => false,
        }
    }
}

/// Joins through the first coordinator that can let it in, each within `deadline`. Once one may have spent the
/// token its answer counts: another one would say of it that it is not good.
pub async fn join_any(
    addresses: &[SocketAddr],
    token: &JoinToken,
    deadline: Duration,
) -> Result<Identity, JoinError> {
    let mut first = None;
    for address in addresses {
        match join(*address, token, deadline).await {
            Err(error) if error.is_of_the_coordinator() => {
                tracing::warn!(%address, "{error}");
                first.get_or_insert(error);
            }
            result => return result,
        }
    }
    Err(first.unwrap_or(JoinError::Nowhere))
}

/// Joins the cluster at `address`: proves the coordinator against the token's fingerprint, then
/// sends the secret with a request for a new key, within `deadline`.
pub async fn join(
    address: SocketAddr,
    token: &JoinToken,
    deadline: Duration,
) -> Result<Identity, JoinError> {
    let key = KeyPair::generate()?;
    let csr = CertificateParams::default().serialize_request(&key)?.der().to_vec();
    let request = JoinRequest { versions: VersionRange::OURS, secret: token.secret, csr };
    match ask(address, token.ca_fingerprint, Alpn::Join, &request, deadline).await? {
        JoinReply::Joined { node, certificate, ca } => {
            if *blake3::hash(&ca).as_bytes() != token.ca_fingerprint {
                let why = "its CA is not the one that the token names".to_owned();
                return Err(JoinError::Broken { address, why });
            }
            Ok(Identity::new(node, certificate, key.serialize_der(), ca))
        }
        // Another CA has taken the place of the one that the token names, which TLS was shown.
        JoinReply::Admitted { node, certificate, trust } => {
            let broken = |why: String| JoinError::Broken { address, why };
            trust.check().map_err(|bad| broken(bad.to_string()))?;
            let ca = trust.cas.first().cloned().unwrap_or_default();
            let joined = Identity::new(node, Vec::new(), key.serialize_der(), ca).trusting(trust);
            joined.holding(certificate).map_err(|error| broken(error.to_string()))
        }
        JoinReply::Refused(error) => Err(error.into()),
        JoinReply::Removed(error) => Err(JoinError::Removed(error)),
    }
}

/// One question to a coordinator whose CA has this fingerprint, without a certificate of our own.
/// Nothing is sent to anybody else.
pub(super) async fn ask<R: Serialize>(
    address: SocketAddr,
    ca_fingerprint: [u8; 32],
    alpn: Alpn,
    request: &R,
    deadline: Duration,
) -> Result<JoinReply, JoinError> {
    let any: SocketAddr = if address.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let endpoint = Endpoint::open(any)?;
    let connection = endpoint.connect_pinned(address, ca_fingerprint, alpn, deadline).await?;
    let broken = |why: String| JoinError::Broken { address, why };
    // Every node of the cluster has a certificate of this CA; the secret is for coordinators alone.
    let peer = connection.peer();
    if peer.is_none_or(|peer| peer.role != Role::Coordinator) {
        connection.close(close_code::REFUSED, "a coordinator was expected");
        return Err(broken("the node there is no coordinator".to_owned()));
    }

    let exchange = async {
        let (mut sender, mut receiver) =
            connection.open_bi().await.map_err(|e| broken(e.to_string()))?;
        sender
            .send_message(request, MESSAGE_LEN_MAX)
            .await
            .map_err(|e: SendError| broken(e.to_string()))?;
        sender.finish();
        let reply = receiver
            .message(MESSAGE_LEN_MAX)
            .await
            .map_err(|e: RecvError| broken(e.to_string()))?;
        reply.ok_or_else(|| broken("no answer came".to_owned()))
    };
    let reply = tokio::time::timeout(deadline, exchange)
        .await
        .map_err(|_| broken(format!("no answer within {deadline:?}")))??;
    connection.close(close_code::DONE, "done");
    endpoint.drained(Duration::from_millis(200)).await;
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_an_answer_about_the_token_nobody_else_is_asked() {
        let refused = |code| JoinError::Refused(WireError::new(code, ""));
        for code in ErrorCode::ALL.iter().copied() {
            let elsewhere =
                [ErrorCode::NotReady, ErrorCode::Overloaded, ErrorCode::Draining].contains(&code);
            assert_eq!(refused(code).is_of_the_coordinator(), elsewhere, "{code}");
        }
        // It may have been spent before the conversation broke off.
        let (address, why) = (([127, 0, 0, 1], 1).into(), String::new());
        assert!(!JoinError::Broken { address, why }.is_of_the_coordinator());
    }
}
