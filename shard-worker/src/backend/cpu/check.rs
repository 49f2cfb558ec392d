//! Sizes that do not fit: said once, in the words of a step.

use super::CpuBuf;
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

/// Whether these rows of one buffer are as wide as the other, which has a row for each; how wide.
pub(super) fn expect_some_rows(
    what: &str,
    narrow: &CpuBuf,
    rows: &[usize],
    of: &CpuBuf,
) -> Result<usize, ComputeError> {
    expect(what, narrow.width, of.width)?;
    expect_rows(what, rows.len(), narrow.rows_max())?;
    let last = rows.iter().max().map_or(0, |row| row + 1);
    expect_rows("the rows of an adapter", last, of.rows_max())?;
    Ok(of.width)
}

/// Whether `width` is a whole number of heads of `head` values; how many.
pub(super) fn heads_of(what: &str, width: usize, head: usize) -> Result<usize, ComputeError> {
    if head > 0 && width.is_multiple_of(head) {
        return Ok(width / head);
    }
    Err(bad(format!("{what} is {width} wide, no multiple of a head's {head}")))
}
