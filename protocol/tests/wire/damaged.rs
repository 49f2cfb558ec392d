//! Every decoder on damaged input: it returns, and believes no length.

use super::*;

/// How many damaged inputs each decoder is given.
const MUTATIONS: u32 = 20_000;

/// A small generator (xorshift64*): the run is the same every time.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Damages a copy: flips, sets to an extreme, cuts, repeats or inserts.
fn mutate(dice: &mut Dice, bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=dice.below(4) {
        let at = dice.below(out.len());
        match dice.below(6) {
            0 if !out.is_empty() => out[at] ^= 1 << dice.below(8),
            1 if !out.is_empty() => out[at] = [0, 0xff, 0x7f, 0x80][dice.below(4)],
            2 => out.truncate(at),
            3 => out.extend_from_within(at..),
            4 => out.insert(at, dice.next() as u8),
            _ if out.len() >= 4 => {
                let at = dice.below(out.len() - 3);
                out[at..at + 4].copy_from_slice(&(dice.next() as u32).to_le_bytes());
            }
            _ => {}
        }
    }
    out
}

/// Gives damaged copies of a good frame to a decoder, which must return; a panic fails the test. A
/// damaged length must not be believed: the process would die of what it allocates.
pub(super) fn bombard(seed: u64, frame: &[u8], decode: impl Fn(Prelude, &[u8], &[u8])) {
    let mut dice = Dice(seed);
    for _ in 0..MUTATIONS {
        let bytes = mutate(&mut dice, frame);
        let Some((prelude, rest)) = bytes.split_first_chunk::<PRELUDE_LEN>() else { continue };
        // Most damage should reach the inner decoders, so that the prelude is repaired now and then.
        let prelude = match Prelude::decode(prelude) {
            Ok(prelude) => prelude,
            Err(_) => Prelude::decode(frame.first_chunk().unwrap()).unwrap(),
        };
        let (header, body) = rest.split_at(prelude.header_len.min(rest.len()));
        decode(prelude, header, body);
    }
}

#[test]
fn damaged_hot_frames_are_refused_without_a_panic() {
    let (header, body) = open().encode();
    bombard(1, &framed(FrameKind::Open, &flat_bytes(&header), &body), |_, header, body| {
        if let Ok(open) = Open::decode(header, body, &LIMITS) {
            assert!(open.tokens.len() <= LIMITS.context_max as usize);
        }
    });
    let body = [step().encode_records(), vec![0; 2 * ROW_BYTES]].concat();
    bombard(
        2,
        &framed(FrameKind::Step, &flat_bytes(&step().header), &body),
        |prelude, header, body| {
            // The length that the prelude claims, and the one that is really there.
            for len in [prelude.body_len, body.len()] {
                if let Ok((header, records, payload)) = Step::check(header, len, &LIMITS, ROW_BYTES)
                {
                    assert!(records + payload == len && header.rows <= LIMITS.step_rows_max);
                    if let Some(records) = body.get(..records) {
                        let _ = Step::decode(header, records);
                    }
                }
            }
        },
    );
    let (header, body) = samples().encode();
    bombard(3, &framed(FrameKind::Samples, &flat_bytes(&header), &body), |_, header, body| {
        if let Ok(samples) = Samples::decode(header, body, &LIMITS) {
            assert!(samples.samples.len() <= LIMITS.step_rows_max as usize);
        }
    });
    let (header, body) = generate().encode();
    bombard(4, &framed(FrameKind::Generate, &flat_bytes(&header), &body), |_, header, body| {
        let _ = Generate::decode(header, body);
    });
    for (i, (_, event)) in head_events().into_iter().enumerate() {
        let (kind, header, body) = event.encode();
        bombard(5 + i as u64, &framed(kind, &header, &body), |prelude, header, body| {
            let _ = HeadEvent::decode(prelude.kind, header, body);
        });
    }
    let hello = LinkHello { generation: 7, replica: 3, from_stage: 0, to_stage: 1, ranks: 0 };
    bombard(20, &framed(FrameKind::LinkHello, &flat_bytes(&hello), &[]), |_, header, _| {
        let _ = LinkHello::read_from(header);
    });
    let close = CloseHeader { generation: 7, sequence: 9 };
    bombard(10, &framed(FrameKind::Close, &flat_bytes(&close), &[]), |_, header, _| {
        let _ = CloseHeader::read_from(header);
    });
}

#[test]
fn damaged_marks_are_refused_without_a_panic() {
    bombard(11, &framed(FrameKind::Trace, &flat_bytes(&trace()), &[]), |_, header, _| {
        let _ = TraceHeader::read_from(header).and_then(|header| header.mark());
    });
}

pub(super) fn bombard_message<T: Serialize + DeserializeOwned>(seed: u64, message: &T) {
    let bytes = postcard::to_stdvec(message).unwrap();
    bombard(seed, &framed(FrameKind::Message, &[], &bytes), |_, _, body| {
        let _ = postcard::from_bytes::<T>(body);
    });
}

#[test]
fn damaged_messages_are_refused_without_a_panic() {
    worker_messages().iter().for_each(|(_, message)| bombard_message(21, message));
    coordinator_messages().iter().for_each(|(_, message)| bombard_message(22, message));
    admin_requests().iter().for_each(|(_, message)| bombard_message(23, message));
    let join = JoinRequest {
        versions: VersionRange { min: 1, max: 1 },
        secret: [7; 32],
        csr: vec![1; 300],
    };
    bombard_message(24, &join);
    bombard_message(
        25,
        &JoinReply::Joined { node: NodeId::worker(2), certificate: vec![4; 600], ca: vec![6; 500] },
    );
    let (node, certificate) = (NodeId::worker(2), vec![4; 600]);
    bombard_message(26, &JoinReply::Admitted { node, certificate, trust: trust() });
}

#[test]
fn numbers_over_the_plans_bounds_are_refused() {
    let (mut header, body) = open().encode();
    header.tokens = LIMITS.context_max + 1;
    assert!(Open::decode(&flat_bytes(&header), &body, &LIMITS).is_err());
    header.tokens = 4;
    header.prompt_len = 5;
    assert!(Open::decode(&flat_bytes(&header), &body, &LIMITS).is_err());

    let check = |change: fn(&mut StepHeader), body_len: usize| {
        let mut header = step().header;
        change(&mut header);
        Step::check(&flat_bytes(&header), body_len, &LIMITS, ROW_BYTES)
    };
    let right = 3 * 16 + 2 * ROW_BYTES;
    assert!(check(|_| {}, right).is_ok());
    assert!(check(|_| {}, right - 1).is_err());
    assert!(check(|_| {}, right + 1).is_err());
    assert!(check(|h| h.rows = LIMITS.step_rows_max + 1, right).is_err());
    assert!(check(|h| h.grants = LIMITS.kv_blocks + 1, right).is_err());
    assert!(check(|h| h.samples = 3, right).is_err());

    let mut nan = sampling();
    nan.temperature = f32::NAN;
    assert!(nan.check().is_err());
}

#[test]
fn a_list_of_coordinators_names_coordinators_and_not_too_many() {
    let named = |node| CoordinatorAddress { node, cluster: ([10, 0, 0, 1], 4000).into() };
    let full: Vec<_> =
        (1..=COORDINATORS_MAX as u32).map(|n| named(NodeId::coordinator(n))).collect();
    assert_eq!(CoordinatorAddress::check(&full), Ok(()));
    let longer = [full, vec![named(NodeId::coordinator(99))]].concat();
    let words = CoordinatorAddress::check(&longer).unwrap_err().to_string();
    assert!(words.contains("17") && words.contains("16"), "{words}");
    let words = CoordinatorAddress::check(&[named(NodeId::worker(2))]).unwrap_err().to_string();
    assert!(words.contains("w2"), "{words}");
}
