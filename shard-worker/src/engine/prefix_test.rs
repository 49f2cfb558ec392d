//! Shared beginnings as dialogs: who finds what of whom, and when.

use shoal_protocol::activation::Sample;
use shoal_protocol::id::AdapterId;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::Generate;
use shoal_protocol::units::Instant;

use super::engine_test::{LIMITS, absorb, actions, config, request};
use super::{ClientKey, Engine, EngineConfig, Event};

const ALICE: Tenant = Tenant(1);
const BOB: Tenant = Tenant(2);

fn engine() -> Engine {
    let config = EngineConfig { prefix_key: Some([9; 32]), ..config(1, LIMITS) };
    Engine::new(config).unwrap()
}

fn submit(engine: &mut Engine, key: u64, tenant: impl Into<Option<Tenant>>, request: Generate) {
    let (key, request, tenant) = (ClientKey(key), Box::new(request), tenant.into());
    engine.handle(Instant(1000), Event::Submit { key, request, tenant });
}

/// Asks, and answers with one token: what the step was.
fn ask(
    engine: &mut Engine,
    key: u64,
    tenant: impl Into<Option<Tenant>>,
    request: Generate,
) -> Vec<String> {
    let last = request.prompt_len - 1;
    submit(engine, key, tenant, request);
    let begun = actions(engine);
    let step = engine.report().steps - 1;
    absorb(engine, step, &[(key, last, 7)]);
    begun
}

#[test]
fn a_prompt_that_was_computed_is_found_again_but_for_its_last_token() {
    let mut engine = engine();
    let first = ask(&mut engine, 1, ALICE, request(40, 1));
    assert_eq!(first, ["open s1 40/40", "step 0: s1@0..40! +b0 +b1 +b2"]);
    // Two full blocks of 40 tokens; the third is free.
    let again = ask(&mut engine, 2, ALICE, request(40, 1));
    let expected = ["open s2 40/40", "c2 reuses 32", "step 1: s2@32..40! +b0* +b1* +b2"];
    assert_eq!(again, expected);
    // 32 tokens are two blocks, and one token is always computed: with it its whole block.
    let whole = ask(&mut engine, 3, ALICE, request(32, 1));
    assert_eq!(whole[1..], ["c3 reuses 16", "step 2: s3@16..32! +b0* +b2 +b3"]);
    let short = ask(&mut engine, 4, ALICE, request(16, 1));
    assert_eq!(short[1], "step 3: s4@0..16! +b2 +b3");
    let report = engine.prefixes();
    assert_eq!((report.lookups, report.hits), (4, 2));
    assert_eq!((report.tokens_asked, report.tokens_found), (32 + 32 + 16, 48));
    assert_eq!((report.blocks_known, report.blocks_idle, report.evictions), (2, 2, 0));
    assert_eq!(engine.report().blocks_used, 0, "what nobody uses is free");
    assert_eq!(engine.report().prompt_tokens, 40 + 8 + 16 + 16, "computed, not asked for");
}

#[test]
fn an_answer_is_found_by_the_next_turn() {
    let mut engine = engine();
    submit(&mut engine, 1, ALICE, request(30, 3));
    actions(&mut engine);
    for (step, position) in (0..3).zip(29..) {
        absorb(&mut engine, step, &[(1, position, 130 + step as u32)]);
    }
    assert!(engine.is_idle());
    // The last token of an answer is never computed: positions 0 to 31 are.
    let mut next = request(36, 1);
    next.tokens[30..33].copy_from_slice(&[130, 131, 132]);
    let begun = ask(&mut engine, 2, ALICE, next);
    assert_eq!(begun[1..], ["c2 reuses 32", "step 3: s2@32..36! +b0* +b1* +b2"]);
}

#[test]
fn nobody_finds_what_another_tenant_adapter_or_request_without_tenant_left() {
    let mut engine = engine();
    let misses = |begun: Vec<String>| assert_eq!(begun.len(), 2, "{begun:?}");
    misses(ask(&mut engine, 1, ALICE, request(40, 1)));
    misses(ask(&mut engine, 2, BOB, request(40, 1)));
    misses(ask(&mut engine, 3, None, request(40, 1)));
    let adapted = Generate { adapter: Some(AdapterId(5)), ..request(40, 1) };
    misses(ask(&mut engine, 4, ALICE, adapted.clone()));
    // A name that is given again is another adapter's number.
    let again = Generate { adapter: Some(AdapterId(6)), ..request(40, 1) };
    misses(ask(&mut engine, 5, ALICE, again));
    assert_eq!(ask(&mut engine, 6, ALICE, adapted)[1], "c6 reuses 32");
    assert_eq!(ask(&mut engine, 7, BOB, request(40, 1))[1], "c7 reuses 32");
    assert_eq!(engine.prefixes().lookups, 6, "one asked for nothing");

    let mut without = Engine::new(config(1, LIMITS)).unwrap();
    for key in [1, 2] {
        misses(ask(&mut without, key, ALICE, request(40, 1)));
    }
    assert_eq!(without.prefixes().blocks_known, 0);
}

#[test]
fn nothing_is_found_before_its_step_has_come_back_or_after_one_that_failed() {
    let mut engine = engine();
    submit(&mut engine, 1, ALICE, request(40, 1));
    assert_eq!(actions(&mut engine).len(), 2);
    submit(&mut engine, 2, ALICE, request(40, 1));
    let beside = actions(&mut engine);
    assert_eq!(beside, ["open s2 40/40", "step 1: s2@0..40! +b3 +b4 +b5"], "it is in flight");
    // Cancelled in its prefill: its blocks are free at once, and nobody finds them.
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(1) });
    absorb(&mut engine, 0, &[(1, 39, 7)]);
    assert_eq!(engine.prefixes().blocks_known, 0);
    // Numbers that are not finite are nobody's beginning, whoever shares them.
    absorb(&mut engine, 1, &[(2, 39, 8)]);
    assert_eq!(engine.prefixes().blocks_known, 2);
    submit(&mut engine, 3, ALICE, request(50, 4));
    actions(&mut engine);
    assert_eq!(absorb(&mut engine, 2, &[(3, 49, Sample::NO_TOKEN)])[0], "c3 failed compute_failed");
    assert_eq!((engine.prefixes().blocks_known, engine.report().blocks_used), (0, 0));
    let begun = ask(&mut engine, 4, ALICE, request(40, 1));
    assert_eq!(begun.len(), 2, "{begun:?}");
}

#[test]
fn two_who_begin_alike_hold_the_same_blocks_and_write_their_own() {
    let mut engine = engine();
    ask(&mut engine, 1, ALICE, request(32, 1));
    let mut other = request(20, 40);
    other.tokens[18] = 1;
    submit(&mut engine, 2, ALICE, request(20, 40));
    submit(&mut engine, 3, ALICE, other);
    let begun = actions(&mut engine);
    let step = begun.last().unwrap();
    assert_eq!(step, "step 1: s2@16..20! s3@16..20! +b0* +b2 +b0* +b3");
    assert_eq!(engine.report().blocks_used, 3);
    engine.handle(Instant(2000), Event::Cancel { key: ClientKey(2) });
    assert_eq!(engine.report().blocks_used, 2, "the first block is the other's too");
    assert_eq!(engine.check(), Vec::<String>::new());
}

#[test]
fn a_preempted_sequence_finds_what_it_has_computed() {
    // Four blocks: both fit until the older one needs a third.
    let limits = ReplicaLimits { kv_blocks: 4, ..LIMITS };
    let config = EngineConfig { prefix_key: Some([9; 32]), ..config(1, limits) };
    let mut engine = Engine::new(config).unwrap();
    let mut other = request(20, 40);
    other.tokens[0] = 1;
    submit(&mut engine, 1, ALICE, request(31, 4));
    submit(&mut engine, 2, ALICE, other);
    let begun = actions(&mut engine);
    assert_eq!(begun.last().unwrap(), "step 0: s1@0..31! s2@0..20! +b0 +b1 +b2 +b3");
    let next = absorb(&mut engine, 0, &[(1, 30, 7), (2, 19, 7)]);
    assert_eq!(next.last().unwrap(), "step 1: s1@31..32! s2@20..21!");
    let next = absorb(&mut engine, 1, &[(1, 31, 7), (2, 20, 7)]);
    assert_eq!(next[2..], ["close s2", "step 2: s1@32..33! +b3"]);
    absorb(&mut engine, 2, &[(1, 32, 7)]);
    // Its first block was full, and nobody needed it; its client was told of no reuse before.
    let next = absorb(&mut engine, 3, &[(1, 33, 7)]);
    assert_eq!(next[2..], ["close s1", "open s3 20/22", "step 4: s3@16..22! +b2* +b3"]);
    assert_eq!((engine.prefixes().lookups, engine.prefixes().hits), (2, 0));
}
