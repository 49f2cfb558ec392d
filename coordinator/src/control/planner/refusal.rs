//! Why there is no layout, with the arithmetic: what each stage needs, what each worker has, and
//! what would do. What would do is not estimated but planned again.

use std::fmt;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::MeshAsked;
use shoal_protocol::plan::{Numerics, Precision, ShardMemory};
use shoal_protocol::units::{Bytes, LayerRange};

use super::memory::{self, Costs};
use super::split::RankSums;
use super::{Candidate, Job, fits, placement};

/// The most workers that are tried as an addition: a refusal that asks for more helps nobody.
const MORE_WORKERS_MAX: usize = 256;

/// The most lines of a list that are printed: the message has to fit a wire error.
const LINES_MAX: usize = 12;

/// Why there is no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanRefusal {
    /// Nothing to place anything on.
    #[error(
        "no worker is connected; start one with `shoal worker --join ADDR --token T --data DIR`"
    )]
    NoWorkers,
    /// No worker keeps the arithmetic.
    #[error(
        "none of the {workers} connected workers computes under contract {numerics}; upgrade them"
    )]
    NoNumerics {
        /// The contract.
        numerics: Numerics,
        /// How many workers there are.
        workers: usize,
    },
    /// A mesh without stages.
    #[error("a model cannot be split into 0 stages; give --stages 1 or more, or leave it out")]
    NoStages,
    /// More stages than layers.
    #[error(
        "{stages} stages were asked for, but the model has {layers} layers; a stage has one at least: give {layers} \
         or fewer"
    )]
    TooManyStages {
        /// The stages that were asked for.
        stages: u32,
        /// The model's layers.
        layers: u32,
    },
    /// More stages than workers.
    #[error("{stages} stages were asked for, but {workers} workers are connected and each takes one stage of a replica; start {} more, or give --stages {workers}", *stages as usize - workers)]
    TooFewWorkers {
        /// The stages that were asked for.
        stages: u32,
        /// The workers that are connected.
        workers: usize,
    },
    /// Not enough memory.
    #[error("{0}")]
    DoesNotFit(Box<DoesNotFit>),
    /// More ranks than the model can be split into.
    #[error("{0}")]
    TooManyRanks(RankSums),
    /// More shards than workers.
    #[error("{}", too_few(*stages, *ranks, *workers, (*most, *layers)))]
    TooFewForMesh {
        /// The stages that were asked for.
        stages: u32,
        /// The ranks of each.
        ranks: u32,
        /// The workers that are connected.
        workers: usize,
        /// The most ranks that the model can be split into.
        most: u32,
        /// The model's layers.
        layers: u32,
    },
    /// Not enough workers that know of ranks.
    #[error(
        "of {workers} connected workers {able} know of tensor ranks (protocol version 3): too few for this \
         mesh; upgrade the others, or give a mesh with one rank"
    )]
    NoRanks {
        /// How many know of them.
        able: usize,
        /// How many there are.
        workers: usize,
    },
    /// Not enough memory for a mesh.
    #[error("{0}")]
    MeshDoesNotFit(Box<MeshFit>),
}

/// The arithmetic of a mesh that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshFit {
    /// Its stages.
    pub stages: u32,
    /// The ranks of each.
    pub ranks: u32,
    /// The precision that was planned for.
    pub precision: Precision,
    /// What the largest shard of an even cut needs at the least.
    pub least: Bytes,
    /// What each worker has left, of which budget.
    pub workers: Vec<(NodeId, Bytes, Bytes)>,
}

impl fmt::Display for MeshFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stages, ranks, precision, least, workers } = self;
        writeln!(
            f,
            "mesh {stages}x{ranks} does not fit in {precision} on these workers: cut evenly, its largest \
             shard needs at least {least}"
        )?;
        room(f, workers)?;
        f.write_str(
            "Give more stages, or ranks where the model has more to share, a smaller --precision, or the workers more \
             memory",
        )?;
        let taken = workers.iter().any(|(_, free, budget)| free < budget);
        f.write_str(if taken { "; or undeploy what is there (`shoal status`)." } else { "." })
    }
}

/// What workers have left, of which budgets.
fn room(f: &mut fmt::Formatter<'_>, workers: &[(NodeId, Bytes, Bytes)]) -> fmt::Result {
    for (node, free, budget) in workers.iter().take(LINES_MAX) {
        match budget.saturating_sub(*free) {
            Bytes(0) => writeln!(f, "  {node} has {free}")?,
            used => writeln!(f, "  {node} has {free}: {budget}, of which {used} is taken")?,
        }
    }
    more(f, workers.len(), "workers")
}

fn too_few(stages: u32, ranks: u32, workers: usize, (most, layers): (u32, u32)) -> String {
    // Of each number of ranks the mesh with the most stages.
    let meshes =
        (1..=most.min(workers as u32)).map(|ranks| ((workers as u32 / ranks).min(layers), ranks));
    let meshes: Vec<String> =
        meshes.take(LINES_MAX / 3).map(|(stages, ranks)| format!("{stages}x{ranks}")).collect();
    format!(
        "mesh {stages}x{ranks} has {} shards, and {workers} workers are connected, each of which takes one of a \
         replica; start more, or give --mesh {}",
        u64::from(stages) * u64::from(ranks),
        meshes.join(" or ")
    )
}

/// The arithmetic of a model that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// The precision that was planned for.
    pub precision: Precision,
    /// What each stage would need, at the least, in the cut that balances best.
    pub stages: Vec<StageNeed>,
    /// What each worker has left, of which budget.
    pub workers: Vec<(NodeId, Bytes, Bytes)>,
    /// The number of stages that was asked for.
    pub asked: Option<u32>,
    /// Where one was asked for, the nearest other one that would do on these workers.
    pub stages_instead: Option<u32>,
    /// How many more workers like the roomiest one would do; `None` where no number does.
    pub more_workers: Option<MoreWorkers>,
    /// A smaller precision that would do on these workers.
    pub smaller: Option<Precision>,
}

/// Workers that would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoreWorkers {
    /// How many.
    pub count: usize,
    /// Whether they are of use only with another number of stages than was asked for.
    pub open_stages: bool,
}

/// What one stage needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageNeed {
    /// Its layers.
    pub layers: LayerRange,
    /// What they need.
    pub memory: ShardMemory,
}

impl fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the model does not fit in {} on these workers.", self.precision)?;
        for (index, stage) in self.stages.iter().enumerate().take(LINES_MAX) {
            let ShardMemory { weights, kv, activations } = stage.memory;
            writeln!(
                f,
                "  stage {index}, layers {}, needs at least {} ({weights} weights, {kv} KV for the shortest useful context, {activations} activations)",
                stage.layers,
                stage.memory.total(),
            )?;
        }
        more(f, self.stages.len(), "stages")?;
        room(f, &self.workers)?;
        let needs: Bytes = self.stages.iter().map(|stage| stage.memory.total()).sum();
        let has: Bytes = self.workers.iter().map(|(_, free, _)| *free).sum();
        writeln!(f, "  in all: needs {needs}, has {has}")?;
        let mut ways = Vec::new();
        if let Some(stages) = self.stages_instead {
            ways.push(format!("--stages {stages} on these workers"));
        }
        if let Some(MoreWorkers { count, open_stages }) = self.more_workers {
            let (workers, with) = (if count == 1 { "worker" } else { "workers" }, self.roomiest());
            let stages = match (open_stages, self.asked) {
                (true, Some(asked)) => format!(" and another --stages than {asked} (or none)"),
                _ => String::new(),
            };
            ways.push(format!("{count} more {workers} with {with} each{stages}"));
        }
        if let Some(precision) = self.smaller {
            ways.push(format!("--precision {precision}"));
        }
        match ways.as_slice() {
            [] => f.write_str(
                "No number of such workers and no smaller precision would do: one layer alone needs more than a worker has. Give the workers more memory (`--memory`; `shoal up --worker-memory`).",
            ),
            ways => write!(f, "It would fit with {}, or with more memory a worker.", ways.join(", or with ")),
        }
    }
}

impl DoesNotFit {
    fn roomiest(&self) -> Bytes {
        self.workers.iter().map(|(_, _, budget)| *budget).max().unwrap_or_default()
    }
}

fn more(f: &mut fmt::Formatter<'_>, len: usize, what: &str) -> fmt::Result {
    if len > LINES_MAX {
        writeln!(f, "  and {} more {what}", len - LINES_MAX)?;
    }
    Ok(())
}

impl PlanRefusal {
    /// The code under which it crosses a wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            PlanRefusal::NoWorkers
            | PlanRefusal::NoNumerics { .. }
            | PlanRefusal::NoRanks { .. } => ErrorCode::NotReady,
            PlanRefusal::NoStages
            | PlanRefusal::TooManyStages { .. }
            | PlanRefusal::TooManyRanks(_) => ErrorCode::InvalidRequest,
            PlanRefusal::TooFewWorkers { .. }
            | PlanRefusal::TooFewForMesh { .. }
            | PlanRefusal::DoesNotFit(_)
            | PlanRefusal::MeshDoesNotFit(_) => ErrorCode::DoesNotFit,
        }
    }

    /// Whether more or other workers can help.
    pub fn is_of_the_cluster(&self) -> bool {
        !matches!(
            self,
            PlanRefusal::NoStages
                | PlanRefusal::TooManyStages { .. }
                | PlanRefusal::TooManyRanks(_)
        )
    }
}

impl From<PlanRefusal> for WireError {
    fn from(refusal: PlanRefusal) -> Self {
        WireError::new(refusal.code(), refusal.to_string())
    }
}

/// Works out the arithmetic for a model that does not fit on these workers in this many stages.
pub(super) fn does_not_fit(
    job: &Job<'_>,
    costs: &Costs<'_>,
    workers: &[&Candidate],
    stages: usize,
) -> PlanRefusal {
    let asked = match job.ask.mesh {
        Some(MeshAsked::Exactly(mesh)) => Some(mesh.stages),
        Some(MeshAsked::Auto) => None,
        None => job.spec.stages,
    };
    let stages_instead = asked.and_then(|asked| stages_instead(costs, workers, asked));
    PlanRefusal::DoesNotFit(Box::new(DoesNotFit {
        precision: costs.precision(),
        stages: needs(costs, stages),
        workers: workers.iter().map(|w| (w.node, w.free(), w.budget)).collect(),
        asked,
        stages_instead,
        more_workers: enough_workers(costs, workers, asked, stages_instead.is_some()),
        smaller: smaller(job, costs, workers, asked),
    }))
}

/// The number of stages nearest to what was asked for that fits on these workers; of two the larger.
fn stages_instead(costs: &Costs<'_>, workers: &[&Candidate], asked: u32) -> Option<u32> {
    let (shape, held) = (costs.shape(), (costs.precision(), costs.kv()));
    let most = shape.layers().min(u32::try_from(workers.len()).unwrap_or(u32::MAX));
    let mut others: Vec<u32> = (1..=most).filter(|stages| *stages != asked).collect();
    others.sort_by_key(|stages| (stages.abs_diff(asked), std::cmp::Reverse(*stages)));
    others.into_iter().find(|stages| fits(shape, held, workers, Some(*stages)))
}

/// Workers that would do with the stages that were asked for; where none do, and no other number of stages
/// does on the workers that there are, those that would do with another number.
fn enough_workers(
    costs: &Costs<'_>,
    workers: &[&Candidate],
    asked: Option<u32>,
    fits_otherwise: bool,
) -> Option<MoreWorkers> {
    let enough = |asked, open_stages| {
        more_workers(costs, workers, asked).map(|count| MoreWorkers { count, open_stages })
    };
    let is_bound = asked.is_some() && !fits_otherwise;
    enough(asked, false).or_else(|| enough(None, true).filter(|_| is_bound))
}

/// The cut that workers without a bound would get, under the least generous limits.
fn needs(costs: &Costs<'_>, stages: usize) -> Vec<StageNeed> {
    let endless: Vec<_> = (1..=stages as u32)
        .map(|number| Candidate {
            node: NodeId::worker(number),
            device: String::new(),
            budget: Bytes(u64::MAX),
            used: Bytes(0),
            numerics: Vec::new(),
            sibling: false,
            rate: None,
            zone: None,
            speaks_ranks: false,
            ranks_most: 0,
            machine: None,
        })
        .collect();
    let endless: Vec<_> = endless.iter().collect();
    let Some(least) = memory::limits_to_try(costs, stages).pop() else { return Vec::new() };
    let cuts = placement::cut(costs, &least, &endless, stages).unwrap_or_default();
    let memory = |layers| costs.memory(layers, &least);
    cuts.iter().map(|cut| StageNeed { layers: cut.layers, memory: memory(cut.layers) }).collect()
}

/// The least number of workers like the roomiest one, with nothing else on them, that would do in so many
/// stages, or in any number. More workers never make a model fit worse, so the number is found by halving.
fn more_workers(costs: &Costs<'_>, workers: &[&Candidate], asked: Option<u32>) -> Option<usize> {
    let (shape, held) = (costs.shape(), (costs.precision(), costs.kv()));
    let model = workers.iter().max_by_key(|worker| worker.budget)?;
    let extra = Candidate { used: Bytes(0), ..(*model).clone() };
    let most = (shape.layers() as usize).min(MORE_WORKERS_MAX);
    let fits_with = |n: usize| {
        let mut workers = workers.to_vec();
        workers.extend(std::iter::repeat_n(&extra, n));
        fits(shape, held, &workers, asked)
    };
    if !fits_with(most) {
        return None;
    }
    let (mut fitting, mut not) = (most, 0);
    while fitting - not > 1 {
        let middle = not + (fitting - not) / 2;
        if fits_with(middle) {
            fitting = middle;
        } else {
            not = middle;
        }
    }
    Some(fitting)
}

/// The largest smaller precision that fits these workers; of two of the same size the stored one.
fn smaller(
    job: &Job<'_>,
    costs: &Costs<'_>,
    workers: &[&Candidate],
    asked: Option<u32>,
) -> Option<Precision> {
    let half = match job.shape.stored() {
        Precision::F16 => Precision::F16,
        _ => Precision::Bf16,
    };
    [half, Precision::Q8_0, Precision::Q4K].into_iter().find(|choice| {
        choice.is_smaller_than(costs.precision())
            && fits(job.shape, (*choice, costs.kv()), workers, asked)
    })
}
