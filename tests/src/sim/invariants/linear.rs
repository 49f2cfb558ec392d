//! **The control plane is linearizable.** Changes give numbers in order, reads say how many were given;
//! so a history fits one order of all operations, each between its beginning and its end, exactly where
//! of any two of which one ended before the other began the later one has seen the earlier, and every
//! number is that of a change that had begun. What has no numbers is in `registers`.

use std::collections::BTreeSet;

use crate::sim::history::{Operation, Outcome};
use crate::sim::world::World;

impl World {
    /// Checks the history of all clients.
    pub fn check_history(&mut self) {
        // (began, ended, lowest count after it, whether it gave that number)
        let seen: Vec<(u64, u64, u32, bool, usize)> = self
            .history
            .operations
            .iter()
            .enumerate()
            .filter_map(|(i, operation)| match operation.ended? {
                (end, Outcome::Enrolled(n)) => Some((operation.began, end, n, true, i)),
                (end, Outcome::Seen(n)) => Some((operation.began, end, n, false, i)),
                (_, Outcome::Unknown) => None,
            })
            .collect();
        for earlier in &seen {
            for later in seen.iter().filter(|later| later.0 > earlier.1) {
                // A number is above everything seen before; a read sees at least as much.
                let least = earlier.2 + u32::from(later.3);
                if later.2 < least {
                    let words = format!(
                        "operation {} ended with {} at {} us; operation {} began at {} us and ended \
                         with {}",
                        earlier.4, earlier.2, earlier.1, later.4, later.0, later.2
                    );
                    return self.violate("linear", words);
                }
            }
        }
        self.check_unanswered(&seen.iter().map(|one| (one.1, one.2)).collect::<Vec<_>>());
    }

    /// Numbers that were seen belong to enrolments that had begun by then: those that were answered
    /// have theirs, and of the others there must be enough for the rest.
    fn check_unanswered(&mut self, seen: &[(u64, u32)]) {
        let changes = || self.history.operations.iter().filter(|operation| !operation.reads);
        let given: BTreeSet<u32> = changes()
            .filter_map(|operation| match operation.ended {
                Some((_, Outcome::Enrolled(number))) => Some(number),
                _ => None,
            })
            .collect();
        let open =
            |operation: &&Operation| !matches!(operation.ended, Some((_, Outcome::Enrolled(_))));
        let begun: Vec<u64> = changes().filter(open).map(|operation| operation.began).collect();
        for (end, number) in seen {
            let rest = (1..=*number).filter(|one| !given.contains(one)).count();
            let may = begun.iter().filter(|began| *began < end).count();
            if rest > may {
                let words = format!(
                    "{number} were seen at {end} us: {rest} of them were given to nobody, and {may} \
                     changes were under way"
                );
                return self.violate("linear", words);
            }
        }
    }
}
