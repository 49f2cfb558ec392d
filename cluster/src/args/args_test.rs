use std::time::Duration;

use clap::CommandFactory;
use shoal_protocol::id::NodeId;

use super::values::duration;
use super::*;

fn parse(line: &str) -> Result<Args, clap::Error> {
    Args::try_from_line(line.split_whitespace().map(Into::into).collect::<Vec<_>>())
}

/// What is said about a line that is wrong.
fn mistake(line: &str) -> String {
    match parse(line) {
        Ok(args) => panic!("{line:?} was taken as {args:?}"),
        Err(error) => {
            assert_eq!(error.exit_code(), 2, "{line:?}");
            error.to_string()
        }
    }
}

#[test]
fn the_definition_is_consistent() {
    Args::command().debug_assert();
}

#[test]
fn defaults_are_those_of_the_help() {
    let Command::Up(up) = parse("shoal up").unwrap().command else { panic!("not up") };
    assert_eq!(up.model, None);
    assert_eq!(up.workers.get(), 3);
    assert_eq!(up.stages, None);
    assert_eq!((up.precision, up.kv), (None, None));
    assert_eq!(up.listen.to_string(), "127.0.0.1:8000");
    assert!(!up.no_respawn && !up.json && !up.demo);
    let Command::Token { command: TokenCommand::Create(token) } =
        parse("shoal token create --role worker").unwrap().command
    else {
        panic!("not token create")
    };
    assert_eq!((token.uses.get(), token.expires), (1, Duration::from_secs(3600)));
}

#[test]
fn values_are_read() {
    let line = "shoal up m --workers 2 --stages 1 --precision bf16 --kv q8_0 --worker-memory 600MiB \
                --worker-threads 4 --listen localhost:0 --no-respawn --json --policy p2c --allow-runtime-adapters --otlp http://localhost:4318/";
    let Command::Up(up) = parse(line).unwrap().command else { panic!("not up") };
    assert_eq!(up.model, Some("m".into()));
    assert_eq!((up.workers.get(), up.stages.map(NonZeroU32::get)), (2, Some(1)));
    assert_eq!(up.precision, Some(Precision::Bf16));
    assert_eq!(up.kv, Some(KvPrecision::Q8_0));
    assert_eq!(up.worker_memory, Some(Bytes::mib(600)));
    assert_eq!(up.worker_threads.map(NonZeroU32::get), Some(4));
    assert_eq!(up.listen.to_string(), "127.0.0.1:0");
    assert!(up.no_respawn && up.json);
    assert_eq!(up.routing.policy, Policy::P2c);
    assert!(up.adapters.allow_runtime_adapters);
    assert_eq!(up.trace.otlp.map(|url| url.to_string()), Some("http://localhost:4318".to_owned()));
}

#[test]
fn a_worker_has_two_names() {
    for line in ["shoal drain w12", "shoal drain worker-12 --wait --timeout 30s"] {
        let Command::Drain(drain) = parse(line).unwrap().command else { panic!("not drain") };
        assert_eq!(drain.nodes, [NodeId::worker(12)], "{line}");
    }
    let Command::Drain(drain) = parse("shoal drain w2 worker-3 --wait").unwrap().command else {
        panic!("not drain")
    };
    assert_eq!(drain.nodes, [2, 3].map(NodeId::worker));
    let Command::Undrain(undrain) = parse("shoal undrain w2 w3").unwrap().command else {
        panic!("not undrain")
    };
    assert_eq!(undrain.nodes, [2, 3].map(NodeId::worker));
    assert!(parse("shoal drain").is_err() && parse("shoal drain w2 c1").is_err());
    let Command::Scale(scale) = parse("shoal scale m --stages auto").unwrap().command else {
        panic!("not scale")
    };
    assert_eq!(scale.stages, Some(shoal_protocol::plan::StagesAsked::Auto));
}

#[test]
fn what_is_asked_of_the_planner_is_read() {
    let line = "shoal up /m --workers 4 --mesh 2x2 --precision Q8_0";
    let Command::Up(up) = parse(line).unwrap().command else { panic!("not up") };
    assert_eq!(shoal_protocol::mesh::MeshAsk::from(up.mesh).to_string(), "mesh 2x2");
    assert_eq!(up.precision, Some(Precision::Q8_0));
    let line = "shoal deploy /m --mesh 2x2 --objective throughput --reduction exact --timeout 90s";
    let Command::Deploy(deploy) = parse(line).unwrap().command else { panic!("not deploy") };
    assert_eq!(deploy.timeout, Some(Duration::from_secs(90)));
    let ask = shoal_protocol::mesh::MeshAsk::from(deploy.mesh);
    assert_eq!(ask.to_string(), "mesh 2x2, objective throughput, reduction exact");
    let Command::Scale(scale) = parse("shoal scale m --mesh auto").unwrap().command else {
        panic!("not scale")
    };
    assert_eq!(shoal_protocol::mesh::MeshAsk::from(scale.mesh).to_string(), "mesh auto");
    let line = "shoal worker --join 127.0.0.1:1 --data d --zone rack-1";
    let Command::Worker(worker) = parse(line).unwrap().command else { panic!("not worker") };
    assert_eq!(worker.zone.unwrap().as_str(), "rack-1");
}

#[test]
fn a_mistake_names_what_would_be_right() {
    for (line, expected) in [
        ("shoal up --worker 3", "'--workers'"),
        ("shoal up --wrokers 3", "'--workers'"),
        ("shoal up --respawn", "'--no-respawn'"),
        ("shoal up --memory 1GiB", "--worker-memory"),
        ("shoal status --jsno", "'--json'"),
        ("shoal coordinator --listne x", "'--listen'"),
        ("shoal up --policy wrr", "dynamic_wrr"),
        ("shoal stauts", "'status'"),
        ("shoal token craete", "create"),
        ("shoal undeploy demo --no-wait", "` has a flag '--no-wait'"),
        ("shoal up --precision f64", "q5_k, q6_k, fp8 or mxfp4"),
        ("shoal up --kv f16", "use f32, bf16 or q8_0"),
        ("shoal scale demo --kv bf16", "--kv"),
        ("shoal up --worker-memory lots", "600MiB"),
        ("shoal up --worker-memory 0", "a budget of nothing"),
        ("shoal up --worker-memory 600KiB", "a worker needs as much"),
        (
            "shoal worker --join 127.0.0.1:1 --data d --memory 1KiB",
            "a budget of 1.0 KiB holds nothing",
        ),
        ("shoal up --listen 127.0.0.1", "127.0.0.1:8000"),
        ("shoal up --listen here", "write IP:PORT"),
        ("shoal up --workers 0", "from 1 up"),
        ("shoal up --workers some", "from 1 up"),
        ("shoal token create --role wroker", "worker"),
        ("shoal token create --role worker --expires 5", "30m"),
        ("shoal worker --join 127.0.0.1:1 --data d --device cuda:0", "it has cpu"),
        ("shoal worker --join 10.0.0.1 --data d", "`10.0.0.1` has no port; write IP:PORT"),
        ("shoal worker --join one --data d", "there is no default port"),
        ("shoal worker --join 10.0.0.1:0 --data d", "has no port; write IP:PORT"),
        (
            "shoal worker --join 127.0.0.1:99999 --data d",
            "the port of `127.0.0.1:99999` is not one",
        ),
        ("shoal worker --join one:4000 --data d", "names are not looked up; write IP:PORT"),
        ("shoal worker --join 127.0.0.1:1 --data d --token abc", "shoal token create"),
        ("shoal undeploy -- -x", "begins with a letter"),
        ("shoal keys craete x", "create"),
        ("shoal adapters laod x", "load"),
        ("shoal adapters load x /a", "--deployment"),
        ("shoal keys create x --rpm 0", "from 1 up"),
        ("shoal keys create x --expires 30", "30m"),
        ("shoal keys revoke a/b", "letters, digits and"),
        ("shoal coordinator --data d --listen :0 --cluster :0 --tls-cert c", "--tls-key"),
        ("shoal scale demo --stages some", "neither `auto` nor"),
        ("shoal scale demo --mesh 2", "STAGESxRANKS"),
        ("shoal deploy m --mesh 2x2 --stages 2", "--stages"),
        ("shoal up m --mesh 2x2 --stages 2", "--stages"),
        ("shoal deploy m --no-wait --timeout 5s", "--no-wait"),
        ("shoal worker --join 127.0.0.1:1 --data d --threads 257", "1 to 256"),
        ("shoal up --worker-threads 0", "1 to 256"),
        ("shoal deploy m --objective speed", "latency or throughput"),
        ("shoal deploy m --reduction fast", "exact or sum"),
        ("shoal worker --join 127.0.0.1:1 --data d --zone a/b", "letters, digits and"),
        ("shoal scale demo --replicas 0", "from 1 up"),
        ("shoal drain c1", "write w2 or worker-2"),
        ("shoal drain two", "write w2 or worker-2"),
        ("shoal drain w2 --timeout 5s", "--wait"),
        ("shoal coordinator --data d", "--cluster"),
        ("shoal coordinator --store http://a", "a store is etcd://"),
        ("shoal coordinator --store etcd://a:b", "`a:b` is not HOST or HOST:PORT"),
        ("shoal", "Usage"),
    ] {
        let said = mistake(line);
        assert!(said.contains(expected), "{line:?} was answered with {said}");
    }
}

#[test]
fn help_shows_examples_and_hides_what_is_internal() {
    let mut root = Args::command();
    for verb in ["up", "coordinator", "worker", "deploy", "chat", "scale", "drain"] {
        let help = root.find_subcommand_mut(verb).expect(verb).render_help().to_string();
        assert!(help.contains("Example"), "{verb}: {help}");
        assert!(!help.contains("lifeline") && !help.contains("announce"), "{verb}: {help}");
    }
    assert!(root.render_help().to_string().contains("Exit codes"));
}

#[test]
fn times_have_a_unit() {
    for (text, seconds) in [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800)] {
        assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
    }
    for text in ["", "1", "h", "0s", "1.5h", "-1s", "1 h", "1w", "99999999999999999999s"] {
        assert!(duration(text).is_err(), "{text:?} was taken");
    }
}

#[test]
fn a_damaged_token_is_not_repeated() {
    let secret = "c0ffee".repeat(8);
    for token in [format!("shoal1.worker.{}.{secret}", "ab".repeat(32)), secret.clone()] {
        let said = mistake(&format!("shoal worker --join 127.0.0.1:1 --data d --token {token}"));
        assert!(!said.contains("c0ffee") && said.contains("--token"), "{said}");
    }
}

#[test]
fn a_password_in_a_url_is_not_repeated() {
    for url in ["etcd://u:c0ffee@a:b", "http://u:c0ffee@a", "etcd://u:c0ffee%x@a", "c0ffee"] {
        let said = mistake(&format!("shoal coordinator --store {url}"));
        assert!(!said.contains("c0ffee") && said.contains("--store"), "{said}");
    }
    let line = "shoal coordinator --data d --listen :0 --cluster :0 --store etcd://u:c0ffee@a";
    assert!(!format!("{:?}", parse(line).unwrap()).contains("c0ffee"));
}
