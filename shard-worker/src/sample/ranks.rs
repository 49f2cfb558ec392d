//! A draw whose row of logits is cut over the ranks of the last stage: each tells the others the little
//! that decides it, and all come to the token that one rank with the whole row would draw.
//!
//! ```text
//! own logits ─► Summary: best · winner of the race · best k · sums by block ─► all ranks ─► decide ─► token
//!                                              └ the mass of top-p not proven by them: the row itself is gathered
//! ```
//!
//! Sums are told by block of [`logsumexp::BLOCK`] tokens and folded in block order, the noise of a token
//! is that of its id, and ties go to the lower id: nothing depends on where the vocabulary is cut.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::TokenId;
use shoal_protocol::request::{CandidateRecord, NO_LOGPROBS, SamplingRecord};

use super::gumbel::{Noise, Race};
use super::logsumexp::{self, Partial};
use super::nucleus::{self, FETCH};
use super::state::{SamplerState, Scratch};
use super::top::{Ranked, best_first, select};
use super::{Drawn, SampleError, greedy};

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Entrant {
    token: TokenId,
    /// With penalties.
    logit: f32,
    /// Without.
    untouched: f32,
}

/// What one rank tells of its part of a row. What is in it follows from the sequence's sampling, which
/// all ranks know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The first logit that is no number.
    non_finite: Option<(TokenId, f32)>,
    /// The best token, or of a race without filters its winner and the key it won with.
    leader: Option<(f64, Entrant)>,
    /// The best, where a filter is asked for.
    ranked: Vec<Entrant>,
    /// Sums over blocks at the temperature, with penalties: for top-p.
    mass: Vec<(f64, f64)>,
    /// Sums over blocks of the untouched logits: for log-probabilities.
    evidence: Vec<(f64, f64)>,
    /// The best alternatives, untouched.
    alternatives: Vec<(TokenId, f32)>,
}

/// Tokens that a rank tells of a row at most: a larger top-k gathers the row.
const TOLD_MAX: usize = 1024;

impl Summary {
    /// What one rank tells of all rows of a step.
    pub fn encode(rows: &[Summary]) -> Vec<u8> {
        // Writing numbers to a vector cannot fail.
        postcard::to_stdvec(rows).unwrap_or_default()
    }

    /// What another rank has told of `rows` rows; `None` where it told something else.
    pub fn decode(bytes: &[u8], rows: usize) -> Option<Vec<Summary>> {
        let told: Vec<Summary> = postcard::from_bytes(bytes).ok()?;
        (told.len() == rows).then_some(told)
    }

    /// What a rank tells of a row in which this token's logit is no number.
    pub fn of_non_finite(token: TokenId, value: f32) -> Self {
        Summary { non_finite: Some((token, value)), ..Summary::default() }
    }

    /// All tokens that it names.
    fn tokens(&self) -> impl Iterator<Item = TokenId> {
        let Summary { non_finite, leader, ranked, alternatives, .. } = self;
        let named = non_finite.iter().map(|(token, _)| *token);
        let named = named.chain(leader.iter().map(|(_, entrant)| entrant.token));
        let named = named.chain(ranked.iter().map(|entrant| entrant.token));
        named.chain(alternatives.iter().map(|(token, _)| *token))
    }
}

/// What a draw needs of the row.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    Greedy,
    Race,
    /// The best so many; then perhaps a part of their mass.
    TopK(usize),
    /// As many of the best as have this mass.
    TopP,
}

impl Rule {
    fn of(sampling: &SamplingRecord) -> Self {
        match (sampling.temperature == 0.0, sampling.top_k as usize, sampling.top_p < 1.0) {
            (true, ..) => Rule::Greedy,
            (false, 0, false) => Rule::Race,
            (false, 0, true) => Rule::TopP,
            (false, k, _) => Rule::TopK(k),
        }
    }
}

impl Rule {
    /// How many of its best tokens a rank tells.
    fn told(self) -> usize {
        match self {
            Rule::Greedy | Rule::Race => 0,
            Rule::TopK(k) => k.min(TOLD_MAX),
            Rule::TopP => FETCH,
        }
    }
}

impl SamplerState {
    /// What this rank, whose part of the row begins with token `first`, tells the others.
    pub fn summarise(
        &self,
        scratch: &mut Scratch,
        (first, own): (TokenId, &[f32]),
        position: u32,
    ) -> Result<Summary, SampleError> {
        self.check_position(position)?;
        let mut summary = Summary::default();
        match greedy::argmax(own) {
            Err(SampleError::NonFinite { token, value }) => {
                summary.non_finite = Some((first + token, value));
                return Ok(summary);
            }
            Err(SampleError::NoLogits) => return Ok(summary),
            Err(other) => return Err(other),
            Ok(_) => {}
        }
        let Scratch { penalised, ranked } = scratch;
        penalised.clear();
        penalised.extend_from_slice(own);
        self.penalties().apply(first, penalised);
        let entrant = |token: TokenId| Entrant {
            token: first + token,
            logit: penalised[token as usize],
            untouched: own[token as usize],
        };
        let sampling = self.sampling();
        match Rule::of(sampling) {
            Rule::Greedy => {
                let best = entrant(greedy::argmax(penalised)?);
                summary.leader = Some((f64::from(best.logit), best));
            }
            Rule::Race => {
                let mut race = self.race();
                // The likeliest first: see `Race::enter`.
                let best = entrant(greedy::argmax(penalised)?);
                race.enter(best.token, best.logit);
                (first..).zip(&*penalised).for_each(|(token, &logit)| race.enter(token, logit));
                summary.leader = race.leader().map(|(key, token)| (key, entrant(token - first)));
            }
            rule => {
                select(penalised, rule.told(), ranked);
                summary.ranked = ranked.iter().map(|r| entrant(r.token)).collect();
                if rule == Rule::TopP {
                    summary.mass = by_block(penalised, 1.0 / f64::from(sampling.temperature));
                }
            }
        }
        if sampling.logprobs != NO_LOGPROBS {
            summary.evidence = by_block(own, 1.0);
            select(own, sampling.logprobs as usize, ranked);
            summary.alternatives = ranked.iter().map(|r| (first + r.token, r.logit)).collect();
        }
        Ok(summary)
    }

    /// Whether this is what a rank that has the tokens `part` of the row tells of it: the little that the
    /// sampling asks for, of all of its part. Less would only be another draw, and nobody would see it.
    pub fn check_told(&self, told: &Summary, part: Range<TokenId>) -> Result<(), String> {
        if let Some(other) = told.tokens().find(|token| !part.contains(token)) {
            return Err(format!("it names token {other}, and has {part:?}"));
        }
        if told.non_finite.is_some() {
            return Ok(());
        }
        let (sampling, width) = (self.sampling(), part.len());
        let (rule, blocks) = (Rule::of(sampling), width.div_ceil(logsumexp::BLOCK));
        let (asked, evidence) = match sampling.logprobs {
            NO_LOGPROBS => (0, 0),
            asked => (asked as usize, blocks),
        };
        let leaders = usize::from(matches!(rule, Rule::Greedy | Rule::Race) && width > 0);
        let mass = if rule == Rule::TopP { blocks } else { 0 };
        for (what, found, expected) in [
            ("leaders", told.leader.iter().len(), leaders),
            ("best tokens", told.ranked.len(), rule.told().min(width)),
            ("sums by block", told.mass.len(), mass),
            ("untouched sums by block", told.evidence.len(), evidence),
            ("alternatives", told.alternatives.len(), asked.min(width)),
        ] {
            if found != expected {
                let len = part.len();
                return Err(format!("it told {found} {what} of {len} tokens; expected {expected}"));
            }
        }
        Ok(())
    }

    /// Draws from what all ranks have told, in rank order, and takes the token into the answer. `None`:
    /// it does not suffice, the row itself is needed, and nothing has changed.
    pub fn decide(
        &mut self,
        scratch: &mut Scratch,
        ranks: &[Summary],
    ) -> Result<Option<Drawn>, SampleError> {
        if let Some((token, value)) = ranks.iter().find_map(|rank| rank.non_finite) {
            return Err(SampleError::NonFinite { token, value });
        }
        let Some(chosen) = self.choose_among(scratch, ranks)? else { return Ok(None) };
        let (logprob, candidates) = self.report_of(chosen, ranks);
        self.take(chosen.token);
        Ok(Some(Drawn { token: chosen.token, logprob, candidates }))
    }

    fn choose_among(
        &self,
        scratch: &mut Scratch,
        ranks: &[Summary],
    ) -> Result<Option<Entrant>, SampleError> {
        let sampling = self.sampling();
        let rule = Rule::of(sampling);
        if let Rule::Greedy | Rule::Race = rule {
            let leaders = ranks.iter().filter_map(|rank| rank.leader);
            // Ranks are in the order of their tokens, so that of equals the lower id stays.
            let best = leaders.reduce(|best, next| if next.0 > best.0 { next } else { best });
            return best.map(|(_, token)| Some(token)).ok_or(SampleError::NoLogits);
        }
        let most = rule.told();
        let all_told = ranks.iter().all(|rank| rank.ranked.len() < most);
        if matches!(rule, Rule::TopK(k) if k > most) && !all_told {
            return Ok(None);
        }
        let told: Vec<Entrant> =
            ranks.iter().flat_map(|rank| rank.ranked.iter().copied()).collect();
        let kept = &mut scratch.ranked;
        kept.clear();
        kept.extend(told.iter().map(|e| Ranked { logit: e.logit, token: e.token }));
        kept.sort_unstable_by(best_first);
        kept.truncate(most);
        let scale = 1.0 / f64::from(sampling.temperature);
        if rule == Rule::TopP {
            let whole = folded(ranks.iter().flat_map(|rank| &rank.mass));
            let (max, total) = (whole.max, whole.sum);
            let proven = nucleus::cut(kept, scale, max, total, sampling.top_p);
            let all_here = all_told && told.len() <= most;
            if !proven && !all_here {
                return Ok(None);
            }
        } else if sampling.top_p < 1.0 {
            nucleus::of_kept(kept, scale, sampling.top_p);
        }
        let mut race = self.race();
        kept.iter().for_each(|r| race.enter(r.token, r.logit));
        let winner = race.winner().ok_or(SampleError::NoLogits)?;
        Ok(told.into_iter().find(|entrant| entrant.token == winner))
    }

    fn race(&self) -> Race {
        let SamplingRecord { seed, temperature, stream, .. } = *self.sampling();
        Race::new(Noise::new(seed, stream, self.tokens()), temperature)
    }

    fn report_of(&self, chosen: Entrant, ranks: &[Summary]) -> (f32, Vec<CandidateRecord>) {
        let asked = self.sampling().logprobs;
        if asked == NO_LOGPROBS {
            return (f32::NAN, Vec::new());
        }
        let ln_sum = folded(ranks.iter().flat_map(|rank| &rank.evidence)).ln();
        let logprob = |logit: f32| (f64::from(logit) - ln_sum) as f32;
        let told = ranks.iter().flat_map(|rank| &rank.alternatives);
        let mut best: Vec<_> = told.map(|&(token, logit)| Ranked { token, logit }).collect();
        best.sort_unstable_by(best_first);
        best.truncate(asked as usize);
        let record = |r: Ranked| CandidateRecord { token: r.token, logprob: logprob(r.logit) };
        (logprob(chosen.untouched), best.into_iter().map(record).collect())
    }
}

/// The sums over the blocks of a rank's part, which begins with a block.
fn by_block(logits: &[f32], scale: f64) -> Vec<(f64, f64)> {
    let blocks = logits.chunks(logsumexp::BLOCK).map(|block| Partial::of_block(block, scale));
    blocks.map(|partial| (partial.max, partial.sum)).collect()
}

fn folded<'a>(blocks: impl Iterator<Item = &'a (f64, f64)>) -> Partial {
    blocks.map(|&(max, sum)| Partial { max, sum }).fold(Partial::EMPTY, Partial::fold)
}

#[cfg(test)]
#[path = "ranks_test.rs"]
mod tests;
