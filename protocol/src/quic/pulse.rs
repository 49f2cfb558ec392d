//! ● The pulse of a connection: beats go out and come in, and whoever falls silent is noticed.
//!
//! ```text
//!   frames of the streams ── sent(), heard() ──┐
//!   datagrams: Beat ◄──────────────────────────┤ Pacer, Detector (○) ─► Silence
//!   a port that refuses: nobody listens there ─┘
//! ```
//!
//! Beats are datagrams, so that they neither wait behind a large frame nor are sent again when they
//! are lost. Whatever else arrives counts as one, down to a bare acknowledgement: a process that is
//! killed or frozen acknowledges nothing. A peer without beats is still heard by its keep-alives.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::connection::Connection;
use crate::liveness::{Beat, Bounds, Detector, Experience, Known, Lease, Pacer, Verdict};
use crate::units::Instant;

/// How soon a late peer's port is asked again: a round trip in a LAN, and a wake.
const ASK_AGAIN: Duration = Duration::from_millis(3);

/// Beats announce the sender's lateness in steps of so much, so that most of them are the same bytes.
const LATENESS_STEP: Duration = Duration::from_millis(5);

/// What this process has seen of its own timers, at all of its links: a fact of the process, and so
/// one for all of them.
static MACHINE: LazyLock<Machine> =
    LazyLock::new(|| Machine { origin: std::time::Instant::now(), experience: Mutex::default() });

struct Machine {
    origin: std::time::Instant,
    experience: Mutex<Experience>,
}

impl Machine {
    fn learn(&self, stall: Duration) -> Known {
        let mut experience = self.experience.lock().unwrap_or_else(PoisonError::into_inner);
        let now = since(self.origin);
        experience.note(now, stall);
        experience.known(now)
    }
}

/// One observer of one peer, and our own beats to it. Shared by those who send and receive frames.
#[derive(Debug)]
pub struct Pulse {
    origin: std::time::Instant,
    /// Held for microseconds, by the threads of one connection.
    state: Mutex<State>,
    suspicions: AtomicU64,
    /// Renewed by everything that is heard.
    lease: Option<Arc<SharedLease>>,
    /// Counts peers that become suspects, and suspects that are heard again.
    changes: Option<Arc<watch::Sender<u64>>>,
}

#[derive(Debug)]
struct State {
    detector: Detector,
    pacer: Pacer,
    /// The bytes of the last beat, which are those of the next one as long as nothing changes.
    last: Option<(Beat, Bytes)>,
}

/// How a peer was lost that said nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its host says that nobody listens there any more: the process is gone.
    Killed,
    /// Nothing comes any more: it is frozen, or its machine or the way to it is gone.
    Silent,
}

/// A peer that is given up, with the figures for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// How it was lost.
    pub loss: Loss,
    /// How long it has been silent.
    pub lasted: Duration,
    /// When it was to be heard.
    pub interval: Duration,
    /// The worst that was usual beyond that.
    pub jitter: Duration,
}

impl std::fmt::Display for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { loss, lasted, interval, jitter } = self;
        match loss {
            Loss::Killed => write!(f, "its process is gone: nobody listens at its address")?,
            Loss::Silent => f.write_str(crate::lost::SILENT)?,
        }
        write!(
            f,
            "; silent for {lasted:.0?}, beats come every {interval:?}, up to {jitter:.0?} late"
        )
    }
}

/// A worker's lease, renewed by whatever its coordinators send.
#[derive(Debug)]
pub struct SharedLease {
    origin: std::time::Instant,
    lease: Mutex<Lease>,
}

impl Default for SharedLease {
    fn default() -> Self {
        Self { origin: std::time::Instant::now(), lease: Mutex::default() }
    }
}

impl SharedLease {
    /// A coordinator was heard.
    pub fn renew(&self) {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).renew(since(self.origin));
    }

    /// Whether new work may be taken.
    pub fn holds(&self) -> bool {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).holds(since(self.origin))
    }
}

impl Default for Pulse {
    /// For a connection that has just been made.
    fn default() -> Self {
        let state = State {
            detector: Detector::new(Instant(0)),
            pacer: Pacer::new(Instant(0)),
            last: None,
        };
        Self {
            origin: std::time::Instant::now(),
            state: Mutex::new(state),
            suspicions: AtomicU64::new(0),
            lease: None,
            changes: None,
        }
    }
}

impl Pulse {
    /// A coordinator's, which renews this lease.
    #[must_use]
    pub fn renewing(mut self, lease: Arc<SharedLease>) -> Self {
        lease.renew();
        self.lease = Some(lease);
        self
    }

    /// One whose suspicions are somebody's to report at once.
    #[must_use]
    pub fn telling(mut self, changes: Arc<watch::Sender<u64>>) -> Self {
        self.changes = Some(changes);
        self
    }

    /// A frame has come from the peer.
    pub fn heard(&self) {
        self.note(&mut self.lock(), None);
    }

    fn note(&self, state: &mut State, beat: Option<Beat>) {
        let suspect = state.detector.verdict() == Verdict::Suspect;
        state.detector.heard(self.now(), beat);
        let known = MACHINE.learn(state.detector.last_stall());
        state.detector.learn(known);
        if let Some(beat) = beat {
            state.pacer.peer_is_working(beat.working);
        }
        if let Some(lease) = &self.lease {
            lease.renew();
        }
        if suspect {
            self.tell();
        }
    }

    fn tell(&self) {
        if let Some(changes) = &self.changes {
            changes.send_modify(|n| *n += 1);
        }
    }

    /// A frame has gone to the peer.
    pub fn sent(&self) {
        self.lock().pacer.sent(self.now());
    }

    /// What is thought of the peer.
    pub fn verdict(&self) -> Verdict {
        self.lock().detector.verdict()
    }

    /// How long ago it was heard.
    pub fn silent_for(&self) -> Duration {
        self.lock().detector.silent_for(self.now())
    }

    /// The bounds that hold for it now.
    pub fn bounds(&self) -> Bounds {
        self.lock().detector.bounds()
    }

    /// How often it was a suspect. All but the last time it was only slow.
    pub fn suspicions(&self) -> u64 {
        self.suspicions.load(Ordering::Relaxed)
    }

    /// `keep` for the end of a connection at which no work flows: it beats as often as the peer does.
    pub async fn follow(&self, connection: &Connection) -> Silence {
        self.keep(connection, watch::channel(0).1).await
    }

    /// Beats and listens until the peer is dead. `work` counts what flows at this end. A connection
    /// that ends otherwise is others' to notice: then this waits for ever.
    pub async fn keep(&self, connection: &Connection, mut work: watch::Receiver<usize>) -> Silence {
        let mut asked = None;
        let mut arrivals = connection.stats().received_frames;
        let mut work_known = true;
        let busy = *work.borrow_and_update() > 0;
        self.lock().pacer.set_busy(busy);
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        loop {
            tokio::select! {
                message = connection.read_datagram() => match message {
                    Ok(message) => self.note(&mut self.lock(), Beat::decode(&message)),
                    Err(_) => return std::future::pending().await,
                },
                changed = work.changed(), if work_known => {
                    work_known = changed.is_ok();
                    let busy = work_known && *work.borrow_and_update() > 0;
                    self.lock().pacer.set_busy(busy);
                }
                () = &mut timer => {
                    if let Some(silence) = self.look(connection, &mut arrivals, &mut asked) {
                        return silence;
                    }
                }
            }
            self.beat(connection);
            let at = self.wake_at(asked.is_some());
            // Most of what arrives moves the deadline; the timer is told when it fires.
            if at < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(at);
            }
        }
    }

    /// Looks at the peer, where it is time to; asks its port where it is late.
    fn look(
        &self,
        connection: &Connection,
        arrivals: &mut u64,
        asked: &mut Option<Port>,
    ) -> Option<Silence> {
        // At each look, so that what is new is new since the last one.
        let frames = connection.stats().received_frames;
        let more = std::mem::replace(arrivals, frames) != frames;
        let mut state = self.lock();
        let now = self.now();
        if now < state.detector.next_look() && asked.is_none() {
            return None;
        }
        // Something else than frames and beats has come: a part of a large one, or an acknowledgement.
        // Who is not late needs no such excuse, and it would make the silence look shorter.
        if more && state.detector.is_late_at(now) {
            *asked = None;
            self.note(&mut state, None);
            return None;
        }
        let before = state.detector.verdict();
        let found = state.detector.look(now);
        let known = MACHINE.learn(state.detector.last_stall());
        state.detector.learn(known);
        if found == Verdict::Alive {
            *asked = None;
            return None;
        }
        if asked.is_none() {
            *asked = Port::of(connection.remote_address());
        }
        if asked.as_ref().is_some_and(Port::refuses) {
            state.detector.refused();
        }
        let verdict = state.detector.verdict();
        if verdict >= Verdict::Suspect && before < Verdict::Suspect {
            self.suspicions.fetch_add(1, Ordering::Relaxed);
            self.tell();
        }
        (verdict == Verdict::Dead).then(|| Silence {
            loss: if state.detector.is_refused() { Loss::Killed } else { Loss::Silent },
            lasted: state.detector.silence(),
            interval: state.detector.interval(),
            jitter: state.detector.jitter(),
        })
    }

    /// Sends a beat, where one is due.
    fn beat(&self, connection: &Connection) {
        let mut state = self.lock();
        let now = self.now();
        if now < state.pacer.due() {
            return;
        }
        let worst = state.detector.own_lateness().as_micros();
        let steps = u32::try_from(worst / LATENESS_STEP.as_micros()).unwrap_or(u32::MAX);
        let lateness = LATENESS_STEP.saturating_mul(steps);
        let beat = state.pacer.beat(now, lateness);
        let bytes = match &state.last {
            Some((last, bytes)) if *last == beat => bytes.clone(),
            _ => {
                let bytes = Bytes::copy_from_slice(&beat.encode());
                state.last = Some((beat, bytes.clone()));
                bytes
            }
        };
        drop(state);
        // A peer that takes none hears our keep-alives; a connection that is gone is others' to notice.
        let _ = connection.send_datagram(bytes);
    }

    fn wake_at(&self, asking: bool) -> tokio::time::Instant {
        let state = self.lock();
        let mut at = state.detector.next_look().min(state.pacer.due());
        if asking {
            at = at.min(self.now() + ASK_AGAIN);
        }
        (self.origin + Duration::from_micros(at.0)).into()
    }

    fn now(&self) -> Instant {
        since(self.origin)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves plain data, each field of which is valid by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn since(origin: std::time::Instant) -> Instant {
    Instant(origin.elapsed().as_micros() as u64)
}

/// A peer's port, asked from a socket that only it may answer: the kernel passes on what the peer's
/// host says of a closed port, which it does not for an endpoint's own socket, as that one has many
/// peers.
#[derive(Debug)]
struct Port(UdpSocket);

impl Port {
    fn of(peer: SocketAddr) -> Option<Self> {
        let any: SocketAddr = match peer {
            SocketAddr::V4(_) => ([0; 4], 0).into(),
            SocketAddr::V6(_) => ([0; 16], 0).into(),
        };
        let socket = UdpSocket::bind(any).ok()?;
        socket.set_nonblocking(true).ok()?;
        socket.connect(peer).ok()?;
        Some(Self(socket))
    }

    /// Sends a byte, which no endpoint answers, and says whether one before it or this one has been
    /// refused. On the same host the answer is there at once.
    fn refuses(&self) -> bool {
        let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        self.0.send(&[0]).is_err_and(refused) || self.0.recv(&mut [0; 8]).is_err_and(refused)
    }
}
