//! ○ What clients get: OpenAI's list of embeddings, and the ranking of Cohere and Jina.

use serde::Serialize;
use serde_json::{Value, json};

use super::ask::Rank;

/// Keeps the first so many numbers; what had length 1 is brought to it again, as OpenAI does.
pub fn shorten(vector: &mut Vec<f32>, dimensions: Option<u32>, normalize: bool) {
    let Some(dimensions) = dimensions else { return };
    if dimensions as usize >= vector.len() {
        return;
    }
    vector.truncate(dimensions as usize);
    let length = length(vector);
    if normalize && length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

fn length(vector: &[f32]) -> f64 {
    vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

/// The cosine of the angle between two vectors; 0 where one has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let lengths = length(a) * length(b);
    if lengths > 0.0 { product / lengths } else { 0.0 }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers<'a> {
    Floats(&'a [f32]),
    Base64(String),
}

#[derive(Serialize)]
struct Embedding<'a> {
    object: &'static str,
    index: usize,
    embedding: Numbers<'a>,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Embedding<'a>>,
    model: &'a str,
    usage: Value,
}

/// The body of an answer of `/v1/embeddings`.
pub fn embeddings(model: &str, vectors: &[Vec<f32>], base64: bool, tokens: usize) -> String {
    fn one(base64: bool, (index, vector): (usize, &Vec<f32>)) -> Embedding<'_> {
        Embedding {
            object: "embedding",
            index,
            embedding: match base64 {
                true => Numbers::Base64(to_base64(&bytes_of(vector))),
                false => Numbers::Floats(vector),
            },
        }
    }
    let data = vectors.iter().enumerate().map(|vector| one(base64, vector)).collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    let list = List { object: "list", data, model, usage };
    // Numbers are finite and keys are texts: it always serialises.
    serde_json::to_string(&list).unwrap_or_default()
}

/// The body of an answer of `/rerank`: the best first, and of equals the one that came first.
pub fn ranking(id: &str, asked: &Rank, scores: &[f64], tokens: usize) -> String {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let result = |&index: &usize| {
        let mut result = json!({"index": index, "relevance_score": scores[index]});
        if asked.return_documents {
            result["document"] = json!({"text": asked.documents[index]});
        }
        result
    };
    let results: Vec<Value> = order.iter().take(asked.top_n).map(result).collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    json!({"id": id, "model": asked.model, "results": results, "usage": usage}).to_string()
}

fn bytes_of(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// RFC 4648, with padding.
fn to_base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            match digit <= chunk.len() {
                true => text.push(char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::ask::Cut;
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(to_base64(plain.as_bytes()), coded);
        }
        assert_eq!(to_base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn what_is_shortened_has_length_1_again() {
        let mut vector = vec![3.0, 4.0, 12.0];
        shorten(&mut vector, Some(2), true);
        assert_eq!(vector, [0.6, 0.8]);
        shorten(&mut vector, Some(7), true);
        assert_eq!(vector, [0.6, 0.8], "what is shorter stays");
        let mut plain = vec![3.0, 4.0, 12.0];
        shorten(&mut plain, Some(2), false);
        assert_eq!(plain, [3.0, 4.0]);
    }

    #[test]
    fn a_ranking_has_the_best_first_and_no_more_than_were_asked_for() {
        let mut asked = Rank {
            model: "m".to_owned(),
            query: "q".to_owned(),
            documents: ["a", "b", "c"].map(str::to_owned).to_vec(),
            top_n: 2,
            return_documents: false,
            cut: Cut::Never,
        };
        let body = ranking("r", &asked, &[0.25, 0.75, 0.25], 9);
        let found: Value = serde_json::from_str(&body).expect("JSON");
        let best = json!({"index": 1, "relevance_score": 0.75});
        assert_eq!(found["results"], json!([best, {"index": 0, "relevance_score": 0.25}]));
        assert_eq!(found["usage"]["total_tokens"], 9);
        asked.return_documents = true;
        let body = ranking("r", &asked, &[0.25, 0.75, 0.25], 9);
        let found: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(found["results"][0]["document"]["text"], "b");
    }

    #[test]
    fn floats_and_base64_say_the_same() {
        let vectors = [vec![1.0, -2.5]];
        let read = |base64| -> Value {
            serde_json::from_str(&embeddings("m", &vectors, base64, 3)).expect("JSON")
        };
        assert_eq!(read(false)["data"][0]["embedding"], json!([1.0, -2.5]));
        assert_eq!(read(true)["data"][0]["embedding"], "AACAPwAAIMA=");
    }
}
