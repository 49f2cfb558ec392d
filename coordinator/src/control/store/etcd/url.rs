//! ○ `etcd://[user:password@]host[:port][,host[:port]…][/prefix]`, or `etcds://` for TLS.

use std::fmt;
use std::str::FromStr;

/// The port that etcd takes clients on, where none is said.
const PORT: u16 = 2379;

/// Where in etcd a cluster's keys are, where nothing is said.
const PREFIX: &str = "shoal";

/// Far more members than an etcd has.
const HOSTS_MAX: usize = 16;

/// It stands in each key.
const PREFIX_LEN_MAX: usize = 128;

/// Which etcd, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdUrl {
    /// Whether each connection is TLS.
    pub tls: bool,
    /// `host:port` of each member.
    pub hosts: Vec<String>,
    /// Who asks.
    pub user: Option<String>,
    /// His password, where the URL has it; a file is better, since others see the command line.
    pub password: Option<Secret>,
    /// What all keys begin with.
    pub prefix: String,
}

/// Text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}

/// A URL that names no store. It never repeats what stands before an `@`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// Another scheme.
    #[error(
        "a store is etcd://HOST[:PORT][,HOST[:PORT]…][/PREFIX], or etcds:// for TLS; without \
         --store the state is kept in --data"
    )]
    Scheme,
    /// No host, or one that is none.
    #[error("`{0}` is not HOST or HOST:PORT")]
    Host(String),
    /// Too many hosts.
    #[error("{0} hosts are more than an etcd has; name up to {HOSTS_MAX}")]
    Hosts(usize),
    /// The part before the `@` cannot be read.
    #[error(
        "what stands before the `@` is not USER or USER:PASSWORD; write other characters as %40"
    )]
    User,
    /// The prefix has characters that are trouble.
    #[error(
        "`{0}` is not a prefix: write up to {PREFIX_LEN_MAX} letters, digits, `.`, `_`, `-` and `/`"
    )]
    Prefix(String),
}

impl FromStr for EtcdUrl {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let (scheme, rest) = text.split_once("://").ok_or(BadUrl::Scheme)?;
        let tls = match scheme {
            "etcd" => false,
            "etcds" => true,
            _ => return Err(BadUrl::Scheme),
        };
        // A password may hold a `/`, a host may not.
        let (who, rest) = match rest.rsplit_once('@') {
            Some((who, rest)) => (Some(who), rest),
            None => (None, rest),
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, password) = match who {
            None => (None, None),
            Some(who) => {
                let (user, password) = match who.split_once(':') {
                    Some((user, password)) => (user, Some(Secret(decoded(password)?))),
                    None => (who, None),
                };
                let user = decoded(user)?;
                if user.is_empty() {
                    return Err(BadUrl::User);
                }
                (Some(user), password)
            }
        };
        let hosts: Vec<String> = hosts.split(',').map(host).collect::<Result<_, _>>()?;
        if hosts.len() > HOSTS_MAX {
            return Err(BadUrl::Hosts(hosts.len()));
        }
        Ok(Self { tls, hosts, user, password, prefix: self::prefix(prefix)? })
    }
}

/// Without user and password, for people.
impl fmt::Display for EtcdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "etcds" } else { "etcd" };
        write!(f, "{scheme}://{}/{}", self.hosts.join(","), self.prefix)
    }
}

fn host(text: &str) -> Result<String, BadUrl> {
    let bad = || BadUrl::Host(text.to_owned());
    // The brackets of an IPv6 address hold its colons.
    let end = text.rfind(']').map_or(0, |at| at + 1);
    let (name, port) = match text[end..].split_once(':') {
        Some((rest, port)) => (&text[..end + rest.len()], port.parse().map_err(|_| bad())?),
        None => (text, PORT),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let sound = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !name.is_empty() && name.chars().all(plain),
    };
    if sound && port != 0 { Ok(format!("{name}:{port}")) } else { Err(bad()) }
}

fn prefix(text: &str) -> Result<String, BadUrl> {
    let trimmed = text.trim_matches('/');
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    match trimmed {
        "" => Ok(PREFIX.to_owned()),
        _ if trimmed.len() <= PREFIX_LEN_MAX && trimmed.chars().all(plain) => {
            Ok(trimmed.to_owned())
        }
        _ => Err(BadUrl::Prefix(text.to_owned())),
    }
}

/// `%40` is `@`.
fn decoded(text: &str) -> Result<String, BadUrl> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit(), digit());
                (high.ok_or(BadUrl::User)? * 16 + low.ok_or(BadUrl::User)?) as u8
            }
            byte => byte,
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| BadUrl::User)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(text: &str) -> (bool, String, Option<String>, Option<String>, String) {
        let url: EtcdUrl = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        let password = url.password.as_ref().map(|p| p.reveal().to_owned());
        (url.tls, url.hosts.join(" "), url.user, password, url.prefix)
    }

    #[test]
    fn urls_are_read() {
        let some = |text: &str| Some(text.to_owned());
        for (text, tls, hosts, user, password, prefix) in [
            ("etcd://10.0.0.1", false, "10.0.0.1:2379", None, None, "shoal"),
            ("etcd://a:1,b,[::1]:3/", false, "a:1 b:2379 [::1]:3", None, None, "shoal"),
            ("etcds://etcd.example:2379/x/y", true, "etcd.example:2379", None, None, "x/y"),
            ("etcd://u@a", false, "a:2379", some("u"), None, "shoal"),
            ("etcd://u:p%40:/x@a/q", false, "a:2379", some("u"), some("p@:/x"), "q"),
        ] {
            let expected = (tls, hosts.to_owned(), user, password, prefix.to_owned());
            assert_eq!(parts(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for (text, words) in [
            ("10.0.0.1:2379", "a store is etcd://"),
            ("http://10.0.0.1:2379", "a store is etcd://"),
            ("etcd://", "`` is not HOST"),
            ("etcd://a,,b", "`` is not HOST"),
            ("etcd://a:99999", "`a:99999` is not HOST"),
            ("etcd://u:hunter2@a:x", "`a:x` is not HOST"),
            ("etcd://u:hunter2%4@a", "before the `@`"),
            ("etcd://:hunter2@a", "before the `@`"),
            ("etcd://u:hunter2@a/ü", "is not a prefix"),
            ("etcd://[::g]:1", "is not HOST"),
        ] {
            let error = text.parse::<EtcdUrl>().unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("hunter2"), "{text}: {error}");
        }
        let url: EtcdUrl = "etcd://u:hunter2@a".parse().unwrap();
        assert!(!format!("{url:?} {url}").contains("hunter2"));
    }
}
