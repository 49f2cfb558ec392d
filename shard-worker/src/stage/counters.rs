//! What a shard counts: written by its threads, read by reports.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shoal_protocol::control::ShardCounters;
use shoal_protocol::liveness::Verdict;
use shoal_protocol::quic::{Connection, Pulse};

/// The counters of one shard. They are independent of each other: a report may be a step behind in
/// one and not in the other.
#[derive(Debug, Default)]
pub struct Counters {
    steps: AtomicU64,
    rows: AtomicU64,
    compute_us: AtomicU64,
    sent_bytes: AtomicU64,
    sent_frames: AtomicU64,
    send_us: AtomicU64,
    /// The link to the next stage, whose transport counts for itself.
    link: OnceLock<Connection>,
    /// Of all neighbours.
    pulses: OnceLock<Vec<Arc<Pulse>>>,
}

impl Counters {
    /// A step was computed.
    pub fn computed(&self, rows: usize, took: Duration) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
        self.compute_us.fetch_add(micros(took), Ordering::Relaxed);
    }

    /// A frame's body was accepted by the wire, so long after the stage had it ready.
    pub fn sent(&self, bytes: usize, took: Duration) {
        self.sent_frames.fetch_add(1, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.send_us.fetch_add(micros(took), Ordering::Relaxed);
    }

    /// The link to the next stage is up.
    pub fn linked(&self, connection: Connection) {
        // A shard links once in its life; the first of several next ranks stands for all.
        let _ = self.link.set(connection);
    }

    /// The neighbours' pulses.
    pub fn watched(&self, pulses: Vec<Arc<Pulse>>) {
        let _ = self.pulses.set(pulses);
    }

    /// All of them, as they are now.
    pub fn snapshot(&self) -> ShardCounters {
        let link = self.link.get().map(Connection::stats).unwrap_or_default();
        let pulses = self.pulses.get().map_or(&[][..], |pulses| &pulses[..]);
        ShardCounters {
            steps: self.steps.load(Ordering::Relaxed),
            rows: self.rows.load(Ordering::Relaxed),
            compute_us: self.compute_us.load(Ordering::Relaxed),
            sent_bytes: self.sent_bytes.load(Ordering::Relaxed),
            sent_frames: self.sent_frames.load(Ordering::Relaxed),
            send_us: self.send_us.load(Ordering::Relaxed),
            link_rtt_us: micros(link.rtt),
            lost_packets: link.lost_packets,
            suspicions: pulses.iter().map(|pulse| pulse.suspicions()).sum(),
            suspects: pulses.iter().filter(|pulse| pulse.verdict() >= Verdict::Suspect).count()
                as u64,
        }
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().min(u128::from(u64::MAX)) as u64
}
