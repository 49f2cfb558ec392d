//! What is asked of the planner, from an operator's call to what workers are told.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::large_futures, reason = "a test has one of them")]

mod control_support;

use control_support::*;
use shoal_coordinator::Coordinator;
use shoal_protocol::admin::{AdminCall, AdminReply, DeploymentPhase};
use shoal_protocol::id::{DeploymentName, Role};
use shoal_protocol::mesh::{Fact, MeshAsk, Objective, ZoneName};
use shoal_protocol::plan::{
    Activations, KvPrecision, ModelSource, Numerics, Precision, PretendSpec,
};

/// A coordinator and workers that say these facts.
async fn cluster(
    facts: Vec<Vec<Fact>>,
) -> (Coordinator, Operator, Vec<FakeWorker>, tempfile::TempDir) {
    let data = tempfile::tempdir().unwrap();
    let coordinator = start(config(data.path())).await.unwrap();
    let operator = Operator::of(&coordinator);
    let token = operator.token(Role::Worker, facts.len() as u32, 3600).await;
    let mut workers = Vec::new();
    for facts in facts {
        let address = coordinator.cluster_address();
        let identity = try_join(address, &token).await.unwrap();
        let manners = Manners {
            facts,
            memory: shoal_protocol::units::Bytes::mib(4000),
            ..Manners::default()
        };
        workers.push(FakeWorker::connect(address, &identity, manners).await.unwrap());
    }
    (coordinator, operator, workers, data)
}

fn facts(zone: &str, gib_per_s: u64) -> Vec<Fact> {
    vec![
        Fact::Ranks { most: 1 },
        Fact::Zone(ZoneName::new(zone).unwrap()),
        Fact::Rate { device: "cpu".into(), threads: 1, bytes_per_s: gib_per_s << 30 },
    ]
}

fn name() -> DeploymentName {
    DeploymentName::new("m").unwrap()
}

/// 24 layers of 100 MiB.
fn model() -> ModelSource {
    ModelSource::Pretend(PretendSpec { layers: 24, ..pretend() })
}

fn asked(mesh: &str, objective: Option<Objective>) -> MeshAsk {
    MeshAsk {
        mesh: Some(mesh.parse().unwrap()),
        objective,
        reduction: None,
        kv: None,
        activations: None,
    }
}

async fn accepted(operator: &Operator, call: AdminCall) {
    let reply = operator.call(call).await;
    assert!(matches!(reply, AdminReply::Accepted), "{reply:?}");
}

/// `w1:0..16 w2:16..24`, once it is served like that.
async fn served(coordinator: &Coordinator, mesh: &str, generation: u64) -> String {
    let view = until(coordinator, mesh, |view| {
        let plan = view.plan.replicas.first();
        deployment(view, "m").is_some_and(|m| m.phase == DeploymentPhase::Ready)
            && plan.is_some_and(|p| p.mesh() == mesh && p.generation.0 >= generation)
    })
    .await;
    let stages = view.plan.replicas[0].stages.iter().map(|stage| {
        let nodes: Vec<_> = stage.shards.iter().map(|shard| shard.node.to_string()).collect();
        format!("{}:{}", nodes.join("+"), stage.layers)
    });
    stages.collect::<Vec<_>>().join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_is_planned_by_what_workers_measured() {
    let to = shoal_protocol::id::NodeId::worker(2);
    let way = Fact::Link { to, latency_us: 70, bytes_per_s: Some(900_000_000) };
    let (coordinator, operator, _workers, _data) =
        cluster(vec![[facts("a", 8), vec![way]].concat(), facts("b", 4)]).await;
    until(&coordinator, "zones", |view| {
        view.workers.len() == 2
            && view
                .workers
                .iter()
                .all(|w| w.devices.iter().any(|d| d.description.contains(", zone ")))
    })
    .await;
    let ask = asked("2x1", Some(Objective::Throughput));
    let (source, precision, replicas) = (model(), None, 1);
    let deploy = AdminCall::DeployMesh { name: name(), source, precision, replicas, ask };
    accepted(&operator, deploy).await;
    assert_eq!(served(&coordinator, "2x1", 1).await, "w1:0..16 w2:16..24");
    let AdminReply::Plan(plan) = operator.call(AdminCall::ExplainPlan { name: name() }).await
    else {
        panic!("no plan")
    };
    let words = plan.explanation.join("\n");
    for expected in [
        "asked for mesh 2x1, objective throughput",
        "predicted: ",
        "rates as the workers",
        "way w1-w2: 0.070 ms one way (by round trips of the workers' links); 900 MB/s (by large transfers)",
    ] {
        assert!(words.contains(expected), "{expected} is not in {words}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_are_told_to_workers_that_know_of_them() {
    let (coordinator, operator, mut workers, _data) =
        cluster(vec![facts("a", 8), facts("a", 8)]).await;
    let (source, precision, replicas) = (model(), None, 1);
    let ask = asked("1x2", None);
    let deploy = AdminCall::DeployMesh { name: name(), source, precision, replicas, ask };
    accepted(&operator, deploy).await;
    assert_eq!(served(&coordinator, "1x2", 1).await, "w1+w2:0..24");
    for (worker, rank) in workers.iter_mut().zip(0..) {
        let told = worker.until_told(|told| !told.is_empty()).await;
        assert_eq!((told[0].rank.0, told[0].replica.numerics), (rank, Numerics::N1Sum));
    }
    // By itself the planner takes no ranks of workers that do not say that they compute as some.
    let auto = AdminCall::ScaleMesh {
        name: name(),
        replicas: None,
        ask: asked("auto", None),
        dry_run: false,
    };
    accepted(&operator, auto).await;
    assert_eq!(served(&coordinator, "1x1", 2).await, "w1:0..24");
    let ask = asked("3x2", None);
    let scale = AdminCall::ScaleMesh { name: name(), replicas: None, ask, dry_run: true };
    let error = refusal(operator.call(scale).await);
    assert!(error.message.contains("6 shards, and 2 workers"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn how_the_cache_is_held_is_told_to_workers_shown_and_kept() {
    let (coordinator, operator, mut workers, _data) = cluster(vec![facts("a", 8)]).await;
    let (source, precision, replicas) = (model(), None, 1);
    let ask = MeshAsk { kv: Some(KvPrecision::Bf16), ..MeshAsk::default() };
    let deploy = AdminCall::DeployMesh { name: name(), source, precision, replicas, ask };
    accepted(&operator, deploy).await;
    assert_eq!(served(&coordinator, "1x1", 1).await, "w1:0..24");
    let told = workers[0].until_told(|told| !told.is_empty()).await;
    assert_eq!(told[0].replica.numerics, Numerics::N1KvBf16);
    let explain = AdminCall::ExplainPlan { name: name() };
    let AdminReply::Plan(plan) = operator.call(explain).await else { panic!("no plan") };
    let words = plan.explanation.join("\n");
    for expected in ["asked for KV bf16", "numerics n1-kv-bf16", "held as bf16"] {
        assert!(words.contains(expected), "{expected} is not in {words}");
    }
    let scale = AdminCall::ScaleMesh { name: name(), replicas: None, ask, dry_run: false };
    let error = refusal(operator.call(scale).await);
    assert!(error.message.contains("deploy --kv"), "{error}");
    let auto = AdminCall::ScaleMesh {
        name: name(),
        replicas: None,
        ask: asked("auto", None),
        dry_run: false,
    };
    accepted(&operator, auto).await;
    let view = until(&coordinator, "as was asked for", |view| {
        deployment(view, "m").is_some_and(|m| m.asked == 2 && m.is_settled())
    })
    .await;
    assert_eq!(view.plan.replicas[0].numerics, Numerics::N1KvBf16);
}

/// Whole numbers are multiplied as such unless somebody says otherwise, and for as long as the model is deployed.
#[tokio::test(flavor = "multi_thread")]
async fn what_rows_are_in_products_is_told_to_workers_and_kept() {
    let deploy = |precision, activations| {
        let ask = MeshAsk { activations, ..MeshAsk::default() };
        AdminCall::DeployMesh { name: name(), source: model(), precision, replicas: 1, ask }
    };
    for (precision, asked, expected) in [
        (None, None, Numerics::N1),
        (Some(Precision::Q8_0), Some(Activations::F32), Numerics::N1),
        (Some(Precision::Fp8), None, Numerics::N1),
        (Some(Precision::Q4K), Some(Activations::Int8), Numerics::N2),
    ] {
        let (_coordinator, operator, mut workers, _data) = cluster(vec![facts("a", 8)]).await;
        accepted(&operator, deploy(precision, asked)).await;
        let told = workers[0].until_told(|told| !told.is_empty()).await;
        assert_eq!(told[0].replica.numerics, expected, "{precision:?} {asked:?}");
    }
    let (coordinator, operator, mut workers, _data) = cluster(vec![facts("a", 8)]).await;
    let whole = deploy(Some(Precision::Bf16), Some(Activations::Int8));
    let error = refusal(operator.call(whole).await);
    assert!(error.message.contains("to be held as bf16; add --precision q8_0"), "{error}");
    accepted(&operator, deploy(Some(Precision::Q8_0), None)).await;
    let told = workers[0].until_told(|told| !told.is_empty()).await;
    assert_eq!(told[0].replica.numerics, Numerics::N2);
    assert_eq!(served(&coordinator, "1x1", 1).await, "w1:0..24");
    let ask = MeshAsk { activations: Some(Activations::F32), ..MeshAsk::default() };
    let scale = AdminCall::ScaleMesh { name: name(), replicas: None, ask, dry_run: false };
    let error = refusal(operator.call(scale).await);
    assert!(error.message.contains("chosen for good"), "{error}");
    let ask = asked("auto", None);
    let scale = AdminCall::ScaleMesh { name: name(), replicas: None, ask, dry_run: false };
    accepted(&operator, scale).await;
    let view = until(&coordinator, "as was asked for", |view| {
        deployment(view, "m").is_some_and(|m| m.asked == 2 && m.is_settled())
    })
    .await;
    assert_eq!(view.plan.replicas[0].numerics, Numerics::N2);
}
