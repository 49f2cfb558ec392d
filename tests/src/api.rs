//! A client of the public API that sees what a user's would see.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Every wait for the server's next byte ends by then: nothing may hang.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// The API of one cluster, for one model.
#[derive(Clone, Debug)]
pub struct Api {
    agent: ureq::Agent,
    url: String,
    model: String,
}

/// An answer with a status.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, as JSON; a body that is none is a string.
    pub body: Value,
}

impl Answer {
    /// The text of the first choice, of a chat or of a completion.
    pub fn text(&self) -> &str {
        let choice = &self.body["choices"][0];
        choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default()
    }

    /// The tokens of the first choice, where they were asked for.
    pub fn token_ids(&self) -> Vec<u64> {
        let ids = self.body["choices"][0]["token_ids"].as_array();
        ids.into_iter().flatten().filter_map(Value::as_u64).collect()
    }

    /// The words of an error.
    pub fn error(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_default()
    }

    /// The answer, where it is one.
    pub fn ok(self) -> Result<Self> {
        if self.status != 200 {
            bail!("HTTP {}: {}", self.status, self.body);
        }
        Ok(self)
    }
}

impl Api {
    /// The API under a URL without `/v1`.
    pub fn new(url: &str, model: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build()
            .new_agent();
        Self { agent, url: url.to_owned(), model: model.to_owned() }
    }

    /// What lies at a path.
    pub fn get(&self, path: &str) -> Result<Answer> {
        let response = self.agent.get(format!("{}{path}", self.url)).call()?;
        answer(response)
    }

    /// A chat with one question, greedy; `more` overrides.
    pub fn chat(&self, question: &str, more: Value) -> Result<Answer> {
        answer(self.post("/v1/chat/completions", &self.chat_body(question, more))?)
    }

    /// A completion of a text or of token ids, greedy; `more` overrides.
    pub fn complete(&self, prompt: impl Into<Value>, more: Value) -> Result<Answer> {
        let body =
            merged(json!({"model": self.model, "prompt": prompt.into(), "temperature": 0}), more);
        answer(self.post("/v1/completions", &body)?)
    }

    /// A chat whose answer comes chunk by chunk.
    pub fn stream_chat(&self, question: &str, more: Value) -> Result<Stream> {
        let mut body = self.chat_body(question, more);
        body["stream"] = true.into();
        Stream::new(self.post("/v1/chat/completions", &body)?)
    }

    /// A completion that comes chunk by chunk.
    pub fn stream(&self, prompt: impl Into<Value>, more: Value) -> Result<Stream> {
        let body = merged(
            json!({"model": self.model, "prompt": prompt.into(), "temperature": 0, "stream": true}),
            more,
        );
        Stream::new(self.post("/v1/completions", &body)?)
    }

    /// Anything, to any path.
    pub fn ask(&self, path: &str, body: &Value) -> Result<Answer> {
        answer(self.post(path, body)?)
    }

    fn chat_body(&self, question: &str, more: Value) -> Value {
        let messages = json!([{"role": "user", "content": question}]);
        merged(json!({"model": self.model, "messages": messages, "temperature": 0}), more)
    }

    fn post(&self, path: &str, body: &Value) -> Result<ureq::http::Response<ureq::Body>> {
        Ok(self.agent.post(format!("{}{path}", self.url)).send_json(body)?)
    }
}

fn merged(mut body: Value, more: Value) -> Value {
    if let Value::Object(more) = more {
        for (key, value) in more {
            body[key] = value;
        }
    }
    body
}

fn answer(mut response: ureq::http::Response<ureq::Body>) -> Result<Answer> {
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string()?;
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Ok(Answer { status, body })
}

/// An answer that comes chunk by chunk.
pub struct Stream {
    lines: std::io::Lines<BufReader<ureq::BodyReader<'static>>>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stream")
    }
}

/// What a stream says next.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A chunk.
    Chunk(Value),
    /// An error; the stream is over.
    Error(Value),
    /// `[DONE]`.
    Done,
    /// The server closed the stream without `[DONE]`.
    Closed,
}

impl Stream {
    fn new(response: ureq::http::Response<ureq::Body>) -> Result<Self> {
        if response.status() != 200 {
            let refused = answer(response)?;
            bail!("HTTP {}: {}", refused.status, refused.body);
        }
        let kind = response.headers().get("content-type").context("a content type")?;
        if !kind.to_str()?.starts_with("text/event-stream") {
            bail!("{kind:?} is not a stream of events");
        }
        Ok(Self { lines: BufReader::new(response.into_body().into_reader()).lines() })
    }

    /// Waits for the next event.
    pub fn event(&mut self) -> Result<Event> {
        loop {
            let line = match self.lines.next() {
                None => return Ok(Event::Closed),
                Some(line) => line.context("the stream broke off")?,
            };
            let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                return Ok(Event::Done);
            }
            let chunk: Value = serde_json::from_str(data).with_context(|| data.to_owned())?;
            let failed = !chunk["error"].is_null();
            return Ok(if failed { Event::Error(chunk) } else { Event::Chunk(chunk) });
        }
    }

    /// Waits for the next text that is not empty.
    pub fn text(&mut self) -> Result<String> {
        loop {
            match self.event()? {
                Event::Chunk(chunk) if text_of(&chunk).is_empty() => {}
                Event::Chunk(chunk) => return Ok(text_of(&chunk).to_owned()),
                other => bail!("{other:?} where text was expected"),
            }
        }
    }

    /// Reads to the end: all chunks, and how it ended.
    pub fn rest(&mut self) -> Result<(Vec<Value>, Event)> {
        let mut chunks = Vec::new();
        loop {
            match self.event()? {
                Event::Chunk(chunk) => chunks.push(chunk),
                end => return Ok((chunks, end)),
            }
        }
    }
}

/// The text of a chunk's first choice.
pub fn text_of(chunk: &Value) -> &str {
    let choice = &chunk["choices"][0];
    choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default()
}
