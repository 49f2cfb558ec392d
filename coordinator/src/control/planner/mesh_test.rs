//! The planner of meshes: what it promises, case by case.

use shoal_protocol::id::{DeploymentName, Generation, NodeId, ReplicaId};
use shoal_protocol::mesh::{Mesh, MeshAsk, ZoneName};
use shoal_protocol::model::{Family, ModelSpec, Options, RopeScaling};
use shoal_protocol::plan::{DeploymentSpec, ModelRef, ModelSource, Precision, PretendSpec};

use super::super::tests::Numbers;
use super::super::{Link, ModelShape, Rate, is_torn, pair, plan as plan_job, predict};
use super::*;

#[path = "mesh_exact_test.rs"]
mod exact;

#[path = "half_test.rs"]
mod half;

#[path = "mesh_wide_test.rs"]
mod wide;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HERE: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn pretend(layers: u32, layer_bytes: u64) -> ModelShape {
    ModelShape::Pretend(PretendSpec {
        layers,
        hidden: 1024,
        vocab: 256,
        max_context: 2048,
        seed: 0,
        layer_step_ns: 0,
        layer_row_ns: 0,
        layer_weight_bytes: layer_bytes,
    })
}

fn dense(layers: u32, kv_heads: u32) -> ModelShape {
    ModelShape::Checkpoint(ModelSpec {
        family: Family::Llama,
        layers,
        hidden: 512,
        heads: 2 * kv_heads,
        kv_heads,
        head_dim: 64,
        intermediate: 2048,
        vocab: 5000,
        context_max: 512,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        options: Options::default(),
        stored: Precision::F32,
    })
}

/// A worker with so much memory that reads so many bytes in a second, and computes as a rank.
fn worker(number: u32, memory: u64, rate: u64, zone: Option<&str>) -> Candidate {
    Candidate {
        node: NodeId::worker(number),
        device: "cpu".into(),
        budget: Bytes(memory),
        used: Bytes(0),
        numerics: vec![Numerics::N1],
        sibling: false,
        rate: Rate::said(rate),
        zone: zone.map(|zone| ZoneName::new(zone).unwrap()),
        speaks_ranks: true,
        ranks_most: 8,
        machine: None,
    }
}

fn inventory(rates: &[u64]) -> Inventory {
    let workers = rates.iter().zip(1..).map(|(rate, n)| worker(n, 64 * GIB, *rate, None));
    Inventory { workers: workers.collect(), ..Inventory::default() }
}

fn mesh(text: &str) -> MeshAsk {
    MeshAsk { mesh: Some(text.parse().unwrap()), ..MeshAsk::default() }
}

fn planned(
    inventory: &Inventory,
    shape: &ModelShape,
    ask: MeshAsk,
    previous: Option<&ReplicaPlan>,
) -> Result<ReplicaPlan, PlanRefusal> {
    planned_as(inventory, shape, ask, previous, 1)
}

fn planned_as(
    inventory: &Inventory,
    shape: &ModelShape,
    ask: MeshAsk,
    previous: Option<&ReplicaPlan>,
    replicas: usize,
) -> Result<ReplicaPlan, PlanRefusal> {
    let source = ModelSource::Builtin { name: "m".into() };
    let spec = DeploymentSpec {
        name: DeploymentName::new("m").unwrap(),
        model: ModelRef { source, fingerprint: [0; 32] },
        stages: None,
        precision: None,
    };
    let (replica, generation) = (ReplicaId(1), Generation(1));
    plan_job(inventory, &Job { replica, generation, spec: &spec, shape, previous, replicas, ask })
}

/// A random cluster and model.
fn case(numbers: &mut Numbers, workers: u64, layers: u64) -> (Inventory, ModelShape) {
    let shape = match numbers.below(3) {
        0 => pretend(1 + numbers.below(layers) as u32, (1 + numbers.below(64)) * MIB),
        _ => dense(1 + numbers.below(layers) as u32, 1 + numbers.below(3) as u32),
    };
    let precision = shape.stored();
    let costs = Costs::new(&shape, precision);
    let whole = shape.memory(
        LayerRange::new(0, shape.layers()),
        precision,
        &memory::limits_to_try(&costs, 1)[0],
    );
    // Rates that do not count as equal, and some that are.
    let worker_of = |n: u32, numbers: &mut Numbers| {
        let rate = GIB * (1 + numbers.below(4));
        let share = whole.total().0 * (2 + numbers.below(8)) / 6;
        worker(n, share, rate, None)
    };
    let count = 1 + numbers.below(workers) as u32;
    let workers = (1..=count).map(|n| worker_of(n, numbers)).collect();
    (Inventory { workers, ..Inventory::default() }, shape)
}

/// `w1:0..3 w2+w3:3..6`
fn words(plan: &ReplicaPlan) -> String {
    let stage = |s: &StagePlan| {
        let nodes: Vec<_> = s.shards.iter().map(|shard| shard.node.to_string()).collect();
        format!("{}:{}", nodes.join("+"), s.layers)
    };
    plan.stages.iter().map(stage).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_worker_at_half_the_speed_gets_half_the_layers() {
    let shape = pretend(24, 64 * MIB);
    let all = inventory(&[8 * GIB, 4 * GIB]);
    let ask = MeshAsk { objective: Some(Objective::Throughput), ..mesh("2x1") };
    let plan = planned(&all, &shape, ask, None).unwrap();
    let slowest = predict(&plan, &shape, &all).slowest_ns();
    let mut even = plan.clone();
    even.stages[0].layers = LayerRange::new(0, 12);
    even.stages[1].layers = LayerRange::new(12, 24);
    let evenly = predict(&even, &shape, &all).slowest_ns();
    let best = (1..24)
        .map(|cut| {
            let mut other = plan.clone();
            other.stages[0].layers = LayerRange::new(0, cut);
            other.stages[1].layers = LayerRange::new(cut, 24);
            predict(&other, &shape, &all).slowest_ns()
        })
        .min()
        .unwrap();
    println!("slowest stage: {slowest} ns, best {best} ns, cut evenly {evenly} ns");
    assert!(best as f64 / slowest as f64 >= 0.95, "{}", words(&plan));
    assert!(evenly as f64 / slowest as f64 >= 1.3, "{}", words(&plan));
}

#[test]
fn many_layers_on_many_workers_take_some_milliseconds() {
    let shape = pretend(128, GIB);
    let workers = (1..=64).map(|n| {
        let memory = (4 * GIB) + u64::from(n) * GIB / 16;
        worker(n, memory, GIB * (80 + 3 * u64::from(n)) / 10, None)
    });
    let all = Inventory { workers: workers.collect(), ..Inventory::default() };
    for objective in [Objective::Latency, Objective::Throughput] {
        let ask = MeshAsk { objective: Some(objective), ..mesh("auto") };
        let start = std::time::Instant::now();
        let plan = planned(&all, &shape, ask, None).unwrap();
        let took = start.elapsed();
        println!("128 layers on 64 workers for {objective}: {took:?}, mesh {}", plan.mesh());
        // The figure is `shoal-bench micro`'s; this is what a busy machine keeps too.
        assert!(took.as_millis() <= 500, "{took:?}");
    }
}

#[test]
fn of_equally_fast_layouts_it_takes_the_one_that_moves_least() {
    let shape = pretend(6, 100 * MIB);
    let all = inventory(&[8 * GIB; 4]);
    let ask = MeshAsk { objective: Some(Objective::Throughput), ..mesh("3x1") };
    let mut before = planned(&all, &shape, ask, None).unwrap();
    for (stage, node) in before.stages.iter_mut().zip([4, 2, 3]) {
        stage.shards[0].node = NodeId::worker(node);
    }
    let after = planned(&all, &shape, ask, Some(&before)).unwrap();
    assert_eq!(words(&after), "w4:0..2 w2:2..4 w3:4..6");
    let mut less = all.clone();
    less.workers.remove(1);
    let after = planned(&less, &shape, ask, Some(&before)).unwrap();
    assert_eq!(words(&after), "w4:0..2 w1:2..4 w3:4..6");
    // Ranks keep their places too.
    let mut before = planned(&all, &shape, mesh("2x2"), None).unwrap();
    for (stage, nodes) in before.stages.iter_mut().zip([[4, 1], [3, 2]]) {
        for (shard, node) in stage.shards.iter_mut().zip(nodes) {
            shard.node = NodeId::worker(node);
        }
    }
    let after = planned(&all, &shape, mesh("2x2"), Some(&before)).unwrap();
    assert_eq!(words(&after), words(&before));
    // Also those whose sibling of a lower rank is gone.
    let mut less = all.clone();
    less.workers.retain(|worker| worker.node != NodeId::worker(4));
    less.workers.push(worker(9, 64 * GIB, 8 * GIB, None));
    let after = planned(&less, &shape, mesh("2x2"), Some(&before)).unwrap();
    assert_eq!(words(&after), words(&before).replace("w4", "w9"));
}

/// The numbers of layers, by stage.
fn lengths(plan: &ReplicaPlan) -> Vec<u32> {
    plan.stages.iter().map(|stage| stage.layers.len()).collect()
}

#[test]
fn of_equally_fast_layouts_the_even_one_is_made() {
    // Under `latency` every cut of a uniform model over equal workers takes as long.
    for (rates, ask, expected) in [
        (vec![80; 4], "2x2", vec![6, 6]),
        (vec![80; 2], "2x1", vec![6, 6]),
        (vec![80; 3], "3x1", vec![4, 4, 4]),
        (vec![80; 5], "5x1", vec![2, 3, 2, 3, 2]),
        // Within what two measurements of one machine differ by.
        (vec![80, 85, 81, 87], "2x2", vec![6, 6]),
        // More workers than every order is tried of.
        (vec![80; 64], "4x16", vec![3, 3, 3, 3]),
    ] {
        let rates: Vec<u64> = rates.iter().map(|tenths| tenths * GIB / 10).collect();
        for shape in [pretend(12, 100 * MIB), pretend(12, 1 << 10), dense(12, 16)] {
            let plan = planned(&inventory(&rates), &shape, mesh(ask), None).unwrap();
            let sorted = |mut lengths: Vec<u32>| {
                lengths.sort_unstable();
                lengths
            };
            assert_eq!(sorted(lengths(&plan)), sorted(expected.clone()), "{}", words(&plan));
        }
    }
}

/// Two ranks on one machine do not read twice what one reads, where its memory gives less.
#[test]
fn ranks_of_one_machine_share_what_it_reads() {
    let shape = pretend(12, 400 * MIB);
    let mut all = inventory(&[8 * GIB; 2]);
    let time = |all: &Inventory, ask| {
        let plan = planned(all, &shape, mesh(ask), None).unwrap();
        predict(&plan, &shape, all).stages[0].compute_ns
    };
    let (one, two) = (time(&all, "1x1"), time(&all, "1x2"));
    assert_eq!(one / 1000, 2 * two / 1000);
    all.workers.iter_mut().for_each(|w| w.machine = Some((HERE, Some(12 * GIB))));
    assert_eq!(time(&all, "1x1"), one);
    assert_eq!(time(&all, "1x2") / 1000, two / 3 * 4 / 1000);
    all.workers.iter_mut().for_each(|w| w.machine = Some((HERE, Some(8 * GIB))));
    assert_eq!(
        planned(&all, &shape, mesh("auto"), None).unwrap().mesh(),
        "1x1",
        "nothing is gained"
    );
    all.workers[1].machine = Some(([10, 0, 0, 2].into(), Some(8 * GIB)));
    assert_eq!(planned(&all, &shape, mesh("auto"), None).unwrap().mesh(), "1x2");
}

#[test]
fn workers_of_one_machine_are_alike_unless_one_is_held_back() {
    let shape = pretend(12, 100 * MIB);
    let of = |rates: [u64; 4]| {
        let mut all = inventory(&rates.map(|tenths| tenths * GIB / 10));
        all.workers.iter_mut().for_each(|w| w.machine = Some((HERE, None)));
        lengths(&planned(&all, &shape, mesh("2x2"), None).unwrap())
    };
    assert_eq!(of([80, 90, 70, 85]), [6, 6], "they were measured side by side");
    let mut uneven = of([80, 80, 40, 40]);
    uneven.sort_unstable();
    assert_eq!(uneven, [1, 11], "two have half of it, and latency is asked for");
}

/// They tell each other twice a layer, which takes half as long there; also where that are too many to look at all.
#[test]
fn ranks_of_a_stage_are_on_one_machine() {
    let shape = dense(12, 8);
    let on = |workers: usize, ask| {
        let mut all = inventory(&vec![8 * GIB; workers]);
        let machines = workers / 2;
        for (n, worker) in all.workers.iter_mut().enumerate() {
            worker.machine = Some(([10, 0, 0, (n % machines) as u8].into(), None));
            worker.budget = Bytes(8 * GIB + n as u64 * 4096);
        }
        let plan = planned(&all, &shape, mesh(ask), None).unwrap();
        for stage in &plan.stages {
            let of = |node| all.workers.iter().find(|w| w.node == node).unwrap().machine;
            let machines: Vec<_> = stage.shards.iter().map(|shard| of(shard.node)).collect();
            assert!(machines.iter().all(|m| *m == machines[0]), "{}", words(&plan));
        }
        let told: u64 = predict(&plan, &shape, &all).stages.iter().map(|stage| stage.told_ns).sum();
        all.workers.iter_mut().for_each(|worker| worker.machine = None);
        let apart: u64 = predict(&plan, &shape, &all).stages.iter().map(|s| s.told_ns).sum();
        assert!(told * 2 <= apart + 1000, "{told} of {apart}");
    };
    on(4, "2x2");
    on(64, "4x2");
}

#[test]
fn ranks_of_a_stage_are_in_one_zone_and_replicas_in_different_ones() {
    let shape = pretend(8, 100 * MIB);
    let zones = ["a", "b", "a", "b"];
    let workers = (1..).zip(zones).map(|(n, zone)| worker(n, 64 * GIB, 8 * GIB, Some(zone)));
    let all = Inventory { workers: workers.collect(), ..Inventory::default() };
    let plan = planned(&all, &shape, mesh("2x2"), None).unwrap();
    assert_eq!(words(&plan), "w1+w3:0..4 w2+w4:4..8");
    for ask in [MeshAsk::default(), mesh("1x2"), mesh("auto")] {
        let plan = planned_as(&all, &shape, ask, None, 2).unwrap();
        let first: Vec<_> = plan.nodes().collect();
        let mut rest = all.clone();
        for worker in &mut rest.workers {
            worker.sibling = first.contains(&worker.node);
        }
        let plan = planned_as(&rest, &shape, ask, None, 2).unwrap();
        let zone = |node| zones[all.workers.iter().position(|w| w.node == node).unwrap()];
        for node in plan.nodes() {
            assert!(first.iter().all(|other| zone(*other) != zone(node)), "{}", words(&plan));
        }
    }
}

#[test]
fn a_slow_way_is_crossed_as_seldom_as_can_be() {
    let shape = pretend(8, 100 * MIB);
    let mut all = inventory(&[8 * GIB; 4]);
    let slow = Link { latency_ns: 10_000_000, bytes_per_s: 125_000_000 };
    for (a, b) in [(1, 2), (1, 4), (3, 2), (3, 4)] {
        all.links.insert(super::super::pair(NodeId::worker(a), NodeId::worker(b)), slow);
    }
    // Both sides are needed: 500 MiB hold four layers.
    all.workers.iter_mut().for_each(|worker| worker.budget = Bytes(330 * MIB));
    let plan = planned(&all, &shape, mesh("4x1"), None).unwrap();
    let token = predict(&plan, &shape, &all).token_ns();
    let sides: Vec<_> = plan.nodes().map(|node| node.number % 2).collect();
    assert_eq!(sides.windows(2).filter(|pair| pair[0] != pair[1]).count(), 1, "{}", words(&plan));
    // The planner's own choice is no worse than either pure mesh.
    let auto = planned(&all, &shape, mesh("auto"), None).unwrap();
    let chosen = predict(&auto, &shape, &all).token_ns();
    assert!(chosen <= token, "{} {chosen} against {token}", words(&auto));
    if let Ok(pure) = planned(&all, &shape, mesh("1x4"), None) {
        assert!(chosen <= predict(&pure, &shape, &all).token_ns());
    }
}

#[test]
fn ranks_are_chosen_only_where_all_say_that_they_can() {
    let shape = pretend(8, 400 * MIB);
    let mut all = inventory(&[8 * GIB; 2]);
    let plan = planned(&all, &shape, mesh("auto"), None).unwrap();
    assert_eq!((plan.mesh().as_str(), plan.numerics), ("1x2", Numerics::N1Sum));
    let exact = MeshAsk { reduction: Some(Reduction::Exact), ..mesh("auto") };
    let plan = planned(&all, &shape, exact, None).unwrap();
    assert_eq!((plan.mesh().as_str(), plan.numerics), ("1x2", Numerics::N1));
    all.workers[1].ranks_most = 1;
    let plan = planned(&all, &shape, mesh("auto"), None).unwrap();
    assert_eq!((plan.mesh().as_str(), plan.numerics), ("1x1", Numerics::N1));
    // Who asks for it gets it from those that understand it.
    assert_eq!(planned(&all, &shape, mesh("1x2"), None).unwrap().mesh(), "1x2");
    all.workers[1].speaks_ranks = false;
    all.workers.push(worker(3, 64 * GIB, 8 * GIB, None));
    all.workers[1].ranks_most = 8;
    let plan = planned(&all, &shape, mesh("auto"), None).unwrap();
    assert_eq!(plan.mesh(), "1x1", "an older worker might have a stage of it");
    all.workers.truncate(2);
    let refusal = planned(&all, &shape, mesh("1x2"), None).unwrap_err();
    assert_eq!(refusal, PlanRefusal::NoRanks { able: 1, workers: 2 });
}

#[test]
fn a_mesh_that_cannot_be_is_refused_with_the_arithmetic() {
    let all = inventory(&[8 * GIB; 5]);
    let text = |shape: &ModelShape, ask| planned(&all, shape, ask, None).unwrap_err().to_string();
    let refusal = text(&dense(4, 2), mesh("1x4"));
    assert!(refusal.starts_with("2 KV heads on 4 ranks: a rank would hold none; possible: 1 or 2"));
    let refusal = text(&dense(4, 4), mesh("2x4"));
    assert!(refusal.contains("8 shards, and 5 workers"), "{refusal}");
    assert!(refusal.contains("--mesh 4x1 or 2x2 or 1x3 or 1x4"), "{refusal}");
    let refusal = text(&dense(2, 2), mesh("3x1"));
    assert!(refusal.contains("has 2 layers"), "{refusal}");
    // Pairs of heads are blocks of 256, and no block is cut unless rows alone are.
    let ModelShape::Checkpoint(spec) = dense(4, 4) else { panic!("no checkpoint") };
    let blocks = ModelShape::Checkpoint(ModelSpec { stored: Precision::Q4K, ..spec });
    let refusal = text(&blocks, mesh("1x4"));
    assert!(refusal.starts_with("2 runs of key/value heads that end where a block"), "{refusal}");
    assert!(refusal.contains("1 or 2 ranks, or up to 4 with --reduction exact"), "{refusal}");
    let exact = MeshAsk { reduction: Some(Reduction::Exact), ..mesh("1x4") };
    assert_eq!(planned(&all, &blocks, exact, None).unwrap().mesh(), "1x4");
    assert_eq!(planned(&all, &blocks, mesh("1x2"), None).unwrap().mesh(), "1x2");
    let refusal = text(&pretend(4, 100 * GIB), mesh("2x2"));
    assert!(refusal.contains("mesh 2x2 does not fit") && refusal.contains("w5 has"), "{refusal}");
    let refusal = text(&pretend(4, 100 * GIB), mesh("auto"));
    assert!(refusal.starts_with("the model does not fit"), "{refusal}");
    // Three heads on two ranks: the one with two is on the faster worker.
    let uneven = inventory(&[4 * GIB, 8 * GIB]);
    let plan = planned(&uneven, &dense(2, 3), mesh("1x2"), None).unwrap();
    assert_eq!(words(&plan), "w1+w2:0..2");
    let [one, two] = [0, 1].map(|rank| plan.stages[0].shards[rank].memory.weights);
    assert!(one < two, "{one} {two}");
}

#[test]
fn every_shard_fits_its_worker() {
    let mut numbers = Numbers(5);
    let mut fit = 0;
    for number in 0..120 {
        let (all, shape) = case(&mut numbers, 6, 9);
        let objective = Some([Objective::Latency, Objective::Throughput][number % 2]);
        let ask = MeshAsk { objective, ..mesh("auto") };
        let Ok(plan) = planned(&all, &shape, ask, None) else { continue };
        fit += 1;
        let mut nodes: Vec<_> = plan.nodes().collect();
        nodes.sort();
        nodes.dedup();
        assert_eq!(nodes.len(), plan.nodes().count(), "a worker twice: {}", words(&plan));
        assert_eq!(plan.stages.last().unwrap().layers.end, shape.layers());
        for shard in plan.stages.iter().flat_map(|stage| &stage.shards) {
            let worker = all.workers.iter().find(|worker| worker.node == shard.node).unwrap();
            assert!(shard.memory.total() <= worker.free(), "case {number}: {shard:?}");
        }
    }
    assert!(fit > 40, "{fit}");
}

/// Where nothing was measured, the slowest stage is what it was when nobody asked.
#[test]
fn unknown_rates_are_equal_rates() {
    let mut numbers = Numbers(9);
    for _ in 0..60 {
        let (mut all, shape) = case(&mut numbers, 5, 9);
        all.workers.iter_mut().for_each(|worker| worker.rate = None);
        let Ok(plain) = planned(&all, &shape, MeshAsk::default(), None) else { continue };
        let stages = plain.stages.len();
        let ask =
            MeshAsk { objective: Some(Objective::Throughput), ..mesh(&format!("{stages}x1")) };
        let asked = planned(&all, &shape, ask, None).unwrap();
        let slowest = |plan: &ReplicaPlan| predict(plan, &shape, &all).slowest_ns();
        assert_eq!(slowest(&asked), slowest(&plain), "{} {}", words(&asked), words(&plain));
        let mut all = plain.nodes().chain(asked.nodes()).collect::<Vec<_>>();
        all.sort();
    }
}

#[test]
fn shards_that_are_linked_stand_on_workers_that_reach_each_other() {
    let shape = dense(6, 4);
    let w = NodeId::worker;
    // In a mesh of 2x2 each shard has two neighbours, and one stands across.
    for cut in [&[(1, 2)][..], &[(1, 3)], &[(1, 4)], &[(2, 3)], &[(3, 4)], &[(1, 3), (2, 4)]] {
        let mut all = inventory(&[GIB; 4]);
        all.apart = cut.iter().map(|(a, b)| pair(w(*a), w(*b))).collect();
        let plan = planned(&all, &shape, mesh("2x2"), None).unwrap();
        assert!(!is_torn(&plan, &all.apart), "{cut:?}: {}", words(&plan));
        let nodes: std::collections::BTreeSet<_> = plan.nodes().collect();
        assert_eq!(nodes.len(), 4, "{}", words(&plan));
    }
    // Somebody else has room: the mesh stays as large as it was asked for.
    let mut all = inventory(&[GIB; 5]);
    all.apart = [(1, 2), (1, 3), (1, 4), (1, 5)].map(|(a, b)| pair(w(a), w(b))).into();
    let plan = planned(&all, &shape, mesh("2x2"), None).unwrap();
    assert!(
        !is_torn(&plan, &all.apart) && plan.nodes().all(|node| node != w(1)),
        "{}",
        words(&plan)
    );
    // There is no other way: perhaps it is mended.
    all.workers.pop();
    assert!(planned(&all, &shape, mesh("2x2"), None).is_ok());
}
