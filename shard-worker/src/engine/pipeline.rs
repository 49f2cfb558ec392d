//! The steps in flight: how many there may be, in which order they come back, and when one is late.

use std::collections::VecDeque;
use std::time::Duration;

use shoal_protocol::id::{SequenceId, StepId};
use shoal_protocol::units::Instant;

use super::{Arrival, EngineConfig};

/// Rows of one sequence in a step in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub arrival: Arrival,
    /// The name under which the rows went: the sequence may have left the stages since.
    pub sequence: SequenceId,
    pub first_position: u32,
    pub rows: u32,
    pub sample: bool,
}

impl Part {
    /// The position of its last row.
    pub fn last_position(&self) -> u32 {
        self.first_position + self.rows.saturating_sub(1)
    }
}

/// A step in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flight {
    step: StepId,
    pub parts: Vec<Part>,
}

/// What the samples of a step turn out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Landing {
    /// Those of the oldest step in flight, as they should be.
    Oldest(Flight),
    /// Of no step in flight.
    Stray,
    /// Of a step in flight, but an older one has not come back: links keep order, so it is lost.
    OutOfOrder { oldest: StepId },
}

/// The steps in flight.
#[derive(Debug)]
pub(super) struct Pipeline {
    /// In order of issue.
    in_flight: VecDeque<Flight>,
    in_flight_max: usize,
    step_timeout: Duration,
    next_step: u64,
    /// Since when the oldest step has been the oldest.
    waiting_since: Instant,
}

impl Pipeline {
    /// One step more than stages may be in flight: one in each stage, and one on its way, so that a
    /// stage that has finished a step finds the next one waiting. More would only wait longer.
    pub fn new(config: &EngineConfig) -> Self {
        let useful = config.stages.saturating_add(1);
        Self {
            in_flight: VecDeque::new(),
            in_flight_max: config.limits.steps_in_flight_max.min(useful) as usize,
            step_timeout: config.step_timeout,
            next_step: 0,
            waiting_since: Instant::default(),
        }
    }

    /// Steps in flight.
    pub fn len(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether another step may be issued.
    pub fn has_room(&self) -> bool {
        self.in_flight.len() < self.in_flight_max
    }

    /// Steps issued so far.
    pub fn issued(&self) -> u64 {
        self.next_step
    }

    /// The number of the next step.
    pub fn next_step(&self) -> StepId {
        StepId(self.next_step)
    }

    /// The next step is on its way.
    pub fn issue(&mut self, parts: Vec<Part>, now: Instant) {
        if self.in_flight.is_empty() {
            self.waiting_since = now;
        }
        self.in_flight.push_back(Flight { step: self.next_step(), parts });
        self.next_step += 1;
    }

    /// The samples of a step are back.
    pub fn land(&mut self, step: StepId, now: Instant) -> Landing {
        match self.in_flight.pop_front() {
            Some(flight) if flight.step == step => {
                self.waiting_since = now;
                Landing::Oldest(flight)
            }
            Some(flight) => {
                let oldest = flight.step;
                self.in_flight.push_front(flight);
                if self.in_flight.iter().any(|flight| flight.step == step) {
                    Landing::OutOfOrder { oldest }
                } else {
                    Landing::Stray
                }
            }
            None => Landing::Stray,
        }
    }

    /// Forgets all steps in flight.
    pub fn clear(&mut self) {
        self.in_flight.clear();
    }

    /// When the oldest step is late.
    pub fn deadline(&self) -> Option<Instant> {
        (!self.in_flight.is_empty()).then(|| self.waiting_since + self.step_timeout)
    }

    /// Words about the oldest step where it is late.
    pub fn late(&self, now: Instant) -> Option<String> {
        let flight = self.in_flight.front()?;
        if now < self.waiting_since + self.step_timeout {
            return None;
        }
        let rows: u32 = flight.parts.iter().map(|part| part.rows).sum();
        let (step, limit) = (flight.step, self.step_timeout.as_secs());
        Some(format!("{step} (rows: {rows}) has not come back from the stages within {limit} s"))
    }

    /// What the steps in flight carry, in order of issue.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.in_flight.iter().flat_map(|flight| &flight.parts)
    }
}
