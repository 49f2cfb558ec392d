use std::net::SocketAddr;

use shoal_protocol::id::{DeploymentName, NodeId};

use super::*;

const HERE: (ReplicaId, Generation) = (ReplicaId(1), Generation(3));
const NOW: Instant = Instant(1_000_000);

fn replica(id: u32, generation: u64) -> ServedReplica {
    ServedReplica {
        id: ReplicaId(id),
        generation: Generation(generation),
        head: NodeId::worker(id),
        requests: Some(SocketAddr::from(([127, 0, 0, 1], 4000))),
        ready: true,
        load: None,
    }
}

fn deployment(replicas: Vec<ServedReplica>) -> ServedDeployment {
    ServedDeployment {
        name: DeploymentName::new("m").expect("a name"),
        created: 7,
        folder: None,
        vocab: 10,
        context_max: 100,
        kind: crate::serving::ServedKind::Generate,
        adapter: None,
        replicas,
        reason: "w2 is missing".to_owned(),
        phase: DeploymentPhase::Loading,
    }
}

/// Which replicas may be asked at `now`.
fn asked(recovery: &Recovery, now: Instant, deployment: &ServedDeployment) -> Vec<u32> {
    let avoided = recovery.avoided(now);
    let may = |r: &&ServedReplica| {
        r.ready && r.requests.is_some() && !avoided.contains(&(r.id, r.generation))
    };
    match recovery.next(now, Some(deployment)) {
        Ok(Move::Ask) => deployment.replicas.iter().filter(may).map(|r| r.id.0).collect(),
        Ok(Move::Wait(_)) => Vec::new(),
        Err(why) => panic!("{why:?}"),
    }
}

fn lost(recovery: &mut Recovery, loss: Loss) -> Result<(), GiveUp> {
    recovery.lost(NOW, 0, HERE, loss)
}

#[test]
fn what_was_lost_goes_on_elsewhere_at_once_and_here_as_soon_as_the_layout_is_new() {
    for loss in [Loss::Lost, Loss::Unreachable, Loss::TurnedAway, Loss::Superseded, Loss::Broken] {
        let mut recovery = Recovery::new(7);
        recovery.went_on(NOW);
        lost(&mut recovery, loss).expect("another attempt");
        assert_eq!(recovery.attempt(), Attempt(1));
        let two = deployment(vec![replica(1, 3), replica(2, 1)]);
        assert_eq!(asked(&recovery, NOW, &two), [2], "{loss:?}");
        let renewed = deployment(vec![replica(1, 4)]);
        assert_eq!(asked(&recovery, NOW, &renewed), [1], "{loss:?}");
        // The same layout is asked again after the back-off: it may serve after all.
        let same = deployment(vec![replica(1, 3)]);
        let until = NOW + BACKOFF_FIRST;
        assert_eq!(recovery.next(NOW, Some(&same)), Ok(Move::Wait(Some(until))), "{loss:?}");
        assert_eq!(asked(&recovery, until, &same), [1], "{loss:?}");
    }
}

#[test]
fn each_layout_has_a_back_off_of_its_own() {
    let mut recovery = Recovery::new(7);
    let other = (ReplicaId(2), Generation(1));
    let both = deployment(vec![replica(1, 3), replica(2, 1)]);
    for losses in 1..8 {
        for at in [HERE, other] {
            recovery.lost(NOW, 0, at, Loss::TurnedAway).expect("another attempt");
        }
        let until = NOW + BACKOFF_MAX.min(BACKOFF_FIRST * (1 << (losses - 1)));
        assert_eq!(recovery.next(NOW, Some(&both)), Ok(Move::Wait(Some(until))));
    }
    // A new layout begins anew.
    recovery.lost(NOW, 0, (ReplicaId(1), Generation(4)), Loss::TurnedAway).expect("another");
    let renewed = deployment(vec![replica(1, 4), replica(2, 1)]);
    assert_eq!(asked(&recovery, NOW + BACKOFF_FIRST, &renewed), [1]);
}

#[test]
fn a_router_without_room_is_asked_again_later() {
    let mut recovery = Recovery::new(7);
    lost(&mut recovery, Loss::Lost).expect("another attempt");
    let two = deployment(vec![replica(2, 3)]);
    for times in 0..4 {
        recovery.no_room(NOW, 0);
        let until = NOW + BACKOFF_FIRST * (1 << times);
        assert_eq!(recovery.next(NOW, Some(&two)), Ok(Move::Wait(Some(until))));
        assert_eq!(asked(&recovery, until, &two), [2]);
    }
}

#[test]
fn a_place_is_awaited_where_nobody_is_ready() {
    let mut recovery = Recovery::new(7);
    lost(&mut recovery, Loss::Lost).expect("another attempt");
    let (mut loading, mut gone) = (replica(1, 4), replica(2, 1));
    loading.ready = false;
    gone.requests = None;
    for replicas in [vec![], vec![loading], vec![gone]] {
        let deployment = deployment(replicas);
        assert_eq!(recovery.next(NOW, Some(&deployment)), Ok(Move::Wait(None)));
    }
}

#[test]
fn there_is_nothing_to_wait_for_where_the_deployment_is_gone_or_cannot_be_served() {
    let recovery = Recovery::new(7);
    assert_eq!(recovery.next(NOW, None), Err(GiveUp::Undeployed));
    let another = ServedDeployment { created: 8, ..deployment(vec![replica(1, 3)]) };
    assert_eq!(recovery.next(NOW, Some(&another)), Err(GiveUp::Undeployed));
    let failed = ServedDeployment { phase: DeploymentPhase::Failed, ..deployment(vec![]) };
    let reason = "w2 is missing".to_owned();
    assert_eq!(recovery.next(NOW, Some(&failed)), Err(GiveUp::Hopeless { reason }));
    let waiting = ServedDeployment { phase: DeploymentPhase::Waiting, ..deployment(vec![]) };
    assert_eq!(recovery.next(NOW, Some(&waiting)), Ok(Move::Wait(None)));
}

#[test]
fn an_answer_goes_on_with_the_very_adapter_that_it_began_with() {
    let adapter = |id, fingerprint| ServedAdapter {
        id: shoal_protocol::id::AdapterId(id),
        fingerprint: [fingerprint; 32],
        base: DeploymentName::new("base").expect("a name"),
    };
    let with = |adapter| ServedDeployment { adapter, ..deployment(vec![replica(1, 3)]) };
    let recovery = Recovery::new(7).with(Some(adapter(5, 1)));
    let same = with(Some(adapter(5, 1)));
    assert_eq!(recovery.next(NOW, Some(&same)), Ok(Move::Ask));
    assert!(!recovery.is_unloaded(ErrorCode::ComputeFailed, Some(&same)), "the model's own fault");
    // The same name, and even the same number: a state was restored.
    for other in
        [Some(with(Some(adapter(5, 2)))), Some(with(Some(adapter(6, 1)))), Some(with(None)), None]
    {
        assert_eq!(recovery.next(NOW, other.as_ref()), Err(GiveUp::Unloaded), "{other:?}");
        assert!(recovery.is_unloaded(ErrorCode::ComputeFailed, other.as_ref()));
        assert!(!recovery.is_unloaded(ErrorCode::DeadlineExceeded, other.as_ref()));
    }
    // An answer of a model has none.
    let of_base = Recovery::new(7);
    assert_eq!(of_base.next(NOW, Some(&same)), Err(GiveUp::Undeployed));
    assert!(!of_base.is_unloaded(ErrorCode::ComputeFailed, None));
}

#[test]
fn errors_are_told_apart_by_whose_fault_they_are() {
    let check = |code, expected| {
        let error = DispatchError::Failed { code, message: String::new() };
        assert_eq!(Loss::of(&error), expected, "{code}");
    };
    for code in ErrorCode::ALL {
        check(
            *code,
            match code {
                ErrorCode::WorkerLost => Loss::Lost,
                ErrorCode::NotReady | ErrorCode::Draining | ErrorCode::StaleGeneration => {
                    Loss::TurnedAway
                }
                ErrorCode::Overloaded => Loss::Crowded,
                _ => Loss::Final,
            },
        );
    }
    let head = NodeId::worker(1);
    let why = String::new();
    assert_eq!(Loss::of(&DispatchError::Lost { head, why: why.clone() }), Loss::Lost);
    assert_eq!(Loss::of(&DispatchError::Protocol { head, why }), Loss::Broken);
    assert_eq!(Loss::of(&DispatchError::Deadline), Loss::Final);
}

#[test]
fn a_head_that_is_full_turns_a_new_request_away_and_lets_an_old_one_wait() {
    let mut new = Recovery::new(7);
    assert_eq!(lost(&mut new, Loss::Crowded), Err(GiveUp::AsItIs));
    let mut one_of_many = Recovery::new(7).promised();
    lost(&mut one_of_many, Loss::Crowded).expect("the others of its request are under way");
    let mut old = Recovery::new(7);
    lost(&mut old, Loss::Unreachable).expect("another attempt");
    for waits in 1..40 {
        lost(&mut old, Loss::Crowded).expect("it waits");
        let here = deployment(vec![replica(1, 3)]);
        let until = NOW + BACKOFF_MAX.min(BACKOFF_FIRST * 2u32.saturating_pow(waits));
        assert_eq!(old.next(NOW, Some(&here)), Ok(Move::Wait(Some(until))));
        assert_eq!(asked(&old, until, &here), [1]);
    }
}

#[test]
fn what_kills_its_worker_twice_before_a_token_is_quarantined() {
    let mut recovery = Recovery::new(7);
    lost(&mut recovery, Loss::Lost).expect("one is no proof");
    assert!(recovery.is_suspect(), "it is tried again alone");
    assert_eq!(lost(&mut recovery, Loss::Lost), Err(GiveUp::Quarantined { losses: 2 }));
    // A replaced layout is half a proof.
    let mut recovery = Recovery::new(7);
    for _ in 0..2 {
        lost(&mut recovery, Loss::Superseded).expect("it may be the operator");
    }
    assert_eq!(lost(&mut recovery, Loss::Lost), Err(GiveUp::Quarantined { losses: 3 }));
}

#[test]
fn who_was_in_its_prompt_when_a_layout_was_replaced_is_not_tried_alone() {
    let mut recovery = Recovery::new(7);
    lost(&mut recovery, Loss::Superseded).expect("it goes on");
    assert!(!recovery.is_suspect(), "an operator moved it, and hundreds beside it");
    lost(&mut recovery, Loss::Superseded).expect("it goes on");
    assert!(recovery.is_suspect(), "once more is one too many");
}

#[test]
fn what_brings_tokens_is_never_blamed() {
    let mut recovery = Recovery::new(7);
    for _ in 0..10 {
        lost(&mut recovery, Loss::Lost).expect("it goes on");
        assert!(recovery.is_suspect() || recovery.attempt() > Attempt(1));
        recovery.went_on(NOW);
        assert!(!recovery.is_suspect());
    }
    // Nor what never began.
    for loss in [Loss::Unreachable, Loss::TurnedAway].repeat(10) {
        lost(&mut recovery, loss).expect("it goes on");
        assert!(!recovery.is_suspect());
    }
}

#[test]
fn a_head_that_breaks_the_protocol_gets_one_more_chance() {
    let mut recovery = Recovery::new(7);
    lost(&mut recovery, Loss::Broken).expect("it may have been cut off");
    assert_eq!(lost(&mut recovery, Loss::Broken), Err(GiveUp::AsItIs));
}

#[test]
fn the_stall_is_counted_from_the_first_loss_to_the_next_event() {
    let mut recovery = Recovery::new(7);
    assert_eq!(recovery.went_on(NOW), None);
    lost(&mut recovery, Loss::Lost).expect("another attempt");
    let later = NOW + Duration::from_millis(30);
    recovery.lost(later, 0, HERE, Loss::TurnedAway).expect("another attempt");
    let end = NOW + Duration::from_millis(80);
    assert_eq!(recovery.went_on(end), Some(Duration::from_millis(80)));
    assert_eq!(recovery.went_on(end), None);
}

#[test]
fn the_dice_take_up_to_half_of_the_back_off_away() {
    assert_eq!(backoff(1, 0), BACKOFF_FIRST);
    assert_eq!(backoff(4, 0), BACKOFF_FIRST * 8);
    assert_eq!(backoff(99, 0), BACKOFF_MAX);
    assert!(backoff(99, u64::MAX) >= BACKOFF_MAX / 2 && backoff(99, u64::MAX) < BACKOFF_MAX);
}

#[test]
fn a_newer_layout_that_serves_supersedes_and_an_unready_one_does_not() {
    let check = |replicas, expected| {
        assert_eq!(is_superseded(&deployment(replicas), HERE), expected);
    };
    let unready = ServedReplica { ready: false, ..replica(1, 4) };
    check(vec![replica(1, 4)], true);
    check(vec![unready], false);
    check(vec![replica(1, 3)], false);
    check(vec![replica(2, 9)], false);
    check(vec![], false);
}

#[test]
fn the_first_attempt_after_a_workers_loss_is_free_and_what_repeats_itself_is_not() {
    let check = |losses: &[Loss], retry: bool| {
        let mut recovery = Recovery::new(7);
        for loss in losses {
            lost(&mut recovery, *loss).expect("it goes on");
        }
        assert_eq!(recovery.is_retry(), retry, "{losses:?}");
        recovery.went_on(NOW);
        assert!(!recovery.is_retry(), "an event ends it");
    };
    check(&[], false);
    check(&[Loss::Lost], false);
    check(&[Loss::Superseded], false);
    check(&[Loss::Unreachable], true);
    check(&[Loss::TurnedAway], true);
    check(&[Loss::Broken], true);
    check(&[Loss::Lost, Loss::TurnedAway], true);
    check(&[Loss::Superseded, Loss::Superseded], true);
}

#[test]
fn what_had_tokens_goes_on_free_of_the_budget_however_it_was_lost() {
    for loss in [Loss::TurnedAway, Loss::Broken, Loss::Crowded, Loss::Lost, Loss::Superseded] {
        let mut recovery = Recovery::new(7);
        recovery.went_on(NOW);
        lost(&mut recovery, loss).expect("it goes on");
        assert!(!recovery.is_retry(), "{loss:?}: a move that was planned loses no time");
        lost(&mut recovery, Loss::TurnedAway).expect("it goes on");
        assert!(recovery.is_retry(), "{loss:?}: nothing came since");
    }
}

#[test]
fn a_layout_that_failed_is_avoided_until_its_back_off_is_over() {
    let mut recovery = Recovery::new(7);
    assert!(recovery.avoided(NOW).is_empty());
    lost(&mut recovery, Loss::TurnedAway).expect("it goes on");
    assert_eq!(recovery.avoided(NOW), [HERE]);
    assert!(recovery.avoided(NOW + BACKOFF_MAX).is_empty());
}

#[test]
fn a_retry_is_taken_off_the_budget_once_for_each_loss_and_waits_where_it_is_used_up() {
    let there = deployment(vec![replica(0, 3), replica(1, 3)]);
    let mut recovery = Recovery::new(7);
    let next = |recovery: &mut Recovery, at, left: &mut u32| {
        let may_retry = || left.checked_sub(1).map(|less| *left = less).is_some();
        recovery.next_attempt(at, 0, Some(&there), may_retry).expect("it goes on")
    };
    let mut left = 1;
    assert_eq!(next(&mut recovery, NOW, &mut left), Next::Ask(Vec::new()));
    assert_eq!(left, 1, "the first attempt is no retry");
    lost(&mut recovery, Loss::TurnedAway).expect("it goes on");
    assert_eq!(next(&mut recovery, NOW, &mut left), Next::Ask(vec![HERE]));
    assert_eq!(next(&mut recovery, NOW, &mut left), Next::Ask(vec![HERE]), "it was granted");
    assert_eq!(left, 0);
    lost(&mut recovery, Loss::TurnedAway).expect("it goes on");
    let Next::Wait(Some(until)) = next(&mut recovery, NOW, &mut left) else { panic!("no retry") };
    left = 1;
    assert!(matches!(next(&mut recovery, until, &mut left), Next::Ask(_)), "there is one again");
}
