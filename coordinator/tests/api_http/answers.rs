//! What a client gets where all goes well.

use std::time::Duration;

use serde_json::{Value, json};
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::Generate;
use shoal_protocol::version::KNOWS_PREFIXES;

use super::client::{get, post};
use super::head::{End, Script};
use super::setup::Setup;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn ask(extra: Value) -> Value {
    merge(
        json!({"model": "demo", "messages": [{"role": "user", "content": "What is 1 plus 2?"}]}),
        extra,
    )
}

fn complete(extra: Value) -> Value {
    merge(json!({"model": "demo", "prompt": "1 plus 2", "max_tokens": 64}), extra)
}

fn merge(mut base: Value, extra: Value) -> Value {
    let (Value::Object(map), Value::Object(extra)) = (&mut base, extra) else {
        panic!("two objects");
    };
    map.extend(extra);
    base
}

/// The text of one choice of a stream.
fn text_of(events: &[Value], index: usize) -> String {
    let of_choice = events
        .iter()
        .flat_map(|event| event["choices"].as_array().expect("choices"))
        .filter(|choice| choice["index"] == index);
    of_choice
        .filter_map(|choice| {
            choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str())
        })
        .collect()
}

#[tokio::test]
async fn with_prefix_affinity_a_prompt_goes_where_its_beginning_went_before() {
    let setup = Setup::with_prefix_affinity().await;
    let tokens = setup.says("3.");
    let script = Script { tokens, pace: Duration::ZERO, end: End::Done(1) };
    let other = setup.another_replica(script);
    // Two conversations of 160 tokens, whose turns alternate; the dice alone would mix them.
    let conversation = |first: u32, turn: u32| {
        let prompt: Vec<u32> =
            (0..160).map(|i| 10 + (first * 160 + i) % 400).chain([turn]).collect();
        complete(json!({"prompt": prompt, "max_tokens": 4}))
    };
    for turn in 0..8 {
        for first in 0..2 {
            let answer = post(setup.http, COMPLETIONS, &conversation(first, 10 + turn)).await;
            assert_eq!(answer.status, 200, "{}", answer.body);
        }
    }
    for first in 0..2 {
        let begins = |request: &&Generate| request.tokens[0] == 10 + first * 160;
        let here = setup.head.requests().iter().filter(begins).count();
        let there = other.requests().iter().filter(begins).count();
        assert!(here == 0 || there == 0, "conversation {first}: {here} here, {there} there");
        assert_eq!(here + there, 8);
    }
}

#[tokio::test]
async fn a_completion_comes_whole_or_in_pieces_and_says_the_same() {
    let setup = Setup::new().await;
    let tokens = setup.says("1 plus 2 is 3. 日本🐟 é").len();
    let prompt = setup.text.encode("1 plus 2", true).expect("plain text").len();
    let whole = post(setup.http, COMPLETIONS, &complete(json!({}))).await;
    assert_eq!(whole.status, 200, "{}", whole.body);
    let id = whole.header("x-request-id").expect("an id").to_owned();
    let whole = whole.json();
    assert_eq!(whole["id"], id);
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["model"], "demo");
    assert!(whole["id"].as_str().expect("an id").starts_with("cmpl-"));
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "1 plus 2 is 3. 日本🐟 é");
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    // The end token counts, as it was generated.
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": tokens + 1,
        "total_tokens": prompt + tokens + 1, "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(whole["usage"], usage);

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (events, done) = post(setup.http, COMPLETIONS, &complete(options)).await.events();
    assert!(done);
    assert_eq!(text_of(&events, 0), "1 plus 2 is 3. 日本🐟 é");
    let (last, chunks) = events.split_last().expect("events");
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["id"] == last["id"]));
    let finishes: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    assert_eq!(finishes.last(), Some(&&json!("stop")));
    assert!(finishes[..finishes.len() - 1].iter().all(|finish| finish.is_null()));
    assert!(chunks.len() > 5, "{} chunks are no stream", chunks.len());
    // Without the option there is no usage at all.
    let (events, done) =
        post(setup.http, COMPLETIONS, &complete(json!({"stream": true}))).await.events();
    assert!(done && events.iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn a_chat_answer_begins_with_its_role() {
    let setup = Setup::new().await;
    setup.says("1 plus 2 is 3.");
    let whole = post(setup.http, CHAT, &ask(json!({}))).await.json();
    assert_eq!(whole["object"], "chat.completion");
    let message = &whole["choices"][0]["message"];
    assert_eq!(
        (&message["role"], &message["content"]),
        (&json!("assistant"), &json!("1 plus 2 is 3."))
    );
    assert_eq!(message["refusal"], Value::Null);
    // The prompt is the template's, and the answer may fill the context.
    let request = setup.head.last_request();
    let rendered = "<|begin|><|user|>What is 1 plus 2?<|end|><|assistant|>";
    assert_eq!(request.tokens, setup.text.encode(rendered, false).expect("plain text"));
    assert_eq!(request.max_tokens as usize + request.tokens.len(), 256);
    assert_eq!(request.stop_tokens, setup.text.end_tokens);

    let (events, done) = post(setup.http, CHAT, &ask(json!({"stream": true}))).await.events();
    assert!(done);
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(text_of(&events, 0), "1 plus 2 is 3.");
    let last = &events.last().expect("events")["choices"][0];
    assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("stop")));
}

#[tokio::test]
async fn every_choice_has_its_own_stream_of_randomness() {
    let setup = Setup::new().await;
    setup.says("ok");
    let body = complete(json!({"prompt": ["a", "b"], "n": 2, "seed": -3, "max_tokens": 1}));
    let whole = post(setup.http, COMPLETIONS, &body).await.json();
    let indices: Vec<_> = (0..4).map(|i| whole["choices"][i]["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    let mut requests = setup.head.requests();
    requests.sort_by_key(|request| request.choice);
    let streams: Vec<u32> = requests.iter().map(|request| request.sampling.stream).collect();
    assert_eq!(streams, [0, 1, 1 << 16, 1 << 16 | 1]);
    assert!(requests.iter().all(|request| request.sampling.seed == -3i64 as u64));
    assert_eq!(requests[0].tokens, requests[1].tokens);
    assert_ne!(requests[0].tokens, requests[2].tokens);
    // In a stream each choice can be told apart.
    let body = complete(json!({"n": 3, "stream": true}));
    let (events, _) = post(setup.http, COMPLETIONS, &body).await.events();
    assert!((0..3).all(|index| text_of(&events, index) == "ok"));
    // Without a seed each request draws its own.
    let seed = setup.head.last_request().sampling.seed;
    post(setup.http, COMPLETIONS, &complete(json!({}))).await;
    assert_ne!(setup.head.last_request().sampling.seed, seed);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_the_sequence() {
    let setup = Setup::new().await;
    let tokens = setup.text.encode("1 plus 2 is 3. 4 plus 5 is 9.", false).expect("plain text");
    // The head would go on: only a cancel ends the sequence.
    setup.head.set(Script { tokens, pace: Default::default(), end: End::Silence });
    let body = complete(json!({"stop": ["never", "3. 4 pl"]}));
    let whole = post(setup.http, COMPLETIONS, &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], "1 plus 2 is ");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!("3. 4 pl"))
    );
    setup.head.sees(|seen| seen.cancelled == 1).await;
    let body = complete(json!({"stop": "3. 4 pl", "stream": true}));
    let (events, done) = post(setup.http, COMPLETIONS, &body).await.events();
    assert!(done);
    assert_eq!(text_of(&events, 0), "1 plus 2 is ");
    setup.head.sees(|seen| seen.cancelled == 2).await;
}

#[tokio::test]
async fn log_probabilities_line_up_with_tokens() {
    let setup = Setup::new().await;
    let tokens = setup.says("é 12");
    let whole = post(setup.http, COMPLETIONS, &complete(json!({"logprobs": 2}))).await.json();
    let logprobs = &whole["choices"][0]["logprobs"];
    let all = |key: &str| logprobs[key].as_array().unwrap_or_else(|| panic!("{logprobs}")).clone();
    assert_eq!(all("tokens").len(), tokens.len());
    assert_eq!(all("token_logprobs")[..2], [json!(-0.5), json!(-1.0)]);
    assert!(
        all("top_logprobs")
            .iter()
            .all(|top| (1..=2).contains(&top.as_object().expect("a map").len()))
    );
    let offsets = all("text_offset");
    assert_eq!(offsets[0], 0);
    let last = all("tokens").last().cloned().expect("tokens");
    let start = "é 12".chars().count() - last.as_str().expect("a text").chars().count();
    assert_eq!(*offsets.last().expect("offsets"), start);

    let body = ask(json!({"logprobs": true, "top_logprobs": 3}));
    let whole = post(setup.http, CHAT, &body).await.json();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().expect("content").clone();
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().expect("bytes"))
        .map(|byte| byte.as_u64().expect("a byte") as u8)
        .collect();
    assert_eq!(String::from_utf8(bytes).expect("the parts make whole characters"), "é 12");
    assert_eq!(content[1]["logprob"], -1.0);
    assert_eq!(content[0]["top_logprobs"].as_array().map(Vec::len), Some(3));
    assert_eq!(content[0]["top_logprobs"][2]["logprob"], -2.5);
    // Streamed: as many in all, and none where none were asked for.
    let body = ask(json!({"logprobs": true, "stream": true}));
    let (events, _) = post(setup.http, CHAT, &body).await.events();
    let streamed = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(streamed.map(Vec::len).sum::<usize>(), tokens.len());
    let plain = post(setup.http, CHAT, &ask(json!({}))).await.json();
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn token_ids_come_as_in_vllm() {
    let setup = Setup::new().await;
    let mut tokens = setup.says("1 plus 2 is 3.");
    tokens.push(1);
    let ids = json!({"return_token_ids": true});
    let whole = post(setup.http, CHAT, &ask(ids.clone())).await.json();
    assert_eq!(whole["choices"][0]["token_ids"], json!(tokens));
    assert_eq!(whole["prompt_token_ids"], json!(setup.head.last_request().tokens));
    let body = complete(json!({"prompt": [[5, 6], [7]], "return_token_ids": true}));
    let whole = post(setup.http, COMPLETIONS, &body).await.json();
    assert_eq!(whole["choices"][1]["prompt_token_ids"], json!([7]));
    for (path, body) in [(CHAT, ask(ids.clone())), (COMPLETIONS, complete(ids))] {
        let body = merge(body, json!({"stream": true}));
        let (events, _) = post(setup.http, path, &body).await.events();
        let streamed: Vec<Value> = events
            .iter()
            .filter_map(|event| event["choices"][0]["token_ids"].as_array())
            .flatten()
            .cloned()
            .collect();
        assert_eq!(json!(streamed), json!(tokens), "{path}");
        let prompts = events.iter().filter(|event| {
            event.get("prompt_token_ids").is_some()
                || event["choices"][0].get("prompt_token_ids").is_some()
        });
        assert_eq!(prompts.count(), 1, "{path}");
    }
}

#[tokio::test]
async fn what_a_head_had_of_a_prompt_stands_in_the_usage() {
    let setup = Setup::new().await;
    setup.head.set(Script { tokens: vec![40], pace: Default::default(), end: End::Done(1) });
    let ask = |more: Value| {
        let body = json!({"model": "org/pretend", "prompt": [[7, 8, 9], [7, 8]], "n": 2,
            "max_tokens": 1});
        let (http, body) = (setup.http, merge(body, more));
        async move { post(http, COMPLETIONS, &body).await }
    };
    let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    // A stage that knows of no blocks that are shared may be there: no tenant is named.
    setup.speak(KNOWS_PREFIXES - 1);
    assert_eq!(cached(&ask(json!({})).await.json()["usage"]), Some(0));
    assert!(setup.head.tenants().iter().all(Option::is_none));
    setup.speak(KNOWS_PREFIXES);
    // Two tokens of the one, one of the other, each prompt counted once as in `prompt_tokens`.
    let whole = ask(json!({})).await.json();
    assert_eq!((cached(&whole["usage"]), &whole["usage"]["prompt_tokens"]), (Some(3), &json!(5)));
    assert!(setup.head.tenants()[4..].iter().all(|tenant| *tenant == Some(Tenant::OPEN)));
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (events, done) = ask(options).await.events();
    assert!(done);
    assert_eq!(cached(&events.last().expect("events")["usage"]), Some(3));
}

#[tokio::test]
async fn a_model_without_text_takes_and_gives_token_ids() {
    let setup = Setup::new().await;
    setup.head.set(Script {
        tokens: vec![40, 41, 42],
        pace: Default::default(),
        end: End::Done(1),
    });
    let body = json!({"model": "org/pretend", "prompt": [7, 8], "max_tokens": 3, "return_token_ids": true});
    let whole = post(setup.http, COMPLETIONS, &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!((&choice["text"], &choice["token_ids"]), (&json!(""), &json!([40, 41, 42])));
    assert_eq!(whole["usage"]["total_tokens"], 5);
    let refused =
        post(setup.http, COMPLETIONS, &json!({"model": "org/pretend", "prompt": "x"})).await;
    assert_eq!(refused.status, 400);
}

#[tokio::test]
async fn sampling_and_ends_reach_the_head() {
    let setup = Setup::new().await;
    setup.says("ok");
    let body = complete(json!({"temperature": 0.25, "top_p": 0.5, "top_k": 4, "seed": 9,
        "presence_penalty": 0.5, "frequency_penalty": 1, "repetition_penalty": 1.25,
        "stop_token_ids": [77], "ignore_eos": true, "logprobs": 1}));
    post(setup.http, COMPLETIONS, &body).await;
    let request = setup.head.last_request();
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.seed), (0.25, 0.5, 4, 9));
    assert_eq!((s.presence_penalty, s.frequency_penalty, s.repetition_penalty), (0.5, 1.0, 1.25));
    assert_eq!((s.logprobs, request.stop_tokens, request.max_tokens), (1, vec![77], 64));
    assert!(request.deadline_ms > 590_000 && request.deadline_ms <= 600_000);
}

#[tokio::test]
async fn models_health_and_metrics_tell_what_is_there() {
    let setup = Setup::new().await;
    setup.says("ok");
    let list = get(setup.http, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(
        (&list["data"][0]["id"], &list["data"][1]["id"]),
        (&json!("demo"), &json!("org/pretend"))
    );
    assert_eq!(list["data"][0]["created"], 1_700_000_000);
    for path in ["/v1/models/org/pretend", "/v1/models/org%2Fpretend"] {
        let one = get(setup.http, path).await.json();
        assert_eq!((&one["id"], &one["object"]), (&json!("org/pretend"), &json!("model")));
    }
    assert_eq!(get(setup.http, "/health").await.status, 200);
    let ready = get(setup.http, "/ready").await;
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("ready")));
    post(setup.http, COMPLETIONS, &complete(json!({}))).await;
    post(setup.http, COMPLETIONS, &complete(json!({"n": 99}))).await;
    let metrics = get(setup.http, "/metrics").await.body;
    for line in [
        "vllm:request_success_total{finished_reason=\"stop\",model_name=\"demo\"} 1",
        "vllm:num_requests_running{model_name=\"demo\"} 0",
        "shoal_sequences_open{model_name=\"demo\"} 0",
        "shoal_http_requests_total{reason=\"ok\",route=\"/v1/completions\",status=\"200\"} 1",
        "shoal_http_requests_total{reason=\"invalid_request\",route=\"/v1/completions\",status=\"400\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "no `{line}` in\n{metrics}");
    }
    assert!(metrics.contains("vllm:time_to_first_token_seconds_count{model_name=\"demo\"} 1"));
}
