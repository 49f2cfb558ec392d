//! ○ What is asked of an encoder: the bodies of `/v1/embeddings` (OpenAI's, with vLLM's and TEI's words
//! for cutting) and of `/rerank` (Cohere's and Jina's).

use serde_json::Value;
use shoal_protocol::request::VECTOR_MAX;

use crate::api::fields::{Fields, kind, token_ids, wrong_type};
use crate::api::refusal::Refusal;
use crate::api::validate::Prompt;

/// Inputs of one call: OpenAI's bound.
pub const INPUTS_MAX: usize = 2048;

/// Documents of one ranking: Cohere's bound.
pub const DOCUMENTS_MAX: usize = 1000;

/// What to do with an input that is longer than the model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Refuse it, with the numbers.
    Never,
    /// Cut it to what the model takes.
    ToModel,
    /// Cut it to so many tokens, and to what the model takes.
    To(u32),
}

/// A call for embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {
    /// The deployment's name.
    pub model: String,
    /// What to embed, at least one.
    pub inputs: Vec<Prompt>,
    /// Whether numbers go as base64 of little-endian floats.
    pub base64: bool,
    /// How many of the numbers to keep.
    pub dimensions: Option<u32>,
    /// See [`Cut`].
    pub cut: Cut,
    /// Whether the tokenizer adds its own tokens to texts.
    pub add_special_tokens: bool,
}

/// A call for a ranking.
#[derive(Clone, Debug, PartialEq)]
pub struct Rank {
    /// The deployment's name.
    pub model: String,
    /// What is asked.
    pub query: String,
    /// What may answer it, at least one.
    pub documents: Vec<String>,
    /// How many to tell, the best.
    pub top_n: usize,
    /// Whether to tell their texts too.
    pub return_documents: bool,
    /// See [`Cut`].
    pub cut: Cut,
}

fn object(body: &[u8]) -> Result<Fields, Refusal> {
    match serde_json::from_slice(body).map_err(|error| Refusal::Json(error.to_string()))? {
        Value::Object(map) => Ok(Fields::new(map)),
        other => Err(Refusal::NotAnObject(kind(&other))),
    }
}

/// Labels of the caller's, without influence on the answer.
fn ignore_labels(fields: &mut Fields) {
    for label in ["user", "priority", "request_id"] {
        fields.take(label);
    }
}

fn cut(fields: &mut Fields) -> Result<Cut, Refusal> {
    let truncate = fields.boolean("truncate")?.unwrap_or(false);
    // vLLM's: -1 is what the model takes.
    Ok(match fields.integer("truncate_prompt_tokens", -1..=i64::from(u32::MAX))? {
        Some(0) => {
            return Err(Refusal::OutOfRange {
                param: "truncate_prompt_tokens".to_owned(),
                expected: "-1, or a whole number from 1 on".to_owned(),
                found: "0".to_owned(),
            });
        }
        Some(-1) => Cut::ToModel,
        Some(tokens) => Cut::To(tokens as u32),
        None if truncate => Cut::ToModel,
        None => Cut::Never,
    })
}

fn bounded(param: &str, len: usize, max: usize, what: &str) -> Result<(), Refusal> {
    if (1..=max).contains(&len) {
        return Ok(());
    }
    Err(Refusal::OutOfRange {
        param: param.to_owned(),
        expected: format!("a list of 1 to {max} {what}"),
        found: format!("a list of {len}"),
    })
}

impl Embed {
    /// Reads the body of `/v1/embeddings`.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let mut fields = object(body)?;
        ignore_labels(&mut fields);
        let model = fields.text("model")?.ok_or(Refusal::Missing("model"))?;
        let inputs = inputs(&mut fields)?;
        let base64 = match fields.text("encoding_format")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                return Err(Refusal::OutOfRange {
                    param: "encoding_format".to_owned(),
                    expected: "\"float\" or \"base64\"".to_owned(),
                    found: format!("{other:.32?}"),
                });
            }
        };
        let dimensions = fields.integer("dimensions", 1..=VECTOR_MAX as i64)?;
        let embed = Self {
            model,
            inputs,
            base64,
            dimensions: dimensions.map(|dimensions| dimensions as u32),
            cut: cut(&mut fields)?,
            add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        };
        fields.end()?;
        Ok(embed)
    }
}

fn inputs(fields: &mut Fields) -> Result<Vec<Prompt>, Refusal> {
    const EXPECTED: &str =
        "a text, a list of texts, a list of token ids, or a list of lists of token ids";
    let list = match fields.take("input").ok_or(Refusal::Missing("input"))? {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        other => return Err(wrong_type("input", EXPECTED, &other)),
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(token_ids("input", list)?)]);
    }
    bounded("input", list.len(), INPUTS_MAX, "inputs")?;
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => {
            token_ids(&format!("input[{i}]"), ids).map(Prompt::Tokens)
        }
        other => {
            let expected = "a text or a list of token ids that is not empty";
            Err(wrong_type(&format!("input[{i}]"), expected, &other))
        }
    };
    list.into_iter().enumerate().map(one).collect()
}

impl Rank {
    /// Reads the body of `/rerank`.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let mut fields = object(body)?;
        ignore_labels(&mut fields);
        let model = fields.text("model")?.ok_or(Refusal::Missing("model"))?;
        let query = fields.text("query")?.ok_or(Refusal::Missing("query"))?;
        let documents = match fields.take("documents").ok_or(Refusal::Missing("documents"))? {
            Value::Array(list) => list,
            other => return Err(wrong_type("documents", "a list of texts", &other)),
        };
        bounded("documents", documents.len(), DOCUMENTS_MAX, "documents")?;
        let documents: Vec<String> = documents
            .into_iter()
            .enumerate()
            .map(|(i, document)| text_of(i, document))
            .collect::<Result<_, _>>()?;
        let top_n = fields.integer("top_n", 1..=i64::from(u32::MAX))?;
        let rank = Self {
            model,
            query,
            top_n: top_n.map_or(documents.len(), |n| documents.len().min(n as usize)),
            documents,
            return_documents: fields.boolean("return_documents")?.unwrap_or(false),
            cut: cut(&mut fields)?,
        };
        fields.end()?;
        Ok(rank)
    }
}

/// A text, or Cohere's object with one.
fn text_of(index: usize, document: Value) -> Result<String, Refusal> {
    let place = format!("documents[{index}]");
    match document {
        Value::String(text) => Ok(text),
        Value::Object(map) => {
            let mut fields = Fields::nested(&place, map);
            let text = fields.text("text")?;
            fields.end()?;
            text.ok_or_else(|| wrong_type(&place, "an object with `text`", &Value::Null))
        }
        other => Err(wrong_type(&place, "a text, or an object with `text`", &other)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn embed(body: Value) -> Result<Embed, String> {
        Embed::parse(body.to_string().as_bytes()).map_err(|refusal| refusal.to_string())
    }

    fn rank(body: Value) -> Result<Rank, String> {
        Rank::parse(body.to_string().as_bytes()).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn every_form_of_input_is_read() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        for (input, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", ""]), vec![text("a"), text("")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1, 2], [3]]), vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]),
        ] {
            let found = embed(json!({"model": "m", "input": input})).expect("a good body");
            assert_eq!(found.inputs, expected);
            assert_eq!((found.base64, found.dimensions, found.cut), (false, None, Cut::Never));
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_the_parameter() {
        let with = |name: &str, value: Value| {
            let mut body = json!({"model": "m", "input": "a"});
            body[name] = value;
            embed(body).expect_err("a refusal")
        };
        for (name, value, part) in [
            ("input", json!([]), "`input` is a list of 0"),
            ("input", json!([[]]), "`input[0]`"),
            ("input", json!(vec!["a"; 2049]), "1 to 2048"),
            ("input", json!([1, "a"]), "`input[1]`"),
            ("encoding_format", json!("int8"), "\"float\" or \"base64\""),
            ("dimensions", json!(0), "`dimensions` is 0"),
            ("truncate_prompt_tokens", json!(0), "`truncate_prompt_tokens` is 0"),
            ("colour", json!("red"), "`colour` is not a known parameter"),
        ] {
            let found = with(name, value);
            assert!(found.contains(part), "{found}");
        }
        assert!(embed(json!({"model": "m"})).expect_err("no input").contains("`input` is missing"));
    }

    #[test]
    fn a_ranking_takes_cohere_s_and_jina_s_documents() {
        let body = json!({"model": "m", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 9,
                          "return_documents": true, "truncate": true});
        let found = rank(body).expect("a good body");
        assert_eq!((found.documents, found.top_n), (vec!["a".to_owned(), "b".to_owned()], 2));
        assert_eq!((found.return_documents, found.cut), (true, Cut::ToModel));
        for (documents, part) in [
            (json!([]), "a list of 0"),
            (json!([1]), "`documents[0]`"),
            (json!("a"), "`documents`"),
        ] {
            let body = json!({"model": "m", "query": "q", "documents": documents});
            let found = rank(body).expect_err("a refusal");
            assert!(found.contains(part), "{found}");
        }
    }
}
