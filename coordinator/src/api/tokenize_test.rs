use super::*;
use crate::api::stream::TextStream;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn demo() -> ModelText {
    ModelText::load(&root().join("cluster/demo-model")).expect("the demo model's text side")
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned(), name: None }
}

#[derive(serde::Deserialize)]
struct DetokFile {
    tokenizer: PathBuf,
    cases: Vec<DetokCase>,
}

#[derive(serde::Deserialize)]
struct DetokCase {
    note: String,
    ids: Vec<TokenId>,
    skip_special_tokens: bool,
    text: String,
}

/// What a stream gives where a decoder with byte fallback, which sees all at once, gives up a whole
/// run of bytes: the characters that were complete stay.
fn streamed(tokenizer: &Path, case: &DetokCase) -> String {
    if !tokenizer.ends_with("sentencepiece-style/tokenizer.json") {
        return case.text.clone();
    }
    match case.note.as_str() {
        "ends within a character" => "漢字\u{fffd}\u{fffd}\u{fffd}".to_owned(),
        "a broken character between whole ones" => "漢字\u{fffd}\u{fffd} ok".to_owned(),
        _ => case.text.clone(),
    }
}

#[test]
fn streams_add_up_to_what_decoding_at_once_gives() {
    let folder = root().join("tests/fixtures/detok");
    let mut cases = 0;
    for entry in std::fs::read_dir(&folder).expect("tests/fixtures/detok is there") {
        let path = entry.expect("a readable folder").path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let file: DetokFile =
            serde_json::from_slice(&std::fs::read(&path).expect("readable")).expect("a detok file");
        let folder = root().join(&file.tokenizer);
        let text = ModelText::load(folder.parent().expect("a folder")).expect("a tokenizer");
        for case in file.cases.iter().filter(|case| case.skip_special_tokens) {
            let mut stream = TextStream::new(Vec::new());
            let mut found = String::new();
            for id in &case.ids {
                let delta = stream.push(*id, &text).text;
                found.push_str(&delta);
            }
            found.push_str(&stream.finish(&text).text);
            assert_eq!(found, streamed(&file.tokenizer, case), "{}: {}", path.display(), case.note);
            cases += 1;
        }
    }
    assert!(cases >= 30, "only {cases} cases in {}", folder.display());
}

#[test]
fn the_bytes_of_single_tokens_add_up_to_the_text() {
    for (folder, text, skip) in [
        ("cluster/demo-model", " 日本 47 é🐟", 0),
        ("tests/fixtures/models/qwen2-tied-bf16", " 日本 47 é🐟", 0),
        // SentencePiece puts a space before the first word.
        ("tests/fixtures/detok/sentencepiece-style", "日本 47 é🐟", 1),
    ] {
        let model = ModelText::load(&root().join(folder)).expect("a tokenizer");
        let ids = model.encode(text, false).expect("plain text");
        let bytes: Vec<u8> = ids.iter().flat_map(|id| model.token_bytes(*id)).collect();
        assert_eq!(String::from_utf8_lossy(&bytes[skip..]), text, "{folder}");
        assert!(model.token_bytes(u32::MAX).is_empty());
    }
}

#[test]
fn special_tokens_stand_once_in_a_chat_prompt() {
    let demo = demo();
    let ids = demo.encode_chat(&[message("user", "What is 1 plus 2?")], true, false, 0);
    let ids = ids.expect("the demo model chats");
    let begin = demo.tokenizer.token_to_id("<|begin|>").expect("a token");
    assert_eq!(ids.iter().filter(|id| **id == begin).count(), 1);
    assert_eq!(ids[0], begin);
    let end = demo.tokenizer.token_to_id("<|end|>").expect("a token");
    assert!(demo.end_tokens.contains(&end));
    assert_eq!(demo.token_bytes(begin), b"<|begin|>");
    let refused = demo.encode_chat(&[message("pirate", "Arr")], true, false, 0);
    assert!(
        matches!(refused, Err(EncodeError::Template(TemplateError::Refused(_)))),
        "{refused:?}"
    );
}

#[test]
fn a_model_without_template_says_where_to_go() {
    let model = ModelText::load(&root().join("tests/fixtures/detok/sentencepiece-style"));
    let error = model
        .expect("a tokenizer is enough")
        .encode_chat(&[message("user", "x")], true, false, 0)
        .expect_err("there is no template");
    assert!(error.to_string().contains("/v1/completions"), "{error}");
}

#[test]
fn faults_name_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let check = |name: &str| {
        let error = ModelText::load(folder.path()).expect_err("a broken folder").to_string();
        assert!(error.contains(name), "{error}");
    };
    let write = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).expect("a writable folder");
    };
    check("tokenizer.json");
    write("tokenizer.json", "{");
    check("tokenizer.json");
    let good = root().join("cluster/demo-model/tokenizer.json");
    std::fs::copy(good, folder.path().join("tokenizer.json")).expect("a copy");
    write("generation_config.json", "{\"eos_token_id\": ");
    check("generation_config.json");
    write("generation_config.json", "{\"eos_token_id\": [7]}");
    write("chat_template.jinja", "{% if %}");
    check("chat_template.jinja");
    write("chat_template.jinja", "{{ messages[0].content }}");
    let model = ModelText::load(folder.path()).expect("a good folder");
    assert_eq!(model.end_tokens, [7]);
    assert!(model.encode_chat(&[message("user", "1")], true, false, 0).is_ok());
}

#[tokio::test]
async fn a_deployment_is_loaded_once_and_forgotten_when_unused() {
    let texts = ModelTexts::new(1);
    let demo = (root().join("cluster/demo-model"), 1);
    let first = texts.get(&demo, |_| true).await.expect("loads");
    let again = texts.get(&demo, |_| true).await.expect("loads");
    assert!(Arc::ptr_eq(&first, &again));
    let deployed_again = (demo.0.clone(), 2);
    let anew = texts.get(&deployed_again, |known| *known != demo).await.expect("loads");
    assert!(!Arc::ptr_eq(&first, &anew));
    let other = (root().join("tests/fixtures/models/qwen2-tied-bf16"), 3);
    texts.get(&other, |known| *known != deployed_again).await.expect("loads");
    assert_eq!(texts.loaded.lock().expect("no panic").len(), 1);
    assert!(texts.get(&(PathBuf::from("/nowhere"), 4), |_| true).await.is_err());
}
