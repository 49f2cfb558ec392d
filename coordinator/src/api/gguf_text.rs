//! ○ The text side of a GGUF file: its metadata as the tokenizer.json and tokenizer_config.json that it
//! would have beside it.
//!
//! Two kinds are read: `gpt2`, byte-level BPE with merges and a pattern that the file names, and
//! `llama`, SentencePiece, whose merges follow from the pieces' scores. A pattern that is not known is
//! refused: one that is nearly right makes other tokens.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json, json};
use shoal_protocol::model::gguf::Value;

use super::gguf_patterns::{self, Pattern};

/// What would lie beside a model's weights.
pub(super) struct TextFiles {
    pub(super) tokenizer: Json,
    pub(super) tokenizer_config: Json,
    pub(super) generation_config: Json,
}

/// A token as the file describes it.
struct Token<'a> {
    text: &'a str,
    score: f64,
    kind: Kind,
}

/// The format's numbers of kinds of tokens.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Reads the metadata of a file.
pub(super) fn text_files(values: &BTreeMap<String, Value>) -> Result<TextFiles, String> {
    let text = |key: &str| values.get(key).and_then(Value::as_str);
    let model = text("tokenizer.ggml.model").ok_or(
        "it has no `tokenizer.ggml.model`, so no tokenizer; put the model's tokenizer.json beside it",
    )?;
    let tokens = tokens(values)?;
    let (mut tokenizer, begins) = match model {
        "gpt2" => byte_level(values, &tokens)?,
        "llama" => (sentence_piece(values, &tokens), true),
        other => {
            return Err(format!(
                "`tokenizer.ggml.model` is `{other}`; supported: `gpt2`, `llama`; or put the \
                 model's tokenizer.json beside the file"
            ));
        }
    };
    let special = |key: &str| {
        let id = values.get(&format!("tokenizer.ggml.{key}_token_id"))?.as_u64()?;
        Some((id, tokens.get(usize::try_from(id).ok()?)?.text))
    };
    let flag = |key: &str, otherwise| {
        values.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_bool).unwrap_or(otherwise)
    };
    let first = special("bos").filter(|_| flag("add_bos_token", begins));
    let last = special("eos").filter(|_| flag("add_eos_token", false));
    tokenizer.insert("post_processor".into(), frame(first, last));
    tokenizer.insert("added_tokens".into(), added(&tokens));
    let named = |key: &str| special(key).map(|(_, text)| text);
    let mut tokenizer_config = json!({"bos_token": named("bos"), "eos_token": named("eos")});
    if let Some(template) = text("tokenizer.chat_template") {
        tokenizer_config["chat_template"] = template.into();
    }
    // Conversations end with another token than texts in some models.
    let ends = ["eos", "eot", "eom"].into_iter().filter_map(special).map(|(id, _)| id);
    Ok(TextFiles {
        tokenizer: Json::Object(tokenizer),
        tokenizer_config,
        generation_config: json!({"eos_token_id": ends.collect::<Vec<_>>()}),
    })
}

fn tokens(values: &BTreeMap<String, Value>) -> Result<Vec<Token<'_>>, String> {
    let list = |key: &str| values.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_list);
    let texts = list("tokens").ok_or("it has no `tokenizer.ggml.tokens`")?;
    let (scores, kinds) = (list("scores").unwrap_or(&[]), list("token_type").unwrap_or(&[]));
    let mut tokens = Vec::with_capacity(texts.len());
    for (id, text) in texts.iter().enumerate() {
        let text = text.as_str().ok_or_else(|| format!("token {id} is no text"))?;
        let score = scores.get(id).and_then(Value::as_f64).unwrap_or(0.0);
        let kind = match kinds.get(id).and_then(Value::as_u64) {
            Some(2) => Kind::Unknown,
            Some(3) => Kind::Control,
            Some(4) => Kind::UserDefined,
            Some(5) => Kind::Unused,
            Some(6) => Kind::Byte,
            _ => Kind::Normal,
        };
        tokens.push(Token { text, score, kind });
    }
    Ok(tokens)
}

/// Texts to ids. Rows of the embedding without a text are not among them.
fn vocabulary(tokens: &[Token<'_>]) -> Map<String, Json> {
    let used = tokens.iter().enumerate().filter(|(_, token)| token.kind != Kind::Unused);
    used.map(|(id, token)| (token.text.to_owned(), id.into())).collect()
}

fn added(tokens: &[Token<'_>]) -> Json {
    let is_added =
        |token: &Token<'_>| matches!(token.kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
    let added = tokens.iter().enumerate().filter(|(_, token)| is_added(token));
    let one = |(id, token): (usize, &Token<'_>)| {
        json!({
            "id": id, "content": token.text, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": token.kind != Kind::UserDefined,
        })
    };
    Json::Array(added.map(one).collect())
}

/// A text between its first and its last token, where it has them.
fn frame(first: Option<(u64, &str)>, last: Option<(u64, &str)>) -> Json {
    if first.is_none() && last.is_none() {
        return Json::Null;
    }
    let special = |token: Option<(u64, &str)>, of: u32| {
        token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": of}}))
    };
    let framed = |name: &str, of: u32| -> Vec<Json> {
        let sequence = json!({"Sequence": {"id": name, "type_id": of}});
        [special(first, of), Some(sequence), special(last, of)].into_iter().flatten().collect()
    };
    let mut tokens = Map::new();
    for (id, text) in first.into_iter().chain(last) {
        tokens.insert(text.into(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    let pair = [framed("A", 0), framed("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": pair,
        "special_tokens": tokens,
    })
}

/// Byte-level BPE, and whether its texts begin with the first token.
fn byte_level(
    values: &BTreeMap<String, Value>,
    tokens: &[Token<'_>],
) -> Result<(Map<String, Json>, bool), String> {
    let pre = values.get("tokenizer.ggml.pre").and_then(Value::as_str).ok_or_else(|| {
        format!(
            "it has no `tokenizer.ggml.pre`, so how it cuts a text is not known (supported: {:?}); put \
             the model's tokenizer.json beside the file",
            Pattern::known()
        )
    })?;
    let pattern = Pattern::named(pre).ok_or_else(|| {
        format!(
            "`tokenizer.ggml.pre` is `{pre}`; supported: {:?}; or put the model's tokenizer.json \
             beside the file",
            Pattern::known()
        )
    })?;
    let merges = values.get("tokenizer.ggml.merges").and_then(Value::as_list);
    let merges = merges.ok_or("it has no `tokenizer.ggml.merges`")?;
    let pair = |merge: &Value| {
        // Either part may be any character but a space.
        let (left, right) = merge.as_str()?.split_once(' ')?;
        Some(json!([left, right]))
    };
    let merges: Option<Vec<Json>> = merges.iter().map(pair).collect();
    let merges = merges.ok_or("a merge in `tokenizer.ggml.merges` is no two tokens")?;
    let mut tokenizer = whole(json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": pattern.ignore_merges, "vocab": vocabulary(tokens), "merges": merges,
    }));
    tokenizer.insert("normalizer".into(), pattern.normalizer());
    tokenizer.insert("pre_tokenizer".into(), pattern.pre_tokenizer());
    tokenizer.insert("decoder".into(), gguf_patterns::byte_level(true));
    Ok((tokenizer, pattern.begins))
}

/// SentencePiece's BPE: two pieces merge where their whole is a piece, the one with the best score
/// first.
fn sentence_piece(values: &BTreeMap<String, Value>, tokens: &[Token<'_>]) -> Map<String, Json> {
    let prefix = values.get("tokenizer.ggml.add_space_prefix").and_then(Value::as_bool);
    let is_piece = |token: &&Token<'_>| matches!(token.kind, Kind::Normal | Kind::UserDefined);
    let pieces: HashMap<&str, f64> =
        tokens.iter().filter(is_piece).map(|token| (token.text, token.score)).collect();
    let mut merges: Vec<(f64, &str, &str)> = Vec::new();
    for token in tokens.iter().filter(is_piece) {
        let cuts = token.text.char_indices().skip(1).map(|(at, _)| token.text.split_at(at));
        let known = cuts.filter(|(l, r)| pieces.contains_key(l) && pieces.contains_key(r));
        merges.extend(known.map(|(left, right)| (token.score, left, right)));
    }
    merges.sort_by(|one, other| {
        let lengths =
            |merge: &(f64, &str, &str)| (merge.1.chars().count(), merge.2.chars().count());
        other.0.total_cmp(&one.0).then_with(|| lengths(other).cmp(&lengths(one)))
    });
    let merges: Vec<Json> = merges.iter().map(|(_, left, right)| json!([left, right])).collect();
    let unknown = tokens.iter().find(|token| token.kind == Kind::Unknown).map(|token| token.text);
    let mut tokenizer = whole(json!({
        "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
        "ignore_merges": false, "vocab": vocabulary(tokens), "merges": merges,
    }));
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut normalizers = vec![space];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let sequence = json!({"type": "Sequence", "normalizers": normalizers});
    tokenizer.insert("normalizer".into(), sequence);
    tokenizer.insert("pre_tokenizer".into(), Json::Null);
    tokenizer.insert("decoder".into(), json!({"type": "Sequence", "decoders": decoders}));
    tokenizer
}

/// A tokenizer.json with this model and nothing around it.
fn whole(model: Json) -> Map<String, Json> {
    let mut tokenizer = Map::new();
    tokenizer.insert("version".into(), "1.0".into());
    tokenizer.insert("truncation".into(), Json::Null);
    tokenizer.insert("padding".into(), Json::Null);
    tokenizer.insert("model".into(), model);
    tokenizer
}

#[cfg(test)]
#[path = "gguf_text_test.rs"]
mod tests;
