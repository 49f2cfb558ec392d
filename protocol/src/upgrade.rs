//! What operators ask about versions, and what they are answered: part of `shoal-admin`, since version 2.

use serde::{Deserialize, Serialize};

use crate::id::NodeId;

/// What an operator asks about versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UpgradeCall {
    /// Who speaks what?
    Status,
    /// The upgrade is complete: whoever speaks less than this coordinator is refused from now on.
    Finish,
}

/// How an upgrade stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeView {
    /// The newest version that the answering coordinator speaks.
    pub newest: u16,
    /// The lowest of all members: what needs more has to wait.
    pub lowest: u16,
    /// What coordinators must speak to take part.
    pub log: u16,
    /// What workers must speak to take part.
    pub workers: u16,
    /// All coordinators and workers, by number.
    pub nodes: Vec<SpeakerView>,
}

/// What one node speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpeakerView {
    /// Which.
    pub node: NodeId,
    /// The version of its binary; empty where it has never run.
    pub build: String,
    /// The newest protocol version that it speaks; `None` where nobody knows: it has never run, or is away.
    pub protocol: Option<u16>,
}
