//! Large clusters, many zones, and mixtures of experts counted by hand.

use shoal_protocol::model::{LayerOptions, Moe, Scoring};

use super::*;

/// Three layers with experts: eight of width 256, of which a row uses two, and a shared one of 128 with a gate.
fn mixture() -> ModelShape {
    let ModelShape::Checkpoint(plain) = dense(3, 4) else { unreachable!("a checkpoint") };
    let moe = Moe {
        experts: 8,
        top_k: 2,
        intermediate: 256,
        scoring: Scoring::Softmax,
        normalise: true,
        scale: 1.0,
        groups: None,
        shared: Some(128),
        shared_gate: true,
        bias: false,
    };
    let layers = vec![LayerOptions { is_moe: true, ..LayerOptions::PLAIN }; 3];
    let options = Options { moe: Some(moe), layers, ..Options::default() };
    ModelShape::Checkpoint(ModelSpec { family: Family::Qwen2Moe, options, ..plain })
}

/// The stage of the middle layer, on workers that read a byte in a nanosecond.
fn middle(mesh_of: &str, reduction: Reduction) -> super::super::super::StageTime {
    let (shape, all) = (mixture(), inventory(&[1_000_000_000; 6]));
    let ask = MeshAsk { reduction: Some(reduction), ..mesh(mesh_of) };
    let plan = planned(&all, &shape, ask, None).unwrap();
    assert_eq!(plan.stages[1].layers, LayerRange::new(1, 2), "{}", words(&plan));
    predict(&plan, &shape, &all).stages[1]
}

#[test]
fn experts_cost_what_a_row_uses_of_them() {
    let hidden = 512;
    let (norms, attention) = (2 * hidden, 2 * hidden * 512 + 2 * hidden * 256);
    // Panels of 16 rows.
    let (router, gate) = (16 * hidden, 16 * hidden);
    let (expert, shared) = (3 * 256 * hidden, 3 * 128 * hidden);
    let alone = 4 * (norms + attention + router + 2 * expert + shared + gate);
    assert_eq!(middle("3x1", Reduction::Sum).compute_ns, alone);
    // The busier of two ranks has 1.429 of two experts on average: (12 x 2 + 16 x 1) / 28.
    let experts = 3 * (4 * (expert / 3) * 1429 / 1000);
    let cut = 4 * (norms + attention / 2 + router + shared / 2 + gate) + experts;
    let Link { latency_ns, bytes_per_s } = Link::NEAR;
    assert_eq!(bytes_per_s, 1_000_000_000);
    let sum = middle("3x2", Reduction::Sum);
    assert_eq!(sum.compute_ns, cut);
    // Attention's sum; that of experts and the shared one.
    assert_eq!(sum.told_ns, 2 * latency_ns + 2 * hidden * 4);
    // Attention's input and output, the results of two experts one by one, the shared one's input and output.
    let exact = middle("3x2", Reduction::Exact);
    assert_eq!(exact.told_ns, 5 * latency_ns + (512 + hidden + 2 * hidden + 128 + hidden) * 4 / 2);
}

#[test]
fn a_zone_for_each_of_many_workers_takes_no_longer_than_one_for_all() {
    let shape = pretend(128, GIB);
    for zones in [1, 4, 16, 64] {
        let workers = (1..=64).map(|n| {
            let memory = (4 * GIB) + u64::from(n) * GIB / 16;
            let zone = format!("z{:02}", n % zones);
            worker(n, memory, GIB * (80 + 3 * u64::from(n)) / 10, Some(&zone))
        });
        let all = Inventory { workers: workers.collect(), ..Inventory::default() };
        for objective in [Objective::Latency, Objective::Throughput] {
            for asked in ["auto", "64x1", "32x1"] {
                let ask = MeshAsk { objective: Some(objective), ..mesh(asked) };
                let start = std::time::Instant::now();
                let plan = planned(&all, &shape, ask, None);
                let took = start.elapsed();
                let made = plan.map_or_else(|_| "none".to_owned(), |plan| plan.mesh());
                println!("{zones} zones, {objective}, {asked}: {took:?}, mesh {made}");
                // Without optimisation, on a busy machine; the figure is `shoal-bench planner`'s.
                assert!(took.as_millis() <= 1000, "{zones} zones, {asked}: {took:?}");
            }
        }
    }
}

/// The guide's table says what the planner counts with (and `shard-worker/tests/ranks.rs`, what workers do).
#[test]
fn the_guide_states_what_ranks_tell_each_other() {
    let guide = include_str!("../../../../docs/operating.md");
    let ModelShape::Checkpoint(spec) = dense(32, 8) else { panic!("it is a checkpoint's") };
    let llama = ModelShape::Checkpoint(ModelSpec {
        hidden: 4096,
        heads: 32,
        head_dim: 128,
        intermediate: 14336,
        ..spec
    });
    for (reduction, row) in
        [(Reduction::Sum, "| `sum` |"), (Reduction::Exact, "| `exact`, dense |")]
    {
        let layers =
            (0..32).map(|layer| super::super::super::cost::told(&llama, layer, 2, reduction));
        let (rounds, bytes) = layers.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        let words = format!("| {rounds} rounds, {:.2} MiB |", bytes as f64 / MIB as f64);
        let stated = guide.lines().find(|line| line.starts_with(row)).expect("a row");
        assert!(stated.ends_with(&words), "{stated} should end with {words}");
    }
}
