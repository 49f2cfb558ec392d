//! Sizes that do not fit: said once, in the words of a step.

use crate::model::ComputeError;

/// A step that does not fit the shard.
pub(super) fn bad(why: String) -> ComputeError {
    ComputeError::BadBatch(why)
}

/// Refuses a width that is another one.
pub(super) fn expect(what: &str, got: usize, expected: usize) -> Result<(), ComputeError> {
    if got == expected {
        return Ok(());
    }
    Err(bad(format!("{what} is {got} wide, {expected} was expected")))
}

/// Refuses more than there is room for.
pub(super) fn expect_rows(what: &str, got: usize, max: usize) -> Result<(), ComputeError> {
    if got <= max {
        return Ok(());
    }
    Err(bad(format!("{what} needs room for {got}, there is {max}")))
}

/// Whether `width` is a whole number of heads of `head` values; how many.
pub(super) fn heads_of(what: &str, width: usize, head: usize) -> Result<usize, ComputeError> {
    if head > 0 && width.is_multiple_of(head) {
        return Ok(width / head);
    }
    Err(bad(format!("{what} is {width} wide, no multiple of a head's {head}")))
}
