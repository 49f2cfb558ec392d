//! The planner: how long a whole plan takes.

use anyhow::{Result, anyhow};
use shoal_coordinator::control::planner::{Candidate, Inventory, Job, Rate, plan};
use shoal_coordinator::control::shape::ModelShape;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::mesh::{MeshAsk, MeshAsked, Objective};
use shoal_protocol::plan::{DeploymentSpec, ModelRef, ModelSource, Numerics, PretendSpec};
use shoal_protocol::units::Bytes;

use super::nanoseconds;
use crate::measure::report::Section;

/// What a plan of the largest cluster may take, in milliseconds.
const GOAL_MS: f64 = 10.0;

/// The largest cluster and model that the goal is promised for.
const LARGEST: (u32, u32) = (128, 64);

/// How unlike the workers are.
#[derive(Clone, Copy)]
enum Workers {
    /// All have the same rate and memory.
    Alike,
    /// Every other one has half of both.
    TwoKinds,
    /// No two have the same.
    Different,
}

impl Workers {
    const ALL: [(&str, Self); 3] = [
        ("alike", Self::Alike),
        ("of two kinds", Self::TwoKinds),
        ("all different", Self::Different),
    ];

    /// Which part of the most memory and of the highest rate worker `number` of `workers` has, in percent.
    fn percent(self, number: u32, workers: u32) -> (u64, u64) {
        let step = 100 * u64::from(number) / u64::from(workers);
        match self {
            Self::Alike => (100, 100),
            Self::TwoKinds if number.is_multiple_of(2) => (50, 50),
            Self::TwoKinds => (100, 100),
            // Not the same order: the fastest are not the roomiest.
            Self::Different => (50 + (step * 37) % 100 / 2, 10 + step * 9 / 10),
        }
    }

    fn inventory(self, layers: u32, workers: u32) -> Inventory {
        // Room for all layers on average one and a half times over, where none has less than another.
        let share = u64::from(layers) * (3 << 29) / u64::from(workers) + (2 << 30);
        let candidate = |number: u32| {
            let (memory, rate) = self.percent(number, workers);
            Candidate {
                node: NodeId::worker(number),
                device: "cpu".to_owned(),
                budget: Bytes(share * memory / 75),
                used: Bytes(0),
                numerics: vec![Numerics::N1],
                sibling: false,
                rate: Rate::said((100 << 30) * rate / 100),
                zone: None,
                speaks_ranks: true,
                ranks_most: 8,
                machine: None,
            }
        };
        Inventory { workers: (1..=workers).map(candidate).collect(), ..Inventory::default() }
    }
}

/// Runs it.
pub fn run() -> Result<Section> {
    let mut section = Section::new(
        "Planner",
        "Milliseconds a plan, one thread. Workers alike, of two kinds (every other one with half the rate and memory), \
         and all different. That nothing better exists is the test `no_layout_is_better_than_the_one_that_is_chosen` \
         and those beside it.",
    );
    for (layers, workers) in [(32, 8), LARGEST] {
        for (name, kind) in Workers::ALL {
            measure(&mut section, (layers, workers), name, &kind.inventory(layers, workers))?;
        }
    }
    Ok(section)
}

fn measure(
    section: &mut Section,
    (layers, workers): (u32, u32),
    name: &str,
    inventory: &Inventory,
) -> Result<()> {
    let pretend = PretendSpec {
        layers,
        hidden: 8192,
        vocab: 128_000,
        max_context: 8192,
        seed: 1,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes: 1 << 30,
    };
    let spec = DeploymentSpec {
        name: DeploymentName::new("bench")?,
        model: ModelRef { source: ModelSource::Pretend(pretend.clone()), fingerprint: [0; 32] },
        stages: None,
        precision: None,
    };
    let shape = ModelShape::Pretend(pretend);
    let mesh = Some(MeshAsked::Auto);
    let latency = MeshAsk { mesh, ..MeshAsk::default() };
    let throughput = MeshAsk { objective: Some(Objective::Throughput), ..latency };
    let pure = MeshAsk {
        mesh: Some(format!("{workers}x1").parse::<MeshAsked>().map_err(|e| anyhow!(e))?),
        ..latency
    };
    let asks = [
        ("nothing asked", MeshAsk::default()),
        ("--mesh auto", latency),
        ("--mesh auto --objective throughput", throughput),
        ("a stage on each", pure),
    ];
    for (words, ask) in asks {
        let job = |previous| Job {
            replica: ReplicaId(1),
            generation: Generation(1),
            spec: &spec,
            shape: &shape,
            previous,
            replicas: 1,
            ask,
        };
        let made = plan(inventory, &job(None))
            .map_err(|refusal| anyhow!("the bench's cluster is too small: {refusal}"))?;
        let mut figure = |what: String, previous| {
            let took = nanoseconds(|| plan(inventory, &job(previous))).map(|ns| ns / 1e6);
            match (layers, workers) {
                LARGEST => section.at_most(what, took.median(), took.to_string(), GOAL_MS),
                _ => section.seen(what, took.to_string()),
            }
        };
        let what = format!(
            "{layers} layers, {workers} workers {name}, {words} (it chooses {})",
            made.mesh()
        );
        figure(what, None);
        if ask.is_measured() {
            figure(format!("the same, {words}, over the layout that is there"), Some(&made));
        }
    }
    Ok(())
}
