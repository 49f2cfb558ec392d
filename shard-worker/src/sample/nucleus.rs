//! Top-p: the smallest set of likeliest tokens whose mass reaches p.

use super::exp::exp;
use super::top::{Ranked, select};

/// How many of the best tokens are fetched first; four times as many each time that their mass does
/// not reach p. Nearly all draws end with the first fetch.
pub const FETCH: usize = 128;

/// Puts into `kept` the likeliest tokens, best first, whose mass is at least `top_p` of `total`:
/// the sum of `exp(logit * scale - max)` over the whole row.
pub fn of_row(
    logits: &[f32],
    scale: f64,
    max: f64,
    total: f64,
    top_p: f32,
    kept: &mut Vec<Ranked>,
) {
    let mut fetch = FETCH;
    loop {
        select(logits, fetch, kept);
        let reached = cut(kept, scale, max, total, top_p);
        if reached || kept.len() == logits.len() {
            return;
        }
        fetch = fetch.saturating_mul(4);
    }
}

/// The same where `kept`, best first, is all that a top-k has left: their own mass is the whole.
pub fn of_kept(kept: &mut Vec<Ranked>, scale: f64, top_p: f32) {
    let Some(best) = kept.first() else { return };
    let max = f64::from(best.logit) * scale;
    let total = kept.iter().map(|r| exp(f64::from(r.logit) * scale - max)).sum();
    cut(kept, scale, max, total, top_p);
}

/// Cuts `kept` behind the token with which the mass reaches p. False: it is not reached.
pub fn cut(kept: &mut Vec<Ranked>, scale: f64, max: f64, total: f64, top_p: f32) -> bool {
    let goal = f64::from(top_p) * total;
    let mut mass = 0.0;
    for (i, ranked) in kept.iter().enumerate() {
        mass += exp(f64::from(ranked.logit) * scale - max);
        if mass >= goal {
            kept.truncate(i + 1);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::logsumexp;

    /// The tokens that are kept at this p.
    fn kept(logits: &[f32], temperature: f64, top_p: f32) -> Vec<u32> {
        let scale = 1.0 / temperature;
        let whole = logsumexp::over(logits, scale);
        let mut out = Vec::new();
        of_row(logits, scale, whole.max, whole.sum, top_p, &mut out);
        out.iter().map(|r| r.token).collect()
    }

    #[test]
    fn the_smallest_set_with_enough_mass() {
        // Probabilities 1/2, 1/4, 1/8, 1/8.
        let logits: Vec<f32> = [0.25f32, 0.5, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        for (top_p, tokens) in [
            (0.01, vec![1]),
            (0.49, vec![1]),
            (0.51, vec![1, 0]),
            (0.74, vec![1, 0]),
            (0.76, vec![1, 0, 2]),
            (0.87, vec![1, 0, 2]),
            (0.88, vec![1, 0, 2, 3]),
            (1.0, vec![1, 0, 2, 3]),
        ] {
            assert_eq!(kept(&logits, 1.0, top_p), tokens, "top_p {top_p}");
        }
        // A high temperature flattens, a low one sharpens.
        assert_eq!(kept(&logits, 100.0, 0.7).len(), 3);
        assert_eq!(kept(&logits, 0.1, 0.99), vec![1]);
    }

    #[test]
    fn a_flat_row_is_fetched_until_the_mass_is_proven() {
        let flat = vec![0.0; 10_000];
        let tokens = kept(&flat, 1.0, 0.5);
        assert_eq!(tokens, (0..5000).collect::<Vec<u32>>());
    }

    #[test]
    fn within_a_top_k_the_kept_are_the_whole() {
        let ranked = |logit: f32, token| Ranked { logit, token };
        let mut kept = vec![ranked(0.0, 5), ranked(0.0, 7), ranked(0.0, 9), ranked(0.0, 11)];
        of_kept(&mut kept, 1.0, 0.5);
        assert_eq!(kept.iter().map(|r| r.token).collect::<Vec<_>>(), [5, 7]);
        let mut none = Vec::new();
        of_kept(&mut none, 1.0, 0.5);
        assert!(none.is_empty());
    }
}
