//! Candle-core is the oracle: an independent port of llama.cpp's blocks.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::*;

/// Repeatable values of the kind that weights are: around zero, few far from it.
fn weights(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| (next() + next() + next()) * 0.02).collect()
}

/// What candle makes of values: its blocks, and what they stand for.
fn candle(dtype: GgmlDType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
    let quantised = QTensor::quantize(&tensor, dtype).unwrap();
    let back = quantised.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
    (quantised.data().unwrap().to_vec(), back)
}

const LEN: usize = 4096;

#[test]
fn every_block_of_gguf_stands_for_what_candle_says() {
    for (dtype, stored) in [
        (GgmlDType::Q4_0, StoredType::Q4_0),
        (GgmlDType::Q4_1, StoredType::Q4_1),
        (GgmlDType::Q5_0, StoredType::Q5_0),
        (GgmlDType::Q5_1, StoredType::Q5_1),
        (GgmlDType::Q8_0, StoredType::Q8_0),
        (GgmlDType::Q4K, StoredType::Q4K),
        (GgmlDType::Q5K, StoredType::Q5K),
        (GgmlDType::Q6K, StoredType::Q6K),
    ] {
        let (bytes, expected) = candle(dtype, &weights(7, LEN));
        assert_eq!(Some(bytes.len() as u64), stored.row_bytes(LEN as u64), "{stored}");
        let mut found = vec![f32::NAN; LEN];
        decode_row(stored, &bytes, &mut found);
        let differ = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(differ, None, "{stored}");
    }
}

#[test]
fn blocks_of_32_are_rounded_as_candle_rounds_them() {
    fn check<B: Encode>(dtype: GgmlDType) {
        let mut values = weights(9, LEN);
        values[64..96].fill(0.0);
        let (expected, _) = candle(dtype, &values);
        let mut found = vec![0xAA; expected.len()];
        for (values, block) in values.chunks(B::WEIGHTS).zip(found.chunks_mut(B::BYTES)) {
            B::encode(values, block);
        }
        assert_eq!(found, expected, "{dtype:?}");
    }
    check::<Q8_0>(GgmlDType::Q8_0);
    check::<Q4_0>(GgmlDType::Q4_0);
}

fn square_error(found: &[f32], expected: &[f32]) -> f64 {
    found.iter().zip(expected).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn blocks_of_256_are_rounded_no_worse_than_candle_rounds_them() {
    fn check<B: Encode>(dtype: GgmlDType) {
        let values = weights(11, LEN);
        let (_, candles) = candle(dtype, &values);
        let mut found = vec![f32::NAN; LEN];
        for (values, found) in values.chunks(256).zip(found.chunks_mut(256)) {
            let mut block = vec![0xAA; B::BYTES];
            B::encode(values, &mut block);
            B::decode(&block, found);
        }
        let (ours, theirs) = (square_error(&found, &values), square_error(&candles, &values));
        assert!(ours < 1.05 * theirs, "{dtype:?}: {ours:e} and {theirs:e}");
    }
    check::<Q4K>(GgmlDType::Q4K);
    check::<Q5K>(GgmlDType::Q5K);
    check::<Q6K>(GgmlDType::Q6K);
}

#[test]
fn a_block_that_is_not_full_counts_what_it_has() {
    fn check<B: Encode>(tolerance: f32) {
        for len in [1, 5, B::WEIGHTS - 1] {
            let values = weights(13, len);
            let (mut block, mut back) = (vec![0xAA; B::BYTES], vec![f32::NAN; B::WEIGHTS]);
            B::encode(&values, &mut block);
            B::decode(&block, &mut back);
            for (value, back) in values.iter().zip(&back) {
                assert!((value - back).abs() <= tolerance, "{len}: {value} became {back}");
            }
        }
    }
    check::<Q8_0>(0.06 / 127.0);
    check::<Q4_0>(0.06 / 7.0);
    check::<Q4K>(0.12 / 15.0);
    check::<Q5K>(0.12 / 31.0);
    check::<Q6K>(0.06 / 31.0);
}

#[test]
fn eight_bits_have_the_values_of_the_format() {
    for (bits, value) in [
        (0x00, 0.0),
        (0x01, 2.0_f32.powi(-9)),
        (0x08, 2.0_f32.powi(-6)),
        (0x38, 1.0),
        (0x7E, 448.0),
    ] {
        assert_eq!(e4m3(bits), value, "{bits:#x}");
        assert_eq!(e4m3(bits | 0x80), -value, "{bits:#x}");
    }
    assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan());
}

#[test]
fn a_value_becomes_the_nearest_number_of_eight_bits() {
    let numbers: Vec<f32> = (0..=0x7E_u8).map(e4m3).collect();
    for (bits, pair) in (0_u8..).zip(numbers.windows(2)) {
        let middle = (pair[0] + pair[1]) / 2.0;
        let even = bits + bits % 2;
        for (value, expected) in [
            (pair[0], bits),
            (middle.next_down(), bits),
            (middle, even),
            (middle.next_up(), bits + 1),
        ] {
            assert_eq!(to_e4m3(value), expected, "{value:e}");
            assert_eq!(to_e4m3(-value), expected | 0x80, "{value:e}");
        }
    }
    assert_eq!(to_e4m3(1e9), 0x7E);
}

#[test]
fn rounding_is_that_of_the_standard_library() {
    let halves = (-4096..4096).map(|n| n as f32 / 2.0);
    let around = halves.flat_map(|x| [x.next_down(), x, x.next_up()]);
    for x in around.chain(weights(3, 4096).into_iter().map(|x| x * 2000.0)) {
        assert_eq!(blocks::nearest(x), x.round_ties_even(), "{x:e}");
        assert_eq!(blocks::nearest_away(x), x.round(), "{x:e}");
    }
}
