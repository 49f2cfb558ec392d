//! Identifiers: one newtype per thing that must not be swapped for another.
//!
//! Each has a short `Display` for logs (`w3`, `r1`, `g7`); the numbers are what crosses a wire.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

number_id!(
    /// A replica of a deployment; unique in the cluster for ever.
    ReplicaId(u32), "r");
number_id!(
    /// The number of a replica's current layout. Frames and assignments carry it; receivers refuse
    /// any other.
    Generation(u64), "g");
number_id!(
    /// The revision of a complete plan.
    PlanRevision(u64), "p");
number_id!(
    /// A pipeline stage of a replica, counted from 0.
    StageIndex(u32), "stage ");
number_id!(
    /// A tensor rank inside a stage, counted from 0.
    RankIndex(u32), "rank ");
number_id!(
    /// The number of tries of one request, counted from 1.
    Attempt(u32), "a");
number_id!(
    /// One request inside an engine. Drawn by the head, never used twice in one generation.
    SequenceId(u64), "s");
number_id!(
    /// One batch going once through the stages.
    StepId(u64), "step ");
number_id!(
    /// A block of the paged KV cache: the same number at every stage of a replica.
    BlockId(u32), "b");
number_id!(
    /// An adapter of a deployment, counted from 1 and never used twice in it.
    AdapterId(u32), "adapter ");
number_id!(
    /// The number of times a node with this identity has started; a smaller one is a ghost.
    Incarnation(u64), "i");

impl AdapterId {
    /// What stands in a frame: 0 for the base model alone.
    pub fn to_wire(adapter: Option<Self>) -> u32 {
        adapter.map_or(0, |adapter| adapter.0)
    }

    /// The same read back.
    pub fn of_wire(number: u32) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }
}

/// A request of a client. Drawn at random by the coordinator that accepts it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A token of a model's vocabulary.
pub type TokenId = u32;

/// What a certificate entitles its holder to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Serves the API and holds the replicated state.
    Coordinator,
    /// Runs shards.
    Worker,
    /// Operates the cluster through the admin API.
    Admin,
}

impl Role {
    /// The word used in certificates, tokens and the CLI.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
            Role::Admin => "admin",
        }
    }

    fn letter(self) -> char {
        match self {
            Role::Coordinator => 'c',
            Role::Worker => 'w',
            Role::Admin => 'a',
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        match text {
            "coordinator" => Ok(Role::Coordinator),
            "worker" => Ok(Role::Worker),
            "admin" => Ok(Role::Admin),
            _ => {
                Err(BadId { text: text.to_owned(), expected: "one of coordinator, worker, admin" })
            }
        }
    }
}

/// A process with an identity: `c1`, `w3`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    /// What the node is.
    pub role: Role,
    /// Counted from 1 within the role; never given twice.
    pub number: u32,
}

impl NodeId {
    /// The coordinator with this number.
    pub const fn coordinator(number: u32) -> Self {
        Self { role: Role::Coordinator, number }
    }

    /// The worker with this number.
    pub const fn worker(number: u32) -> Self {
        Self { role: Role::Worker, number }
    }

    /// The holder of an admin certificate with this number.
    pub const fn admin(number: u32) -> Self {
        Self { role: Role::Admin, number }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.role.letter(), self.number)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for NodeId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let bad = || BadId { text: text.to_owned(), expected: "a node id such as w1 or c1" };
        let mut chars = text.chars();
        let role = match chars.next() {
            Some('c') => Role::Coordinator,
            Some('w') => Role::Worker,
            Some('a') => Role::Admin,
            _ => return Err(bad()),
        };
        let digits = chars.as_str();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let number = digits.parse().map_err(|_| bad())?;
        Ok(Self { role, number })
    }
}

impl Serialize for NodeId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of a deployment: what clients put into `"model"`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct DeploymentName(String);

impl DeploymentName {
    /// The longest name, in bytes: it stands in metrics labels and log lines.
    pub const LEN_MAX: usize = 96;

    /// Checks the name: 1 to 96 of `A-Z a-z 0-9 . _ - / :`, beginning with a letter or a digit.
    pub fn new(name: impl Into<String>) -> Result<Self, BadId> {
        let name = name.into();
        let first_ok = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let all_ok = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':'));
        if name.len() > Self::LEN_MAX || !first_ok || !all_ok {
            return Err(BadId {
                text: name.chars().take(Self::LEN_MAX).collect(),
                expected: "a name of at most 96 letters, digits and . _ - / : that begins with a letter or a digit",
            });
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeploymentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeploymentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for DeploymentName {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        Self::new(text)
    }
}

impl<'de> Deserialize<'de> for DeploymentName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A text that is no such identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct BadId {
    /// What was given.
    pub text: String,
    /// What would have been right.
    pub expected: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ids_print_and_parse() {
        for (id, text) in
            [(NodeId::worker(3), "w3"), (NodeId::coordinator(1), "c1"), (NodeId::admin(12), "a12")]
        {
            assert_eq!(id.to_string(), text);
            assert_eq!(text.parse::<NodeId>(), Ok(id));
        }
        for text in ["", "w", "x1", "w-1", "w+1", "w1 ", "w99999999999"] {
            assert!(text.parse::<NodeId>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn deployment_names_are_checked() {
        for name in ["demo", "org/Model-7B_v1.2", "llama3:8b", "0"] {
            assert!(DeploymentName::new(name).is_ok(), "{name:?} was refused");
        }
        for name in ["", "-x", "a b", "näme", &"x".repeat(97)] {
            assert!(DeploymentName::new(name).is_err(), "{name:?} was taken");
        }
    }
}
