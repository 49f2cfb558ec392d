//! How many of a row's experts a tensor rank computes: the others wait for the one that has the most.
//!
//! A row uses `top_k` of all experts, and a rank has whole ones. Which it uses is taken to be drawn without
//! order, so that each set of so many is as likely as another; then
//!
//! ```text
//! expected most = sum over m of P(some rank has more than m)      P(none has more than m) =
//!                 sets of top_k experts with at most m on each rank / all sets of top_k experts
//! ```
//!
//! Worked example: 2 of 8 experts on two ranks of 4. Of 28 sets 12 lie on one rank: (12 x 2 + 16 x 1) / 28 = 1.43.

use shoal_protocol::model::Moe;

/// In thousandths of an expert.
pub const THOUSAND: u64 = 1000;

/// The most experts of a row, and in all, of which sets are counted: several times what models have.
const CHOSEN_MAX: usize = 32;
const EXPERTS_MAX: u32 = 1024;

/// How many experts of a row the rank has that has the most of them, on average, in thousandths; of one rank
/// all that the row uses.
pub fn busiest(moe: &Moe, ranks: u32) -> u64 {
    let chosen = moe.top_k.min(moe.experts) as usize;
    if ranks <= 1 {
        return chosen as u64 * THOUSAND;
    }
    // Beyond what is worth counting, and what its sums can count: as if one rank had as many as it can.
    if chosen > CHOSEN_MAX || moe.experts > EXPERTS_MAX {
        let most = moe.experts.div_ceil(ranks);
        return u64::from(most).min(chosen as u64) * THOUSAND;
    }
    let border = |rank: u32| u64::from(rank) * u64::from(moe.experts) / u64::from(ranks);
    let held: Vec<u64> = (0..ranks).map(|rank| border(rank + 1) - border(rank)).collect();
    let all = sets(&[u64::from(moe.experts)], chosen, chosen);
    let more_than = |most: usize| 1.0 - sets(&held, chosen, most) / all;
    let expected: f64 = (0..chosen).map(more_than).sum();
    (expected * THOUSAND as f64).round() as u64
}

/// How many sets of `chosen` experts there are with at most `most` of each rank's.
fn sets(held: &[u64], chosen: usize, most: usize) -> f64 {
    let mut by_size = vec![0.0; chosen + 1];
    by_size[0] = 1.0;
    for held in held {
        let mut with = vec![0.0; chosen + 1];
        // Of this rank's experts so many, in so many ways.
        let mut ways = 1.0;
        for own in 0..=most.min(chosen) {
            for (size, before) in by_size.iter().enumerate().take(chosen + 1 - own) {
                with[size + own] += before * ways;
            }
            ways *= held.saturating_sub(own as u64) as f64 / (own + 1) as f64;
        }
        by_size = with;
    }
    by_size[chosen]
}

#[cfg(test)]
mod tests {
    use shoal_protocol::model::Scoring;

    use super::*;

    fn moe(experts: u32, top_k: u32) -> Moe {
        Moe {
            experts,
            top_k,
            intermediate: 64,
            scoring: Scoring::Softmax,
            normalise: true,
            scale: 1.0,
            groups: None,
            shared: None,
            shared_gate: false,
            bias: false,
        }
    }

    #[test]
    fn the_busiest_rank_has_what_all_sets_say_on_average() {
        assert_eq!(busiest(&moe(8, 2), 1), 2000);
        // (12 x 2 + 16 x 1) / 28.
        assert_eq!(busiest(&moe(8, 2), 2), 1429);
        for (experts, top_k, ranks) in [(5, 2, 2), (8, 3, 3), (9, 4, 4), (6, 6, 2), (7, 1, 7)] {
            let rank_of = |expert: u32| {
                (0..ranks).find(|rank| expert < (rank + 1) * experts / ranks).unwrap() as usize
            };
            let (mut sum, mut count) = (0, 0);
            for set in (0_u32..1 << experts).filter(|set| set.count_ones() == top_k) {
                let mut of = vec![0; ranks as usize];
                (0..experts).filter(|e| set >> e & 1 == 1).for_each(|e| of[rank_of(e)] += 1);
                sum += of.iter().max().unwrap();
                count += 1;
            }
            let mean = f64::from(sum) / f64::from(count);
            let found = busiest(&moe(experts, top_k), ranks) as f64 / 1000.0;
            assert!((found - mean).abs() < 0.001, "{experts} {top_k} {ranks}: {found}, {mean}");
        }
        // The widest that is published: half of eight and a little.
        let wide = busiest(&moe(256, 8), 2);
        assert!((4900..5200).contains(&wide), "{wide}");
    }
}
