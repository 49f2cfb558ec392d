//! The bytes of every message, and every decoder on damaged input.
//!
//! `golden/<message>.hex` holds the bytes of one example of each message: a changed layout shows in
//! review. `SHOAL_BLESS=1 cargo test -p shoal-protocol --test wire` writes them anew.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_protocol::access::{AccessCall, AccessReply, KeyLimits, KeyName};
use shoal_protocol::activation::{
    BlockGrant, CloseHeader, LinkHello, Open, OpenHeader, RowRecord, Sample, SampleRecord, Samples,
    SamplesHeader, Step, StepHeader,
};
use shoal_protocol::admin::{AdminCall, AdminReply, AdminRequest};
use shoal_protocol::control::{
    COORDINATORS_MAX, CoordinatorAddress, CoordinatorMessage, DeviceInfo, HeadReport, Register,
    Report, ShardCounters, ShardReport, ShardState, WorkerMessage,
};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::frame::{Flat, FrameKind, HEADER_LEN_MAX, PRELUDE_LEN, Prelude};
use shoal_protocol::id::{
    Attempt, DeploymentName, Generation, Incarnation, NodeId, RankIndex, ReplicaId, RequestId,
    Role, SequenceId, StageIndex, StepId,
};
use shoal_protocol::join::{JoinReply, JoinRequest};
use shoal_protocol::plan::{
    Assignment, ModelRef, ModelSource, Numerics, PeerAddress, Precision, PretendSpec,
    ReplicaLimits, ReplicaPlan, ShardMemory, ShardPlan, StagePlan,
};
use shoal_protocol::request::{
    CandidateRecord, DoneHeader, FailedHeader, FinishReason, Generate, GenerateHeader, HeadEvent,
    SamplingRecord, TokenHeader,
};
use shoal_protocol::trace::{SpanId, TraceHeader, TraceId, TraceMark};
use shoal_protocol::units::{Bytes, LayerRange};
use shoal_protocol::upgrade::UpgradeCall;
use shoal_protocol::version::VersionRange;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: 128,
    context_max: 512,
    step_rows_max: 64,
    sequences_max: 16,
    steps_in_flight_max: 4,
};

/// The width of the hidden states in these tests, in bytes a row.
const ROW_BYTES: usize = 32;

fn sampling() -> SamplingRecord {
    SamplingRecord {
        seed: 0x0123_4567_89ab_cdef,
        temperature: 0.5,
        top_p: 0.875,
        top_k: 40,
        repetition_penalty: 1.25,
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logprobs: 5,
        stream: SamplingRecord::stream_of(1, 2),
    }
}

fn open() -> Open {
    Open {
        generation: Generation(7),
        sequence: SequenceId(9),
        request: RequestId(0xfeed),
        attempt: Attempt(1),
        choice: 2,
        prompt_len: 3,
        sampling: sampling(),
        tokens: vec![1, 2, 3, 500],
    }
}

fn trace() -> TraceHeader {
    let mark = TraceMark { trace: TraceId(0x0102 << 64 | 0x0304), span: SpanId(5) };
    TraceHeader::of_sequence(mark, Generation(6), SequenceId(7))
}

fn step() -> Step {
    let row = |position, flags| RowRecord { sequence: 9, position, flags };
    Step {
        header: StepHeader { generation: 7, step: 11, rows: 2, grants: 1, samples: 1, reserved: 0 },
        rows: vec![row(15, 0), row(16, RowRecord::SAMPLE)],
        grants: vec![BlockGrant { sequence: 9, block: 4, reserved: 0 }],
    }
}

fn samples() -> Samples {
    let candidate = |token, logprob| CandidateRecord { token, logprob };
    Samples {
        generation: Generation(7),
        step: StepId(11),
        samples: vec![Sample {
            sequence: SequenceId(9),
            position: 16,
            token: 42,
            logprob: -0.25,
            candidates: vec![candidate(42, -0.25), candidate(7, -2.5)],
        }],
    }
}

fn generate() -> Generate {
    Generate {
        request: RequestId(0xfeed),
        attempt: Attempt(1),
        choice: 2,
        replica: ReplicaId(3),
        deadline_ms: 60_000,
        prompt_len: 3,
        max_tokens: 16,
        sampling: sampling(),
        stop_tokens: vec![0, 2],
        tokens: vec![1, 2, 3],
    }
}

fn head_events() -> [(&'static str, HeadEvent); 3] {
    let token = TokenHeader {
        request: 0xfeed,
        attempt: 1,
        choice: 2,
        index: 0,
        token: 42,
        logprob: -0.25,
        candidates: 1,
        queue_us: 120,
        prefill_us: 3400,
    };
    let done = DoneHeader {
        request: 0xfeed,
        attempt: 1,
        choice: 2,
        reason: FinishReason::Stop as u32,
        tokens: 4,
        preemptions: 0,
        stop_token: 2,
    };
    let code = ErrorCode::WorkerLost;
    let failed = FailedHeader {
        request: 0xfeed,
        attempt: 1,
        choice: 2,
        code: code.number().into(),
        reserved: 0,
    };
    [
        (
            "Token",
            HeadEvent::Token {
                header: token,
                candidates: vec![CandidateRecord { token: 42, logprob: -0.25 }],
            },
        ),
        ("Done", HeadEvent::Done { header: done, reason: FinishReason::Stop }),
        ("Failed", HeadEvent::Failed { header: failed, code, message: "w2 was lost".to_owned() }),
    ]
}

fn assignment() -> Assignment {
    let shard = |number| ShardPlan {
        rank: RankIndex(0),
        node: NodeId::worker(number),
        device: "cpu".to_owned(),
        memory: ShardMemory { weights: Bytes(1000), kv: Bytes(2000), activations: Bytes(30) },
    };
    let stage = |start, end, number| StagePlan {
        layers: LayerRange::new(start, end),
        shards: vec![shard(number)],
    };
    let peer = |number: u32| PeerAddress {
        node: NodeId::worker(number),
        activations: ([127, 0, 0, 1], 4000 + number as u16).into(),
    };
    let source = ModelSource::Pretend(PretendSpec {
        layers: 12,
        hidden: 8,
        vocab: 1003,
        max_context: 512,
        seed: 1,
        layer_step_ns: 1000,
        layer_row_ns: 10,
        layer_weight_bytes: 500,
    });
    Assignment {
        replica: ReplicaPlan {
            id: ReplicaId(3),
            deployment: DeploymentName::new("demo").unwrap(),
            generation: Generation(7),
            model: ModelRef { source, fingerprint: [0xab; 32] },
            precision: Precision::Bf16,
            numerics: Numerics::N1,
            stages: vec![stage(0, 4, 1), stage(4, 12, 2)],
            limits: LIMITS,
        },
        stage: StageIndex(1),
        rank: RankIndex(0),
        peers: vec![peer(1), peer(2)],
    }
}

fn worker_messages() -> [(&'static str, WorkerMessage); 4] {
    let device = DeviceInfo {
        name: "cpu".to_owned(),
        description: "AVX-512, 2 threads".to_owned(),
        memory: Bytes::mib(600),
        threads: 2,
    };
    let register = Register {
        versions: VersionRange { min: 1, max: 1 },
        build: "0.1.0".to_owned(),
        node: NodeId::worker(2),
        incarnation: Incarnation(4),
        pid: 1234,
        requests: ([127, 0, 0, 1], 4001).into(),
        activations: ([127, 0, 0, 1], 4002).into(),
        devices: vec![device],
        numerics: vec![Numerics::N1],
    };
    let report = Report {
        shards: vec![ShardReport {
            replica: ReplicaId(3),
            generation: Generation(7),
            stage: StageIndex(1),
            state: ShardState::Loading { done: Bytes(5), total: Bytes(10) },
            memory: ShardMemory::default(),
            counters: ShardCounters { steps: 1, rows: 2, ..ShardCounters::default() },
        }],
        heads: vec![HeadReport { replica: ReplicaId(3), running: 1, ..HeadReport::default() }],
    };
    let refused = Err(WireError::new(ErrorCode::BadModel, "w2 cannot read /models/x"));
    [
        ("Register", WorkerMessage::Register(register)),
        ("Report", WorkerMessage::Report(report)),
        ("Probed", WorkerMessage::Probed { probe: 5, result: refused }),
        ("Outranked", WorkerMessage::Outranked { epoch: 9 }),
    ]
}

fn coordinator_messages() -> [(&'static str, CoordinatorMessage); 6] {
    let coordinators = |n: u32| -> Vec<_> {
        let address = |number: u32| ([10, 0, 0, number as u8], 4000).into();
        let named = |number| CoordinatorAddress {
            node: NodeId::coordinator(number),
            cluster: address(number),
        };
        (1..=n).map(named).collect()
    };
    let source = ModelSource::Folder { path: "/models/x".to_owned() };
    [
        ("Welcome", CoordinatorMessage::Welcome { version: 1, coordinators: coordinators(3) }),
        (
            "CtlRefused",
            CoordinatorMessage::Refused(WireError::new(ErrorCode::VersionMismatch, "too old")),
        ),
        ("Assign", CoordinatorMessage::Assign { epoch: 9, assignments: vec![assignment()] }),
        ("Probe", CoordinatorMessage::Probe { probe: 5, source }),
        ("Drain", CoordinatorMessage::Drain { epoch: 9 }),
        ("Coordinators", CoordinatorMessage::Coordinators(coordinators(2))),
    ]
}

fn admin_requests() -> [(&'static str, AdminRequest); 7] {
    let request = |call| AdminRequest { versions: VersionRange { min: 1, max: 1 }, call };
    let deploy = AdminCall::Deploy {
        name: DeploymentName::new("demo").unwrap(),
        source: ModelSource::Builtin { name: "demo".to_owned() },
        stages: Some(3),
        precision: Some(Precision::F32),
        replicas: 2,
    };
    [
        ("AdminStatus", request(AdminCall::Status)),
        ("AdminDeploy", request(deploy)),
        (
            "AdminCreateToken",
            request(AdminCall::CreateToken { role: Role::Worker, uses: 1, expires_s: 3600 }),
        ),
        (
            "AdminCreateKey",
            request(AdminCall::Access(AccessCall::CreateKey {
                name: KeyName::new("alice").unwrap(),
                limits: KeyLimits { requests_per_minute: Some(60), concurrent: None },
                expires_s: Some(3600),
            })),
        ),
        (
            "AdminRemoveNode",
            request(AdminCall::Access(AccessCall::RemoveNode {
                node: NodeId::worker(2),
                force: true,
            })),
        ),
        // The last call of version 1, and the first of version 2.
        (
            "AdminDrain",
            request(AdminCall::Drain { node: NodeId::worker(2), draining: true, dry_run: false }),
        ),
        ("AdminUpgrade", request(AdminCall::Upgrade(UpgradeCall::Finish))),
    ]
}

// === Golden bytes ===

fn check_golden(name: &str, bytes: &[u8]) {
    let mut text = String::new();
    for line in bytes.chunks(16) {
        for byte in line {
            write!(text, "{byte:02x} ").unwrap();
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    let path =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    if std::env::var_os("SHOAL_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let golden =
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(
        text, golden,
        "the bytes of {name} have changed; a new layout needs a new protocol version"
    );
}

fn framed(kind: FrameKind, header: &[u8], body: &[u8]) -> Vec<u8> {
    let prelude = Prelude { kind, header_len: header.len(), body_len: body.len() };
    [&prelude.encode(), header, body].concat()
}

fn flat_bytes<T: Flat>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.append_to(&mut out);
    assert_eq!(out.len(), T::LEN);
    out
}

/// Checks that a flat struct survives the wire.
fn check_flat<T: Flat + PartialEq + std::fmt::Debug>(value: T) -> Vec<u8> {
    let bytes = flat_bytes(&value);
    assert_eq!(T::read_from(&bytes).unwrap(), value);
    bytes
}

fn check_message<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    name: &str,
    message: &T,
) {
    let bytes = postcard::to_stdvec(message).unwrap();
    assert_eq!(&postcard::from_bytes::<T>(&bytes).unwrap(), message);
    check_golden(name, &framed(FrameKind::Message, &[], &bytes));
}

#[test]
fn hot_frames_have_golden_bytes() {
    let hello = LinkHello { generation: 7, replica: 3, from_stage: 0, to_stage: 1, reserved: 0 };
    check_golden("LinkHello", &framed(FrameKind::LinkHello, &check_flat(hello), &[]));

    let (header, body) = open().encode();
    let header = check_flat(header);
    assert_eq!(Open::decode(&header, &body, &LIMITS).unwrap(), open());
    check_golden("Open", &framed(FrameKind::Open, &header, &body));

    let header = check_flat(step().header);
    let payload = [0u8; 2 * ROW_BYTES];
    let body = [step().encode_records(), payload.to_vec()].concat();
    let (checked, records, rest) = Step::check(&header, body.len(), &LIMITS, ROW_BYTES).unwrap();
    assert_eq!(rest, payload.len());
    assert_eq!(Step::decode(checked, &body[..records]).unwrap(), step());
    check_golden("Step", &framed(FrameKind::Step, &header, &body));

    let close = check_flat(CloseHeader { generation: 7, sequence: 9 });
    check_golden("Close", &framed(FrameKind::Close, &close, &[]));
    check_golden("Trace", &framed(FrameKind::Trace, &check_flat(trace()), &[]));

    let (header, body) = samples().encode();
    let header = check_flat(header);
    assert_eq!(Samples::decode(&header, &body, &LIMITS).unwrap(), samples());
    check_golden("Samples", &framed(FrameKind::Samples, &header, &body));

    let (header, body) = generate().encode();
    let header = check_flat(header);
    assert_eq!(Generate::decode(&header, &body).unwrap(), generate());
    check_golden("Generate", &framed(FrameKind::Generate, &header, &body));

    for (name, event) in head_events() {
        let (kind, header, body) = event.encode();
        assert_eq!(HeadEvent::decode(kind, &header, &body).unwrap(), event);
        check_golden(name, &framed(kind, &header, &body));
    }
}

#[test]
fn control_messages_have_golden_bytes() {
    worker_messages().iter().for_each(|(name, message)| check_message(name, message));
    coordinator_messages().iter().for_each(|(name, message)| check_message(name, message));
    admin_requests().iter().for_each(|(name, message)| check_message(name, message));
    check_message("AdminToken", &AdminReply::Token { token: "shoal1.worker.aa.bb".to_owned() });
    let key = AccessReply::Key { secret: "sk-shoal-aa".to_owned() };
    check_message("AdminKey", &AdminReply::Access(key));
    let join = JoinRequest {
        versions: VersionRange { min: 1, max: 1 },
        secret: [7; 32],
        csr: vec![1, 2, 3],
    };
    check_message("JoinRequest", &join);
    let joined =
        JoinReply::Joined { node: NodeId::worker(2), certificate: vec![4, 5], ca: vec![6] };
    check_message("JoinReply", &joined);
}

#[test]
fn headers_are_small() {
    for len in [
        LinkHello::LEN,
        OpenHeader::LEN,
        StepHeader::LEN,
        CloseHeader::LEN,
        SamplesHeader::LEN,
        SampleRecord::LEN,
        GenerateHeader::LEN,
        TokenHeader::LEN,
        DoneHeader::LEN,
        FailedHeader::LEN,
        TraceHeader::LEN,
    ] {
        assert!(len <= HEADER_LEN_MAX);
    }
}

// === Damaged input ===

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
fn bombard(seed: u64, frame: &[u8], decode: impl Fn(Prelude, &[u8], &[u8])) {
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
    let hello = LinkHello { generation: 7, replica: 3, from_stage: 0, to_stage: 1, reserved: 0 };
    bombard(9, &framed(FrameKind::LinkHello, &flat_bytes(&hello), &[]), |_, header, _| {
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

fn bombard_message<T: Serialize + DeserializeOwned>(seed: u64, message: &T) {
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
