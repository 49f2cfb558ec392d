//! The planner: how long a whole plan takes.

use anyhow::{Result, anyhow};
use shoal_coordinator::control::planner::{Candidate, Inventory, Job, Rate, plan};
use shoal_coordinator::control::shape::ModelShape;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::mesh::{MeshAsk, MeshAsked, Objective, ZoneName};
use shoal_protocol::model::ModelSpec;
use shoal_protocol::plan::{
    DeploymentSpec, ModelRef, ModelSource, Numerics, Precision, PretendSpec,
};
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
    /// No two have the same, and so many zones.
    Zones(u32),
}

impl Workers {
    const ALL: [(&str, Self); 6] = [
        ("alike", Self::Alike),
        ("of two kinds", Self::TwoKinds),
        ("all different", Self::Different),
        ("all different, in 3 zones", Self::Zones(3)),
        ("all different, in 16 zones", Self::Zones(16)),
        ("all different, in 64 zones", Self::Zones(64)),
    ];

    /// Which part of the most memory and of the highest rate worker `number` of `workers` has, in percent.
    fn percent(self, number: u32, workers: u32) -> (u64, u64) {
        let step = 100 * u64::from(number) / u64::from(workers);
        match self {
            Self::Alike => (100, 100),
            Self::TwoKinds if number.is_multiple_of(2) => (50, 50),
            Self::TwoKinds => (100, 100),
            // Not the same order: the fastest are not the roomiest.
            Self::Different | Self::Zones(_) => (50 + (step * 37) % 100 / 2, 10 + step * 9 / 10),
        }
    }

    fn zone(self, number: u32) -> Option<ZoneName> {
        match self {
            Self::Zones(zones) => ZoneName::new(format!("z{}", number % zones)).ok(),
            _ => None,
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
                zone: self.zone(number),
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
         and all different, in one zone or in several. A pretend model, whose layers are a number; at the end real shapes, \
         whose tensors are counted. That nothing better exists is the test `no_layout_is_better_than_the_one_that_is_chosen` \
         and those beside it, which look at every layout there is: of all clusters of up to four workers of four kinds with \
         every mesh, and of drawn ones of five to ten workers that all differ.",
    );
    for (layers, workers) in [(32, 8), LARGEST] {
        for (name, kind) in Workers::ALL {
            let shape = ModelShape::Pretend(pretend(layers));
            measure(
                &mut section,
                (layers, workers),
                (name, shape),
                &kind.inventory(layers, workers),
            )?;
        }
    }
    for (name, config) in SHAPES {
        let shape = ModelShape::Checkpoint(ModelSpec::from_config_json(config)?);
        let layers = shape.layers();
        // Room for layers of 12 GiB and more, and for caches without number.
        let mut inventory = Workers::Different.inventory(12 * layers, LARGEST.1);
        inventory.workers.iter_mut().for_each(|worker| worker.budget = Bytes(2 * worker.budget.0));
        let name = format!("all different, {name}");
        measure(&mut section, (layers, LARGEST.1), (&name, shape), &inventory)?;
    }
    Ok(section)
}

/// A model of numbers alone.
fn pretend(layers: u32) -> PretendSpec {
    PretendSpec {
        layers,
        hidden: 8192,
        vocab: 128_000,
        max_context: 8192,
        seed: 1,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes: 1 << 30,
    }
}

/// Models of many tensors: the largest Llama, and the widest mixture of experts.
const SHAPES: [(&str, &str); 2] = [
    (
        "shaped like Llama 3.1 405B",
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
            "num_attention_heads": 128, "num_key_value_heads": 8, "num_hidden_layers": 126,
            "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}"#,
    ),
    (
        "shaped like DeepSeek V3",
        r#"{"architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61,
            "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128,
            "vocab_size": 129280, "max_position_embeddings": 163840, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4,
            "first_k_dense_replace": 3}"#,
    ),
];

fn measure(
    section: &mut Section,
    (layers, workers): (u32, u32),
    (name, shape): (&str, ModelShape),
    inventory: &Inventory,
) -> Result<()> {
    let spec = DeploymentSpec {
        name: DeploymentName::new("bench")?,
        model: ModelRef { source: ModelSource::Pretend(pretend(1)), fingerprint: [0; 32] },
        stages: None,
        precision: Some(Precision::Bf16),
    };
    let mesh = Some(MeshAsked::Auto);
    let latency = MeshAsk { mesh, ..MeshAsk::default() };
    let throughput = MeshAsk { objective: Some(Objective::Throughput), ..latency };
    let of = |stages: u32| -> Result<MeshAsk> {
        let mesh = format!("{stages}x1").parse::<MeshAsked>().map_err(|e| anyhow!(e))?;
        Ok(MeshAsk { mesh: Some(mesh), ..latency })
    };
    let most = workers.min(layers);
    let asks = [
        ("nothing asked", MeshAsk::default()),
        ("--mesh auto", latency),
        ("--mesh auto --objective throughput", throughput),
        ("as many stages as can be", of(most)?),
        ("three quarters of that", of(most * 3 / 4)?),
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
        // A refusal is an answer too, and may take no longer.
        let made = plan(inventory, &job(None)).ok();
        let mut figure = |what: String, previous| {
            let took = nanoseconds(|| plan(inventory, &job(previous))).map(|ns| ns / 1e6);
            match workers == LARGEST.1 {
                true => section.at_most(what, took.median(), took.to_string(), GOAL_MS),
                false => section.seen(what, took.to_string()),
            }
        };
        let chosen = match &made {
            Some(plan) => format!("it chooses {}", plan.mesh()),
            None => "it refuses".to_owned(),
        };
        figure(format!("{layers} layers, {workers} workers {name}, {words} ({chosen})"), None);
        if let Some(made) = made.as_ref().filter(|_| ask.is_measured()) {
            figure(format!("the same, {words}, over the layout that is there"), Some(made));
        }
    }
    Ok(())
}
