//! ● What coordinators think of this worker, as its sessions with them hear it: it may have been removed, or
//! none of those that it knows may have to do with it any more. Either is the end of it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shoal_protocol::id::NodeId;
use shoal_protocol::outcast::{Outcast, Verdict};
use shoal_protocol::quic::renew::RenewError;
use shoal_protocol::units;
use tokio::sync::watch;

use super::book::Book;

/// How long a worker that nobody wants may take to end: as long as one that is told to stop. What it reads may hang.
pub(super) const END_WITHIN: Duration = Duration::from_secs(8);

/// Waits for the words of the end.
pub(super) async fn said(fate: &mut watch::Receiver<Option<String>>) -> String {
    loop {
        let why = fate.borrow_and_update().clone();
        match why {
            Some(why) => return why,
            // The sessions have ended, and with them whoever could say it.
            None if fate.changed().await.is_err() => return std::future::pending().await,
            None => {}
        }
    }
}

/// Shared by the sessions.
#[derive(Clone, Debug)]
pub(super) struct Fate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    me: NodeId,
    began: Instant,
    outcast: Mutex<Outcast>,
    end: watch::Sender<Option<String>>,
}

impl Fate {
    pub fn of(me: NodeId) -> Self {
        let (outcast, end) = (Mutex::default(), watch::Sender::new(None));
        Self(Arc::new(Shared { me, began: Instant::now(), outcast, end }))
    }

    /// Why this worker must end, as soon as it must.
    pub fn end(&self) -> watch::Receiver<Option<String>> {
        self.0.end.subscribe()
    }

    /// A coordinator has let it in.
    pub fn believed(&self) {
        self.0.outcast.lock().unwrap_or_else(PoisonError::into_inner).believed();
    }

    /// A coordinator says that it was removed.
    pub fn removed(&self, why: String) {
        self.0.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                tracing::error!("{why}");
                *end = Some(why);
            }
            first
        });
    }

    /// A coordinator could not be reached, or said something else.
    pub fn otherwise(&self, who: &str) {
        self.0.outcast.lock().unwrap_or_else(PoisonError::into_inner).otherwise(who);
    }

    /// A coordinator does not renew its certificate. `seeds`: where a person said that there are some.
    pub fn not_renewed(&self, who: &str, error: &RenewError, book: &Book, seeds: &[String]) {
        if let RenewError::Removed(removed) = error {
            return self.removed(removed.message.clone());
        }
        if !error.refuses_the_node() || book.is_welcome() {
            return self.otherwise(who);
        }
        let now = units::Instant::default() + self.0.began.elapsed();
        let (nodes, addresses) = (book.known().keys(), book.known().values());
        let listed: BTreeSet<_> = addresses.map(ToString::to_string).collect();
        let known = nodes.map(ToString::to_string);
        let known = known.chain(seeds.iter().filter(|seed| !listed.contains(*seed)).cloned());
        let mut outcast = self.0.outcast.lock().unwrap_or_else(PoisonError::into_inner);
        outcast.refused(who, &error.to_string(), now);
        let verdict = outcast.look(&self.0.me.to_string(), &known.collect(), now);
        drop(outcast);
        match verdict {
            Verdict::Wait => {}
            Verdict::Say(words) => tracing::warn!("{words}"),
            Verdict::End(words) => {
                self.0.end.send_replace(Some(words));
            }
        }
    }
}
