//! The planner against brute force on small cases, and its refusals word by word.

use shoal_protocol::id::DeploymentName;
use shoal_protocol::mesh::MeshAsked;
use shoal_protocol::model::{Family, ModelSpec, Options, RopeScaling};
use shoal_protocol::plan::{ModelRef, ModelSource, PretendSpec};
use shoal_protocol::units::LayerRange;

use super::*;

const MIB: u64 = 1 << 20;

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

fn spec(shape: &ModelShape, stages: Option<u32>) -> DeploymentSpec {
    let source = match shape {
        ModelShape::Pretend(spec) => ModelSource::Pretend(spec.clone()),
        ModelShape::Checkpoint(_) | ModelShape::Encoder(_) => {
            ModelSource::Folder { path: "/models/m".into() }
        }
    };
    DeploymentSpec {
        name: DeploymentName::new("m").unwrap(),
        model: ModelRef { source, fingerprint: [0; 32] },
        stages,
        precision: None,
    }
}

fn inventory(budgets: &[u64]) -> Inventory {
    let worker = |(index, budget): (usize, &u64)| Candidate {
        node: NodeId::worker(index as u32 + 1),
        device: "cpu".into(),
        budget: Bytes(*budget),
        used: Bytes(0),
        numerics: vec![Numerics::N1],
        sibling: false,
        rate: None,
        zone: None,
        speaks_ranks: true,
        ranks_most: 0,
        machine: None,
    };
    let workers = budgets.iter().enumerate().map(worker).collect();
    Inventory { workers, ..Inventory::default() }
}

fn planned(
    inventory: &Inventory,
    shape: &ModelShape,
    stages: Option<u32>,
    previous: Option<&ReplicaPlan>,
) -> Result<ReplicaPlan, PlanRefusal> {
    let spec = spec(shape, stages);
    let job = Job {
        replica: ReplicaId(1),
        generation: Generation(previous.map_or(1, |plan| plan.generation.0 + 1)),
        spec: &spec,
        shape,
        previous,
        replicas: 1,
        ask: MeshAsk::default(),
    };
    plan(inventory, &job)
}

/// `w1:0..3 w2:3..6`
fn layout_of(plan: &ReplicaPlan) -> String {
    let stages: Vec<_> =
        plan.stages.iter().map(|s| format!("{}:{}", s.shards[0].node, s.layers)).collect();
    stages.join(" ")
}

#[track_caller]
fn check(budgets_mib: &[u64], layers: u32, stages: Option<u32>, expected: &str) {
    let budgets: Vec<_> = budgets_mib.iter().map(|mib| mib * MIB).collect();
    let plan = planned(&inventory(&budgets), &pretend(layers, 100 * MIB), stages, None);
    assert_eq!(plan.map(|plan| layout_of(&plan)).as_deref(), Ok(expected));
}

#[test]
fn layers_are_spread_evenly_over_all_workers() {
    check(&[1000, 1000, 1000], 6, None, "w1:0..2 w2:2..4 w3:4..6");
    check(&[1000, 1000, 1000], 8, None, "w1:0..2 w2:2..5 w3:5..8");
    check(&[1000, 1000, 1000], 2, None, "w1:0..1 w2:1..2");
    check(&[1000, 1000, 1000], 6, Some(1), "w1:0..6");
    check(&[1000], 6, None, "w1:0..6");
}

#[test]
fn memory_comes_before_balance() {
    // 104 MiB hold one layer, 404 four.
    check(&[104, 404, 204], 7, None, "w2:0..4 w3:4..6 w1:6..7");
    check(&[104, 1000, 204], 7, None, "w2:0..4 w3:4..6 w1:6..7");
    // w1 cannot hold a layer: fewer stages, since none were asked for.
    check(&[50, 1000, 1000], 6, None, "w2:0..3 w3:3..6");
}

#[test]
fn the_worked_example_is_true() {
    let shape = pretend(4, 100 * MIB);
    let plan = planned(&inventory(&[300 * MIB, 300 * MIB]), &shape, None, None).unwrap();
    let needs: Vec<_> = plan.stages.iter().map(|s| s.shards[0].memory.total()).collect();
    assert_eq!(needs, [Bytes::mib(207), Bytes(207 * MIB + MIB / 4)]);
    assert_eq!(plan.limits.kv_blocks * 16, KV_TOKENS_MAX);
    assert!(planned(&inventory(&[300 * MIB]), &shape, None, None).is_err());
    assert!(planned(&inventory(&[400 * MIB]), &shape, None, None).is_err());
    assert!(planned(&inventory(&[401 * MIB]), &shape, None, None).is_ok());
}

#[test]
fn a_worker_keeps_what_it_has() {
    let shape = pretend(6, 100 * MIB);
    let all = inventory(&[1000 * MIB; 4]);
    let first = planned(&all, &shape, Some(3), None).unwrap();
    assert_eq!(layout_of(&first), "w1:0..2 w2:2..4 w3:4..6");
    let mut without_w2 = all.clone();
    without_w2.workers.remove(1);
    let second = planned(&without_w2, &shape, Some(3), Some(&first)).unwrap();
    assert_eq!(layout_of(&second), "w1:0..2 w4:2..4 w3:4..6");
    assert_eq!(second.generation, Generation(2));
    // w2 is back and just as good as w4, but w4 has the layers now.
    let third = planned(&all, &shape, Some(3), Some(&second)).unwrap();
    assert_eq!(layout_of(&third), "w1:0..2 w4:2..4 w3:4..6");
}

#[test]
fn workers_that_do_not_reach_each_other_are_no_neighbours_where_that_can_be() {
    let shape = pretend(6, 100 * MIB);
    let w = NodeId::worker;
    for (workers, stages, apart, expected) in [
        (4, Some(2), &[(1, 2)][..], "w1 w3"),
        (4, Some(3), &[(1, 2)], "w1 w3 w4"),
        // In a ring of four, two of them stand across.
        (4, Some(4), &[(1, 2)], "w1 w3 w2 w4"),
        (4, Some(2), &[(1, 2), (1, 3), (1, 4)], "w2 w3"),
        // Fewer stages rather than none that work, where that is open.
        (2, None, &[(1, 2)], "w1"),
        (3, None, &[(1, 2)], "w1 w3"),
        // There is no other way: perhaps it is mended.
        (2, Some(2), &[(1, 2)], "w1 w2"),
        (3, Some(3), &[(2, 3)], "w1 w2 w3"),
    ] {
        let mut all = inventory(&vec![1000 * MIB; workers]);
        all.apart = apart.iter().map(|(a, b)| pair(w(*a), w(*b))).collect();
        let plan = planned(&all, &shape, stages, None).unwrap();
        let nodes: Vec<_> = plan.nodes().map(|node| node.to_string()).collect();
        assert_eq!(nodes.join(" "), expected, "{workers} workers, {stages:?}, {apart:?}");
    }
}

#[test]
fn the_least_loaded_worker_comes_first() {
    let mut inventory = inventory(&[1000 * MIB; 3]);
    inventory.workers[0].used = Bytes::mib(300);
    let shape = pretend(6, 100 * MIB);
    let plan = planned(&inventory, &shape, Some(1), None).unwrap();
    assert_eq!(layout_of(&plan), "w2:0..6");
}

#[test]
fn a_refusal_shows_the_arithmetic() {
    let shape = pretend(8, 100 * MIB);
    let refusal = planned(&inventory(&[250 * MIB, 250 * MIB]), &shape, None, None).unwrap_err();
    assert_eq!(refusal.code(), shoal_protocol::error::ErrorCode::DoesNotFit);
    assert_eq!(
        refusal.to_string(),
        "the model does not fit in f32 on these workers.\n\
         \x20 stage 0, layers 0..4, needs at least 400.4 MiB (400.0 MiB weights, 8.0 KiB KV for the shortest useful context, 384.0 KiB activations)\n\
         \x20 stage 1, layers 4..8, needs at least 400.4 MiB (400.0 MiB weights, 8.0 KiB KV for the shortest useful context, 388.0 KiB activations)\n\
         \x20 w1 has 250.0 MiB\n\
         \x20 w2 has 250.0 MiB\n\
         \x20 in all: needs 800.8 MiB, has 500.0 MiB\n\
         It would fit with 2 more workers with 250.0 MiB each, or with more memory a worker."
    );
    let refusal = planned(&inventory(&[50 * MIB]), &shape, None, None).unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("one layer alone needs more than a worker has"), "{text}");
}

/// What is advised is tried here as it is advised.
#[test]
fn where_the_number_of_stages_binds_another_one_is_advised() {
    // 800 MiB of weights.
    let shape = pretend(8, 100 * MIB);
    for (budgets, asked, words) in [
        (
            &[500 * MIB; 3][..],
            1,
            "It would fit with --stages 2 on these workers, or with more memory a worker.",
        ),
        (&[250 * MIB; 4], 1, "It would fit with --stages 4 on these workers, or"),
        // A small one in the way.
        (
            &[900 * MIB, MIB],
            2,
            "with --stages 1 on these workers, or with 1 more worker with 900.0 MiB each, or",
        ),
        (
            &[500 * MIB],
            1,
            "It would fit with 1 more worker with 500.0 MiB each and another --stages than 1 (or none), or",
        ),
        (
            &[500 * MIB, 300 * MIB],
            2,
            "It would fit with 1 more worker with 500.0 MiB each, or with more",
        ),
    ] {
        let refusal = planned(&inventory(budgets), &shape, Some(asked), None).unwrap_err();
        let text = refusal.to_string();
        assert!(text.contains(words), "{asked} stages: {text}");
        let PlanRefusal::DoesNotFit(sums) = refusal else { panic!("{text}") };
        if let Some(stages) = sums.stages_instead {
            planned(&inventory(budgets), &shape, Some(stages), None).unwrap();
        }
        if let Some(more) = sums.more_workers {
            let mut budgets = budgets.to_vec();
            let roomiest = budgets.iter().copied().max().unwrap();
            budgets.extend(vec![roomiest; more.count]);
            let stages = Some(asked).filter(|_| !more.open_stages);
            planned(&inventory(&budgets), &shape, stages, None).unwrap();
        }
    }
}

#[test]
fn impossible_meshes_are_refused() {
    let shape = pretend(4, MIB);
    let two = inventory(&[1000 * MIB; 2]);
    for (stages, refusal) in [
        (0, PlanRefusal::NoStages),
        (3, PlanRefusal::TooFewWorkers { stages: 3, workers: 2 }),
        (5, PlanRefusal::TooManyStages { stages: 5, layers: 4 }),
    ] {
        assert_eq!(planned(&two, &shape, Some(stages), None), Err(refusal));
    }
    assert_eq!(planned(&inventory(&[]), &shape, None, None), Err(PlanRefusal::NoWorkers));
    let mut old = two;
    old.workers.iter_mut().for_each(|worker| worker.numerics.clear());
    let refusal = PlanRefusal::NoNumerics { numerics: Numerics::N1, workers: 2 };
    assert_eq!(planned(&old, &shape, None, None), Err(refusal));
}

/// A small source of numbers that repeats: an LCG's high bits.
pub(super) struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// The cost of the slowest stage in the best of all cuts on all ordered choices of workers.
struct BruteForce<'a> {
    costs: &'a Costs<'a>,
    limits: &'a ReplicaLimits,
    free: &'a [u64],
}

impl BruteForce<'_> {
    fn best(&self, used: u32, start: u32, stages: usize) -> Option<u64> {
        let layers = self.costs.layers();
        if stages == 0 {
            return (start == layers).then_some(0);
        }
        let mut best = None;
        for end in start + 1..=layers {
            let range = LayerRange::new(start, end);
            let need = self.costs.shape().memory(range, self.costs.precision(), self.limits);
            for (worker, free) in self.free.iter().enumerate() {
                if used & 1 << worker != 0 || need.total().0 > *free {
                    continue;
                }
                if let Some(rest) = self.best(used | 1 << worker, end, stages - 1) {
                    let cost = self.costs.step(range).max(rest);
                    best = Some(best.map_or(cost, |best: u64| best.min(cost)));
                }
            }
        }
        best
    }
}

#[test]
fn the_cut_is_as_good_as_brute_force_finds() {
    let mut numbers = Numbers(1);
    let (mut fitting, mut refused) = (0, 0);
    for case in 0..300 {
        let shape = small_model(&mut numbers);
        let costs = Costs::new(&shape, Precision::F32);
        let workers = 1 + numbers.below(4) as usize;
        let whole = shape.memory(
            LayerRange::new(0, shape.layers()),
            Precision::F32,
            &memory::limits_to_try(&costs, 1)[0],
        );
        // Few distinct budgets, around what a fair share would be.
        let budgets: Vec<_> = (0..workers)
            .map(|_| {
                let share = (whole.weights + whole.kv).0 / workers as u64;
                whole.activations.0 + share * (3 + numbers.below(5)) / 4
            })
            .collect();
        let inventory = inventory(&budgets);
        let candidates: Vec<_> = inventory.workers.iter().collect();
        for stages in 1..=workers.min(shape.layers() as usize) {
            let limits = &memory::limits_to_try(&costs, stages)[0];
            let expected = BruteForce { costs: &costs, limits, free: &budgets }.best(0, 0, stages);
            let cuts = placement::cut(&costs, limits, &candidates, stages);
            let slowest = cuts
                .as_ref()
                .map(|cuts| cuts.iter().map(|cut| costs.step(cut.layers)).max().unwrap_or(0));
            assert_eq!(slowest, expected, "case {case}, {stages} stages of {shape:?}");
            let Some(cuts) = cuts else {
                refused += 1;
                continue;
            };
            fitting += 1;
            let named = placement::name_workers(&cuts, &candidates, None, &costs, &Apart::new());
            assert_eq!(named.len(), cuts.len(), "case {case}: a stage without a worker");
            let full = memory::largest_limits(&costs, limits.clone(), &cuts, &named);
            assert!(full.kv_blocks >= limits.kv_blocks);
            for (cut, worker) in cuts.iter().zip(&named) {
                let need = shape.memory(cut.layers, Precision::F32, &full).total();
                assert!(need <= worker.free(), "case {case}: {need} on {worker:?}");
            }
        }
    }
    assert!(fitting > 100 && refused > 30, "the cases are lopsided: {fitting} fit, {refused} not");
}

/// Sums per layer must be what the model says of every range, or a cut could be wrong.
#[test]
fn costs_of_ranges_are_those_of_the_model() {
    let mut numbers = Numbers(2);
    for _ in 0..50 {
        let shape = small_model(&mut numbers);
        for precision in [Precision::F32, Precision::Bf16] {
            let costs = Costs::new(&shape, precision);
            for limits in memory::limits_to_try(&costs, 2) {
                let needs = costs.needs(&limits);
                for start in 0..shape.layers() {
                    for end in start + 1..=shape.layers() {
                        let range = LayerRange::new(start, end);
                        let truth = shape.memory(range, precision, &limits);
                        let need = needs.of(range);
                        assert_eq!(need, truth.total(), "{range} of {shape:?}: {truth:?}");
                        assert_eq!(costs.memory(range, &limits), truth);
                    }
                }
            }
        }
    }
}

fn small_model(numbers: &mut Numbers) -> ModelShape {
    let layers = 1 + numbers.below(7) as u32;
    if numbers.below(4) == 0 {
        return pretend(layers, 1000 + numbers.below(3) * MIB);
    }
    let kv_heads = 1 + numbers.below(2) as u32;
    ModelShape::Checkpoint(ModelSpec {
        family: Family::Llama,
        layers,
        hidden: 16 * (1 + numbers.below(8) as u32),
        heads: kv_heads * (1 + numbers.below(3) as u32),
        kv_heads,
        head_dim: 8,
        intermediate: 16 * (1 + numbers.below(16) as u32),
        vocab: 100 + numbers.below(2000) as u32,
        context_max: 16 << numbers.below(8),
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        tied_embeddings: numbers.below(2) == 0,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        options: Options::default(),
        stored: Precision::F32,
    })
}

/// A small model with real KV.
fn dense(context_max: u32) -> ModelShape {
    ModelShape::Checkpoint(ModelSpec {
        family: Family::Llama,
        layers: 4,
        hidden: 512,
        heads: 8,
        kv_heads: 2,
        head_dim: 64,
        intermediate: 2048,
        vocab: 1000,
        context_max,
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

#[test]
fn a_second_deployment_and_a_next_layout_find_room_beside_the_first() {
    let shape = dense(8192);
    let spec = spec(&shape, Some(1));
    let plan_with = |used: Bytes, budget: u64| {
        let mut inventory = inventory(&[budget]);
        inventory.workers[0].used = used;
        let (replica, generation) = (ReplicaId(1), Generation(1));
        let (shape, previous) = (&shape, None);
        let ask = MeshAsk::default();
        let spec = &spec;
        plan(&inventory, &Job { replica, generation, spec, shape, previous, replicas: 1, ask })
    };
    // As much as the most that one replica takes: alone it would leave nothing.
    let roomy = plan_with(Bytes(0), 1 << 40).unwrap();
    assert_eq!(roomy.limits.kv_blocks * 16, KV_TOKENS_MAX);
    let budget = roomy.stages[0].shards[0].memory.total().0;
    let mut used = Bytes(0);
    for _ in 0..2 {
        let plan = plan_with(used, budget).unwrap();
        assert!(plan.limits.kv_blocks * 16 >= KV_TOKENS_COMFORTABLE, "{:?}", plan.limits);
        used = used + plan.stages[0].shards[0].memory.total();
        assert!(used <= Bytes(budget));
    }
}

#[test]
fn a_smaller_precision_is_advised_where_it_fits() {
    let shape = dense(512);
    let costs = Costs::new(&shape, Precision::F32);
    let weights = costs.weights(LayerRange::new(0, 4)).0;
    let refusal = planned(&inventory(&[weights * 3 / 4]), &shape, None, None).unwrap_err();
    let PlanRefusal::DoesNotFit(sums) = &refusal else { panic!("{refusal}") };
    let more = sums.more_workers.map(|more| more.count);
    assert_eq!((sums.smaller, more), (Some(Precision::Bf16), Some(1)), "{refusal}");
    assert!(
        refusal.to_string().ends_with(", or with --precision bf16, or with more memory a worker.")
    );
}

/// What a log of before has: nothing is said of activations.
#[test]
fn whole_numbers_are_multiplied_as_such_where_that_was_chosen() {
    let shape = dense(512);
    let spec = DeploymentSpec { precision: Some(Precision::Q8_0), ..spec(&shape, Some(1)) };
    for (activations, mesh, expected) in [
        (None, None, Numerics::N1),
        (None, Some(MeshAsked::Auto), Numerics::N1),
        (Some(Activations::Int8), None, Numerics::N2),
        (Some(Activations::Int8), Some(MeshAsked::Auto), Numerics::N2),
    ] {
        let ask = MeshAsk { activations, mesh, ..MeshAsk::default() };
        let (replica, generation, replicas) = (ReplicaId(1), Generation(1), 1);
        let (spec, shape, previous) = (&spec, &shape, None);
        let job = Job { replica, generation, spec, shape, previous, replicas, ask };
        assert_eq!(plan(&inventory(&[1 << 40]), &job).unwrap().numerics, expected);
    }
}

#[test]
fn a_cache_of_fewer_bits_holds_more_tokens_in_the_same_memory() {
    let shape = dense(8192);
    let spec = spec(&shape, Some(1));
    let costs = Costs::new(&shape, Precision::F32);
    let inventory = inventory(&[costs.weights(LayerRange::new(0, 4)).0 * 3 / 2]);
    let planned = |kv: KvPrecision, mesh: Option<MeshAsked>| {
        let ask = MeshAsk { kv: Some(kv), mesh, ..MeshAsk::default() };
        let (replica, generation, replicas) = (ReplicaId(1), Generation(1), 1);
        let (spec, shape, previous) = (&spec, &shape, None);
        plan(&inventory, &Job { replica, generation, spec, shape, previous, replicas, ask })
    };
    let auto = Some(MeshAsked::Auto);
    for (kv, mesh) in KvPrecision::ALL.into_iter().flat_map(|kv| [(kv, None), (kv, auto)]) {
        let plan = planned(kv, mesh).unwrap();
        assert_eq!(plan.numerics, Numerics::N1.with_kv(kv));
        let (memory, blocks) = (plan.stages[0].shards[0].memory, plan.limits.kv_blocks);
        assert_eq!(memory.kv, shape.kv_bytes(LayerRange::new(0, 4), None, blocks, kv));
        assert!(memory.total() <= inventory.workers[0].budget);
        let whole = planned(KvPrecision::F32, mesh).unwrap().limits.kv_blocks;
        // Some of what is gained may go into longer steps: the most generous limits come first.
        assert!(kv == KvPrecision::F32 || blocks > whole, "{kv}: {blocks} of {whole}");
    }
}
