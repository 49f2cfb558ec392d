//! ○ The scenarios that are reported: four replicas, of which the first turns bad.

use super::{Fault, Scenario, Service};

/// Whole steps cost: a large model on an accelerator, where weights are read once for all rows.
pub const STEPS: Service =
    Service { step: 0.020, row: 0.000_2, prompt_token: 0.000_05, slots: 32, chunk: 512 };

/// Rows cost: a small model on a processor.
pub const ROWS: Service =
    Service { step: 0.002, row: 0.001, prompt_token: 0.000_5, slots: 16, chunk: 64 };

/// A share of both.
pub const MIXED: Service =
    Service { step: 0.008, row: 0.000_5, prompt_token: 0.000_1, slots: 24, chunk: 256 };

/// The services, with names.
pub const SERVICES: [(&str, Service); 3] = [("steps", STEPS), ("mixed", MIXED), ("rows", ROWS)];

/// When the bad replica turns bad where it is not bad from the start, in seconds, and well again.
pub const TURNS: (f64, f64) = (20.0, 50.0);

/// The gray failure of the bounds: one of four is four times slower, 70 % of what three and a
/// quarter carry.
pub fn gray(service: Service, measured: f64) -> Scenario {
    Scenario { name: "gray", slow: vec![4.0, 1.0, 1.0, 1.0], ..healthy(service, measured) }
}

/// Nothing is wrong: the same share of what four carry.
pub fn healthy(service: Service, measured: f64) -> Scenario {
    Scenario {
        name: "healthy",
        service,
        slow: vec![1.0; 4],
        prompt: 200.0,
        answer: 60.0,
        load: 0.7,
        warm_up: 10.0,
        measured,
        faults: Vec::new(),
        patience: None,
        routers: 1,
    }
}

/// One of ten is ten times slower, at 80 %.
pub fn ten(service: Service, measured: f64) -> Scenario {
    let mut slow = vec![1.0; 10];
    slow[0] = 10.0;
    Scenario { name: "ten", slow, load: 0.8, ..healthy(service, measured) }
}

/// As `gray`, over eight routers that do not know of each other.
pub fn routers(service: Service, measured: f64) -> Scenario {
    Scenario { name: "8 routers", routers: 8, ..gray(service, measured) }
}

/// One turns four times slower at 20 s and is well again at 50 s; the load suits three and a quarter.
pub fn turning(service: Service, measured: f64) -> Scenario {
    turn("turns slow", Fault::Slow(4.0), service, measured)
}

/// One fails every request at once, from 20 s to 50 s.
pub fn fail_fast(service: Service, measured: f64) -> Scenario {
    let mut scenario = turn("fail-fast", Fault::FailFast(true), service, measured);
    scenario.faults[1].2 = Fault::FailFast(false);
    scenario
}

/// One takes requests and says nothing, from 20 s to 50 s; half a second of silence is a failure.
pub fn black_hole(service: Service, measured: f64) -> Scenario {
    let scenario = turn("black hole", Fault::Freeze, service, measured);
    Scenario { patience: Some(0.5), ..scenario }
}

fn turn(name: &'static str, fault: Fault, service: Service, measured: f64) -> Scenario {
    Scenario {
        name,
        load: 0.7 * 3.25 / 4.0,
        faults: vec![(TURNS.0, 0, fault), (TURNS.1, 0, Fault::Slow(1.0))],
        ..healthy(service, measured)
    }
}
