//! `/v1/chat/completions`.

use serde::Serialize;
use shoal_protocol::id::TokenId;

use super::{Shape, Whole, finish_word, finite, ids, json, lossy};
use crate::api::session::{Facts, StopReason, TokenOut, Update, Usage};

/// The shape of chat answers.
#[derive(Debug, Default)]
pub struct Chat {
    /// Whether the chunks carry `"usage": null`, as OpenAI's do where a usage chunk follows.
    pub include_usage: bool,
}

#[derive(Serialize)]
struct Object<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    message: Message<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
    annotations: [(); 0],
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Logprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'a StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

#[derive(Serialize)]
struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct TokenLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<TopLogprob>,
}

#[derive(Serialize)]
struct TopLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

fn logprobs(facts: &Facts, tokens: &[TokenOut]) -> Option<Logprobs> {
    facts.logprobs?;
    let content = tokens
        .iter()
        .filter_map(|token| token.logprobs.as_ref())
        .map(|token| TokenLogprob {
            token: lossy(&token.bytes),
            logprob: finite(token.logprob),
            bytes: token.bytes.clone(),
            top_logprobs: token
                .top
                .iter()
                .map(|(bytes, logprob)| TopLogprob {
                    token: lossy(bytes),
                    logprob: finite(*logprob),
                    bytes: bytes.clone(),
                })
                .collect(),
        })
        .collect();
    Some(Logprobs { content, refusal: None })
}

impl Chat {
    fn object<'a, C: Serialize>(
        facts: &'a Facts,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
        prompt_token_ids: Option<&'a [TokenId]>,
    ) -> String {
        let (id, model) = (facts.id.as_str(), facts.model.as_str());
        let created = facts.created;
        json(&Object { id, object, created, model, choices, usage, prompt_token_ids })
    }

    fn chunk_object(
        &self,
        facts: &Facts,
        choice: ChunkChoice<'_>,
        prompt_token_ids: Option<&[TokenId]>,
    ) -> String {
        let usage = self.include_usage.then_some(None);
        Self::object(facts, CHUNK, vec![choice], usage, prompt_token_ids)
    }
}

const CHUNK: &str = "chat.completion.chunk";

fn prompt_token_ids(facts: &Facts) -> Option<&[TokenId]> {
    facts.prompts.first().filter(|_| facts.return_token_ids).map(|prompt| &**prompt)
}

impl Shape for Chat {
    fn opening(&mut self, facts: &Facts) -> Vec<String> {
        let opening = |index| {
            let choice = ChunkChoice {
                index,
                delta: Delta { role: Some("assistant"), content: Some("") },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            // The prompt's ids come once, on the very first chunk.
            self.chunk_object(facts, choice, prompt_token_ids(facts).filter(|_| index == 0))
        };
        (0..facts.n).map(opening).collect()
    }

    fn chunk(&mut self, facts: &Facts, update: &Update) -> String {
        let choice = ChunkChoice {
            index: update.choice,
            delta: Delta {
                role: None,
                // The chunk that ends an answer without new text has an empty delta.
                content: Some(update.text.as_str())
                    .filter(|text| !text.is_empty() || update.finish.is_none()),
            },
            logprobs: logprobs(facts, &update.tokens),
            finish_reason: finish_word(&update.finish),
            stop_reason: update.finish.as_ref().and_then(|finish| finish.stop.as_ref()),
            token_ids: ids(facts, &update.tokens),
        };
        self.chunk_object(facts, choice, None)
    }

    fn usage(&self, facts: &Facts, usage: Usage) -> String {
        Self::object(facts, CHUNK, Vec::<ChunkChoice<'_>>::new(), Some(Some(usage)), None)
    }

    fn whole(&self, facts: &Facts, answers: &[Whole], usage: Usage) -> String {
        let choices = answers
            .iter()
            .enumerate()
            .map(|(index, answer)| Choice {
                index,
                message: Message {
                    role: "assistant",
                    content: &answer.text,
                    refusal: None,
                    annotations: [],
                },
                logprobs: logprobs(facts, &answer.tokens),
                finish_reason: finish_word(&answer.finish),
                stop_reason: answer.finish.as_ref().and_then(|finish| finish.stop.as_ref()),
                token_ids: ids(facts, &answer.tokens),
            })
            .collect();
        Self::object(facts, "chat.completion", choices, Some(Some(usage)), prompt_token_ids(facts))
    }
}
