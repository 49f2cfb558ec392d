//! Meshes: what an operator asks of the planner beyond a number of stages, and what a worker says of itself
//! that the planner goes by. Since version 3; what was there before keeps its shape.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{BadId, NodeId};
use crate::numerics::{Activations, KvPrecision, Numerics};

/// The most facts that a worker may say: its zone and ranks, a rate for each of its devices, and a link to
/// each of a few hundred peers.
pub const FACTS_MAX: usize = 1024;

/// The device of a [`Fact::Rate`] that tells what all processors of a worker's machine read together: what its
/// workers share.
pub const MACHINE: &str = "machine";

/// The most stages or ranks of a mesh that is written out: a typing error, rather than a cluster.
const SIDE_MAX: u32 = 4096;

/// `stages x ranks`: `4x2` is four pipeline stages of two tensor ranks each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mesh {
    /// Pipeline stages.
    pub stages: u32,
    /// Tensor ranks of each.
    pub ranks: u32,
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.stages, self.ranks)
    }
}

impl FromStr for Mesh {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| text.parse().ok().filter(|side| (1..=SIDE_MAX).contains(side));
        let mesh = text
            .split_once(['x', 'X'])
            .and_then(|(stages, ranks)| Some(Self { stages: side(stages)?, ranks: side(ranks)? }));
        mesh.ok_or_else(|| {
            format!("`{text}` is no mesh; write STAGESxRANKS, such as 2x2, 4x1 or 1x2, or `auto`")
        })
    }
}

/// Which mesh is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MeshAsked {
    /// Whichever serves the objective best; stages may have different numbers of ranks.
    Auto,
    /// This one.
    Exactly(Mesh),
}

impl fmt::Display for MeshAsked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MeshAsked::Auto => f.write_str("auto"),
            MeshAsked::Exactly(mesh) => mesh.fmt(f),
        }
    }
}

impl FromStr for MeshAsked {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(MeshAsked::Auto),
            _ => text.parse().map(MeshAsked::Exactly),
        }
    }
}

/// What a layout is to be good at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Objective {
    /// The least time for one token of one stream.
    #[default]
    Latency,
    /// The most tokens of many streams: the slowest stage is as fast as can be.
    Throughput,
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Objective::Latency => "latency",
            Objective::Throughput => "throughput",
        })
    }
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latency" => Ok(Objective::Latency),
            "throughput" => Ok(Objective::Throughput),
            _ => Err(format!("`{text}` is not an objective; use latency or throughput")),
        }
    }
}

/// How the ranks of a stage put their results together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Reduction {
    /// Partial sums, added in rank order: the fastest; the last bits depend on the mesh.
    #[default]
    Sum,
    /// Every output is summed by one rank, as if there were no others: the bits of an unsplit model.
    Exact,
}

impl Reduction {
    /// What a contract asks for.
    pub fn of(numerics: Numerics) -> Self {
        if numerics.sums() { Reduction::Sum } else { Reduction::Exact }
    }
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reduction::Sum => "sum",
            Reduction::Exact => "exact",
        })
    }
}

impl FromStr for Reduction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "sum" => Ok(Reduction::Sum),
            "exact" => Ok(Reduction::Exact),
            _ => Err(format!("`{text}` is not a reduction; use exact or sum")),
        }
    }
}

/// What is asked of the planner. Where nothing is said, a deployment has a stage for each worker of its
/// share, and layers are spread over them evenly; with `scale`, it is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MeshAsk {
    /// The mesh.
    pub mesh: Option<MeshAsked>,
    /// What it is to be good at.
    pub objective: Option<Objective>,
    /// How ranks come to one result.
    pub reduction: Option<Reduction>,
    /// How keys and values are held: f32 where nothing is said. It is chosen for good when a model is
    /// deployed, as the precision of weights is, since streams go on under the same contract alone.
    pub kv: Option<KvPrecision>,
    /// What rows are in products with whole numbers: f32 where nothing is said. As `kv`, chosen for good.
    pub activations: Option<Activations>,
}

impl MeshAsk {
    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the planner is to choose by what was measured, instead of evenly.
    pub fn is_measured(&self) -> bool {
        self.mesh.is_some() || self.objective.is_some()
    }

    /// This, and of `before` what this does not say; the contract's parts stay as they were in any case.
    pub fn or(self, before: Self) -> Self {
        Self {
            mesh: self.mesh.or(before.mesh),
            objective: self.objective.or(before.objective),
            reduction: self.reduction.or(before.reduction),
            kv: before.kv,
            activations: before.activations,
        }
    }
}

impl fmt::Display for MeshAsk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mesh = self.mesh.map(|mesh| format!("mesh {mesh}"));
        let objective = self.objective.map(|objective| format!("objective {objective}"));
        let reduction = self.reduction.map(|reduction| format!("reduction {reduction}"));
        let kv = self.kv.map(|kv| format!("KV {kv}"));
        let activations = self.activations.map(|activations| format!("activations {activations}"));
        let said: Vec<_> =
            [mesh, objective, reduction, kv, activations].into_iter().flatten().collect();
        f.write_str(if said.is_empty() { "a stage for each worker" } else { "" })?;
        f.write_str(&said.join(", "))
    }
}

/// The name of a failure domain: a rack, a room, a host. Workers of one zone are lost together, and reach
/// each other faster than others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ZoneName(String);

impl ZoneName {
    /// The longest name, in bytes.
    pub const LEN_MAX: usize = 64;

    /// Checks the name: 1 to 64 of `A-Z a-z 0-9 . _ -`, beginning with a letter or a digit.
    pub fn new(name: impl Into<String>) -> Result<Self, BadId> {
        let name = name.into();
        let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if first && name.len() <= Self::LEN_MAX && name.bytes().all(rest) {
            return Ok(Self(name));
        }
        Err(BadId {
            text: name.chars().take(Self::LEN_MAX).collect(),
            expected: "a zone: at most 64 letters, digits and . _ - that begin with a letter or a digit",
        })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ZoneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ZoneName {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        Self::new(text)
    }
}

impl<'de> Deserialize<'de> for ZoneName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// One thing that a worker says of itself, besides its registration. A new one stands at the end, and is
/// said only to coordinators that speak the version that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// Its failure domain.
    Zone(ZoneName),
    /// It computes as one of up to so many tensor ranks.
    Ranks {
        /// How many at most.
        most: u32,
    },
    /// What its kernels read of weights, measured at its start.
    Rate {
        /// The device.
        device: String,
        /// The compute threads with which that was.
        threads: u32,
        /// Bytes in a second.
        bytes_per_s: u64,
    },
    /// What it measured of the way to another worker.
    Link {
        /// The other one.
        to: NodeId,
        /// One way, in microseconds.
        latency_us: u32,
        /// Bytes in a second, where that was measured.
        bytes_per_s: Option<u64>,
    },
    /// A shard of its waits for a link with another worker, and that does not come up.
    Missing {
        /// The other one.
        to: NodeId,
    },
}

/// What a worker has said of itself.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Facts {
    /// Its failure domain.
    pub zone: Option<ZoneName>,
    /// It computes as one of up to so many ranks; 0 where it has not said.
    pub ranks_most: u32,
    /// Weight bytes in a second, by device.
    pub rates: BTreeMap<String, u64>,
    /// Microseconds one way, and bytes in a second, to other workers.
    pub links: BTreeMap<NodeId, (u32, Option<u64>)>,
    /// Workers with which its shards are not linked though they should be.
    pub missing: BTreeSet<NodeId>,
}

impl Facts {
    /// Of a list: what is said twice counts as it was said last.
    pub fn of(list: Vec<Fact>) -> Self {
        let mut facts = Self::default();
        for fact in list {
            match fact {
                Fact::Zone(zone) => facts.zone = Some(zone),
                Fact::Ranks { most } => facts.ranks_most = most,
                Fact::Rate { device, bytes_per_s, .. } => {
                    facts.rates.insert(device, bytes_per_s);
                }
                Fact::Link { to, latency_us, bytes_per_s } => {
                    facts.links.insert(to, (latency_us, bytes_per_s));
                }
                Fact::Missing { to } => {
                    facts.missing.insert(to);
                }
            }
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meshes_are_read_as_people_write_them() {
        let mesh = |stages, ranks| Ok(MeshAsked::Exactly(Mesh { stages, ranks }));
        for (text, expected) in
            [("2x2", mesh(2, 2)), ("4X1", mesh(4, 1)), ("auto", Ok(MeshAsked::Auto))]
        {
            assert_eq!(text.parse(), expected);
        }
        for text in ["", "2", "x2", "0x1", "1x0", "2x2x2", "2x", "9999x1"] {
            let error = text.parse::<MeshAsked>().unwrap_err();
            assert!(error.contains("STAGESxRANKS"), "{error}");
        }
    }

    #[test]
    fn zones_are_checked_also_where_they_come_over_a_wire() {
        for text in ["a", "rack-7", "eu.west_1"] {
            assert_eq!(text.parse::<ZoneName>().unwrap().as_str(), text);
        }
        for text in ["", "-a", "a b", "ä", &"x".repeat(65)] {
            assert!(text.parse::<ZoneName>().is_err(), "{text:?}");
            let bytes = postcard::to_stdvec(text).unwrap();
            assert!(postcard::from_bytes::<ZoneName>(&bytes).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_a_scale_does_not_say_stays() {
        let before = MeshAsk {
            mesh: Some(MeshAsked::Auto),
            objective: Some(Objective::Throughput),
            reduction: None,
            kv: Some(KvPrecision::Bf16),
            activations: Some(Activations::Int8),
        };
        let now = MeshAsk { objective: Some(Objective::Latency), ..MeshAsk::default() };
        assert_eq!(
            now.or(before).to_string(),
            "mesh auto, objective latency, KV bf16, activations int8"
        );
        // Streams would go on over another cache.
        let now = MeshAsk {
            kv: Some(KvPrecision::F32),
            activations: Some(Activations::F32),
            ..MeshAsk::default()
        };
        assert_eq!(now.or(before), before);
        assert!(MeshAsk::default().is_empty() && !MeshAsk::default().is_measured());
    }
}
