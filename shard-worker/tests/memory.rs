//! What a shard really takes against what a plan says it takes. A process of its own: it looks at
//! the memory of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::num::NonZeroUsize;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::{Assignment, Numerics};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa, held_bytes};
use shoal_shard_worker::collective::Alone;
use shoal_shard_worker::model::{Batch, LoadOptions, ShardModel, Span, load_shard};

use support::{Case, Chain, LIMITS, Rows, Setup, assignment, cases, random_model};

/// Both tests look at the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// The piece that each thread that loads holds.
const PIECE: u64 = 4 << 20;
/// Pages, and what the allocator keeps.
const SLACK: u64 = 4 << 20;

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: u64 = line.unwrap().split_whitespace().next().unwrap().parse().unwrap();
    kib << 10
}

/// Anonymous memory of this process.
fn anonymous() -> u64 {
    status("RssAnon")
}

/// Loads the shard; the most that the process had in memory meanwhile, beyond what it had before.
///
/// The kernel keeps the mark, so that nothing between two looks is missed. It counts pages of files
/// too, of which a load, which maps none, adds only code.
fn load(
    checkpoint: &Checkpoint,
    assignment: &Assignment,
    threads: usize,
) -> (Box<dyn ShardModel>, u64) {
    let options = LoadOptions {
        threads: NonZeroUsize::new(threads).unwrap(),
        on_progress: &|_, _| (),
        cancel: &AtomicBool::new(false),
    };
    let ops = CpuOps::new(1, Isa::best()).unwrap();
    // Lowers the mark to what is in memory now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let shard = load_shard(ops, checkpoint, assignment, &options).unwrap();
    (shard, status("VmHWM") - before)
}

#[test]
fn a_shard_takes_what_the_plan_says_and_no_more_while_it_loads() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = r#"{
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1536, "intermediate_size": 2051,
        "num_attention_heads": 12, "num_key_value_heads": 6, "num_hidden_layers": 3,
        "vocab_size": 4001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16", "tie_word_embeddings": true
    }"#;
    let (_folder, checkpoint) = random_model(config);
    let spec = checkpoint.spec();
    let setup = Setup { cuts: vec![0, 1, 3], ..Setup::plain(spec) };
    let planned = spec.shard_memory(LayerRange::new(1, 3), setup.held, &LIMITS);
    let assignment = assignment(&checkpoint, &setup, 1);

    let most = |threads| planned.weights.0 * 21 / 20 + threads * PIECE + SLACK;

    let before = anonymous();
    let (mut shard, peak) = load(&checkpoint, &assignment, 2);
    let loaded = anonymous() - before;
    assert!(peak <= most(2), "peak {peak} of at most {}: {planned:?}", most(2));
    assert!(loaded + (1 << 20) >= planned.weights.0, "loaded {loaded}: {planned:?}");

    // Every block written, every buffer used.
    let blocks: Vec<u32> = (0..LIMITS.kv_blocks).collect();
    let rows = LIMITS.step_rows_max as usize;
    let mut hidden = vec![0.5; rows * 1536];
    let mut logits = vec![0.0; 4001];
    for own in blocks.chunks(rows / 16) {
        let rows = own.len() * 16;
        let spans = [Span { first_row: 0, rows, first_position: 0, blocks: own, adapter: None }];
        let batch = Batch { spans: &spans, rows, sample_rows: &[0] };
        hidden.fill(0.5);
        let hidden = &mut hidden[..rows * 1536];
        shard.forward(&batch, None, hidden, Some(&mut logits), &mut Alone).unwrap();
    }
    let used = anonymous() - before;
    let total = planned.total().0;
    // What the threads allocated may be kept for the next ones.
    let slack = 2 * PIECE + SLACK;
    assert!(used <= total + slack, "used {used}: {planned:?}");
    assert!(used + slack >= total, "used {used}: {planned:?}");

    // As many threads as ever load: their pieces are most of what a load takes beyond the plan.
    drop(shard);
    let (_shard, peak) = load(&checkpoint, &assignment, 16);
    assert!(peak <= most(16), "peak {peak} of at most {}: {planned:?}", most(16));
}

#[test]
fn an_encoders_shard_takes_what_the_plan_says() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = r#"{
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 1024,
        "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 3,
        "vocab_size": 4001, "max_position_embeddings": 512, "type_vocab_size": 2
    }"#;
    let (_folder, checkpoint) = random_model(config);
    let setup = Setup { cuts: vec![0, 1, 3], ..Setup::plain(checkpoint.spec()) };
    let spec = checkpoint.encoder().unwrap();
    let planned = spec.shard_memory(LayerRange::new(1, 3), setup.held, &LIMITS);
    let assignment = assignment(&checkpoint, &setup, 1);
    assert_eq!(planned.kv.0, 0, "nothing is kept");

    let before = anonymous();
    let (mut shard, _) = load(&checkpoint, &assignment, 1);
    // A full step, its last blocks partly empty.
    let blocks: Vec<u32> = (0..LIMITS.kv_blocks).collect();
    let rows = LIMITS.step_rows_max as usize;
    let each = rows / LIMITS.sequences_max as usize;
    let span = |i: usize| {
        let (first_row, rows) = (i * each, each);
        Span { first_row, rows, first_position: 0, blocks: &blocks, adapter: None }
    };
    let spans: Vec<_> = (0..LIMITS.sequences_max as usize).map(span).collect();
    let sample_rows: Vec<_> = spans.iter().map(|span| span.first_row + span.rows - 1).collect();
    let batch = Batch { spans: &spans, rows, sample_rows: &sample_rows };
    let mut hidden = vec![0.5; rows * 1024];
    let mut vectors = vec![0.0; spans.len() * 1024];
    shard.forward(&batch, None, &mut hidden, Some(&mut vectors), &mut Alone).unwrap();
    let (used, total) = (anonymous() - before, planned.total().0);
    // What the thread allocated to load may be kept; a cache whose blocks are not all used is smaller.
    let slack = PIECE + (2 << 20);
    assert!(used <= total + slack, "used {used}: {planned:?}");
    assert!(used + slack >= total, "used {used}: {planned:?}");
    println!("planned {total}, used {used}");
}

/// Fills a whole step, so that all that is made late is there too.
fn full_step(chain: &mut Chain) {
    let blocks: Vec<u32> = (0..LIMITS.step_rows_max / 16).collect();
    let tokens: Vec<u32> = (1..17).collect();
    let rows = |block: &u32| Rows {
        tokens: &tokens,
        first_position: 0,
        blocks: &blocks[*block as usize..=*block as usize],
        sample_from: 15,
        adapter: None,
    };
    chain.step(&blocks.iter().map(rows).collect::<Vec<_>>());
}

/// Every shard of a model in this mesh: what it gives back when it goes, against its plan. How many shards.
fn check_mesh(case: &Case, checkpoint: &Checkpoint, setup: &Setup) -> usize {
    let spec = checkpoint.spec();
    let mut chain = Chain::load(checkpoint, setup);
    full_step(&mut chain);
    let mut shards = 0;
    for (stage, cut) in setup.cuts.windows(2).enumerate() {
        let layers = LayerRange::new(cut[0], cut[1]);
        let ranks: Vec<_> = chain.0[stage].drain(..).collect();
        for (rank, shard) in (0..).zip(ranks) {
            let part = setup.part(spec, stage, rank);
            // The hidden states of steps in flight and the logits are the stage's, not the shard's.
            let vocab = part.widths(spec).vocab;
            let stages_own = LIMITS.buffer_bytes(spec.hidden, vocab, layers.end == spec.layers);
            // Nor are messages between ranks there any more.
            let messages = part.travelling_bytes(spec, LIMITS.step_rows_max);
            let total = part.memory(spec, layers, setup.held, &LIMITS).total().0;
            let planned = total - stages_own.0 - messages.0;
            let before = held_bytes();
            drop(shard);
            let held = before - held_bytes();
            assert!(
                held.abs_diff(planned) * 50 <= planned,
                "{} {:?} {:?}: stage {stage} rank {rank} holds {held} of {planned}",
                case.name,
                setup.ranks,
                setup.numerics,
            );
            shards += 1;
        }
    }
    shards
}

/// To two percent, of every kind of model that there is a reference of: dense, with experts, with compressed
/// caches.
#[test]
fn every_shard_of_every_mesh_holds_what_the_plan_says() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut shards, mut split) = (0, [0; 3]);
    for case in cases() {
        let checkpoint = case.checkpoint();
        let spec = checkpoint.spec();
        let plain = Setup::plain(spec);
        let half = vec![0, spec.layers / 2, spec.layers];
        let kind = match (spec.options.mla, spec.options.moe) {
            (Some(_), _) => 2,
            (None, Some(_)) => 1,
            (None, None) => 0,
        };
        shards += check_mesh(&case, &checkpoint, &plain);
        if spec.layers > 1 {
            let cut = Setup { cuts: half.clone(), ..plain.clone() };
            shards += check_mesh(&case, &checkpoint, &cut);
        }
        let (most, _) = spec.ranks_max();
        if most < 2 || spec.layers < 2 {
            continue;
        }
        for numerics in [Numerics::N1, Numerics::N1Sum] {
            let ranks = vec![2, 1];
            let mesh = Setup { cuts: half.clone(), ranks, numerics, ..plain.clone() };
            shards += check_mesh(&case, &checkpoint, &mesh);
            let mesh = Setup { ranks: vec![2, 2], ..mesh };
            shards += check_mesh(&case, &checkpoint, &mesh);
        }
        split[kind] += 1;
    }
    assert!(shards > 200 && split[0] > 5, "{shards} shards; split dense, experts, MLA: {split:?}");
}
