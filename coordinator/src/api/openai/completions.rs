//! `/v1/completions`.

use serde::Serialize;
use serde_json::{Map, Value};
use shoal_protocol::id::TokenId;

use super::{Shape, Whole, finish_word, finite, ids, json, lossy};
use crate::api::session::{Facts, StopReason, TokenOut, Update, Usage};

/// The shape of completions.
#[derive(Debug, Default)]
pub struct Completions {
    /// Whether the chunks carry `"usage": null`.
    pub include_usage: bool,
    /// The choices that have had a chunk: each one's first carries the ids of its prompt.
    begun: Vec<usize>,
}

#[derive(Serialize)]
struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize, Default)]
struct Logprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f32>,
    tokens: Vec<String>,
    top_logprobs: Vec<Map<String, Value>>,
}

fn logprobs(facts: &Facts, tokens: &[TokenOut]) -> Option<Logprobs> {
    facts.logprobs?;
    let mut out = Logprobs::default();
    for token in tokens.iter().filter_map(|token| token.logprobs.as_ref()) {
        let mut top = Map::new();
        // The drawn token is listed even where it is not among the best, as OpenAI does. Two parts of
        // characters may look the same; the better one stands.
        let drawn = (&token.bytes, &token.logprob);
        for (bytes, logprob) in token.top.iter().map(|(b, l)| (b, l)).chain([drawn]) {
            top.entry(lossy(bytes)).or_insert_with(|| finite(*logprob).into());
        }
        out.text_offset.push(token.offset);
        out.token_logprobs.push(finite(token.logprob));
        out.tokens.push(lossy(&token.bytes));
        out.top_logprobs.push(top);
    }
    Some(out)
}

impl Completions {
    /// The shape; `include_usage`: whether the chunks carry `"usage": null`.
    pub fn new(include_usage: bool) -> Self {
        Self { include_usage, begun: Vec::new() }
    }
}

fn object(facts: &Facts, choices: Vec<Choice<'_>>, usage: Option<Option<Usage>>) -> String {
    json(&Object {
        id: &facts.id,
        object: "text_completion",
        created: facts.created,
        model: &facts.model,
        choices,
        usage,
    })
}

fn prompt_token_ids(facts: &Facts, choice: usize) -> Option<&[TokenId]> {
    let prompt = facts.prompts.get(choice / facts.n)?;
    facts.return_token_ids.then_some(&**prompt)
}

impl Shape for Completions {
    fn opening(&mut self, _: &Facts) -> Vec<String> {
        Vec::new()
    }

    fn chunk(&mut self, facts: &Facts, update: &Update) -> String {
        let index = update.choice;
        let first = !self.begun.contains(&index);
        if first {
            self.begun.push(index);
        }
        let choice = Choice {
            index,
            text: &update.text,
            logprobs: logprobs(facts, &update.tokens),
            finish_reason: finish_word(&update.finish),
            stop_reason: update.finish.as_ref().and_then(|finish| finish.stop.as_ref()),
            token_ids: ids(facts, &update.tokens),
            prompt_token_ids: prompt_token_ids(facts, index).filter(|_| first),
        };
        object(facts, vec![choice], self.include_usage.then_some(None))
    }

    fn usage(&self, facts: &Facts, usage: Usage) -> String {
        object(facts, Vec::new(), Some(Some(usage)))
    }

    fn whole(&self, facts: &Facts, answers: &[Whole], usage: Usage) -> String {
        let choices = answers
            .iter()
            .enumerate()
            .map(|(index, answer)| Choice {
                index,
                text: &answer.text,
                logprobs: logprobs(facts, &answer.tokens),
                finish_reason: finish_word(&answer.finish),
                stop_reason: answer.finish.as_ref().and_then(|finish| finish.stop.as_ref()),
                token_ids: ids(facts, &answer.tokens),
                prompt_token_ids: prompt_token_ids(facts, index),
            })
            .collect();
        object(facts, choices, Some(Some(usage)))
    }
}
