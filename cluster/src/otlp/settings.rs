//! ○ Where traces go and which: the flag, and OpenTelemetry's own environment variables.

use std::str::FromStr;
use std::time::Duration;

/// What OTLP appends to a base address.
const PATH: &str = "/v1/traces";

/// How long a collector may take for a batch, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The most headers for the collector.
const HEADERS_MAX: usize = 16;

/// A collector's base address, such as `http://127.0.0.1:4318`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpUrl(String);

impl FromStr for OtlpUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            Some(("http", rest)) => rest,
            Some(("https", _)) => {
                return Err("traces go out over plain HTTP; name a collector's agent on this \
                            machine, such as http://127.0.0.1:4318, and let it speak TLS"
                    .to_owned());
            }
            _ => "",
        };
        let host = rest.split('/').next().unwrap_or_default();
        let plain = text.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '?' | '#' | '@'));
        if host.is_empty() || host.starts_with(':') || !plain {
            let text: String = text.chars().take(100).collect();
            return Err(format!(
                "`{text}` is not a collector's address; write http://HOST:PORT, such as \
                 http://127.0.0.1:4318"
            ));
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }
}

impl std::fmt::Display for OtlpUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// All that is set.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where batches are posted.
    pub url: String,
    /// What goes with each: names and values.
    pub headers: Vec<(String, String)>,
    /// How long one may take.
    pub timeout: Duration,
    /// What this process is called.
    pub service: String,
    /// The share of requests that are traced where clients say nothing.
    pub ratio: f64,
}

impl Settings {
    /// `None` where nobody asked for traces. An error is about the environment: the flag was read before.
    pub fn read(
        flag: Option<&OtlpUrl>,
        service: &str,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, String> {
        // OpenTelemetry takes an empty variable for one that is not set.
        let set = |name: &str| environment(name).filter(|value| !value.trim().is_empty());
        let is = |name: &str, word: &str| set(name).is_some_and(|v| v.eq_ignore_ascii_case(word));
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return Ok(None);
        }
        let with = |name: &str| {
            let parse = |text: String| {
                text.trim().parse::<OtlpUrl>().map_err(|why| format!("{name}: {why}"))
            };
            set(name).map(parse).transpose()
        };
        let url = match flag {
            Some(url) => append_path(url),
            // This one is taken as it is.
            None => match with("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")? {
                Some(url) => url.0,
                None => match with("OTEL_EXPORTER_OTLP_ENDPOINT")? {
                    Some(url) => append_path(&url),
                    None => return Ok(None),
                },
            },
        };
        let number = |name: &str| {
            let parse = |text: String| {
                text.trim().parse::<f64>().map_err(|_| format!("{name}: `{text}` is no number"))
            };
            set(name).map(parse).transpose()
        };
        let timeout = number("OTEL_EXPORTER_OTLP_TIMEOUT")?;
        let ratio = match set("OTEL_TRACES_SAMPLER") {
            Some(name) if name.ends_with("always_off") => 0.0,
            _ => number("OTEL_TRACES_SAMPLER_ARG")?.unwrap_or(1.0).clamp(0.0, 1.0),
        };
        Ok(Some(Self {
            url,
            headers: headers(&set("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default())?,
            timeout: timeout
                .filter(|ms| (1.0..=600_000.0).contains(ms))
                .map_or(TIMEOUT, |ms| Duration::from_millis(ms as u64)),
            service: set("OTEL_SERVICE_NAME").unwrap_or_else(|| service.to_owned()),
            ratio: if ratio.is_nan() { 1.0 } else { ratio },
        }))
    }
}

fn append_path(url: &OtlpUrl) -> String {
    match url.0.ends_with(PATH) {
        true => url.0.clone(),
        false => format!("{}{PATH}", url.0),
    }
}

/// `name=value,name=value`, values in percent-encoding. They may be secrets: no error repeats one.
fn headers(text: &str) -> Result<Vec<(String, String)>, String> {
    const NAME: &str = "OTEL_EXPORTER_OTLP_HEADERS";
    let mut headers = Vec::new();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()) {
        let bad = || format!("{NAME}: write name=value,name=value, at most {HEADERS_MAX}");
        let (name, value) = pair.split_once('=').ok_or_else(bad)?;
        let value = percent_decoded(value.trim()).ok_or_else(bad)?;
        let good = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
        let name = name.trim();
        if name.is_empty() || !name.bytes().all(good) || headers.len() == HEADERS_MAX {
            return Err(bad());
        }
        headers.push((name.to_owned(), value));
    }
    Ok(headers)
}

/// `None` where it is no text that a header can have.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            byte => bytes.push(byte),
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()).then_some(text)
}
