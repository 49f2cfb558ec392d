//! What the last stage keeps of a sequence in order to draw its next token.

use shoal_protocol::id::TokenId;
use shoal_protocol::request::{CandidateRecord, NO_LOGPROBS, SamplingRecord};

use super::gumbel::{Noise, Race};
use super::penalty::Penalties;
use super::top::{Ranked, select};
use super::{Drawn, SampleError, greedy, logsumexp, nucleus};

/// Buffers that draws share, so that a draw without alternatives allocates nothing once they have
/// grown. They carry nothing from one draw to the next.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) penalised: Vec<f32>,
    pub(super) ranked: Vec<Ranked>,
}

/// The sampling side of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerState {
    sampling: SamplingRecord,
    /// Tokens that are known: prompt and answer.
    tokens: u32,
    penalties: Penalties,
}

impl SamplerState {
    /// A sequence of which `tokens` are known; the first `prompt_len` of them are the prompt, the
    /// others were generated before and count as its answer.
    pub fn open(prompt_len: u32, tokens: &[TokenId], sampling: SamplingRecord) -> Self {
        let mut penalties = Penalties::new(&sampling);
        let (prompt, answer) = tokens.split_at(tokens.len().min(prompt_len as usize));
        prompt.iter().for_each(|&token| penalties.see_prompt(token));
        answer.iter().for_each(|&token| penalties.see_answer(token));
        Self { sampling, tokens: tokens.len() as u32, penalties }
    }

    /// How many tokens are known. The next draw is from the row at the position before this.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Draws the token behind the row at `position` and takes it into the answer.
    ///
    /// The noise is that of the position at which the drawn token will stand, `position + 1`.
    pub fn draw(
        &mut self,
        scratch: &mut Scratch,
        logits: &[f32],
        position: u32,
    ) -> Result<Drawn, SampleError> {
        self.check_position(position)?;
        let best = greedy::argmax(logits)?;
        let token = self.choose(scratch, logits, best)?;
        let (logprob, candidates) = self.report(scratch, logits, token);
        self.take(token);
        Ok(Drawn { token, logprob, candidates })
    }

    /// Refuses a row that is not the last known token's.
    pub(super) fn check_position(&self, position: u32) -> Result<(), SampleError> {
        if position.checked_add(1) == Some(self.tokens) {
            return Ok(());
        }
        let expected = self.tokens.saturating_sub(1);
        Err(SampleError::Position { found: position, expected })
    }

    /// Takes a drawn token into the answer.
    pub(super) fn take(&mut self, token: TokenId) {
        self.tokens += 1;
        self.penalties.see_answer(token);
    }

    /// How it draws.
    pub(super) fn sampling(&self) -> &SamplingRecord {
        &self.sampling
    }

    /// What it has seen.
    pub(super) fn penalties(&self) -> &Penalties {
        &self.penalties
    }

    /// The token; `best` is the argmax of the untouched logits.
    fn choose(
        &self,
        scratch: &mut Scratch,
        logits: &[f32],
        best: TokenId,
    ) -> Result<TokenId, SampleError> {
        let Scratch { penalised, ranked } = scratch;
        let (logits, best) = if self.penalties.is_active() {
            penalised.clear();
            penalised.extend_from_slice(logits);
            self.penalties.apply(0, penalised);
            (penalised.as_slice(), greedy::argmax(penalised)?)
        } else {
            (logits, best)
        };
        let SamplingRecord { seed, temperature, top_p, top_k, stream, .. } = self.sampling;
        if temperature == 0.0 {
            return Ok(best);
        }
        let scale = 1.0 / f64::from(temperature);
        let mut race = Race::new(Noise::new(seed, stream, self.tokens), temperature);
        let filtered = match (top_k as usize, top_p < 1.0) {
            (0, false) => false,
            (0, true) => {
                let whole = logsumexp::over(logits, scale);
                nucleus::of_row(logits, scale, whole.max, whole.sum, top_p, ranked);
                true
            }
            (k, nucleus) => {
                select(logits, k, ranked);
                if nucleus {
                    nucleus::of_kept(ranked, scale, top_p);
                }
                true
            }
        };
        if filtered {
            ranked.iter().for_each(|r| race.enter(r.token, r.logit));
        } else {
            // The likeliest first: see `Race::enter`.
            race.enter(best, logits[best as usize]);
            logits.iter().enumerate().for_each(|(t, &logit)| race.enter(t as TokenId, logit));
        }
        race.winner().ok_or(SampleError::NoLogits)
    }

    /// The log-probability of the drawn token and of the best others, where asked for.
    fn report(
        &self,
        scratch: &mut Scratch,
        logits: &[f32],
        token: TokenId,
    ) -> (f32, Vec<CandidateRecord>) {
        if self.sampling.logprobs == NO_LOGPROBS {
            return (f32::NAN, Vec::new());
        }
        let ln_sum = logsumexp::over(logits, 1.0).ln();
        let logprob = |logit: f32| (f64::from(logit) - ln_sum) as f32;
        select(logits, self.sampling.logprobs as usize, &mut scratch.ranked);
        let candidates = scratch
            .ranked
            .iter()
            .map(|r| CandidateRecord { token: r.token, logprob: logprob(r.logit) })
            .collect();
        (logprob(logits[token as usize]), candidates)
    }
}

#[cfg(test)]
#[path = "state_test.rs"]
mod state_test;
