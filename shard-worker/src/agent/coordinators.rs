//! ● One session with each coordinator that is known, and what is known kept for the next start.
//!
//! ```text
//! --join ─► sessions that seek ─┐
//! book ───► session c1, c2, c3 ─┼─► Told ─► agent
//!   ▲  └─► data folder          └─► Welcome, Coordinators ─► book
//!   └──────────────────────────────────────────────────────────┘
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::adapters::HeldAdapters;
use shoal_protocol::control::{COORDINATORS_MAX, CoordinatorAddress, Register, Report};
use shoal_protocol::id::NodeId;
use shoal_protocol::mesh::Fact;
use shoal_protocol::quic::identity::write_secret;
use shoal_protocol::quic::{Endpoint, SharedLease};
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinSet};
use tokio::time::timeout;

use super::book::Book;
use super::fate::Fate;
use super::renewal::Renewal;
use super::session::{Place, Session, Told};
use crate::head::Heads;

/// The file's name in the data folder: a line for each, such as `c1 10.0.0.1:4000`.
pub const FILE_NAME: &str = "coordinators";

/// The longest such file that is read: many times what is written.
const FILE_LEN_MAX: u64 = 16 << 10;

/// How long a coordinator that others do not name may take part: it may have joined just now, and its name
/// be on the way. That takes the log and a message, as a rule some tens of milliseconds.
const NAMED_WITHIN: Duration = Duration::from_secs(3);

/// Resolves when a coordinator is none any more.
pub(super) async fn left(book: &watch::Sender<Book>, node: NodeId) {
    let mut seen = book.subscribe();
    loop {
        // These cannot fail: the sender is here.
        let _ = seen.wait_for(|book| book.is_gone(node) || book.is_stranger(node)).await;
        let judged = seen.wait_for(|book| book.is_gone(node) || !book.is_stranger(node));
        let in_time = timeout(NAMED_WITHIN, judged).await.is_ok();
        let gone = match in_time {
            true => book.borrow().is_gone(node),
            // It is remembered: who dials again gets no such time again.
            false => book.send_if_modified(|book| book.give_up(node)),
        };
        if gone {
            return;
        }
    }
}

/// What all sessions share.
#[derive(Clone, Debug)]
pub(super) struct Coordinators {
    pub endpoint: Endpoint,
    pub register: Arc<Register>,
    /// What to report, to each of them.
    pub reports: watch::Receiver<Report>,
    /// What else to say of this worker, to each of them that understands it.
    pub facts: watch::Receiver<Vec<Fact>>,
    /// Which adapters its shards have, where there should be some.
    pub adapters: watch::Receiver<Vec<HeldAdapters>>,
    /// Who knows what is to be said of blocks that are shared.
    pub heads: Heads,
    /// What they say.
    pub told: mpsc::Sender<Told>,
    pub renewal: Arc<Renewal>,
    /// What flows at this worker: while anything does, they hear of it often.
    pub work: watch::Receiver<usize>,
    /// Renewed by whatever they send.
    pub lease: Arc<SharedLease>,
    /// Who they are.
    pub book: Arc<watch::Sender<Book>>,
    /// Where that is kept.
    pub file: PathBuf,
    /// Where a person said that some are.
    pub seeds: Arc<[String]>,
    /// What they think of this worker.
    pub fate: Fate,
}

impl Coordinators {
    /// Holds a session with each of them, until it is dropped.
    pub async fn run(self, seeds: Vec<SocketAddr>) {
        let mut sessions = JoinSet::new();
        let mut running: HashMap<Id, NodeId> = HashMap::new();
        let mut book = self.book.subscribe();
        // Written once at the start too: then a folder that cannot be written is known early.
        let mut kept = BTreeMap::new();
        for seed in seeds {
            sessions.spawn(Session::new(self.clone(), Place::Seed(seed)).run());
        }
        loop {
            let known = book.borrow_and_update().known().clone();
            for node in known.keys() {
                if running.values().all(|other| other != node) {
                    let session = Session::new(self.clone(), Place::Node(*node));
                    running.insert(sessions.spawn(session.run()).id(), *node);
                }
            }
            if known != kept {
                self.keep(&known).await;
                kept = known;
            }
            tokio::select! {
                changed = book.changed() => if changed.is_err() { return },
                Some(done) = sessions.join_next_with_id() => {
                    let id = match done {
                        Ok((id, ())) => id,
                        Err(error) => {
                            tracing::error!("a session with a coordinator panicked: {error}");
                            error.id()
                        }
                    };
                    if let Some(node) = running.remove(&id) {
                        tracing::info!("no session with {node} any more");
                    }
                }
            }
        }
    }

    async fn keep(&self, known: &BTreeMap<NodeId, SocketAddr>) {
        let text: String = known.iter().map(|(node, at)| format!("{node} {at}\n")).collect();
        let file = self.file.clone();
        let written =
            tokio::task::spawn_blocking(move || write_secret(&file, text.as_bytes())).await;
        if let Ok(Err(error)) = written {
            let file = self.file.display();
            tracing::warn!("who the coordinators are cannot be kept in {file}: {error}");
        }
    }
}

/// What was kept; nothing where the file is missing. A line that cannot be read costs nothing but
/// itself: whoever is left, or was given with `--join`, says who the others are.
pub fn read_kept(path: &Path) -> Vec<CoordinatorAddress> {
    let text = match read_bounded(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!("{} cannot be read: {error}; it is made anew", path.display());
            return Vec::new();
        }
    };
    let mut kept = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        match parse(line) {
            Some(one) if kept.len() < COORDINATORS_MAX => kept.push(one),
            Some(_) => {}
            None => tracing::warn!("{}: `{line}` names no coordinator", path.display()),
        }
    }
    kept
}

fn read_bounded(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(line: &str) -> Option<CoordinatorAddress> {
    let (node, cluster) = line.trim().split_once(' ')?;
    let one = CoordinatorAddress { node: node.parse().ok()?, cluster: cluster.parse().ok()? };
    (CoordinatorAddress::check(&[one]).is_ok() && one.is_reachable()).then_some(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_costs_no_more_than_its_damaged_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        assert_eq!(read_kept(&path), [], "there is none yet");
        let text = b"c1 10.0.0.1:4000\nw2 10.0.0.2:4000\nc2\nc3 0.0.0.0:1\n\xff\xfe\n\nc4 [::1]:4";
        std::fs::write(&path, text).unwrap();
        let named = |number, at: &str| CoordinatorAddress {
            node: NodeId::coordinator(number),
            cluster: at.parse().unwrap(),
        };
        assert_eq!(read_kept(&path), [named(1, "10.0.0.1:4000"), named(4, "[::1]:4")]);
        std::fs::write(&path, "c1 10.0.0.1:4000\n".repeat(100)).unwrap();
        assert_eq!(read_kept(&path).len(), COORDINATORS_MAX);
        assert_eq!(read_kept(folder.path()), [], "a folder is no file");
    }
}
