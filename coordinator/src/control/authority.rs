//! ● Whom this coordinator believes, and the CA's key, where it has it: the founder from the start, the
//! others as soon as they vote. While one CA takes the place of another it may hold the keys of both.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::quic::Identity;
use shoal_protocol::quic::ca::{CaError, CertificateAuthority};
use shoal_protocol::quic::identity::NoNode;
use shoal_protocol::trust::{CaFingerprint, Trust, fingerprint};
use tokio::sync::watch;

/// The file of the key of the CA that signs, in the data folder.
pub(crate) const CA_FILE: &str = "ca.key";

/// The file of the key of a CA that is to sign. It is there before anybody hears of that CA, and takes
/// the other one's place when it signs.
const NEXT_CA_FILE: &str = "ca-next.key";

/// Who signs certificates here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Authority {
    shared: Arc<watch::Sender<Keys>>,
}

#[derive(Clone, Debug, Default)]
struct Keys {
    trust: Trust,
    held: Vec<Arc<CertificateAuthority>>,
}

impl Keys {
    fn of(&self, ca: &CaFingerprint) -> Option<Arc<CertificateAuthority>> {
        self.held.iter().find(|held| held.fingerprint() == *ca).cloned()
    }

    fn signing(&self) -> Option<Arc<CertificateAuthority>> {
        self.trust.signing().and_then(|ca| self.of(&ca))
    }
}

impl Authority {
    /// With the key.
    pub fn holding(ca: CertificateAuthority) -> Self {
        let authority = Self::awaiting(ca.certificate());
        authority.keep(ca);
        authority
    }

    /// Without the key, of the CA with this certificate.
    pub fn awaiting(certificate: &[u8]) -> Self {
        let trust = Trust { cas: vec![certificate.to_vec()], ..Trust::default() };
        let keys = Keys { trust, ..Keys::default() };
        Self { shared: Arc::new(watch::Sender::new(keys)) }
    }

    /// Whom to believe.
    pub fn trust(&self) -> Trust {
        self.shared.borrow().trust.clone()
    }

    /// The certificate of the CA that signs, DER.
    pub fn certificate(&self) -> Vec<u8> {
        self.shared.borrow().trust.cas.first().cloned().unwrap_or_default()
    }

    /// BLAKE3 of that: what a join token pins.
    pub fn fingerprint(&self) -> CaFingerprint {
        fingerprint(&self.certificate())
    }

    /// The key of the CA that signs, where it is here.
    pub fn current(&self) -> Option<Arc<CertificateAuthority>> {
        self.shared.borrow().signing()
    }

    /// The key of a CA, where it is here.
    pub fn key_of(&self, ca: &CaFingerprint) -> Option<Arc<CertificateAuthority>> {
        self.shared.borrow().of(ca)
    }

    /// The key, or words for whoever needs it.
    pub fn required(&self) -> Result<Arc<CertificateAuthority>, WireError> {
        self.current().ok_or_else(no_key)
    }

    /// Whom to believe, this or what is known here, whichever is newer, and the key of the one of them that
    /// signs: an answer must not hold the certificate of one time and the CAs of another.
    pub fn signer(
        &self,
        state: Option<Trust>,
    ) -> Result<(Arc<CertificateAuthority>, Trust), WireError> {
        let known = self.trust();
        let trust = state.filter(|state| state.revision > known.revision).unwrap_or(known);
        let key = trust.signing().and_then(|ca| self.key_of(&ca));
        Ok((key.ok_or_else(no_key)?, trust))
    }

    /// Keeps a key.
    pub fn keep(&self, ca: CertificateAuthority) {
        self.shared.send_modify(|keys| {
            if keys.of(&ca.fingerprint()).is_none() {
                keys.held.push(Arc::new(ca));
            }
        });
    }

    /// Forgets a key.
    pub fn drop_key(&self, ca: &CaFingerprint) {
        self.shared.send_modify(|keys| keys.held.retain(|held| held.fingerprint() != *ca));
    }

    /// Believes these from now on, and forgets the keys of others.
    pub fn follow(&self, trust: Trust) {
        self.shared.send_if_modified(|keys| {
            let changed = keys.trust != trust;
            let all = trust.fingerprints();
            if changed {
                keys.held.retain(|held| all.contains(&held.fingerprint()));
                keys.trust = trust;
            }
            changed
        });
    }

    /// This identity as it should be: a new certificate, and whom to believe; `None` where the key is not
    /// here.
    pub fn certify(
        &self,
        identity: &Identity,
        now: SystemTime,
    ) -> Result<Option<Identity>, CertifyError> {
        let Some(ca) = self.current() else { return Ok(None) };
        let csr = identity.renewal_request().map_err(CaError::from)?;
        let certificate = ca.issue(&csr, identity.node, now)?;
        let ca = ca.certificate().to_vec();
        let certified = Identity { ca, ..identity.trusting(self.told()) };
        Ok(Some(certified.renewed(certificate)?))
    }

    /// Whom to believe, as identities carry it: nothing, where that is the CA of the founding.
    pub fn told(&self) -> Trust {
        Some(self.trust()).filter(|trust| trust.revision > 0).unwrap_or_default()
    }
}

fn no_key() -> WireError {
    let text = "this coordinator does not hold the cluster's CA key: ask one that votes (`shoal coordinators \
                list`)";
    WireError::new(ErrorCode::NotReady, text)
}

/// An identity that gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertifyError {
    /// It could not be signed.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// What was signed is not for it.
    #[error(transparent)]
    NotIts(#[from] NoNode),
}

/// The keys' files in the data folder.
#[derive(Clone, Debug)]
pub struct CaFiles(PathBuf);

impl CaFiles {
    /// Of this data folder.
    pub fn of(data: &Path) -> Self {
        Self(data.to_owned())
    }

    /// The keys that are there: that of the CA that signed last, and that of one to come.
    pub fn load(&self) -> Result<Vec<CertificateAuthority>, CaError> {
        let mut found = Vec::new();
        for name in [CA_FILE, NEXT_CA_FILE] {
            found.extend(CertificateAuthority::load(&self.0.join(name))?);
        }
        Ok(found)
    }

    /// Keeps the key of the CA that signs; what is kept of one to come goes, where it is the same.
    pub fn save(&self, ca: &CertificateAuthority) -> Result<(), CaError> {
        ca.save(&self.0.join(CA_FILE))?;
        let next = self.0.join(NEXT_CA_FILE);
        // One that cannot be read is of no use either.
        let next_is = CertificateAuthority::load(&next).ok().flatten();
        if next_is.is_some_and(|next| next.fingerprint() == ca.fingerprint()) {
            // What is left is put in order by the next start.
            let _ = std::fs::remove_file(next);
        }
        Ok(())
    }

    /// Whether the key of the CA that signs is kept as such.
    pub fn has(&self, ca: &CaFingerprint) -> bool {
        let kept = CertificateAuthority::load(&self.0.join(CA_FILE)).ok().flatten();
        kept.is_some_and(|kept| kept.fingerprint() == *ca)
    }

    /// Forgets the key of a CA that was to sign, where it is that one's.
    pub fn drop_next(&self, ca: &CaFingerprint) -> Result<(), CaError> {
        let next = self.0.join(NEXT_CA_FILE);
        match CertificateAuthority::load(&next)? {
            Some(kept) if kept.fingerprint() == *ca => {
                // What is left is never asked for, and the next one takes its place.
                let _ = std::fs::remove_file(next);
            }
            _ => {}
        }
        Ok(())
    }

    /// Keeps the key of a CA that is to sign.
    pub fn save_next(&self, ca: &CertificateAuthority) -> Result<(), CaError> {
        ca.save(&self.0.join(NEXT_CA_FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_signed_and_who_is_believed_are_of_one_time() {
        let now = SystemTime::now();
        let [old, new] = [(); 2].map(|()| CertificateAuthority::create(now).unwrap());
        let [old_is, new_is] = [&old, &new].map(|ca| ca.certificate().to_vec());
        let trust = |revision, cas: &[&Vec<u8>]| {
            let cas = cas.iter().map(|ca| ca.to_vec()).collect();
            Trust { revision, cas, ..Trust::default() }
        };
        let authority = Authority::holding(old);
        let signs = |state| authority.signer(state).map(|(ca, trust)| (ca.fingerprint(), trust));
        assert_eq!(signs(None).unwrap().0, fingerprint(&old_is));
        // The state knows of another one, whose key is not here: nothing is signed with the old one.
        let signed = trust(2, &[&new_is, &old_is]);
        assert_eq!(signs(Some(signed.clone())).unwrap_err().code, ErrorCode::NotReady);
        authority.keep(new);
        let expected = (fingerprint(&new_is), signed);
        assert_eq!(signs(Some(expected.1.clone())).unwrap(), expected);
        // A copy of the state that lags behind leads nobody back.
        authority.follow(expected.1.clone());
        assert_eq!(signs(Some(trust(1, &[&old_is, &new_is]))).unwrap(), expected);
    }

    #[test]
    fn the_key_of_a_ca_that_never_comes_goes_and_no_other() {
        let data = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let [founding, next] = [(); 2].map(|()| CertificateAuthority::create(now).unwrap());
        let [founding_is, next_is] = [&founding, &next].map(CertificateAuthority::fingerprint);
        let files = CaFiles::of(data.path());
        files.save(&founding).unwrap();
        files.save_next(&next).unwrap();
        files.drop_next(&founding_is).unwrap();
        assert_eq!(files.load().unwrap().len(), 2);
        files.drop_next(&next_is).unwrap();
        assert_eq!(files.load().unwrap().len(), 1);
        let authority = Authority::holding(founding);
        authority.keep(next);
        authority.drop_key(&next_is);
        assert!(authority.key_of(&next_is).is_none() && authority.current().is_some());
    }
}
