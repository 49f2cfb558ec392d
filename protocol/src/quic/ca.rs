//! The cluster's certificate authority.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::identity::{Identity, TLS_NAME, uri_of, write_secret};
use crate::id::NodeId;

/// The longest life of a node's certificate.
pub const CERTIFICATE_LIFE_MAX: Duration = Duration::from_secs(24 * 3600);

/// How far a certificate's beginning is set back, for clocks that do not agree.
pub const CLOCK_SKEW: Duration = Duration::from_secs(600);

/// The life of the CA itself.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The key that signs the certificates of all nodes.
pub struct CertificateAuthority {
    certificate: Vec<u8>,
    key: KeyPair,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CertificateAuthority")
    }
}

#[derive(Serialize, Deserialize)]
struct CaFile {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// What can go wrong with the CA.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The file could not be read or written.
    #[error("cannot use the CA file {path}")]
    Io {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a CA.
    #[error("the CA file {path} is damaged: {why}")]
    Damaged {
        /// Which file.
        path: String,
        /// Why.
        why: String,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Signing(#[from] rcgen::Error),
}

impl CertificateAuthority {
    /// A new CA with a new key.
    pub fn create(now: SystemTime) -> Result<Self, CaError> {
        let key = KeyPair::generate()?;
        let params = ca_params(&key, BasicConstraints::Constrained(0), now);
        let certificate = params.self_signed(&key)?;
        Ok(Self { certificate: certificate.der().to_vec(), key })
    }

    /// What proves the next CA to those who know this one alone: its key, under its name, signed by
    /// this one. It opens nothing that this CA opened: it leads from here to there, and not back.
    pub fn introduce(&self, next: &Self, now: SystemTime) -> Result<Vec<u8>, CaError> {
        // What it introduces may introduce another one.
        let params = ca_params(&next.key, BasicConstraints::Unconstrained, now);
        Ok(params.signed_by(&next.key, &self.issuer()?)?.der().to_vec())
    }

    /// Reads the CA; `None` where there is no such file.
    pub fn load(path: &Path) -> Result<Option<Self>, CaError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CaError::Io { path: path.display().to_string(), source }),
        };
        Self::from_bytes(&bytes)
            .map(Some)
            .map_err(|why| CaError::Damaged { path: path.display().to_string(), why })
    }

    /// The CA whose key another coordinator has handed over; words where the bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let file: CaFile = postcard::from_bytes(bytes).map_err(|e| e.to_string())?;
        let key =
            KeyPair::try_from(&PrivatePkcs8KeyDer::from(file.key)).map_err(|e| e.to_string())?;
        Ok(Self { certificate: file.certificate, key })
    }

    /// The CA with its key: for another coordinator that votes, and for its file.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CaError> {
        let file = CaFile { certificate: self.certificate.clone(), key: self.key.serialize_der() };
        postcard::to_stdvec(&file)
            .map_err(|e| CaError::Io { path: "in memory".to_owned(), source: io::Error::other(e) })
    }

    /// Writes the CA, readable by its owner alone.
    pub fn save(&self, path: &Path) -> Result<(), CaError> {
        let io = |source| CaError::Io { path: path.display().to_string(), source };
        write_secret(path, &self.to_bytes()?).map_err(io)
    }

    /// The CA's certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// BLAKE3 of the CA's certificate: what a join token pins.
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(&self.certificate).as_bytes()
    }

    /// A certificate (DER) for `node` over the key of a signing request. Whatever name the request
    /// asks for is ignored; its self-signature is checked.
    pub fn issue(&self, csr: &[u8], node: NodeId, now: SystemTime) -> Result<Vec<u8>, CaError> {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request = CertificateSigningRequestParams::from_der(&csr)?;
        request.params = node_params(node, now)?;
        Ok(request.signed_by(&self.issuer()?)?.der().to_vec())
    }

    /// BLAKE3 of the public key (SubjectPublicKeyInfo, DER) that a signing request is for. Its
    /// self-signature is checked: whoever asks has the key.
    pub fn key_of_request(csr: &[u8]) -> Result<[u8; 32], CaError> {
        let csr = CertificateSigningRequestDer::from(csr);
        let request = CertificateSigningRequestParams::from_der(&csr)?;
        Ok(*blake3::hash(&request.public_key.subject_public_key_info()).as_bytes())
    }

    /// A whole identity with a new key: for coordinators, admins and tests.
    pub fn issue_identity(&self, node: NodeId, now: SystemTime) -> Result<Identity, CaError> {
        let key = KeyPair::generate()?;
        let certificate = node_params(node, now)?.signed_by(&key, &self.issuer()?)?;
        let (certificate, key) = (certificate.der().to_vec(), key.serialize_der());
        Ok(Identity::new(node, certificate, key, self.certificate.clone()))
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, CaError> {
        Ok(Issuer::from_ca_cert_der(&CertificateDer::from(self.certificate.as_slice()), &self.key)?)
    }
}

fn ca_params(key: &KeyPair, path: BasicConstraints, now: SystemTime) -> CertificateParams {
    // A name of its own, so that certificates say which of two CAs signed them.
    let name = blake3::hash(&key.subject_public_key_info()).to_hex();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("shoal cluster CA {}", &name[..12]));
    params.is_ca = IsCa::Ca(path);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + CA_LIFE).into();
    params
}

fn node_params(node: NodeId, now: SystemTime) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::new(vec![TLS_NAME.to_owned()])?;
    params.subject_alt_names.push(SanType::URI(Ia5String::try_from(uri_of(node))?));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, node.to_string());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + CERTIFICATE_LIFE_MAX - CLOCK_SKEW).into();
    Ok(params)
}
