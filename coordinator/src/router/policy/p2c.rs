//! ○ The power of two choices (Mitzenmacher): of two drawn, the one with fewer sequences.

use super::super::book::Book;
use super::two;

/// One of two.
pub fn choose(books: &[Book], candidates: &[u32], dice: u64) -> u32 {
    let (a, b) = two(candidates, dice);
    if books[b as usize].load < books[a as usize].load { b } else { a }
}
