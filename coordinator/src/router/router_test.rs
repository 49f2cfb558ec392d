use std::sync::Arc;

use shoal_protocol::id::DeploymentName;

use super::*;

const NOW: Instant = Instant(1_000_000);

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
        replicas,
        reason: String::new(),
        phase: shoal_protocol::admin::DeploymentPhase::Ready,
    }
}

fn router(sequences_per_replica: u32) -> Router {
    Router::new(Policy::LeastLoad, AdmissionLimits { sequences_per_replica })
}

#[test]
fn a_burst_between_two_reports_is_spread() {
    let mut router = router(100);
    let served = deployment(vec![replica(0, 4, 0), replica(1, 0, 2)]);
    let chosen: Vec<u32> =
        (0..6).map(|_| router.admit(NOW, 0, &served, 1).expect("room").replica.0).collect();
    // Loads 4 and 2: two to the second, then in turn.
    assert_eq!(chosen, [1, 1, 0, 1, 0, 1]);
}

#[test]
fn a_report_replaces_the_guess_and_what_ended_since_is_taken_off() {
    let mut router = router(100);
    let old = deployment(vec![replica(0, 0, 0)]);
    let ticket = router.admit(NOW, 0, &old, 3).expect("room");
    assert_eq!(router.view(NOW, &old.replicas[0]).load, 3);
    // The head has counted them.
    let new = replica(0, 3, 0);
    assert_eq!(router.view(NOW, &new).load, 3);
    router.ended(&ticket);
    assert_eq!(router.view(NOW, &new).load, 2);
    // The next report knows of the end.
    assert_eq!(router.view(NOW, &replica(0, 2, 0)).load, 2);
    router.ended(&ticket);
    router.ended(&ticket);
    assert_eq!(router.view(NOW, &replica(0, 0, 0)).load, 0);
    // Ended before any report: the guess goes back to nothing.
    let idle = replica(0, 0, 0);
    let ticket = router.admit(NOW, 0, &deployment(vec![idle.clone()]), 1).expect("room");
    router.ended(&ticket);
    assert_eq!(router.view(NOW, &idle).load, 0);
}

#[test]
fn what_is_over_the_bound_is_refused_with_the_arithmetic() {
    let mut router = router(4);
    let served = deployment(vec![replica(0, 1, 0), replica(1, 2, 3)]);
    router.admit(NOW, 0, &served, 2).expect("exactly full");
    let error = router.admit(NOW, 0, &served, 1).expect_err("over the bound");
    assert_eq!(
        error.to_string(),
        "the model `m` has 8 answers running or waiting, and 1 more would pass its bound of 8; \
         try again in 1 s"
    );
    assert_eq!(error.code(), ErrorCode::Overloaded);
}

#[test]
fn a_replica_that_failed_is_avoided_for_a_while() {
    let mut router = router(100);
    let served = deployment(vec![replica(0, 0, 0), replica(1, 9, 0)]);
    let ticket = router.admit(NOW, 0, &served, 1).expect("room");
    assert_eq!(ticket.replica.0, 0);
    router.ended(&ticket);
    router.failed(NOW, &ticket);
    assert_eq!(router.admit(NOW, 0, &served, 1).expect("room").replica.0, 1);
    let later = NOW + SUSPECT_FOR;
    assert_eq!(router.admit(later, 0, &served, 1).expect("room").replica.0, 0);
}

#[test]
fn replicas_that_are_not_ready_are_not_used() {
    let mut router = router(100);
    let mut served = deployment(vec![replica(0, 0, 0), replica(1, 0, 0)]);
    served.replicas[0].ready = false;
    served.replicas[1].requests = None;
    served.reason = "w1 is loading (40 %)".to_owned();
    let error = router.admit(NOW, 0, &served, 1).expect_err("nothing is ready");
    assert_eq!(error.to_string(), "the model `m` is not ready: w1 is loading (40 %)");
    assert_eq!(error.retry_after(), Some(NOT_READY_RETRY));
}

#[test]
fn an_unknown_name_is_answered_with_the_known_ones() {
    let mut table = ServingTable::default();
    let error = find(&table, "x").expect_err("nothing is there");
    assert!(error.to_string().contains("shoal deploy"), "{error}");
    let served = deployment(Vec::new());
    table.deployments.insert(served.name.clone(), Arc::new(served));
    assert!(find(&table, "m").is_ok());
    let error = find(&table, "gpt-4").expect_err("not deployed");
    assert_eq!(error.to_string(), "there is no model `gpt-4`; these are deployed: m");
}

#[test]
fn books_of_gone_replicas_are_dropped() {
    let mut router = router(100);
    let mut open = None;
    for id in 0..200 {
        let ticket = router.admit(NOW, 0, &deployment(vec![replica(id, 0, 0)]), 1).expect("room");
        if id == 7 {
            open = Some(ticket);
        } else {
            router.ended(&ticket);
        }
    }
    router.tidy(&ServingTable::default());
    assert_eq!(router.books.keys().map(|(id, _)| id.0).collect::<Vec<_>>(), [7]);
    router.ended(&open.expect("the seventh"));
}
