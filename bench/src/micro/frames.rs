//! Encoding and validating frames.

use std::hint::black_box;

use shoal_protocol::activation::{BlockGrant, RowRecord, Step, StepHeader};
use shoal_protocol::frame::{Flat, FrameKind, Prelude};
use shoal_protocol::plan::ReplicaLimits;

use super::nanoseconds;
use crate::measure::report::Section;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 4096,
    context_max: 8192,
    step_rows_max: 512,
    sequences_max: 256,
    steps_in_flight_max: 4,
};

/// Runs it.
pub fn run() -> Section {
    let mut section = Section::new("Frames", "Nanoseconds a call, one thread.");
    let step = |rows: u32| Step {
        header: StepHeader { generation: 1, step: 2, rows, grants: 1, samples: rows, reserved: 0 },
        rows: (0..rows)
            .map(|i| RowRecord { sequence: u64::from(i), position: 100, flags: RowRecord::SAMPLE })
            .collect(),
        grants: vec![BlockGrant { sequence: 1, block: 9, flags: 0 }],
    };
    let prelude =
        Prelude { kind: FrameKind::Step, header_len: StepHeader::LEN, body_len: 16_384 }.encode();
    let one = nanoseconds(|| Prelude::decode(black_box(&prelude)));
    section.seen("check a prelude", one.to_string());

    let mut header = [0; StepHeader::LEN];
    step(1).header.write_to(&mut header);
    let body_len = step(1).records_len() + 16_384;
    let check = nanoseconds(|| Step::check(black_box(&header), body_len, &LIMITS, 16_384));
    // The header's cost must not depend on the payload's size.
    section.at_most(
        "validate a step header against the plan",
        check.median(),
        check.to_string(),
        50.0,
    );
    for rows in [1, 16, 256] {
        let step = step(rows);
        let records = step.encode_records();
        let encode = nanoseconds(|| black_box(&step).encode_records());
        section.seen(format!("encode the records of {rows} rows"), encode.to_string());
        let decode = nanoseconds(|| Step::decode(step.header, black_box(&records)));
        section.seen(format!("decode the records of {rows} rows"), decode.to_string());
    }
    section
}
