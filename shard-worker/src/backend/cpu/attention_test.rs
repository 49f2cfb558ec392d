//! Attention against plain scalar code: contract n1 written down, over every precision of the cache.

use shoal_protocol::plan::{KvPrecision, Precision};

use super::kernels_test::{
    Values, assert_same, buffer_of, devices, exp_by_hand, fold_by_hand, rounded,
};
use super::kv::SLOTS;
use super::*;

#[derive(Clone, Copy)]
struct Heads {
    query: usize,
    kv: usize,
    dim: usize,
}

/// One head of one query over the rows of keys and values before and at it.
fn attend_by_hand(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<f32> {
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0_f32);
    let mut out = vec![0.0_f32; q.len()];
    for (keys, values) in keys.chunks(16).zip(values.chunks(16)) {
        let mut scores = [f32::NEG_INFINITY; 16];
        for (score, key) in scores.iter_mut().zip(keys) {
            *score = q.iter().zip(*key).fold(0.0_f32, |s, (q, k)| q.mul_add(*k, s)) * scale;
        }
        let block_max = fold_by_hand(scores, |a, b| if a > b { a } else { b });
        let new_max = if max > block_max { max } else { block_max };
        let weights = scores.map(|s| exp_by_hand(s - new_max));
        let decay = exp_by_hand(max - new_max);
        sum = sum.mul_add(decay, fold_by_hand(weights, |a, b| a + b));
        max = new_max;
        for (d, out) in out.iter_mut().enumerate() {
            *out *= decay;
            for (weight, value) in weights.iter().zip(values) {
                *out = weight.mul_add(value[d], *out);
            }
        }
    }
    out.iter().map(|o| o / sum).collect()
}

/// Two sequences, computed at once, in chunks and one by one, on scattered blocks: always the bits
/// of the scalar code.
fn check_attention(heads: Heads, lengths: [usize; 2], chunk: usize) {
    check_attention_over(KvPrecision::F32, heads, lengths, chunk);
}

/// What a cache gives back of heads of `dim` values.
fn kept(held: KvPrecision, dim: usize, values: &[f32]) -> Vec<f32> {
    match held {
        KvPrecision::F32 => values.to_vec(),
        KvPrecision::Bf16 => rounded(Precision::Bf16, dim, values),
        KvPrecision::Q8_0 => rounded(Precision::Q8_0, dim, values),
    }
}

fn check_attention_over(held: KvPrecision, heads: Heads, lengths: [usize; 2], chunk: usize) {
    let Heads { query, kv, dim } = heads;
    let mut values = Values::new((query * 100 + dim) as u64);
    let sequences: Vec<[Vec<f32>; 3]> = lengths
        .iter()
        .map(|n| {
            let q = values.take(n * query * dim).iter().map(|v| v * 8.0).collect();
            [q, values.take(n * kv * dim), values.take(n * kv * dim)]
        })
        .collect();
    let scale = 1.0 / (dim as f32).sqrt();
    let expected: Vec<Vec<f32>> = sequences
        .iter()
        .zip(lengths)
        .map(|([q, k, v], length)| {
            let (k, v) = (&kept(held, dim, k), &kept(held, dim, v));
            let mut out = Vec::new();
            for position in 0..length {
                for head in 0..query {
                    let kv_head = head / (query / kv);
                    let rows = |of: &'_ Vec<f32>| -> Vec<Vec<f32>> {
                        (0..=position)
                            .map(|p| of[(p * kv + kv_head) * dim..][..dim].to_vec())
                            .collect()
                    };
                    let (k, v) = (rows(k), rows(v));
                    let k: Vec<&[f32]> = k.iter().map(Vec::as_slice).collect();
                    let v: Vec<&[f32]> = v.iter().map(Vec::as_slice).collect();
                    out.extend(attend_by_hand(
                        &q[(position * query + head) * dim..][..dim],
                        &k,
                        &v,
                        scale,
                    ));
                }
            }
            out
        })
        .collect();

    let blocks: [Vec<u32>; 2] = std::array::from_fn(|s| {
        // Scattered, and none shared: the even ones backwards, the odd ones forwards.
        let n = lengths[s].div_ceil(16) as u32;
        if s == 0 {
            (0..n).rev().map(|b| 2 * b).collect()
        } else {
            (0..n).map(|b| 2 * b + 1).collect()
        }
    });
    let shape = KvShape { blocks: 64, kv_heads: kv as u32, head_dim: dim as u32 };
    for ops in devices() {
        let mut ops = ops;
        ops.hold_kv(held).unwrap();
        let what = format!(
            "{query}/{kv} heads of {dim} in {held}, chunks of {chunk}, {} x {}",
            ops.isa(),
            ops.threads()
        );
        let mut cache = ops.kv(shape).unwrap();
        // What earlier sequences left behind must not matter.
        let poison = buffer_of(&mut ops, kv * dim, &vec![f32::NAN; SLOTS * kv * dim]);
        for block in 0..shape.blocks {
            let blocks = [block];
            let span = Span {
                first_row: 0,
                rows: SLOTS,
                first_position: 0,
                blocks: &blocks,
                adapter: None,
            };
            ops.kv_write(&[span], &poison, &poison, &mut cache).unwrap();
        }
        let mut got: [Vec<f32>; 2] = Default::default();
        let mut done = [0; 2];
        while done != lengths {
            let next: [usize; 2] = std::array::from_fn(|s| chunk.min(lengths[s] - done[s]));
            let part = |which: usize, width: usize| -> Vec<f32> {
                (0..2)
                    .flat_map(|s| {
                        sequences[s][which][done[s] * width..][..next[s] * width].to_vec()
                    })
                    .collect()
            };
            let q = buffer_of(&mut ops, query * dim, &part(0, query * dim));
            let k = buffer_of(&mut ops, kv * dim, &part(1, kv * dim));
            let v = buffer_of(&mut ops, kv * dim, &part(2, kv * dim));
            let rows = next[0] + next[1];
            let mut out = ops.buffer(rows, query * dim).unwrap();
            let spans: [Span<'_>; 2] = std::array::from_fn(|s| Span {
                first_row: if s == 0 { 0 } else { next[0] },
                rows: next[s],
                first_position: done[s] as u32,
                blocks: &blocks[s],
                adapter: None,
            });
            ops.kv_write(&spans, &k, &v, &mut cache).unwrap();
            ops.attend(&spans, &q, &cache, &Attend::plain(scale), &mut out).unwrap();
            for (s, span) in spans.iter().enumerate() {
                let from = &out.floats.as_slice()[span.first_row * query * dim..];
                got[s].extend(&from[..span.rows * query * dim]);
                done[s] += next[s];
            }
        }
        for s in 0..2 {
            assert_same(&got[s], &expected[s], &what);
        }
    }
}

#[test]
fn attention_has_the_bits_of_scalar_code() {
    check_attention(Heads { query: 1, kv: 1, dim: 2 }, [3, 1], 8);
    check_attention(Heads { query: 6, kv: 2, dim: 20 }, [85, 17], 100);
    check_attention(Heads { query: 3, kv: 3, dim: 128 }, [34, 16], 5);
    check_attention(Heads { query: 5, kv: 1, dim: 80 }, [70, 33], 1);
    check_attention(Heads { query: 4, kv: 2, dim: 64 }, [130, 3], 37);
}

#[test]
fn attention_reads_keys_and_values_back_as_they_are_held() {
    for held in [KvPrecision::Bf16, KvPrecision::Q8_0] {
        check_attention_over(held, Heads { query: 1, kv: 1, dim: 2 }, [3, 1], 8);
        check_attention_over(held, Heads { query: 6, kv: 2, dim: 20 }, [85, 17], 100);
        check_attention_over(held, Heads { query: 5, kv: 1, dim: 80 }, [70, 33], 1);
        check_attention_over(held, Heads { query: 4, kv: 2, dim: 64 }, [130, 3], 37);
    }
}
