//! **At most one leader in each term.** Two of them could both have a majority for different entries.

use shoal_protocol::id::NodeId;

use super::Checks;

impl Checks {
    /// A voter leads in this term.
    pub fn leads(&mut self, id: NodeId, term: u64) {
        let first = *self.reigns.entry(term).or_insert(id);
        if first != id {
            self.violate("one_leader", format!("{first} and {id} lead in term {term}"));
        }
    }
}
