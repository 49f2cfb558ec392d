//! **Every client's stream is a prefix of the oracle's tokens**, in order, once, whatever happened on
//! the way; it is complete where it is said to be; and it ends early only for a reason that is its own:
//! its deadline, its head's queue before it began, its deployment's end, or that it seems to kill its
//! workers: at least two of them in a row, or their layouts, before it had a token.

use shoal_coordinator::recovery::{GiveUp, Loss};
use shoal_protocol::id::TokenId;
use shoal_protocol::request::FinishReason;

use crate::sim::desk::{Answer, Ended, Name};
use crate::sim::world::World;

/// One loss is no proof: a worker takes all of its sequences along.
const POISON_MIN: u32 = 2;

impl World {
    /// A client is given a token.
    pub fn check_token(&mut self, number: u64, (request, at): Name, token: TokenId) {
        let Some(client) = self.clients.by_number.get_mut(&number) else { return };
        let Some(choice) = client.choices.get_mut(at as usize) else { return };
        let (index, expected) = (choice.got, choice.expected);
        let ends = expected.is_some_and(|token| client.stop_tokens.contains(&token));
        let good = Some(token) == expected && index < client.max_tokens && !ends && !choice.done;
        choice.advance();
        if !good {
            let words = format!(
                "request {request} choice {at}: token {index} is {token}, the oracle says \
                 {expected:?}{}",
                if ends { " and that is the end" } else { "" }
            );
            self.violate("streams", words);
        }
    }

    /// A client is told that an answer is complete.
    pub fn check_done(
        &mut self,
        number: u64,
        (request, at): Name,
        reason: FinishReason,
        stop_token: Option<TokenId>,
    ) {
        let Some(client) = self.clients.by_number.get_mut(&number) else { return };
        let Some(choice) = client.choices.get_mut(at as usize) else { return };
        choice.done = true;
        let good = match reason {
            FinishReason::Length => choice.got == client.max_tokens && stop_token.is_none(),
            FinishReason::Stop => {
                let expected = choice.expected.filter(|token| client.stop_tokens.contains(token));
                expected.is_some() && stop_token == expected
            }
        };
        let got = choice.got;
        client.complete |= client.choices.iter().all(|choice| choice.done);
        if !good {
            let words = format!("request {request} choice {at}: {reason:?} after {got} tokens");
            self.violate("streams", words);
        }
    }

    /// A client is told that its answer does not go on.
    pub fn check_ended(&mut self, answer: &Answer, loss: Loss, verdict: &Ended) {
        // Deadlines travel in whole milliseconds.
        let late = self.now + 1_000 >= answer.deadline;
        let gone = self.operator.removed.contains(&answer.deployment);
        let honest = match verdict {
            Ended::OutOfTime => late,
            Ended::GaveUp(GiveUp::Quarantined { .. }) => answer.fruitless >= POISON_MIN,
            Ended::GaveUp(GiveUp::AsItIs) => late || loss == Loss::Crowded,
            Ended::GaveUp(GiveUp::Undeployed | GiveUp::Unloaded) => gone,
            Ended::GaveUp(GiveUp::Hopeless { .. }) => false,
        };
        if !honest {
            let (request, got) = (answer.sequence.request, answer.sequence.received.len());
            let words = format!("{request} ended after {got} tokens: {loss:?}, {verdict:?}");
            self.violate("streams", words);
        }
    }
}
