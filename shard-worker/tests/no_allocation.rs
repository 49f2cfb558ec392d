//! A step in the steady state allocates nothing, on any thread.
//!
//! The only test of its file: it counts the allocations of the whole process.
#![allow(unsafe_code)] // A global allocator cannot be written without.
#![allow(clippy::unwrap_used)] // A test's panic is its result.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Activation, Family, ModelSpec, Options, RopeScaling, Split};
use shoal_protocol::plan::Precision;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::backend::{KvShape, Linear, Norm, Ops, Turn, WeightBuilder};
use shoal_shard_worker::collective::Alone;
use shoal_shard_worker::model::layers::{
    Attention, Embedding, Head, HeadNorms, Joined, Merge, Mlp, PreNorm, Rope, Scores, Scratch,
};
use shoal_shard_worker::model::{Batch, ComputeError, Span};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, and a counter.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn linear(ops: &CpuOps, outputs: usize, cols: usize) -> Linear<CpuOps> {
    let builder = ops.weight_builders(Precision::Bf16, &[(outputs, cols)]).unwrap().remove(0);
    builder.pack_rows(0, Precision::Bf16, &vec![0x3C; 2 * outputs * cols]).unwrap();
    Linear { weight: builder.finish().unwrap(), bias: None }
}

fn norm(ops: &CpuOps, width: usize) -> Norm<CpuOps> {
    Norm::rms(ops.vector(&vec![1.0; width]).unwrap(), 1e-5)
}

/// Embedding, one decoder layer, head.
struct Layers {
    ops: CpuOps,
    rope: Rope<CpuOps>,
    norm: PreNorm<CpuOps>,
    attention: Attention<CpuOps>,
    mlp: Mlp<CpuOps>,
    head: Head<CpuOps>,
    table: Linear<CpuOps>,
    kv: <CpuOps as Ops>::Kv,
    scratch: Scratch<CpuOps>,
}

const HIDDEN: usize = 128;
const VOCAB: usize = 300;
const ROWS_MAX: usize = 128;

impl Layers {
    fn new(threads: usize) -> Self {
        let spec = ModelSpec {
            family: Family::Llama,
            layers: 1,
            hidden: HIDDEN as u32,
            heads: 8,
            kv_heads: 2,
            head_dim: 32,
            intermediate: 512,
            vocab: VOCAB as u32,
            context_max: 512,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tied_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: true,
            options: Options::default(),
            stored: Precision::Bf16,
        };
        let part = spec.part(Split::WHOLE, Reduction::Exact, spec.stored).unwrap();
        let mut ops = CpuOps::new(threads, Isa::best()).unwrap();
        Self {
            rope: Rope::new(&ops, &spec, spec.context_max).unwrap(),
            norm: PreNorm(Some(norm(&ops, HIDDEN))),
            attention: Attention {
                query: linear(&ops, 256, HIDDEN),
                key: linear(&ops, 64, HIDDEN),
                value: linear(&ops, 64, HIDDEN),
                norms: HeadNorms {
                    query: Some(norm(&ops, 32)),
                    key: Some(norm(&ops, 32)),
                    broad: None,
                },
                output: Joined::whole(linear(&ops, HIDDEN, 256)),
                rope: Some((0, Turn::whole(32))),
                scores: Scores::plain(Attention::<CpuOps>::scale_of(32)),
                merge: Merge::plain(),
            },
            mlp: Mlp {
                gate: Some(linear(&ops, 512, HIDDEN)),
                up: linear(&ops, 512, HIDDEN),
                down: Joined::whole(linear(&ops, HIDDEN, 512)),
                width: 512,
                act: Activation::Silu,
                merge: Merge::plain(),
            },
            head: Head::plain(norm(&ops, HIDDEN)),
            table: linear(&ops, VOCAB, HIDDEN),
            kv: ops.kv(KvShape { blocks: 32, kv_heads: 2, head_dim: 32 }).unwrap(),
            scratch: Scratch::new(&mut ops, &spec, &part, ROWS_MAX).unwrap(),
            ops,
        }
    }

    fn step(
        &mut self,
        batch: &Batch<'_>,
        tokens: &[u32],
        hidden: &mut [f32],
        logits: &mut [f32],
    ) -> Result<(), ComputeError> {
        let Self { ops, scratch, .. } = self;
        let mut stream = ops.enter(hidden, HIDDEN)?;
        Embedding::forward(ops, &self.table.weight, tokens, &mut stream)?;
        self.rope.prepare(ops, batch, scratch)?;
        self.norm.forward(ops, &stream, batch.rows, scratch)?;
        let kv = &mut self.kv;
        self.attention.forward(ops, batch, kv, (scratch, &mut Alone), &mut stream)?;
        self.norm.forward(ops, &stream, batch.rows, scratch)?;
        self.mlp.forward(ops, batch.rows, (scratch, &mut Alone), &mut stream)?;
        let out = (scratch, logits);
        self.head.forward(ops, &self.table.weight, &stream, batch.sample_rows, out)?;
        ops.leave(stream)
    }
}

#[test]
fn steps_allocate_nothing() {
    let blocks: Vec<u32> = (0..32).collect();
    let tokens: Vec<u32> = (0..ROWS_MAX as u32).collect();
    for threads in [1, 3] {
        let mut layers = Layers::new(threads);
        let mut hidden = vec![0.0; ROWS_MAX * HIDDEN];
        let mut logits = vec![0.0; VOCAB];
        let mut position = 0;
        let mut before = 0;
        // A prompt's chunks, then single rows. The first step alone may set up its threads.
        for rows in [128, 100, 128, 1, 1, 1, 5] {
            let spans = [Span {
                first_row: 0,
                rows,
                first_position: position,
                blocks: &blocks,
                adapter: None,
            }];
            let sample_rows = [rows - 1];
            let batch = Batch { spans: &spans, rows, sample_rows: &sample_rows };
            let stream = &mut hidden[..rows * HIDDEN];
            layers.step(&batch, &tokens[..rows], stream, &mut logits).unwrap();
            if position == 0 {
                before = ALLOCATIONS.load(Ordering::Relaxed);
            }
            position += rows as u32;
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(allocations, 0, "with {threads} threads");
        assert!(logits.iter().all(|l| l.is_finite()));
    }
}
