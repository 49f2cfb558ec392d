//! Joining a cluster (`shoal-join`), and coming back after too long (`shoal-renew`): the conversations
//! without a client certificate.
//!
//! The joiner pins the CA by the fingerprint in its token before it sends the secret. Both
//! messages are postcard and at most `MESSAGE_LEN_MAX` bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::WireError;
use crate::id::{NodeId, Role};
use crate::trust::Trust;
use crate::version::VersionRange;

/// The largest join message.
pub const MESSAGE_LEN_MAX: usize = 4096;

/// What a joiner sends.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The protocol versions the joiner speaks.
    pub versions: VersionRange,
    /// The secret of the token.
    pub secret: [u8; 32],
    /// A certificate signing request, DER. Only its key is used: the coordinator chooses the name.
    pub csr: Vec<u8>,
}

/// Without the secret: whoever logs a request must not log what it buys.
impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("versions", &self.versions)
            .field("secret", &"…")
            .field("csr", &format_args!("{} bytes", self.csr.len()))
            .finish()
    }
}

/// What a node sends whose certificate has expired (`shoal-renew`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// The protocol versions the node speaks.
    pub versions: VersionRange,
    /// Who it is.
    pub node: NodeId,
    /// A certificate signing request, DER, signed with the key that the cluster has on record.
    pub csr: Vec<u8>,
}

/// What the coordinator answers to either.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReply {
    /// Welcome.
    Joined {
        /// The identity that was given.
        node: NodeId,
        /// Its certificate, DER.
        certificate: Vec<u8>,
        /// The CA's certificate, DER.
        ca: Vec<u8>,
    },
    /// Refused.
    Refused(WireError),
    /// Welcome to a cluster whose CA is not that of its founding any more. For nodes that speak version 2.
    Admitted {
        /// The identity that was given.
        node: NodeId,
        /// Its certificate, DER.
        certificate: Vec<u8>,
        /// Whom to believe.
        trust: Trust,
    },
    /// To whoever asks for a certificate and was removed: its number was given, and is nobody's any more. For
    /// nodes that speak version 3; others are refused.
    Removed(WireError),
}

/// A join token: what an operator copies from one machine to another.
///
/// As text: `shoal1.<role>.<CA fingerprint, hex>.<secret, hex>`. Expiry and use count stay with the
/// cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// What its user will be.
    pub role: Role,
    /// BLAKE3 of the CA certificate's DER.
    pub ca_fingerprint: [u8; 32],
    /// What is worth keeping secret.
    pub secret: [u8; 32],
}

impl JoinToken {
    const PREFIX: &'static str = "shoal1";
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}.{}.{}",
            Self::PREFIX,
            self.role,
            Hex(&self.ca_fingerprint),
            Hex(&self.secret)
        )
    }
}

/// The secret stays out of logs.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, {})", self.role, Hex(&self.ca_fingerprint[..4]))
    }
}

impl FromStr for JoinToken {
    type Err = BadJoinToken;

    fn from_str(text: &str) -> Result<Self, BadJoinToken> {
        let mut parts = text.trim().split('.');
        let mut next = || parts.next().ok_or(BadJoinToken("it has fewer than four parts"));
        if next()? != Self::PREFIX {
            return Err(BadJoinToken("it does not begin with `shoal1.`"));
        }
        let role = next()?.parse().map_err(|_| BadJoinToken("its role is unknown"))?;
        let ca_fingerprint =
            unhex(next()?).ok_or(BadJoinToken("its CA fingerprint is not 64 hex digits"))?;
        let secret = unhex(next()?).ok_or(BadJoinToken("its secret is not 64 hex digits"))?;
        if parts.next().is_some() {
            return Err(BadJoinToken("it has more than four parts"));
        }
        Ok(Self { role, ca_fingerprint, secret })
    }
}

/// A text that is no join token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: {0}; make one with `shoal token create --role worker`")]
pub struct BadJoinToken(&'static str);

/// Lower-case hexadecimal.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let bytes = text.as_bytes();
    if bytes.len() != 64 {
        return None;
    }
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    let mut out = [0; 32];
    for (out, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_clipboard() {
        let token = JoinToken { role: Role::Worker, ca_fingerprint: [0xab; 32], secret: [7; 32] };
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse::<JoinToken>(), Ok(token));
        for bad in ["", "shoal1", &text[1..], &text[..text.len() - 1], &format!("{text}.x")] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_secret_is_not_printed_by_accident() {
        let request =
            JoinRequest { versions: VersionRange::OURS, secret: [0xcd; 32], csr: vec![1; 7] };
        assert!(!format!("{request:?}").contains("205"), "{request:?}");
        let token = JoinToken { role: Role::Worker, ca_fingerprint: [1; 32], secret: [0xcd; 32] };
        assert!(!format!("{token:?}").contains("cdcd"));
    }
}
