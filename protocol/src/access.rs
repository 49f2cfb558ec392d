//! Who may do what, as operators ask and see it: API keys, join tokens, nodes.
//!
//! These calls travel inside [`AdminCall::Access`](crate::admin::AdminCall) and their answers inside
//! `AdminReply::Access`. Secrets cross the wire once, when they are made; lists show none.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{BadId, NodeId, Role};
use crate::trust::Trust;

/// What an operator asks about access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessCall {
    /// Make a key of the public API.
    CreateKey {
        /// What people call it.
        name: KeyName,
        /// What its user may do at most.
        limits: KeyLimits,
        /// How long it is good for, in seconds; `None`: until it is revoked.
        expires_s: Option<u64>,
    },
    /// All keys, and those that were.
    ListKeys,
    /// Take a key back.
    RevokeKey {
        /// Which.
        name: KeyName,
    },
    /// All join tokens that can still be used.
    ListTokens,
    /// Take a join token back.
    RevokeToken {
        /// The beginning of its id.
        id: String,
    },
    /// All nodes.
    ListNodes,
    /// Forget a node for ever.
    RemoveNode {
        /// Which.
        node: NodeId,
        /// Even while it is connected.
        force: bool,
    },
    /// Let another CA take the place of the one that signs; where that is under way it goes on.
    RotateCa {
        /// Not to wait for nodes that are off before the old one is believed no more.
        skip_absent: bool,
    },
    /// The CAs, and how far a rotation is.
    ListCas,
    /// A certificate of the CA that signs now, for the admin that asks.
    RenewAdmin {
        /// A certificate signing request, DER.
        csr: Vec<u8>,
    },
    /// All nodes, as the answering coordinator knows them by itself: at once, and also without a majority. Since
    /// version 3.
    ListNodesKnown,
}

/// What a coordinator answers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AccessReply {
    /// To `CreateKey`: the one time that the secret is seen.
    Key {
        /// What goes behind `Authorization: Bearer`.
        secret: String,
    },
    /// To `ListKeys`, oldest first.
    Keys(Vec<KeyView>),
    /// To `ListTokens`, oldest first.
    Tokens(Vec<TokenView>),
    /// To `ListNodes`, by role and number.
    Nodes(Vec<NodeView>),
    /// To what changes something: accepted and durable.
    Done,
    /// To `ListCas`.
    Cas(CaView),
    /// To `RenewAdmin`.
    Renewed {
        /// The certificate, DER.
        certificate: Vec<u8>,
        /// Whom to believe.
        trust: Trust,
    },
    /// To `ListNodesKnown`.
    NodesKnown(NodesKnown),
}

/// The secret stays out of logs.
impl fmt::Debug for AccessReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccessReply::Key { .. } => f.write_str("Key(not shown)"),
            AccessReply::Keys(keys) => f.debug_tuple("Keys").field(keys).finish(),
            AccessReply::Tokens(tokens) => f.debug_tuple("Tokens").field(tokens).finish(),
            AccessReply::Nodes(nodes) => f.debug_tuple("Nodes").field(nodes).finish(),
            AccessReply::Done => f.write_str("Done"),
            AccessReply::Cas(view) => f.debug_tuple("Cas").field(view).finish(),
            AccessReply::Renewed { .. } => f.write_str("Renewed"),
            AccessReply::NodesKnown(known) => f.debug_tuple("NodesKnown").field(known).finish(),
        }
    }
}

/// What the user of one key may do at most. Each coordinator counts for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KeyLimits {
    /// Requests in a minute, all at once or spread; `None`: any number.
    pub requests_per_minute: Option<u32>,
    /// Requests at the same time, each until the last byte of its answer; `None`: any number.
    pub concurrent: Option<u32>,
}

/// A key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyView {
    /// What people call it.
    pub name: KeyName,
    /// Whether it opens anything.
    pub standing: KeyStanding,
    /// When it was made, in seconds since 1970.
    pub created_s: u64,
    /// The last second at which it is good.
    pub expires_s: Option<u64>,
    /// When it was taken back.
    pub revoked_s: Option<u64>,
    /// What its user may do at most.
    pub limits: KeyLimits,
}

/// Whether a key opens anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyStanding {
    /// It does.
    Good,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

/// A join token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// The first digits of its secret's hash.
    pub id: String,
    /// What its users become.
    pub role: Role,
    /// How often it may still be used.
    pub uses_left: u32,
    /// The last second at which it is good, since 1970.
    pub expires_s: u64,
}

/// A node as the state has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Who.
    pub node: NodeId,
    /// When it joined, in seconds since 1970.
    pub joined_s: u64,
    /// How often it has started; 0 before it first registered.
    pub starts: u64,
    /// The version of its binary; empty before it first registered.
    pub build: String,
    /// Whether the answering coordinator has a worker on a link, or hears a coordinator; `None` for operators,
    /// and of a coordinator where an older build answers.
    pub connected: Option<bool>,
    /// Whether a layer is placed on it.
    pub placed: bool,
}

/// The nodes, as one coordinator knows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesKnown {
    /// By role and number.
    pub nodes: Vec<NodeView>,
    /// When what it knows was last changed, in seconds since 1970: it knows of nothing that was decided later.
    pub as_of_s: u64,
    /// Why it knows no more, where there is no majority.
    pub no_majority: Option<String>,
}

/// The cluster's CAs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaView {
    /// Those that are believed, the one that signs first.
    pub cas: Vec<CaEntry>,
    /// Those that are believed no more, newest first, of which nodes that were off may come back.
    pub past: Vec<CaEntry>,
    /// How far a rotation is.
    pub rotation: Option<RotationView>,
}

/// A CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaEntry {
    /// BLAKE3 of its certificate, in hexadecimal.
    pub fingerprint: String,
    /// What it is good for.
    pub standing: CaStanding,
    /// Since when, in seconds since 1970; `None`: since the founding.
    pub since_s: Option<u64>,
}

/// What a CA is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaStanding {
    /// It signs.
    Signs,
    /// It will sign when everybody believes it.
    Next,
    /// It signed; what it signed is good until everybody shows a certificate of the next.
    Leaving,
    /// What it signed is refused.
    Past,
}

/// How far a rotation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationView {
    /// When it was begun, in seconds since 1970.
    pub begun_s: u64,
    /// When at the latest the old CA is believed no more; `None` before the new one signs.
    pub ends_s: Option<u64>,
    /// What it waits for, for people.
    pub waits: String,
    /// Whom it waits for.
    pub waits_for: Vec<NodeId>,
}

/// What people call a key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct KeyName(String);

impl KeyName {
    /// The longest name, in bytes: it stands in log lines.
    pub const LEN_MAX: usize = 64;

    /// Checks the name: 1 to 64 of `A-Z a-z 0-9 . _ - @`, beginning with a letter or a digit.
    pub fn new(name: impl Into<String>) -> Result<Self, BadId> {
        let name = name.into();
        let first_ok = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let all_ok = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@'));
        if name.len() > Self::LEN_MAX || !first_ok || !all_ok {
            return Err(BadId {
                text: name.chars().take(Self::LEN_MAX).collect(),
                expected: "a name of at most 64 letters, digits and . _ - @ that begins with a letter or a digit",
            });
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for KeyName {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        Self::new(text)
    }
}

impl<'de> Deserialize<'de> for KeyName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_names_are_checked() {
        for name in ["alice", "ci-2", "bob@example.org", "0"] {
            assert!(KeyName::new(name).is_ok(), "{name:?} was refused");
        }
        for name in ["", "-x", "a b", "näme", "a/b", &"x".repeat(65)] {
            assert!(KeyName::new(name).is_err(), "{name:?} was taken");
        }
    }

    #[test]
    fn a_key_is_not_printed_by_accident() {
        let reply = AccessReply::Key { secret: "sk-shoal-abc".to_owned() };
        assert!(!format!("{reply:?}").contains("abc"));
    }
}
