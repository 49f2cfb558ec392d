//! Which CAs are believed, which of them signs, and how far one has taken the place of another.
//!
//! ```text
//!            Begin                 Sign                    Retire
//! old signs ──────► old signs, ───────────► new signs, ──────────► new signs
//!                   new spreads             old leaves
//!                       └─ Abandon ─► old signs
//! ```
//!
//! Certificates alone are here; keys never are. Whoever drives this (`control::rotation`) decides by what
//! stands here and who is connected, so a driver that dies is followed by another one that goes on.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::trust::{CaFingerprint, PAST_MAX, Trust, fingerprint};

use super::command::{Effect, Refusal, Timestamp};
use super::nodes::{KeyFingerprint, Nodes};

/// How long certificates of a CA that signs no more are good at most: as long as they live.
pub const LEAVING_MAX: Duration = Duration::from_secs(24 * 3600);

/// Changes of which CAs are believed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AuthorityCommand {
    /// Another CA is to take the place of the one that signs.
    Begin {
        /// The certificate of the one that signs.
        present: Vec<u8>,
        /// The certificate of the one to come.
        next: Vec<u8>,
        /// The key of the one to come, signed by the present one.
        introduction: Vec<u8>,
        /// The coordinator that has the key of the one to come, on its disk.
        maker: NodeId,
        /// Not to wait for nodes that are off before the old one is believed no more.
        skip_absent: bool,
    },
    /// Nodes have come so far with the CA to come.
    Reached {
        /// The CA.
        ca: CaFingerprint,
        /// How far.
        step: CaStep,
        /// Who.
        nodes: BTreeSet<NodeId>,
    },
    /// Not to wait for nodes that are off.
    SkipAbsent {
        /// The CA to come.
        ca: CaFingerprint,
    },
    /// Everybody who is there believes it: it signs from now on.
    Sign {
        /// Which.
        ca: CaFingerprint,
    },
    /// Everybody shows a certificate of it: the one before it is believed no more.
    Retire {
        /// The one that signs.
        ca: CaFingerprint,
    },
    /// Nobody has its key any more, and it has signed nothing.
    Abandon {
        /// Which.
        ca: CaFingerprint,
    },
    /// A coordinator keeps a key of its own, with which it can renew its certificate.
    OwnKey {
        /// Which.
        node: NodeId,
        /// Its key.
        key: KeyFingerprint,
    },
}

impl fmt::Display for AuthorityCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AuthorityCommand::Begin { maker, .. } => write!(f, "begin with what {maker} made"),
            AuthorityCommand::Reached { step, nodes, .. } => {
                let nodes: Vec<_> = nodes.iter().map(NodeId::to_string).collect();
                write!(f, "{step:?}: {}", nodes.join(", "))
            }
            AuthorityCommand::SkipAbsent { .. } => f.write_str("wait for nobody who is off"),
            AuthorityCommand::Sign { .. } => f.write_str("the new one signs"),
            AuthorityCommand::Retire { .. } => f.write_str("the old one is believed no more"),
            AuthorityCommand::Abandon { .. } => f.write_str("it is given up"),
            AuthorityCommand::OwnKey { node, .. } => write!(f, "{node} has a key of its own"),
        }
    }
}

/// How far a node has come with a new CA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CaStep {
    /// It believes what the CA signs.
    Trusts,
    /// It has the CA's key (a coordinator).
    Holds,
    /// It shows a certificate of the CA.
    Shows,
}

/// The CAs. In a cluster that never let one take the place of another nothing of it is known: everybody
/// has the CA of the founding on their disks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Authorities {
    /// Grows with each change of who is believed.
    revision: u64,
    /// The certificate of the one that signs, or signed before the rotation under way; empty: that of
    /// the founding.
    present: Vec<u8>,
    /// Since when it signs.
    since: Option<Timestamp>,
    rotation: Option<Rotation>,
    /// Those that are believed no more, newest first.
    past: Vec<PastCa>,
    /// A coordinator was removed while a rotation was under way, and may have the key of the CA to come:
    /// another rotation is to follow.
    again: bool,
}

/// A CA takes the place of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotation {
    /// The certificate of the one to come.
    pub next: Vec<u8>,
    /// Its key, signed by the present one.
    pub introduction: Vec<u8>,
    /// Who made it.
    pub maker: NodeId,
    /// When it was begun.
    pub begun: Timestamp,
    /// Since when the one to come signs.
    pub signs: Option<Timestamp>,
    /// Not to wait for nodes that are off.
    pub skip_absent: bool,
    /// Those who believe it.
    pub trusting: BTreeSet<NodeId>,
    /// Coordinators that have its key.
    pub holding: BTreeSet<NodeId>,
    /// Those who show a certificate of it.
    pub showing: BTreeSet<NodeId>,
}

impl Rotation {
    /// The CA to come.
    pub fn ca(&self) -> CaFingerprint {
        fingerprint(&self.next)
    }
}

/// A CA that is believed no more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PastCa {
    /// Its certificate.
    pub certificate: Vec<u8>,
    /// The key of the one after it, signed by it.
    pub introduction: Vec<u8>,
    /// When it left.
    pub left: Timestamp,
}

impl Authorities {
    /// Whether nothing stands here: no CA ever took the place of another.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The rotation that is under way.
    pub fn rotation(&self) -> Option<&Rotation> {
        self.rotation.as_ref()
    }

    /// Whether another rotation is to follow, since somebody who was removed may have the last one's key.
    pub fn again(&self) -> bool {
        self.again
    }

    /// Those that are believed no more, newest first.
    pub fn past(&self) -> &[PastCa] {
        &self.past
    }

    /// The certificate of the one that signs; `None`: that of the founding.
    pub fn signing(&self) -> Option<&[u8]> {
        let next = self.rotation.as_ref().filter(|rotation| rotation.signs.is_some());
        let signing = next.map_or(&self.present, |rotation| &rotation.next);
        (!signing.is_empty()).then_some(signing)
    }

    /// Since when it signs; `None`: since the founding.
    pub fn signing_since(&self) -> Option<Timestamp> {
        self.rotation.as_ref().and_then(|rotation| rotation.signs).or(self.since)
    }

    /// Whom to believe; `None`: the CA of the founding.
    pub fn trust(&self) -> Option<Trust> {
        if self.present.is_empty() {
            return None;
        }
        let (mut cas, mut lineage) = (vec![self.present.clone()], Vec::new());
        if let Some(rotation) = &self.rotation {
            let at = if rotation.signs.is_some() { 0 } else { 1 };
            cas.insert(at, rotation.next.clone());
            // It goes along before the new one signs too: who shows it first is not waited for.
            lineage.extend([rotation.introduction.clone(), self.present.clone()]);
        }
        for past in &self.past {
            lineage.extend([past.introduction.clone(), past.certificate.clone()]);
        }
        Some(Trust { revision: self.revision, cas, lineage })
    }

    /// Forgets how far a node had come that belongs to the cluster no more. A coordinator takes the keys with
    /// it, whether it said that it has them or not.
    pub(super) fn forget(&mut self, node: NodeId) {
        if let Some(rotation) = &mut self.rotation {
            self.again |= node.role == Role::Coordinator;
            for nodes in [&mut rotation.trusting, &mut rotation.holding, &mut rotation.showing] {
                nodes.remove(&node);
            }
        }
    }

    pub(super) fn change(
        &mut self,
        command: &AuthorityCommand,
        nodes: &mut Nodes,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        match command {
            AuthorityCommand::Begin { present, next, introduction, maker, skip_absent } => {
                let certificates = [present, next, introduction].map(Vec::as_slice);
                self.begin(certificates, *maker, *skip_absent, at)
            }
            AuthorityCommand::Reached { ca, step, nodes: reached } => {
                let rotation = self.rotating(ca)?;
                let known = reached.iter().filter(|node| nodes.get(**node).is_some()).copied();
                let set = match step {
                    CaStep::Trusts => &mut rotation.trusting,
                    CaStep::Holds => &mut rotation.holding,
                    CaStep::Shows => &mut rotation.showing,
                };
                set.extend(
                    known.filter(|node| *step != CaStep::Holds || node.role == Role::Coordinator),
                );
                Ok(Vec::new())
            }
            AuthorityCommand::SkipAbsent { ca } => {
                self.rotating(ca)?.skip_absent = true;
                Ok(Vec::new())
            }
            AuthorityCommand::Sign { ca } => {
                let again = self.again;
                let rotation = self.rotating(ca)?;
                if rotation.signs.is_some() {
                    return Ok(Vec::new());
                }
                if again {
                    // Decided before somebody was removed who may have its key.
                    return Err(Refusal::StaleRotation);
                }
                rotation.signs = Some(at);
                self.revision += 1;
                Ok(vec![Effect::AuthorityChanged { ca: *ca }])
            }
            AuthorityCommand::Retire { ca } => self.retire(ca, at),
            AuthorityCommand::Abandon { ca } => {
                if self.rotating(ca)?.signs.is_some() {
                    return Err(Refusal::StaleRotation);
                }
                self.rotation = None;
                self.revision += 1;
                Ok(vec![Effect::AuthorityChanged { ca: *ca }])
            }
            AuthorityCommand::OwnKey { node, key } => {
                if node.role != Role::Coordinator || !nodes.set_key(*node, *key) {
                    return Err(Refusal::UnknownNode { node: *node });
                }
                Ok(Vec::new())
            }
        }
    }

    fn begin(
        &mut self,
        [present, next, introduction]: [&[u8]; 3],
        maker: NodeId,
        skip_absent: bool,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        if self.rotation.is_some() {
            return Err(Refusal::RotationUnderWay);
        }
        if !self.present.is_empty() && self.present != present {
            return Err(Refusal::StaleRotation);
        }
        let past = self.past.iter().any(|past| past.certificate == next);
        if past || next == present || [present, next, introduction].iter().any(|der| der.is_empty())
        {
            return Err(Refusal::StaleRotation);
        }
        present.clone_into(&mut self.present);
        self.again = false;
        self.revision += 1;
        let ca = fingerprint(next);
        self.rotation = Some(Rotation {
            next: next.to_vec(),
            introduction: introduction.to_vec(),
            maker,
            begun: at,
            signs: None,
            skip_absent,
            trusting: BTreeSet::new(),
            holding: BTreeSet::from([maker]),
            showing: BTreeSet::new(),
        });
        Ok(vec![Effect::AuthorityChanged { ca }])
    }

    fn retire(&mut self, ca: &CaFingerprint, at: Timestamp) -> Result<Vec<Effect>, Refusal> {
        if self.rotating(ca)?.signs.is_none() {
            return Err(Refusal::StaleRotation);
        }
        let Some(rotation) = self.rotation.take() else { return Ok(Vec::new()) };
        let Rotation { next, introduction, signs, .. } = rotation;
        let certificate = std::mem::replace(&mut self.present, next);
        self.past.insert(0, PastCa { certificate, introduction, left: at });
        self.past.truncate(PAST_MAX);
        self.since = signs;
        self.revision += 1;
        Ok(vec![Effect::AuthorityChanged { ca: *ca }])
    }

    /// The rotation, where it is to this CA: whoever means another one comes too late.
    fn rotating(&mut self, ca: &CaFingerprint) -> Result<&mut Rotation, Refusal> {
        self.rotation.as_mut().filter(|rotation| rotation.ca() == *ca).ok_or(Refusal::StaleRotation)
    }
}
