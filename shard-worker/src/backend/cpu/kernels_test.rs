//! Every kernel against plain scalar code, with `==`, on every instruction set and several numbers
//! of threads. The scalar code is contract n1 written down.

use half::{bf16, f16};
use shoal_protocol::plan::Precision;

use super::*;
use crate::backend::WeightBuilder;
use crate::stored::{self, Encode};

const ALL_PRECISIONS: [Precision; 10] = Precision::ALL;

/// Repeatable values in -1..1 with full mantissas.
pub(super) struct Values(u64);

impl Values {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(super) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(super) fn take(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// Devices of every instruction set and of 1 to 4 threads.
pub(super) fn devices() -> impl Iterator<Item = CpuOps> {
    Isa::all().flat_map(|isa| (1..=4).map(move |threads| CpuOps::new(threads, isa).unwrap()))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub(super) fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    let different = got.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(got.len(), expected.len(), "{what}");
    if let Some(i) = different {
        panic!("{what}: value {i} is {:e}, not {:e}", got[i], expected[i]);
    }
}

/// What is held of the rows of a matrix, by plain scalar code.
pub(super) fn rounded(held: Precision, cols: usize, values: &[f32]) -> Vec<f32> {
    fn blocks<B: Encode>(cols: usize, values: &[f32]) -> Vec<f32> {
        let mut out = Vec::new();
        for block in values.chunks(cols).flat_map(|row| row.chunks(B::WEIGHTS)) {
            let (mut stored, mut back) = (vec![0; B::BYTES], vec![0.0; B::WEIGHTS]);
            B::encode(block, &mut stored);
            B::decode(&stored, &mut back);
            out.extend(&back[..block.len()]);
        }
        out
    }
    match held {
        Precision::F32 => values.to_vec(),
        Precision::Bf16 => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        Precision::F16 => values.iter().map(|v| f16::from_f32(*v).to_f32()).collect(),
        Precision::Q8_0 => blocks::<stored::Q8_0>(cols, values),
        Precision::Q4_0 => blocks::<stored::Q4_0>(cols, values),
        Precision::Q4K => blocks::<stored::Q4K>(cols, values),
        Precision::Fp8 => blocks::<stored::Fp8>(cols, values),
        Precision::Q5K => blocks::<stored::Q5K>(cols, values),
        Precision::Q6K => blocks::<stored::Q6K>(cols, values),
        Precision::Mxfp4 => blocks::<stored::Mxfp4>(cols, values),
    }
}

pub(super) fn pack(ops: &CpuOps, held: Precision, cols: usize, values: &[f32]) -> Packed {
    let builder = ops.weight_builders(held, &[(values.len() / cols, cols)]).unwrap().remove(0);
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    builder.pack_rows(0, Precision::F32, &bytes).unwrap();
    builder.finish().unwrap()
}

fn fill(buf: &mut CpuBuf, stamp: Stamp, values: &[f32]) {
    buf.floats.as_mut_slice()[..values.len()].copy_from_slice(values);
    buf.contents = stamp;
}

pub(super) fn buffer_of(ops: &mut CpuOps, width: usize, values: &[f32]) -> CpuBuf {
    let mut buf = ops.buffer(values.len() / width, width).unwrap();
    let stamp = ops.stamp();
    fill(&mut buf, stamp, values);
    buf
}

// === Products ===

/// One chain over `k`, then the bias.
fn linear_by_hand(x: &[f32], weight: &[f32], cols: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let rows = x.chunks_exact(cols);
    rows.flat_map(|row| {
        weight.chunks_exact(cols).enumerate().map(|(output, weights)| {
            let sum = row.iter().zip(weights).fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
            bias.map_or(sum, |bias| sum + bias[output])
        })
    })
    .collect()
}

fn check_linear(held: Precision, (rows, cols, outputs): (usize, usize, usize), with_bias: bool) {
    let mut values = Values::new((rows * 31 + cols * 7 + outputs) as u64);
    let x = values.take(rows * cols);
    let weight = values.take(outputs * cols);
    let bias = with_bias.then(|| values.take(outputs));
    let expected = linear_by_hand(&x, &rounded(held, cols, &weight), cols, bias.as_deref());
    for mut ops in devices() {
        let what = format!("{rows} x {cols} x {outputs} {held}, {} x {}", ops.isa(), ops.threads());
        let input = buffer_of(&mut ops, cols, &x);
        let mut out = ops.buffer(rows, outputs).unwrap();
        let linear = Linear {
            weight: pack(&ops, held, cols, &weight),
            bias: bias.as_ref().map(|bias| ops.vector(bias).unwrap()),
        };
        ops.linear(&input, rows, &linear, &mut out).unwrap();
        assert_same(&out.floats.as_slice()[..rows * outputs], &expected, &what);
        if !with_bias {
            let mut logits = vec![f32::NAN; rows * outputs];
            ops.logits(&input, rows, &linear.weight, &mut logits).unwrap();
            assert_same(&logits, &expected, &what);
        }
    }
}

#[test]
fn products_of_every_number_of_rows_have_the_bits_of_one_chain() {
    for rows in 1..=64 {
        check_linear(ALL_PRECISIONS[rows % 7], (rows, 37, 19 + rows % 5 * 16), rows % 2 == 0);
    }
}

#[test]
fn products_of_odd_sizes_have_the_bits_of_one_chain() {
    for held in ALL_PRECISIONS {
        // Around lanes, panels, groups of panels and cuts of k.
        for (cols, outputs) in [(1, 1), (16, 16), (15, 17), (511, 65), (513, 130), (1100, 48)] {
            for rows in [1, 2, 13] {
                check_linear(held, (rows, cols, outputs), false);
            }
        }
    }
}

#[test]
fn rows_of_blocks_are_held_as_they_are_stored() {
    fn check<B: Encode>(held: Precision) {
        let (outputs, cols) = (19, 2 * B::WEIGHTS);
        let values = Values::new(B::BYTES as u64).take(outputs * cols);
        let mut bytes = vec![0; outputs * 2 * B::BYTES];
        for (values, block) in values.chunks(B::WEIGHTS).zip(bytes.chunks_mut(B::BYTES)) {
            B::encode(values, block);
        }
        let ops = CpuOps::new(1, Isa::best()).unwrap();
        let builder = ops.weight_builders(held, &[(outputs, cols)]).unwrap().remove(0);
        builder.pack_rows(0, held, &bytes).unwrap();
        let packed = builder.finish().unwrap();
        let expected = rounded(held, cols, &values);
        let mut row = vec![f32::NAN; cols];
        for (r, expected) in expected.chunks(cols).enumerate() {
            packed.copy_row(Isa::best(), r, &mut row);
            // Zeros of either sign.
            assert!(row == expected, "{held}, row {r}: {row:?} is not {expected:?}");
        }
        let other = ops.weight_builders(Precision::F32, &[(outputs, cols)]).unwrap().remove(0);
        assert!(matches!(other.pack_rows(0, held, &bytes), Err(BackendError::BadShape { .. })));
    }
    check::<stored::Q8_0>(Precision::Q8_0);
    check::<stored::Q4_0>(Precision::Q4_0);
    check::<stored::Q4K>(Precision::Q4K);
    check::<stored::Fp8>(Precision::Fp8);
    check::<stored::Q5K>(Precision::Q5K);
    check::<stored::Q6K>(Precision::Q6K);
    check::<stored::Mxfp4>(Precision::Mxfp4);
}

#[test]
fn a_buffer_with_new_contents_is_laid_out_anew() {
    let mut ops = CpuOps::new(2, Isa::best()).unwrap();
    let mut values = Values::new(5);
    let weight = values.take(20 * 8);
    let linear = Linear { weight: pack(&ops, Precision::F32, 8, &weight), bias: None };
    let mut input = buffer_of(&mut ops, 8, &[0.0; 24]);
    let mut out = ops.buffer(3, 20).unwrap();
    for _ in 0..3 {
        let x = values.take(24);
        let stamp = ops.stamp();
        fill(&mut input, stamp, &x);
        for rows in [3, 2, 3] {
            ops.linear(&input, rows, &linear, &mut out).unwrap();
            let expected = linear_by_hand(&x[..rows * 8], &weight, 8, None);
            assert_eq!(bits(&out.floats.as_slice()[..rows * 20]), bits(&expected));
        }
    }
}

// === Rows ===

pub(super) fn fold_by_hand(mut lanes: [f32; 16], f: fn(f32, f32) -> f32) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            lanes[i] = f(lanes[i], lanes[i + distance]);
        }
    }
    lanes[0]
}

fn norm_by_hand(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut lanes = [0.0_f32; 16];
    for (k, x) in x.iter().enumerate() {
        lanes[k % 16] = x.mul_add(*x, lanes[k % 16]);
    }
    let mean = fold_by_hand(lanes, |a, b| a + b) / x.len() as f32;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * factor * w).collect()
}

#[test]
fn norms_have_the_bits_of_lanes_and_fold() {
    for (rows, width) in [(1, 1), (3, 15), (2, 16), (5, 100), (64, 768)] {
        let mut values = Values::new(width as u64);
        let mut x = values.take(rows * width);
        let weight = values.take(width);
        let expected: Vec<f32> =
            x.chunks_exact(width).flat_map(|row| norm_by_hand(row, &weight, 1e-5)).collect();
        for mut ops in devices() {
            let norm = Norm::rms(ops.vector(&weight).unwrap(), 1e-5);
            // Heads in place: two runs a row where that is possible.
            let heads = if rows % 2 == 0 { 2 } else { 1 };
            let mut in_place = buffer_of(&mut ops, width * heads, &x);
            ops.head_norm(&mut in_place, rows / heads, &norm).unwrap();
            assert_same(&in_place.floats.as_slice()[..rows * width], &expected, "head norm");

            let mut out = ops.buffer(rows, width).unwrap();
            let stream = ops.enter(&mut x, width).unwrap();
            ops.rms_norm(&stream, RowSet::First(rows), &norm, &mut out).unwrap();
            assert_same(&out.floats.as_slice()[..rows * width], &expected, "norm");
            ops.rms_norm(&stream, RowSet::Of(&[rows - 1]), &norm, &mut out).unwrap();
            let last = &expected[(rows - 1) * width..];
            assert_same(&out.floats.as_slice()[..width], last, "norm of the last row");
            ops.leave(stream).unwrap();
        }
    }
}

/// The exponential, operation by operation.
pub(super) fn exp_by_hand(x: f32) -> f32 {
    if x < -87.336_54 {
        return 0.0;
    }
    if x > 88.376_26 {
        return f32::INFINITY;
    }
    let n = x.mul_add(std::f32::consts::LOG2_E, 12_582_912.0) - 12_582_912.0;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5]
        .into_iter()
        .fold(1.987_569_1e-4_f32, |p, c| p.mul_add(r, c));
    let fraction = p.mul_add(r * r, r) + 1.0;
    fraction * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[test]
fn gates_and_sums_have_the_bits_of_scalar_code() {
    for (rows, width) in [(1, 1), (3, 33), (64, 500)] {
        let mut values = Values::new(rows as u64);
        let gate: Vec<f32> = values.take(rows * width).iter().map(|v| v * 100.0).collect();
        let up = values.take(rows * width);
        let gated: Vec<f32> =
            gate.iter().zip(&up).map(|(g, u)| g / (1.0 + exp_by_hand(0.0 - g)) * u).collect();
        let sum: Vec<f32> = gate.iter().zip(&up).map(|(g, u)| u + g).collect();
        for mut ops in devices() {
            let mut buf = buffer_of(&mut ops, width, &gate);
            let mut stream = up.clone();
            let mut bound = ops.enter(&mut stream, width).unwrap();
            ops.add(&buf, rows, &mut bound).unwrap();
            ops.leave(bound).unwrap();
            assert_same(&stream, &sum, "sum");
            let up = buffer_of(&mut ops, width, &up);
            ops.gate(&mut buf, &up, rows, Activation::Silu).unwrap();
            assert_same(&buf.floats.as_slice()[..rows * width], &gated, "gate");
        }
    }
}

#[test]
fn rotations_have_the_bits_of_scalar_code() {
    for (heads, half) in [(1, 1), (3, 5), (2, 32), (8, 64)] {
        let mut values = Values::new(half as u64);
        let frequencies = values.take(half);
        let spans = [
            Span { first_row: 0, rows: 2, first_position: 7, blocks: &[], adapter: None },
            Span { first_row: 2, rows: 40, first_position: 100_000, blocks: &[], adapter: None },
        ];
        let positions: Vec<u32> = (7..9).chain(100_000..100_040).collect();
        let x = values.take(positions.len() * heads * 2 * half);
        let mut expected = x.clone();
        for (row, position) in expected.chunks_exact_mut(heads * 2 * half).zip(&positions) {
            for head in row.chunks_exact_mut(2 * half) {
                for i in 0..half {
                    let angle = f64::from(*position as f32 * frequencies[i]);
                    let (cos, sin) = (libm::cos(angle) as f32, libm::sin(angle) as f32);
                    let (low, high) = (head[i], head[i + half]);
                    head[i] = (-high).mul_add(sin, low * cos);
                    head[i + half] = low.mul_add(sin, high * cos);
                }
            }
        }
        for mut ops in devices() {
            let frequencies = ops.vector(&frequencies).unwrap();
            let mut angles = ops.buffer(positions.len(), 2 * half).unwrap();
            ops.rope_angles(&spans, &frequencies, 1.0, &mut angles).unwrap();
            let mut buf = buffer_of(&mut ops, heads * 2 * half, &x);
            ops.rope(&mut buf, positions.len(), &angles, Turn::whole(2 * half)).unwrap();
            assert_same(&buf.floats.as_slice()[..x.len()], &expected, "rotation");
        }
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let mut ops = CpuOps::new(1, Isa::best()).unwrap();
    let is_bad = |result: Result<(), ComputeError>, word: &str| {
        let error = result.unwrap_err();
        assert!(matches!(&error, ComputeError::BadBatch(why) if why.contains(word)), "{error}");
    };
    let mut kv = ops.kv(KvShape { blocks: 2, kv_heads: 1, head_dim: 4 }).unwrap();
    let mut rows = ops.buffer(4, 4).unwrap();
    let other = ops.buffer(4, 4).unwrap();
    let narrow = ops.buffer(4, 3).unwrap();
    let span = |rows, first_position, blocks| {
        [Span { first_row: 0, rows, first_position, blocks, adapter: None }]
    };
    is_bad(ops.kv_write(&span(1, 16, &[0]), &other, &other, &mut kv), "2 blocks");
    is_bad(ops.kv_write(&span(1, 0, &[2]), &other, &other, &mut kv), "block 2");
    is_bad(ops.kv_write(&span(5, 0, &[0]), &other, &other, &mut kv), "room for 5");
    is_bad(ops.kv_write(&span(1, 0, &[0]), &narrow, &other, &mut kv), "3 wide");
    is_bad(ops.attend(&span(1, 0, &[7]), &other, &kv, &Attend::plain(1.0), &mut rows), "block 7");

    let linear = Linear { weight: pack(&ops, Precision::F32, 4, &[1.0; 16]), bias: None };
    is_bad(ops.linear(&narrow, 1, &linear, &mut rows), "3 wide");
    is_bad(ops.linear(&other, 5, &linear, &mut rows), "room for 5");
    is_bad(ops.logits(&other, 2, &linear.weight, &mut [0.0; 7]), "room for 8");
    let mut hidden = [0.0; 8];
    let mut stream = ops.enter(&mut hidden, 4).unwrap();
    is_bad(ops.embed(&[1, 4], &linear.weight, &mut stream), "token 4");
    is_bad(ops.embed(&[0, 0, 0], &linear.weight, &mut stream), "room for 3");
    is_bad(ops.enter(&mut hidden, 3).map(|_| ()), "8 wide");
}
