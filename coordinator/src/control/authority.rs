//! ● The CA's key, where this coordinator has it: the founder from the start, the others as soon as they
//! vote.

use std::sync::Arc;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::quic::ca::CertificateAuthority;
use tokio::sync::watch;

/// Who signs certificates here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Authority {
    certificate: Arc<[u8]>,
    key: Arc<watch::Sender<Option<Arc<CertificateAuthority>>>>,
}

impl Authority {
    /// With the key.
    pub fn holding(ca: CertificateAuthority) -> Self {
        let certificate = ca.certificate().into();
        Self { certificate, key: Arc::new(watch::Sender::new(Some(Arc::new(ca)))) }
    }

    /// Without the key, of the CA with this certificate.
    pub fn awaiting(certificate: &[u8]) -> Self {
        Self { certificate: certificate.into(), key: Arc::new(watch::Sender::new(None)) }
    }

    /// The CA's certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// BLAKE3 of the CA's certificate: what a join token pins.
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(&self.certificate).as_bytes()
    }

    /// The key, where it is here.
    pub fn current(&self) -> Option<Arc<CertificateAuthority>> {
        self.key.borrow().clone()
    }

    /// The key, or words for whoever needs it.
    pub fn required(&self) -> Result<Arc<CertificateAuthority>, WireError> {
        self.current().ok_or_else(|| {
            let text = "this coordinator does not hold the cluster's CA key: ask one that votes \
                        (`shoal coordinators list`)";
            WireError::new(ErrorCode::NotReady, text)
        })
    }

    /// Resolves when the key is here.
    pub async fn held(&self) {
        // The sender lives as long as this does.
        let _ = self.key.subscribe().wait_for(Option::is_some).await;
    }

    /// The key has come. One of another CA is refused with `false`.
    pub fn receive(&self, ca: CertificateAuthority) -> bool {
        let ours = ca.certificate() == &*self.certificate;
        if ours {
            self.key.send_replace(Some(Arc::new(ca)));
        }
        ours
    }
}
