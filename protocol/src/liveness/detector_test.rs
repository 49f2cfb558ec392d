//! Traces of machines, made from seeds: how soon a stopped peer is noticed, and how often one that
//! only stalls is given up. `SHOAL_SEEDS=1000 cargo test -p shoal-protocol liveness -- --nocapture`
//! prints the figures of as many.

use super::super::beat::{BEAT_BUSY, BEAT_IDLE, Pacer};
use super::super::experience::Experience;
use super::*;

const MS: u64 = 1000;

fn ms(ms: u64) -> Instant {
    Instant(ms * MS)
}

fn dur(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// xorshift64*: enough for traces.
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn exp(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// What a machine's scheduler does to a process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    /// Nothing else runs.
    Quiet,
    /// A virtual machine that is held up for 3 to 8 ms, twice a second.
    Vm,
    /// Both cores compile: a stall every 25 ms, most of a few milliseconds, one in 30 with a heavy
    /// tail (Pareto from 10 ms, alpha 2.5, at most 400 ms).
    Compile,
    /// As `Quiet`, but everything takes ten times as long: 3 ms of work before each beat.
    TenTimesSlower,
}

impl Load {
    /// Microseconds of running, then of a stall.
    fn next(self, dice: &mut Dice) -> (u64, u64) {
        let (run, stall) = match self {
            Load::Quiet => (10_000.0, dice.exp(0.05)),
            Load::Vm => (dice.exp(500.0), 3.0 + 5.0 * dice.unit()),
            Load::Compile if dice.unit() < 1.0 / 30.0 => {
                let tail = 10.0 * (1.0 - dice.unit()).powf(-1.0 / 2.5);
                (dice.exp(25.0), tail.min(400.0))
            }
            Load::Compile => (dice.exp(25.0), dice.exp(3.0)),
            Load::TenTimesSlower => (dice.exp(7.0), 3.0),
        };
        ((run * 1000.0) as u64 + 1, (stall * 1000.0) as u64)
    }
}

/// A process on such a machine. Asked in the order of time.
struct Process {
    load: Load,
    dice: Dice,
    /// The stall that is next or now.
    stall: (u64, u64),
}

impl Process {
    fn new(load: Load, seed: u64) -> Self {
        let mut process = Self { load, dice: Dice(seed | 1), stall: (0, 0) };
        process.dice.unit();
        process.advance();
        process
    }

    fn advance(&mut self) {
        let (run, stall) = self.load.next(&mut self.dice);
        let begin = self.stall.1 + run;
        self.stall = (begin, begin + stall);
    }

    /// When something that is due at `at` really happens.
    fn wake(&mut self, at: u64) -> u64 {
        while self.stall.1 <= at {
            self.advance();
        }
        if at < self.stall.0 { at } else { self.stall.1 }
    }
}

/// What happens to the peer at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// SIGSTOP, or a black-holed link: nothing comes any more.
    Silence,
    /// kill -9: nothing comes, and its host refuses what is sent there.
    Killed,
}

#[derive(Debug, Default)]
struct Outcome {
    suspect: Option<u64>,
    /// After the fault.
    dead: Option<u64>,
    /// Deaths before or without a fault.
    evictions: u32,
    suspicions: u32,
}

struct Trace {
    load: Load,
    fault: Fault,
    fault_at: u64,
    end: u64,
    /// One of so many packets is lost.
    loss: Option<f64>,
    /// For how long both processes have looked at other, idle links before.
    before: u64,
}

/// Looks at idle links in a second: those of a worker at three coordinators, and of its neighbours.
const IDLE_LOOKS: u64 = 40;

/// What a process learns of itself before the link is made; both go on from there.
fn learn(process: &mut Process, before: u64) -> Experience {
    let mut experience = Experience::default();
    for look in 0..before * IDLE_LOOKS / (1000 * MS) {
        let due = look * 1000 * MS / IDLE_LOOKS;
        let woken = process.wake(due);
        let late = woken - due;
        let late = Duration::from_micros(if late > 2000 { late } else { 0 });
        experience.note(Instant(woken), late);
    }
    experience
}

/// One busy link, from the handshake to `end`.
fn run(trace: &Trace, seed: u64) -> Outcome {
    let mut peer = Process::new(trace.load, seed * 2 + 1);
    let mut us = Process::new(trace.load, seed * 7 + 1_000_003);
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut experiences = [learn(&mut peer, trace.before), learn(&mut us, trace.before)];
    let start = Instant(trace.before);
    let [theirs, ours] = experiences.each_mut().map(|experience| experience.known(start));
    let (mut pacer, mut lateness) = (Pacer::new(start), Worst::default());
    lateness.note(start, theirs.worst);
    // What a peer announces that does not know itself.
    let announced = if theirs.enough { Duration::ZERO } else { dur(40) };
    pacer.set_busy(true);
    let mut detector = Detector::new(start);
    detector.learn(ours);
    let mut outcome = Outcome::default();
    let mut beats = 0;
    let (mut beat, mut now) = (next_beat(&mut peer, &mut pacer, &mut lateness), trace.before);
    let gone = |at: u64| trace.fault != Fault::None && at >= trace.fault_at;
    while now < trace.end {
        let due = detector.next_look().0;
        let before = detector.verdict();
        if due <= beat.0 {
            now = us.wake(due).max(now);
            detector.look(Instant(now));
            if detector.verdict() >= Verdict::Late && trace.fault == Fault::Killed && gone(now) {
                detector.refused();
            }
        } else {
            let (sent, mut said) = beat;
            beats += 1;
            if beats < 1000 {
                said.lateness = said.lateness.max(announced);
            }
            beat = next_beat(&mut peer, &mut pacer, &mut lateness);
            let lost = trace.loss.is_some_and(|one| dice.unit() < one);
            if gone(sent) || lost {
                continue;
            }
            now = us.wake(sent + 100).max(now);
            // A timer that is due fires before what lies in the socket is looked at.
            if detector.next_look().0 <= now {
                detector.look(Instant(now));
            }
            if detector.verdict() != Verdict::Dead {
                detector.heard(Instant(now), Some(said));
            }
        }
        let verdict = detector.verdict();
        if verdict >= Verdict::Suspect && before < Verdict::Suspect {
            outcome.suspicions += 1;
            if gone(now) {
                outcome.suspect.get_or_insert(now - trace.fault_at);
            }
        }
        if verdict == Verdict::Dead {
            if gone(now) {
                outcome.dead = Some(now - trace.fault_at);
                return outcome;
            }
            outcome.evictions += 1;
            detector = Detector::new(Instant(now));
            detector.learn(ours);
        }
    }
    outcome
}

fn next_beat(peer: &mut Process, pacer: &mut Pacer, lateness: &mut Worst) -> (u64, Beat) {
    let due = pacer.due().0;
    let at = peer.wake(due);
    lateness.note(Instant(at), if due > 0 { Duration::from_micros(at - due) } else { dur(0) });
    (at, pacer.beat(Instant(at), lateness.get()))
}

fn seeds(few: u64) -> u64 {
    std::env::var("SHOAL_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(few)
}

/// (median, p99, worst) in milliseconds.
fn spread(mut times: Vec<u64>) -> (f64, f64, f64) {
    times.sort_unstable();
    let at = |q: f64| times[((times.len() - 1) as f64 * q).round() as usize] as f64 / 1000.0;
    (at(0.5), at(0.99), at(1.0))
}

fn detection(load: Load, fault: Fault) -> (f64, f64, f64) {
    let times = (0..seeds(200)).map(|seed| {
        // The fault falls anywhere between two beats.
        let fault_at = 90_000 * MS + seed * 1237 % 10_000;
        let trace = Trace { load, fault, fault_at, end: 100_000 * MS, loss: None, before: 0 };
        run(&trace, seed).dead.expect("it is noticed")
    });
    let spread = spread(times.collect());
    println!(
        "{load:?}, {fault:?}: dead after {:.1} / {:.1} / {:.1} ms",
        spread.0, spread.1, spread.2
    );
    spread
}

#[test]
fn a_frozen_peer_is_dead_within_fifty_milliseconds() {
    for load in [Load::Quiet, Load::Vm] {
        let (median, p99, _) = detection(load, Fault::Silence);
        assert!(median <= 50.0, "{load:?}: {median} ms");
        assert!(p99 <= 70.0, "{load:?}: {p99} ms");
    }
    let (_, _, worst) = detection(Load::Compile, Fault::Silence);
    assert!(worst <= 1500.0, "also under load it is bounded: {worst} ms");
}

#[test]
fn a_killed_peer_whose_host_says_so_is_dead_sooner_and_under_load_too() {
    for load in [Load::Quiet, Load::Vm] {
        let (median, ..) = detection(load, Fault::Killed);
        assert!(median <= 20.0, "{load:?}: {median} ms");
    }
    let (median, ..) = detection(Load::Compile, Fault::Killed);
    assert!(median <= 150.0, "{median} ms");
}

#[test]
fn nobody_is_given_up_in_ten_minutes_of_stalls() {
    for load in [Load::Quiet, Load::Vm, Load::Compile, Load::TenTimesSlower] {
        let seeds = seeds(10);
        let (mut evictions, mut suspicions) = (0, 0);
        for seed in 0..seeds {
            let (fault, end) = (Fault::None, 600_000 * MS);
            let outcome =
                run(&Trace { load, fault, fault_at: 0, end, loss: None, before: 0 }, seed);
            evictions += outcome.evictions;
            suspicions += outcome.suspicions;
        }
        println!(
            "{load:?}: {seeds} runs of 10 min: {evictions} evictions, {suspicions} suspicions"
        );
        assert_eq!(evictions, 0, "{load:?}: {evictions} in {seeds} runs");
    }
}

/// The first ten busy seconds of a link between two processes that have been there for a minute.
#[test]
fn a_new_link_of_old_processes_knows_its_machines() {
    let before = 60_000 * MS;
    for load in [Load::Quiet, Load::Vm, Load::Compile] {
        let (mut times, mut evictions) = (Vec::new(), 0);
        for seed in 0..seeds(200) {
            let fault_at = before + 3000 * MS + seed * 1237 % 10_000;
            let (fault, end) = (Fault::Silence, fault_at + 10_000 * MS);
            let outcome = run(&Trace { load, fault, fault_at, end, loss: None, before }, seed);
            times.push(outcome.dead.expect("it is noticed"));
            let (fault, end) = (Fault::None, before + 12_000 * MS);
            let outcome = run(&Trace { load, fault, fault_at: 0, end, loss: None, before }, seed);
            evictions += outcome.evictions;
        }
        let runs = times.len();
        let (median, p99, worst) = spread(times);
        println!(
            "{load:?}, new link: dead after {median:.1} / {p99:.1} / {worst:.1} ms; {evictions} \
             evictions in the first 12 s of {runs}"
        );
        assert!(load == Load::Compile || median <= 50.0, "{load:?}: {median} ms");
        assert_eq!(evictions, 0, "{load:?}");
    }
}

#[test]
fn lost_beats_are_no_death() {
    for loss in [0.01, 0.05] {
        let (load, end) = (Load::Vm, 600_000 * MS);
        let trace =
            Trace { load, fault: Fault::None, fault_at: 0, end, loss: Some(loss), before: 0 };
        let evictions: u32 = (0..5).map(|seed| run(&trace, seed).evictions).sum();
        assert_eq!(evictions, 0, "with a loss of {loss}");
    }
}

#[test]
fn the_bounds_are_those_of_the_table() {
    for (interval, jitter, late, suspect, dead) in [
        (10, 0, 15, 25, 45),
        (10, 5, 15, 25, 45),
        (10, 8, 18, 26, 45),
        (10, 20, 30, 50, 120),
        (10, 60, 70, 130, 640),
        (10, 91, 101, 192, 1200),
        (200, 8, 300, 500, 900),
        (10, 60_000, 1200, 1200, 1200),
    ] {
        let found = bounds(dur(interval), dur(jitter));
        let expected = Bounds { late: dur(late), suspect: dur(suspect), dead: dur(dead) };
        assert_eq!(found, expected, "I = {interval} ms, J = {jitter} ms");
    }
}

/// A quiet link of which twelve seconds have been seen.
fn known() -> (Detector, u64) {
    let mut detector = Detector::new(ms(0));
    let beat = Beat { interval: BEAT_BUSY, lateness: dur(0), working: true };
    let mut now = 0;
    while now <= 12_000 {
        detector.heard(ms(now), Some(beat));
        now += 10;
    }
    (detector, now - 10)
}

#[test]
fn our_own_stall_is_not_the_peers() {
    let (mut detector, now) = known();
    detector.look(ms(now + 10));
    assert_eq!(detector.look(ms(now + 10 + 900)), Verdict::Alive, "we slept for 0.9 s");
    assert_eq!(detector.silence(), dur(15), "of which it was silent for what was to be slept");
    assert_eq!(detector.own_lateness(), dur(895));
}

#[test]
fn silence_becomes_worse_by_steps_and_a_word_ends_it() {
    let (mut detector, last) = known();
    let mut said = vec![];
    while detector.verdict() < Verdict::Suspect {
        let at = detector.next_look();
        if detector.look(at) != Verdict::Alive {
            said.push((at.since(ms(last)), detector.verdict()));
        }
    }
    said.dedup_by_key(|(_, verdict)| *verdict);
    assert_eq!(said, [(dur(15), Verdict::Late), (dur(25), Verdict::Suspect)]);
    detector.heard(ms(last + 26), None);
    assert_eq!(detector.verdict(), Verdict::Alive);
    assert_eq!(detector.jitter(), dur(16), "it is remembered");
}

#[test]
fn a_refusal_alone_kills_nobody() {
    let (mut detector, last) = known();
    detector.refused();
    assert_eq!(detector.verdict(), Verdict::Alive);
    detector.heard(ms(last + 10), None);
    while detector.verdict() == Verdict::Alive {
        detector.look(detector.next_look());
    }
    assert_eq!(detector.verdict(), Verdict::Late, "the refusal was taken back");
    detector.refused();
    assert_eq!(detector.verdict(), Verdict::Dead);
    detector.heard(ms(last + 30), None);
    assert_eq!(detector.verdict(), Verdict::Dead, "what is dead stays so");
}

#[test]
fn an_idle_peer_is_given_its_announced_time() {
    let (mut detector, last) = known();
    detector
        .heard(ms(last + 10), Some(Beat { interval: BEAT_IDLE, lateness: dur(0), working: true }));
    let mut at = ms(last + 10);
    while detector.verdict() < Verdict::Dead {
        at = detector.next_look();
        detector.look(at);
    }
    assert_eq!(at.since(ms(last + 10)), dur(900));
}
