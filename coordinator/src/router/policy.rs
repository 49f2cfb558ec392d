//! ○ Which replica: a score for each, and the lowest wins.

/// How to choose among replicas that could all serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Policy {
    /// The least estimated load: sequences that the head reported, corrected by what was sent and
    /// finished since. Without the correction every request between two reports would go to the
    /// same replica.
    #[default]
    LeastLoad,
}

/// What a policy sees of a replica.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// Sequences that wait or run there, as far as we know.
    pub load: u32,
    /// The share of its KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// Whether it failed us a moment ago.
    pub suspect: bool,
}

impl Policy {
    /// The index of the replica to use; `None` where there is none. `dice` breaks ties, so that
    /// several coordinators do not all choose the same one.
    pub fn choose(self, views: &[View], dice: u64) -> Option<usize> {
        let Policy::LeastLoad = self;
        let worse = |a: &View, b: &View| {
            (a.suspect, a.load).cmp(&(b.suspect, b.load)).then(a.kv_usage.total_cmp(&b.kv_usage))
        };
        let best = views.iter().min_by(|a, b| worse(a, b))?;
        let ties: Vec<usize> =
            (0..views.len()).filter(|&i| worse(&views[i], best).is_eq()).collect();
        Some(ties[(dice % ties.len() as u64) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_loaded_wins_and_ties_go_by_the_dice() {
        let view = |load, kv_usage, suspect| View { load, kv_usage, suspect };
        let check = |views: &[View], dice, expected| {
            assert_eq!(Policy::LeastLoad.choose(views, dice), expected, "{views:?}");
        };
        check(&[], 0, None);
        check(&[view(3, 0.0, false), view(2, 0.9, false)], 0, Some(1));
        check(&[view(2, 0.5, false), view(2, 0.1, false)], 0, Some(1));
        check(&[view(0, 0.0, true), view(9, 0.9, false)], 0, Some(1));
        check(&[view(0, 0.0, true)], 5, Some(0));
        let equal = [view(1, 0.0, false); 3];
        for dice in 0..6 {
            check(&equal, dice, Some((dice % 3) as usize));
        }
    }
}
