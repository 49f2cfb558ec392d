//! TLS 1.3 with our CAs as the only roots.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::Alpn;
use super::identity::Identity;

/// A TLS configuration that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("the identity cannot be used for TLS: {0}")]
pub struct TlsError(pub(crate) String);

impl TlsError {
    fn from(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(cas: &[Vec<u8>]) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(CertificateDer::from(ca.clone())).map_err(TlsError::from)?;
    }
    Ok(Arc::new(roots))
}

/// What an endpoint that accepts these conversations shows and demands.
pub(super) fn server(
    identity: &Identity,
    accepts: &[Alpn],
) -> Result<rustls::ServerConfig, TlsError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(identity.roots())?, provider());
    // Which conversation a client wants is known only after the handshake; `Accepting::establish`
    // turns away the ones without a certificate that need one.
    let verifier = if accepts.iter().any(|alpn| alpn.without_client_certificate()) {
        verifier.allow_unauthenticated()
    } else {
        verifier
    };
    let verifier = verifier.build().map_err(TlsError::from)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::from)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain(), identity.private_key())
        .map_err(TlsError::from)?;
    config.alpn_protocols = accepts.iter().map(|alpn| alpn.as_bytes().to_vec()).collect();
    // No early data: a replayed request must not run twice.
    config.max_early_data_size = 0;
    Ok(config)
}

/// How a node talks to another node of its cluster.
pub(super) fn client(identity: &Identity, alpn: Alpn) -> Result<rustls::ClientConfig, TlsError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::from)?
        .with_root_certificates(roots(identity.roots())?)
        .with_client_auth_cert(identity.chain(), identity.private_key())
        .map_err(TlsError::from)?;
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    Ok(config)
}

/// How somebody without a certificate talks to a coordinator whose CA's fingerprint they hold.
pub(super) fn pinned_client(
    ca_fingerprint: [u8; 32],
    alpn: Alpn,
) -> Result<rustls::ClientConfig, TlsError> {
    let verifier = PinnedCa { ca_fingerprint, provider: provider() };
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::from)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    Ok(config)
}

/// Takes a server whose chain leads to a CA certificate with the pinned fingerprint, and then by the
/// ordinary rules alone.
#[derive(Debug)]
struct PinnedCa {
    ca_fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned =
            intermediates.iter().find(|der| *blake3::hash(der).as_bytes() == self.ca_fingerprint);
        let Some(ca) = pinned else {
            return Err(CertificateError::UnknownIssuer.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?
            // Between the two may stand CAs that took the place of the pinned one, each introduced by
            // the one before it.
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
