//! Who reads adapters here: few at once, and each of the hub once, however often it is asked for.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use shoal_protocol::blob::name;
use shoal_protocol::error::{ErrorCode, WireError};
use tokio::sync::{Semaphore, SemaphorePermit};

/// How long a coordinator reads an adapter before it says that it cannot: a mount may hang for ever. With
/// what follows it is less than the two minutes that the CLI waits.
const READ_PATIENCE: Duration = Duration::from_secs(45);

/// Adapters that one coordinator reads at once, with those that hang: each costs a disk as much as it has,
/// whether its client has hung up or not.
const READ_AT_ONCE: usize = 4;

/// The places of a coordinator's readers, and what of the hub they fetch.
#[derive(Debug)]
pub(super) struct Readers {
    places: Semaphore,
    /// As `org/name@revision`; at most two for each place.
    fetched: Mutex<BTreeSet<String>>,
}

/// Somebody who reads an adapter, until it is dropped.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    readers: &'a Readers,
    _place: SemaphorePermit<'a>,
    /// What others are kept from fetching.
    fetches: Vec<String>,
}

impl Readers {
    /// All places are free.
    pub(super) const fn new() -> Self {
        let places = Semaphore::const_new(READ_AT_ONCE);
        Self { places, fetched: Mutex::new(BTreeSet::new()) }
    }

    /// Takes a place to read the adapter. Whoever asks again for what is being fetched gets none: it would
    /// wait there for the first, and keep others from reading theirs.
    pub(super) fn begin(&self, path: &str) -> Result<Reader<'_>, WireError> {
        let mut fetched = self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        let fetches = match of_the_hub(path) {
            Some(name) if fetched.contains(&name) => return Err(is_fetched(&name)),
            name => Vec::from_iter(name),
        };
        let place = self.places.try_acquire().map_err(|_| {
            let words = format!(
                "{READ_AT_ONCE} adapters are being read already; try again, and if it stays so look whether \
                 the disks and mounts of their folders hang"
            );
            WireError::new(ErrorCode::Overloaded, words)
        })?;
        fetched.extend(fetches.iter().cloned());
        Ok(Reader { readers: self, _place: place, fetches })
    }
}

impl Reader<'_> {
    /// What it reads is known by its commit: under that name too nobody else fetches it.
    pub(super) fn is_pinned(&mut self, path: &str) -> Result<(), WireError> {
        let Some(name) = of_the_hub(path).filter(|name| !self.fetches.contains(name)) else {
            return Ok(());
        };
        let mut fetched = self.readers.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        if !fetched.insert(name.clone()) {
            return Err(is_fetched(&name));
        }
        self.fetches.push(name);
        Ok(())
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let mut fetched = self.readers.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        for name in &self.fetches {
            fetched.remove(name);
        }
    }
}

/// One name for all that mean the same revision; nothing for a folder.
fn of_the_hub(path: &str) -> Option<String> {
    let found = name::parse_adapter(path).ok().filter(|_| !path.starts_with('/'))?;
    Some(format!("{}@{}", found.repo, found.revision))
}

fn is_fetched(name: &str) -> WireError {
    let words = format!(
        "{name} is still being fetched at this coordinator, which goes on with it: ask again in a while"
    );
    WireError::new(ErrorCode::Overloaded, words)
}

/// What is read there, unless that takes too long.
pub(super) async fn read_in_time<T>(
    path: &str,
    read: impl Future<Output = T>,
) -> Result<T, WireError> {
    tokio::time::timeout(READ_PATIENCE, read).await.map_err(|_| {
        let seconds = READ_PATIENCE.as_secs();
        let words = match path.starts_with('/') {
            true => format!(
                "reading {path} has taken {seconds} s at this coordinator: is its disk or its mount away?"
            ),
            false => format!(
                "fetching {path} has taken {seconds} s at this coordinator, which goes on with it: ask again \
                 in a while"
            ),
        };
        WireError::new(ErrorCode::DeadlineExceeded, words)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[tokio::test(start_paused = true)]
    async fn a_folder_that_hangs_is_said_by_name() {
        let error =
            read_in_time("/mnt/sql", std::future::pending::<()>()).await.expect_err("too long");
        assert!(error.message.starts_with("reading /mnt/sql has taken 45 s at this coordinator"));
        let error = read_in_time("org/sql", std::future::pending::<()>()).await;
        let words = error.expect_err("too long").message;
        assert!(
            words.starts_with("fetching org/sql has taken 45 s") && words.contains("ask again")
        );
    }

    #[test]
    fn who_asks_again_for_what_is_being_fetched_takes_no_place() {
        let readers = Readers::new();
        let mut first = readers.begin("org/sql").expect("free");
        let pinned = format!("org/sql@{COMMIT}");
        first.is_pinned(&pinned).expect("nobody else has it");
        for again in ["org/sql", "org/sql@main", &pinned] {
            for _ in 0..2 * READ_AT_ONCE {
                let words = readers.begin(again).expect_err("it is being fetched").message;
                assert!(words.contains("is still being fetched at this coordinator"), "{words}");
            }
        }
        // A tag of the same commit is told so as soon as that is known.
        let mut tag = readers.begin("org/sql@v1").expect("another name");
        let error = tag.is_pinned(&pinned).expect_err("it is being fetched");
        assert!(error.message.contains(COMMIT), "{error}");
        drop(tag);
        // What it had not taken is not let go with it.
        readers.begin(&pinned).expect_err("it is being fetched");
        drop(first);
        for path in ["org/sql", &pinned] {
            readers.begin(path).expect("free again").is_pinned(&pinned).expect("free again");
        }
    }

    #[test]
    fn few_read_at_once_and_a_folder_may_be_read_by_all_of_them() {
        let readers = Readers::new();
        let all: Vec<_> = (0..READ_AT_ONCE).map(|_| readers.begin("/mnt/sql")).collect();
        assert!(all.iter().all(Result::is_ok), "{all:?}");
        let error = readers.begin("org/sql").expect_err("all places are taken");
        assert!(error.message.starts_with("4 adapters are being read already"), "{error}");
        drop(all);
        // Who got no place fetches nothing.
        readers.begin("org/sql").expect("free again");
    }
}
