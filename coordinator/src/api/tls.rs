//! ● TLS of the public API, with a certificate that the operator gives and renews.
//!
//! The files are looked at again every few seconds. New ones are taken if they fit together; until they
//! do, new connections get the certificate that was there before, and the log says what is wrong.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

/// How often the files are looked at: a certificate is renewed days before its end.
const RELOAD_PERIOD: Duration = Duration::from_secs(10);

/// How long a client may take for its handshake, the wait for a place included.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Handshakes at once: each is a signature, and clients that begin one and say no more should leave
/// most of the API's connections to others.
const HANDSHAKES_MAX: usize = 512;

/// The largest file that is read: a long chain has some tens of KiB.
const FILE_LEN_MAX: u64 = 1 << 20;

/// Where certificate and key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and its authority, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// A certificate that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is something else.
    #[error("{} is too large for a certificate or key", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// A file holds no certificate.
    #[error("{} holds no certificate; expected PEM, `-----BEGIN CERTIFICATE-----`", path.display())]
    NoCertificate {
        /// Which.
        path: PathBuf,
    },
    /// A file holds no key.
    #[error(
        "{} holds no private key; expected PEM without a password, `-----BEGIN PRIVATE KEY-----`",
        path.display()
    )]
    NoKey {
        /// Which.
        path: PathBuf,
    },
    /// A file is cut off or damaged.
    #[error("{} is damaged: {source}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        source: PemError,
    },
    /// Certificate and key do not work, or not together.
    #[error("the certificate {} and the key {} cannot be used: {source}", certificate.display(), key.display())]
    Unusable {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// What tells one version of a file from another.
type Stamp = [(Option<SystemTime>, u64); 2];

/// The certificate that new connections are shown.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    current: watch::Sender<Arc<ServerConfig>>,
    /// The files that were looked at last, whether they could be used or not.
    looked_at: Mutex<Stamp>,
    handshakes: Semaphore,
}

impl Tls {
    /// Reads the files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        // Before the files are read: what changes in between is read again.
        let looked_at = Mutex::new(stamp(&files));
        let current = watch::Sender::new(read(&files)?);
        Ok(Self { files, current, looked_at, handshakes: Semaphore::new(HANDSHAKES_MAX) })
    }

    /// Reads the files of an API that is to listen at this address, where there are some.
    pub fn start(
        files: Option<TlsFiles>,
        listen: SocketAddr,
    ) -> Result<Option<Arc<Self>>, TlsError> {
        if files.is_none() && !listen.ip().is_loopback() {
            tracing::warn!(
                "the API speaks plain HTTP on {listen}: keys and prompts cross the network in the \
                 clear; give --tls-cert and --tls-key, or put a proxy with TLS before it"
            );
        }
        Ok(files.map(Self::load).transpose()?.map(Arc::new))
    }

    /// Takes what is in the files now, if they have changed. `true`: it is used from now on.
    pub fn refresh(&self) -> Result<bool, TlsError> {
        let stamp = stamp(&self.files);
        {
            let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
            if *looked_at == stamp {
                return Ok(false);
            }
            *looked_at = stamp;
        }
        self.current.send_replace(read(&self.files)?);
        Ok(true)
    }

    /// Looks at the files again and again, until it is dropped.
    pub(super) async fn keep_fresh(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RELOAD_PERIOD).await;
            let tls = Arc::clone(&self);
            let file = self.files.certificate.display();
            match tokio::task::spawn_blocking(move || tls.refresh()).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => tracing::info!(%file, "the API's certificate is renewed"),
                Ok(Err(error)) => {
                    tracing::error!("the API keeps the certificate that it had: {error}");
                }
                Err(_) => return,
            }
        }
    }

    /// One handshake.
    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let handshake = async {
            let _place = self.handshakes.acquire().await.map_err(std::io::Error::other)?;
            let config = Arc::clone(&self.current.borrow());
            TlsAcceptor::from(config).accept(stream).await
        };
        let done = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
        done.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))?
    }
}

fn stamp(files: &TlsFiles) -> Stamp {
    [&files.certificate, &files.key].map(|path| match std::fs::metadata(path) {
        Ok(meta) => (meta.modified().ok(), meta.len()),
        Err(_) => (None, 0),
    })
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let certificates = pem::<CertificateDer<'static>>(&files.certificate)?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate { path: files.certificate.clone() });
    }
    let key = pem::<PrivateKeyDer<'static>>(&files.key)?.into_iter().next();
    let key = key.ok_or_else(|| TlsError::NoKey { path: files.key.clone() })?;
    let unusable = |source| TlsError::Unusable {
        certificate: files.certificate.clone(),
        key: files.key.clone(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(unusable)?;
    // The one version of HTTP that is served.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// All sections of this kind in a file.
fn pem<T: PemObject>(path: &Path) -> Result<Vec<T>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > FILE_LEN_MAX {
        return Err(TlsError::TooLarge { path: path.to_owned() });
    }
    let bytes = std::fs::read(path).map_err(failed)?;
    let sections = T::pem_slice_iter(&bytes).collect::<Result<Vec<T>, PemError>>();
    sections.map_err(|source| TlsError::Damaged { path: path.to_owned(), source })
}
