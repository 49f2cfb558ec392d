//! ○ What a model's own files say about drawing and ending: `generation_config.json` and its kin.

use serde_json::Value;
use shoal_protocol::id::TokenId;
use shoal_protocol::request::{NO_LOGPROBS, SamplingRecord};

use super::validate::Wanted;

/// The values that hold where a client says nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// 0 where the model says `do_sample: false`.
    pub temperature: f32,
    /// In (0, 1].
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// Above 0.
    pub repetition_penalty: f32,
}

impl Default for Defaults {
    /// OpenAI's.
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0 }
    }
}

impl Defaults {
    /// Reads a `generation_config.json`. Values that could not be asked for are not taken.
    pub fn read(config: &Value) -> Self {
        let plain = Self::default();
        let number = |name: &str, fallback: f32, ok: fn(f64) -> bool| {
            config
                .get(name)
                .and_then(Value::as_f64)
                .filter(|x| ok(*x))
                .map_or(fallback, |x| x as f32)
        };
        let greedy = config.get("do_sample") == Some(&Value::Bool(false));
        Self {
            temperature: match greedy {
                true => 0.0,
                false => number("temperature", plain.temperature, |x| (0.0..=2.0).contains(&x)),
            },
            top_p: number("top_p", plain.top_p, |x| x > 0.0 && x <= 1.0),
            top_k: config.get("top_k").and_then(Value::as_u64).map_or(plain.top_k, |k| k as u32),
            repetition_penalty: number("repetition_penalty", plain.repetition_penalty, |x| {
                x > 0.0 && x <= 100.0
            }),
        }
    }

    /// What goes to the head: the client's wishes over these defaults. `seed` is the one drawn for
    /// the request; a client's own comes before it. The stream of randomness is filled in for each
    /// choice.
    pub fn sampling(&self, wanted: &Wanted, logprobs: Option<u32>, seed: u64) -> SamplingRecord {
        SamplingRecord {
            // The bits of the number: each seed, negative ones too, is another one.
            seed: wanted.seed.map_or(seed, |seed| seed as u64),
            temperature: wanted.temperature.unwrap_or(self.temperature),
            top_p: wanted.top_p.unwrap_or(self.top_p),
            top_k: wanted.top_k.unwrap_or(self.top_k),
            repetition_penalty: wanted.repetition_penalty.unwrap_or(self.repetition_penalty),
            presence_penalty: wanted.presence_penalty,
            frequency_penalty: wanted.frequency_penalty,
            logprobs: logprobs.unwrap_or(NO_LOGPROBS),
            stream: 0,
        }
    }
}

/// The end tokens of a config: `eos_token_id` is a number or a list.
pub fn end_tokens(config: &Value) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A special token of a `tokenizer_config.json`: a text, or an object with `content`.
pub fn special_token(config: &Value, name: &str) -> Option<String> {
    let token = config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// The chat template of a `tokenizer_config.json`: a text, or a list of named ones of which
/// `default` is meant.
pub fn chat_template(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry.get("name") == Some(&"default".into()))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_models_defaults_hold_until_the_client_speaks() {
        let check = |config: Value, wanted: Wanted, expected: (f32, f32, u32, f32)| {
            let s = Defaults::read(&config).sampling(&wanted, None, 7);
            assert_eq!((s.temperature, s.top_p, s.top_k, s.repetition_penalty), expected);
        };
        let nothing = Wanted::default();
        check(json!({}), nothing, (1.0, 1.0, 0, 1.0));
        let config =
            json!({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05});
        check(config.clone(), nothing, (0.7, 0.8, 20, 1.05));
        let all = Wanted {
            temperature: Some(0.0),
            top_p: Some(1.0),
            top_k: Some(0),
            repetition_penalty: Some(1.0),
            ..nothing
        };
        check(config, all, (0.0, 1.0, 0, 1.0));
        check(json!({"do_sample": false, "temperature": 0.6}), nothing, (0.0, 1.0, 0, 1.0));
        // Nonsense in a file never reaches the wire.
        check(json!({"top_p": 0, "temperature": "hot", "top_k": -1}), nothing, (1.0, 1.0, 0, 1.0));
    }

    #[test]
    fn a_clients_seed_comes_before_the_drawn_one() {
        let seed =
            |seed| Defaults::default().sampling(&Wanted { seed, ..Wanted::default() }, Some(3), 7);
        assert_eq!((seed(None).seed, seed(None).logprobs), (7, 3));
        assert_eq!(seed(Some(-1)).seed, u64::MAX);
    }

    #[test]
    fn ends_tokens_and_templates_come_in_two_shapes() {
        assert_eq!(end_tokens(&json!({"eos_token_id": 2})), [2]);
        assert_eq!(end_tokens(&json!({"eos_token_id": [2, 7]})), [2, 7]);
        assert_eq!(end_tokens(&json!({"eos_token_id": null})), [0u32; 0]);
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
        assert_eq!(special_token(&config, "bos_token").as_deref(), Some("<s>"));
        assert_eq!(special_token(&config, "eos_token").as_deref(), Some("</s>"));
        assert_eq!(special_token(&config, "pad_token"), None);
        let named = json!({"chat_template": [
            {"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]});
        assert_eq!(chat_template(&named).as_deref(), Some("yes"));
        assert_eq!(chat_template(&json!({"chat_template": "x"})).as_deref(), Some("x"));
        assert_eq!(chat_template(&json!({})), None);
    }
}
