//! ○ Whom a listener on loopback takes requests from: programs of this machine, and no web page.
//!
//! As long as no API key was made the listener's address is the only lock. A browser on this machine stands
//! behind it, and runs other people's pages: one can have its own name resolve to 127.0.0.1 (DNS
//! rebinding), or send a plain POST across origins. The first shows its name in `Host`, the second in
//! `Origin`.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, StatusCode, Uri, Version, header};
use shoal_protocol::error::ErrorCode;

use super::error::ApiError;

/// Whether a request to a listener at this address may go on.
pub fn check(
    listener: SocketAddr,
    version: Version,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<(), ApiError> {
    if !listener.ip().is_loopback() {
        return Ok(());
    }
    let hosts = headers.get_all(header::HOST);
    // A request line may name a host too, and would then win.
    let named = uri.authority().map(|authority| authority.as_str().as_bytes());
    let mut count = 0;
    for host in hosts.iter().map(|host| host.as_bytes()).chain(named) {
        count += 1;
        if !is_loopback(host) {
            return Err(forbidden(format!(
                "the request is for host {}, and this API serves this machine alone: send it to \
                 {listener} or `localhost`; a proxy before it must set `Host` to that",
                shown(host)
            )));
        }
    }
    // HTTP/1.0 has no such header, and browsers have not spoken it for decades.
    if count == 0 && version > Version::HTTP_10 {
        return Err(ApiError::http(StatusCode::BAD_REQUEST, "the request has no `Host` header"));
    }
    for origin in headers.get_all(header::ORIGIN) {
        let host = origin.as_bytes().split(|byte| *byte == b'/').nth(2);
        if !host.is_some_and(is_loopback) {
            return Err(forbidden(format!(
                "the request comes from a web page of {}, and this API takes none but from pages of \
                 this machine; let the page's own server ask instead",
                shown(origin.as_bytes())
            )));
        }
    }
    Ok(())
}

fn forbidden(words: String) -> ApiError {
    ApiError::new(ErrorCode::PermissionDenied, words)
}

/// Whether this is `localhost` or a loopback address, with any port or none: no name server is asked
/// for either.
fn is_loopback(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => (address, port),
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port = port.strip_prefix(':').map_or(port.is_empty(), |port| port.parse::<u16>().is_ok());
    let address = name.parse::<IpAddr>();
    port && (name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|ip| ip.is_loopback()))
}

/// What a client sent, for its own eyes: short, and without what a terminal would obey.
fn shown(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(bytes).chars().take(64).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTENER: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8000);

    fn status(headers: &[(header::HeaderName, &str)]) -> Option<u16> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap()));
        let checked = check(LISTENER, Version::HTTP_11, &Uri::from_static("/"), &headers.collect());
        checked.err().map(|error| error.status.as_u16())
    }

    #[test]
    fn this_machine_is_known_by_its_names() {
        for host in
            ["localhost", "LocalHost:8000", "127.0.0.1:8000", "127.8.9.1", "[::1]:80", "[::1]"]
        {
            assert_eq!(status(&[(header::HOST, host)]), None, "{host}");
            let origin = format!("http://{host}");
            let headers = [(header::HOST, "localhost"), (header::ORIGIN, &*origin)];
            assert_eq!(status(&headers), None, "{origin}");
        }
    }

    #[test]
    fn other_names_are_refused() {
        for host in [
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "localhost:evil",
            "[::1]evil.example",
            "192.168.0.1:8000",
            "0.0.0.0:8000",
            "",
        ] {
            assert_eq!(status(&[(header::HOST, host)]), Some(403), "{host:?}");
        }
        let two = [(header::HOST, "localhost"), (header::HOST, "evil.example")];
        assert_eq!(status(&two), Some(403));
        for origin in
            ["https://evil.example", "null", "localhost", "https://localhost.evil.example"]
        {
            let headers = [(header::HOST, "localhost"), (header::ORIGIN, origin)];
            assert_eq!(status(&headers), Some(403), "{origin}");
        }
    }

    #[test]
    fn the_header_may_be_missing_where_http_has_none() {
        let (uri, none) = (Uri::from_static("/"), HeaderMap::new());
        assert!(check(LISTENER, Version::HTTP_10, &uri, &none).is_ok());
        assert_eq!(status(&[]), Some(400));
        let uri = Uri::from_static("http://evil.example/");
        assert!(check(LISTENER, Version::HTTP_10, &uri, &none).is_err());
    }

    #[test]
    fn a_listener_for_others_has_other_locks() {
        let open = SocketAddr::from(([0, 0, 0, 0], 8000));
        let headers = [(header::HOST, "shoal.example".parse().unwrap())].into_iter().collect();
        assert!(check(open, Version::HTTP_11, &Uri::from_static("/"), &headers).is_ok());
    }
}
