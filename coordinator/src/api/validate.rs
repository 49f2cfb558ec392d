//! ○ A raw request becomes a `ValidRequest`, or is refused with the parameter's name.
//!
//! What can be checked without the model is checked here; the vocabulary and the context's length
//! are checked where the model's text side is at hand ([`super::prepare`]).

use serde_json::{Map, Value};
use shoal_protocol::id::TokenId;
use shoal_protocol::request::TOP_LOGPROBS_MAX;

use super::fields::Fields;
use super::refusal::Refusal;
use super::surface::{Endpoint, Rule, rule};

/// The most answers of one request, over all its prompts: each is a stream to a head.
pub const CHOICES_MAX: usize = 64;

/// The most answers per prompt.
pub const N_MAX: i64 = 16;

/// OpenAI's bound on stop strings.
pub const STOPS_MAX: usize = 4;

/// The longest stop string, in bytes: that much of an answer may be held back.
pub const STOP_LEN_MAX: usize = 1024;

/// The most stop token ids of a request; the model's own end tokens come on top, and the wire
/// takes 64.
pub const STOP_TOKEN_IDS_MAX: usize = 32;

/// OpenAI's default length of a completion, in tokens. A chat answer has none: the context bounds it.
pub const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// A request that asks for nothing that we cannot do.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidRequest {
    /// The deployment's name.
    pub model: String,
    /// What to go on from.
    pub input: Input,
    /// Answers per prompt: 1 to `N_MAX`, and at most `CHOICES_MAX` over all prompts.
    pub n: u16,
    /// The longest answer in tokens; `None`: as far as the context reaches.
    pub max_tokens: Option<u32>,
    /// How to draw, as far as the client said.
    pub sampling: Wanted,
    /// Texts that end an answer, none of them empty.
    pub stop: Vec<String>,
    /// Tokens that end an answer besides the model's own.
    pub stop_token_ids: Vec<TokenId>,
    /// Whether the model's own end tokens do not end the answer.
    pub ignore_eos: bool,
    /// Alternatives to report beside each token; `None`: report no log-probabilities.
    pub logprobs: Option<u32>,
    /// Whether to report token ids.
    pub return_token_ids: bool,
    /// Whether the tokenizer adds its own tokens (such as the beginning) to a text prompt.
    pub add_special_tokens: bool,
    /// How to stream; `None`: answer at once.
    pub stream: Option<StreamOptions>,
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// One or more prompts.
    Prompts(Vec<Prompt>),
    /// A conversation.
    Chat {
        /// The turns, at least one.
        messages: Vec<Message>,
        /// Whether the template opens the assistant's turn.
        add_generation_prompt: bool,
    },
}

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokens, not empty.
    Tokens(Vec<TokenId>),
}

/// One turn of a conversation. Serialised in this order for the chat template.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    pub role: String,
    /// Its text; parts are joined by line breaks.
    pub content: String,
    /// Who speaks, where the client said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// How to draw, as far as the client said; the model's generation_config fills the rest.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Wanted {
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: f32,
    /// -2 to 2.
    pub frequency_penalty: f32,
    /// The same seed draws the same tokens.
    pub seed: Option<i64>,
}

/// How to stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// Whether a last chunk carries the usage.
    pub include_usage: bool,
}

/// Reads the body of a request.
pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<ValidRequest, Refusal> {
    match serde_json::from_slice(body).map_err(|error| Refusal::Json(error.to_string()))? {
        Value::Object(map) => valid(endpoint, map),
        other => Err(Refusal::NotAnObject(super::fields::kind(&other))),
    }
}

fn valid(endpoint: Endpoint, map: Map<String, Value>) -> Result<ValidRequest, Refusal> {
    for (name, value) in &map {
        match rule(endpoint, name) {
            None => return Err(Refusal::Unknown(name.clone())),
            Some(Rule::Served | Rule::Ignored) => {}
            Some(Rule::Neutral(is_neutral, neutral)) => {
                if !value.is_null() && !is_neutral(value) {
                    return Err(Refusal::Unsupported { param: name.clone(), neutral });
                }
            }
        }
    }
    let mut fields = Fields::new(map);
    let model = fields.text("model")?.ok_or(Refusal::Missing("model"))?;
    let n = fields.integer("n", 1..=N_MAX)?.unwrap_or(1);
    let input = match endpoint {
        Endpoint::Completions => Input::Prompts(prompts(&mut fields)?),
        Endpoint::Chat => Input::Chat {
            messages: super::messages::read(&mut fields)?,
            add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
        },
    };
    let count = match &input {
        Input::Prompts(prompts) => prompts.len(),
        Input::Chat { .. } => 1,
    };
    if count * n as usize > CHOICES_MAX {
        return Err(Refusal::Conflict {
            param: "n",
            why: format!(
                "{count} prompts with n = {n} are {} answers; one request may ask for {CHOICES_MAX}",
                count * n as usize
            ),
        });
    }
    if let Some(best_of) = fields.integer("best_of", 1..=i64::MAX)?
        && best_of != n
    {
        return Err(Refusal::Unsupported {
            param: "best_of".to_owned(),
            neutral: "the value of n",
        });
    }
    Ok(ValidRequest {
        model,
        input,
        n: n as u16,
        max_tokens: max_tokens(endpoint, &mut fields)?,
        sampling: wanted(&mut fields)?,
        stop: stop(&mut fields)?,
        stop_token_ids: stop_token_ids(&mut fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        logprobs: logprobs(endpoint, &mut fields)?,
        return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        // A chat template writes the special tokens itself: they must not come twice.
        add_special_tokens: fields
            .boolean("add_special_tokens")?
            .unwrap_or(endpoint == Endpoint::Completions),
        stream: stream(&mut fields)?,
    })
}

fn prompts(fields: &mut Fields) -> Result<Vec<Prompt>, Refusal> {
    const EXPECTED: &str =
        "a text, a list of texts, a list of token ids, or a list of lists of token ids";
    let value = fields.take("prompt").ok_or(Refusal::Missing("prompt"))?;
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        other => return Err(super::fields::wrong_type("prompt", EXPECTED, &other)),
    };
    let Some(first) = list.first() else {
        return Err(Refusal::OutOfRange {
            param: "prompt".to_owned(),
            expected: EXPECTED.to_owned(),
            found: "empty".to_owned(),
        });
    };
    if first.is_number() {
        return Ok(vec![Prompt::Tokens(super::fields::token_ids("prompt", list)?)]);
    }
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => {
            super::fields::token_ids(&format!("prompt[{i}]"), ids).map(Prompt::Tokens)
        }
        other => Err(super::fields::wrong_type(
            &format!("prompt[{i}]"),
            "a text or a list of token ids that is not empty",
            &other,
        )),
    };
    if list.len() > CHOICES_MAX {
        return Err(Refusal::OutOfRange {
            param: "prompt".to_owned(),
            expected: format!("a list of at most {CHOICES_MAX} prompts"),
            found: format!("a list of {}", list.len()),
        });
    }
    list.into_iter().enumerate().map(one).collect()
}

fn max_tokens(endpoint: Endpoint, fields: &mut Fields) -> Result<Option<u32>, Refusal> {
    let range = 1..=i64::from(u32::MAX);
    let old = fields.integer("max_tokens", range.clone())?;
    if endpoint == Endpoint::Completions {
        return Ok(Some(old.map_or(COMPLETION_TOKENS_DEFAULT, |max| max as u32)));
    }
    let new = fields.integer("max_completion_tokens", range)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(Refusal::Conflict {
            param: "max_tokens",
            why: format!(
                "`max_tokens` is {old} and `max_completion_tokens` is {new}, and both mean the \
                 same; give one of them"
            ),
        }),
        _ => Ok(new.or(old).map(|max| max as u32)),
    }
}

fn wanted(fields: &mut Fields) -> Result<Wanted, Refusal> {
    let penalty = |x: f64| (-2.0..=2.0).contains(&x);
    // vLLM writes "all" as -1, others as 0.
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?;
    Ok(Wanted {
        temperature: fields
            .number("temperature", "between 0 and 2", |x| (0.0..=2.0).contains(&x))?,
        top_p: fields.number("top_p", "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
        top_k: top_k.map(|k| k.max(0) as u32),
        repetition_penalty: fields.number(
            "repetition_penalty",
            "above 0 and at most 100",
            |x| x > 0.0 && x <= 100.0,
        )?,
        presence_penalty: fields
            .number("presence_penalty", "between -2 and 2", penalty)?
            .unwrap_or(0.0),
        frequency_penalty: fields
            .number("frequency_penalty", "between -2 and 2", penalty)?
            .unwrap_or(0.0),
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
    })
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, Refusal> {
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if list.len() > STOPS_MAX {
        return Err(Refusal::OutOfRange {
            param: "stop".to_owned(),
            expected: format!("a text or a list of at most {STOPS_MAX} texts"),
            found: format!("a list of {}", list.len()),
        });
    }
    let one = |value| match value {
        Value::String(text) if text.is_empty() || text.len() > STOP_LEN_MAX => {
            Err(Refusal::OutOfRange {
                param: "stop".to_owned(),
                expected: format!("of 1 to {STOP_LEN_MAX} bytes"),
                found: format!("a text of {} bytes", text.len()),
            })
        }
        Value::String(text) => Ok(text),
        other => Err(super::fields::wrong_type("stop", "a text or a list of texts", &other)),
    };
    list.into_iter().map(one).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<TokenId>, Refusal> {
    let ids = match fields.take("stop_token_ids") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => super::fields::token_ids("stop_token_ids", list)?,
        Some(other) => {
            return Err(super::fields::wrong_type("stop_token_ids", "a list of token ids", &other));
        }
    };
    if ids.len() > STOP_TOKEN_IDS_MAX {
        return Err(Refusal::OutOfRange {
            param: "stop_token_ids".to_owned(),
            expected: format!("a list of at most {STOP_TOKEN_IDS_MAX}"),
            found: format!("a list of {}", ids.len()),
        });
    }
    Ok(ids)
}

fn logprobs(endpoint: Endpoint, fields: &mut Fields) -> Result<Option<u32>, Refusal> {
    let range = 0..=i64::from(TOP_LOGPROBS_MAX);
    if endpoint == Endpoint::Completions {
        return Ok(fields.integer("logprobs", range)?.map(|count| count as u32));
    }
    let top = fields.integer("top_logprobs", range)?;
    match (fields.boolean("logprobs")?.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(Refusal::Conflict {
            param: "top_logprobs",
            why: "`top_logprobs` needs `logprobs`: true beside it".to_owned(),
        }),
    }
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, Refusal> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(options) = fields.take("stream_options") else {
        return Ok(stream.then(StreamOptions::default));
    };
    let Value::Object(map) = options else {
        return Err(super::fields::wrong_type("stream_options", "an object", &options));
    };
    if !stream {
        return Err(Refusal::Conflict {
            param: "stream_options",
            why: "`stream_options` needs `stream`: true beside it".to_owned(),
        });
    }
    let mut options = Fields::nested("stream_options", map);
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    for name in ["continuous_usage_stats", "include_obfuscation"] {
        if options.boolean(name)?.unwrap_or(false) {
            let param = format!("stream_options.{name}");
            return Err(Refusal::Unsupported { param, neutral: "false" });
        }
    }
    options.end()?;
    Ok(Some(StreamOptions { include_usage }))
}

#[cfg(test)]
#[path = "validate_test.rs"]
mod tests;
