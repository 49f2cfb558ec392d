//! What travels from protocol version 3 on: chunks of weights, links between ranks, models of origins.

use shoal_protocol::access::{AccessCall, AccessReply, NodeView, NodesKnown};
use shoal_protocol::activation::{Near, Partial};
use shoal_protocol::adapters::{
    AdapterCall, AdapterReply, AdapterSpec, AdapterView, DeploymentAdapters, HeldAdapters,
    WantedAdapters,
};
use shoal_protocol::prefix::{PrefixReport, Tenant, TenantHeader};
use shoal_protocol::weights::{
    ASK_LEN_MAX, BlobNews, ChunkAsk, ChunkHash, ChunkId, ChunkReply, ModelKey,
};

use super::damaged::{bombard, bombard_message};
use super::*;

const KEY: ModelKey = ModelKey([5; 32]);
const HASH: ChunkHash = [6; 32];

fn news() -> Vec<BlobNews> {
    let chunk = |index| ChunkId { file: 1, index };
    vec![
        BlobNews::Wants { key: KEY, chunks: vec![(0, 3..700), (1, 0..1)] },
        BlobNews::Has { key: KEY, chunks: vec![(chunk(4), HASH), (chunk(300), HASH)] },
        BlobNews::Gone { key: KEY },
    ]
}

fn of_worker() -> WorkerMessage {
    WorkerMessage::Blobs { address: ([10, 0, 0, 2], 4003).into(), news: news() }
}

fn of_coordinator() -> CoordinatorMessage {
    let said = |news| (NodeId::worker(2), ([10, 0, 0, 2], 4003).into(), news);
    CoordinatorMessage::Blobs(news().into_iter().map(said).collect())
}

const ASK: ChunkAsk = ChunkAsk { key: KEY, chunk: ChunkId { file: 1, index: 300 } };

fn partial() -> Partial {
    Partial { generation: 7, round: 12 }
}

/// The second rank of stage 1 to its third.
fn hello() -> LinkHello {
    let ranks = LinkHello::ranks_of(RankIndex(1), RankIndex(2), true);
    LinkHello { generation: 7, replica: 3, from_stage: 1, to_stage: 1, ranks }
}

/// Ranks of a model of an origin.
fn assigned(source: ModelSource) -> CoordinatorMessage {
    let mut assignment = assignment();
    assignment.replica.model.source = source;
    assignment.replica.precision = Precision::Fp8;
    assignment.replica.numerics = Numerics::N1Sum;
    let second = ShardPlan { rank: RankIndex(1), ..assignment.replica.stages[1].shards[0].clone() };
    assignment.replica.stages[1].shards.push(second);
    assignment.rank = RankIndex(1);
    CoordinatorMessage::Assign { epoch: 9, assignments: vec![assignment] }
}

fn hub() -> ModelSource {
    ModelSource::Hub { repo: "org/name".to_owned(), revision: "0123456789".repeat(4) }
}

fn hub_gguf() -> ModelSource {
    let (repo, file) = ("org/name-GGUF".to_owned(), "Q8_0/name-00001-of-00002.gguf".to_owned());
    ModelSource::HubGguf { repo, revision: "0123456789".repeat(4), file }
}

fn object_store() -> ModelSource {
    let url = "s3://bucket/models/name".to_owned();
    ModelSource::ObjectStore { url, revision: "0123456789".repeat(4) }
}

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).unwrap()
}

fn wanted_adapters() -> CoordinatorMessage {
    let path = "/adapters/support".to_owned();
    let spec = AdapterSpec { id: AdapterId(3), name: name("support"), path, fingerprint: [8; 32] };
    let of = DeploymentAdapters { deployment: name("llama-8b"), adapters: vec![spec] };
    CoordinatorMessage::Adapters(WantedAdapters { revision: 5, deployments: vec![of] })
}

fn held_adapters() -> WorkerMessage {
    let why = WireError::new(ErrorCode::BadModel, "no such folder");
    WorkerMessage::Adapters(vec![HeldAdapters {
        replica: ReplicaId(3),
        generation: Generation(7),
        held: vec![(AdapterId(1), [1; 32]), (AdapterId(300), [2; 32])],
        failed: vec![(AdapterId(3), why)],
    }])
}

fn load_adapter() -> AdminRequest {
    let (name, deployment) = (name("support"), name("llama-8b"));
    let call = AdapterCall::Load { name, deployment, path: "/adapters/support".to_owned() };
    AdminRequest { versions: VersionRange { min: 1, max: 3 }, call: AdminCall::Adapters(call) }
}

fn adapters_listed() -> AdminReply {
    AdminReply::Adapters(AdapterReply::List(vec![AdapterView {
        name: name("support"),
        id: AdapterId(3),
        deployment: name("llama-8b"),
        path: "/adapters/support".to_owned(),
        created_s: 1_795_274_400,
        held: 1,
        replicas: 2,
        reason: "it is being loaded".to_owned(),
    }]))
}

fn prefixes() -> WorkerMessage {
    WorkerMessage::Prefixes(vec![PrefixReport {
        replica: ReplicaId(3),
        generation: Generation(7),
        blocks_known: 300,
        blocks_idle: 200,
        hits: 4,
        lookups: 5,
        tokens_asked: 6000,
        tokens_found: 5000,
        evictions: 1,
    }])
}

const TENANT: Tenant = Tenant(0x0123_4567_89ab_cdef_0011_2233_4455_6677);

fn nodes_known() -> AdminReply {
    let node = NodeView {
        node: NodeId::worker(2),
        joined_s: 1_795_274_400,
        starts: 3,
        build: "0.1.0".to_owned(),
        connected: Some(true),
        placed: false,
    };
    let no_majority = Some("no majority of the coordinators".to_owned());
    let known = NodesKnown { nodes: vec![node], as_of_s: 1_795_274_500, no_majority };
    AdminReply::Access(AccessReply::NodesKnown(known))
}

#[test]
fn what_travels_from_version_3_on_has_golden_bytes() {
    check_message("AdminListNodesKnown", &AdminCall::Access(AccessCall::ListNodesKnown));
    check_message("AdminNodesKnown", &nodes_known());
    check_message("WorkerBlobs", &of_worker());
    check_message("CoordinatorBlobs", &of_coordinator());
    check_message("CoordinatorAdapters", &wanted_adapters());
    check_message("WorkerAdapters", &held_adapters());
    check_message("WorkerPrefixes", &prefixes());
    let tenant = check_flat(TenantHeader::of(TENANT));
    assert_eq!(TenantHeader::read_from(&tenant).unwrap().tenant(), TENANT);
    check_golden("Tenant", &framed(FrameKind::Tenant, &tenant, &[]));
    check_message("AdminLoadAdapter", &load_adapter());
    check_message("AdminAdapters", &adapters_listed());
    check_message("ChunkAsk", &ASK);
    check_message("ChunkReplyHere", &ChunkReply::Here { len: 4 << 20 });
    check_message("ChunkReplyNotHere", &ChunkReply::NotHere);
    check_message("AssignHub", &assigned(hub()));
    check_message("AssignObjectStore", &assigned(object_store()));
    check_message("AssignHubGguf", &assigned(hub_gguf()));
    check_message("ProbeHub", &CoordinatorMessage::Probe { probe: 5, source: hub() });
    // A part of messages, by name: each keeps its number for ever.
    let blocks = vec![Precision::Q8_0, Precision::Q4_0, Precision::Q4K, Precision::Fp8];
    check_message("PrecisionsOfBlocks", &blocks);

    assert!(postcard::to_stdvec(&ASK).unwrap().len() <= ASK_LEN_MAX);
    let partial = check_flat(partial());
    check_golden("Partial", &framed(FrameKind::Partial, &partial, &[1, 2, 3, 4]));
    let near = check_flat(Near { generation: 7, yes: 1 });
    check_golden("Near", &framed(FrameKind::Near, &near, &[]));
    check_golden("LinkHelloOfRanks", &framed(FrameKind::LinkHello, &check_flat(hello()), &[]));
    assert_eq!((hello().from_rank(), hello().to_rank()), (RankIndex(1), RankIndex(2)));
}

#[test]
fn damaged_messages_of_version_3_are_refused_without_a_panic() {
    bombard_message(31, &of_worker());
    bombard_message(32, &of_coordinator());
    bombard_message(33, &ASK);
    bombard_message(34, &ChunkReply::Here { len: 4 << 20 });
    bombard_message(35, &assigned(hub()));
    bombard_message(43, &assigned(hub_gguf()));
    bombard_message(39, &wanted_adapters());
    bombard_message(40, &held_adapters());
    bombard_message(44, &prefixes());
    bombard_message(41, &load_adapter());
    bombard_message(42, &nodes_known());
    bombard_message(36, &assigned(object_store()));
    let body = [7; 64];
    bombard(37, &framed(FrameKind::Partial, &flat_bytes(&partial()), &body), |_, header, _| {
        let _ = Partial::read_from(header);
    });
    let near = flat_bytes(&Near { generation: 7, yes: 1 });
    bombard(42, &framed(FrameKind::Near, &near, &[]), |_, header, _| {
        let _ = Near::read_from(header);
    });
    bombard(38, &framed(FrameKind::LinkHello, &flat_bytes(&hello()), &[]), |_, header, _| {
        if let Ok(hello) = LinkHello::read_from(header) {
            // Any number that a peer sends has ranks, and an answer that answers back.
            assert!(hello.from_rank().0 < 256 && hello.to_rank().0 < 256);
            assert_eq!(hello.answer().from_rank(), hello.to_rank());
        }
    });
}
