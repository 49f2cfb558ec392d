//! ○ Whom a node believes: the cluster's CAs, of which there are two while one takes the place of the other.
//!
//! ```text
//! revision 1        2                     3                    4
//! old signs ─► old signs, new trusted ─► new signs, both ─► new alone
//! ```
//!
//! Coordinators hand this to everybody; a node takes a newer revision and no older one, so that one that
//! lags behind leads nobody back.

use serde::{Deserialize, Serialize};

/// CAs that are trusted at once: the one that signs, and the one before or after it.
pub const CAS_MAX: usize = 2;

/// CAs before these of which a node that was off may come back, and tokens that pin them go on: each
/// costs two certificates in every handshake with a coordinator.
pub const PAST_MAX: usize = 4;

/// Certificates that go along in a handshake.
const LINEAGE_MAX: usize = 2 * (PAST_MAX + 1);

/// The largest certificate of a CA, three times one of ours.
const CERTIFICATE_LEN_MAX: usize = 1200;

/// BLAKE3 of a CA's certificate: its name among others.
pub type CaFingerprint = [u8; 32];

/// The fingerprint of a CA's certificate (DER).
pub fn fingerprint(certificate: &[u8]) -> CaFingerprint {
    *blake3::hash(certificate).as_bytes()
}

/// Whom to believe.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Trust {
    /// Grows with each change; 0: the CA of the founding alone, which each node has on its disk.
    pub revision: u64,
    /// The CAs' certificates, DER, of which the first signs.
    pub cas: Vec<Vec<u8>>,
    /// What proves them to somebody who knows an older one alone, newest first: the key of each, signed
    /// by the one before it, and the certificate of that.
    pub lineage: Vec<Vec<u8>>,
}

/// What came is no trust.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the list of trusted CAs that came is none: {0}")]
pub struct BadTrust(&'static str);

impl Trust {
    /// Checks what came over a wire.
    pub fn check(&self) -> Result<(), BadTrust> {
        if self.cas.is_empty() || self.cas.len() > CAS_MAX {
            return Err(BadTrust("it has none or too many"));
        }
        if self.lineage.len() > LINEAGE_MAX {
            return Err(BadTrust("its lineage is too long"));
        }
        let all = self.cas.iter().chain(&self.lineage);
        match all.into_iter().all(|der| !der.is_empty() && der.len() <= CERTIFICATE_LEN_MAX) {
            true => Ok(()),
            false => Err(BadTrust("a certificate is empty or too large")),
        }
    }

    /// This, or what else was heard, whichever is newer.
    pub fn or_newer(self, heard: Option<&Self>) -> Self {
        match heard {
            Some(heard) if heard.revision > self.revision => heard.clone(),
            _ => self,
        }
    }

    /// The CA that signs.
    pub fn signing(&self) -> Option<CaFingerprint> {
        self.cas.first().map(|ca| fingerprint(ca))
    }

    /// All CAs that are trusted.
    pub fn fingerprints(&self) -> Vec<CaFingerprint> {
        self.cas.iter().map(|ca| fingerprint(ca)).collect()
    }

    /// The same for nodes that answer no strangers: what their neighbours may need while a CA takes the
    /// place of another.
    pub fn for_workers(&self) -> Self {
        Self { lineage: self.lineage.iter().take(1).cloned().collect(), ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_bounded() {
        let good = Trust { revision: 1, cas: vec![vec![1]], lineage: vec![] };
        assert_eq!(good.check(), Ok(()));
        let cas = |n: usize| Trust { cas: vec![vec![1]; n], ..good.clone() };
        assert!(cas(0).check().is_err() && cas(3).check().is_err());
        let long = Trust { lineage: vec![vec![1]; LINEAGE_MAX + 1], ..good.clone() };
        assert!(long.check().is_err());
        let large = Trust { cas: vec![vec![1; CERTIFICATE_LEN_MAX + 1]], ..good.clone() };
        assert!(large.check().is_err());
        assert!(Trust { cas: vec![vec![]], ..good }.check().is_err());
    }
}
