//! Adapters as models of their own: named by clients, answered by their base model's replicas that have
//! them.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use shoal_coordinator::serving::{ServedAdapter, ServingTable};
use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::{AdapterId, DeploymentName};

use super::client::{get, post};
use super::head::{End, Script};
use super::setup::Setup;

const COMPLETIONS: &str = "/v1/completions";

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).expect("a name")
}

/// Puts adapter `fish` beside `demo`, at its last replica alone.
fn serve_fish(setup: &Setup, number: u32) {
    serve_fish_of(setup, number, 7);
}

/// The same, whose files are these.
fn serve_fish_of(setup: &Setup, number: u32, files: u8) {
    let mut table = ServingTable::clone(&setup.table.borrow());
    let demo = table.deployments[&name("demo")].as_ref().clone();
    let last = demo.replicas.len() - 1;
    let fingerprint = [files; 32];
    let adapter = ServedAdapter { id: AdapterId(number), fingerprint, base: name("demo") };
    let mut fish = demo;
    (fish.name, fish.adapter, fish.created) = (name("fish"), Some(adapter), 1_700_000_009);
    fish.replicas.iter_mut().take(last).for_each(|replica| replica.ready = false);
    table.adapters.insert(name("fish"), Arc::new(fish));
    setup.table.send_replace(Arc::new(table));
}

fn ask(model: &str) -> Value {
    json!({"model": model, "prompt": "1 plus 2", "max_tokens": 8})
}

#[tokio::test]
async fn a_request_for_an_adapter_goes_where_it_is_with_its_number() {
    let setup = Setup::new().await;
    let tokens = setup.says("3.");
    let other = setup.another_replica(Script { tokens, pace: Duration::ZERO, end: End::Done(1) });
    serve_fish(&setup, 5);
    for _ in 0..6 {
        let answer = post(setup.http, COMPLETIONS, &ask("fish")).await;
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!("fish")));
    }
    assert!(setup.head.requests().is_empty(), "it has no such adapter");
    let asked = other.requests();
    assert_eq!(asked.len(), 6);
    assert!(asked.iter().all(|request| request.adapter == Some(AdapterId(5))), "{asked:?}");
    for _ in 0..6 {
        assert_eq!(post(setup.http, COMPLETIONS, &ask("demo")).await.status, 200);
    }
    let of_base = setup.head.requests().len() + other.requests().len() - 6;
    assert_eq!(of_base, 6);
    let with_number = |head: &super::head::Head| {
        head.requests().iter().filter(|request| request.adapter.is_some()).count()
    };
    assert_eq!((with_number(&setup.head), with_number(&other)), (0, 6));
}

#[tokio::test]
async fn an_answer_of_an_adapter_goes_on_with_the_same_number() {
    let setup = Setup::new().await;
    let tokens = setup.says("3 is the answer.");
    let cut = Script { tokens: tokens[..2].to_vec(), pace: Duration::ZERO, end: End::Cut };
    setup.head.set_first([cut]);
    serve_fish(&setup, 5);
    let answer = post(setup.http, COMPLETIONS, &ask("fish")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let numbers: Vec<_> = setup.head.requests().iter().map(|request| request.adapter).collect();
    assert_eq!(numbers, [Some(AdapterId(5)), Some(AdapterId(5))]);
}

#[tokio::test]
async fn an_answer_whose_adapter_goes_ends_with_words_about_it_and_never_with_another_ones() {
    let unloaded = |setup: &Setup| {
        let mut table = ServingTable::clone(&setup.table.borrow());
        table.adapters.clear();
        setup.table.send_replace(Arc::new(table));
    };
    // The same name and number, as after a restore, but not the same files.
    let replaced = |setup: &Setup| serve_fish_of(setup, 5, 8);
    let not_finite = End::Failed(ErrorCode::ComputeFailed, "numbers that are not finite");
    type Change<'a> = &'a dyn Fn(&Setup);
    let cases: [(&str, End, Change<'_>); 3] = [
        ("it waited, or was preempted", not_finite, &unloaded),
        ("its head was lost", End::Cut, &unloaded),
        ("its head was lost", End::Cut, &replaced),
    ];
    for (case, end, change) in cases {
        let setup = Setup::new().await;
        let tokens = setup.says("3 is the answer.");
        let pace = Duration::from_millis(100);
        setup.head.set_first([Script { tokens: tokens[..2].to_vec(), pace, end }]);
        serve_fish(&setup, 5);
        let http = setup.http;
        let asked = tokio::spawn(async move { post(http, COMPLETIONS, &ask("fish")).await });
        setup.head.sees(|seen| seen.requests.len() == 1).await;
        change(&setup);
        let answer = asked.await.expect("no panic");
        assert_eq!(answer.status, 404, "{case}: {}", answer.body);
        let words = "the adapter `fish` was unloaded before the answer could end";
        assert!(answer.body.contains(words), "{case}: {}", answer.body);
        assert_eq!(setup.head.requests().len(), 1, "{case}: nobody else is asked");
    }
}

#[tokio::test]
async fn models_list_adapters_with_their_base_and_what_is_gone_is_not_found() {
    let setup = Setup::new().await;
    setup.says("3.");
    serve_fish(&setup, 5);
    let all = get(setup.http, "/v1/models").await.json();
    let fish = all["data"].as_array().expect("a list").iter().find(|model| model["id"] == "fish");
    let fish = fish.expect("the adapter");
    assert_eq!((&fish["parent"], &fish["root"]), (&json!("demo"), &json!("demo")));
    assert_eq!(get(setup.http, "/v1/models/fish").await.status, 200);
    let mut table = ServingTable::clone(&setup.table.borrow());
    table.adapters.clear();
    setup.table.send_replace(Arc::new(table));
    let gone = post(setup.http, COMPLETIONS, &ask("fish")).await;
    assert_eq!((gone.status, &gone.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn an_adapter_that_cannot_be_had_says_why_at_once() {
    let setup = Setup::new().await;
    serve_fish(&setup, 5);
    let mut table = ServingTable::clone(&setup.table.borrow());
    let fish = Arc::make_mut(table.adapters.get_mut(&name("fish")).expect("the adapter"));
    fish.replicas[0].ready = false;
    fish.phase = DeploymentPhase::Failed;
    fish.reason = "w1 cannot load it for r1: no such folder".to_owned();
    setup.table.send_replace(Arc::new(table));
    let refused = post(setup.http, COMPLETIONS, &ask("fish")).await;
    assert_eq!(refused.status, 503);
    assert!(refused.body.contains("no such folder"), "{}", refused.body);
}

#[tokio::test]
async fn clients_change_nothing_where_nobody_said_that_they_may() {
    let setup = Setup::new().await;
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let body = json!({"lora_name": "fish", "lora_path": "/fish"});
        let shut = post(setup.http, path, &body).await;
        assert_eq!(shut.status, 403, "{path}");
        assert!(shut.body.contains("--allow-runtime-adapters"), "{}", shut.body);
    }
}
