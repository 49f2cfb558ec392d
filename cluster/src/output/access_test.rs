use shoal_protocol::access::*;
use shoal_protocol::id::{NodeId, Role};

use super::super::golden::check;
use super::super::json;
use super::*;

/// 2026-11-21 15:20:00 UTC.
const NOW: u64 = 1_795_274_400;

fn key(name: &str, standing: KeyStanding) -> KeyView {
    KeyView {
        name: KeyName::new(name).unwrap(),
        standing,
        created_s: NOW,
        expires_s: None,
        revoked_s: None,
        limits: KeyLimits::default(),
    }
}

#[test]
fn golden_keys() {
    let limits = KeyLimits { requests_per_minute: Some(60), concurrent: Some(4) };
    let list = [
        KeyView { revoked_s: Some(NOW + 60), ..key("old", KeyStanding::Revoked) },
        KeyView { expires_s: Some(NOW + 86_400), ..key("ci", KeyStanding::Expired) },
        KeyView { limits, ..key("alice@example.org", KeyStanding::Good) },
    ];
    check("keys.txt", &keys(&list));
    check("keys-none.txt", &keys(&[]));
    check("keys.json", &(json::line(&KeyList::from(&list[..])).unwrap() + "\n"));
}

#[test]
fn golden_tokens() {
    let token = |id: &str, uses_left| TokenView {
        id: id.to_owned(),
        role: Role::Worker,
        uses_left,
        expires_s: NOW + 3_600,
    };
    let list = [token("0f3a5512bc77", 1), token("c0ffee00c0ff", 10_000)];
    check("tokens.txt", &tokens(&list));
    check("tokens-none.txt", &tokens(&[]));
    check("tokens.json", &(json::line(&TokenList::from(&list[..])).unwrap() + "\n"));
}

#[test]
fn golden_nodes() {
    let node = |node, connected, placed, starts| NodeView {
        node,
        joined_s: NOW,
        starts,
        build: if starts == 0 { String::new() } else { "0.1.0".to_owned() },
        connected,
        placed,
    };
    let list = [
        node(NodeId::coordinator(1), None, false, 0),
        node(NodeId::worker(1), Some(true), true, 3),
        node(NodeId::worker(12), Some(false), false, 0),
        node(NodeId::admin(1), None, false, 0),
    ];
    check("nodes.txt", &nodes(&list, None));
    check("nodes.json", &(json::line(&NodeList::new(&list, None)).unwrap() + "\n"));
    let as_of = Some(AsOf { at_s: NOW, why: Some("no majority of the coordinators: …") });
    check("nodes-known.txt", &nodes(&list, as_of));
    check("nodes-known.json", &(json::line(&NodeList::new(&list, as_of)).unwrap() + "\n"));
}

#[test]
fn seconds_are_dates() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_399, "2000-02-28T23:59:59Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_709_251_199, "2024-02-29T23:59:59Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(utc(seconds), text);
    }
}
