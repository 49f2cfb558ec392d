//! ● GET with ranges, with every wait bounded: the one way to an origin.
//!
//! What came before an answer broke off is kept, and only the rest is asked for again. A status that may
//! pass (429, 5xx) is waited for as long as the origin says, within our patience; any other is final.
//! Where nobody is there at all, whoever waits (`shoal deploy`) is told after a few tries.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, config::RedirectAuthHeaders};

use super::error::BlobError;
use super::settings::Patience;

/// The longest pause between two tries, whatever an origin asks for.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Tries of somebody who waits, where nobody is there: the name is not known, or nobody answers under it. A
/// moment's hiccup passes within them, and what is wrong for good is said within two seconds.
const NOBODY_TRIES: u32 = 4;

/// No such try begins later than this after the first: a way that swallows everything is told after one.
const NOBODY_WITHIN: Duration = Duration::from_secs(5);

/// How soon a pause notices that nobody waits any more.
const CANCEL_LOOK: Duration = Duration::from_millis(50);

/// An answer that is slower than this on the whole is given up, although each read is in time.
const SLOWEST_BYTES_PER_S: u64 = 64 << 10;

/// How often an answer may send us on: the hub does so once, to its CDN.
const REDIRECTS_MAX: u32 = 5;

/// What is read of an answer that is only words.
const WORDS_MAX: u64 = 300;

/// A request, but for its range.
pub(super) struct Request {
    /// Whom it asks, for words.
    pub origin: String,
    /// What it asks for, for words.
    pub what: String,
    pub url: String,
    pub headers: Vec<(&'static str, String)>,
    /// Whether it is signed for its host: sent on, it would be refused, and show another host what was
    /// meant for this one.
    pub is_signed: bool,
    /// What to do where nobody lets us in.
    pub advice: &'static str,
}

/// Asks.
#[derive(Clone, Debug)]
pub(super) struct Http {
    agent: Agent,
    patience: Patience,
    /// Whether a person waits for the answer.
    is_waited_for: bool,
}

/// What one try came to.
enum Tried {
    /// It is complete.
    Done,
    /// Try again, after what the origin says.
    Again(String, Option<Duration>),
    /// The same, and there is no origin.
    Nobody(String),
    /// It would be the same again.
    Final(BlobError),
}

/// Which bytes are wanted.
#[derive(Clone)]
enum Part {
    /// All, and at most so many.
    Whole { max: u64 },
    /// Exactly these, of a file of this length.
    Range { bytes: Range<u64>, of: u64 },
}

impl Http {
    pub fn new(patience: Patience) -> Self {
        let tls = TlsConfig::builder();
        // A site's own authority, where the usual variable names it.
        let tls = match extra_roots() {
            Some(roots) => tls.root_certs(roots),
            None => tls,
        };
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            // The hub's own redirects stay on its host; those to a CDN carry a signature of their own.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(patience.connect))
            .timeout_connect(Some(patience.connect))
            .timeout_send_request(Some(patience.connect))
            .timeout_recv_response(Some(patience.read))
            .timeout_per_read(Some(patience.read))
            .build();
        Self { agent: config.new_agent(), patience, is_waited_for: false }
    }

    /// The same for somebody who waits: that nobody is there they hear soon.
    pub fn waited_for(&self) -> Self {
        Self { is_waited_for: true, ..self.clone() }
    }

    /// The whole of something small.
    pub fn whole(
        &self,
        request: &Request,
        max: u64,
        cancel: &AtomicBool,
    ) -> Result<Vec<u8>, BlobError> {
        let mut body = Vec::new();
        self.insist(request, &Part::Whole { max }, &mut body, cancel)?;
        Ok(body)
    }

    /// These bytes of a file of length `of`, appended to `out`.
    pub fn range(
        &self,
        request: &Request,
        (bytes, of): (Range<u64>, u64),
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Result<(), BlobError> {
        self.insist(request, &Part::Range { bytes, of }, out, cancel)
    }

    /// The length and the ETag of a file.
    pub fn describe(
        &self,
        request: &Request,
        cancel: &AtomicBool,
    ) -> Result<(u64, String), BlobError> {
        let mut found = (0, String::new());
        self.retry(request, cancel, &mut |_| match self.look(request, &mut found) {
            Ok(()) => (Tried::Done, false),
            Err(tried) => (tried, false),
        })?;
        Ok(found)
    }

    fn look(&self, request: &Request, found: &mut (u64, String)) -> Result<(), Tried> {
        let mut call = self.agent.get(&request.url).header("Range", "bytes=0-0");
        for (name, value) in &request.headers {
            call = call.header(*name, value);
        }
        let call = call.config().max_redirects(request.redirects()).build().call();
        let mut response = call.map_err(|error| failed(&error))?;
        if !matches!(response.status().as_u16(), 200 | 206) {
            return Err(request.refusal(&mut response));
        }
        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
        let range = header("content-range");
        let len = range.as_deref().and_then(|range| range.rsplit('/').next()?.parse().ok());
        let missing = |what: &str| Tried::Final(request.damaged(format!("it says no {what}")));
        *found = (
            len.ok_or_else(|| missing("length: it does not serve ranges"))?,
            header("etag").ok_or_else(|| missing("ETag"))?,
        );
        Ok(())
    }

    fn insist(
        &self,
        request: &Request,
        part: &Part,
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Result<(), BlobError> {
        let before = out.len();
        self.retry(request, cancel, &mut |cancel| {
            let came = out.len();
            let part = match part {
                Part::Whole { max } => {
                    out.truncate(before);
                    Part::Whole { max: *max }
                }
                Part::Range { bytes, of } => {
                    let first = bytes.start + (out.len() - before) as u64;
                    Part::Range { bytes: first..bytes.end, of: *of }
                }
            };
            let tried = self.attempt(request, part, out, cancel);
            (tried, out.len() > came)
        })
    }

    /// Tries until it is done, or final, or our patience ends; an attempt says whether it moved.
    fn retry(
        &self,
        request: &Request,
        cancel: &AtomicBool,
        attempt: &mut dyn FnMut(&AtomicBool) -> (Tried, bool),
    ) -> Result<(), BlobError> {
        let begun = Instant::now();
        let mut pause = self.patience.first_pause;
        let mut tries = 0;
        loop {
            tries += 1;
            let mut bounds = (self.patience.tries, self.patience.within);
            let (why, asked) = match attempt(cancel) {
                (Tried::Done, _) => return Ok(()),
                (Tried::Final(error), _) => return Err(error),
                (Tried::Nobody(why), _) => {
                    if self.is_waited_for {
                        bounds = (bounds.0.min(NOBODY_TRIES), bounds.1.min(NOBODY_WITHIN));
                    }
                    (why, None)
                }
                (Tried::Again(why, asked), moved) => {
                    // What moves is not stuck, however often it breaks.
                    if moved {
                        (tries, pause) = (1, self.patience.first_pause);
                    }
                    (why, asked)
                }
            };
            let wait = asked.unwrap_or(pause).min(PAUSE_MAX);
            if tries >= bounds.0 || begun.elapsed() + wait > bounds.1 {
                return Err(BlobError::Unreachable {
                    origin: request.origin.clone(),
                    what: request.what.clone(),
                    tries,
                    within: begun.elapsed(),
                    why,
                });
            }
            tracing::debug!(
                origin = request.origin,
                what = request.what,
                "again in {wait:?}: {why}"
            );
            wait_for(wait, cancel)?;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn attempt(
        &self,
        request: &Request,
        part: Part,
        out: &mut Vec<u8>,
        cancel: &AtomicBool,
    ) -> Tried {
        let len = match &part {
            Part::Whole { max } => *max,
            Part::Range { bytes, .. } => bytes.end - bytes.start,
        };
        let slowest = self.patience.read + Duration::from_secs(len / SLOWEST_BYTES_PER_S);
        let mut call = self.agent.get(&request.url);
        for (name, value) in &request.headers {
            call = call.header(*name, value);
        }
        if let Part::Range { bytes, .. } = &part {
            call = call.header("Range", format!("bytes={}-{}", bytes.start, bytes.end - 1));
        }
        let config = call.config().max_redirects(request.redirects());
        let call = config.timeout_recv_body(Some(slowest)).build().call();
        let mut response = match call {
            Ok(response) => response,
            Err(error) => return failed(&error),
        };
        match (response.status().as_u16(), &part) {
            (200, Part::Whole { .. }) => {}
            (206, Part::Range { bytes, of }) => {
                if let Err(why) = check_range(&response, bytes, *of) {
                    return Tried::Final(request.damaged(why));
                }
            }
            // All of it, where all of it was asked for.
            (200, Part::Range { bytes, of }) if *bytes == (0..*of) => {}
            (200, Part::Range { .. }) => {
                let why =
                    "it sends the whole file where a part was asked for: it does not serve ranges";
                return Tried::Final(request.damaged(why.to_owned()));
            }
            _ => return request.refusal(&mut response),
        }
        read_body(&mut response, len, &part, out, cancel).unwrap_or_else(|why| match why {
            Broken::Longer => Tried::Final(request.damaged(format!("more than {len} bytes came"))),
            Broken::Cancelled => Tried::Final(BlobError::Cancelled),
            Broken::Off(why) => Tried::Again(why, None),
        })
    }
}

/// What a call without an answer means for the next one.
fn failed(error: &ureq::Error) -> Tried {
    if !is_nobody_there(error) {
        return Tried::Again(error.to_string(), None);
    }
    let words = format!(
        "nobody is reached there ({error}): see that this machine has a way to it, or say a proxy (HTTPS_PROXY)"
    );
    Tried::Nobody(words)
}

/// Whether nobody was found to ask.
fn is_nobody_there(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => true,
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable => true,
            // The standard library has no kind for what a resolver says.
            _ => error.to_string().starts_with("failed to lookup address information"),
        },
        _ => false,
    }
}

/// How a body ended before its end.
enum Broken {
    Longer,
    Cancelled,
    Off(String),
}

fn read_body(
    response: &mut Response<Body>,
    len: u64,
    part: &Part,
    out: &mut Vec<u8>,
    cancel: &AtomicBool,
) -> Result<Tried, Broken> {
    let mut reader = response.body_mut().as_reader();
    let mut left = len;
    let mut buffer = [0; 64 << 10];
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(Broken::Cancelled);
        }
        let read = reader.read(&mut buffer).map_err(|error| Broken::Off(error.to_string()))?;
        if read == 0 {
            break;
        }
        left = left.checked_sub(read as u64).ok_or(Broken::Longer)?;
        out.extend_from_slice(&buffer[..read]);
        // A body that is not delimited would be waited for in vain.
        if left == 0 && matches!(part, Part::Range { .. }) {
            break;
        }
    }
    match part {
        Part::Range { .. } if left > 0 => {
            Err(Broken::Off(format!("the answer ended {left} bytes too early")))
        }
        Part::Range { .. } | Part::Whole { .. } => Ok(Tried::Done),
    }
}

impl Request {
    fn damaged(&self, why: String) -> BlobError {
        BlobError::Damaged { origin: self.origin.clone(), what: self.what.clone(), why }
    }

    fn redirects(&self) -> u32 {
        if self.is_signed { 0 } else { REDIRECTS_MAX }
    }

    fn refusal(&self, response: &mut Response<Body>) -> Tried {
        let status = response.status().as_u16();
        let (origin, what, advice) = (self.origin.clone(), self.what.clone(), self.advice);
        match status {
            401 | 403 => Tried::Final(BlobError::Denied { origin, what, status, advice }),
            300..=399 => {
                let to = response.headers().get("location").and_then(|to| to.to_str().ok());
                let to = to.unwrap_or("another place").chars().take(WORDS_MAX as usize);
                let words = format!(
                    "it sends on to {}, where a signed request does not go; {advice}",
                    to.collect::<String>()
                );
                Tried::Final(BlobError::Refused { origin, what, status, words })
            }
            404 => Tried::Final(BlobError::NotFound { origin, what, advice }),
            408 | 429 | 500..=599 => {
                let asked = response.headers().get("retry-after");
                let asked = asked.and_then(|value| value.to_str().ok()?.trim().parse().ok());
                let words = words(response);
                let why = format!("HTTP {status} {words}").trim_end().to_owned();
                Tried::Again(why, asked.map(Duration::from_secs))
            }
            _ => {
                let words = words(response);
                Tried::Final(BlobError::Refused { origin, what, status, words })
            }
        }
    }
}

/// The beginning of an answer that should be words.
fn words(response: &mut Response<Body>) -> String {
    let mut bytes = Vec::new();
    let _ = response.body_mut().as_reader().take(WORDS_MAX).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

/// Whether the answer is for the very bytes that were asked for, of a file of the length that is known.
fn check_range(response: &Response<Body>, bytes: &Range<u64>, of: u64) -> Result<(), String> {
    let header = response.headers().get("content-range").and_then(|value| value.to_str().ok());
    let expected = format!("bytes {}-{}/{of}", bytes.start, bytes.end - 1);
    match header {
        Some(found) if found.trim() == expected => Ok(()),
        found => Err(format!(
            "its Content-Range is `{}`; expected `{expected}`",
            found.unwrap_or("not there")
        )),
    }
}

/// Waits, but not for somebody who has given up.
#[allow(clippy::disallowed_methods, reason = "a pause that a server asked for has no event")]
pub(super) fn wait_for(pause: Duration, cancel: &AtomicBool) -> Result<(), BlobError> {
    let until = Instant::now() + pause;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(BlobError::Cancelled);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(CANCEL_LOOK));
    }
}

/// The authorities of `SSL_CERT_FILE` instead of the built-in ones.
fn extra_roots() -> Option<RootCerts> {
    let file = std::env::var_os("SSL_CERT_FILE")?;
    let pem = std::fs::read(&file);
    let pem = pem.inspect_err(|error| tracing::warn!("SSL_CERT_FILE {}: {error}", file.display()));
    let certificates = pem.ok()?;
    let certificates: Vec<_> = ureq::tls::parse_pem(&certificates)
        .filter_map(|item| match item {
            Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    (!certificates.is_empty()).then(|| RootCerts::new_with_certs(&certificates))
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("url", &self.url).finish_non_exhaustive()
    }
}
