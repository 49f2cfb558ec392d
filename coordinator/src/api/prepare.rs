//! ○ A valid request and a model's facts become what is sent to a head.

use std::sync::Arc;

use shoal_protocol::id::TokenId;
use shoal_protocol::request::{STOP_TOKENS_MAX, SamplingRecord};

use super::generation::Defaults;
use super::refusal::Refusal;
use super::tokenize::{EncodeError, ModelText};
use super::validate::{Input, Prompt, ValidRequest};

/// What the model says that this request needs to know.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// The vocabulary's size.
    pub vocab: u32,
    /// The longest context, prompt and answer together.
    pub context_max: u32,
    /// The tokenizer's side; `None` for a model that takes and gives token ids alone.
    pub text: Option<Arc<ModelText>>,
}

/// What is sent to a head, for each prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The prompts and how long each one's answers may be.
    pub prompts: Vec<PreparedPrompt>,
    /// How to draw; the stream of randomness is filled in for each choice.
    pub sampling: SamplingRecord,
    /// A sampled one of these ends an answer.
    pub stop_tokens: Arc<[TokenId]>,
}

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PreparedPrompt {
    /// Its tokens, at least one.
    pub tokens: Arc<[TokenId]>,
    /// How many tokens an answer to it may have, at least one.
    pub max_tokens: u32,
}

/// Tokenises and checks against the model. Pure compute, some milliseconds for long prompts: for a
/// blocking thread. `seed` is used where the client gave none; `now` is in seconds since 1970.
pub fn prepare(
    request: &ValidRequest,
    model: &ModelFacts,
    seed: u64,
    now: u64,
) -> Result<Prepared, Refusal> {
    if model.text.is_none() && !request.stop.is_empty() {
        let advice = "its answers have no text to stop at; use stop_token_ids";
        return Err(Refusal::NoText { param: "stop", advice });
    }
    let prompts = tokens(request, model, now)?
        .into_iter()
        .map(|tokens| check_prompt(request, model, tokens))
        .collect::<Result<Vec<_>, _>>()?;
    let defaults = model.text.as_ref().map_or_else(Defaults::default, |text| text.defaults);
    let mut stop_tokens = request.stop_token_ids.clone();
    if !request.ignore_eos {
        stop_tokens.extend(model.text.iter().flat_map(|text| &text.end_tokens));
    }
    stop_tokens.sort_unstable();
    stop_tokens.dedup();
    if stop_tokens.len() > STOP_TOKENS_MAX {
        return Err(Refusal::OutOfRange {
            param: "stop_token_ids".to_owned(),
            expected: format!("at most {STOP_TOKENS_MAX}, those of the model included"),
            found: stop_tokens.len().to_string(),
        });
    }
    Ok(Prepared {
        prompts,
        sampling: defaults.sampling(&request.sampling, request.logprobs, seed),
        stop_tokens: stop_tokens.into(),
    })
}

fn tokens(
    request: &ValidRequest,
    model: &ModelFacts,
    now: u64,
) -> Result<Vec<Vec<TokenId>>, Refusal> {
    let encoded = |param, ids: Result<Vec<TokenId>, EncodeError>| {
        ids.map_err(|error| Refusal::NotEncoded { param, why: error.to_string() })
    };
    match (&request.input, &model.text) {
        (Input::Chat { messages, add_generation_prompt }, Some(text)) => {
            let ids =
                text.encode_chat(messages, *add_generation_prompt, request.add_special_tokens, now);
            Ok(vec![encoded("messages", ids)?])
        }
        (Input::Chat { .. }, None) => {
            let advice = "send a list of token ids as `prompt` to /v1/completions";
            Err(Refusal::NoText { param: "messages", advice })
        }
        (Input::Prompts(prompts), text) => {
            let one = |prompt: &Prompt| match (prompt, text) {
                (Prompt::Tokens(ids), _) => Ok(ids.clone()),
                (Prompt::Text(prompt), Some(text)) => {
                    encoded("prompt", text.encode(prompt, request.add_special_tokens))
                }
                (Prompt::Text(_), None) => {
                    let advice = "send it as a list of token ids";
                    Err(Refusal::NoText { param: "prompt", advice })
                }
            };
            prompts.iter().map(one).collect()
        }
    }
}

fn check_prompt(
    request: &ValidRequest,
    model: &ModelFacts,
    tokens: Vec<TokenId>,
) -> Result<PreparedPrompt, Refusal> {
    let param = match request.input {
        Input::Chat { .. } => "messages",
        Input::Prompts(_) => "prompt",
    };
    if tokens.is_empty() {
        return Err(Refusal::EmptyPrompt { param });
    }
    if let Some(id) = tokens.iter().copied().find(|id| *id >= model.vocab) {
        return Err(Refusal::NotInVocabulary { param, id, vocab: model.vocab });
    }
    let (prompt, context) = (tokens.len() as u64, u64::from(model.context_max));
    let answer = request.max_tokens.map_or(context.saturating_sub(prompt).max(1), u64::from);
    if prompt + answer > context {
        return Err(Refusal::ContextTooLong { param, context, prompt, answer });
    }
    // At most the context, which is a u32.
    Ok(PreparedPrompt { tokens: tokens.into(), max_tokens: answer as u32 })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};
    use shoal_protocol::error::ErrorCode;

    use super::super::surface::Endpoint;
    use super::super::validate::parse;
    use super::*;

    fn demo() -> ModelFacts {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster/demo-model");
        let text = ModelText::load(&folder).expect("the demo model's text side");
        ModelFacts { vocab: 512, context_max: 64, text: Some(Arc::new(text)) }
    }

    fn pretend() -> ModelFacts {
        ModelFacts { vocab: 512, context_max: 64, text: None }
    }

    fn completion(extra: Value, model: &ModelFacts) -> Result<Prepared, Refusal> {
        let mut body = json!({"model": "m", "prompt": [1, 2, 3]});
        let (Value::Object(body_map), Value::Object(extra)) = (&mut body, extra) else {
            panic!("two objects");
        };
        body_map.extend(extra);
        let request = parse(Endpoint::Completions, body.to_string().as_bytes());
        prepare(&request.expect("a valid request"), model, 7, 0)
    }

    #[test]
    fn the_context_bounds_prompt_and_answer() {
        let check =
            |extra, expected: Result<u32, &str>| match (completion(extra, &demo()), expected) {
                (Ok(found), Ok(max)) => assert_eq!(found.prompts[0].max_tokens, max),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{error}");
                    assert_eq!(error.code(), ErrorCode::ContextTooLong);
                }
                (found, expected) => panic!("{found:?}, expected {expected:?}"),
            };
        check(json!({}), Ok(16));
        check(json!({"max_tokens": 61}), Ok(61));
        check(json!({"max_tokens": 62}), Err("needs 65 (3 in the prompt, 62 for the answer)"));
        check(json!({"max_tokens": 1, "prompt": vec![1; 64]}), Err("needs 65"));
        check(json!({"max_tokens": 4_294_967_295_u32}), Err("needs 4294967298"));
        let body =
            br#"{"model": "m", "messages": [{"role": "user", "content": "What is 1 plus 2?"}]}"#;
        let chat = parse(Endpoint::Chat, body).expect("a valid request");
        let prepared = prepare(&chat, &demo(), 7, 0).expect("it fits");
        let prompt = &prepared.prompts[0];
        assert_eq!(prompt.tokens.len() as u32 + prompt.max_tokens, 64);
    }

    #[test]
    fn stop_tokens_are_the_models_unless_they_are_ignored() {
        let stops = |extra| completion(extra, &demo()).expect("fits").stop_tokens.to_vec();
        let own = demo().text.expect("text").end_tokens.clone();
        assert_eq!(stops(json!({})), own);
        assert_eq!(stops(json!({"ignore_eos": true})), [0u32; 0]);
        assert_eq!(stops(json!({"ignore_eos": true, "stop_token_ids": [9, 9]})), [9]);
    }

    #[test]
    fn a_model_without_text_takes_token_ids_alone() {
        assert!(completion(json!({}), &pretend()).is_ok());
        for (extra, param) in [(json!({"prompt": "x"}), "prompt"), (json!({"stop": "x"}), "stop")] {
            let error = completion(extra, &pretend()).expect_err("no text");
            assert_eq!(error.param(), Some(param));
        }
    }

    #[test]
    fn tokens_out_of_the_vocabulary_and_empty_prompts_are_refused() {
        for extra in [json!({"prompt": [512]}), json!({"prompt": ""})] {
            let error = completion(extra.clone(), &demo()).expect_err("a bad prompt");
            assert_eq!(error.param(), Some("prompt"), "{extra}");
        }
    }
}
