//! Certificates live for a day: a worker asks for the next one over the conversation that the present
//! one has let it into, keeps it, and shows it from then on.

use std::path::PathBuf;
use std::sync::Arc;

use shoal_protocol::control::WorkerMessage;
use shoal_protocol::quic::Endpoint;

use crate::stage::Links;

/// Where a new certificate has to go.
#[derive(Debug)]
pub(super) struct Renewal {
    /// Takes requests and reaches coordinators.
    pub endpoint: Endpoint,
    /// Takes and reaches neighbours.
    pub links: Arc<Links>,
    /// Where the identity is kept for the next start.
    pub file: PathBuf,
}

impl Renewal {
    /// What to ask the coordinator; `None` where there is no key to ask for.
    pub fn request(&self) -> Option<WorkerMessage> {
        let request = self.endpoint.identity()?.renewal_request();
        match request {
            Ok(csr) => Some(WorkerMessage::Renew { csr }),
            Err(error) => {
                tracing::error!("no certificate can be asked for: {error}");
                None
            }
        }
    }

    /// Takes the answer. Where it cannot be used the present certificate stays, and the next answer
    /// may be better.
    pub fn take(&self, certificate: Vec<u8>) {
        if let Err(error) = self.try_take(certificate) {
            tracing::error!("the new certificate cannot be used: {error}");
        }
    }

    fn try_take(
        &self,
        certificate: Vec<u8>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Some(present) = self.endpoint.identity() else { return Ok(()) };
        let renewed = Arc::new(present.renewed(certificate)?);
        renewed.save(&self.file)?;
        self.links.renew(Arc::clone(&renewed))?;
        self.endpoint.renew(renewed)?;
        tracing::debug!("the certificate is renewed");
        Ok(())
    }
}
