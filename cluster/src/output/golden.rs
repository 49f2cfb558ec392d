//! One cluster with everything in it that the tables show, against committed files.
//!
//! `SHOAL_UPDATE_GOLDEN=1 cargo test -p shoal golden` writes the files anew.

use std::path::{Path, PathBuf};

use shoal_protocol::admin::*;
use shoal_protocol::control::*;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::*;
use shoal_protocol::plan::*;
use shoal_protocol::presence::{HeardView, PresenceView};
use shoal_protocol::units::{Bytes, LayerRange};

use super::coordinators::Status;
use super::progress::{Stand, stand};
use super::{coordinators, json, table};

pub(super) fn check(file: &str, found: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/output/golden").join(file);
    if std::env::var_os("SHOAL_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "{}", path.display());
}

fn name(text: &str) -> DeploymentName {
    DeploymentName::new(text).unwrap()
}

fn shard(node: u32, weights: u64) -> ShardPlan {
    ShardPlan {
        rank: RankIndex(0),
        node: NodeId::worker(node),
        device: "cpu".to_owned(),
        memory: ShardMemory {
            weights: Bytes(weights),
            kv: Bytes::mib(8),
            activations: Bytes(70_000),
        },
    }
}

fn replica() -> ReplicaPlan {
    let layers = [(0, 3), (3, 6), (6, 8)];
    let stages = layers.iter().zip(1..).map(|(&(start, end), node)| StagePlan {
        layers: LayerRange::new(start, end),
        shards: vec![shard(node, 1_200_000 + u64::from(node))],
    });
    ReplicaPlan {
        id: ReplicaId(1),
        deployment: name("demo"),
        generation: Generation(2),
        model: ModelRef {
            source: ModelSource::Builtin { name: "demo".to_owned() },
            fingerprint: [7; 32],
        },
        precision: Precision::F32,
        numerics: Numerics::N1,
        stages: stages.collect(),
        limits: ReplicaLimits {
            kv_blocks: 512,
            context_max: 256,
            step_rows_max: 128,
            sequences_max: 64,
            steps_in_flight_max: 4,
        },
    }
}

fn report(stage: u32, state: ShardState) -> ShardReport {
    ShardReport {
        replica: ReplicaId(1),
        generation: Generation(2),
        stage: StageIndex(stage),
        state,
        memory: ShardMemory::default(),
        counters: ShardCounters { steps: 42, ..ShardCounters::default() },
    }
}

fn worker(number: u32, connected: bool, shards: Vec<ShardReport>) -> WorkerView {
    WorkerView {
        id: NodeId::worker(number),
        connected,
        pid: 100 + number,
        build: "0.1.0".to_owned(),
        address: Some(([127, 0, 0, 1], 4000 + number as u16).into()),
        devices: vec![DeviceInfo {
            name: "cpu".to_owned(),
            description: "AVX-512".to_owned(),
            memory: Bytes::mib(600),
            threads: 1,
        }],
        shards,
        heads: Vec::new(),
        draining: number == 4,
    }
}

/// Three stages in three different states, a worker to spare, one that never came, and two
/// deployments that are not served.
fn cluster() -> ClusterView {
    let loading = ShardState::Loading { done: Bytes(300_000), total: Bytes(1_200_003) };
    let deployment = |text: &str, phase, reason: &str| DeploymentView {
        name: name(text),
        source: ModelSource::Folder { path: format!("/models/{text}") },
        phase,
        reason: reason.to_owned(),
        stages: None,
        asked: 1,
        replicas: vec![ReplicaView {
            id: ReplicaId(1),
            phase,
            reason: reason.to_owned(),
            settled: false,
            next: None,
        }],
    };
    ClusterView {
        coordinators: Vec::new(),
        coordinator: CoordinatorView {
            id: NodeId::coordinator(1),
            pid: 100,
            build: "0.1.0".to_owned(),
            api: ([0, 0, 0, 0], 8000).into(),
            cluster: ([127, 0, 0, 1], 4000).into(),
            tls: false,
        },
        workers: vec![
            worker(1, true, vec![report(0, ShardState::Ready)]),
            worker(2, true, vec![report(1, ShardState::Linking)]),
            worker(3, true, vec![report(2, loading)]),
            worker(4, true, Vec::new()),
            WorkerView {
                pid: 0,
                address: None,
                devices: Vec::new(),
                ..worker(5, false, Vec::new())
            },
        ],
        deployments: vec![
            deployment("demo", DeploymentPhase::Loading, ""),
            deployment("huge", DeploymentPhase::Waiting, "2 more workers of 600.0 MiB are needed"),
            deployment(
                "odd",
                DeploymentPhase::Failed,
                "w2 cannot read /models/odd\n(no such file)",
            ),
        ],
        plan: Plan { revision: PlanRevision(3), replicas: vec![replica()] },
    }
}

#[test]
fn golden_status() {
    check("status.txt", &table::status(&cluster(), None));
    let empty = ClusterView {
        workers: Vec::new(),
        deployments: Vec::new(),
        plan: Plan::default(),
        ..cluster()
    };
    check("status-empty.txt", &table::status(&empty, None));
    check("status.json", &(json::line(&Status::new(&cluster(), None)).unwrap() + "\n"));
}

/// One of three is heard, and says so: no majority.
#[test]
fn golden_silent_coordinators() {
    let peer = |number| PeerView {
        id: NodeId::coordinator(number),
        cluster: ([10, 0, 0, number as u8], 4000).into(),
        build: "0.1.0".to_owned(),
        vote: Vote::Voter,
        leads: false,
    };
    let heard = |number, up, heard_ms_ago| HeardView {
        node: NodeId::coordinator(number),
        up,
        heard_ms_ago,
    };
    let view = ClusterView {
        coordinators: (1..=3).map(peer).collect(),
        workers: Vec::new(),
        deployments: Vec::new(),
        plan: Plan::default(),
        ..cluster()
    };
    let presence = PresenceView {
        coordinators: vec![
            heard(1, true, Some(0)),
            heard(2, false, Some(12_345)),
            heard(3, false, None),
        ],
        no_majority: Some("no majority of the coordinators: …".to_owned()),
    };
    check("status-silent.txt", &table::status(&view, Some(&presence)));
    let line = json::line(&Status::new(&view, Some(&presence))).unwrap();
    check("status-silent.json", &(line + "\n"));
    // As an older build answers.
    check("coordinators-unheard.txt", &coordinators::table(&view, None).to_string());
}

#[test]
fn golden_plan() {
    let view = PlanView {
        replicas: vec![replica()],
        explanation: vec!["stage 0: 3 layers x 400,000 B + embedding 1 B = 1,200,001 B".to_owned()],
    };
    check("plan.txt", &table::plan(&view, false));
    check("plan-explained.txt", &table::plan(&view, true));
    let none = PlanView { replicas: Vec::new(), ..view };
    check("plan-none.txt", &table::plan(&none, false));
}

#[test]
fn golden_change() {
    let after = ReplicaPlan { generation: Generation(3), ..replica() };
    let explanation = vec!["weights to read in all: 3.4 MiB".to_owned()];
    let view = ChangeView { before: vec![replica()], after: vec![after], explanation };
    check("change.txt", &table::change(&view));
}

#[test]
fn golden_ready_line() {
    let view = cluster();
    let demo = name("demo");
    let ready = json::ready(&view, &demo, Path::new("/data/admin.context")).unwrap();
    check("ready.json", &(json::line(&ready).unwrap() + "\n"));
    assert!(json::ready(&view, &name("huge"), Path::new("x")).is_none());
}

#[test]
fn golden_stages_of_one_deployment() {
    check("stages.txt", &table::stages(&cluster(), |d| d.name == name("demo")).to_string());
}

#[test]
fn the_stand_counts_what_is_read() {
    let view = cluster();
    let loading = Stand::Loading {
        done: Bytes(1_200_001 + 1_200_002 + 300_000),
        total: Bytes(1_200_001 + 1_200_002 + 1_200_003),
        ready: 1,
        shards: 3,
    };
    assert_eq!(stand(&view, &name("demo")), loading);
    assert_eq!(
        stand(&view, &name("huge")),
        Stand::Waiting("2 more workers of 600.0 MiB are needed".to_owned())
    );
    assert!(matches!(stand(&view, &name("odd")), Stand::Failed(_)));
    assert_eq!(stand(&view, &name("none")), Stand::Absent);
}

#[test]
fn a_failed_shard_says_why() {
    let mut view = cluster();
    let error = WireError::new(ErrorCode::BadModel, "model.safetensors is truncated");
    view.workers[1].shards[0].state = ShardState::Failed(error);
    let text = table::stages(&view, |_| true).to_string();
    assert!(text.contains("r1 on w2: model.safetensors is truncated"), "{text}");
}

#[test]
fn a_long_reason_makes_no_wide_table() {
    let mut view = cluster();
    view.deployments[2].reason = "word ".repeat(100) + "\nand more";
    let error = WireError::new(ErrorCode::BadModel, "word ".repeat(100));
    view.workers[1].shards[0].state = ShardState::Failed(error);
    let text = table::status(&view, None);
    let rows = text.lines().filter(|line| !line.contains("word"));
    assert!(rows.clone().all(|line| line.chars().count() < 100), "{text}");
    assert!(text.contains("\n  odd: word ") && text.contains("\n    and more\n"), "{text}");
}

#[test]
fn replicas_that_the_loss_of_one_worker_takes_are_said() {
    let check = |on: &[(DeploymentPhase, &[u32])], expected: &str| {
        let mut view = cluster();
        view.deployments.truncate(1);
        let replicas = on.iter().zip(1..).map(|((phase, _), id)| ReplicaView {
            id: ReplicaId(id),
            phase: *phase,
            reason: String::new(),
            settled: true,
            next: None,
        });
        view.deployments[0].replicas = replicas.collect();
        let plans = on.iter().zip(1..).map(|((_, workers), id)| {
            let stages = replica().stages.into_iter().zip(*workers);
            let stages = stages.map(|(stage, worker)| StagePlan {
                shards: vec![shard(*worker, 1_000_000)],
                ..stage
            });
            ReplicaPlan { id: ReplicaId(id), stages: stages.collect(), ..replica() }
        });
        view.plan.replicas = plans.collect();
        let text = table::status(&view, None);
        assert!(text.contains(&format!("  {expected}  ")), "{expected:?} is not in {text}");
        json::line(&Status::new(&view, None)).unwrap()
    };
    use DeploymentPhase::{Loading, Ready};
    let json = check(&[(Ready, &[1]), (Ready, &[1])], "2/2, both on w1");
    assert!(json.contains(r#""shared":[{"worker":"w1","replicas":[1,2]}]"#), "{json}");
    let json = check(&[(Ready, &[1, 2]), (Ready, &[3, 4])], "2/2");
    assert!(json.contains(r#""shared":[]"#), "{json}");
    // One of them is not there yet.
    check(&[(Ready, &[1]), (Loading, &[1])], "1/2");
    // Both have a part there.
    check(&[(Ready, &[1, 2]), (Ready, &[2, 3])], "2/2, both on w2");
    check(&[(Ready, &[1, 2]), (Ready, &[2, 1])], "2/2, both on w1 and w2");
    check(&[(Ready, &[1]), (Ready, &[1]), (Ready, &[1])], "3/3, all on w1");
    check(&[(Ready, &[1, 2]), (Ready, &[1, 2]), (Ready, &[1, 3])], "3/3, all on w1, 2 on w2");
    check(&[(Ready, &[1]), (Ready, &[2]), (Ready, &[1])], "3/3, 2 on w1");
}

#[test]
fn who_left_for_good_is_no_row() {
    let mut view = cluster();
    view.workers[0].connected = false;
    let text = table::status(&view, None);
    // A stage waits for the first, nothing for the fifth.
    assert!(text.contains("\nw1      down"), "{text}");
    assert!(text.contains("nothing is placed on them: w5\n") && !text.contains("\nw5"), "{text}");
}
