//! Encoders against sentence-transformers, and every way to compute them against the plain one: the first
//! within what float32 allows, the second in every bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use shoal_protocol::id::{DeploymentName, Generation, NodeId, RankIndex, ReplicaId, StageIndex};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Checkpoint, EncoderOutput, Split};
use shoal_protocol::plan::{
    Assignment, ModelRef, ModelSource, Numerics, Precision, ReplicaLimits, ReplicaPlan,
    ShardMemory, ShardPlan, StagePlan,
};
use shoal_protocol::request::SECOND_TEXT;
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::collective::local::Local;
use shoal_shard_worker::collective::{Alone, Collective};
use shoal_shard_worker::model::{Batch, LoadOptions, Output, ShardModel, Span, load_shard};

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 64,
    context_max: 128,
    step_rows_max: 256,
    sequences_max: 8,
    steps_in_flight_max: 2,
};

/// How far a number may be from the reference's, by the largest of its vector.
const TOLERANCE: f64 = 2e-5;

/// What sentence-transformers' own cosine may lack.
const COSINE_MIN: f64 = 0.99999;

#[derive(Deserialize)]
struct Case {
    #[serde(skip)]
    name: String,
    inputs: Vec<Input>,
}

#[derive(Deserialize)]
struct Input {
    ids: Vec<u32>,
    types: Vec<u32>,
    vector: Vec<f64>,
}

impl Input {
    /// The ids, those of a second text marked.
    fn marked(&self) -> Vec<u32> {
        let mark = |(id, kind): (&u32, &u32)| if *kind == 0 { *id } else { *id | SECOND_TEXT };
        self.ids.iter().zip(&self.types).map(mark).collect()
    }
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/encoders");
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 9, "only {names:?}");
    let read = |name: String| {
        let text = std::fs::read(folder.join(&name).join("case.json")).unwrap();
        Case { name, ..serde_json::from_slice(&text).unwrap() }
    };
    names.into_iter().map(read).collect()
}

impl Case {
    fn checkpoint(&self) -> Checkpoint {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/encoders");
        Checkpoint::open(&folder.join(&self.name)).unwrap()
    }
}

/// How an encoder is spread, and how ranks put their results together.
#[derive(Clone, Debug)]
struct Mesh {
    /// The borders of the stages, both ends included.
    cuts: Vec<u32>,
    /// Tensor ranks, by stage.
    ranks: Vec<u32>,
    numerics: Numerics,
    held: Precision,
    threads: usize,
}

impl Mesh {
    /// So many threads, one rank a stage.
    fn of_stages(cuts: &[u32], threads: usize) -> Self {
        let ranks = vec![1; cuts.len() - 1];
        let (numerics, held) = (Numerics::N1, Precision::F32);
        Self { cuts: cuts.to_vec(), ranks, numerics, held, threads }
    }

    fn plain(checkpoint: &Checkpoint) -> Self {
        Self::of_stages(&[0, checkpoint.spec().layers], 1)
    }
}

/// All stages of an encoder, each with its ranks.
struct Chain(Vec<Vec<(Box<dyn ShardModel>, Local)>>);

impl Chain {
    fn load(checkpoint: &Checkpoint, mesh: &Mesh, isa: Isa) -> Self {
        let shard = |rank| ShardPlan {
            rank: RankIndex(rank),
            node: NodeId::worker(1),
            device: "cpu".into(),
            memory: ShardMemory::default(),
        };
        let stages = mesh.cuts.windows(2).zip(&mesh.ranks).map(|(cut, ranks)| StagePlan {
            layers: LayerRange::new(cut[0], cut[1]),
            shards: (0..*ranks).map(shard).collect(),
        });
        let replica = ReplicaPlan {
            id: ReplicaId(1),
            deployment: DeploymentName::new("test").unwrap(),
            generation: Generation(1),
            model: ModelRef {
                source: ModelSource::Folder { path: checkpoint.folder().display().to_string() },
                fingerprint: checkpoint.fingerprint(),
            },
            precision: mesh.held,
            numerics: mesh.numerics,
            stages: stages.collect(),
            limits: LIMITS,
        };
        let load = |stage, rank| {
            let assignment = Assignment {
                replica: replica.clone(),
                stage: StageIndex(stage),
                rank: RankIndex(rank),
                peers: Vec::new(),
            };
            let options = LoadOptions {
                threads: NonZeroUsize::new(mesh.threads).unwrap(),
                on_progress: &|_, _| (),
                cancel: &AtomicBool::new(false),
            };
            let ops = CpuOps::new(mesh.threads, isa).unwrap();
            load_shard(ops, checkpoint, &assignment, &options).unwrap()
        };
        let stage = |(stage, ranks): (u32, &u32)| {
            let ends = Local::stage(*ranks).into_iter().zip(0..);
            ends.map(|(end, rank)| (load(stage, rank), end)).collect()
        };
        Self((0..).zip(&mesh.ranks).map(stage).collect())
    }

    /// Takes inputs through all stages in one step; the vector of each.
    fn step(&mut self, inputs: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let blocks: Vec<u32> = (0..LIMITS.kv_blocks).collect();
        let (mut spans, mut tokens, mut sample_rows) = (Vec::new(), Vec::new(), Vec::new());
        for input in inputs {
            let first_row = tokens.len();
            let span = Span {
                first_row,
                rows: input.len(),
                first_position: 0,
                blocks: &blocks,
                adapter: None,
            };
            spans.push(span);
            tokens.extend_from_slice(input);
            sample_rows.push(tokens.len() - 1);
        }
        let batch = Batch { spans: &spans, rows: tokens.len(), sample_rows: &sample_rows };
        let mut hidden = vec![f32::NAN; tokens.len() * self.0[0][0].0.hidden()];
        let last = self.0.len() - 1;
        let mut told = Vec::new();
        for (i, stage) in self.0.iter_mut().enumerate() {
            let tokens = (i == 0).then_some(tokens.as_slice());
            let (next, vectors) = ranks_step(stage, (&batch, tokens), &hidden, i == last);
            (hidden, told) = (next, vectors);
        }
        told
    }
}

/// All ranks of a stage take the step, each on a thread; all must have the same.
fn ranks_step(
    ranks: &mut [(Box<dyn ShardModel>, Local)],
    (batch, tokens): (&Batch<'_>, Option<&[u32]>),
    hidden: &[f32],
    is_last: bool,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let step = |(model, end): &mut (Box<dyn ShardModel>, Local)| {
        assert_eq!(model.output(), Output::Vectors);
        let (mut hidden, width) = (hidden.to_vec(), model.vocab().len());
        let mut vectors = vec![f32::NAN; batch.sample_rows.len() * width];
        let out = is_last.then_some(vectors.as_mut_slice());
        let peers: &mut dyn Collective = end;
        model.forward(batch, tokens, &mut hidden, out, peers).unwrap();
        let vectors = vectors.chunks(width.max(1)).map(<[f32]>::to_vec).collect::<Vec<_>>();
        (hidden, vectors)
    };
    let mut found: Vec<_> = match ranks {
        [alone] => vec![step(alone)],
        _ => std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| step(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        }),
    };
    let (hidden, vectors) = found.swap_remove(0);
    for (theirs, _) in &found {
        same_bits(std::slice::from_ref(theirs), std::slice::from_ref(&hidden), "ranks differ");
    }
    if is_last {
        found.iter().for_each(|(_, theirs)| same_bits(theirs, &vectors, "ranks differ"));
    }
    (hidden, if is_last { vectors } else { Vec::new() })
}

fn cosine(a: &[f32], b: &[f64]) -> f64 {
    let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum();
    let squares: f64 = a.iter().map(|a| f64::from(*a).powi(2)).sum();
    product / (squares * b.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

#[test]
fn vectors_are_those_of_sentence_transformers() {
    let (mut worst, mut least) = (0.0_f64, 1.0_f64);
    for case in cases() {
        let checkpoint = case.checkpoint();
        let mut chain = Chain::load(&checkpoint, &Mesh::plain(&checkpoint), Isa::best());
        for input in &case.inputs {
            let found = chain.step(&[input.marked()]).remove(0);
            let what = format!("{} with {} tokens", case.name, input.ids.len());
            assert_eq!(found.len(), input.vector.len(), "{what}");
            let largest = input.vector.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
            for (found, expected) in found.iter().zip(&input.vector) {
                let off = (f64::from(*found) - expected).abs() / largest.max(1e-3);
                assert!(off < TOLERANCE, "{what}: {found} is not {expected}: {off}");
                worst = worst.max(off);
            }
            let is_embedding =
                matches!(checkpoint.encoder().unwrap().output, EncoderOutput::Embedding { .. });
            if is_embedding {
                let cosine = cosine(&found, &input.vector);
                assert!(cosine >= COSINE_MIN, "{what}: {cosine}");
                least = least.min(cosine);
            }
        }
    }
    println!("largest difference {worst:e} of the largest number; smallest cosine {least}");
}

/// The vectors of each input by itself, unsplit, on one thread.
fn plain(case: &Case) -> Vec<Vec<f32>> {
    let checkpoint = case.checkpoint();
    let mut chain = Chain::load(&checkpoint, &Mesh::plain(&checkpoint), Isa::best());
    case.inputs.iter().map(|input| chain.step(&[input.marked()]).remove(0)).collect()
}

fn same_bits(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    let bits = |vectors: &[Vec<f32>]| -> Vec<Vec<u32>> {
        vectors.iter().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect()
    };
    assert!(bits(found) == bits(expected), "{what}");
}

#[test]
fn stages_threads_and_instructions_change_no_bit() {
    for case in cases() {
        let expected = plain(&case);
        let checkpoint = case.checkpoint();
        let layers = checkpoint.spec().layers;
        let mut cuts = vec![vec![0, layers]];
        if layers > 1 {
            cuts.push(vec![0, 1, layers]);
            cuts.push((0..=layers).collect());
        }
        for cuts in cuts {
            for threads in [1, 3] {
                for isa in Isa::all() {
                    let mesh = Mesh::of_stages(&cuts, threads);
                    let mut chain = Chain::load(&checkpoint, &mesh, isa);
                    let found: Vec<_> = case
                        .inputs
                        .iter()
                        .map(|input| chain.step(&[input.marked()]).remove(0))
                        .collect();
                    let what = format!("{} cut at {cuts:?}, {threads} threads, {isa}", case.name);
                    same_bits(&found, &expected, &what);
                }
            }
        }
    }
}

/// How far a vector of summed ranks may be from that of one, by the largest of its numbers.
const SUM_TOLERANCE: f32 = 1e-4;

#[test]
fn ranks_change_no_bit_where_sums_are_exact_and_little_where_they_are_not() {
    let mut tried = 0;
    for case in cases() {
        let expected = plain(&case);
        let checkpoint = case.checkpoint();
        let spec = checkpoint.spec();
        let (layers, most) = (spec.layers, spec.ranks_max().0);
        for ranks in 2..=most {
            let mut meshes = vec![(vec![0, layers], vec![ranks])];
            if layers > 1 {
                meshes.push((vec![0, 1, layers], vec![ranks, ranks]));
                meshes.push((vec![0, 1, layers], vec![1, ranks]));
                meshes.push((vec![0, 1, layers], vec![ranks, 1]));
            }
            for (cuts, ranks) in meshes {
                for numerics in [Numerics::N1, Numerics::N1Sum] {
                    let (cuts, ranks) = (cuts.clone(), ranks.clone());
                    let mesh = Mesh { cuts, ranks, numerics, held: Precision::F32, threads: 1 };
                    let mut chain = Chain::load(&checkpoint, &mesh, Isa::best());
                    let inputs: Vec<_> = case.inputs.iter().map(Input::marked).collect();
                    let found = chain.step(&inputs);
                    let what = format!("{} on {mesh:?}", case.name);
                    match numerics.sums() {
                        false => same_bits(&found, &expected, &what),
                        true => are_near(&found, &expected, &what),
                    }
                    tried += 1;
                }
            }
        }
    }
    assert!(tried >= 50, "only {tried} meshes");
}

/// Weights and rows in whole numbers: the bits of one shard over stages, ranks and threads.
#[test]
fn products_of_whole_numbers_have_the_same_bits_however_an_encoder_is_cut() {
    for case in cases() {
        let checkpoint = case.checkpoint();
        let layers = checkpoint.spec().layers;
        let whole =
            Mesh { numerics: Numerics::N2, held: Precision::Q8_0, ..Mesh::plain(&checkpoint) };
        let inputs: Vec<_> = case.inputs.iter().map(Input::marked).collect();
        let expected: Vec<_> = {
            let mut chain = Chain::load(&checkpoint, &whole, Isa::best());
            inputs.iter().map(|input| chain.step(std::slice::from_ref(input)).remove(0)).collect()
        };
        assert_ne!(expected, plain(&case), "{}", case.name);
        let most = checkpoint.spec().ranks_max().0.min(2);
        let mut meshes = vec![Mesh { ranks: vec![most], threads: 2, ..whole.clone() }];
        if layers > 1 {
            let cuts = vec![0, 1, layers];
            meshes.push(Mesh { cuts, ranks: vec![most, 1], ..whole.clone() });
        }
        for mesh in meshes {
            let found = Chain::load(&checkpoint, &mesh, Isa::best()).step(&inputs);
            same_bits(&found, &expected, &format!("{} on {mesh:?}", case.name));
        }
    }
}

fn are_near(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    for (found, expected) in found.iter().zip(expected) {
        let largest = expected.iter().fold(1e-3_f32, |max, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            let off = (found - expected).abs() / largest;
            assert!(off <= SUM_TOLERANCE, "{what}: {found} is not {expected}");
        }
    }
}

/// Ranks hold their heads, panels and blocks of tokens, and all of what is small.
#[test]
fn ranks_hold_parts_that_make_the_whole() {
    let case = cases().into_iter().find(|case| case.name == "modern-bias-bf16").unwrap();
    let checkpoint = case.checkpoint();
    let spec = checkpoint.encoder().unwrap();
    let layers = LayerRange::new(0, spec.layers);
    let held = |rank| {
        let part = spec.part(Split { rank, ranks: 2 }, Reduction::Exact, spec.stored).unwrap();
        spec.part_tensors(&part, layers)
    };
    for whole in spec.tensors(layers) {
        let parts = [held(0), held(1)];
        let rows: Vec<u64> = parts
            .iter()
            .flatten()
            .filter(|part| part.spec == whole)
            .map(|part| part.row_count())
            .collect();
        let sum: u64 = rows.iter().sum();
        assert!(
            sum == whole.shape[0] || rows.iter().all(|rows| *rows == whole.shape[0]),
            "{}: {rows:?} of {:?}",
            whole.name,
            whole.shape
        );
    }
}

#[test]
fn what_else_is_in_a_step_changes_no_bit() {
    for case in cases() {
        let expected = plain(&case);
        let checkpoint = case.checkpoint();
        let layers = checkpoint.spec().layers;
        let mesh = Mesh::of_stages(&[0, layers], 2);
        let mut chain = Chain::load(&checkpoint, &mesh, Isa::best());
        let inputs: Vec<_> = case.inputs.iter().map(Input::marked).collect();
        for order in [vec![0, 1, 2, 3, 4], vec![4, 3, 2, 1, 0, 2], vec![5, 0], vec![1, 5, 4]] {
            let step: Vec<_> = order.iter().map(|&i: &usize| inputs[i].clone()).collect();
            let expected: Vec<_> = order.iter().map(|&i| expected[i].clone()).collect();
            same_bits(&chain.step(&step), &expected, &format!("{} in order {order:?}", case.name));
        }
    }
}

#[test]
fn a_part_of_an_input_is_refused() {
    let case = cases().remove(0);
    let checkpoint = case.checkpoint();
    let mut chain = Chain::load(&checkpoint, &Mesh::plain(&checkpoint), Isa::best());
    let model = &mut chain.0[0][0].0;
    let mut hidden = vec![0.0; 3 * model.hidden()];
    for (first_position, sample_rows) in [(1, vec![2]), (0, vec![]), (0, vec![0])] {
        let spans = [Span { first_row: 0, rows: 3, first_position, blocks: &[0], adapter: None }];
        let batch = Batch { spans: &spans, rows: 3, sample_rows: &sample_rows };
        let mut vectors = vec![0.0; sample_rows.len() * model.vocab().len()];
        let vectors = Some(vectors.as_mut_slice());
        let error =
            model.forward(&batch, Some(&[5, 6, 7]), &mut hidden, vectors, &mut Alone).unwrap_err();
        assert!(error.to_string().contains("whole inputs"), "{error}");
    }
}

/// What the planner promises is what the weights take, the padding of panels included.
#[test]
fn memory_is_worked_out_for_every_stage() {
    for case in cases() {
        let checkpoint = case.checkpoint();
        let spec = checkpoint.encoder().unwrap();
        let bytes = |start, end| {
            spec.shard_memory(LayerRange::new(start, end), Precision::F32, &LIMITS).weights.0
        };
        let parts: u64 = (0..spec.layers).map(|layer| bytes(layer, layer + 1)).sum();
        assert_eq!(parts, bytes(0, spec.layers), "{}", case.name);
    }
}
