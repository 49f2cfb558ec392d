//! Noise without state: a number for each (seed, stream, position, token).
//!
//! The bits are SplitMix64 (Steele, Lea, Flood 2014) used as a counter: the state is a hash of
//! seed, stream and position, each mixed in after the other, and token t takes the output number t. A logit plus a Gumbel-distributed
//! number, maximised over tokens, is a draw from the softmax of the logits.

use shoal_protocol::id::TokenId;

/// The increment of SplitMix64: 2^64 divided by the golden ratio, made odd.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// More than any rounding of `key` can add to the true value, at the sizes that occur.
const SLACK: f64 = 1e-9;

/// The finaliser of SplitMix64: a bijection in which each input bit flips about half of the output.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The noise of one draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    state: u64,
}

impl Noise {
    /// The noise for the token that will stand at `position` of this stream of this seed.
    pub fn new(seed: u64, stream: u32, position: u32) -> Self {
        let seeded = mix(seed.wrapping_add(GOLDEN));
        let streamed = mix(seeded ^ u64::from(stream));
        let state = mix(streamed ^ u64::from(position));
        Self { state }
    }

    /// 52 random bits of this token.
    fn bits(self, token: TokenId) -> u64 {
        mix(self.state.wrapping_add((u64::from(token) + 1).wrapping_mul(GOLDEN))) >> 12
    }

    /// The Gumbel-distributed number of this token: `-ln(-ln u)`, `u` uniform in (0, 1).
    pub fn gumbel(self, token: TokenId) -> f64 {
        // (2 bits + 1) / 2^53 is exact and never 0 or 1.
        let u = (2 * self.bits(token) + 1) as f64 / (1u64 << 53) as f64;
        -libm::log(-libm::log(u))
    }

    /// A number that `gumbel(token)` does not exceed, without a logarithm.
    ///
    /// `-ln u >= 1 - u`, so `-ln(-ln u) <= -ln(1 - u)`; and `1 - u` is at least the power of two
    /// that its leading bit stands for.
    fn gumbel_max(self, token: TokenId) -> f64 {
        let complement = 2 * ((1u64 << 52) - 1 - self.bits(token)) + 1;
        f64::from(complement.leading_zeros() - 10) * std::f64::consts::LN_2
    }
}

/// No number that `Noise::gumbel` returns is larger.
const GUMBEL_CEILING: f64 = 53.0 * std::f64::consts::LN_2;

/// The best of some tokens under logit/T + noise.
#[derive(Clone, Copy, Debug)]
pub struct Race {
    noise: Noise,
    scale: f64,
    best: Option<(f64, TokenId)>,
}

impl Race {
    /// A race at this temperature, which is above 0.
    pub fn new(noise: Noise, temperature: f32) -> Self {
        Self { noise, scale: 1.0 / f64::from(temperature), best: None }
    }

    /// Enters a token. The order in which tokens enter does not change the winner, but a likely one
    /// entered first makes the rest cheap: most of them cannot win whatever their noise is.
    pub fn enter(&mut self, token: TokenId, logit: f32) {
        let scaled = f64::from(logit) * self.scale;
        if let Some((best, _)) = self.best
            && (scaled + GUMBEL_CEILING + SLACK < best
                || scaled + self.noise.gumbel_max(token) + SLACK < best)
        {
            return;
        }
        let key = scaled + self.noise.gumbel(token);
        let wins = match self.best {
            None => true,
            Some((best, holder)) => key > best || (key == best && token < holder),
        };
        if wins {
            self.best = Some((key, token));
        }
    }

    /// The winner and its key; `None` where none entered.
    pub fn leader(&self) -> Option<(f64, TokenId)> {
        self.best
    }

    /// The winner; `None` where none entered.
    pub fn winner(&self) -> Option<TokenId> {
        self.best.map(|(_, token)| token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_is_fixed_for_ever() {
        // These bits are a promise: a stream that began under one version goes on under the next.
        let noise = Noise::new(42, 7, 100);
        let bits: Vec<u64> = (0..3).map(|t| noise.bits(t)).collect();
        assert_eq!(bits, GOLDEN_BITS);
    }

    /// Worked out apart from this code.
    const GOLDEN_BITS: [u64; 3] = [2548648204692614, 4415368519484171, 735092422169086];

    #[test]
    fn each_part_of_the_key_changes_the_noise() {
        let base = Noise::new(1, 2, 3);
        for other in [Noise::new(2, 2, 3), Noise::new(1, 3, 3), Noise::new(1, 2, 4)] {
            assert_ne!(base, other);
        }
        // Parts must not stand in for each other.
        assert_ne!(Noise::new(1, 2, 3), Noise::new(2, 1, 3));
        assert_ne!(Noise::new(1, 2, 3), Noise::new(1, 3, 2));
    }

    #[test]
    fn the_cheap_bound_holds_and_is_near() {
        let mut gap = 0.0;
        for token in 0..200_000 {
            let noise = Noise::new(9, 0, 5);
            let (exact, bound) = (noise.gumbel(token), noise.gumbel_max(token));
            assert!(exact <= bound && bound <= GUMBEL_CEILING, "{token}: {exact} > {bound}");
            if exact > 3.0 {
                gap = f64::max(gap, bound - exact);
            }
        }
        assert!(gap < 1.0, "the bound is {gap} too high for numbers that may win");
    }

    #[test]
    fn the_noise_is_gumbel_distributed() {
        // Mean: the Euler-Mascheroni constant; variance: pi^2 / 6.
        let n = 400_000;
        let values: Vec<f64> =
            (0..n).map(|i| Noise::new(3, i % 7, i / 1000).gumbel(i % 1000)).collect();
        let mean = values.iter().sum::<f64>() / f64::from(n);
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!((mean - 0.577_216).abs() < 0.01, "mean {mean}");
        assert!((variance - 1.644_934).abs() < 0.03, "variance {variance}");
    }

    #[test]
    fn pruning_does_not_change_the_winner() {
        for position in 0..300 {
            let noise = Noise::new(11, 0, position);
            let logits: Vec<f32> =
                (0..500).map(|t| ((t * 37 + position * 11) % 101) as f32 * 0.11).collect();
            let mut race = Race::new(noise, 0.9);
            logits.iter().enumerate().for_each(|(t, &x)| race.enter(t as u32, x));
            let scale = 1.0 / f64::from(0.9f32);
            let naive = (0..500u32)
                .map(|t| (f64::from(logits[t as usize]) * scale + noise.gumbel(t), t))
                .fold((f64::MIN, 0), |a, b| if b.0 > a.0 { b } else { a });
            assert_eq!(race.winner(), Some(naive.1), "position {position}");
        }
    }
}
