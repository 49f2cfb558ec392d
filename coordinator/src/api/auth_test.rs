use shoal_protocol::access::KeyLimits;

use super::*;
use crate::control::state::{Change, ClusterState, Command, KeyCommand};
use shoal_protocol::id::{Incarnation, NodeId};

const LOOPBACK: &str = "127.0.0.1:8000";
const PUBLIC: &str = "0.0.0.0:8000";
const SECRET: &str = "sk-shoal-5ec2e7";

/// A state after these changes, one a second.
fn keys(changes: Vec<KeyCommand>) -> Keys {
    let mut state = ClusterState::default();
    for (sequence, change) in (1..).zip(changes) {
        let (client, at) = (NodeId::coordinator(1), Timestamp(sequence));
        let (incarnation, change) = (Incarnation(1), Change::Key(change));
        state.apply(&Command { client, incarnation, sequence, at, change }).unwrap();
    }
    state.keys
}

fn create(limits: KeyLimits, expires: Option<Duration>) -> KeyCommand {
    KeyCommand::Create { name: name(), hash: KeyHash::of(SECRET), limits, expires }
}

fn revoke() -> KeyCommand {
    KeyCommand::Revoke { name: name() }
}

fn name() -> KeyName {
    KeyName::new("alice").unwrap()
}

fn ask(keys: &Keys, listener: &str, path: &str, shown: &[&str]) -> Result<bool, Denied> {
    let headers = shown.iter().map(|value| (header::AUTHORIZATION, value.parse().unwrap()));
    let listener = listener.parse().unwrap();
    let judged = judge(keys, listener, path, &headers.collect(), Timestamp(100));
    judged.map(|key| key.is_some())
}

#[test]
fn without_any_key_this_machine_alone_is_let_in() {
    let none = Keys::default();
    assert_eq!(ask(&none, LOOPBACK, "/v1/models", &[]), Ok(false));
    assert_eq!(ask(&none, PUBLIC, "/v1/models", &[]), Err(Denied::Missing));
    assert_eq!(ask(&none, PUBLIC, "/v1/models", &["Bearer x"]), Err(Denied::Unknown));
}

#[test]
fn after_the_first_key_every_request_shows_one_wherever_the_api_listens() {
    let keys = keys(vec![create(KeyLimits::default(), None)]);
    let good = format!("Bearer {SECRET}");
    for listener in [LOOPBACK, PUBLIC] {
        for (shown, expected) in [
            (vec![good.as_str()], Ok(true)),
            (vec!["bearer  sk-shoal-5ec2e7"], Ok(true)),
            (vec![], Err(Denied::Missing)),
            (vec!["Bearer"], Err(Denied::NotBearer)),
            (vec!["Bearer "], Err(Denied::NotBearer)),
            (vec!["Basic c2s6"], Err(Denied::NotBearer)),
            (vec![SECRET], Err(Denied::NotBearer)),
            (vec![&good, &good], Err(Denied::NotBearer)),
            (vec!["Bearer sk-shoal-5ec2e"], Err(Denied::Unknown)),
            (vec!["Bearer sk-shoal-5ec2e77"], Err(Denied::Unknown)),
        ] {
            for path in ["/v1/models", "/v1/chat/completions", "/nowhere", "/health/x"] {
                assert_eq!(ask(&keys, listener, path, &shown), expected, "{path} {shown:?}");
            }
        }
        for path in OPEN {
            assert_eq!(ask(&keys, listener, path, &[]), Ok(false), "{path}");
        }
    }
    let long = format!("Bearer {}", "x".repeat(KEY_LEN_MAX + 1));
    assert_eq!(ask(&keys, PUBLIC, "/v1/models", &[&long]), Err(Denied::Unknown));
}

#[test]
fn when_the_last_key_is_gone_the_api_stays_shut() {
    let good = format!("Bearer {SECRET}");
    let revoked = keys(vec![create(KeyLimits::default(), None), revoke()]);
    let expired = keys(vec![create(KeyLimits::default(), Some(Duration::from_secs(5)))]);
    for listener in [LOOPBACK, PUBLIC] {
        let denied = Err(Denied::Revoked { name: name() });
        assert_eq!(ask(&revoked, listener, "/v1/models", &[&good]), denied);
        let denied = Err(Denied::Expired { name: name() });
        assert_eq!(ask(&expired, listener, "/v1/models", &[&good]), denied);
        assert_eq!(ask(&revoked, listener, "/v1/models", &[]), Err(Denied::Missing));
    }
}

fn limited(requests_per_minute: Option<u32>, concurrent: Option<u32>) -> ApiKey {
    let keys = keys(vec![create(KeyLimits { requests_per_minute, concurrent }, None)]);
    keys.iter().next().unwrap().clone()
}

fn at(millis: u64) -> Instant {
    Instant(0) + Duration::from_millis(millis)
}

#[test]
fn a_key_gets_its_minutes_requests_and_then_one_at_a_time() {
    let key = limited(Some(6), None);
    let mut quotas = Quotas::default();
    let mut let_in = |millis: u64| {
        let entered = (0..100).filter(|_| quotas.enter(at(millis), &key).is_ok()).count();
        (entered, quotas.enter(at(millis), &key).unwrap_err().retry_after().unwrap().as_secs())
    };
    assert_eq!(let_in(0), (6, 10));
    assert_eq!(let_in(4_000), (0, 6));
    assert_eq!(let_in(10_000), (1, 10));
    assert_eq!(let_in(3_600_000), (6, 10));
}

#[test]
fn a_key_has_so_many_requests_under_way_and_gets_them_back() {
    let key = limited(None, Some(2));
    let mut quotas = Quotas::default();
    assert_eq!(quotas.enter(at(0), &key), Ok(true));
    assert_eq!(quotas.enter(at(0), &key), Ok(true));
    assert_eq!(quotas.enter(at(9), &key), Err(Denied::Concurrent { name: name(), max: 2 }));
    quotas.leave(&key.hash);
    assert_eq!(quotas.enter(at(9), &key), Ok(true));
    assert!(quotas.enter(at(9), &key).is_err());
}

#[test]
fn a_request_that_is_denied_a_place_costs_none_of_its_minute() {
    let key = limited(Some(2), Some(1));
    let mut quotas = Quotas::default();
    assert_eq!(quotas.enter(at(0), &key), Ok(true));
    assert!(matches!(quotas.enter(at(0), &key), Err(Denied::Concurrent { .. })));
    quotas.leave(&key.hash);
    assert_eq!(quotas.enter(at(0), &key), Ok(true));
    quotas.leave(&key.hash);
    assert!(matches!(quotas.enter(at(0), &key), Err(Denied::Rate { .. })));
}

#[test]
fn keys_without_limits_cost_nothing_and_idle_ones_are_forgotten() {
    let mut quotas = Quotas::default();
    assert_eq!(quotas.enter(at(0), &limited(None, None)), Ok(false));
    assert!(quotas.usage.is_empty());
    for n in 0..KEYS_MAX as u32 {
        let mut key = limited(Some(1), None);
        key.hash.0[..4].copy_from_slice(&n.to_le_bytes());
        quotas.enter(at(0), &key).unwrap();
        // One of them still runs.
        if n != 7 {
            quotas.leave(&key.hash);
        }
    }
    quotas.enter(at(60_000), &limited(Some(1), None)).unwrap();
    assert_eq!(quotas.usage.len(), 2);
}
