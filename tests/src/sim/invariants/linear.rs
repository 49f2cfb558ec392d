//! **The control plane is linearizable.** Changes give numbers in order, reads say how many were given;
//! so a history fits one order of all operations, each between its beginning and its end, exactly where
//! of any two of which one ended before the other began the later one has seen the earlier.

use crate::sim::history::Outcome;
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
    }
}
