//! Models of the tests as chains of shards in one process: what stages do, without their links.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod matrix;
pub mod stored;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use shoal_protocol::id::{
    AdapterId, DeploymentName, Generation, NodeId, RankIndex, ReplicaId, StageIndex,
};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Adapter, Checkpoint, EncoderSpec, ModelSpec, Part, Split};
use shoal_protocol::plan::{
    Assignment, KvPrecision, ModelRef, ModelSource, Numerics, Precision, ReplicaLimits,
    ReplicaPlan, ShardPlan, StagePlan,
};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::collective::local::Local;
use shoal_shard_worker::model::{
    AdapterSlices, Batch, LoadError, LoadOptions, ShardModel, Span, load_shard,
};

/// Room for a handful of the longest sequences of the fixtures.
pub const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 96,
    context_max: 512,
    step_rows_max: 256,
    sequences_max: 16,
    steps_in_flight_max: 1,
};

/// One reference model and what it should say.
#[derive(Deserialize)]
pub struct Case {
    #[serde(rename = "model")]
    pub name: String,
    pub prompts: Vec<Prompt>,
}

/// A prompt and its greedy continuation by the reference implementation.
#[derive(Deserialize)]
pub struct Prompt {
    pub prompt_ids: Vec<u32>,
    pub continuation_ids: Vec<u32>,
    pub first_logprobs: Vec<(usize, f64)>,
    pub chosen_logprobs: Vec<f64>,
}

impl Prompt {
    /// Prompt and continuation without its last token: what is computed to obtain all logits.
    pub fn inputs(&self) -> Vec<u32> {
        let continued = &self.continuation_ids[..self.continuation_ids.len() - 1];
        [&self.prompt_ids, continued].concat()
    }

    /// The position whose logits give the first token of the continuation.
    pub fn first_sampled(&self) -> usize {
        self.prompt_ids.len() - 1
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// All cases; there are 17, and a test that finds none must not pass.
pub fn cases() -> Vec<Case> {
    let folder = fixtures().join("cases");
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 17, "{} holds only {} cases", folder.display(), files.len());
    files
        .iter()
        .map(|file| serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap())
        .collect()
}

impl Case {
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&fixtures().join("models").join(&self.name)).unwrap()
    }
}

/// The cuts into stages in which every case is compared with itself uncut; docs/MODELS.md says the same.
pub fn cuts_of(layers: u32) -> Vec<Vec<u32>> {
    let mut cuts = vec![
        vec![0, layers / 2, layers],
        vec![0, 1, layers],
        vec![0, layers - 1, layers],
        vec![0, layers / 3, 2 * layers / 3, layers],
        vec![0, 1, layers - 1, layers],
        (0..=layers).collect(),
    ];
    cuts.retain(|cuts| cuts.windows(2).all(|cut| cut[0] < cut[1]));
    cuts.sort();
    cuts.dedup();
    cuts
}

/// In how few bits weights and cache of one case of each family are held, to be compared over cuts, ranks
/// and company.
pub const FEW_BITS: (Precision, KvPrecision) = (Precision::Q4K, KvPrecision::Q8_0);

/// Whether a case is the first of its family, by name.
pub fn stands_for_family(case: &Case, all: &[Case]) -> bool {
    let family = case.checkpoint().spec().family;
    let first = all.iter().find(|other| other.checkpoint().spec().family == family);
    first.is_some_and(|first| first.name == case.name)
}

/// How a model is cut and computed.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The borders of the stages, 0 and the number of layers included.
    pub cuts: Vec<u32>,
    pub threads: usize,
    pub isa: Isa,
    pub held: Precision,
    /// Tensor ranks, by stage; a stage beyond the list has one.
    pub ranks: Vec<u32>,
    pub numerics: Numerics,
}

impl Setup {
    /// Unsplit, on one thread, with the best instructions, as stored.
    pub fn plain(spec: &ModelSpec) -> Self {
        Self {
            cuts: vec![0, spec.layers],
            threads: 1,
            isa: Isa::best(),
            held: spec.stored,
            ranks: Vec::new(),
            numerics: Numerics::N1,
        }
    }

    pub fn ranks_of(&self, stage: usize) -> u32 {
        self.ranks.get(stage).copied().unwrap_or(1)
    }

    pub fn part(&self, spec: &ModelSpec, stage: usize, rank: u32) -> Part {
        let split = Split { rank, ranks: self.ranks_of(stage) };
        spec.part(split, Reduction::of(self.numerics), self.held).unwrap()
    }
}

/// What the worker of this stage would be told.
pub fn assignment(checkpoint: &Checkpoint, setup: &Setup, stage: usize) -> Assignment {
    assignment_of(checkpoint, setup, stage, 0)
}

/// What the worker of this rank of a stage would be told.
pub fn assignment_of(
    checkpoint: &Checkpoint,
    setup: &Setup,
    stage: usize,
    rank: u32,
) -> Assignment {
    let spec = checkpoint.spec();
    let shard = |stage, layers, rank| ShardPlan {
        rank: RankIndex(rank),
        node: NodeId::worker(1),
        device: "cpu".into(),
        memory: setup.part(spec, stage, rank).memory(spec, layers, setup.held, &LIMITS),
    };
    let stages = setup
        .cuts
        .windows(2)
        .map(|cut| LayerRange::new(cut[0], cut[1]))
        .enumerate()
        .map(|(stage, layers)| {
            let ranks = 0..setup.ranks_of(stage);
            StagePlan { layers, shards: ranks.map(|rank| shard(stage, layers, rank)).collect() }
        })
        .collect();
    Assignment {
        replica: ReplicaPlan {
            id: ReplicaId(1),
            deployment: DeploymentName::new("test").unwrap(),
            generation: Generation(1),
            model: ModelRef {
                source: ModelSource::Folder { path: checkpoint.folder().display().to_string() },
                fingerprint: checkpoint.fingerprint(),
            },
            precision: setup.held,
            numerics: setup.numerics,
            stages,
            limits: LIMITS,
        },
        stage: StageIndex(stage as u32),
        rank: RankIndex(rank),
        peers: Vec::new(),
    }
}

/// Loads one stage with nobody watching.
pub fn load(
    checkpoint: &Checkpoint,
    assignment: &Assignment,
    threads: usize,
    isa: Isa,
) -> Result<Box<dyn ShardModel>, LoadError> {
    let options = LoadOptions {
        threads: NonZeroUsize::new(threads).unwrap(),
        on_progress: &|_, _| (),
        cancel: &AtomicBool::new(false),
    };
    load_shard(CpuOps::new(threads, isa).unwrap(), checkpoint, assignment, &options)
}

/// All stages of a model; of each all ranks.
pub struct Chain(pub Vec<Vec<(Box<dyn ShardModel>, Local)>>);

/// Rows of one sequence in a step.
pub struct Rows<'a> {
    pub tokens: &'a [u32],
    pub first_position: usize,
    pub blocks: &'a [u32],
    /// The position from which on logits are wanted.
    pub sample_from: usize,
    pub adapter: Option<AdapterId>,
}

impl Chain {
    pub fn load(checkpoint: &Checkpoint, setup: &Setup) -> Self {
        let stages = setup.cuts.len() - 1;
        let rank = |i, rank| {
            let assignment = assignment_of(checkpoint, setup, i, rank);
            load(checkpoint, &assignment, setup.threads, setup.isa).unwrap()
        };
        let stage = |i| {
            let ends = Local::stage(setup.ranks_of(i));
            (0..).zip(ends).map(|(r, end)| (rank(i, r), end)).collect()
        };
        Self((0..stages).map(stage).collect())
    }

    /// Takes one batch through all stages; the logits of the sampled rows, in order.
    pub fn step(&mut self, sequences: &[Rows<'_>]) -> Vec<Vec<f32>> {
        let (mut spans, mut tokens, mut sample_rows) = (Vec::new(), Vec::new(), Vec::new());
        for rows in sequences {
            let first_row = tokens.len();
            spans.push(Span {
                first_row,
                rows: rows.tokens.len(),
                first_position: rows.first_position as u32,
                blocks: rows.blocks,
                adapter: rows.adapter,
            });
            let sampled = rows.sample_from.saturating_sub(rows.first_position);
            sample_rows.extend((sampled..rows.tokens.len()).map(|row| first_row + row));
            tokens.extend_from_slice(rows.tokens);
        }
        let batch = Batch { spans: &spans, rows: tokens.len(), sample_rows: &sample_rows };
        let mut hidden = vec![f32::NAN; tokens.len() * self.0[0][0].0.hidden()];
        let mut logits = vec![Vec::new(); sample_rows.len()];
        let last = self.0.len() - 1;
        for (i, stage) in self.0.iter_mut().enumerate() {
            let tokens = (i == 0).then_some(tokens.as_slice());
            let (out, parts) = step_of_ranks(stage, &batch, tokens, &hidden, i == last);
            hidden = out;
            // Ranks stand in the order of their tokens.
            for part in parts {
                let width = part.len() / sample_rows.len().max(1);
                for (row, part) in logits.iter_mut().zip(part.chunks(width.max(1))) {
                    row.extend_from_slice(part);
                }
            }
        }
        logits
    }

    /// Loads an adapter at every shard.
    pub fn load_adapter(
        &mut self,
        (checkpoint, setup): (&Checkpoint, &Setup),
        id: AdapterId,
        adapter: &Adapter,
    ) {
        let spec = checkpoint.spec();
        for (i, stage) in self.0.iter_mut().enumerate() {
            let layers = LayerRange::new(setup.cuts[i], setup.cuts[i + 1]);
            for (rank, (model, _)) in (0..).zip(stage) {
                let part = setup.part(spec, i, rank);
                let slices = AdapterSlices::read(adapter, spec, &part, layers).unwrap();
                model.load_adapter(id, &slices).unwrap();
            }
        }
    }

    /// Forgets an adapter at every shard.
    pub fn unload_adapter(&mut self, id: AdapterId) {
        for (model, _) in self.0.iter_mut().flatten() {
            assert!(model.unload_adapter(id), "{id} was loaded");
        }
    }

    /// The logits at each position from `sample_from` on, the tokens computed in chunks.
    pub fn transcript(
        &mut self,
        tokens: &[u32],
        sample_from: usize,
        chunk: usize,
        blocks: &[u32],
    ) -> Vec<Vec<f32>> {
        self.transcript_with(None, (tokens, sample_from), chunk, blocks)
    }

    /// The same with an adapter.
    pub fn transcript_with(
        &mut self,
        adapter: Option<AdapterId>,
        (tokens, sample_from): (&[u32], usize),
        chunk: usize,
        blocks: &[u32],
    ) -> Vec<Vec<f32>> {
        let mut logits = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let first_position = i * chunk;
            let rows = Rows { tokens: part, first_position, blocks, sample_from, adapter };
            logits.extend(self.step(&[rows]));
        }
        logits
    }
}

/// One step at all ranks of a stage: the hidden states, which are the same bits at each, and each
/// rank's logits.
fn step_of_ranks(
    ranks: &mut [(Box<dyn ShardModel>, Local)],
    batch: &Batch<'_>,
    tokens: Option<&[u32]>,
    hidden: &[f32],
    samples: bool,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let step = |(model, end): &mut (Box<dyn ShardModel>, Local)| {
        let mut hidden = hidden.to_vec();
        let mut logits = vec![f32::NAN; batch.sample_rows.len() * model.vocab().len()];
        let out = samples.then_some(logits.as_mut_slice());
        model.forward(batch, tokens, &mut hidden, out, end).unwrap();
        (hidden, if samples { logits } else { Vec::new() })
    };
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| step(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (mut hiddens, logits): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let bits = |hidden: &Vec<f32>| hidden.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(samples || hiddens.iter().all(|h| bits(h) == bits(&hiddens[0])), "ranks differ");
    (hiddens.swap_remove(0), logits)
}

/// The blocks 0, 1, 2 …: enough for any one sequence.
pub fn blocks() -> Vec<u32> {
    (0..32).collect()
}

/// Fails at the first logit whose bits differ.
pub fn assert_same_bits(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: rows");
    for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
        let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
        if let Some(token) = found.iter().zip(expected).position(differ) {
            panic!("{what}: row {row}, token {token}: {} is not {}", found[token], expected[token]);
        }
        assert!(found.iter().all(|logit| logit.is_finite()), "{what}: row {row}");
    }
}

/// The token with the largest logit, the lower one of two equals.
/// How far a log-probability may be from that of the uncut model where partial sums are added.
pub const LOGPROB_TOLERANCE: f64 = 1e-4;

/// Logits of ranks that add partial sums: the same greedy token, and log-probabilities as float32 allows.
pub fn assert_close(found: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let pairs = log_softmax(found).into_iter().zip(log_softmax(expected));
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < LOGPROB_TOLERANCE, "{what}: {worst}");
        assert_eq!(argmax(found), argmax(expected), "{what}: the greedy token");
    }
}

pub fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.unwrap() as u32
}

/// Natural logarithms of the softmax, in f64.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    logits.iter().map(|&l| f64::from(l) - max - sum.ln()).collect()
}

/// A small seeded generator, so that a failure repeats.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// A model of random weights whose `config.json` is `config`. It goes with the folder.
pub fn random_model(config: &str) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), config);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

fn write_model(folder: &Path, config: &str) {
    std::fs::write(folder.join("config.json"), config).unwrap();
    let value = serde_json::from_str(config).unwrap();
    let (tensors, stored) = if EncoderSpec::is_encoder(&value) {
        let spec = EncoderSpec::from_config(&value).unwrap();
        (spec.tensors(LayerRange::new(0, spec.layers)), spec.stored)
    } else {
        let spec = ModelSpec::from_config_json(config).unwrap();
        (spec.tensors(LayerRange::new(0, spec.layers)), spec.stored)
    };
    let mut header = serde_json::Map::new();
    let (mut data, mut dice) = (Vec::new(), Dice(1));
    for tensor in tensors {
        // Several may be parts of one.
        if header.contains_key(&tensor.name) {
            continue;
        }
        let start = data.len();
        let scale = if tensor.is_matrix { (tensor.shape[1] as f32).sqrt().recip() } else { 1.0 };
        // Random values again and again; the period is a prime, so that no two rows are equal.
        let period: Vec<u8> = (0..8191)
            .flat_map(|_| {
                let value = (dice.below(2001) as f32 / 1000.0 - 1.0) * scale;
                match stored {
                    Precision::F32 => value.to_le_bytes().to_vec(),
                    Precision::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                    Precision::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
                    quantised => panic!("config.json cannot say {quantised}"),
                }
            })
            .collect();
        let elements: u64 = tensor.stored_shape().iter().product();
        let end = start + stored.row_bytes(elements) as usize;
        while data.len() < end {
            data.extend_from_slice(&period[..period.len().min(end - data.len())]);
        }
        let info = serde_json::json!({
            "dtype": stored.as_str().to_uppercase(),
            "shape": tensor.stored_shape(),
            "data_offsets": [start, end],
        });
        header.insert(tensor.name, info);
    }
    let header = serde_json::Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let bytes = [&length, header.as_bytes(), &data].concat();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}
