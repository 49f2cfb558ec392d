//! ○ Who speaks which version of the protocol, and which changes wait for whom.
//!
//! ```text
//! Change ─► needs ─► {log, workers} ─┬─► everybody concerned speaks it ─► proposed, applied
//!                                    └─► Refusal::HeldBack, with names
//! ```
//!
//! A rolling upgrade runs two builds side by side, so the log holds only what all coordinators can read,
//! and workers are told only what they can do. Two numbers go up and never down: [`Versions::log`],
//! once all coordinators have been heard to speak a version (`control::versions` hears them), and
//! [`Versions::workers`], once something was decided that older workers would not understand. Whoever
//! speaks less than these is refused by name: before that an upgrade can be taken back, afterwards not.
//!
//! A worker says its version when it registers; one of which nothing is known speaks version 1. One that
//! has never run holds nothing back: it is refused when it comes, if it comes too late.
//!
//! What this does not see: a new variant deep inside an old command (a precision, a numerics contract).
//! Whoever adds one gives the command that carries it a new variant here, or looks into it in [`needs`].
//! And what an old command comes to must be the same on every build, refusals too, or copies differ.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::{Incarnation, NodeId};
use shoal_protocol::plan::{Activations, KvPrecision, ModelSource, Precision};
use shoal_protocol::version::{
    KNOWS_ADAPTERS, KNOWS_ENCODERS, KNOWS_FAMILIES, KNOWS_FORMATS, KNOWS_HUB, KNOWS_KV,
    KNOWS_MESHES, KNOWS_NUMBERS,
};

use super::super::shape::ModelShape;
use super::{
    AdapterCommand, AuthorityCommand, Change, ClusterState, CoordinatorCommand, DeploymentCommand,
    DrainCommand, Effect, KeyCommand, NodeCommand, PlanCommand, Refusal, TokenCommand,
};

/// What a build speaks that has not said so, and the version of a cluster that knows nothing of versions.
pub(super) const FIRST: u16 = 1;

/// Nodes that a refusal names; it is kept in the state, and nobody reads more.
const NAMED_MAX: usize = 8;

/// Changes of who is known to speak what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum VersionCommand {
    /// All coordinators speak this version: from here on the log may hold what it brought.
    Raise {
        /// The version.
        to: u16,
        /// The start of each coordinator that was heard to speak it.
        heard: BTreeMap<NodeId, u64>,
    },
    /// As [`NodeCommand::Start`], with what that has no room for.
    Start {
        /// Who.
        node: NodeId,
        /// Its start number.
        incarnation: Incarnation,
        /// The version of its binary.
        build: String,
        /// The newest protocol version that it speaks.
        protocol: u16,
    },
    /// Every member speaks this version, and whoever comes later must: the end of an upgrade.
    Finish {
        /// The version.
        to: u16,
    },
}

/// Who is known to speak what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// 0 where it was never raised.
    log: u16,
    /// 0 where nothing newer was ever decided.
    workers: u16,
    /// The last registration of each worker that said a version.
    spoken: BTreeMap<NodeId, (Incarnation, u16)>,
}

/// What a change asks of those that it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// What coordinators must speak: they read every change.
    pub log: u16,
    /// What workers must speak: those that it reaches in the end.
    pub workers: u16,
}

impl Needs {
    /// What was there before there were versions.
    pub const NOTHING: Self = Self { log: FIRST, workers: FIRST };

    /// Only coordinators see anything of it.
    pub const fn coordinators(version: u16) -> Self {
        Self { log: version, workers: FIRST }
    }

    /// Workers are told of it too.
    pub const fn everybody(version: u16) -> Self {
        Self { log: version, workers: version }
    }

    /// What both need.
    pub fn and(self, other: Self) -> Self {
        Self { log: self.log.max(other.log), workers: self.workers.max(other.workers) }
    }
}

/// What a change needs. This is the one list: every command stands in it.
pub fn needs(change: &Change) -> Needs {
    match change {
        Change::Node(
            NodeCommand::Enrol { .. }
            | NodeCommand::Join { .. }
            | NodeCommand::Start { .. }
            | NodeCommand::Remove { .. },
        )
        | Change::Token(TokenCommand::Create { .. } | TokenCommand::Revoke { .. })
        | Change::Deployment(DeploymentCommand::Remove { .. } | DeploymentCommand::Scale { .. })
        | Change::Plan(
            PlanCommand::Promote { .. } | PlanCommand::Abandon { .. } | PlanCommand::Confirm { .. },
        )
        | Change::Coordinator(
            CoordinatorCommand::Announce { .. }
            | CoordinatorCommand::SetVoters { .. }
            | CoordinatorCommand::KeyReceived { .. }
            | CoordinatorCommand::Remove { .. },
        )
        | Change::Key(KeyCommand::Create { .. } | KeyCommand::Revoke { .. })
        | Change::Drain(DrainCommand::Begin { .. } | DrainCommand::End { .. }) => Needs::NOTHING,
        // Workers of older builds have no part in such a layout: the planner sees to that.
        Change::Deployment(DeploymentCommand::ScaleMesh { .. }) => {
            Needs::coordinators(KNOWS_MESHES)
        }
        Change::Deployment(DeploymentCommand::CreateMesh { spec, shape, ask, .. }) => {
            needs_of_model(&spec.model.source, shape)
                .and(needs_of_weights(spec.precision, shape.stored()))
                .and(needs_of_kv(ask.kv.unwrap_or_default()))
                .and(needs_of_activations(ask.activations.unwrap_or_default()))
                .and(Needs::coordinators(KNOWS_MESHES))
        }
        Change::Plan(PlanCommand::Adopt { plan } | PlanCommand::Prepare { plan, .. }) => {
            let sums = match plan.numerics.sums() {
                false => Needs::NOTHING,
                true => Needs::coordinators(KNOWS_MESHES),
            };
            sums.and(needs_of_kv(plan.numerics.kv()))
                .and(needs_of_activations(plan.numerics.activations()))
                .and(needs_of_weights(None, plan.precision))
        }
        Change::Deployment(DeploymentCommand::Create { spec, shape, .. }) => {
            needs_of_model(&spec.model.source, shape)
                .and(needs_of_weights(spec.precision, shape.stored()))
        }
        // It is what lets the others through: whoever proposes it has heard all coordinators.
        Change::Version(VersionCommand::Raise { .. }) => Needs::NOTHING,
        Change::Version(VersionCommand::Start { .. }) => Needs::coordinators(2),
        Change::Version(VersionCommand::Finish { to }) => Needs::everybody((*to).max(2)),
        // Older workers would know one CA for ever.
        Change::Authority(AuthorityCommand::Begin { .. }) => Needs::everybody(2),
        Change::Authority(
            AuthorityCommand::Reached { .. }
            | AuthorityCommand::SkipAbsent { .. }
            | AuthorityCommand::Sign { .. }
            | AuthorityCommand::Retire { .. }
            | AuthorityCommand::Abandon { .. }
            | AuthorityCommand::OwnKey { .. },
        ) => Needs::coordinators(2),
        // An older worker would answer for one with the base model's words.
        Change::Adapter(AdapterCommand::Load { .. }) => Needs::everybody(KNOWS_ADAPTERS),
        Change::Adapter(AdapterCommand::Unload { .. }) => Needs::coordinators(KNOWS_ADAPTERS),
    }
}

/// What it takes to be told of a model of such a shape.
fn needs_of_model(source: &ModelSource, shape: &ModelShape) -> Needs {
    let of_shape = match shape {
        ModelShape::Encoder(_) => Needs::everybody(KNOWS_ENCODERS),
        _ if shape.is_new() => Needs::everybody(KNOWS_FAMILIES),
        _ => Needs::NOTHING,
    };
    needs_of(source).and(of_shape)
}

/// What it takes to be told of a model: before it is deployed workers are asked whether they read it.
pub fn needs_of(source: &ModelSource) -> Needs {
    match source {
        ModelSource::Folder { .. } | ModelSource::Builtin { .. } | ModelSource::Pretend(_) => {
            Needs::NOTHING
        }
        ModelSource::Hub { .. } | ModelSource::HubGguf { .. } | ModelSource::ObjectStore { .. } => {
            Needs::everybody(KNOWS_HUB)
        }
    }
}

/// What weights need that are held or stored so: older builds cannot read such a precision.
fn needs_of_weights(asked: Option<Precision>, stored: Precision) -> Needs {
    match asked.is_some_and(Precision::is_quantised) || stored.is_quantised() {
        true => Needs::everybody(KNOWS_FORMATS),
        false => Needs::NOTHING,
    }
}

/// What it takes to be told of keys and values that are held so: a worker of an older build cannot read
/// the contract.
fn needs_of_kv(kv: KvPrecision) -> Needs {
    match kv {
        KvPrecision::F32 => Needs::NOTHING,
        KvPrecision::Bf16 | KvPrecision::Q8_0 => Needs::everybody(KNOWS_KV),
    }
}

/// The same of products of whole numbers.
fn needs_of_activations(activations: Activations) -> Needs {
    match activations {
        Activations::F32 => Needs::NOTHING,
        Activations::Int8 => Needs::everybody(KNOWS_NUMBERS),
    }
}

impl Versions {
    /// What a coordinator must speak to read the log.
    pub fn log(&self) -> u16 {
        self.log.max(FIRST)
    }

    /// What a worker must speak to be told what was decided.
    pub fn workers(&self) -> u16 {
        self.workers.max(FIRST)
    }

    /// What a worker said when it registered as this start.
    pub fn spoken(&self, node: NodeId, incarnation: Incarnation) -> Option<u16> {
        let (of, version) = self.spoken.get(&node)?;
        (*of == incarnation).then_some(*version)
    }

    /// Those of whom something is recorded.
    pub(super) fn recorded(&self) -> impl Iterator<Item = NodeId> {
        self.spoken.keys().copied()
    }

    /// Whether there is nothing that a build of version 1 does not know.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn forget(&mut self, node: NodeId) {
        self.spoken.remove(&node);
    }
}

impl ClusterState {
    /// The lowest protocol version of all members: of the coordinators, and of all workers that have
    /// ever run; 1 where it is not known.
    pub fn lowest_protocol(&self) -> u16 {
        let workers = self.nodes.workers().filter(|(_, node)| node.incarnation.is_some());
        let workers = workers.map(|(id, _)| self.protocol_of(id));
        workers.chain([self.versions.log()]).min().unwrap_or(FIRST)
    }

    /// The newest version that a member is known to speak: coordinators all what the log needs.
    pub fn protocol_of(&self, id: NodeId) -> u16 {
        if self.coordinators.get(id).is_some() {
            return self.versions.log();
        }
        let incarnation = self.nodes.get(id).and_then(|node| node.incarnation);
        incarnation.and_then(|start| self.versions.spoken(id, start)).unwrap_or(FIRST)
    }

    /// Whether all whom a change concerns understand it.
    pub fn permits(&self, change: &Change) -> Result<(), Refusal> {
        self.permits_needs(needs(change))
    }

    /// Whether all who need it speak so much.
    pub fn permits_needs(&self, needs: Needs) -> Result<(), Refusal> {
        let Needs { log, workers } = needs;
        let mut by: Vec<NodeId> = Vec::new();
        if self.versions.log() < log {
            by.extend(self.coordinators.iter().map(|(id, _)| id));
        }
        let ran = self.nodes.workers().filter(|(_, node)| node.incarnation.is_some());
        by.extend(ran.map(|(id, _)| id).filter(|id| self.protocol_of(*id) < workers));
        match by.is_empty() && self.versions.log() >= log {
            true => Ok(()),
            false => Err(held_back(log.max(workers), by)),
        }
    }

    /// What was decided must be understood by whoever comes later.
    pub(super) fn note_needs(&mut self, change: &Change) {
        let Needs { workers, .. } = needs(change);
        if workers > self.versions.workers() {
            self.versions.workers = workers;
        }
    }

    /// Whether a worker that starts understands what was decided before: whoever let it in may not have
    /// known of that.
    pub(super) fn keeps_up(&self, id: NodeId, protocol: u16) -> Result<(), Refusal> {
        match self.versions.workers() {
            needs if protocol < needs && self.nodes.get(id).is_some() => {
                Err(held_back(needs, vec![id]))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn change_versions(
        &mut self,
        command: &VersionCommand,
    ) -> Result<Vec<Effect>, Refusal> {
        match command {
            VersionCommand::Raise { to, .. } if *to <= self.versions.log() => Ok(Vec::new()),
            VersionCommand::Raise { to, heard } => {
                // One that has been started since, or has come since, may be of an older build.
                let missing = self.coordinators.iter();
                let missing = missing.filter(|(id, known)| heard.get(id) != Some(&known.boot));
                let missing: Vec<_> = missing.map(|(id, _)| id).collect();
                if !missing.is_empty() {
                    return Err(held_back(*to, missing));
                }
                self.versions.log = *to;
                Ok(vec![Effect::ProtocolRaised { to: *to }])
            }
            VersionCommand::Start { node, incarnation, build, protocol } => {
                self.keeps_up(*node, *protocol)?;
                let effects = self.nodes.start(*node, *incarnation, build)?;
                self.versions.spoken.insert(*node, (*incarnation, *protocol));
                Ok(effects)
            }
            // That it needs this version of everybody is what it says.
            VersionCommand::Finish { .. } => Ok(Vec::new()),
        }
    }
}

/// A refusal that names some of those who hold a change back, and counts the others.
pub fn held_back(needs: u16, mut by: Vec<NodeId>) -> Refusal {
    let more = by.len().saturating_sub(NAMED_MAX);
    by.truncate(NAMED_MAX);
    Refusal::HeldBack { needs, by, more: u32::try_from(more).unwrap_or(u32::MAX) }
}

/// Those who hold a change back, in words.
pub(super) fn names(by: &[NodeId], more: u32) -> String {
    let mut names: Vec<String> = by.iter().map(ToString::to_string).collect();
    if more > 0 {
        names.push(format!("{more} more"));
    }
    match names.split_last() {
        None => "that all speak it is not on record yet: try again in a second".into(),
        Some((last, [])) => format!("{last} is not known to speak it: {ADVICE}"),
        Some((last, others)) => {
            format!("{} and {last} are not known to speak it: {ADVICE}", others.join(", "))
        }
    }
}

const ADVICE: &str = "upgrade what runs an older build, or remove what is gone (`shoal nodes remove`, `shoal \
                      coordinators remove`)";

#[cfg(test)]
#[path = "versions_test.rs"]
mod tests;
