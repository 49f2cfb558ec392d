//! Where hubs and object stores are, and as whom to ask: read once, from the environment that their own
//! tools read. None of it changes what a model is: its commit and its fingerprint do that.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::chunks::Cut;

/// The public hub.
const HUB: &str = "https://huggingface.co";

/// How patient to be with an origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// To be connected.
    pub connect: Duration,
    /// For the next byte of an answer: a source that sends nothing for so long is asked again.
    pub read: Duration,
    /// The pause after the first failure; it doubles up to `PAUSE_MAX`.
    pub first_pause: Duration,
    /// All tries of one request, and the pauses between them. What has come already is kept.
    pub tries: u32,
    /// No try begins later than this after the first.
    pub within: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(20),
            first_pause: Duration::from_millis(250),
            // With the pauses between them more than half a minute of a hub's hiccup.
            tries: 8,
            within: Duration::from_secs(180),
        }
    }
}

/// All of it.
#[derive(Clone, PartialEq, Eq)]
pub struct BlobSettings {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// As whom to ask it.
    pub token: Option<String>,
    /// The cache of the hub's own tools: what lies there whole is used as it is.
    pub hub_cache: Option<PathBuf>,
    /// Ask nobody.
    pub offline: bool,
    /// As whom to ask an object store.
    pub keys: Option<S3Keys>,
    /// Another object store than Amazon's; asked with the bucket in the path.
    pub s3_endpoint: Option<String>,
    /// The region that signatures name.
    pub region: String,
    /// How files are cut.
    pub cut: Cut,
    /// How patient to be.
    pub patience: Patience,
}

/// Credentials of an object store.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Keys {
    /// The public part.
    pub id: String,
    /// The secret part.
    pub secret: String,
    /// For credentials that expire.
    pub session: Option<String>,
}

/// Secrets are not printed.
impl fmt::Debug for BlobSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.is_some())
            .field("hub_cache", &self.hub_cache)
            .field("s3", &self.keys.is_some())
            .finish_non_exhaustive()
    }
}

impl Default for BlobSettings {
    fn default() -> Self {
        Self::read(|_| None)
    }
}

/// Whether what is sent there can be read on its way: it is another machine, and not encrypted.
pub(super) fn travels_plain(endpoint: &str) -> bool {
    let Some(plain) = endpoint.strip_prefix("http://") else { return false };
    let host = plain.split(['/', ':']).next().unwrap_or_default();
    !matches!(host, "127.0.0.1" | "localhost")
}

impl BlobSettings {
    /// What this process was told.
    pub fn from_environment() -> Self {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let home = path("HF_HOME").or_else(|| {
            let cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
            Some(cache?.join("huggingface"))
        });
        let token = variable("HF_TOKEN").or_else(|| {
            let file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")));
            read_token(&file?)
        });
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned());
        let keys = variable("AWS_ACCESS_KEY_ID").zip(variable("AWS_SECRET_ACCESS_KEY"));
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(|token| token.trim().to_owned()),
            hub_cache: path("HF_HUB_CACHE").or_else(|| Some(home?.join("hub"))),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|said| said != "0"),
            keys: keys.map(|(id, secret)| {
                let session = variable("AWS_SESSION_TOKEN");
                S3Keys { id, secret, session }
            }),
            s3_endpoint: variable("AWS_ENDPOINT_URL_S3")
                .or_else(|| variable("AWS_ENDPOINT_URL"))
                .map(|url| url.trim_end_matches('/').to_owned()),
            region: variable("AWS_REGION")
                .or_else(|| variable("AWS_DEFAULT_REGION"))
                .unwrap_or_else(|| "us-east-1".to_owned()),
            cut: Cut::default(),
            patience: Patience::default(),
        }
    }
}

/// A token as the hub's own tools keep it; bounded, since the path may be anything.
fn read_token(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok().filter(|text| text.len() <= 4096)?;
    let token = text.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_hubs_own_tools_are_told_counts_here_too() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let folder = home.path().display().to_string();
        let said = |name: &str| match name {
            "HF_ENDPOINT" => Some("http://127.0.0.1:1/".to_owned()),
            "HF_HOME" => Some(folder.clone()),
            _ => None,
        };
        let settings = BlobSettings::read(said);
        assert_eq!(settings.endpoint, "http://127.0.0.1:1");
        assert_eq!(settings.token.as_deref(), Some("hf_file"));
        assert_eq!(settings.hub_cache, Some(home.path().join("hub")));
        let both = BlobSettings::read(|name| match name {
            "HF_TOKEN" => Some("hf_said".to_owned()),
            name => said(name),
        });
        assert_eq!(both.token.as_deref(), Some("hf_said"));
        assert!(!format!("{both:?}").contains("hf_said"), "a token is not printed");
        assert_eq!(BlobSettings::default().endpoint, HUB);
    }
}
