//! The search against an independent enumeration of all layouts: no gap, in both of its spaces. In each case every layout
//! there is is looked at. Which cases:
//!
//! - every cluster of up to four workers of four kinds (fast or half as fast, roomy or tight), models of one to three equal
//!   layers, and every mesh that can be asked for there: all of them; with a vocabulary at the ends, of up to three workers and
//!   two layers;
//! - five to ten workers that all differ: rates and memory are drawn, and of each draw every mesh that can be asked for is;
//! - layouts that are there already, chains, zones: drawn.

use super::super::super::topology::Topology;
use super::*;

/// Every layout there is, each looked at as `plan --explain` shows it.
struct BruteForce<'a> {
    inventory: &'a Inventory,
    shape: &'a ModelShape,
    /// With its limits and numerics, and no stages.
    empty: &'a ReplicaPlan,
    wanted: &'a Wanted,
    /// What is there already.
    previous: Option<&'a ReplicaPlan>,
    /// Only these neighbours, in this order.
    chain: bool,
    looked_at: u64,
}

/// What is least, the bytes that are read anew, and what is least of equals: the slowest stage, or the time.
type Goodness = (u64, u64, u64);

impl BruteForce<'_> {
    fn best(&mut self, stages: &mut Vec<StagePlan>, used: &mut Vec<usize>) -> Option<Goodness> {
        let start = stages.last().map_or(0, |stage| stage.layers.end);
        if start == self.shape.layers() {
            self.looked_at += 1;
            let plan = ReplicaPlan { stages: stages.clone(), ..self.empty.clone() };
            let right =
                self.wanted.stages.is_none_or(|stages| stages as usize == plan.stages.len());
            return right.then(|| self.goodness(&plan));
        }
        let mut best: Option<Goodness> = None;
        for end in start + 1..=self.shape.layers() {
            for ranks in self.wanted.ranks.clone() {
                for crew in self.crews(ranks, used) {
                    let Some(stage) = self.stage(LayerRange::new(start, end), &crew) else {
                        continue;
                    };
                    stages.push(stage);
                    used.extend(&crew);
                    let rest = self.best(stages, used);
                    used.truncate(used.len() - crew.len());
                    stages.pop();
                    best = best.into_iter().chain(rest).min();
                }
            }
        }
        best
    }

    fn goodness(&self, plan: &ReplicaPlan) -> Goodness {
        let prediction = predict(plan, self.shape, self.inventory);
        let (token, slowest) = (prediction.token_ns(), prediction.slowest_ns());
        let moved = plan.stages.iter().map(|stage| self.moved(stage)).sum();
        match self.wanted.objective {
            Objective::Latency => (token, moved, slowest),
            Objective::Throughput => (slowest, moved, token),
        }
    }

    fn how(&self) -> (Reduction, Precision) {
        (self.wanted.reduction, self.empty.precision)
    }

    /// Weight bytes that nobody of the stage has as one of as many ranks.
    fn moved(&self, stage: &StagePlan) -> u64 {
        let slices = Slices::new(self.shape, stage.shards.len() as u32, self.how());
        let costs: Vec<_> = slices
            .of(stage.shards.len())
            .iter()
            .map(|s| Costs::of_rank(s, self.empty.precision))
            .collect();
        let all: u64 = costs.iter().map(|costs| costs.weights(stage.layers).0).sum();
        let kept = |shard: &ShardPlan| {
            let had = self.previous?.stages.iter().find(|had| {
                had.shards.len() == stage.shards.len()
                    && had.shards.iter().any(|s| s.node == shard.node)
            })?;
            let rank = had.shards.iter().position(|s| s.node == shard.node)?;
            let (start, end) =
                (had.layers.start.max(stage.layers.start), had.layers.end.min(stage.layers.end));
            (start < end).then(|| costs[rank].weights(LayerRange::new(start, end)).0)
        };
        all - stage.shards.iter().filter_map(kept).sum::<u64>()
    }

    /// All sets of so many workers of one place that are not used; in a chain those side by side.
    fn crews(&self, ranks: usize, used: &[usize]) -> Vec<Vec<usize>> {
        let all = self.inventory.workers.len();
        if self.chain {
            let from = used.last().map_or(0, |last| last + 1);
            return (from..=all.saturating_sub(ranks))
                .map(|at| (at..at + ranks).collect())
                .collect();
        }
        let sets = (0_u32..1 << all).filter(|set| set.count_ones() as usize == ranks);
        let crews = sets.map(|set| (0..all).filter(|w| set >> w & 1 == 1).collect::<Vec<_>>());
        crews.filter(|crew| crew.iter().all(|w| !used.contains(w))).collect()
    }

    fn stage(&self, layers: LayerRange, crew: &[usize]) -> Option<StagePlan> {
        let slices = Slices::new(self.shape, crew.len() as u32, self.how());
        let slices = slices.of(crew.len());
        let room = crew.iter().map(|w| self.inventory.workers[*w].free()).min()?;
        let costs: Vec<_> =
            slices.iter().map(|s| Costs::of_rank(s, self.empty.precision)).collect();
        let rates: Vec<_> =
            crew.iter().map(|w| self.inventory.rate(&self.inventory.workers[*w])).collect();
        let mut shards = Vec::new();
        for (rank, seat) in seats(&costs, &rates).into_iter().enumerate() {
            let memory = costs[rank].memory(layers, &self.empty.limits);
            if memory.total() > room {
                return None;
            }
            let node = self.inventory.workers[crew[seat]].node;
            shards.push(ShardPlan {
                rank: RankIndex(rank as u32),
                node,
                device: "cpu".into(),
                memory,
            });
        }
        Some(StagePlan { layers, shards })
    }
}

/// The space that is searched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum In {
    Kinds,
    Chain,
    /// A chain of more places than it can know each of.
    NearOrFar,
}

/// The search's answer and that of brute force, under one and the same limits.
fn compare(
    inventory: &Inventory,
    shape: &ModelShape,
    ask: MeshAsk,
    space: In,
    previous: Option<&ReplicaPlan>,
) -> (Option<Goodness>, Option<Goodness>) {
    let chain = space != In::Kinds;
    let spec = DeploymentSpec {
        name: DeploymentName::new("m").unwrap(),
        model: ModelRef { source: ModelSource::Builtin { name: "m".into() }, fingerprint: [0; 32] },
        stages: None,
        precision: None,
    };
    let (replica, generation) = (ReplicaId(1), Generation(1));
    let job = Job { replica, generation, spec: &spec, shape, previous, replicas: 1, ask };
    let workers = candidates(inventory, Numerics::N1).unwrap();
    let Ok(wanted) = wanted(&job, workers.len()) else { return (None, None) };
    let most = wanted.ranks.iter().copied().max().unwrap();
    let slices = Slices::new(shape, most as u32, (wanted.reduction, shape.stored()));
    let costs: Vec<Vec<Costs<'_>>> = (1..=most)
        .map(|ranks| slices.of(ranks).iter().map(|s| Costs::of_rank(s, shape.stored())).collect())
        .collect();
    let weights = costs.iter().map(|ranks| spaces::weights(ranks)).collect();
    let search =
        Search { inventory, job: &job, wanted: &wanted, costs: &costs, weights, workers: &workers };
    let limits = memory::limits_to_try(&costs[0][0], 2).remove(0);
    let places = space::places(inventory, &workers);
    let mut members = space::members(inventory, &workers, previous, &places);
    let bounds = Bounds {
        ranks: &wanted.ranks,
        workers: workers.len(),
        layers: shape.layers(),
        stages: wanted.stages,
        willing: false,
    };
    if chain {
        members.sort_by_key(|m| m.worker.node);
    }
    let order: Vec<usize> = (0..members.len()).collect();
    let found_in = match space {
        In::Kinds => Space::of_kinds(&members, bounds).expect("few workers"),
        In::Chain | In::NearOrFar => Space::of_chain(&members, &order, bounds),
    };
    let (links, row) = (space::links(inventory, &members), row_bytes(shape));
    let spaces = match space {
        In::NearOrFar => spaces::near_or_far(found_in, (&members, &order), &links, (bounds, row)),
        In::Kinds | In::Chain => {
            let topology = Topology::each(&links, row, found_in.places(&members));
            vec![(found_in, topology)]
        }
    };
    let models = (&costs[..], wanted.reduction);
    let mut spaces = Spaces::new(shape, models, (members, links), spaces);
    let found = search.in_spaces(&limits, &mut spaces, u64::MAX);
    let empty = ReplicaPlan {
        id: replica,
        deployment: spec.name.clone(),
        generation,
        model: spec.model.clone(),
        precision: shape.stored(),
        numerics: Numerics::N1Sum,
        stages: Vec::new(),
        limits,
    };
    let mut brute = BruteForce {
        inventory,
        shape,
        empty: &empty,
        wanted: &wanted,
        previous,
        chain,
        looked_at: 0,
    };
    let best = brute.best(&mut Vec::new(), &mut Vec::new());
    (found.map(|found| (found.score.0, found.score.1, found.score.2)), best)
}

#[test]
fn no_layout_is_better_than_the_one_that_is_chosen() {
    let mut numbers = Numbers(7);
    let (mut fit, mut not) = (0, 0);
    for case_number in 0..240 {
        let (inventory, shape) = case(&mut numbers, 4, 4);
        let objective = [Objective::Latency, Objective::Throughput][case_number % 2];
        let asked = [None, Some("auto"), Some("2x1"), Some("1x2"), Some("2x2")][case_number % 5];
        let asked = asked.map(|mesh| mesh.parse().unwrap());
        let ask = MeshAsk {
            mesh: asked,
            objective: Some(objective),
            reduction: None,
            kv: None,
            activations: None,
        };
        // Every other one of a layout that is there already.
        let had = (case_number % 4 > 1).then(|| planned(&inventory, &shape, mesh("auto"), None));
        let had = had.and_then(Result::ok);
        let (found, best) = compare(&inventory, &shape, ask, In::Kinds, had.as_ref());
        assert_eq!(found, best, "case {case_number}: {ask} of {shape:?} on {inventory:?}");
        if best.is_some() { fit += 1 } else { not += 1 }
    }
    assert!(fit > 80 && not > 20, "the cases are lopsided: {fit} fit, {not} not");
}

/// Every mesh that can be asked for of so many workers and layers, and the one that is left open.
fn asks(workers: u32, layers: u32, most_ranks: u32) -> Vec<MeshAsk> {
    let exactly = |stages, ranks| MeshAsked::Exactly(Mesh { stages, ranks });
    let meshes = (1..=layers).flat_map(|stages| (1..=most_ranks).map(move |ranks| (stages, ranks)));
    let meshes = meshes.filter(|(stages, ranks)| stages * ranks <= workers);
    let meshes = meshes.map(|(stages, ranks)| exactly(stages, ranks)).chain([MeshAsked::Auto]);
    let objectives = [Objective::Latency, Objective::Throughput];
    meshes
        .flat_map(|mesh| objectives.map(|objective| (Some(mesh), Some(objective))))
        .map(|(mesh, objective)| MeshAsk {
            mesh,
            objective,
            reduction: None,
            kv: None,
            activations: None,
        })
        .collect()
}

/// What a worker has to have room for that holds all of a model.
fn room_for(shape: &ModelShape) -> u64 {
    let costs = Costs::new(shape, shape.stored());
    let limits = memory::limits_to_try(&costs, 2).remove(0);
    shape.memory(LayerRange::new(0, shape.layers()), shape.stored(), &limits).total().0
}

#[test]
fn of_every_small_cluster_every_mesh_is_laid_out_as_well_as_can_be() {
    // By sixths of a model, and GiB in a second.
    const KINDS: [(u64, u64); 4] = [(8, 2), (8, 1), (4, 2), (4, 1)];
    // Clusters of the same kinds in another order are the same cluster.
    let mut clusters: Vec<Vec<usize>> = vec![Vec::new()];
    let mut all = Vec::new();
    for _ in 0..4 {
        let larger = |kinds: &Vec<usize>| {
            let from = kinds.last().copied().unwrap_or(0);
            (from..KINDS.len()).map(|kind| [&kinds[..], &[kind]].concat()).collect::<Vec<_>>()
        };
        clusters = clusters.iter().flat_map(larger).collect();
        all.extend(clusters.clone());
    }
    assert_eq!(all.len(), 4 + 10 + 20 + 35);
    let (mut fit, mut not) = (0, 0);
    for layers in 1..=3 {
        let real = (layers <= 2).then(|| dense(layers, 3));
        for shape in real.into_iter().chain([pretend(layers, 40 * MIB)]) {
            let sixth = room_for(&shape) / 6;
            // The tensors of a real one are counted for each layout, which takes its time.
            let most = if matches!(shape, ModelShape::Pretend(_)) { 4 } else { 3 };
            for kinds in all.iter().filter(|kinds| kinds.len() <= most) {
                let of = |(number, kind): (u32, &usize)| {
                    let (sixths, rate) = KINDS[*kind];
                    worker(number, sixths * sixth, rate * GIB, None)
                };
                let workers: Vec<_> = (1..).zip(kinds).map(of).collect();
                let inventory = Inventory { workers, ..Inventory::default() };
                for ask in asks(kinds.len() as u32, layers, 3) {
                    let (found, best) = compare(&inventory, &shape, ask, In::Kinds, None);
                    assert_eq!(found, best, "{ask} of {layers} layers on workers {kinds:?}");
                    if best.is_some() { fit += 1 } else { not += 1 }
                }
            }
        }
    }
    assert!(fit > 1500 && not > 60, "the cases are lopsided: {fit} fit, {not} not");
}

#[test]
fn five_to_ten_workers_that_all_differ_are_laid_out_as_well_as_can_be() {
    let mut numbers = Numbers(17);
    let (mut fit, mut not) = (0, 0);
    for count in 5..=10 {
        // What is looked at grows with the workers' power of the stages.
        let (layers_most, draws) = if count <= 6 { (3, 2) } else { (2, 1) };
        for layers in 1..=layers_most {
            for draw in 0..draws {
                let shape = match draw {
                    0 => pretend(layers, (20 + numbers.below(60)) * MIB),
                    _ => dense(layers, 4),
                };
                let room = room_for(&shape);
                // No rate is within a tenth of another, and the order says nothing about who has room.
                let rates = std::iter::successors(Some(GIB), |rate| Some(rate / 5 * 6));
                let mut workers: Vec<_> = (1..=count)
                    .zip(rates)
                    .map(|(n, rate)| worker(n, room * (1 + numbers.below(12)) / 10, rate, None))
                    .collect();
                workers.sort_by_key(|worker| worker.budget);
                let inventory = Inventory { workers, ..Inventory::default() };
                for ask in asks(count, layers, 4) {
                    let (found, best) = compare(&inventory, &shape, ask, In::Kinds, None);
                    assert_eq!(found, best, "{ask} of {layers} layers on {count}, draw {draw}");
                    if best.is_some() { fit += 1 } else { not += 1 }
                }
            }
        }
    }
    assert!(fit > 100 && not > 5, "the cases are lopsided: {fit} fit, {not} not");
}

#[test]
fn ten_workers_that_all_differ_are_searched_in_every_order() {
    let mut numbers = Numbers(3);
    for layers in 2..=4 {
        // No rate is within a tenth of another.
        let rates = std::iter::successors(Some(GIB), |rate| Some(rate / 5 * 6));
        let rates: Vec<u64> = rates.take(10).collect();
        let mut all = inventory(&rates);
        for worker in &mut all.workers {
            worker.budget = Bytes((1 + numbers.below(2)) * 150 * MIB);
        }
        for objective in [Objective::Latency, Objective::Throughput] {
            let mesh = Some(format!("{layers}x1").parse().unwrap());
            let ask = MeshAsk {
                mesh,
                objective: Some(objective),
                reduction: None,
                kv: None,
                activations: None,
            };
            let (found, best) = compare(&all, &pretend(layers, 60 * MIB), ask, In::Kinds, None);
            assert!(best.is_some());
            assert_eq!(found, best, "{layers} layers, {objective}");
        }
    }
}

#[test]
fn ten_workers_with_ranks_left_open_are_searched_in_every_order() {
    let rates = std::iter::successors(Some(GIB), |rate| Some(rate / 5 * 6));
    let rates: Vec<u64> = rates.take(10).collect();
    for (number, memory) in [(0, 45 * MIB), (1, 150 * MIB)] {
        let mut all = inventory(&rates);
        for (index, worker) in (0..).zip(&mut all.workers) {
            worker.budget = Bytes(memory + index % 3 * 20 * MIB);
        }
        for objective in [Objective::Latency, Objective::Throughput] {
            let ask = MeshAsk { objective: Some(objective), ..mesh("auto") };
            let (found, best) = compare(&all, &pretend(2, 60 * MIB), ask, In::Kinds, None);
            assert!(best.is_some());
            assert_eq!(found, best, "memory {number}, {objective}");
        }
    }
}

#[test]
fn a_chain_of_ten_is_cut_as_well_as_can_be() {
    let mut numbers = Numbers(11);
    for case_number in 0..12 {
        let (mut inventory, _) = case(&mut numbers, 1, 1);
        inventory.workers = (1..=10)
            .map(|n| worker(n, (90 + numbers.below(300)) * MIB, GIB * (1 + numbers.below(4)), None))
            .collect();
        let objective = [Objective::Latency, Objective::Throughput][case_number % 2];
        let mesh = [Some("auto"), Some("3x1"), Some("2x2")][case_number % 3];
        let mesh = mesh.map(|mesh| mesh.parse().unwrap());
        let ask = MeshAsk {
            mesh,
            objective: Some(objective),
            reduction: None,
            kv: None,
            activations: None,
        };
        let mut asked = ask;
        if case_number % 3 == 0 {
            // Powers of two are all that a chain tries where ranks are left open.
            asked.mesh = Some(MeshAsked::Exactly(Mesh { stages: 4, ranks: 1 }));
        }
        let (found, best) = compare(&inventory, &pretend(6, 40 * MIB), asked, In::Chain, None);
        assert_eq!(found, best, "case {case_number}");
    }
}

#[test]
fn a_chain_over_many_zones_is_cut_as_well_as_can_be_where_their_ways_are_alike() {
    let mut numbers = Numbers(13);
    let (mut fit, mut in_one) = (0, 0);
    for case_number in 0..60 {
        let zones = ["a", "a", "b", "b", "b", "c", "d", "d"];
        let of = |(n, zone): (u32, &str), numbers: &mut Numbers| {
            let memory = (90 + numbers.below(300)) * MIB;
            worker(n, memory, GIB * (1 + numbers.below(4)), Some(zone))
        };
        let workers = (1..).zip(zones).map(|one| of(one, &mut numbers)).collect();
        let inventory = Inventory { workers, ..Inventory::default() };
        let objective = [Objective::Latency, Objective::Throughput][case_number % 2];
        let mesh = ["1x1", "2x1", "3x1"][case_number % 3].parse().ok();
        let ask = MeshAsk {
            mesh,
            objective: Some(objective),
            reduction: None,
            kv: None,
            activations: None,
        };
        let shape = pretend(4, (20 + numbers.below(100)) * MIB);
        let (found, best) = compare(&inventory, &shape, ask, In::NearOrFar, None);
        assert_eq!(found, best, "case {case_number}: {ask}");
        fit += usize::from(found.is_some());
        // Hops inside a zone take a tenth of those between two.
        let chosen = planned(&inventory, &shape, ask, None);
        in_one += usize::from(chosen.is_ok_and(|plan| {
            let zone = |node: &NodeId| zones[node.number as usize - 1];
            plan.stages.len() > 1
                && plan.nodes().all(|n| Some(zone(&n)) == plan.head().as_ref().map(zone))
        }));
    }
    assert!(fit > 30 && in_one > 5, "the cases are lopsided: {fit} fit, {in_one} in one zone");
}
