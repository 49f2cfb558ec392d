//! The table takes what follows the rules, and nothing else changes it.

use shoal_protocol::activation::{BlockGrant, StepHeader};
use shoal_protocol::id::{Attempt, RequestId};
use shoal_protocol::request::SamplingRecord;

use super::*;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 8,
    context_max: 64,
    step_rows_max: 40,
    sequences_max: 3,
    steps_in_flight_max: 4,
};

fn open(sequence: u64, tokens: usize) -> Open {
    Open {
        generation: Generation(1),
        sequence: SequenceId(sequence),
        request: RequestId(sequence),
        attempt: Attempt(1),
        choice: 0,
        prompt_len: tokens as u32,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        tokens: vec![1; tokens],
    }
}

/// A step of (sequence, position, samples) rows and (sequence, block) grants.
fn step(rows: &[(u64, u32, bool)], grants: &[(u64, u32)]) -> Step {
    let rows: Vec<RowRecord> = rows
        .iter()
        .map(|&(sequence, position, samples)| RowRecord {
            sequence,
            position,
            flags: u32::from(samples),
        })
        .collect();
    let grant = |&(sequence, block)| BlockGrant { sequence, block, flags: 0 };
    let grants: Vec<BlockGrant> = grants.iter().map(grant).collect();
    let samples = rows.iter().filter(|row| row.samples()).count() as u32;
    let header = StepHeader {
        generation: 1,
        step: 5,
        rows: rows.len() as u32,
        grants: grants.len() as u32,
        samples,
        reserved: 0,
    };
    Step { header, rows, grants }
}

fn run_of(sequence: u64, positions: std::ops::Range<u32>) -> Vec<(u64, u32, bool)> {
    positions.map(|position| (sequence, position, false)).collect()
}

fn close(sequence: u64) -> CloseHeader {
    CloseHeader { generation: 1, sequence }
}

/// A last stage with sequence 1 (20 tokens, the first 16 computed, block 3) and 2 (1 token, none).
fn table() -> StageTable {
    let mut table = StageTable::new(Generation(1), LIMITS, true);
    table.open(&open(1, 20)).unwrap();
    table.open(&open(2, 1)).unwrap();
    table.begin_step(&step(&run_of(1, 0..16), &[(1, 3)])).unwrap();
    assert_eq!(table.check(), Vec::<String>::new());
    table
}

/// All that frames can change.
fn state(table: &StageTable) -> (BTreeMap<SequenceId, Entry>, Slots) {
    (table.sequences.clone(), table.slots.clone())
}

#[test]
fn a_step_says_where_its_rows_go() {
    let mut table = table();
    let mut rows = vec![(2, 0, true)];
    rows.extend(run_of(1, 16..19));
    rows.push((1, 19, true));
    let step = step(&rows, &[(2, 7), (1, 0)]);
    let mut buffer = SpanBuffer::default();
    let begun = table.begin_step(&step).unwrap();
    assert_eq!((begun.rows(), begun.sample_rows()), (5, &[0, 4][..]));
    let spans = buffer.take(&begun);
    let seen: Vec<_> =
        spans.iter().map(|s| (s.first_row, s.rows, s.first_position, s.blocks)).collect();
    assert_eq!(seen, [(0, 1, 0, &[7][..]), (1, 4, 16, &[3, 0][..])]);
    buffer.give_back(spans);

    let samples = table.draw(&step, &[0.0, 1.0, 2.0, 0.0], 2).unwrap();
    assert_eq!((samples.generation, samples.step), (Generation(1), StepId(5)));
    let drawn: Vec<_> =
        samples.samples.iter().map(|s| (s.sequence.0, s.position, s.token)).collect();
    assert_eq!(drawn, [(2, 0, 1), (1, 19, 0)]);

    let held: Vec<_> = table.sequences().map(|(id, len, blocks)| (id.0, len, blocks)).collect();
    assert_eq!(held, [(1, 20, &[3, 0][..]), (2, 1, &[7][..])]);
    assert_eq!(table.check(), Vec::<String>::new());
}

#[test]
fn a_closed_sequence_leaves_nothing() {
    let mut table = table();
    table.close(&close(1)).unwrap();
    assert_eq!(table.close(&close(1)), Err(StageFault::UnknownSequence(SequenceId(1))));
    // Its block goes to another, its name may come again.
    table.begin_step(&step(&[(2, 0, true)], &[(2, 3)])).unwrap();
    table.open(&open(1, 1)).unwrap();
    table.close(&close(1)).unwrap();
    table.close(&close(2)).unwrap();
    assert!(table.is_empty() && table.slots.holders() == 0);
}

#[test]
fn a_step_that_breaks_a_rule_changes_nothing() {
    use StageFault as F;
    let s = SequenceId;
    let cases: Vec<(Step, StageFault)> = vec![
        (step(&[(9, 0, false)], &[]), F::UnknownSequence(s(9))),
        (step(&[(2, 0, false)], &[(9, 0)]), F::UnknownSequence(s(9))),
        (
            step(&[(2, 0, false)], &[(2, 8)]),
            F::BlockOutOfRange { sequence: s(2), block: 8, max: 8 },
        ),
        (
            step(&[(2, 0, false)], &[(2, 1), (2, 3)]),
            F::BlockOwned { sequence: s(2), block: 3, owner: s(1) },
        ),
        (
            step(&[(2, 0, false)], &[(2, 1), (1, 1)]),
            F::BlockOwned { sequence: s(1), block: 1, owner: s(2) },
        ),
        (
            step(&[(2, 0, false)], &[(2, 1), (2, 1)]),
            F::BlockOwned { sequence: s(2), block: 1, owner: s(2) },
        ),
        (
            step(&[(1, 15, false)], &[(1, 0)]),
            F::PositionGap { sequence: s(1), found: 15, expected: 16 },
        ),
        (
            step(&[(1, 17, false)], &[(1, 0)]),
            F::PositionGap { sequence: s(1), found: 17, expected: 16 },
        ),
        (
            step(&[(1, 16, false), (1, 18, false)], &[(1, 0)]),
            F::PositionGap { sequence: s(1), found: 18, expected: 17 },
        ),
        (
            step(&[(1, 16, false), (2, 0, false), (1, 17, false)], &[(1, 0), (2, 1)]),
            F::NotAdjacent(s(1)),
        ),
        (step(&[(1, 16, false)], &[]), F::BlocksMissing { sequence: s(1), held: 1, needed: 2 }),
        (
            step(&run_of(1, 16..33), &[(1, 0)]),
            F::BlocksMissing { sequence: s(1), held: 2, needed: 3 },
        ),
        (
            step(&[(1, 16, true)], &[(1, 0)]),
            F::NotLastToken { sequence: s(1), found: 16, expected: 19 },
        ),
        (step(&run_of(1, 16..57), &[]), F::TooManyRows { rows: 41, max: 40 }),
        (
            Step { header: StepHeader { generation: 2, ..Default::default() }, ..Step::default() },
            F::StaleGeneration { found: Generation(2), expected: Generation(1) },
        ),
    ];
    let mut table = table();
    let before = state(&table);
    for (step, fault) in cases {
        assert_eq!(table.begin_step(&step).map(|_| ()), Err(fault));
        assert_eq!(state(&table), before);
    }
    // And what is right still goes.
    table.begin_step(&step(&run_of(1, 16..20), &[(1, 0)])).unwrap();
}

/// The step with some of its grants as blocks that come with their content.
fn sharing(mut step: Step, shared: &[usize]) -> Step {
    shared.iter().for_each(|i| step.grants[*i].flags = BlockGrant::SHARED);
    step
}

#[test]
fn a_sequence_begins_behind_blocks_that_another_has_filled() {
    let mut table = table();
    table.open(&open(3, 40)).unwrap();
    table.begin_step(&step(&run_of(1, 16..32), &[(1, 0)])).unwrap();
    let begun = sharing(step(&run_of(3, 32..39), &[(3, 3), (3, 0), (3, 5)]), &[0, 1]);
    let spans: Vec<_> = table
        .begin_step(&begun)
        .unwrap()
        .spans()
        .map(|s| (s.first_position, s.blocks.to_vec()))
        .collect();
    assert_eq!(spans, [(32, vec![3, 0, 5])]);
    assert_eq!(table.check(), Vec::<String>::new());
    // Both hold them, and they stay as they are when nobody does.
    table.close(&close(1)).unwrap();
    let fault = table.begin_step(&step(&[(2, 0, true)], &[(2, 3)])).map(|_| ());
    let owned = StageFault::BlockOwned { sequence: SequenceId(2), block: 3, owner: SequenceId(3) };
    assert_eq!(fault, Err(owned));
    table.close(&close(3)).unwrap();
    assert_eq!(table.slots.holders(), 0);
    table.open(&open(4, 17)).unwrap();
    table.begin_step(&sharing(step(&[(4, 16, true)], &[(4, 3), (4, 1)]), &[0])).unwrap();
    assert_eq!(table.check(), Vec::<String>::new());
}

#[test]
fn a_block_that_does_not_hold_what_it_is_shared_for_is_refused_and_nothing_changes() {
    let mut table = table();
    table.open(&open(3, 40)).unwrap();
    // Block 3 is full, 0 is not, 1 was never granted.
    table.begin_step(&step(&run_of(1, 16..20), &[(1, 0)])).unwrap();
    let cases = [
        (sharing(step(&run_of(3, 16..17), &[(3, 0)]), &[0]), 0, "not full"),
        (sharing(step(&run_of(3, 16..17), &[(3, 1)]), &[0]), 1, "not full"),
        (sharing(step(&run_of(3, 32..33), &[(3, 3), (3, 3)]), &[0, 1]), 3, "another place"),
        (sharing(step(&run_of(3, 16..17), &[(3, 1), (3, 3)]), &[1]), 3, "of its own came before"),
        // Granted empty in the same step, so that what it held is gone.
        (sharing(step(&run_of(3, 16..17), &[(2, 5), (3, 5)]), &[1]), 5, "not full"),
        // One token, of which nothing can be there already.
        (sharing(step(&run_of(2, 16..17), &[(2, 3)]), &[0]), 3, "with a token behind it"),
        // Its first 16 rows are its own.
        (sharing(step(&run_of(1, 20..21), &[(1, 3)]), &[0]), 3, "of its own came before"),
    ];
    let before = state(&table);
    for (step, found, words) in cases {
        match table.begin_step(&step).map(|_| ()) {
            Err(StageFault::NotShareable { block, why, .. }) => {
                assert!(block == found && why.contains(words), "{block}: {why}");
            }
            other => panic!("{other:?} where {words} was expected"),
        }
        assert_eq!(state(&table), before);
    }
    // What is right about the grants and wrong about the rows changes nothing either.
    let gap = sharing(step(&run_of(3, 15..16), &[(3, 3), (3, 5)]), &[0]);
    let fault = StageFault::PositionGap { sequence: SequenceId(3), found: 15, expected: 16 };
    assert_eq!(table.begin_step(&gap).map(|_| ()), Err(fault));
    let range = sharing(step(&run_of(3, 16..17), &[(3, 8)]), &[0]);
    let fault = StageFault::BlockOutOfRange { sequence: SequenceId(3), block: 8, max: 8 };
    assert_eq!(table.begin_step(&range).map(|_| ()), Err(fault));
    assert_eq!(state(&table), before);

    // Filled with another adapter; and written anew since.
    table.open(&Open { adapter: Some(AdapterId(9)), ..open(2 + 8, 40) }).unwrap_err();
    table.close(&close(2)).unwrap();
    table.open(&Open { adapter: Some(AdapterId(9)), ..open(4, 40) }).unwrap();
    let adapted = sharing(step(&run_of(4, 16..17), &[(4, 3), (4, 5)]), &[0]);
    let fault = table.begin_step(&adapted).map(|_| ()).unwrap_err();
    assert!(fault.to_string().contains("another adapter"), "{fault}");
    table.close(&close(1)).unwrap();
    table.begin_step(&step(&run_of(4, 0..1), &[(4, 3)])).unwrap();
    let gone = sharing(step(&run_of(3, 16..17), &[(3, 3), (3, 5)]), &[0]);
    let fault = table.begin_step(&gone).map(|_| ()).unwrap_err();
    assert!(fault.to_string().contains("not full"), "{fault}");
    assert_eq!(table.check(), Vec::<String>::new());
}

#[test]
fn the_context_is_a_bound() {
    let mut table = table();
    table.begin_step(&step(&run_of(1, 16..50), &[(1, 0), (1, 1), (1, 2)])).unwrap();
    let over = step(&run_of(1, 50..65), &[(1, 4), (1, 5)]);
    let fault = StageFault::ContextExceeded { sequence: SequenceId(1), length: 65, max: 64 };
    assert_eq!(table.begin_step(&over).map(|_| ()), Err(fault));
}

#[test]
fn opening_is_checked() {
    let mut table = table();
    assert_eq!(table.open(&open(1, 4)), Err(StageFault::AlreadyOpen(SequenceId(1))));
    table.open(&open(3, 4)).unwrap();
    let fault = StageFault::TooManySequences { sequence: SequenceId(4), max: 3 };
    assert_eq!(table.open(&open(4, 4)), Err(fault));
    let stale = StageFault::StaleGeneration { found: Generation(0), expected: Generation(1) };
    assert_eq!(table.open(&Open { generation: Generation(0), ..open(5, 1) }), Err(stale.clone()));
    assert_eq!(table.close(&CloseHeader { generation: 0, sequence: 1 }), Err(stale));
    assert_eq!(table.len(), 3);
}

#[test]
fn a_row_that_is_no_number_fails_its_sequence_alone() {
    let mut table = table();
    let mut rows = run_of(1, 16..19);
    rows.extend([(1, 19, true), (2, 0, true)]);
    let step = step(&rows, &[(1, 0), (2, 1)]);
    table.begin_step(&step).unwrap();
    let samples = table.draw(&step, &[f32::NAN, 0.0, 0.0, 3.0], 2).unwrap();
    let tokens: Vec<u32> = samples.samples.iter().map(|s| s.token).collect();
    assert_eq!(tokens, [Sample::NO_TOKEN, 1]);
    let wrong = StageFault::WrongLogits { found: 3, rows: 2, vocab: 2 };
    assert_eq!(table.draw(&step, &[0.0; 3], 2), Err(wrong));
}

#[test]
fn a_middle_stage_has_no_samplers() {
    let mut table = StageTable::new(Generation(1), LIMITS, false);
    table.open(&open(1, 2)).unwrap();
    let step = step(&[(1, 0, false), (1, 1, true)], &[(1, 0)]);
    assert_eq!(table.begin_step(&step).unwrap().sample_rows(), [1]);
    assert!(table.draw(&step, &[0.0, 1.0], 2).is_err());
    assert_eq!(table.check(), Vec::<String>::new());
}

#[test]
fn the_span_buffer_keeps_its_memory() {
    let mut table = table();
    let mut buffer = SpanBuffer::default();
    let first = step(&[(1, 16, false), (2, 0, false)], &[(1, 0), (2, 1)]);
    let begun = table.begin_step(&first).unwrap();
    let spans = buffer.take(&begun);
    let (at, capacity) = (spans.as_ptr() as usize, spans.capacity());
    buffer.give_back(spans);
    let begun = table.begin_step(&step(&[(1, 17, false)], &[])).unwrap();
    let spans = buffer.take(&begun);
    assert_eq!((spans.as_ptr() as usize, spans.capacity()), (at, capacity));
    assert_eq!(spans.len(), 1);
}
