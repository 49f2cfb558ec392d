//! `ln(sum of exp)` over a vocabulary, the same wherever the vocabulary is cut.

use super::exp::exp;

/// Tokens of one block. Tensor ranks cut the vocabulary at multiples of it.
pub const BLOCK: usize = 1024;

/// Token i of a block is added to sum i mod `LANES`, and those are added in order at the end: part of
/// the definition, as another number gives other bits.
const LANES: usize = 8;

/// The sum over a part of the vocabulary: `sum * exp(max)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Partial {
    /// The largest value; negative infinity for an empty part.
    pub max: f64,
    /// The sum of `exp(value - max)`.
    pub sum: f64,
}

impl Partial {
    /// The sum over nothing.
    pub const EMPTY: Self = Self { max: f64::NEG_INFINITY, sum: 0.0 };

    /// The sum over one block. `scale` is one over the temperature.
    pub fn of_block(logits: &[f32], scale: f64) -> Self {
        let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        if max == f32::NEG_INFINITY {
            return Self::EMPTY;
        }
        let max = f64::from(max) * scale;
        let mut lanes = [0.0; LANES];
        let mut groups = logits.chunks_exact(LANES);
        for group in &mut groups {
            for (lane, &x) in lanes.iter_mut().zip(group) {
                *lane += exp(f64::from(x) * scale - max);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(groups.remainder()) {
            *lane += exp(f64::from(x) * scale - max);
        }
        Self { max, sum: lanes.iter().sum() }
    }

    /// The sum over this part and the blocks that follow it.
    pub fn fold(self, next: Self) -> Self {
        if next.max == f64::NEG_INFINITY {
            return self;
        }
        if self.max == f64::NEG_INFINITY {
            return next;
        }
        let max = if next.max > self.max { next.max } else { self.max };
        let sum = self.sum * exp(self.max - max) + next.sum * exp(next.max - max);
        Self { max, sum }
    }

    /// `ln(sum of exp)`.
    pub fn ln(self) -> f64 {
        self.max + libm::log(self.sum)
    }
}

/// The sum over all of a vocabulary.
pub fn over(logits: &[f32], scale: f64) -> Partial {
    logits
        .chunks(BLOCK)
        .map(|block| Partial::of_block(block, scale))
        .fold(Partial::EMPTY, Partial::fold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_plain_sum() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 1000) as f32 * 0.01 - 3.0).collect();
        for scale in [0.5, 1.0, 3.0] {
            let plain = logits.iter().map(|&x| (f64::from(x) * scale).exp()).sum::<f64>().ln();
            assert!((over(&logits, scale).ln() - plain).abs() < 1e-10);
        }
    }

    #[test]
    fn does_not_overflow_and_knows_the_empty_sum() {
        assert_eq!(over(&[1e30, 1e30], 1.0).ln(), f64::from(1e30f32));
        assert!((over(&[-500.0, -500.0], 1.0).ln() - (-500.0 + 2f64.ln())).abs() < 1e-12);
        assert_eq!(over(&[], 1.0), Partial::EMPTY);
        assert_eq!(Partial::EMPTY.fold(Partial { max: 1.0, sum: 2.0 }).sum, 2.0);
    }

    #[test]
    fn a_cut_at_a_block_border_changes_no_bit() {
        let logits: Vec<f32> =
            (0..7 * BLOCK + 13).map(|i| ((i * 31) % 997) as f32 * 0.02).collect();
        let whole = over(&logits, 1.25);
        for border in 1..7 {
            // A rank sends the partials of its blocks; they are folded one by one.
            let (left, right) = logits.split_at(border * BLOCK);
            let folded = right
                .chunks(BLOCK)
                .map(|block| Partial::of_block(block, 1.25))
                .fold(over(left, 1.25), Partial::fold);
            assert_eq!(folded, whole);
        }
    }
}
