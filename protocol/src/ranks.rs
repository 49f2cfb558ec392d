//! Rank ↔ rank of one stage (`shoal-act`), behind the greeting of their link.
//!
//! ```text
//! dialled ──► Near ──► dialler ──► Near ──► dialled ──► Near: whether they have met at a socket of their machine
//! rank r  ◄─► Partial ◄─► rank q, round after round, where they have not
//! ```

use crate::frame::flat;

flat! {
    /// What one tensor rank tells another in the middle of a step; the body is what the round is about,
    /// as long as both work out from the plan.
    pub struct Partial = 16 {
        /// The layout.
        pub generation: u64,
        /// Counts the rounds of the link from 0.
        pub round: u64,
    }
}

flat! {
    /// What one tensor rank says of a socket of their machine beside their link. The one that was dialled
    /// begins, each answers a yes, and the third one counts: partial results go there from then on. A no
    /// ends it: they go over the link.
    pub struct Near = 16 {
        /// The layout.
        pub generation: u64,
        /// 1 for yes: it listens there, it has come there, both are there. Else 0.
        pub yes: u64,
    }
}
