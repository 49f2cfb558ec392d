//! Layers against candle-core, within rounding, and against themselves cut differently, bit for
//! bit.

use candle_core::{D, Device, Tensor};
use shoal_protocol::mesh::Reduction;
use shoal_protocol::model::{Activation, Family, ModelSpec, Options, RopeScaling, Split};
use shoal_protocol::plan::Precision;

use super::*;
use crate::backend::cpu::{CpuOps, Isa};
use crate::backend::{KvShape, Linear, Norm, Ops, Turn, WeightBuilder};
use crate::collective::Alone;
use crate::model::{Batch, ComputeError, Span};

const EPS: f32 = 1e-5;

fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen3,
        layers: 1,
        hidden: 36,
        heads: 6,
        kv_heads: 2,
        head_dim: 10,
        intermediate: 50,
        vocab: 61,
        context_max: 64,
        norm_eps: EPS,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: true,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        options: Options::default(),
        stored: Precision::F32,
    }
}

/// Repeatable values in ±`size`.
fn values(seed: u32, len: usize, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
    };
    (0..len).map(|_| next()).collect()
}

fn weight_of(ops: &CpuOps, seed: u32, outputs: usize, cols: usize) -> <CpuOps as Ops>::Weight {
    let builder = ops.weight_builders(Precision::F32, &[(outputs, cols)]).unwrap().remove(0);
    let bytes: Vec<u8> =
        values(seed, outputs * cols, 0.3).iter().flat_map(|v| v.to_le_bytes()).collect();
    builder.pack_rows(0, Precision::F32, &bytes).unwrap();
    builder.finish().unwrap()
}

/// Its weights come from `seed`, its bias from `seed + 100`.
fn linear_of(ops: &CpuOps, seed: u32, outputs: usize, cols: usize) -> Linear<CpuOps> {
    let bias = ops.vector(&values(seed + 100, outputs, 0.5)).unwrap();
    Linear { weight: weight_of(ops, seed, outputs, cols), bias: Some(bias) }
}

fn norm_of(ops: &CpuOps, seed: u32, width: usize) -> Norm<CpuOps> {
    Norm::rms(ops.vector(&values(seed, width, 1.5)).unwrap(), EPS)
}

/// Embedding, one decoder layer, head.
struct Tiny {
    ops: CpuOps,
    table: <CpuOps as Ops>::Weight,
    rope: Rope<CpuOps>,
    attention_norm: PreNorm<CpuOps>,
    attention: Attention<CpuOps>,
    mlp_norm: PreNorm<CpuOps>,
    mlp: Mlp<CpuOps>,
    head: Head<CpuOps>,
    kv: <CpuOps as Ops>::Kv,
    scratch: Scratch<CpuOps>,
}

impl Tiny {
    fn new(threads: usize) -> Self {
        let spec = spec();
        let part = spec.part(Split::WHOLE, Reduction::Exact, spec.stored).unwrap();
        let mut ops = CpuOps::new(threads, Isa::best()).unwrap();
        let (hidden, query, key, inner) = (36, 60, 20, 50);
        Self {
            table: weight_of(&ops, 1, 61, hidden),
            rope: Rope::new(&ops, &spec, spec.context_max).unwrap(),
            attention_norm: PreNorm(Some(norm_of(&ops, 2, hidden))),
            attention: Attention {
                query: linear_of(&ops, 3, query, hidden),
                key: linear_of(&ops, 4, key, hidden),
                value: linear_of(&ops, 5, key, hidden),
                norms: HeadNorms {
                    query: Some(norm_of(&ops, 6, 10)),
                    key: Some(norm_of(&ops, 7, 10)),
                    broad: None,
                },
                output: Joined::whole(linear_of(&ops, 8, hidden, query)),
                rope: Some((0, Turn::whole(10))),
                scores: Scores::plain(Attention::<CpuOps>::scale_of(10)),
                merge: Merge::plain(),
            },
            mlp_norm: PreNorm(Some(norm_of(&ops, 9, hidden))),
            mlp: Mlp {
                gate: Some(linear_of(&ops, 10, inner, hidden)),
                up: linear_of(&ops, 11, inner, hidden),
                down: Joined::whole(linear_of(&ops, 12, hidden, inner)),
                width: inner,
                act: Activation::Silu,
                merge: Merge::plain(),
            },
            head: Head::plain(norm_of(&ops, 13, hidden)),
            kv: ops.kv(KvShape { blocks: 8, kv_heads: 2, head_dim: 10 }).unwrap(),
            scratch: Scratch::new(&mut ops, &spec, &part, 64).unwrap(),
            ops,
        }
    }

    fn step(&mut self, tokens: &[u32], first_position: u32) -> Result<Vec<f32>, ComputeError> {
        let rows = tokens.len();
        let blocks = [5, 0, 3, 7];
        let spans = [Span { first_row: 0, rows, first_position, blocks: &blocks, adapter: None }];
        let sample_rows: Vec<usize> = (0..rows).collect();
        let batch = Batch { spans: &spans, rows, sample_rows: &sample_rows };
        let mut hidden = vec![0.0; rows * 36];
        let mut logits = vec![0.0; rows * 61];
        let Self { ops, scratch, .. } = self;
        let mut stream = ops.enter(&mut hidden, 36)?;
        Embedding::forward(ops, &self.table, tokens, &mut stream)?;
        self.rope.prepare(ops, &batch, scratch)?;
        self.attention_norm.forward(ops, &stream, rows, scratch)?;
        self.attention.forward(ops, &batch, &mut self.kv, (scratch, &mut Alone), &mut stream)?;
        self.mlp_norm.forward(ops, &stream, rows, scratch)?;
        self.mlp.forward(ops, rows, (scratch, &mut Alone), &mut stream)?;
        let out = (scratch, logits.as_mut_slice());
        self.head.forward(ops, &self.table, &stream, &sample_rows, out)?;
        ops.leave(stream)?;
        Ok(logits)
    }
}

fn tokens() -> Vec<u32> {
    (0..50).map(|i| (i * i * 7 + 3) % 61).collect()
}

type Candle = candle_core::Result<Tensor>;

fn c_tensor(seed: u32, shape: &[usize], size: f32) -> Candle {
    Tensor::from_vec(values(seed, shape.iter().product(), size), shape, &Device::Cpu)
}

fn c_linear(x: &Tensor, seed: u32, outputs: usize) -> Candle {
    let weight = c_tensor(seed, &[outputs, x.dim(D::Minus1)?], 0.3)?;
    x.matmul(&weight.t()?)?.broadcast_add(&c_tensor(seed + 100, &[outputs], 0.5)?)
}

fn c_norm(x: &Tensor, seed: u32) -> Candle {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scaled = x.broadcast_div(&(mean + f64::from(EPS))?.sqrt()?)?;
    scaled.broadcast_mul(&c_tensor(seed, &[x.dim(D::Minus1)?], 1.5)?)
}

/// `[rows, heads x 10]` to rotated, `[heads, rows, 10]`.
fn c_rotated_heads(x: &Tensor, heads: usize, norm: u32) -> Candle {
    let rows = x.dim(0)?;
    let x = c_norm(&x.reshape((rows, heads, 10))?, norm)?.transpose(0, 1)?.contiguous()?;
    let positions = Tensor::arange(0.0_f32, rows as f32, &Device::Cpu)?.reshape((rows, 1))?;
    let frequencies: Vec<f32> = (0..5).map(|i| 10_000_f32.powf(-(i as f32) / 5.0)).collect();
    let angles = positions.matmul(&Tensor::from_vec(frequencies, (1, 5), &Device::Cpu)?)?;
    let angles = Tensor::cat(&[&angles, &angles], 1)?;
    let turned = Tensor::cat(&[&x.narrow(2, 5, 5)?.neg()?, &x.narrow(2, 0, 5)?], 2)?;
    x.broadcast_mul(&angles.cos()?)? + turned.broadcast_mul(&angles.sin()?)?
}

fn c_attention(x: &Tensor) -> Candle {
    let rows = x.dim(0)?;
    let repeat = |kv: Tensor| -> Candle {
        kv.unsqueeze(1)?.broadcast_as((2, 3, rows, 10))?.contiguous()?.reshape((6, rows, 10))
    };
    let query = c_rotated_heads(&c_linear(x, 3, 60)?, 6, 6)?;
    let key = repeat(c_rotated_heads(&c_linear(x, 4, 20)?, 2, 7)?)?;
    let value = c_linear(x, 5, 20)?.reshape((rows, 2, 10))?.transpose(0, 1)?.contiguous()?;
    let mask: Vec<f32> = (0..rows * rows)
        .map(|i| if i % rows > i / rows { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let mask = Tensor::from_vec(mask, (1, rows, rows), &Device::Cpu)?;
    let scores = (query.matmul(&key.t()?.contiguous()?)? / 10_f64.sqrt())?.broadcast_add(&mask)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let out = weights.matmul(&repeat(value)?)?.transpose(0, 1)?.contiguous()?;
    c_linear(&out.reshape((rows, 60))?, 8, 36)
}

fn c_logits(tokens: &[u32]) -> Candle {
    let table = c_tensor(1, &[61, 36], 0.3)?;
    let x = table.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
    let x = (&x + c_attention(&c_norm(&x, 2)?)?)?;
    let normed = c_norm(&x, 9)?;
    let gated = (c_linear(&normed, 10, 50)?.silu()? * c_linear(&normed, 11, 50)?)?;
    let x = (x + c_linear(&gated, 12, 36)?)?;
    c_norm(&x, 13)?.matmul(&table.t()?)
}

#[test]
fn a_decoder_layer_is_what_candle_computes() {
    let expected: Vec<f32> = c_logits(&tokens()).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let got = Tiny::new(1).step(&tokens(), 0).unwrap();
    let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
    assert!(largest > 1.0, "an oracle of zeros would prove nothing: {largest}");
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        assert!((got - expected).abs() < 2e-5 * largest, "value {i}: {got}, candle {expected}");
    }
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    let tokens = tokens();
    let whole = Tiny::new(1).step(&tokens, 0).unwrap();
    for (threads, chunk) in [(1, 1), (2, 7), (3, 16), (4, 33)] {
        let mut tiny = Tiny::new(threads);
        let mut got = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            got.extend(tiny.step(part, (i * chunk) as u32).unwrap());
        }
        let same = got.iter().map(|v| v.to_bits()).eq(whole.iter().map(|v| v.to_bits()));
        assert!(same, "{threads} threads, chunks of {chunk}");
    }
}

/// `transformers`' values; its power is not always rounded to the nearest.
fn check_frequencies(head_dim: u32, theta: f32, scaling: RopeScaling, expected: &[f32]) {
    let got = inverse_frequencies(head_dim, theta, scaling);
    for (i, expected) in expected.iter().enumerate() {
        let error = (got[i] - expected).abs() / expected;
        assert!(error < 2.5e-7, "{scaling:?}: frequency {i} is {}, not {expected}", got[i]);
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    let plain = [1.0, 0.398_107_17, 0.158_489_32, 0.063_095_726, 0.025_118_863, 0.01];
    check_frequencies(20, 10_000.0, RopeScaling::None, &plain);
    let halved = [0.25, 0.025, 0.0025, 0.000_25];
    check_frequencies(8, 10_000.0, RopeScaling::Linear { factor: 4.0 }, &halved);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64,
    };
    let stretched = [
        1.0,
        0.244_384_59,
        0.013_042_256,
        0.003_952_847_3,
        0.001_25,
        0.000_395_284_73,
        0.000_125,
        3.952_847_3e-5,
    ];
    check_frequencies(16, 10_000.0, scaling, &stretched);
}

/// By transformers 5.23 (`_compute_yarn_parameters`), 16 dimensions, base 10,000, factor 4, 32 positions.
#[test]
fn yarn_keeps_high_frequencies_and_divides_low_ones() {
    let yarn = |truncate| RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0,
        truncate,
    };
    let got = inverse_frequencies(16, 10_000.0, yarn(true));
    let plain = inverse_frequencies(16, 10_000.0, RopeScaling::None);
    // The ramp goes from pair 0 to pair 2: the second one is half of each.
    assert_eq!(got[0], plain[0]);
    assert!((got[1] - plain[1] * 0.625).abs() < 1e-6, "{got:?}");
    for pair in 2..8 {
        assert!((got[pair] - plain[pair] / 4.0).abs() < 1e-9, "{pair}: {got:?}");
    }
}
