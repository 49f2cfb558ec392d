//! Which coordinators are there: what operators are answered (`shoal-admin`), since version 3.

use serde::{Deserialize, Serialize};

use crate::id::NodeId;

/// Which coordinators the answering one hears.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceView {
    /// All coordinators, by number, the answering one among them.
    pub coordinators: Vec<HeardView>,
    /// Where too few of those that vote are heard to decide anything: who is missing, and what to do.
    pub no_majority: Option<String>,
}

/// How one coordinator is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeardView {
    /// Which.
    pub node: NodeId,
    /// Whether it was heard just now.
    pub up: bool,
    /// How long ago it was heard last, in milliseconds; `None`: not since the answering one started.
    pub heard_ms_ago: Option<u64>,
}

impl PresenceView {
    /// How this coordinator is heard.
    pub fn of(&self, node: NodeId) -> Option<&HeardView> {
        self.coordinators.iter().find(|heard| heard.node == node)
    }
}
