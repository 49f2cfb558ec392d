//! ● How to reach etcd: the URL, and the files that hold what nobody else may see.

use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use super::url::EtcdUrl;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a connection is asked whether it lives, and how long it may take to say so. etcd ends
/// connections that ask more often than every 5 s.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(3));

/// Far longer than any of these files.
const FILE_LEN_MAX: u64 = 1 << 20;

/// Which etcd, and as whom.
#[derive(Clone, Debug)]
pub struct EtcdConfig {
    /// Where.
    pub url: EtcdUrl,
    /// Certificates, for `etcds://`.
    pub tls: TlsFiles,
    /// The file with the password of the URL's user, in one line.
    pub password: Option<PathBuf>,
}

/// PEM files for TLS.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Who signs etcd's certificate.
    pub ca: Option<PathBuf>,
    /// Our certificate, where etcd asks for one.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

impl EtcdConfig {
    /// An etcd without TLS or user.
    pub fn plain(url: EtcdUrl) -> Self {
        Self { url, tls: TlsFiles::default(), password: None }
    }

    /// The members, as etcd's client wants them.
    pub(super) fn endpoints(&self) -> Vec<String> {
        let scheme = if self.url.tls { "https" } else { "http" };
        self.url.hosts.iter().map(|host| format!("{scheme}://{host}")).collect()
    }
}

/// Options that do not go together, or a file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// TLS needs somebody to trust.
    #[error("etcds:// needs --store-ca FILE: the PEM certificate of who signs etcd's")]
    NoCa,
    /// Files for TLS, and a URL without it.
    #[error("--store-ca, --store-cert and --store-key are for etcds://; the URL says etcd://")]
    NoTls,
    /// Half of what is needed.
    #[error("--store-cert and --store-key go together")]
    HalfIdentity,
    /// A user who cannot prove it.
    #[error(
        "the user {user} of etcd has no password; give --store-password-file FILE (or \
         SHOAL_ETCD_PASSWORD_FILE)"
    )]
    NoPassword {
        /// Who.
        user: String,
    },
    /// A password without a user.
    #[error("there is a password file and no user; write etcd://USER@HOST")]
    NoUser,
    /// Two passwords.
    #[error("the password is in the URL and in a file; keep the file")]
    TwoPasswords,
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What etcd's client is told.
pub(super) fn read(config: &EtcdConfig) -> Result<ConnectOptions, OptionsError> {
    let options = ConnectOptions::new()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_keep_alive_while_idle(true)
        // A member that has lost its majority says so at once.
        .with_require_leader(true)
        .with_auto_token_refresh(true);
    let options = match tls(config)? {
        Some(tls) => options.with_tls(tls),
        None => options,
    };
    Ok(match user(config)? {
        Some((user, password)) => options.with_user(user, password),
        None => options,
    })
}

fn tls(config: &EtcdConfig) -> Result<Option<TlsOptions>, OptionsError> {
    let TlsFiles { ca, certificate, key } = &config.tls;
    if !config.url.tls {
        let none = ca.is_none() && certificate.is_none() && key.is_none();
        return if none { Ok(None) } else { Err(OptionsError::NoTls) };
    }
    let ca = content(ca.as_ref().ok_or(OptionsError::NoCa)?)?;
    let options = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
    match (certificate, key) {
        (None, None) => Ok(Some(options)),
        (Some(certificate), Some(key)) => {
            let identity = Identity::from_pem(content(certificate)?, content(key)?);
            Ok(Some(options.identity(identity)))
        }
        _ => Err(OptionsError::HalfIdentity),
    }
}

fn user(config: &EtcdConfig) -> Result<Option<(String, String)>, OptionsError> {
    let inline = config.url.password.as_ref();
    let Some(user) = config.url.user.clone() else {
        return if config.password.is_none() { Ok(None) } else { Err(OptionsError::NoUser) };
    };
    let password = match (inline, &config.password) {
        (Some(_), Some(_)) => return Err(OptionsError::TwoPasswords),
        (None, None) => return Err(OptionsError::NoPassword { user }),
        (Some(inline), None) => {
            tracing::warn!(
                "others on this machine can see the password in --store; put it into a file and \
                 name that with --store-password-file"
            );
            inline.reveal().to_owned()
        }
        (None, Some(path)) => {
            let text = String::from_utf8_lossy(&content(path)?).into_owned();
            text.trim_end_matches(['\r', '\n']).to_owned()
        }
    };
    Ok(Some((user, password)))
}

fn content(path: &Path) -> Result<Vec<u8>, OptionsError> {
    let read = || {
        let len = std::fs::metadata(path)?.len();
        if len > FILE_LEN_MAX {
            return Err(std::io::Error::other(format!("it has {len} bytes")));
        }
        std::fs::read(path)
    };
    read().map_err(|source| OptionsError::File { path: path.to_owned(), source })
}
