use std::path::Path;

use tokenizers::Tokenizer;

use super::*;

/// Texts that show where a tokenizer cuts.
const TEXTS: [&str; 6] = [
    "Hello, world! It's 12345 o'clock.",
    "  two spaces, then\n\n\ttabs and newlines \n",
    "naïve café — ÄÖÜ 你好 🐟🐠",
    "",
    " ",
    "<s>no special token is read here</s>",
];

/// What a converter would write of a tokenizer.json.
fn metadata_of(
    file: &str,
    model: &str,
    kinds: impl Fn(&str, bool) -> i64,
) -> BTreeMap<String, Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let text = std::fs::read_to_string(root.join(file)).expect("a fixture");
    let json: Json = serde_json::from_str(&text).expect("JSON");
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
    let mut texts: Vec<(u64, &str)> =
        vocab.iter().map(|(text, id)| (id.as_u64().expect("an id"), text.as_str())).collect();
    texts.sort_unstable();
    let special: Vec<&str> = json["added_tokens"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|token| token["content"].as_str())
        .collect();
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .expect("merges")
        .iter()
        .map(|merge| match merge {
            Json::String(merge) => merge.clone(),
            pair => {
                format!("{} {}", pair[0].as_str().expect("text"), pair[1].as_str().expect("text"))
            }
        })
        .collect();
    // The score of a piece is the place of its first merge: SentencePiece's own rule.
    let place = |text: &str| merges.iter().position(|merge| merge.replacen(' ', "", 1) == text);
    let list = |values: Vec<Value>| Value::List(values);
    let texts_of = texts.iter().map(|(_, text)| Value::Text((*text).to_owned())).collect();
    let scores =
        texts.iter().map(|(_, text)| Value::Float(place(text).map_or(0.0, |p| -(p as f64))));
    let kinds = texts.iter().map(|(_, text)| Value::Signed(kinds(text, special.contains(text))));
    let id =
        |text: &str| texts.iter().find(|(_, t)| *t == text).map(|(id, _)| Value::Unsigned(*id));
    let mut values = BTreeMap::from([
        ("tokenizer.ggml.model".to_owned(), Value::Text(model.to_owned())),
        ("tokenizer.ggml.pre".to_owned(), Value::Text("gpt-2".to_owned())),
        ("tokenizer.ggml.tokens".to_owned(), list(texts_of)),
        ("tokenizer.ggml.scores".to_owned(), list(scores.collect())),
        ("tokenizer.ggml.token_type".to_owned(), list(kinds.collect())),
        ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(false)),
        (
            "tokenizer.ggml.merges".to_owned(),
            list(merges.iter().map(|merge| Value::Text(merge.clone())).collect()),
        ),
    ]);
    values.extend(id("<s>").map(|id| ("tokenizer.ggml.bos_token_id".to_owned(), id)));
    values.extend(id("</s>").map(|id| ("tokenizer.ggml.eos_token_id".to_owned(), id)));
    values
}

fn built(values: &BTreeMap<String, Value>) -> Tokenizer {
    let files = text_files(values).expect("a tokenizer");
    Tokenizer::from_bytes(files.tokenizer.to_string()).expect("a tokenizer.json")
}

fn assert_same(values: &BTreeMap<String, Value>, file: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let theirs = Tokenizer::from_file(root.join(file)).expect("a fixture");
    let ours = built(values);
    for text in TEXTS {
        let expected = theirs.encode(text, true).expect("encoded");
        let found = ours.encode(text, true).expect("encoded");
        assert_eq!(found.get_ids(), expected.get_ids(), "{text:?}");
        let back =
            |tokenizer: &Tokenizer| tokenizer.decode(expected.get_ids(), true).expect("text");
        assert_eq!(back(&ours), back(&theirs), "{text:?}");
    }
}

#[test]
fn a_byte_level_tokenizer_out_of_metadata_is_the_same() {
    let file = "models/llama31-rope8-bf16/tokenizer.json";
    let values = metadata_of(file, "gpt2", |_, special| if special { 3 } else { 1 });
    assert_same(&values, file);
}

#[test]
fn a_sentencepiece_tokenizer_out_of_pieces_and_scores_is_the_same() {
    let file = "detok/sentencepiece-style/tokenizer.json";
    let values = metadata_of(file, "llama", |text, special| match text {
        "<unk>" => 2,
        _ if special => 3,
        _ if text.starts_with("<0x") => 6,
        _ => 1,
    });
    assert_same(&values, file);
}

#[test]
fn texts_begin_and_end_as_the_file_says() {
    let file = "models/llama31-rope8-bf16/tokenizer.json";
    let mut values = metadata_of(file, "gpt2", |_, special| if special { 3 } else { 1 });
    values.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
    let plain = |add| built(&values).encode("fish", add).expect("encoded").get_ids().to_vec();
    assert_eq!(plain(true), [vec![1], plain(false)].concat());
    values.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(true));
    let both = built(&values).encode("fish", true).expect("encoded").get_ids().to_vec();
    assert_eq!(both.last(), Some(&2));
    values.insert("tokenizer.ggml.eot_token_id".into(), Value::Unsigned(5));
    values.insert("tokenizer.chat_template".into(), Value::Text("{{ 1 }}".into()));
    let files = text_files(&values).expect("a tokenizer");
    assert_eq!(files.generation_config["eos_token_id"], json!([2, 5]));
    assert_eq!(files.tokenizer_config["chat_template"], "{{ 1 }}");
    assert_eq!(files.tokenizer_config["bos_token"], "<s>");
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let file = "models/llama31-rope8-bf16/tokenizer.json";
    let values = metadata_of(file, "gpt2", |_, _| 1);
    let refusal = |key: &str, value: Option<&str>| {
        let mut values = values.clone();
        values.remove(key);
        values.extend(value.map(|value| (key.to_owned(), Value::Text(value.to_owned()))));
        text_files(&values).err().expect("a refusal")
    };
    for (why, word) in [
        (refusal("tokenizer.ggml.model", None), "`tokenizer.ggml.model`"),
        (refusal("tokenizer.ggml.model", Some("rwkv")), "is `rwkv`"),
        (refusal("tokenizer.ggml.pre", Some("viking")), "is `viking`"),
        (refusal("tokenizer.ggml.pre", None), "no `tokenizer.ggml.pre`"),
        (refusal("tokenizer.ggml.tokens", None), "`tokenizer.ggml.tokens`"),
        (refusal("tokenizer.ggml.merges", None), "`tokenizer.ggml.merges`"),
    ] {
        assert!(why.contains(word), "{why}");
    }
}

/// What llama.cpp's own converter made of tokenizers (`tests/fixtures/make_gguf_text.py`), and what the
/// tokenizers themselves make of texts.
#[test]
fn texts_are_the_tokens_of_the_tokenizer_that_the_converter_read() {
    #[derive(serde::Deserialize)]
    struct Recorded {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf/text");
    let mut named = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(&folder).expect("fixtures") {
        let file = entry.expect("a readable folder").path();
        if file.extension().is_none_or(|end| end != "gguf") {
            continue;
        }
        let header = shoal_protocol::model::gguf::Gguf::read(&file).expect("a GGUF file");
        let ours = built(&header.values);
        let recorded = std::fs::read(file.with_extension("json")).expect("its texts");
        let recorded: Vec<Recorded> = serde_json::from_slice(&recorded).expect("texts");
        assert!(recorded.len() > 10);
        let name = file.file_stem().expect("a name").to_string_lossy().into_owned();
        for Recorded { text, ids, decoded } in recorded {
            let found = ours.encode(text.as_str(), true).expect("encoded");
            assert_eq!(found.get_ids(), ids, "{name}: {text:?}");
            assert_eq!(ours.decode(&ids, true).expect("text"), decoded, "{name}: {text:?}");
        }
        named.insert(name);
    }
    let expected = [
        "command-r",
        "dbrx",
        "deepseek-coder",
        "deepseek-llm",
        "deepseek-v3",
        "gemma",
        "gpt-2",
        "gpt-4o",
        "llama-bpe",
        "phi-3",
        "qwen2",
        "refact",
        "smaug-bpe",
        "smollm",
        "starcoder",
        "tekken",
    ];
    assert!(named.iter().eq(expected.iter()), "{named:?}");
    // Of each pattern there is one, under one of its names.
    let missing: Vec<_> = gguf_patterns::PATTERNS
        .iter()
        .filter(|pattern| !pattern.names.iter().any(|name| named.contains(*name)))
        .map(|pattern| pattern.names)
        .collect();
    assert!(missing.is_empty(), "no fixture shows {missing:?}");
}
