//! OpenAI's wire types, and how updates become them. Nothing is decided here.

pub mod chat;
pub mod completions;
pub mod models;

use shoal_protocol::id::TokenId;

use super::session::{Facts, Finish, TokenOut, Update, Usage};

/// How one of the two generating endpoints writes its answers.
pub trait Shape: Send + 'static {
    /// Chunks before the first text: one per choice, or none.
    fn opening(&mut self, facts: &Facts) -> Vec<String>;

    /// One update as a chunk.
    fn chunk(&mut self, facts: &Facts, update: &Update) -> String;

    /// The last chunk, which carries the usage alone.
    fn usage(&self, facts: &Facts, usage: Usage) -> String;

    /// All answers as one object.
    fn whole(&self, facts: &Facts, answers: &[Whole], usage: Usage) -> String;
}

/// One answer, complete.
#[derive(Clone, Debug, Default)]
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<TokenOut>,
    /// How it ended.
    pub finish: Option<Finish>,
}

impl Whole {
    /// Adds an update.
    pub fn add(&mut self, update: Update) {
        self.text.push_str(&update.text);
        self.tokens.extend(update.tokens);
        self.finish = update.finish.or(self.finish.take());
    }
}

/// JSON has no infinity; vLLM's stand-in for a token that could not be drawn.
const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOGPROB_MIN }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ids(facts: &Facts, tokens: &[TokenOut]) -> Option<Vec<TokenId>> {
    facts.return_token_ids.then(|| tokens.iter().map(|token| token.id).collect())
}

fn finish_word(finish: &Option<Finish>) -> Option<&'static str> {
    finish.as_ref().map(Finish::word)
}

/// Structs of texts, numbers and lists always serialise: there is no map with other keys than texts
/// and no number that is not finite.
fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
