use std::sync::Arc;

use shoal_protocol::control::HeadReport;
use shoal_protocol::error::ErrorCode;
use shoal_protocol::prefix::Tenant;

use super::*;
use crate::serving::ServedReplica;

const NOW: Instant = Instant(60_000_000);

fn replica(id: u32, running: u32, waiting: u32) -> ServedReplica {
    ServedReplica {
        id: ReplicaId(id),
        generation: Generation(1),
        head: NodeId::worker(id),
        requests: Some(SocketAddr::from(([127, 0, 0, 1], 4000 + id as u16))),
        ready: true,
        load: Some(HeadReport {
            replica: ReplicaId(id),
            generation: Generation(1),
            running,
            waiting,
            blocks_total: 100,
            ..HeadReport::default()
        }),
    }
}

fn deployment(replicas: Vec<ServedReplica>) -> ServedDeployment {
    ServedDeployment {
        name: DeploymentName::new("m").expect("a name"),
        created: 0,
        folder: None,
        vocab: 10,
        context_max: 100,
        kind: crate::serving::ServedKind::Generate,
        adapter: None,
        replicas,
        reason: String::new(),
        phase: shoal_protocol::admin::DeploymentPhase::Ready,
    }
}

fn table(served: &ServedDeployment) -> ServingTable {
    let mut table = ServingTable::default();
    table.deployments.insert(served.name.clone(), Arc::new(served.clone()));
    table
}

/// A router that has known these replicas for a minute.
fn router(policy: Policy, sequences_per_replica: u32, served: &ServedDeployment) -> Router {
    let mut router = Router::new(policy, AdmissionLimits { sequences_per_replica });
    router.observe(Instant(0), &table(served));
    router
}

fn ask(sequences: u32) -> RouteRequest<'static> {
    RouteRequest { sequences, prompt_tokens: 10, max_tokens: 100, ..RouteRequest::default() }
}

fn pick(router: &mut Router, now: Instant, served: &ServedDeployment) -> Ticket {
    router.admit(now, 0, served, &ask(1)).expect("room")
}

fn load(router: &Router, at: usize) -> u32 {
    router.fleets[0].books[at].load
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// An answer of twenty tokens with this gap, from a replica that stands alone in the table.
fn measure(router: &mut Router, served: &ServedDeployment, at: usize, gap: u64) {
    let alone = |i: usize| ServedReplica { ready: i == at, ..served.replicas[i] };
    let mut alone = deployment((0..served.replicas.len()).map(alone).collect());
    for replica in &mut alone.replicas {
        replica.load = None;
    }
    router.observe(Instant(50_000_000), &table(&alone));
    let mut ticket = pick(router, Instant(50_000_000), &alone);
    assert_eq!(ticket.replica, served.replicas[at].id);
    router.first_token(Instant(51_000_000), &mut ticket, millis(gap));
    for i in 1..20 {
        router.token(Instant(51_000_000) + millis(i * gap), &mut ticket);
    }
    let end = Instant(51_000_000) + millis(20 * gap);
    router.ended(end, 0, &ticket, Outcome::Complete);
    router.observe(Instant(53_000_000), &table(served));
}

#[test]
fn a_burst_between_two_reports_is_spread() {
    let served = deployment(vec![replica(0, 4, 0), replica(1, 0, 2)]);
    for policy in [Policy::Score, Policy::P2c] {
        let mut router = router(policy, 100, &served);
        let chosen: Vec<u32> = (0..6).map(|_| pick(&mut router, NOW, &served).replica.0).collect();
        // Loads 4 and 2: each gets as many as make both equal, then they are in turn.
        assert_eq!(chosen.iter().filter(|id| **id == 1).count(), 4, "{policy}: {chosen:?}");
    }
}

#[test]
fn a_report_replaces_the_guess_and_what_ended_since_is_taken_off() {
    let old = deployment(vec![replica(0, 0, 0)]);
    let mut router = router(Policy::Score, 100, &old);
    let ticket = router.admit(NOW, 0, &old, &ask(3)).expect("room");
    assert_eq!(load(&router, 0), 3);
    let end = |router: &mut Router| router.ended(NOW, 0, &ticket, Outcome::Complete);
    // The head has counted them.
    router.observe(NOW, &table(&deployment(vec![replica(0, 3, 0)])));
    assert_eq!(load(&router, 0), 3);
    end(&mut router);
    assert_eq!(load(&router, 0), 2);
    // The next report knows of the end.
    router.observe(NOW, &table(&deployment(vec![replica(0, 2, 0)])));
    assert_eq!(load(&router, 0), 2);
    end(&mut router);
    end(&mut router);
    assert_eq!(load(&router, 0), 0);
    assert_eq!(router.fleets[0].books[0].prompt_ahead, 0);
}

#[test]
fn what_is_over_the_bound_is_refused_with_the_arithmetic() {
    let served = deployment(vec![replica(0, 1, 0), replica(1, 2, 3)]);
    let mut router = router(Policy::Score, 4, &served);
    router.admit(NOW, 0, &served, &ask(2)).expect("exactly full");
    let error = router.admit(NOW, 0, &served, &ask(1)).expect_err("over the bound");
    assert_eq!(
        error.to_string(),
        "the model `m` has 8 answers running or waiting, and 1 more would pass its bound of 8; \
         try again in 1 s"
    );
    assert_eq!(error.code(), ErrorCode::Overloaded);
}

#[test]
fn a_lost_link_ejects_a_replica_until_one_probe_came_through() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 9, 0)]);
    for policy in Policy::ALL {
        let mut router = router(policy, 100, &served);
        let ticket = loop {
            let ticket = pick(&mut router, NOW, &served);
            if ticket.replica.0 == 0 {
                break ticket;
            }
        };
        router.ended(NOW, 0, &ticket, Outcome::Lost);
        for _ in 0..8 {
            assert_eq!(pick(&mut router, NOW, &served).replica.0, 1, "{policy}");
        }
        let later = NOW + Duration::from_secs(2);
        let mut probe = pick(&mut router, later, &served);
        assert_eq!(probe.replica.0, 0, "{policy}: the probe");
        assert_eq!(pick(&mut router, later, &served).replica.0, 1, "{policy}: one alone");
        router.first_token(later, &mut probe, millis(1));
        assert!(router.fleets[0].books[0].breaker.is_closed(), "{policy}");
    }
}

#[test]
fn never_more_than_half_is_ejected() {
    let served = deployment((0..5).map(|id| replica(id, 0, 0)).collect());
    for policy in Policy::ALL {
        let mut router = router(policy, 1000, &served);
        // All fail, one after the other.
        for at in 0..5u32 {
            let now = NOW + millis(u64::from(at));
            router.fleets[0].books[at as usize].judge(now, Outcome::Lost, 0);
        }
        let mut chosen: Vec<u32> = (0..200u64)
            .map(|i| {
                let dice = dice::mix(i);
                router.admit(NOW + millis(10), dice, &served, &ask(1)).expect("room").replica.0
            })
            .collect();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen, [0, 1, 2], "{policy}: those that come back first");
    }
}

#[test]
fn errors_of_the_caller_never_lower_a_weight_and_others_do() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    for code in ErrorCode::ALL {
        for policy in Policy::ALL {
            let mut router = router(policy, 1000, &served);
            let before: Vec<Standing> = router.standings(NOW).map(|(_, s)| s).collect();
            for _ in 0..50 {
                let ticket = router.admit(NOW, 0, &served, &ask(1)).expect("room");
                router.ended(NOW, 0, &ticket, Outcome::of(*code));
            }
            let after: Vec<Standing> = router.standings(NOW).map(|(_, s)| s).collect();
            let same = before.iter().zip(&after).all(|(a, b)| {
                a.state == b.state && (policy == Policy::PeakEwma || a.weight == b.weight)
            });
            let innocent = matches!(Outcome::of(*code), Outcome::NotJudged);
            let caller = code.fault() == shoal_protocol::error::Fault::Caller;
            assert!(innocent || !caller, "{code}");
            assert_eq!(same, innocent, "{policy} after {code}: {after:?}");
        }
    }
}

#[test]
fn what_drains_gets_nothing_new() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 9, 0)]);
    let mut router = router(Policy::Score, 100, &served);
    let ticket = pick(&mut router, NOW, &served);
    assert_eq!(ticket.replica.0, 0);
    router.ended(NOW, 0, &ticket, Outcome::of(ErrorCode::Draining));
    assert_eq!(pick(&mut router, NOW, &served).replica.0, 1);
    let state = router.standings(NOW).map(|(_, s)| s.state).next();
    assert_eq!(state, Some(State::Draining));
}

#[test]
fn a_retry_goes_elsewhere_and_where_there_is_nothing_else_back() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 9, 0)]);
    let mut router = router(Policy::Score, 100, &served);
    let zero = [(ReplicaId(0), Generation(1))];
    let both = [zero[0], (ReplicaId(1), Generation(1))];
    for (avoid, expected) in [(&zero[..], 1), (&both[..], 0), (&[], 0)] {
        let request = RouteRequest { avoid, ..ask(1) };
        let ticket = router.admit(NOW, 0, &served, &request).expect("room");
        assert_eq!(ticket.replica.0, expected, "{avoid:?}");
        router.ended(NOW, 0, &ticket, Outcome::NotJudged);
    }
}

#[test]
fn the_slower_of_two_gets_as_much_less() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    let mut router = router(Policy::Score, 1000, &served);
    measure(&mut router, &served, 0, 40);
    measure(&mut router, &served, 1, 10);
    let later = Instant(59_000_000);
    let chosen: Vec<u32> = (0..40).map(|_| pick(&mut router, later, &served).replica.0).collect();
    let slow = chosen.iter().filter(|id| **id == 0).count();
    assert!((4..=10).contains(&slow), "{slow} of 40 to one that is four times slower");
    let weights: Vec<f64> = router.standings(later).map(|(_, s)| s.weight).collect();
    assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{weights:?}");
}

#[test]
fn one_that_says_nothing_is_left_alone_long_before_it_fails() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    let mut router = router(Policy::Score, 1000, &served);
    measure(&mut router, &served, 0, 10);
    measure(&mut router, &served, 1, 10);
    let start = Instant(59_000_000);
    let silent = router.admit(start, 0, &served, &ask(1)).expect("room");
    let other = |router: &mut Router| pick(router, start + millis(500), &served).replica;
    for _ in 0..20 {
        assert_ne!(other(&mut router), silent.replica);
    }
}

#[test]
fn a_new_replica_begins_slowly() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    let one = deployment(vec![replica(0, 0, 0)]);
    let mut router = router(Policy::Score, 1000, &one);
    router.observe(NOW, &table(&served));
    let states: Vec<State> = router.standings(NOW).map(|(_, s)| s.state).collect();
    assert_eq!(states, [State::Ready, State::SlowStart]);
    let chosen: Vec<u32> = (0..22).map(|_| pick(&mut router, NOW, &served).replica.0).collect();
    let new = chosen.iter().filter(|id| **id == 1).count();
    assert!((1..=3).contains(&new), "{new} of 22 to the new one");
}

#[test]
fn what_is_cached_costs_nothing() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    let mut router = router(Policy::Score, 1000, &served);
    let tokens: Vec<u32> = (0..800).collect();
    let mut hashes = Vec::new();
    prefix::block_hashes(&tokens, (Tenant::OPEN, None), &mut hashes);
    let request = RouteRequest {
        sequences: 1,
        prompt_tokens: 800,
        max_tokens: 1,
        block_hashes: &hashes,
        avoid: &[],
    };
    let first = router.admit(NOW, 1, &served, &request).expect("room");
    router.ended(NOW, 0, &first, Outcome::Complete);
    for dice in 0..8 {
        let again = router.admit(NOW, dice, &served, &request).expect("room");
        assert_eq!(again.replica, first.replica);
        router.ended(NOW, 0, &again, Outcome::Complete);
    }
}

#[test]
fn replicas_that_are_not_ready_are_not_used() {
    let mut served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    served.replicas[0].ready = false;
    served.replicas[1].requests = None;
    served.reason = "w1 is loading (40 %)".to_owned();
    let mut router = router(Policy::Score, 100, &served);
    let error = router.admit(NOW, 0, &served, &ask(1)).expect_err("nothing is ready");
    assert_eq!(error.to_string(), "the model `m` is not ready: w1 is loading (40 %)");
    assert_eq!(error.retry_after(), Some(NOT_READY_RETRY));
}

#[test]
fn an_unknown_name_is_answered_with_the_known_ones() {
    let empty = ServingTable::default();
    let error = find(&empty, "x").expect_err("nothing is there");
    assert!(error.to_string().contains("shoal deploy"), "{error}");
    let served = table(&deployment(Vec::new()));
    assert!(find(&served, "m").is_ok());
    let error = find(&served, "gpt-4").expect_err("not deployed");
    assert_eq!(error.to_string(), "there is no model `gpt-4`; these are deployed: m");
}

#[test]
fn a_ticket_finds_its_replica_after_the_table_changed_and_gone_ones_are_forgotten() {
    let served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0), replica(2, 0, 0)]);
    let mut router = router(Policy::RoundRobin, 100, &served);
    let tickets: Vec<Ticket> = (0..3).map(|_| pick(&mut router, NOW, &served)).collect();
    let left = deployment(vec![replica(2, 0, 0)]);
    router.observe(NOW, &table(&left));
    assert_eq!(router.fleets[0].books.len(), 1);
    for ticket in &tickets {
        router.ended(NOW, 0, ticket, Outcome::Lost);
    }
    assert_eq!(router.fleets[0].books[0].open, 0);
    assert!(!router.fleets[0].books[0].breaker.is_closed());
}
