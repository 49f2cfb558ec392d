//! The best k tokens of a row.

use std::cmp::Ordering;

use shoal_protocol::id::TokenId;

/// A token with its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked {
    /// The logit; finite.
    pub logit: f32,
    /// The token.
    pub token: TokenId,
}

/// Best first: larger logits, then lower ids.
pub fn best_first(a: &Ranked, b: &Ranked) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
}

/// Puts the best `k` tokens into `out`, in order, best first; all of them where there are fewer.
///
/// One pass over the logits with a buffer of `2k`: whenever it is full its worse half is dropped, and
/// what is no better than the best dropped one never enters again.
pub fn select(logits: &[f32], k: usize, out: &mut Vec<Ranked>) {
    out.clear();
    let k = k.min(logits.len());
    if k == 0 {
        return;
    }
    let room = k.saturating_mul(2);
    let mut floor = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        // An equal one comes later, so its id is higher and it stays behind the k that are kept.
        if logit <= floor {
            continue;
        }
        if out.len() == room {
            out.select_nth_unstable_by(k - 1, best_first);
            out.truncate(k);
            floor = out[k - 1].logit;
            if logit <= floor {
                continue;
            }
        }
        out.push(Ranked { logit, token: token as TokenId });
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, best_first);
        out.truncate(k);
    }
    out.sort_unstable_by(best_first);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_a_full_sort() {
        for (len, period) in [(1, 1), (10, 3), (100, 100), (3000, 17), (3000, 2999)] {
            let logits: Vec<f32> =
                (0..len).map(|i| ((i * 7919) % period) as f32 - (period / 2) as f32).collect();
            let mut all: Vec<Ranked> =
                (0..len).map(|i| Ranked { logit: logits[i], token: i as TokenId }).collect();
            all.sort_by(best_first);
            let mut out = Vec::new();
            for k in [0, 1, 2, 7, 64, len, len + 5] {
                select(&logits, k, &mut out);
                assert_eq!(out, all[..k.min(len)], "best {k} of {len}");
            }
        }
    }
}
