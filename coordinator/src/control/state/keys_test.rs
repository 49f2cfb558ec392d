use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn name(text: &str) -> KeyName {
    KeyName::new(text).unwrap()
}

fn make(keys: &mut Keys, text: &str, at: u64) -> Result<Vec<Effect>, Refusal> {
    let hash = KeyHash::of(&format!("{text}{at}"));
    keys.create(&name(text), hash, KeyLimits::default(), Some(DAY), Timestamp(at))
}

#[test]
fn a_key_is_good_until_its_last_second_or_until_it_is_taken_back() {
    let mut keys = Keys::default();
    assert!(!keys.ever());
    assert_eq!(make(&mut keys, "a", 10), Ok(vec![Effect::KeyCreated { name: name("a") }]));
    let key = keys.find(&KeyHash::of("a10")).unwrap().clone();
    for (at, standing) in [
        (10, KeyStanding::Good),
        (10 + 86_400, KeyStanding::Good),
        (11 + 86_400, KeyStanding::Expired),
    ] {
        assert_eq!(key.standing(Timestamp(at)), standing, "at {at}");
        assert_eq!(keys.any_good(Timestamp(at)), standing == KeyStanding::Good, "at {at}");
    }
    assert_eq!(keys.find(&KeyHash::of("a11")), None);
    assert_eq!(
        keys.revoke(&name("a"), Timestamp(20)),
        Ok(vec![Effect::KeyRevoked { name: name("a") }])
    );
    let key = keys.find(&KeyHash::of("a10")).unwrap();
    assert_eq!(
        (key.standing(Timestamp(21)), key.revoked),
        (KeyStanding::Revoked, Some(Timestamp(20)))
    );
    assert!(keys.ever() && !keys.any_good(Timestamp(21)));
}

#[test]
fn a_name_is_free_again_once_its_key_is_of_the_past() {
    let mut keys = Keys::default();
    make(&mut keys, "a", 0).unwrap();
    assert_eq!(make(&mut keys, "a", 1), Err(Refusal::KeyNameTaken { name: name("a") }));
    keys.revoke(&name("a"), Timestamp(2)).unwrap();
    let twice = keys.revoke(&name("a"), Timestamp(2));
    assert_eq!(twice, Err(Refusal::KeyRevokedBefore { name: name("a") }));
    make(&mut keys, "a", 3).unwrap();
    // The newer one is meant, and the older one keeps its time.
    keys.revoke(&name("a"), Timestamp(4)).unwrap();
    let revoked: Vec<_> = keys.iter().map(|key| key.revoked.map(|at| at.0)).collect();
    assert_eq!(revoked, [Some(2), Some(4)]);
    assert_eq!(keys.revoke(&name("b"), Timestamp(5)), Err(Refusal::UnknownKey { name: name("b") }));
    // A secret that was once taken back must not come to life.
    let again =
        keys.create(&name("a"), KeyHash::of("a0"), KeyLimits::default(), None, Timestamp(6));
    assert_eq!(again, Err(Refusal::KeyUsedBefore));
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    let mut keys = Keys::default();
    let hash = KeyHash([1; 32]);
    let mut ask = |limits, expires| keys.create(&name("a"), hash, limits, expires, Timestamp(0));
    for limit in [0, LIMIT_MAX + 1] {
        let rate = KeyLimits { requests_per_minute: Some(limit), concurrent: None };
        assert_eq!(ask(rate, None), Err(Refusal::BadKeyLimit { limit }));
        let concurrent = KeyLimits { requests_per_minute: None, concurrent: Some(limit) };
        assert_eq!(ask(concurrent, None), Err(Refusal::BadKeyLimit { limit }));
    }
    for life in [Duration::from_millis(1), EXPIRY_MAX + Duration::from_secs(1)] {
        assert_eq!(ask(KeyLimits::default(), Some(life)), Err(Refusal::BadKeyExpiry));
    }
    assert!(ask(KeyLimits::default(), None).is_ok());
}

#[test]
fn keys_of_the_past_make_room_oldest_first_and_good_ones_never() {
    let mut keys = Keys::default();
    for at in 0..KEYS_MAX {
        make(&mut keys, &format!("k{at}"), at as u64).unwrap();
    }
    let full = make(&mut keys, "more", 2000);
    assert!(matches!(full, Err(Refusal::TooMany { what: Noun::Keys, .. })), "{full:?}");
    keys.revoke(&name("k7"), Timestamp(2000)).unwrap();
    keys.revoke(&name("k5"), Timestamp(2001)).unwrap();
    make(&mut keys, "more", 2002).unwrap();
    assert_eq!(keys.iter().count(), KEYS_MAX);
    let has = |keys: &Keys, text| keys.iter().any(|key| key.name == name(text));
    assert!(!has(&keys, "k5") && has(&keys, "k7") && has(&keys, "more"));
    assert!(keys.ever());
}
