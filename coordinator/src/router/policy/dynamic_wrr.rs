//! ○ What wuba/dl_inference documents: smooth weighted round robin, whose weights fall by half with a
//! failure and close half of the gap with a success. Its published code leaves every weight at zero
//! and so always takes the first node; here they begin at 100. It never ejects and never looks at
//! latency: the breaker before it does what it does not.

use super::super::book::Book;

/// The weight of a replica that does not fail.
const FULL: i64 = 100;

/// The weights of one replica.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    effective: i64,
    current: i64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { effective: FULL, current: 0 }
    }
}

impl Weights {
    /// A request succeeded.
    pub fn good(&mut self) {
        if self.effective < FULL {
            self.effective += (FULL - self.effective + 1) >> 1;
        }
    }

    /// A request failed.
    pub fn bad(&mut self) {
        if self.effective != 1 {
            self.effective >>= 1;
        }
    }

    /// What its share follows.
    pub fn effective(&self) -> i64 {
        self.effective
    }
}

/// The first with the largest current weight.
pub fn choose(books: &mut [Book], candidates: &[u32]) -> u32 {
    let mut total = 0;
    let mut best: Option<(i64, u32)> = None;
    for &i in candidates {
        let weights = &mut books[i as usize].weights;
        weights.current += weights.effective;
        total += weights.effective;
        if best.is_none_or(|(most, _)| weights.current > most) {
            best = Some((weights.current, i));
        }
    }
    let chosen = best.map_or(0, |(_, i)| i);
    books[chosen as usize].weights.current -= total;
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_fall_and_rise_as_documented() {
        let mut weights = Weights::default();
        let mut seen = Vec::new();
        for _ in 0..7 {
            weights.bad();
            seen.push(weights.effective);
        }
        assert_eq!(seen, [50, 25, 12, 6, 3, 1, 1]);
        seen.clear();
        for _ in 0..8 {
            weights.good();
            seen.push(weights.effective);
        }
        assert_eq!(seen, [51, 76, 88, 94, 97, 99, 100, 100]);
    }
}
