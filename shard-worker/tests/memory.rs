//! What a shard really takes against what a plan says it takes. A process of its own: it looks at
//! the memory of the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use shoal_protocol::model::Checkpoint;
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::model::{Batch, LoadOptions, Span, load_shard};

use support::{LIMITS, Setup, assignment, write_model};

/// Pages, buffers of the threads that load (4 MiB each), and what the allocator keeps.
const SLACK: u64 = 12 << 20;

/// Anonymous memory of this process, in bytes.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn a_shard_takes_what_the_plan_says_and_no_more_while_it_loads() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1536, "intermediate_size": 2051,
        "num_attention_heads": 12, "num_key_value_heads": 6, "num_hidden_layers": 3,
        "vocab_size": 4001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16", "tie_word_embeddings": true
    }"#;
    write_model(folder.path(), config);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let spec = checkpoint.spec();
    let setup = Setup { cuts: vec![0, 1, 3], ..Setup::plain(spec) };
    let planned = spec.shard_memory(LayerRange::new(1, 3), setup.held, &LIMITS);

    let before = anonymous();
    let peak = AtomicU64::new(0);
    let options = LoadOptions {
        threads: NonZeroUsize::new(2).unwrap(),
        on_progress: &|_, _| {
            peak.fetch_max(anonymous(), Ordering::Relaxed);
        },
        cancel: &AtomicBool::new(false),
    };
    let ops = CpuOps::new(1, Isa::best()).unwrap();
    let mut shard =
        load_shard(ops, &checkpoint, &assignment(&checkpoint, &setup, 1), &options).unwrap();
    let peak = peak.into_inner() - before;
    let loaded = anonymous() - before;
    assert!(peak <= planned.weights.0 + planned.weights.0 / 20 + SLACK, "peak {peak}: {planned:?}");
    assert!(loaded + (1 << 20) >= planned.weights.0, "loaded {loaded}: {planned:?}");

    // Every block written, every buffer used.
    let blocks: Vec<u32> = (0..LIMITS.kv_blocks).collect();
    let rows = LIMITS.step_rows_max as usize;
    let mut hidden = vec![0.5; rows * 1536];
    let mut logits = vec![0.0; 4001];
    for own in blocks.chunks(rows / 16) {
        let rows = own.len() * 16;
        let spans = [Span { first_row: 0, rows, first_position: 0, blocks: own }];
        let batch = Batch { spans: &spans, rows, sample_rows: &[0] };
        hidden.fill(0.5);
        shard.forward(&batch, None, &mut hidden[..rows * 1536], Some(&mut logits)).unwrap();
    }
    let used = anonymous() - before;
    let total = planned.total().0;
    assert!(used <= total + SLACK, "used {used}: {planned:?}");
    assert!(used + SLACK >= total, "used {used}: {planned:?}");
}
