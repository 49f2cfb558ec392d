use serde_json::json;
use shoal_protocol::error::ErrorCode;

use super::*;

fn completions(extra: Value) -> Result<ValidRequest, Refusal> {
    with(Endpoint::Completions, json!({"model": "m", "prompt": "p"}), extra)
}

fn chat(extra: Value) -> Result<ValidRequest, Refusal> {
    let base = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    with(Endpoint::Chat, base, extra)
}

fn with(endpoint: Endpoint, mut base: Value, extra: Value) -> Result<ValidRequest, Refusal> {
    let (Value::Object(base_map), Value::Object(extra)) = (&mut base, extra) else {
        panic!("two objects");
    };
    base_map.extend(extra);
    parse(endpoint, base.to_string().as_bytes())
}

/// The refusal names `param` and says `part`.
fn refused(found: Result<ValidRequest, Refusal>, param: &str, part: &str) {
    let refusal = found.expect_err(param);
    assert_eq!(refusal.param(), Some(param), "{refusal}");
    assert!(refusal.to_string().contains(part), "{refusal}");
}

#[test]
fn a_bare_request_has_openais_defaults() {
    let request = completions(json!({})).expect("a valid request");
    assert_eq!(
        request,
        ValidRequest {
            model: "m".to_owned(),
            input: Input::Prompts(vec![Prompt::Text("p".to_owned())]),
            n: 1,
            max_tokens: Some(16),
            sampling: Wanted::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            return_token_ids: false,
            add_special_tokens: true,
            stream: None,
        }
    );
    let request = chat(json!({})).expect("a valid request");
    assert_eq!((request.max_tokens, request.add_special_tokens), (None, false));
}

#[test]
fn every_served_parameter_arrives() {
    let request = chat(json!({
        "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "n": 3,
        "seed": -4, "stop": ["a", "b"], "stop_token_ids": [5], "presence_penalty": -1.5,
        "frequency_penalty": 2, "repetition_penalty": 1.5, "logprobs": true, "top_logprobs": 4,
        "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true,
        "return_token_ids": true, "add_special_tokens": true, "add_generation_prompt": false,
    }))
    .expect("a valid request");
    assert_eq!(
        request.sampling,
        Wanted {
            temperature: Some(0.5),
            top_p: Some(0.25),
            top_k: Some(7),
            repetition_penalty: Some(1.5),
            presence_penalty: -1.5,
            frequency_penalty: 2.0,
            seed: Some(-4),
        }
    );
    assert_eq!((request.n, request.max_tokens, request.logprobs), (3, Some(9), Some(4)));
    assert_eq!((request.stop.len(), request.stop_token_ids), (2, vec![5]));
    assert!(request.ignore_eos && request.return_token_ids && request.add_special_tokens);
    assert_eq!(request.stream, Some(StreamOptions { include_usage: true }));
    assert!(matches!(request.input, Input::Chat { add_generation_prompt: false, .. }));
}

#[test]
fn prompts_come_in_four_shapes() {
    let prompts = |prompt: Value| match completions(json!({"prompt": prompt})) {
        Ok(ValidRequest { input: Input::Prompts(prompts), .. }) => Ok(prompts),
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal.param().map(str::to_owned)),
    };
    let text = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(prompts(json!("a")), Ok(vec![text("a")]));
    assert_eq!(prompts(json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
    assert_eq!(prompts(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
    let two = vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])];
    assert_eq!(prompts(json!([[1], [2, 3]])), Ok(two));
    for (bad, param) in [
        (json!([]), "prompt"),
        (json!(7), "prompt"),
        (json!([1, "a"]), "prompt[1]"),
        (json!(["a", 1]), "prompt[1]"),
        (json!([[]]), "prompt[0]"),
        (json!([-1]), "prompt[0]"),
        (json!([1.5]), "prompt[0]"),
        (json!([4_294_967_296_u64]), "prompt[0]"),
        (json!(vec!["x"; 65]), "prompt"),
    ] {
        assert_eq!(prompts(bad.clone()), Err(Some(param.to_owned())), "{bad}");
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    for (name, value) in [
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("top_p", json!(1e-60)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(17)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("seed", json!(9_223_372_036_854_775_808_u64)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("stop", json!([1])),
        ("stop_token_ids", json!("5")),
        ("stop_token_ids", json!(vec![1; 33])),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("stream", json!("yes")),
        ("ignore_eos", json!(1)),
        ("prompt", json!(null)),
        ("model", json!(null)),
        ("model", json!(3)),
    ] {
        refused(completions(json!({ name: value })), name, "");
    }
    refused(chat(json!({"logprobs": 3})), "logprobs", "true or false");
    refused(chat(json!({"logprobs": true, "top_logprobs": 21})), "top_logprobs", "20");
    refused(chat(json!({"top_logprobs": 3})), "top_logprobs", "`logprobs`: true");
    refused(completions(json!({"prompt": vec!["x"; 33], "n": 2})), "n", "66 answers");
    refused(chat(json!({"max_tokens": 1, "max_completion_tokens": 2})), "max_tokens", "one of");
    let both = chat(json!({"max_tokens": 2, "max_completion_tokens": 2}));
    assert_eq!(both.expect("the same twice").max_tokens, Some(2));
    assert_eq!(completions(json!({"top_k": -1})).expect("all").sampling.top_k, Some(0));
}

#[test]
fn what_comes_later_is_refused_by_name_and_neutral_values_are_taken() {
    for (name, neutral, asking) in [
        ("response_format", json!({"type": "text"}), json!({"type": "json_object"})),
        ("tools", json!([]), json!([{"type": "function"}])),
        ("tool_choice", json!("auto"), json!("required")),
        ("parallel_tool_calls", json!(true), json!(1)),
        ("logit_bias", json!({}), json!({"50256": -100})),
        ("min_p", json!(0.0), json!(0.1)),
        ("min_tokens", json!(0), json!(3)),
        ("prompt_logprobs", json!(null), json!(1)),
        ("include_stop_str_in_output", json!(false), json!(true)),
        ("skip_special_tokens", json!(true), json!(false)),
        ("echo", json!(false), json!(true)),
        ("modalities", json!(["text"]), json!(["text", "audio"])),
        ("chat_template_kwargs", json!({}), json!({"enable_thinking": false})),
        ("continue_final_message", json!(false), json!(true)),
        ("structured_outputs", json!(null), json!({"regex": "a"})),
        ("use_beam_search", json!(false), json!(true)),
        ("service_tier", json!("auto"), json!("priority")),
    ] {
        assert!(chat(json!({ name: neutral.clone() })).is_ok(), "{name}: {neutral}");
        let found = chat(json!({ name: asking }));
        assert_eq!(found.as_ref().expect_err(name).code(), ErrorCode::Unsupported);
        refused(found, name, "not supported yet");
    }
    refused(completions(json!({"suffix": "tail"})), "suffix", "not supported yet");
    refused(completions(json!({"best_of": 2})), "best_of", "not supported yet");
    assert!(completions(json!({"best_of": 2, "n": 2})).is_ok());
    for name in ["user", "metadata", "store", "safety_identifier", "prompt_cache_key"] {
        assert!(chat(json!({ name: "anything" })).is_ok(), "{name}");
    }
    refused(chat(json!({"temprature": 1})), "temprature", "not a known parameter");
    refused(chat(json!({"prompt": "x"})), "prompt", "not a known parameter");
    let options = |options: Value| chat(json!({"stream": true, "stream_options": options}));
    refused(options(json!({"include_usages": true})), "stream_options.include_usages", "known");
    let name = "stream_options.continuous_usage_stats";
    refused(options(json!({"continuous_usage_stats": true})), name, "not supported yet");
    refused(options(json!(1)), "stream_options", "object");
    refused(chat(json!({"stream_options": {}})), "stream_options", "`stream`: true");
    assert_eq!(chat(json!({"stream_options": null})).expect("null is absent").stream, None);
}

#[test]
fn messages_hold_text_alone() {
    let messages = |messages: Value| match chat(json!({ "messages": messages })) {
        Ok(ValidRequest { input: Input::Chat { messages, .. }, .. }) => {
            Ok(messages.into_iter().map(|m| (m.role, m.content)).collect::<Vec<_>>())
        }
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal),
    };
    let parts = json!([{"role": "user", "content": [
        {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(messages(parts), Ok(vec![("user".to_owned(), "a\nb".to_owned())]));
    // An answer as the openai package dumps it.
    let echoed = json!([{"role": "assistant", "content": "a", "refusal": null, "annotations": [],
        "audio": null, "function_call": null, "tool_calls": null}]);
    assert_eq!(messages(echoed), Ok(vec![("assistant".to_owned(), "a".to_owned())]));
    for (bad, param) in [
        (json!([]), "messages"),
        (json!("hi"), "messages"),
        (json!(["hi"]), "messages[0]"),
        (json!([{"content": "x"}]), "messages[0].role"),
        (json!([{"role": "pirate", "content": "x"}]), "messages[0].role"),
        (json!([{"role": "tool", "content": "x"}]), "messages[0].role: tool"),
        (json!([{"role": "user"}]), "messages[0].content"),
        (json!([{"role": "user", "content": null}]), "messages[0].content"),
        (json!([{"role": "user", "content": 3}]), "messages[0].content"),
        (json!([{"role": "user", "content": "x", "mood": "good"}]), "messages[0].mood"),
        (
            json!([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
            "messages[0].tool_calls",
        ),
        (
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content[0].type: image_url",
        ),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
    ] {
        let refusal = messages(bad.clone()).expect_err("a bad message");
        assert_eq!(refusal.param(), Some(param), "{bad}: {refusal}");
    }
}

#[test]
fn bodies_that_are_no_json_object_say_where() {
    let refusal = parse(Endpoint::Chat, b"{\"model\": \"m\",\n \"n\": }").expect_err("broken");
    assert!(refusal.to_string().contains("line 2 column 7"), "{refusal}");
    assert!(matches!(parse(Endpoint::Chat, b"[]"), Err(Refusal::NotAnObject("a list"))));
    assert!(parse(Endpoint::Chat, b"").is_err());
    assert!(parse(Endpoint::Chat, b"{\"model\": \"\xff\"}").is_err());
    // Nesting has a bound: a recursive parser must not run out of stack.
    let deep = "[".repeat(100_000);
    assert!(matches!(parse(Endpoint::Chat, deep.as_bytes()), Err(Refusal::Json(_))));
}
