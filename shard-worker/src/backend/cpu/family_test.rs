//! The operations of [`FamilyOps`], and the options of norms, gates, rotations and attention, against
//! plain scalar code with `==`, on every instruction set and several numbers of threads.

use shoal_protocol::model::{Activation, Groups, Moe, Scoring};
use shoal_protocol::plan::Precision;

use super::kernels_test::{
    Values, assert_same, buffer_of, devices, exp_by_hand, fold_by_hand, pack,
};
use super::*;
use crate::backend::{FamilyOps, HeadColumns, Router};

fn tanh_by_hand(x: f32) -> f32 {
    1.0 - 2.0 / (exp_by_hand(x + x) + 1.0)
}

fn cap_by_hand(x: f32, cap: f32) -> f32 {
    cap * tanh_by_hand(x / cap)
}

fn gelu_by_hand(x: f32) -> f32 {
    let u = 0.797_884_6 * (0.044_715 * (x * x)).mul_add(x, x);
    x / (1.0 + exp_by_hand(u * -2.0))
}

#[test]
fn the_hyperbolic_tangent_and_gelu_are_near_the_true_ones() {
    for i in -4000..4000 {
        let x = i as f32 / 400.0;
        let true_tanh = f64::from(x).tanh();
        assert!((f64::from(tanh_by_hand(x)) - true_tanh).abs() < 2e-7, "tanh {x}");
        let wide = f64::from(x);
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
        let gelu = 0.5 * wide * (1.0 + inner.tanh());
        assert!((f64::from(gelu_by_hand(x)) - gelu).abs() < 2e-6, "gelu {x}");
    }
}

#[test]
fn layer_norms_have_the_bits_of_lanes_and_fold() {
    for (rows, width) in [(1, 1), (3, 15), (2, 16), (5, 100), (64, 300)] {
        let mut values = Values::new(width as u64 + 7);
        let mut x = values.take(rows * width);
        let (weight, bias) = (values.take(width), values.take(width));
        let row_by_hand = |x: &[f32]| -> Vec<f32> {
            let mut lanes = [0.0_f32; 16];
            x.iter().enumerate().for_each(|(k, x)| lanes[k % 16] += x);
            let mean = fold_by_hand(lanes, |a, b| a + b) / width as f32;
            let centred: Vec<f32> = x.iter().map(|x| x - mean).collect();
            let mut lanes = [0.0_f32; 16];
            for (k, x) in centred.iter().enumerate() {
                lanes[k % 16] = x.mul_add(*x, lanes[k % 16]);
            }
            let variance = fold_by_hand(lanes, |a, b| a + b) / width as f32;
            let factor = 1.0 / (variance + 1e-5).sqrt();
            let ends = weight.iter().zip(&bias);
            centred.iter().zip(ends).map(|(x, (w, b))| x * factor * w + b).collect()
        };
        let expected: Vec<f32> = x.chunks_exact(width).flat_map(row_by_hand).collect();
        for mut ops in devices() {
            let (weight, bias) = (ops.vector(&weight).unwrap(), ops.vector(&bias).unwrap());
            let norm = Norm { centred: true, bias: Some(bias), ..Norm::rms(weight, 1e-5) };
            let mut out = ops.buffer(rows, width).unwrap();
            let stream = ops.enter(&mut x, width).unwrap();
            ops.rms_norm(&stream, RowSet::First(rows), &norm, &mut out).unwrap();
            assert_same(&out.floats.as_slice()[..rows * width], &expected, "layer norm");
        }
    }
}

#[test]
fn activations_scales_and_caps_have_the_bits_of_scalar_code() {
    for (rows, width) in [(1, 1), (3, 33), (64, 500)] {
        let mut values = Values::new(rows as u64 + 3);
        let x: Vec<f32> = values.take(rows * width).iter().map(|v| v * 12.0).collect();
        let up: Vec<f32> = values.take(rows * width).iter().map(|v| v * 9.0).collect();
        let clamped = |(gate, up): (&f32, &f32)| {
            let gate = if 7.0 < *gate { 7.0 } else { *gate };
            let up = if 7.0 < *up { 7.0 } else { *up };
            let up = if up < -7.0 { -7.0 } else { up };
            gate / (1.0 + exp_by_hand(gate * -1.702)) * (up + 1.0)
        };
        let gelu: Vec<f32> = x.iter().map(|x| gelu_by_hand(*x)).collect();
        let gated: Vec<f32> = gelu.iter().zip(&up).map(|(g, u)| g * u).collect();
        let swiglu: Vec<f32> = x.iter().zip(&up).map(clamped).collect();
        let scaled: Vec<f32> = x.iter().map(|x| x * 0.3).collect();
        let capped: Vec<f32> = x.iter().map(|x| cap_by_hand(x * 0.3, 2.5)).collect();
        for mut ops in devices() {
            let what = format!("{rows} x {width}, {} x {}", ops.isa(), ops.threads());
            let up = buffer_of(&mut ops, width, &up);
            let held = |buf: &CpuBuf| buf.floats.as_slice()[..rows * width].to_vec();
            let mut buf = buffer_of(&mut ops, width, &x);
            ops.activate(&mut buf, rows, Activation::GeluTanh).unwrap();
            assert_same(&held(&buf), &gelu, &what);
            let mut buf = buffer_of(&mut ops, width, &x);
            ops.gate(&mut buf, &up, rows, Activation::GeluTanh).unwrap();
            assert_same(&held(&buf), &gated, &what);
            let mut buf = buffer_of(&mut ops, width, &x);
            ops.gate(&mut buf, &up, rows, Activation::ClampedSwiglu).unwrap();
            assert_same(&held(&buf), &swiglu, &what);
            let mut buf = buffer_of(&mut ops, width, &x);
            ops.scale(&mut buf, rows, 0.3).unwrap();
            assert_same(&held(&buf), &scaled, &what);
            let mut logits = x.clone();
            ops.shape_logits(&mut logits, 0.3, Some(2.5)).unwrap();
            assert_same(&logits, &capped, &what);
            let mut stream = x.clone();
            let mut bound = ops.enter(&mut stream, width).unwrap();
            ops.scale_stream(&mut bound, rows, 0.3).unwrap();
            ops.copy_stream(&bound, rows, &mut buf).unwrap();
            assert_same(&held(&buf), &scaled, &what);
        }
    }
}

#[test]
fn parts_of_heads_and_adjacent_pairs_turn_as_scalar_code_says() {
    let (heads, head_dim, first, half) = (3, 22, 4, 7);
    let mut values = Values::new(11);
    let (frequencies, x) = (values.take(half), values.take(5 * heads * head_dim));
    let spans = [Span { first_row: 0, rows: 5, first_position: 9, blocks: &[], adapter: None }];
    for interleaved in [false, true] {
        let mut expected = x.clone();
        for (row, position) in expected.chunks_exact_mut(heads * head_dim).zip(9_u32..) {
            for head in row.chunks_exact_mut(head_dim) {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let angle = f64::from(position as f32 * frequency);
                    let cos = libm::cos(angle) as f32 * 1.25;
                    let sin = libm::sin(angle) as f32 * 1.25;
                    let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                    let (low, high) = (head[first + a], head[first + b]);
                    head[first + a] = (-high).mul_add(sin, low * cos);
                    head[first + b] = low.mul_add(sin, high * cos);
                }
            }
        }
        for mut ops in devices() {
            let frequencies = ops.vector(&frequencies).unwrap();
            let mut angles = ops.buffer(5, 2 * half).unwrap();
            ops.rope_angles(&spans, &frequencies, 1.25, &mut angles).unwrap();
            let mut buf = buffer_of(&mut ops, heads * head_dim, &x);
            ops.rope(&mut buf, 5, &angles, Turn { head_dim, first, interleaved }).unwrap();
            assert_same(&buf.floats.as_slice()[..x.len()], &expected, "a part of a head");
        }
    }
}

/// What tells one attention from another.
#[derive(Clone, Copy)]
struct Kind {
    window: Option<u32>,
    /// How many positions behind its own a query sees.
    ahead: usize,
    softcap: Option<f32>,
    sink: Option<f32>,
}

/// A query over all these keys and values from `start` on.
fn attend_by_hand(
    q: &[f32],
    start: usize,
    (keys, values): (&[Vec<f32>], &[Vec<f32>]),
    kind: Kind,
) -> Vec<f32> {
    let (mut max, mut sum) = match kind.sink {
        Some(sink) => (sink, 1.0),
        None => (f32::NEG_INFINITY, 0.0_f32),
    };
    let mut out = vec![0.0_f32; q.len()];
    for block in start / 16..keys.len().div_ceil(16) {
        let mut scores = [f32::NEG_INFINITY; 16];
        let seen = start.max(block * 16)..keys.len().min(block * 16 + 16);
        for position in seen.clone() {
            let key = &keys[position];
            let score = q.iter().zip(key).fold(0.0_f32, |s, (q, k)| q.mul_add(*k, s)) * 0.25;
            scores[position % 16] = kind.softcap.map_or(score, |cap| cap_by_hand(score, cap));
        }
        let block_max = fold_by_hand(scores, |a, b| if a > b { a } else { b });
        let new_max = if max > block_max { max } else { block_max };
        let weights = scores.map(|s| exp_by_hand(s - new_max));
        let decay = if new_max == max { 1.0 } else { exp_by_hand(max - new_max) };
        sum = sum.mul_add(decay, fold_by_hand(weights, |a, b| a + b));
        max = new_max;
        for (d, out) in out.iter_mut().enumerate() {
            *out *= decay;
            for position in seen.clone() {
                *out = weights[position % 16].mul_add(values[position][d], *out);
            }
        }
    }
    out.iter().map(|o| o / sum).collect()
}

fn check_attention((query, kv, dim): (usize, usize, usize), length: usize, kind: Kind) {
    let mut values = Values::new((query + dim + length) as u64);
    let mut rows = |width: usize| -> Vec<Vec<f32>> {
        (0..length).map(|_| values.take(width).iter().map(|v| v * 4.0).collect()).collect()
    };
    let (q, k, v) = (rows(query * dim), rows(kv * dim), rows(kv * dim));
    let sinks: Vec<f32> = (0..query).map(|head| kind.sink.unwrap_or(0.0) + head as f32).collect();
    let mut expected = Vec::new();
    for position in 0..length {
        for head in 0..query {
            let of = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
                let own = head / (query / kv) * dim;
                let end = (position + 1 + kind.ahead).min(length);
                rows[..end].iter().map(|row| row[own..own + dim].to_vec()).collect()
            };
            let kind = Kind { sink: kind.sink.map(|_| sinks[head]), ..kind };
            let q = &q[position][head * dim..][..dim];
            let window = |window: u32| (position + 1).saturating_sub(window as usize);
            let start = kind.window.map_or(0, window);
            expected.extend(attend_by_hand(q, start, (&of(&k), &of(&v)), kind));
        }
    }
    let blocks: Vec<u32> = (0..length.div_ceil(16) as u32).rev().collect();
    let shape = KvShape { blocks: 16, kv_heads: kv as u32, head_dim: dim as u32 };
    for mut ops in devices() {
        let sinks = ops.vector(&sinks).unwrap();
        // What lies ahead is in the cache where it is of the same chunk.
        let chunks = if kind.ahead > 0 { vec![length] } else { vec![length, 7, 1] };
        for chunk in chunks {
            let mut cache = ops.kv(shape).unwrap();
            let how = Attend {
                scale: 0.25,
                softcap: kind.softcap,
                window: kind.window,
                ahead: kind.ahead as u32,
                sinks: kind.sink.map(|_| &sinks),
            };
            let mut got = Vec::new();
            for first in (0..length).step_by(chunk) {
                let end = (first + chunk).min(length);
                let q = buffer_of(&mut ops, query * dim, &q[first..end].concat());
                let k = buffer_of(&mut ops, kv * dim, &k[first..end].concat());
                let v = buffer_of(&mut ops, kv * dim, &v[first..end].concat());
                let mut out = ops.buffer(end - first, query * dim).unwrap();
                let span = Span {
                    first_row: 0,
                    rows: end - first,
                    first_position: first as u32,
                    blocks: &blocks,
                    adapter: None,
                };
                ops.kv_write(&[span], &k, &v, &mut cache).unwrap();
                ops.attend(&[span], &q, &cache, &how, &mut out).unwrap();
                got.extend(&out.floats.as_slice()[..(end - first) * query * dim]);
            }
            let what = format!("chunks of {chunk}, {} x {}", ops.isa(), ops.threads());
            assert_same(&got, &expected, &what);
        }
    }
}

#[test]
fn windows_caps_and_sinks_have_the_bits_of_scalar_code() {
    let plain = Kind { window: None, ahead: 0, softcap: None, sink: None };
    for window in [1, 5, 16, 17, 33, 64, 200] {
        check_attention((4, 2, 12), 150, Kind { window: Some(window), ..plain });
    }
    check_attention((3, 1, 20), 70, Kind { softcap: Some(3.0), ..plain });
    check_attention((2, 2, 16), 90, Kind { sink: Some(0.5), ..plain });
    let all = Kind { window: Some(40), softcap: Some(2.0), sink: Some(-1.0), ..plain };
    check_attention((6, 2, 34), 135, all);
}

#[test]
fn positions_ahead_have_the_bits_of_scalar_code() {
    let plain = Kind { window: None, ahead: 0, softcap: None, sink: None };
    for (length, ahead) in [(1, 3), (17, 1000), (150, 1000), (150, 16), (70, 1)] {
        check_attention((3, 3, 12), length, Kind { ahead, ..plain });
        check_attention((2, 2, 20), length, Kind { ahead, window: Some(9), ..plain });
        check_attention((2, 1, 32), length, Kind { ahead, window: Some(65), ..plain });
    }
}

fn moe(experts: u32, top_k: u32) -> Moe {
    Moe {
        experts,
        top_k,
        intermediate: 1,
        scoring: Scoring::Softmax,
        normalise: true,
        scale: 1.0,
        groups: None,
        shared: None,
        shared_gate: false,
        bias: false,
    }
}

/// The ids and weights that a row of logits gives.
fn route(moe: Moe, logits: &[f32], correction: Option<&[f32]>) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for mut ops in devices() {
        let mut buf = buffer_of(&mut ops, logits.len(), logits);
        let mut routes = ops.buffer(1, 2 * moe.top_k as usize).unwrap();
        let correction = correction.map(|values| ops.vector(values).unwrap());
        let how = Router { moe, correction: correction.as_ref() };
        ops.route(&mut buf, 1, &how, &mut routes).unwrap();
        all.push(routes.floats.as_slice()[..2 * moe.top_k as usize].to_vec());
    }
    assert!(all.windows(2).all(|two| two[0] == two[1]), "{all:?}");
    all
}

#[test]
fn experts_are_chosen_by_score_and_of_equals_the_lower_one() {
    let first = |moe, logits: &[f32], correction| route(moe, logits, correction).remove(0);
    // Softmax by hand over 20 experts, lanes and fold as in a norm.
    let logits: Vec<f32> = (0..20).map(|i| ((i * 7) % 20) as f32 / 4.0).collect();
    let weights: Vec<f32> = logits.iter().map(|x| exp_by_hand(x - 4.75)).collect();
    let mut lanes = [0.0_f32; 16];
    weights.iter().enumerate().for_each(|(i, w)| lanes[i % 16] += w);
    let sum = fold_by_hand(lanes, |a, b| a + b);
    let scores: Vec<f32> = weights.iter().map(|w| w / sum).collect();
    let top: Vec<usize> = (0..20).filter(|i| (i * 7) % 20 >= 17).collect();
    let total = top.iter().fold(0.0, |sum, i| sum + scores[*i]);
    let ids = top.iter().map(|i| *i as f32);
    let expected: Vec<f32> = ids.chain(top.iter().map(|i| scores[*i] / total * 1.0)).collect();
    assert_eq!(first(moe(20, 3), &logits, None), expected);

    assert_eq!(first(moe(6, 2), &[1.0, 3.0, 3.0, 3.0, 0.0, 3.0], None), [1.0, 2.0, 0.5, 0.5]);
    // A correction counts for the choice alone.
    let sigmoid = Moe { scoring: Scoring::Sigmoid, normalise: false, scale: 2.0, ..moe(4, 1) };
    let corrected = first(sigmoid, &[0.0, 0.0, 0.0, 0.0], Some(&[0.0, 0.0, 0.5, 0.0]));
    assert_eq!(corrected, [2.0, 1.0]);
    // Two of four groups of two by the sum of both: the best single expert is in neither.
    let groups = Groups { groups: 4, kept: 2, best: 2 };
    let grouped = Moe { groups: Some(groups), ..sigmoid };
    let logits = [2.0, 2.0, -9.0, 4.0, 1.0, 3.0, 0.0, 0.0];
    let grouped = Moe { experts: 8, top_k: 2, ..grouped };
    assert_eq!(first(grouped, &logits, None)[..2], [0.0, 5.0]);
}

#[test]
fn rows_of_an_expert_are_gathered_and_added_where_they_came_from() {
    for mut ops in devices() {
        let x = buffer_of(&mut ops, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        let routes = [0.0, 2.0, 0.5, 0.25, 1.0, 2.0, 1.0, 3.0, 0.0, 1.0, 2.0, 1.0];
        let routes = buffer_of(&mut ops, 4, &routes);
        let mut own = ops.buffer(3, 3).unwrap();
        let mut sum = ops.buffer(3, 3).unwrap();
        ops.clear(&mut sum, 3).unwrap();
        for expert in 0..3 {
            let count = ops.gather(&x, 3, (&routes, expert), &mut own).unwrap();
            assert_eq!(count, 2, "expert {expert}");
            ops.scatter_add(&own, 3, (&routes, expert), &mut sum).unwrap();
        }
        let expected = [0.75, 1.5, 2.25, 16.0, 20.0, 24.0, 21.0, 24.0, 27.0];
        assert_same(&sum.floats.as_slice()[..9], &expected, "the sum over experts");
        ops.add_gated(&x, 3, None, &mut sum).unwrap();
        assert_eq!(sum.floats.as_slice()[..3], [1.75, 3.5, 5.25]);
        let gate = buffer_of(&mut ops, 1, &[0.0, 100.0, -100.0]);
        ops.clear(&mut sum, 3).unwrap();
        ops.add_gated(&x, 3, Some(&gate), &mut sum).unwrap();
        assert_eq!(sum.floats.as_slice()[..9], [0.5, 1.0, 1.5, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0]);
    }
}

#[test]
fn products_of_heads_have_the_bits_of_one_chain() {
    let (rows, heads, from, to, cols, outputs) = (5, 3, 9, 40, 7, 33);
    let mut values = Values::new(21);
    let x = values.take(rows * heads * from);
    let weights: Vec<Vec<f32>> = (0..heads).map(|_| values.take(outputs * cols)).collect();
    for mut ops in devices() {
        let packed: Vec<Packed> =
            weights.iter().map(|weight| pack(&ops, Precision::F32, cols, weight)).collect();
        let input = buffer_of(&mut ops, heads * from, &x);
        let mut out = buffer_of(&mut ops, heads * to, &vec![0.5; rows * heads * to]);
        ops.linear_heads(&input, rows, &packed, &mut out).unwrap();
        let columns = HeadColumns { heads, from: cols, to: outputs, width: from - cols };
        ops.copy_heads(&input, rows, columns, &mut out).unwrap();
        let mut expected = Vec::new();
        for head in x.chunks_exact(from).enumerate() {
            let (index, head) = head;
            for weight in weights[index % heads].chunks_exact(cols) {
                expected.push(head.iter().zip(weight).fold(0.0_f32, |s, (x, w)| x.mul_add(*w, s)));
            }
            expected.extend(&head[cols..]);
            expected.extend(vec![0.5; to - outputs - (from - cols)]);
        }
        assert_same(&out.floats.as_slice()[..rows * heads * to], &expected, "heads");
    }
}
