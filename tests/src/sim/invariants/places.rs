//! **Places balance.** What the router counts as open at a layout is what runs there, no more and no
//! less.

use crate::sim::world::World;

impl World {
    /// Compares every router's books with the answers that run.
    pub fn check_places(&mut self) {
        let mut wrong = None;
        for (id, machine) in &self.coordinators {
            let Some(process) = &machine.process else { continue };
            for (replica, generation, open) in process.desk.router.open() {
                let runs = process.desk.running((replica, generation.0));
                if open != runs {
                    wrong =
                        Some(format!("{id}: {open} open at {replica} {generation}, {runs} run"));
                }
            }
        }
        if let Some(words) = wrong {
            self.violate("places", words);
        }
    }
}
