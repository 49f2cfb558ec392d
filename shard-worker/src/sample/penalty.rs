//! Penalties for tokens that were seen before.

use std::collections::BTreeMap;

use shoal_protocol::id::TokenId;
use shoal_protocol::request::SamplingRecord;

/// The tokens that a sequence has seen, counted where a penalty asks for it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Penalties {
    /// By token: how often it stands in the answer. Tokens of the prompt alone have 0 and are here
    /// only where the repetition penalty asks for them.
    seen: BTreeMap<TokenId, u32>,
    repetition: f32,
    presence: f32,
    frequency: f32,
    active: bool,
}

impl Penalties {
    /// Nothing seen yet.
    pub fn new(sampling: &SamplingRecord) -> Self {
        let repetition = sampling.repetition_penalty;
        let presence = sampling.presence_penalty;
        let frequency = sampling.frequency_penalty;
        let active = repetition != 1.0 || presence != 0.0 || frequency != 0.0;
        Self { seen: BTreeMap::new(), repetition, presence, frequency, active }
    }

    /// Whether logits change at all.
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// A token of the prompt.
    pub fn see_prompt(&mut self, token: TokenId) {
        if self.repetition != 1.0 {
            self.seen.entry(token).or_insert(0);
        }
    }

    /// A token of the answer.
    pub fn see_answer(&mut self, token: TokenId) {
        if self.active {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }

    /// Changes the logits of the tokens that were seen: the repetition penalty over prompt and
    /// answer (as in transformers: divides what is positive, multiplies what is negative), then
    /// frequency and presence over the answer (as in OpenAI's API).
    ///
    /// In f32, as the references do; a result that would not be finite becomes the nearest number.
    ///
    /// `logits` are those of the tokens from `first` on.
    pub fn apply(&self, first: TokenId, logits: &mut [f32]) {
        for (&token, &answer) in self.seen.range(first..) {
            // A prompt may hold ids that the output head does not have.
            let Some(logit) = logits.get_mut((token - first) as usize) else { break };
            let x = if *logit < 0.0 { *logit * self.repetition } else { *logit / self.repetition };
            let mut x = finite(x);
            if answer > 0 {
                x = finite(x - finite(self.frequency * answer as f32));
                x = finite(x - self.presence);
            }
            *logit = x;
        }
    }
}

/// The nearest finite number to one that may have overflowed.
fn finite(x: f32) -> f32 {
    x.clamp(f32::MIN, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalties(repetition: f32, presence: f32, frequency: f32) -> Penalties {
        Penalties::new(&SamplingRecord {
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            ..SamplingRecord::GREEDY
        })
    }

    #[test]
    fn equals_a_naive_reference() {
        let prompt = [1u32, 2, 2, 5, 99];
        let answer = [2u32, 3, 3, 3, 0];
        let before: Vec<f32> = (0..8).map(|i| (i as f32 - 3.5) * 0.75).collect();
        for (repetition, presence, frequency) in [
            (1.0, 0.0, 0.0),
            (1.3, 0.0, 0.0),
            (0.7, 0.0, 0.0),
            (1.0, 0.5, 0.0),
            (1.0, 0.0, -0.25),
            (1.2, -0.4, 0.3),
        ] {
            let mut p = penalties(repetition, presence, frequency);
            prompt.iter().for_each(|&t| p.see_prompt(t));
            answer.iter().for_each(|&t| p.see_answer(t));
            let mut got = before.clone();
            p.apply(0, &mut got);
            for token in 0..8u32 {
                let mut x = before[token as usize];
                if prompt.contains(&token) || answer.contains(&token) {
                    x = if x < 0.0 { x * repetition } else { x / repetition };
                }
                let count = answer.iter().filter(|&&t| t == token).count();
                x -= frequency * count as f32;
                x -= if count > 0 { presence } else { 0.0 };
                assert_eq!(got[token as usize], x, "token {token}");
            }
        }
    }

    #[test]
    fn without_penalties_nothing_is_counted() {
        let mut p = penalties(1.0, 0.0, 0.0);
        p.see_prompt(1);
        p.see_answer(2);
        assert!(!p.is_active() && p.seen.is_empty());
        // Presence and frequency do not look at the prompt.
        let mut p = penalties(1.0, 1.0, 0.0);
        p.see_prompt(1);
        assert!(p.is_active() && p.seen.is_empty());
    }

    #[test]
    fn results_stay_finite() {
        let mut p = penalties(f32::MIN_POSITIVE, f32::MAX, f32::MAX);
        [0, 0, 1, 1].iter().for_each(|&t| p.see_answer(t));
        let mut logits = [3.0e38, -3.0e38];
        p.apply(0, &mut logits);
        assert!(logits.iter().all(|x| x.is_finite()), "{logits:?}");
    }
}
