//! ○ What can be wrong with a frame at a stage.

use shoal_protocol::id::{Generation, SequenceId};

/// A frame that does not fit what the stage knows: its sender broke the protocol, or frames were
/// lost. The table is as it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StageFault {
    /// A frame of another layout.
    #[error("a frame of generation {found}, this stage is of {expected}")]
    StaleGeneration {
        /// The frame's.
        found: Generation,
        /// The stage's.
        expected: Generation,
    },
    /// A step or a `Close` names a sequence that was never opened or is closed.
    #[error("sequence {0} is not open at this stage")]
    UnknownSequence(SequenceId),
    /// `Open` came twice.
    #[error("sequence {0} is already open at this stage")]
    AlreadyOpen(SequenceId),
    /// More sequences than the plan allows.
    #[error("sequence {sequence} is one more than the plan's {max}")]
    TooManySequences {
        /// The one too many.
        sequence: SequenceId,
        /// The plan's bound.
        max: u32,
    },
    /// More rows than the plan allows.
    #[error("a step of {rows} rows, the plan allows {max}")]
    TooManyRows {
        /// In the step.
        rows: usize,
        /// The plan's bound.
        max: u32,
    },
    /// A block number that the plan does not have.
    #[error("block {block} is granted to sequence {sequence}, the plan has {max} blocks")]
    BlockOutOfRange {
        /// Who was to get it.
        sequence: SequenceId,
        /// Its number.
        block: u32,
        /// How many there are.
        max: u32,
    },
    /// A block that a live sequence holds.
    #[error("block {block} is granted to sequence {sequence}, but sequence {owner} holds it")]
    BlockOwned {
        /// Who was to get it.
        sequence: SequenceId,
        /// Its number.
        block: u32,
        /// Who has it.
        owner: SequenceId,
    },
    /// A block that does not hold what it is to be shared for.
    #[error("block {block} is to be block {index} of sequence {sequence} as it is, but {why}")]
    NotShareable {
        /// Who was to get it.
        sequence: SequenceId,
        /// Its number.
        block: u32,
        /// Its place in the sequence.
        index: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// Rows of one sequence are not next to each other.
    #[error("the rows of sequence {0} are not adjacent in their step")]
    NotAdjacent(SequenceId),
    /// A row that does not stand where the one before it ended.
    #[error("a row of sequence {sequence} at position {found}, the next one is {expected}")]
    PositionGap {
        /// Whose row.
        sequence: SequenceId,
        /// The row's position.
        found: u32,
        /// One past the last row.
        expected: u32,
    },
    /// More rows than the context has positions.
    #[error("sequence {sequence} reaches {length} tokens, the plan's context has {max}")]
    ContextExceeded {
        /// Whose.
        sequence: SequenceId,
        /// With these rows.
        length: u32,
        /// The plan's bound.
        max: u32,
    },
    /// Rows for which no block was granted.
    #[error("sequence {sequence} needs {needed} blocks for its rows, it holds {held}")]
    BlocksMissing {
        /// Whose.
        sequence: SequenceId,
        /// With this step's grants.
        held: usize,
        /// For these rows.
        needed: usize,
    },
    /// A draw is asked for from a row that is not the last known token's.
    #[error("a draw for sequence {sequence} at position {found}, its last token is at {expected}")]
    NotLastToken {
        /// Whose.
        sequence: SequenceId,
        /// The row's position.
        found: u32,
        /// The last known token's.
        expected: u32,
    },
    /// Logits of another number of rows than the step samples.
    #[error("{found} logits for {rows} rows of a vocabulary of {vocab}")]
    WrongLogits {
        /// Numbers given.
        found: usize,
        /// Rows that sample.
        rows: usize,
        /// The width of a row.
        vocab: usize,
    },
}
