//! The lines of a `text/event-stream` that the public API answers with, read one at a time.

use serde_json::Value;

/// What one line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// More text of the answer; empty where a chunk carries something else.
    Text(String),
    /// The answer broke off; the server's words.
    Error(String),
    /// The answer is complete.
    Done,
    /// A blank line, a comment, a field that is not ours.
    Nothing,
}

/// Reads a line. A chunk that is no JSON is an error: text would be missing.
pub fn read(line: &str) -> Line {
    let Some(data) = line.trim_end().strip_prefix("data:") else { return Line::Nothing };
    let data = data.trim_start();
    if data == "[DONE]" {
        return Line::Done;
    }
    let Ok(chunk) = serde_json::from_str::<Value>(data) else {
        return Line::Error(format!("the server sent a chunk that is no JSON: {data}"));
    };
    if let Some(message) = error_message(&chunk) {
        return Line::Error(message);
    }
    let text = chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    Line::Text(text.to_owned())
}

/// The words of an OpenAI-shaped error.
pub fn error_message(body: &Value) -> Option<String> {
    let error = body.get("error").filter(|error| !error.is_null())?;
    Some(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_they_say() {
        let text = |t: &str| Line::Text(t.to_owned());
        for (line, expected) in [
            (r#"data: {"choices":[{"delta":{"content":"47"}}]}"#, text("47")),
            (r#"data:{"choices":[{"delta":{"content":"é"}}]}"#, text("é")),
            (r#"data: {"choices":[{"delta":{"role":"assistant"}}]}"#, text("")),
            (r#"data: {"choices":[],"usage":{"total_tokens":3}}"#, text("")),
            ("data: [DONE]", Line::Done),
            ("", Line::Nothing),
            (": ping", Line::Nothing),
            ("event: error", Line::Nothing),
            (r#"data: {"error":{"message":"lost w2"}}"#, Line::Error("lost w2".to_owned())),
        ] {
            assert_eq!(read(line), expected, "{line:?}");
        }
        assert!(matches!(read("data: {"), Line::Error(_)));
    }
}
