//! ○ Where everything is in etcd.
//!
//! | key | value |
//! |---|---|
//! | `PREFIX/cmd/<n>` | the command with the number n, from 1, 20 digits: [`super::entry`] |
//! | `PREFIX/head` | the number of the last command; written with each, so its revision is the log's |
//! | `PREFIX/leader` | who leads, under a lease; its create-revision is the epoch |
//! | `PREFIX/snap/<folder>/<part>` | a piece of a snapshot: [`super::chunks`] |
//! | `PREFIX/snapshot` | which folder is the snapshot, and of what |

use std::ops::Range;

/// A range of keys, the end excluded.
pub type Span = Range<Vec<u8>>;

/// What a key of ours is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A command.
    Command(u64),
    /// The number of the last command.
    Head,
}

/// The keys of one cluster.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Those under a prefix, which has no `/` at its ends.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// A command.
    pub fn command(&self, index: u64) -> String {
        format!("{}/cmd/{index:020}", self.prefix)
    }

    /// Commands from one number up to the last.
    pub fn commands_from(&self, index: u64) -> Span {
        self.command(index).into_bytes()..format!("{}/cmd0", self.prefix).into_bytes()
    }

    /// Commands up to and with one number.
    pub fn commands_to(&self, index: u64) -> Span {
        self.command(0).into_bytes()..self.command(index + 1).into_bytes()
    }

    /// The number of the last command.
    pub fn head(&self) -> String {
        format!("{}/head", self.prefix)
    }

    /// Who leads.
    pub fn leader(&self) -> String {
        format!("{}/leader", self.prefix)
    }

    /// Which folder is the snapshot.
    pub fn manifest(&self) -> String {
        format!("{}/snapshot", self.prefix)
    }

    /// A piece of a snapshot.
    pub fn part(&self, folder: &str, part: u32) -> String {
        format!("{}/snap/{folder}/{part:06}", self.prefix)
    }

    /// All pieces of all snapshots but one.
    pub fn other_parts(&self, folder: &str) -> [Span; 2] {
        let key = |rest: &str| format!("{}/snap{rest}", self.prefix).into_bytes();
        // `0` is the character behind `/`.
        [key("/")..key(&format!("/{folder}/")), key(&format!("/{folder}0"))..key("0")]
    }

    /// What is watched: commands and the head, and nothing of a snapshot's megabytes.
    pub fn watched(&self) -> Span {
        let from = format!("{}/cmd/", self.prefix).into_bytes();
        let mut to = self.head().into_bytes();
        to.push(0);
        from..to
    }

    /// What a watched key is; `None` for what somebody else has put there.
    pub fn read(&self, key: &[u8]) -> Option<Key> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?;
        if rest == "/head" {
            return Some(Key::Head);
        }
        let digits = rest.strip_prefix("/cmd/")?;
        let index = digits.parse().ok().filter(|_| digits.len() == 20)?;
        Some(Key::Command(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_sort_as_their_numbers_and_are_read_back() {
        let keys = Keys::new("shoal");
        let numbers = [1, 2, 9, 10, 99, 100, u64::from(u32::MAX), u64::MAX - 1];
        assert!(numbers.is_sorted_by_key(|n| keys.command(*n)));
        for n in numbers {
            assert_eq!(keys.read(keys.command(n).as_bytes()), Some(Key::Command(n)));
            assert!(keys.commands_from(n).contains(&keys.command(n).into_bytes()));
            assert!(keys.commands_to(n).contains(&keys.command(n).into_bytes()));
            assert!(!keys.commands_to(n).contains(&keys.command(n + 1).into_bytes()));
            assert!(keys.watched().contains(&keys.command(n).into_bytes()));
        }
        assert_eq!(keys.read(keys.head().as_bytes()), Some(Key::Head));
        for foreign in ["shoal/cmd/1", "shoal/cmd/x", "other/head", "shoal/leader", "shoal2/head"] {
            assert_eq!(keys.read(foreign.as_bytes()), None, "{foreign}");
        }
    }

    #[test]
    fn what_is_cleared_away_is_never_the_snapshot_itself() {
        let keys = Keys::new("a/b");
        let mine = keys.part("2-x", 0).into_bytes();
        let others = ["1-x", "2-w", "2-xx", "2-y", "3-a"].map(|f| keys.part(f, 7).into_bytes());
        let spans = keys.other_parts("2-x");
        let gone = |key: &Vec<u8>| spans.iter().any(|span| span.contains(key));
        assert!(!gone(&mine));
        assert!(others.iter().all(gone));
        assert!(!gone(&keys.manifest().into_bytes()) && !gone(&keys.head().into_bytes()));
        assert!(!keys.watched().contains(&mine));
        assert!(!keys.watched().contains(&keys.manifest().into_bytes()));
    }
}
