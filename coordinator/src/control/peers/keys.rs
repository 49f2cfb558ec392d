//! ● What this coordinator asks of the others for its certificates: the keys of CAs, and, where it has none,
//! a certificate.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_protocol::id::NodeId;
use shoal_protocol::peer::{MESSAGE_LEN_MAX, PeerReply, PeerRequest};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::renew::{RenewError, is_elsewhere, not_joined, renew};
use shoal_protocol::quic::{Alpn, Expect, Identity, close_code};
use shoal_protocol::trust::CaFingerprint;
use shoal_protocol::version::VersionRange;
use tokio::time::timeout;

use super::Peers;
use super::carrier::{GREET_TIMEOUT, GreetError};

/// How long another coordinator may take to sign a certificate: it asks the state first.
const RENEW_TIMEOUT: Duration = Duration::from_secs(5);

impl Peers {
    /// The key of a CA, if another coordinator has it and hands it over.
    pub async fn ask_for_key(
        &self,
        ca: &CaFingerprint,
        founding: bool,
    ) -> Option<CertificateAuthority> {
        let versions = VersionRange::OURS;
        // Older builds know that of the founding alone.
        let request = match founding {
            true => PeerRequest::CaKey { versions },
            false => PeerRequest::CaKeyOf { versions, ca: *ca },
        };
        for (node, address) in self.others() {
            match timeout(GREET_TIMEOUT, self.ask(address, node, &request)).await {
                Ok(Ok(found)) if found.fingerprint() == *ca => return Some(found),
                Ok(Ok(_)) => tracing::error!(%node, "the CA's key that came is of another CA"),
                Ok(Err(error)) => tracing::debug!(%node, "no CA key from it: {error}"),
                Err(_) => tracing::debug!(%node, "no CA key from it in time"),
            }
        }
        None
    }

    /// This identity with a new certificate, if another coordinator signs it: for one that has no key,
    /// or whose certificates the others do not believe. Else what each of those that it knows said.
    pub async fn ask_for_certificate(
        &self,
        identity: &Identity,
    ) -> Result<Identity, Vec<(String, RenewError)>> {
        let mut known: Vec<_> = self.others().into_iter().collect();
        known.sort();
        let mut all: Vec<_> =
            known.iter().map(|(node, at)| (format!("{node} ({at})"), *at)).collect();
        let elsewhere = |seed: &&SocketAddr| {
            **seed != self.me.cluster && known.iter().all(|(_, at)| at != *seed)
        };
        all.extend(self.seeds.iter().filter(elsewhere).map(|seed| (seed.to_string(), *seed)));
        let mut said = Vec::new();
        for (who, address) in all {
            match renew(address, identity, RENEW_TIMEOUT).await {
                Ok(renewed) => return Ok(renewed),
                Err(error) => {
                    tracing::debug!(%address, "no certificate from there: {error}");
                    said.push((who, error));
                }
            }
        }
        Err(said)
    }

    /// Says so where an address that was given leads to another cluster than the one in the data folder, which
    /// this coordinator goes on with.
    pub(super) async fn look_at(self, seed: SocketAddr) {
        let known = self.others().into_iter().any(|(_, at)| at == seed);
        let Some(identity) = self.endpoint.identity() else { return };
        if known || seed == self.me.cluster || !is_elsewhere(seed, &identity, RENEW_TIMEOUT).await {
            return;
        }
        tracing::warn!("{}", not_joined(seed, self.me.node));
    }

    /// The other coordinators that can be reached.
    fn others(&self) -> Vec<(NodeId, SocketAddr)> {
        let state = self.store.state();
        let others = state.coordinators.iter().filter(|(node, _)| *node != self.me.node);
        others.filter_map(|(node, _)| Some((node, self.address_of(node)?))).collect()
    }

    async fn ask(
        &self,
        address: SocketAddr,
        node: NodeId,
        request: &PeerRequest,
    ) -> Result<CertificateAuthority, GreetError> {
        let unreachable =
            |error: &dyn std::fmt::Display| GreetError::Unreachable(error.to_string());
        let expect = Expect::Node(node);
        let connection = self.endpoint.connect(address, expect, Alpn::Raft, GREET_TIMEOUT).await;
        let connection = connection.map_err(|error| unreachable(&error))?;
        let (mut sender, mut receiver) =
            connection.open_bi().await.map_err(|error| unreachable(&error))?;
        let sent = sender.send_message(request, MESSAGE_LEN_MAX).await;
        sent.map_err(|error| unreachable(&error))?;
        let reply = receiver.message(MESSAGE_LEN_MAX).await.map_err(|error| unreachable(&error))?;
        connection.close(close_code::DONE, "");
        match reply {
            Some(PeerReply::CaKey { authority }) => {
                CertificateAuthority::from_bytes(&authority).map_err(GreetError::Unreachable)
            }
            Some(PeerReply::Refused(error)) => Err(GreetError::Refused(error)),
            Some(PeerReply::Welcome { .. }) | None => {
                Err(GreetError::Unreachable("it broke the protocol".into()))
            }
        }
    }
}
