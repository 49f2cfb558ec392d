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

/// Runs it.
pub fn run() -> Result<Section> {
    let mut section =
        Section::new("Planner", "Milliseconds a plan, one thread, workers of unequal memory.");
    for (layers, workers) in [(32, 8), (128, 64)] {
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
        // Room for all layers on average one and a half times over.
        let share = u64::from(layers) * (3 << 29) / u64::from(workers);
        let candidate = |number: u32| Candidate {
            node: NodeId::worker(number),
            device: "cpu".to_owned(),
            budget: Bytes(share / 2 + share * u64::from(number) / u64::from(workers) + (2 << 30)),
            used: Bytes(0),
            numerics: vec![Numerics::N1],
            sibling: false,
            // Each a little faster than the one before: none is like another.
            rate: Rate::said((8 << 30) + (u64::from(number) << 30)),
            zone: None,
            speaks_ranks: true,
            ranks_most: 8,
        };
        let inventory =
            Inventory { workers: (1..=workers).map(candidate).collect(), ..Inventory::default() };
        let shape = ModelShape::Pretend(pretend);
        let mesh = Some(MeshAsked::Auto);
        let asks = [
            ("", MeshAsk::default()),
            (", --mesh auto", MeshAsk { mesh, ..MeshAsk::default() }),
            (
                ", --mesh auto --objective throughput",
                MeshAsk { mesh, objective: Some(Objective::Throughput), reduction: None, kv: None },
            ),
        ];
        for (words, ask) in asks {
            let job = Job {
                replica: ReplicaId(1),
                generation: Generation(1),
                spec: &spec,
                shape: &shape,
                previous: None,
                replicas: 1,
                ask,
            };
            plan(&inventory, &job)
                .map_err(|refusal| anyhow!("the bench's cluster is too small: {refusal}"))?;
            let took = nanoseconds(|| plan(&inventory, &job)).map(|ns| ns / 1e6);
            section.seen(format!("{layers} layers on {workers} workers{words}"), took.to_string());
        }
    }
    Ok(section)
}
