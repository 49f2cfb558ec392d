//! A server that plays the Hugging Face hub: one model, its description, and its files behind a
//! redirect to a "CDN", in ranges; and what can go wrong with each answer. Asked as an object store, it
//! is one.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use ring::digest;
use serde_json::{Value, json};

use crate::signed::is_signed;

/// A client that says nothing for so long is gone.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The commit of what it serves.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Where it is asked as an object store, the model is this; with a space, as what is signed is escaped.
pub const S3_URL: &str = "s3://bucket/models/my demo";

/// The key that opens it there, and its secret part.
pub const S3_KEY: &str = "AKIATEST";
/// Never sent.
pub const S3_SECRET: &str = "what is signed with";

/// What an answer is like, once.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status, and how long to wait where that is said.
    Status(u16, Option<u64>),
    /// The connection ends behind so many bytes of the body.
    Cut(usize),
    /// One bit of the body is another.
    Lie,
    /// Nothing comes, for so long.
    Hang(Duration),
    /// All of the file, whatever was asked for.
    Whole,
    /// Another range than was asked for.
    Shifted,
    /// It is said to lie at the CDN.
    Elsewhere,
}

/// It serves until it is dropped.
#[derive(Debug)]
pub struct Hub {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    repo: String,
    files: BTreeMap<String, Vec<u8>>,
    token: Option<String>,
    /// What becomes of the next answers for a file; the description is `""`.
    faults: Mutex<BTreeMap<String, Vec<Fault>>>,
    counts: Mutex<Counts>,
    stop: AtomicBool,
}

/// What it has sent.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Bytes of bodies, by file.
    pub bytes: BTreeMap<String, u64>,
    /// Answers, by file.
    pub answers: BTreeMap<String, u64>,
    /// Requests at the CDN that carried a token, or anything that was signed for the object store.
    pub leaked: u64,
}

impl Counts {
    /// Bytes of weights.
    pub fn weights(&self) -> u64 {
        self.bytes.iter().filter(|(name, _)| is_weights(name)).map(|(_, bytes)| bytes).sum()
    }
}

impl Hub {
    /// Serves the files of a folder as the model `repo`; to who shows the token, where there is one.
    pub fn serve(folder: &Path, repo: &str, token: Option<&str>) -> Result<Self> {
        let mut files = BTreeMap::new();
        read_files(folder, "", &mut files)?;
        let (repo, token) = (repo.to_owned(), token.map(str::to_owned));
        let shared = Arc::new(Shared { repo, files, token, ..Shared::default() });
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let serving = Arc::clone(&shared);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || {
                    // A client that hangs up is what some tests are about.
                    let _ = converse(stream, &shared);
                });
            }
        });
        Ok(Self { address, shared, accepting: Some(accepting) })
    }

    /// What HF_ENDPOINT is to be.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next answers for a file (the description is `""`) are like this, one after the other.
    pub fn fail(&self, file: &str, faults: &[Fault]) {
        self.shared.faults().insert(file.to_owned(), faults.to_vec());
    }

    /// How many of the answers that `fail` named are still to come.
    pub fn left(&self, file: &str) -> usize {
        self.shared.faults().get(file).map_or(0, Vec::len)
    }

    /// What it has sent so far.
    pub fn counts(&self) -> Counts {
        self.shared.counts().clone()
    }

    /// The length of all weights.
    pub fn weights(&self) -> u64 {
        let weights = self.shared.files.iter().filter(|(name, _)| is_weights(name));
        weights.map(|(_, bytes)| bytes.len() as u64).sum()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // It looks at each connection, so one more wakes it.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn faults(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Fault>>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, file: &str) -> Option<Fault> {
        let mut faults = self.faults();
        let queue = faults.get_mut(file).filter(|queue| !queue.is_empty())?;
        Some(queue.remove(0))
    }

    fn description(&self) -> Value {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let git = git_blob(bytes);
            match is_weights(name) {
                true => json!({
                    "rfilename": name, "size": bytes.len(), "blobId": git,
                    "lfs": { "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134 },
                }),
                false => json!({ "rfilename": name, "size": bytes.len(), "blobId": git }),
            }
        };
        let siblings: Vec<Value> = self.files.iter().map(sibling).collect();
        json!({ "id": self.repo, "sha": COMMIT, "siblings": siblings })
    }
}

/// The files of a folder and of those in it, by their paths there.
fn read_files(
    folder: &Path,
    before: &str,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{before}{}", entry.file_name().to_string_lossy());
        match entry.file_type()?.is_dir() {
            true => read_files(&entry.path(), &format!("{name}/"), files)?,
            false => drop(files.insert(name, std::fs::read(entry.path())?)),
        }
    }
    Ok(())
}

/// What the hub keeps as a large file, and sends from its CDN.
fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", sha256(bytes))
}

fn git_blob(bytes: &[u8]) -> String {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    hex(context.finish().as_ref())
}

/// A request as far as it matters.
struct Asked {
    path: String,
    range: Option<(usize, usize)>,
    token: Option<String>,
    /// Whether it is signed as an object store wants it, by `S3_KEY`.
    signed: bool,
    /// Whether it carries anything of a signature.
    has_keys: bool,
    if_match: Option<String>,
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Result<Option<Asked>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).context("a path")?.to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let range = match headers.get("range") {
        Some(range) => {
            let range = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
            let (first, last) = range.context("bytes")?;
            Some((first.parse()?, last.parse::<usize>()? + 1))
        }
        None => None,
    };
    let bearer = headers.get("authorization").and_then(|value| value.strip_prefix("Bearer "));
    Ok(Some(Asked {
        range,
        token: bearer.map(str::to_owned),
        signed: is_signed(&path, &headers),
        has_keys: headers.keys().any(|name| name == "authorization" || name.starts_with("x-amz-")),
        if_match: headers.remove("if-match"),
        path,
    }))
}

fn converse(stream: TcpStream, shared: &Shared) -> Result<()> {
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(asked) = read_request(&mut reader)? {
        if !answer(&mut writer, shared, &asked)? {
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the connection goes on.
fn answer(out: &mut TcpStream, shared: &Shared, asked: &Asked) -> Result<bool> {
    let path = asked.path.split('?').next().unwrap_or_default();
    let repo = &shared.repo;
    if let Some(file) = path.strip_prefix(&format!("/cdn/{COMMIT}/")) {
        if asked.has_keys {
            shared.counts().leaked += 1;
        }
        return send_file(out, shared, file, asked);
    }
    if let Some(file) = path.strip_prefix("/bucket/models/my%20demo/") {
        let etag = shared.files.get(file).map(|bytes| etag(bytes));
        if !asked.signed {
            return send(out, "403 Forbidden", &[], b"<Error><Code>AccessDenied</Code></Error>");
        }
        if asked.if_match.is_some() && asked.if_match != etag {
            return send(out, "412 Precondition Failed", &[], b"<Error/>");
        }
        if shared.faults().get(file).is_some_and(|faults| matches!(faults[..], [Fault::Elsewhere]))
        {
            shared.faults().remove(file);
            return send_on(out, file);
        }
        return send_file(out, shared, file, asked);
    }
    if shared.token.is_some() && shared.token != asked.token {
        return send(out, "401 Unauthorized", &[], b"Invalid username or password.");
    }
    if path == format!("/api/models/{repo}/revision/main")
        || path == format!("/api/models/{repo}/revision/{COMMIT}")
    {
        return match shared.fault("") {
            Some(Fault::Status(status, after)) => send_status(out, status, after),
            _ => send(out, "200 OK", &[], shared.description().to_string().as_bytes()),
        };
    }
    match path.strip_prefix(&format!("/{repo}/resolve/{COMMIT}/")) {
        Some(file) if is_weights(file) => send_on(out, file),
        Some(file) => send_file(out, shared, file, asked),
        None => send(out, "404 Not Found", &[], b"Repository not found"),
    }
}

/// A CDN is another host: what is meant for the hub alone must not get there.
fn send_on(out: &mut TcpStream, file: &str) -> Result<bool> {
    let port = out.local_addr()?.port();
    let to = format!("http://localhost:{port}/cdn/{COMMIT}/{file}?signature=x");
    send(out, "302 Found", &[("Location", to)], b"")
}

fn send_file(out: &mut TcpStream, shared: &Shared, file: &str, asked: &Asked) -> Result<bool> {
    let Some(bytes) = shared.files.get(file) else {
        return send(out, "404 Not Found", &[], b"Entry not found");
    };
    let fault = shared.fault(file);
    let (first, end) = asked.range.unwrap_or((0, bytes.len()));
    let mut body = bytes.get(first..end).context("a range of the file")?.to_vec();
    let mut status = if asked.range.is_some() { "206 Partial Content" } else { "200 OK" };
    let mut said = first;
    match &fault {
        Some(Fault::Status(status, after)) => return send_status(out, *status, *after),
        #[allow(clippy::disallowed_methods, reason = "a server that hangs")]
        Some(Fault::Hang(time)) => std::thread::sleep(*time),
        Some(Fault::Lie) => {
            if let Some(last) = body.last_mut() {
                *last ^= 1;
            }
        }
        Some(Fault::Whole) => (status, body) = ("200 OK", bytes.clone()),
        Some(Fault::Shifted) => said += 1,
        Some(Fault::Cut(_) | Fault::Elsewhere) | None => {}
    }
    let range = format!("bytes {said}-{}/{}", end.saturating_sub(1), bytes.len());
    let headers = [("Content-Range", range), ("ETag", etag(bytes))];
    let cut = match fault {
        Some(Fault::Cut(at)) => at.min(body.len()),
        _ => body.len(),
    };
    {
        let mut counts = shared.counts();
        *counts.bytes.entry(file.to_owned()).or_default() += cut as u64;
        *counts.answers.entry(file.to_owned()).or_default() += 1;
    }
    head(out, status, &headers, body.len())?;
    out.write_all(&body[..cut])?;
    Ok(cut == body.len())
}

fn send_status(out: &mut TcpStream, status: u16, after: Option<u64>) -> Result<bool> {
    let after: Vec<_> = after.iter().map(|s| ("Retry-After", s.to_string())).collect();
    send(out, &format!("{status} As Told"), &after, b"as it was told")
}

fn send(out: &mut TcpStream, status: &str, more: &[(&str, String)], body: &[u8]) -> Result<bool> {
    head(out, status, more, body.len())?;
    out.write_all(body)?;
    Ok(true)
}

fn head(out: &mut TcpStream, status: &str, more: &[(&str, String)], len: usize) -> Result<()> {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n");
    for (name, value) in more {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    Ok(out.write_all(text.as_bytes())?)
}
