//! Products of whole numbers against plain scalar code, with `==`, on every instruction set and several numbers of
//! threads. The scalar code is contract n2 written down.

use shoal_protocol::plan::{Activations, Precision};

use super::kernels_test::{Values, assert_same, buffer_of, devices, pack};
use super::*;
use crate::stored::{self, Encode, half_at, six_bits};

const WITH_NUMBERS: [Precision; 5] =
    [Precision::Q8_0, Precision::Q4_0, Precision::Q4K, Precision::Q5K, Precision::Q6K];

/// A weight as its block has it: its value is `number * factor + offset`.
#[derive(Clone, Copy)]
struct Number {
    number: i32,
    factor: f32,
    offset: Option<f32>,
}

fn numbers_of(held: Precision, block: &[u8]) -> Vec<Number> {
    let plain = |number, factor| Number { number, factor, offset: None };
    let part = |k: usize, number: u8| {
        let (scale, least) = six_bits(&block[stored::Q4K::PARTS_AT..], k / 32);
        let factor = half_at(block, 0) * f32::from(scale);
        let offset = Some(-(half_at(block, 2) * f32::from(least)));
        Number { number: i32::from(number), factor, offset }
    };
    match held {
        Precision::Q8_0 => {
            block[2..].iter().map(|q| plain(i32::from(*q as i8), half_at(block, 0))).collect()
        }
        Precision::Q4_0 => (0..32)
            .map(|k| {
                let q = block[2 + k % 16] >> (k / 16 * 4) & 0xF;
                plain(i32::from(q) - 8, half_at(block, 0))
            })
            .collect(),
        Precision::Q4K => (0..256)
            .map(|k| {
                let byte = block[stored::Q4K::NUMBERS_AT + k / 64 * 32 + k % 32];
                part(k, byte >> (k / 32 % 2 * 4) & 0xF)
            })
            .collect(),
        Precision::Q5K => {
            (0..256).map(|k| part(k, stored::Q5K::number(block, k / 32, k % 32))).collect()
        }
        Precision::Q6K => (0..256)
            .map(|k| {
                let scale = block[stored::Q6K::SCALES_AT + k / 16] as i8;
                let factor = half_at(block, stored::Q6K::SCALE_AT) * f32::from(scale);
                plain(i32::from(stored::Q6K::number(block, k)) - 32, factor)
            })
            .collect(),
        other => panic!("{other} has no whole numbers"),
    }
}

fn encoded(held: Precision, row: &[f32]) -> Vec<Number> {
    fn blocks<B: Encode>(held: Precision, row: &[f32]) -> Vec<Number> {
        let block = |values: &[f32]| {
            let mut bytes = vec![0; B::BYTES];
            B::encode(values, &mut bytes);
            numbers_of(held, &bytes)
        };
        row.chunks(B::WEIGHTS).flat_map(block).take(row.len()).collect()
    }
    match held {
        Precision::Q8_0 => blocks::<stored::Q8_0>(held, row),
        Precision::Q4_0 => blocks::<stored::Q4_0>(held, row),
        Precision::Q4K => blocks::<stored::Q4K>(held, row),
        Precision::Q5K => blocks::<stored::Q5K>(held, row),
        Precision::Q6K => blocks::<stored::Q6K>(held, row),
        other => panic!("{other} has no whole numbers"),
    }
}

/// A row's numbers, and the scale of each block of 32.
fn rounded_row(row: &[f32]) -> Vec<(Vec<i32>, f32)> {
    let block = |values: &[f32]| {
        let largest = values.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        if largest < 2.0_f32.powi(-100) {
            return (vec![0; values.len()], 0.0);
        }
        let inverse = 127.0 / largest;
        let number = |v: &f32| (v * inverse).round_ties_even() as i32;
        (values.iter().map(number).collect(), largest / 127.0)
    };
    row.chunks(32).map(block).collect()
}

fn dot_by_hand(held: Precision, row: &[(Vec<i32>, f32)], weights: &[Number]) -> f32 {
    let share = if held == Precision::Q6K { 16 } else { 32 };
    let mut y = 0.0_f32;
    for ((numbers, scale), weights) in row.iter().zip(weights.chunks(32)) {
        for (numbers, weights) in numbers.chunks(share).zip(weights.chunks(share)) {
            let whole: i32 = numbers.iter().zip(weights).map(|(x, w)| x * w.number).sum();
            y = (whole as f32).mul_add(weights[0].factor * scale, y);
            if let Some(offset) = weights[0].offset {
                let all: i32 = numbers.iter().sum();
                y = (all as f32).mul_add(offset * scale, y);
            }
        }
    }
    y
}

fn check(held: Precision, (rows, cols, outputs): (usize, usize, usize), bias: bool) {
    let mut values = Values::new((rows * 31 + cols * 7 + outputs) as u64);
    let mut x = values.take(rows * cols);
    // A block of zeros, one too small to be divided by, and one of a single value.
    x.iter_mut().take(32).for_each(|x| *x = 0.0);
    x.iter_mut().skip(32).take(32).for_each(|x| *x *= 1e-38);
    x.iter_mut().skip(65).take(31).for_each(|x| *x = 0.0);
    let weight = values.take(outputs * cols);
    let bias = bias.then(|| values.take(outputs));
    let weights: Vec<_> = weight.chunks(cols).map(|row| encoded(held, row)).collect();
    let mut expected = Vec::new();
    for row in x.chunks(cols).map(rounded_row) {
        for (output, weights) in weights.iter().enumerate() {
            let y = dot_by_hand(held, &row, weights);
            expected.push(bias.as_ref().map_or(y, |bias| y + bias[output]));
        }
    }
    for mut ops in devices() {
        ops.multiply(Activations::Int8).unwrap();
        let what = format!("{rows} x {cols} x {outputs} {held}, {} x {}", ops.isa(), ops.threads());
        let input = buffer_of(&mut ops, cols, &x);
        let mut out = ops.buffer(rows, outputs).unwrap();
        let linear = Linear {
            weight: pack(&ops, held, cols, &weight),
            bias: bias.as_ref().map(|bias| ops.vector(bias).unwrap()),
        };
        ops.linear(&input, rows, &linear, &mut out).unwrap();
        assert_same(&out.floats.as_slice()[..rows * outputs], &expected, &what);
    }
}

#[test]
fn products_of_every_number_of_rows_have_the_bits_of_one_chain_of_shares() {
    for rows in 1..=64 {
        check(WITH_NUMBERS[rows % 5], (rows, 70, 19 + rows % 5 * 16), rows % 2 == 0);
    }
}

#[test]
fn products_of_odd_sizes_have_the_bits_of_one_chain_of_shares() {
    for held in WITH_NUMBERS {
        // Around lanes, blocks, shares, panels, groups of panels and cuts of k.
        for (cols, outputs) in [(1, 1), (16, 16), (33, 17), (511, 65), (513, 130), (1100, 48)] {
            for rows in [1, 2, 13] {
                check(held, (rows, cols, outputs), false);
            }
        }
        // Sums that go on behind one cut of k, and behind two.
        for (cols, outputs) in [(2048, 17), (2080, 33), (4100, 16)] {
            check(held, (13, cols, outputs), true);
        }
    }
}

/// The largest numbers of both sides: nothing wraps or saturates.
#[test]
fn the_largest_numbers_are_summed_exactly() {
    for held in WITH_NUMBERS {
        let cols = 256;
        let row: Vec<f32> = (0..cols).map(|k| if k % 3 == 0 { -1.0 } else { 1.0 }).collect();
        let weights = encoded(held, &row);
        for x in [&row, &row.iter().map(|v| -v).collect::<Vec<_>>()] {
            let expected = dot_by_hand(held, &rounded_row(x), &weights);
            for mut ops in devices() {
                ops.multiply(Activations::Int8).unwrap();
                let input = buffer_of(&mut ops, cols, x);
                let mut out = ops.buffer(1, 1).unwrap();
                let linear = Linear { weight: pack(&ops, held, cols, &row), bias: None };
                ops.linear(&input, 1, &linear, &mut out).unwrap();
                assert_same(
                    &out.floats.as_slice()[..1],
                    &[expected],
                    &format!("{held} {}", ops.isa()),
                );
            }
        }
    }
}

/// What is no number stays none, so that it is noticed.
#[test]
fn what_is_no_number_is_none_afterwards() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut ops = CpuOps::new(1, Isa::best()).unwrap();
        ops.multiply(Activations::Int8).unwrap();
        let mut x = vec![0.5; 64];
        x[40] = bad;
        let input = buffer_of(&mut ops, 64, &x);
        let mut out = ops.buffer(1, 16).unwrap();
        let weight = pack(&ops, Precision::Q8_0, 64, &[0.25; 16 * 64]);
        ops.linear(&input, 1, &Linear { weight, bias: None }, &mut out).unwrap();
        assert!(out.floats.as_slice()[..16].iter().all(|y| y.is_nan()), "{bad}");
    }
}

/// Rows that are laid out for one kind of product are not taken for those of the other.
#[test]
fn matrices_of_both_kinds_take_turns_over_one_input() {
    let mut ops = CpuOps::new(2, Isa::best()).unwrap();
    ops.multiply(Activations::Int8).unwrap();
    let mut values = Values::new(3);
    let (x, weight) = (values.take(3 * 64), values.take(32 * 64));
    let plain = Linear { weight: pack(&ops, Precision::F32, 64, &weight), bias: None };
    let whole = Linear { weight: pack(&ops, Precision::Q8_0, 64, &weight), bias: None };
    let input = buffer_of(&mut ops, 64, &x);
    let mut of = |linear: &Linear<CpuOps>| {
        let mut out = ops.buffer(3, 32).unwrap();
        ops.linear(&input, 3, linear, &mut out).unwrap();
        out.floats.as_slice()[..3 * 32].to_vec()
    };
    let (first, second) = (of(&plain), of(&whole));
    assert_ne!(first, second);
    assert_eq!((of(&plain), of(&whole)), (first, second));
}
