//! What a rank takes from another in a draw: parts of the very length that the cut gives them, and what
//! the rows ask for.

use shoal_protocol::activation::StepHeader;
use shoal_protocol::id::{Attempt, Generation, RequestId};
use shoal_protocol::model::VOCAB_BLOCK;
use shoal_protocol::request::SamplingRecord;

use super::*;
use crate::collective::local::Local;

/// Two blocks and a bit: the second of two ranks has two of them.
const VOCAB: u32 = 2 * VOCAB_BLOCK + 100;

fn own(logits: &[f32]) -> OwnLogits<'_> {
    OwnLogits { first: 0, width: VOCAB_BLOCK as usize, vocab: VOCAB, logits }
}

/// What the first rank makes of a draw of one row in which the second says this.
fn draw(says: Bytes) -> Result<Samples, DrawError> {
    let limits = ReplicaLimits {
        kv_blocks: 1,
        context_max: 16,
        step_rows_max: 1,
        sequences_max: 1,
        steps_in_flight_max: 1,
    };
    let mut table = StageTable::new(Generation(1), limits, true);
    let open = shoal_protocol::activation::Open {
        generation: Generation(1),
        sequence: SequenceId(1),
        request: RequestId(1),
        attempt: Attempt(1),
        choice: 0,
        prompt_len: 1,
        adapter: None,
        sampling: SamplingRecord::GREEDY,
        tokens: vec![1],
    };
    table.open(&open).unwrap();
    let header = StepHeader { generation: 1, step: 1, rows: 1, grants: 0, samples: 1, reserved: 0 };
    let rows = vec![RowRecord { sequence: 1, position: 0, flags: 1 }];
    let step = Step { header, rows, grants: Vec::new() };
    let mut ends = Local::stage(2);
    let (mut other, mut first) = (ends.pop().unwrap(), ends.pop().unwrap());
    std::thread::scope(|scope| {
        let other: &mut dyn Collective = &mut other;
        let told = scope.spawn(move || other.share(says).map(drop));
        let drawn = table.draw_cut(&step, &own(&[0.5; VOCAB_BLOCK as usize]), &mut first);
        told.join().unwrap().unwrap();
        drawn
    })
}

#[test]
fn what_another_rank_tells_must_fit_the_rows() {
    for says in [
        Vec::new(),
        Summary::encode(&[]),
        Summary::encode(&[Summary::default()]),
        Summary::encode(&[Summary::of_non_finite(3, f32::NAN)]),
    ] {
        match draw(says.into()) {
            Err(DrawError::Peers(CollectiveError::NotTold { rank: 1, .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    let sample = draw(Summary::encode(&[Summary::of_non_finite(VOCAB - 1, f32::NAN)]).into());
    assert_eq!(sample.unwrap().samples[0].token, Sample::NO_TOKEN);
}

#[test]
fn a_part_of_a_row_that_is_too_short_or_too_long_is_refused_by_name() {
    let part = (VOCAB - VOCAB_BLOCK) as usize;
    for floats in [0, part - 1, part, part + 1] {
        let mut ends = Local::stage(2);
        let (mut other, mut first) = (ends.pop().unwrap(), ends.pop().unwrap());
        let found = std::thread::scope(|scope| {
            let other: &mut dyn Collective = &mut other;
            scope.spawn(move || other.share(vec![0; 4 * floats].into()).map(drop));
            own(&[0.5; VOCAB_BLOCK as usize]).gather_row(0, &mut first)
        });
        match found {
            Ok(row) => assert_eq!((floats, row.len()), (part, VOCAB as usize)),
            Err(error) => {
                let (found, expected) = (4 * floats, 4 * part);
                assert_ne!(floats, part);
                assert_eq!(error, CollectiveError::WrongLength { rank: 1, found, expected });
            }
        }
    }
}
