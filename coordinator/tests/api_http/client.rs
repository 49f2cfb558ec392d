//! A small HTTP/1.1 client that sees every byte, hang-ups included.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Nothing here takes longer; a test that waits for ever shows nothing.
const PATIENCE: Duration = Duration::from_secs(10);

/// A response, read to its end.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The events of a stream, and whether `[DONE]` ended it.
    pub fn events(&self) -> (Vec<Value>, bool) {
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let mut events = Vec::new();
        let mut done = false;
        for line in self.body.lines().filter(|line| !line.is_empty() && !line.starts_with(':')) {
            let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("no event: {line}"));
            assert!(!done, "{data} after [DONE]");
            match data {
                "[DONE]" => done = true,
                json => events.push(serde_json::from_str(json).expect("JSON")),
            }
        }
        (events, done)
    }
}

pub async fn get(address: SocketAddr, path: &str) -> Response {
    send(address, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
        .await
}

pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Response {
    post_text(address, path, &body.to_string()).await
}

pub async fn post_text(address: SocketAddr, path: &str, body: &str) -> Response {
    send(address, &request(path, body)).await
}

fn request(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends a request and leaves the socket open: the caller reads, or hangs up.
pub async fn open(address: SocketAddr, path: &str, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(request(path, &body.to_string()).as_bytes()).await.expect("it reads");
    stream
}

pub async fn send(address: SocketAddr, request: &str) -> Response {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    read.expect("an answer in time").expect("no reset");
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Response {
    let split = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let split = split.unwrap_or_else(|| panic!("no head: {}", String::from_utf8_lossy(bytes)));
    let head = std::str::from_utf8(&bytes[..split]).expect("ASCII");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).expect("a status");
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let rest = &bytes[split + 4..];
    let chunked =
        headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
    let body = if chunked { unchunk(rest) } else { rest.to_vec() };
    let body = String::from_utf8(body).expect("UTF-8");
    Response { status: status.parse().expect("a number"), headers, body }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let end = bytes.windows(2).position(|w| w == b"\r\n").expect("a chunk's length");
        let len = std::str::from_utf8(&bytes[..end]).expect("ASCII");
        let len = usize::from_str_radix(len, 16).expect("a length");
        bytes = &bytes[end + 2..];
        if len == 0 {
            return out;
        }
        out.extend_from_slice(&bytes[..len]);
        bytes = &bytes[len + 2..];
    }
}
