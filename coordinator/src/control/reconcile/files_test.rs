//! Workers whose copies of the model are damaged, as stories.

use shoal_protocol::admin::DeploymentPhase;
use shoal_protocol::control::ShardState;
use shoal_protocol::error::ErrorCode;

use super::tests::World;
use super::*;

const DAMAGED: &str = "model.safetensors: truncated";

fn phase(decision: &Decision) -> (DeploymentPhase, String) {
    let phase = decision.phases.values().next().unwrap();
    (phase.phase, phase.reason.clone())
}

fn actions(decision: &Decision) -> Vec<String> {
    decision.actions.iter().map(ToString::to_string).collect()
}

#[test]
fn a_damaged_copy_is_left_out_and_the_others_serve() {
    let mut world = World::ready(3, Some(2), 10_000);
    world.fail(2, ErrorCode::BadModel, DAMAGED);
    let decision = world.round();
    assert_eq!(
        actions(&decision)[0],
        format!("adopt r1 g2 (2x1 on w1, w3): w2: {DAMAGED}"),
        "{decision}"
    );
    world.settle();
    let decision = world.round();
    assert_eq!(phase(&decision).0, DeploymentPhase::Ready, "{decision}");
}

#[test]
fn it_fails_when_every_copy_that_is_needed_is_damaged_until_a_worker_comes_back() {
    let mut world = World::ready(3, Some(2), 10_000);
    world.fail(2, ErrorCode::BadModel, DAMAGED);
    world.round();
    world.round();
    world.observed.now = Instant(20_000_000);
    world.fail(3, ErrorCode::BadModel, "config.json: another model");
    world.report(1, ShardState::Ready);
    let (stands, reason) = phase(&world.round());
    assert_eq!(stands, DeploymentPhase::Failed, "{reason}");
    assert!(reason.starts_with("w3: config.json: another model; "), "{reason}");
    assert_eq!(actions(&world.round()), [] as [&str; 0], "it is not tried for ever");
    // A worker that was started again may have better files.
    world.connect(2, 2);
    let decision = world.round();
    assert!(actions(&decision)[0].starts_with("adopt r1 g3 (2x1 on w1, w2)"), "{decision}");
}
