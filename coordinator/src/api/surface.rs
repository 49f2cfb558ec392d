//! ○ Every parameter that OpenAI's and vLLM's clients send, and what becomes of it. What is not in
//! this table is unknown and refused; nothing is dropped silently.

use serde_json::Value;

/// Which of the two generating endpoints a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// What becomes of a parameter.
#[derive(Clone, Copy)]
pub enum Rule {
    /// It is read and honoured.
    Served,
    /// By its own definition it does not change the answer (a caller's label, say).
    Ignored,
    /// Only the value that asks for nothing is taken: the check, and that value for people.
    Neutral(fn(&Value) -> bool, &'static str),
}

/// The rule for `name` at `endpoint`; `None` where no such parameter exists. `null` is always the
/// same as leaving a parameter out.
pub fn rule(endpoint: Endpoint, name: &str) -> Option<Rule> {
    let own = match endpoint {
        Endpoint::Completions => COMPLETIONS,
        Endpoint::Chat => CHAT,
    };
    BOTH.iter().chain(own).find(|(known, _)| *known == name).map(|(_, rule)| *rule)
}

use Rule::{Ignored, Neutral, Served};

/// Known, but not even a neutral value exists.
const LATER: Rule = Neutral(|_| false, "null");
const FALSE: Rule = Neutral(|value| *value == Value::Bool(false), "false");
const TRUE: Rule = Neutral(|value| *value == Value::Bool(true), "true");
const ZERO: Rule = Neutral(|value| value.as_f64() == Some(0.0), "0");
const ONE: Rule = Neutral(|value| value.as_f64() == Some(1.0), "1");
const EMPTY_LIST: Rule = Neutral(|value| value.as_array().is_some_and(Vec::is_empty), "[]");
const EMPTY_MAP: Rule =
    Neutral(|value| value.as_object().is_some_and(serde_json::Map::is_empty), "{}");
const EMPTY_TEXT: Rule = Neutral(|value| value == "", "\"\"");
const NONE_TEXT: Rule = Neutral(|value| value == "none", "\"none\"");

const BOTH: &[(&str, Rule)] = &[
    ("model", Served),
    ("n", Served),
    ("max_tokens", Served),
    ("temperature", Served),
    ("top_p", Served),
    ("top_k", Served),
    ("seed", Served),
    ("stop", Served),
    ("stop_token_ids", Served),
    ("presence_penalty", Served),
    ("frequency_penalty", Served),
    ("repetition_penalty", Served),
    ("logprobs", Served),
    ("ignore_eos", Served),
    ("stream", Served),
    ("stream_options", Served),
    ("return_token_ids", Served),
    ("add_special_tokens", Served),
    // Labels of the caller's: OpenAI documents them as without influence on the answer.
    ("user", Ignored),
    ("metadata", Ignored),
    ("safety_identifier", Ignored),
    ("prompt_cache_key", Ignored),
    // Storing an answer is for the caller's dashboard; nothing is kept here either way.
    ("store", Ignored),
    ("service_tier", Neutral(|value| value == "auto" || value == "default", "\"auto\"")),
    ("logit_bias", EMPTY_MAP),
    ("echo", FALSE),
    ("min_p", ZERO),
    ("min_tokens", ZERO),
    ("length_penalty", ONE),
    ("use_beam_search", FALSE),
    ("include_stop_str_in_output", FALSE),
    ("skip_special_tokens", TRUE),
    ("spaces_between_special_tokens", TRUE),
    ("truncate_prompt_tokens", LATER),
    ("prompt_logprobs", LATER),
    ("allowed_token_ids", LATER),
    ("bad_words", EMPTY_LIST),
    ("response_format", Neutral(is_text_format, "{\"type\": \"text\"}")),
    ("structured_outputs", LATER),
    ("guided_json", LATER),
    ("guided_regex", LATER),
    ("guided_choice", LATER),
    ("guided_grammar", LATER),
    ("guided_decoding_backend", LATER),
    ("guided_whitespace_pattern", LATER),
    ("logits_processors", EMPTY_LIST),
    ("return_tokens_as_token_ids", FALSE),
    ("priority", ZERO),
    ("request_id", LATER),
    ("session_id", LATER),
    ("cache_salt", LATER),
    ("kv_transfer_params", LATER),
    ("vllm_xargs", EMPTY_MAP),
    // SGLang's.
    ("regex", LATER),
    ("ebnf", LATER),
    ("json_schema", LATER),
    ("stop_regex", LATER),
    ("no_stop_trim", FALSE),
    ("lora_path", LATER),
    ("session_params", LATER),
    ("rid", LATER),
    ("return_hidden_states", FALSE),
];

const COMPLETIONS: &[(&str, Rule)] = &[
    ("prompt", Served),
    // Checked against `n`: as many drawn as returned asks for nothing more.
    ("best_of", Served),
    ("suffix", EMPTY_TEXT),
    ("prompt_embeds", LATER),
];

const CHAT: &[(&str, Rule)] = &[
    ("messages", Served),
    ("max_completion_tokens", Served),
    ("top_logprobs", Served),
    ("add_generation_prompt", Served),
    ("continue_final_message", FALSE),
    ("tools", EMPTY_LIST),
    ("tool_choice", Neutral(|value| value == "none" || value == "auto", "\"none\"")),
    // Without tools there are no calls to make in parallel.
    ("parallel_tool_calls", Neutral(Value::is_boolean, "true or false")),
    ("functions", EMPTY_LIST),
    ("function_call", Neutral(|value| value == "none" || value == "auto", "\"none\"")),
    ("reasoning_effort", NONE_TEXT),
    ("include_reasoning", TRUE),
    ("separate_reasoning", FALSE),
    ("modalities", Neutral(|value| *value == serde_json::json!(["text"]), "[\"text\"]")),
    ("audio", LATER),
    ("prediction", LATER),
    ("web_search_options", LATER),
    ("verbosity", Neutral(|value| value == "medium", "\"medium\"")),
    ("documents", EMPTY_LIST),
    ("chat_template", LATER),
    ("chat_template_kwargs", EMPTY_MAP),
    ("mm_processor_kwargs", EMPTY_MAP),
    ("media_io_kwargs", EMPTY_MAP),
];

fn is_text_format(value: &Value) -> bool {
    value.as_object().is_some_and(|map| map.len() == 1 && map.get("type") == Some(&"text".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_parameter_stands_twice() {
        for own in [CHAT, COMPLETIONS] {
            let mut names: Vec<_> = BOTH.iter().chain(own).map(|(name, _)| *name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn endpoints_know_their_own_parameters() {
        assert!(rule(Endpoint::Chat, "messages").is_some());
        assert!(rule(Endpoint::Completions, "messages").is_none());
        assert!(rule(Endpoint::Completions, "prompt").is_some());
        assert!(rule(Endpoint::Chat, "prompt").is_none());
        assert!(rule(Endpoint::Chat, "temprature").is_none());
    }
}
