//! What a beat says, and when the next one is due.

use std::time::Duration;

use crate::units::Instant;

/// How often a peer is heard while work flows: three missed ones and some slack are 50 ms.
pub const BEAT_BUSY: Duration = Duration::from_millis(10);

/// How often a peer is heard while nothing waits for it.
pub const BEAT_IDLE: Duration = Duration::from_millis(200);

/// A link stays at `BEAT_BUSY` for so many beats after the last work: the next request of a
/// conversation often follows within a second.
const LINGER_BEATS: u32 = 100;

/// How many of those say already that the next ones will come seldom. Beats may be lost, and an
/// observer that has missed the announcement would take the pause for a death. So many lost ones in a
/// row are a death.
const SLOWING_BEATS: u32 = 10;

/// Bytes of a beat.
pub const BEAT_LEN: usize = 8;

/// The first byte of a beat: what other small messages may follow later must differ in it.
const BEAT_TAG: u8 = 1;

/// One beat: a promise when the next one comes, and how far the sender's machine can be trusted to
/// keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The next one follows within so long.
    pub interval: Duration,
    /// How late the sender's own timers were at worst of late.
    pub lateness: Duration,
    /// Whether work flows at the sender's end: then the other end beats as often.
    pub working: bool,
}

impl Beat {
    /// The bytes: tag, working, interval and lateness in milliseconds (u16, little-endian), 0, 0.
    pub fn encode(&self) -> [u8; BEAT_LEN] {
        let ms = |d: Duration| u16::try_from(d.as_millis()).unwrap_or(u16::MAX).to_le_bytes();
        let ([i0, i1], [l0, l1]) = (ms(self.interval), ms(self.lateness));
        [BEAT_TAG, u8::from(self.working), i0, i1, l0, l1, 0, 0]
    }

    /// Reads the bytes; `None` where they are something else. A peer that promises more than ten
    /// beats a `BEAT_BUSY`, or fewer than one in two `BEAT_IDLE`, promises nothing of use.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let &[BEAT_TAG, working @ (0 | 1), i0, i1, l0, l1, 0, 0] = bytes else { return None };
        let ms = |low, high| Duration::from_millis(u64::from(u16::from_le_bytes([low, high])));
        let interval = ms(i0, i1);
        let lateness = ms(l0, l1);
        (BEAT_BUSY / 10..=BEAT_IDLE * 2).contains(&interval).then_some(Self {
            interval,
            lateness,
            working: working == 1,
        })
    }
}

/// When to send beats. Whatever else is sent counts as one.
#[derive(Debug)]
pub struct Pacer {
    /// Work flows at this end.
    ours: bool,
    /// The peer says that work flows at its end.
    theirs: bool,
    /// Beats left until the link is idle; `LINGER_BEATS` while it is busy.
    linger: u32,
    /// When the peer heard of us last.
    sent: Instant,
    /// The first beat, or one that says that they come often now, is due at once.
    at_once: bool,
}

impl Pacer {
    /// An idle link whose first beat is due.
    pub fn new(now: Instant) -> Self {
        Self { ours: false, theirs: false, linger: 0, sent: now, at_once: true }
    }

    /// Work begins or ends to flow at this end.
    pub fn set_busy(&mut self, busy: bool) {
        // The peer is to beat as often: it is told at once, whatever it was told before.
        self.at_once |= busy && !self.ours;
        self.ours = busy;
        self.quicken();
    }

    /// What the peer says of its end.
    pub fn peer_is_working(&mut self, working: bool) {
        self.theirs = working;
        self.quicken();
    }

    fn quicken(&mut self) {
        if self.ours || self.theirs {
            self.at_once |= self.linger <= SLOWING_BEATS;
            self.linger = LINGER_BEATS;
        }
    }

    /// A frame was sent at `at`: the peer has heard of us.
    pub fn sent(&mut self, at: Instant) {
        // What the last beats announce must be said by beats.
        if self.linger > SLOWING_BEATS && at > self.sent {
            self.sent = at;
        }
    }

    /// When the next beat is due.
    pub fn due(&self) -> Instant {
        if self.at_once { Instant(0) } else { self.sent + self.pace() }
    }

    /// The beat that is sent now.
    pub fn beat(&mut self, now: Instant, lateness: Duration) -> Beat {
        self.at_once = false;
        self.sent = now;
        if !self.ours && !self.theirs {
            self.linger = self.linger.saturating_sub(1);
        }
        let slowing = self.linger <= SLOWING_BEATS;
        let interval = if slowing { BEAT_IDLE } else { BEAT_BUSY };
        Beat { interval, lateness, working: self.ours }
    }

    fn pace(&self) -> Duration {
        if self.linger > 0 { BEAT_BUSY } else { BEAT_IDLE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Instant {
        Instant(ms * 1000)
    }

    #[test]
    fn a_beat_survives_the_wire_and_nonsense_does_not() {
        let beat = Beat { interval: BEAT_IDLE, lateness: Duration::from_millis(7), working: true };
        assert_eq!(Beat::decode(&beat.encode()), Some(beat));
        for nonsense in
            [&[][..], &[2; 8], &[1; 8], &[1, 0, 0, 0, 0, 0, 0, 0], &[1, 0, 255, 255, 0, 0, 0, 0]]
        {
            assert_eq!(Beat::decode(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn frames_count_as_beats_while_work_flows() {
        let mut pacer = Pacer::new(ms(0));
        pacer.set_busy(true);
        assert_eq!(pacer.due(), ms(0), "the peer is told at once");
        assert_eq!(pacer.beat(ms(0), Duration::ZERO).interval, BEAT_BUSY);
        assert_eq!(pacer.due(), ms(10));
        pacer.sent(ms(7));
        assert_eq!(pacer.due(), ms(17));
        pacer.sent(ms(3));
        assert_eq!(pacer.due(), ms(17), "an old time does not bring it forward");
    }

    #[test]
    fn the_pace_falls_only_after_many_beats_have_said_so() {
        let mut pacer = Pacer::new(ms(0));
        pacer.set_busy(true);
        pacer.beat(ms(0), Duration::ZERO);
        pacer.set_busy(false);
        let (mut now, mut quick, mut announced) = (ms(0), 0, 0);
        while pacer.due() == now + BEAT_BUSY {
            now = pacer.due();
            quick += 1;
            announced += u32::from(pacer.beat(now, Duration::ZERO).interval == BEAT_IDLE);
            // A frame in between does not replace an announcement.
            if announced > 0 {
                pacer.sent(now + Duration::from_millis(1));
            }
        }
        assert_eq!((quick, announced), (LINGER_BEATS, SLOWING_BEATS + 1));
        assert_eq!(pacer.due(), now + BEAT_IDLE);
        pacer.peer_is_working(true);
        assert_eq!(pacer.due(), ms(0), "the peer is answered at once");
        assert!(!pacer.beat(now, Duration::ZERO).working, "but it is the peer's work");
        assert_eq!(pacer.due(), now + BEAT_BUSY);
        pacer.set_busy(true);
        assert_eq!(pacer.due(), ms(0), "work is announced at once");
        assert!(pacer.beat(now, Duration::ZERO).working);
    }
}
