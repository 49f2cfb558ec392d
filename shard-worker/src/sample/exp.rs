//! `exp` for sums over a vocabulary: the same bits on every machine, and plain enough for the
//! compiler to compute several at once.

use std::f64::consts::LOG2_E;

/// ln 2 in two parts: the first has so few digits that its product with any exponent is exact.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// Adding it rounds a number to an integer, which then stands in the lowest bits.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// Below, the result counts as 0: it is less than 2^-1000.
const FLOOR: f64 = -700.0;

/// 1/k! for the terms of the series, highest first: what is left out is below 2^-58 of the result.
const TERMS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// `e^x` for `x <= 0`, within two units in the last place; 0 below -700. Additions and
/// multiplications alone, each rounded once, in this order.
#[inline]
pub fn exp(x: f64) -> f64 {
    let clamped = if x > FLOOR { x } else { FLOOR };
    let rounded = clamped * LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let rest = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let series = TERMS.iter().fold(0.0, |sum, term| sum * rest + term);
    let power = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52);
    if x > FLOOR { series * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_as_near_as_the_library() {
        let mut worst = 0.0;
        for i in 0..1_000_000 {
            let x = -f64::from(i) * 0.000_699_7;
            let (got, expected) = (exp(x), libm::exp(x));
            worst = f64::max(worst, (got / expected - 1.0).abs() / f64::EPSILON);
        }
        assert!(worst <= 2.0, "{worst} units in the last place");
    }

    #[test]
    fn at_its_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert!(exp(-699.999) > 0.0);
        for x in [-700.0, -1e300, f64::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
    }
}
