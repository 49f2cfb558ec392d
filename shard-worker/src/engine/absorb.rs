//! What comes back from the last stage.

use shoal_protocol::activation::{Sample, Samples};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::request::{HeadEvent, TokenHeader};

use super::pipeline::{Landing, Part};
use super::sequence::Pushed;
use super::{Action, Arrival, Ending, Engine};

impl Engine {
    /// Takes the tokens of a step. Those of another generation or of no step in flight are counted
    /// and dropped; those of a sequence that has left the stages since are dropped.
    pub(super) fn absorb(&mut self, samples: &Samples) {
        if samples.generation != self.config.generation || self.fault.is_some() {
            self.counters.stray_samples += 1;
            return;
        }
        let step = samples.step;
        let flight = match self.pipeline.land(step, self.now) {
            Landing::Oldest(flight) => flight,
            Landing::Stray => {
                self.counters.stray_samples += 1;
                return;
            }
            Landing::OutOfOrder { oldest } => {
                self.find_fault(format!("{step} came back from the stages before {oldest}"));
                return;
            }
        };
        let vectors = if self.config.encodes { samples.samples.len() } else { 0 };
        if !answers(&samples.samples, &flight.parts) || samples.vectors.len() != vectors {
            let text = format!("the samples of {step} are not of the rows that were asked for");
            self.find_fault(text);
            return;
        }
        let mut drawn = samples.samples.iter();
        let mut vectors = samples.vectors.iter();
        for part in flight.parts {
            let sample = if part.sample { drawn.next() } else { None };
            let vector = if part.sample { vectors.next() } else { None };
            self.absorb_part(part, sample, vector);
        }
    }

    fn absorb_part(&mut self, part: Part, sample: Option<&Sample>, vector: Option<&Vec<f32>>) {
        let Some(sequence) = self.sequences.get_mut(&part.arrival) else { return };
        if sequence.run().is_none_or(|run| run.id != part.sequence) {
            return;
        }
        let full = sequence.absorbed(part.last_position());
        if sample.is_some_and(|sample| sample.token == Sample::NO_TOKEN) {
            // Whoever shared what it holds would fail as it does, also when the cause is gone.
            let blocks = sequence.run().map_or(&[][..], |run| &run.blocks);
            self.blocks.forget_all(blocks);
        } else if let Some(run) = sequence.run() {
            // Every stage has computed them: what comes later finds them there.
            for i in full {
                if let (Some(&block), Some(content)) =
                    (run.blocks.get(i as usize), sequence.content(i))
                {
                    self.blocks.publish(block, content, i);
                }
            }
        }
        let prompt_left = sequence.prompt_len().saturating_sub(part.first_position);
        self.counters.prompt_tokens += u64::from(prompt_left.min(part.rows));
        match (sample, vector) {
            (Some(_), Some(vector)) => self.take_vector(part.arrival, vector),
            (Some(sample), None) => self.take_token(part.arrival, sample),
            (None, _) => {}
        }
    }

    /// An encoder's answer.
    fn take_vector(&mut self, arrival: Arrival, vector: &[f32]) {
        let Some(sequence) = self.sequences.get(&arrival) else { return };
        let ending = if vector.iter().all(|x| x.is_finite()) {
            Ending::Vector { values: vector.to_vec(), times: sequence.times(self.now) }
        } else {
            let text = "the model computed numbers that are not finite for this input; its weights \
                        may be damaged, or the precision may be too low for it";
            Ending::Failed(WireError::new(ErrorCode::ComputeFailed, text))
        };
        self.end(arrival, Some(ending));
    }

    fn take_token(&mut self, arrival: Arrival, sample: &Sample) {
        let Some(sequence) = self.sequences.get_mut(&arrival) else { return };
        if sample.token == Sample::NO_TOKEN {
            let text = format!(
                "the model computed numbers that are not finite for the token at position {}; \
                 its weights may be damaged, or the precision may be too low for it",
                sample.position + 1
            );
            let error = WireError::new(ErrorCode::ComputeFailed, text);
            self.end(arrival, Some(Ending::Failed(error)));
            return;
        }
        let (request, attempt, choice) = sequence.names();
        let key = sequence.key();
        match sequence.push(sample.token, self.config.context(), self.now) {
            Pushed::Stop(ending) => self.end(arrival, Some(ending)),
            Pushed::Token { index, first, ending } => {
                self.counters.generated_tokens += 1;
                let header = TokenHeader {
                    request: request.0,
                    attempt: attempt.0,
                    choice,
                    index,
                    token: sample.token,
                    logprob: sample.logprob,
                    candidates: sample.candidates.len() as u32,
                    queue_us: first.queue_us,
                    prefill_us: first.prefill_us,
                };
                let candidates = sample.candidates.clone();
                let event = HeadEvent::Token { header, candidates };
                self.actions.push_back(Action::Emit { key, event });
                if ending.is_some() {
                    self.end(arrival, ending);
                }
            }
        }
    }
}

/// Whether the samples are of the very rows that were to be sampled, in order.
fn answers(samples: &[Sample], parts: &[Part]) -> bool {
    let asked = parts.iter().filter(|part| part.sample);
    asked.clone().count() == samples.len()
        && asked.zip(samples).all(|(part, sample)| {
            part.sequence == sample.sequence && part.last_position() == sample.position
        })
}
