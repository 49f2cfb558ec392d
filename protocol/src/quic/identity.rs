//! Who a node is: its key, its certificate, and the CAs that it trusts.
//!
//! The file: the fields of [`Identity`] in postcard, then its [`Trust`]. Builds from before a CA could
//! take the place of another read the first part and no more.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::trust::{CaFingerprint, Trust, fingerprint};

/// The DNS name in every node's certificate. Who a node is stands in the URI name beside it.
pub(crate) const TLS_NAME: &str = "node.shoal.internal";

/// The scheme of the URI name that carries the node id: `shoal://w3`. The role is its letter.
const URI_PREFIX: &str = "shoal://";

/// A node's certificate and key. `Debug` shows the node alone.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Who.
    pub node: NodeId,
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    /// The private key, PKCS #8 DER.
    pub key: Vec<u8>,
    /// The certificate, DER, of the CA that signed its certificate.
    pub ca: Vec<u8>,
    /// Whom it believes; where that is empty (revision 0): the CA that signed its certificate.
    #[serde(skip)]
    pub trust: Trust,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.node)
    }
}

/// An identity file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or written.
    #[error("cannot use the identity file {path}")]
    Io {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not an identity.
    #[error(
        "{path} is not an identity or context file of Shoal, or it is damaged ({why}); an operator's is admin.context in \
         the --data folder of a coordinator: take that one, or a copy of it"
    )]
    Damaged {
        /// Which file.
        path: String,
        /// Why.
        why: String,
    },
}

impl Identity {
    /// One that believes the CA of its certificate.
    pub fn new(node: NodeId, certificate: Vec<u8>, key: Vec<u8>, ca: Vec<u8>) -> Self {
        Self { node, certificate, key, ca, trust: Trust::default() }
    }

    /// Reads the file; `None` where there is none.
    pub fn load(path: &Path) -> Result<Option<Self>, IdentityError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(IdentityError::Io { path: path.display().to_string(), source });
            }
        };
        let damaged =
            |why: String| IdentityError::Damaged { path: path.display().to_string(), why };
        let identity = Self::from_bytes(&bytes).map_err(damaged)?;
        match node_of(&CertificateDer::from(identity.certificate.as_slice())) {
            Ok(node) if node == identity.node => Ok(Some(identity)),
            Ok(node) => {
                Err(damaged(format!("its certificate is for {node}, not for {}", identity.node)))
            }
            Err(why) => Err(damaged(why.to_string())),
        }
    }

    /// Writes the file, readable by its owner alone, whole or not at all.
    pub fn save(&self, path: &Path) -> Result<(), IdentityError> {
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        let bytes = self.to_bytes().map_err(|e| io(io::Error::other(e)))?;
        write_secret(path, &bytes).map_err(io)
    }

    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, postcard::Error> {
        let mut bytes = postcard::to_stdvec(self)?;
        if self.trust != Trust::default() {
            bytes.extend(postcard::to_stdvec(&self.trust)?);
        }
        Ok(bytes)
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let (identity, rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(|e| e.to_string())?;
        identity.with_rest(rest)
    }

    /// The same with the trust that stands behind it in a file.
    pub(super) fn with_rest(self, rest: &[u8]) -> Result<Self, String> {
        if rest.is_empty() {
            return Ok(self);
        }
        let trust: Trust = postcard::from_bytes(rest).map_err(|e| e.to_string())?;
        trust.check().map_err(|e| e.to_string())?;
        Ok(Self { trust, ..self })
    }

    /// A certificate signing request, DER, over the key that this identity has already.
    pub fn renewal_request(&self) -> Result<Vec<u8>, rcgen::Error> {
        let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(self.key.as_slice()))?;
        Ok(CertificateParams::default().serialize_request(&key)?.der().to_vec())
    }

    /// The same identity with a certificate of a CA that it believes, whosever that is.
    pub(super) fn holding(&self, certificate: Vec<u8>) -> Result<Self, NoNode> {
        let cas = || self.trust.cas.iter().chain([&self.ca]);
        let ca = cas().find(|ca| is_of(&certificate, ca)).ok_or(NoNode::OtherCa)?.clone();
        Ok(Self { certificate, ca, ..self.clone() })
    }

    /// The same identity with another certificate, which must be over the same key, name the same
    /// node, and be of a CA that this one believes.
    pub fn renewed(&self, certificate: Vec<u8>) -> Result<Self, NoNode> {
        let node = node_of(&CertificateDer::from(certificate.as_slice()))?;
        let renewed = self.holding(certificate)?;
        if node != self.node || renewed.key_fingerprint() != self.key_fingerprint() {
            return Err(NoNode::SomebodyElse(node));
        }
        Ok(renewed)
    }

    /// The same identity, believing these.
    pub fn trusting(&self, trust: Trust) -> Self {
        Self { trust, ..self.clone() }
    }

    /// The CA that signed its certificate.
    pub fn shows(&self) -> CaFingerprint {
        fingerprint(&self.ca)
    }

    /// Whether it knows a CA as one of its cluster. One that it does not know may be all the same: from before those
    /// that it remembers, or from a rotation that it has missed.
    pub fn knows(&self, ca: &CaFingerprint) -> bool {
        let all = self.trust.cas.iter().chain(&self.trust.lineage).chain([&self.ca]);
        all.into_iter().any(|known| fingerprint(known) == *ca)
    }

    /// The certificates of the CAs that it believes.
    pub fn roots(&self) -> &[Vec<u8>] {
        match self.trust.cas.is_empty() {
            true => std::slice::from_ref(&self.ca),
            false => &self.trust.cas,
        }
    }

    /// BLAKE3 of the public key (SubjectPublicKeyInfo, DER), or `None` where the certificate cannot
    /// be read.
    pub fn key_fingerprint(&self) -> Option<[u8; 32]> {
        let (_, parsed) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        Some(*blake3::hash(parsed.tbs_certificate.subject_pki.raw).as_bytes())
    }

    /// The last moment at which its certificate is good; `None` where it cannot be read.
    pub fn expires(&self) -> Option<SystemTime> {
        let (_, parsed) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        let seconds = parsed.validity().not_after.timestamp();
        Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?))
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        // The CA goes along so that a joiner can pin it by its fingerprint, and what leads to it from
        // an older one for those who know that alone.
        let all = [&self.certificate, &self.ca].into_iter().chain(&self.trust.lineage);
        all.map(|der| der.clone().into()).collect()
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }
}

/// Writes a file that only its owner can read, whole or not at all: a scratch file, synced, renamed.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;

    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let scratch = path.with_extension(format!("scratch-{}", std::process::id()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&scratch)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&scratch, path)?;
    fs::File::open(folder)?.sync_all()
}

/// The URI name for a node.
pub(crate) fn uri_of(node: NodeId) -> String {
    format!("{URI_PREFIX}{node}")
}

/// A certificate that names no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoNode {
    /// It is not X.509.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It has no, or more than one, URI name of ours.
    #[error("the certificate does not name exactly one node")]
    NotOneName,
    /// It is for another node, or for another key.
    #[error("the certificate is for another key or node ({0})")]
    SomebodyElse(NodeId),
    /// A CA that is not believed signed it.
    #[error("the certificate is of a CA that this node does not know")]
    OtherCa,
    /// The name is no node id.
    #[error("the certificate names `{0}`, which is no node")]
    BadName(String),
}

/// Whether the certificate says that this CA signed it. Whether that is true is TLS's to find out.
fn is_of(certificate: &[u8], ca: &[u8]) -> bool {
    let parsed = x509_parser::parse_x509_certificate(certificate);
    let (Ok((_, certificate)), Ok((_, ca))) = (parsed, x509_parser::parse_x509_certificate(ca))
    else {
        return false;
    };
    certificate.issuer().as_raw() == ca.subject().as_raw()
}

/// The node that a certificate names. The chain is checked elsewhere, before.
pub(crate) fn node_of(certificate: &CertificateDer<'_>) -> Result<NodeId, NoNode> {
    use x509_parser::extensions::GeneralName;

    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| NoNode::Unreadable)?;
    let names = parsed.subject_alternative_name().map_err(|_| NoNode::Unreadable)?;
    let mut ours =
        names.iter().flat_map(|ext| &ext.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(URI_PREFIX),
            _ => None,
        });
    let (Some(name), None) = (ours.next(), ours.next()) else {
        return Err(NoNode::NotOneName);
    };
    name.parse().map_err(|_| NoNode::BadName(name.to_owned()))
}
