//! The bytes of every message; `damaged` gives every decoder what is not quite that.
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
    AdapterId, Attempt, DeploymentName, Generation, Incarnation, NodeId, RankIndex, ReplicaId,
    RequestId, Role, SequenceId, StageIndex, StepId,
};
use shoal_protocol::join::{JoinReply, JoinRequest};
use shoal_protocol::mesh::{Fact, Mesh, MeshAsk, MeshAsked, Objective, Reduction, ZoneName};
use shoal_protocol::peer::PeerRequest;
use shoal_protocol::plan::{
    Activations, Assignment, KvPrecision, ModelRef, ModelSource, Numerics, PeerAddress, Precision,
    PretendSpec, ReplicaLimits, ReplicaPlan, ShardMemory, ShardPlan, StagePlan,
};
use shoal_protocol::prefix::{ReusedHeader, TenantHeader};
use shoal_protocol::request::{
    CandidateRecord, DoneHeader, FailedHeader, FinishReason, Generate, GenerateHeader, HeadEvent,
    SamplingRecord, TokenHeader, VectorHeader,
};
use shoal_protocol::trace::{SpanId, TraceHeader, TraceId, TraceMark};
use shoal_protocol::trust::Trust;
use shoal_protocol::units::{Bytes, LayerRange};
use shoal_protocol::upgrade::UpgradeCall;
use shoal_protocol::version::VersionRange;

#[path = "wire/damaged.rs"]
mod damaged;
#[path = "wire/third.rs"]
mod third;

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
        adapter: None,
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
        grants: vec![BlockGrant { sequence: 9, block: 4, flags: 0 }],
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
        vectors: vec![],
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
        adapter: None,
        sampling: sampling(),
        stop_tokens: vec![0, 2],
        tokens: vec![1, 2, 3],
    }
}

fn head_events() -> [(&'static str, HeadEvent); 5] {
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
    let vector = VectorHeader {
        request: 0xfeed,
        attempt: 1,
        choice: 2,
        width: 3,
        queue_us: 120,
        encode_us: 3400,
        reserved: 0,
    };
    let reused = ReusedHeader { request: 0xfeed, attempt: 1, choice: 2, tokens: 480, reserved: 0 };
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
        ("Reused", HeadEvent::Reused { header: reused }),
        ("Vector", HeadEvent::Vector { header: vector, values: vec![0.5, -1.0, 0.25] }),
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

fn worker_messages() -> [(&'static str, WorkerMessage); 6] {
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
        ("Trusts", WorkerMessage::Trusts { trusts: vec![[1; 32], [2; 32]], shows: [1; 32] }),
        ("Facts", WorkerMessage::Facts(facts())),
    ]
}

fn facts() -> Vec<Fact> {
    vec![
        Fact::Ranks { most: 8 },
        Fact::Zone(ZoneName::new("rack-1").unwrap()),
        Fact::Rate { device: "cpu".to_owned(), threads: 2, bytes_per_s: 1 << 34 },
        Fact::Link { to: NodeId::worker(1), latency_us: 90, bytes_per_s: None },
        Fact::Missing { to: NodeId::worker(3) },
    ]
}

fn coordinator_messages() -> [(&'static str, CoordinatorMessage); 7] {
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
        ("Trust", CoordinatorMessage::Trust { trust: trust(), signs: true }),
    ]
}

fn trust() -> Trust {
    Trust { revision: 3, cas: vec![vec![1; 4], vec![2; 3]], lineage: vec![vec![3; 5]] }
}

fn admin_requests() -> [(&'static str, AdminRequest); 10] {
    let request = |call| AdminRequest { versions: VersionRange { min: 1, max: 1 }, call };
    let deploy = AdminCall::Deploy {
        name: DeploymentName::new("demo").unwrap(),
        source: ModelSource::Builtin { name: "demo".to_owned() },
        stages: Some(3),
        precision: Some(Precision::F32),
        replicas: 2,
    };
    let ask = MeshAsk {
        mesh: Some(MeshAsked::Exactly(Mesh { stages: 2, ranks: 2 })),
        objective: Some(Objective::Throughput),
        reduction: Some(Reduction::Exact),
        kv: Some(KvPrecision::Bf16),
        activations: Some(Activations::Int8),
    };
    let name = DeploymentName::new("demo").unwrap();
    let source = ModelSource::Builtin { name: "demo".to_owned() };
    let deploy_mesh =
        AdminCall::DeployMesh { name: name.clone(), source, precision: None, replicas: 2, ask };
    let auto = MeshAsk { mesh: Some(MeshAsked::Auto), ..MeshAsk::default() };
    let scale_mesh = AdminCall::ScaleMesh { name, replicas: Some(3), ask: auto, dry_run: true };
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
        ("AdminDeployMesh", request(deploy_mesh)),
        ("AdminScaleMesh", request(scale_mesh)),
        ("AdminRotateCa", request(AdminCall::Access(AccessCall::RotateCa { skip_absent: true }))),
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
    let hello = LinkHello { generation: 7, replica: 3, from_stage: 0, to_stage: 1, ranks: 0 };
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

    let of_encoder = Samples { vectors: vec![vec![0.5, -1.0]], ..samples() };
    let (header, body) = of_encoder.encode();
    let header = check_flat(header);
    assert_eq!(Samples::decode(&header, &body, &LIMITS).unwrap(), of_encoder);
    check_golden("Vectors", &framed(FrameKind::Samples, &header, &body));

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

/// Beside the golden bytes of requests without one: where 0 stands for those who know of none.
#[test]
fn an_adapter_stands_where_zero_was_and_comes_back() {
    let mut bytes = Vec::new();
    let adapted = Open { adapter: Some(AdapterId(4)), ..open() };
    let (header, body) = adapted.encode();
    header.append_to(&mut bytes);
    assert_eq!(Open::decode(&bytes, &body, &LIMITS).unwrap(), adapted);
    assert_eq!((bytes.len(), bytes[40]), (48, 4));
    bytes[45] = 1;
    let refused = Open::decode(&bytes, &body, &LIMITS).unwrap_err().to_string();
    assert!(refused.contains("adapter 1099511627780"), "{refused}");
    bytes.clear();
    let adapted = Generate { adapter: Some(AdapterId(4)), ..generate() };
    let (header, body) = adapted.encode();
    header.append_to(&mut bytes);
    assert_eq!(Generate::decode(&bytes, &body).unwrap(), adapted);
    assert_eq!((bytes.len(), bytes[44]), (48, 4));
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
    let (node, certificate) = (NodeId::worker(2), vec![4, 5]);
    check_message("JoinAdmitted", &JoinReply::Admitted { node, certificate, trust: trust() });
    let removed = WireError::new(ErrorCode::PermissionDenied, "w2 was removed");
    check_message("JoinRemoved", &JoinReply::Removed(removed));
    let versions = VersionRange { min: 1, max: 2 };
    check_message("PeerCaKeyOf", &PeerRequest::CaKeyOf { versions, ca: [1; 32] });
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
        TenantHeader::LEN,
        ReusedHeader::LEN,
    ] {
        assert!(len <= HEADER_LEN_MAX);
    }
}
