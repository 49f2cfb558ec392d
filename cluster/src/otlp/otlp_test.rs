//! What the flag and the environment come to, and spans in OTLP's words.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::common::v1::any_value;
use shoal_protocol::trace::{SpanId, TraceId, TraceMark, Tracer, UnixNanos};

use super::*;

fn read(flag: Option<&str>, environment: &[(&str, &str)]) -> Result<Option<Settings>, String> {
    let flag = flag.map(|url| url.parse::<OtlpUrl>().unwrap());
    let environment: BTreeMap<_, _> = environment.iter().copied().collect();
    let get = |name: &str| environment.get(name).map(|value| (*value).to_owned());
    Settings::read(flag.as_ref(), "shoal-worker", get)
}

#[test]
fn nothing_is_sent_unless_somebody_asks() {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
    for environment in [
        &[][..],
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
        &[("OTEL_SERVICE_NAME", "x"), ("OTEL_TRACES_SAMPLER_ARG", "1")],
        &[endpoint, ("OTEL_SDK_DISABLED", "TRUE")],
        &[endpoint, ("OTEL_TRACES_EXPORTER", "none")],
    ] {
        assert_eq!(read(None, environment), Ok(None), "{environment:?}");
    }
}

#[test]
fn the_flag_wins_and_base_addresses_get_their_path() {
    const BASE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const FULL: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    for (flag, environment, url) in [
        (Some("http://a:1"), &[(BASE, "http://b:2")][..], "http://a:1/v1/traces"),
        (Some("http://a:1/v1/traces"), &[], "http://a:1/v1/traces"),
        (Some("http://a:1/x/"), &[], "http://a:1/x/v1/traces"),
        (None, &[(BASE, "http://b:2/")], "http://b:2/v1/traces"),
        (None, &[(BASE, "http://b:2"), (FULL, "http://c:3/own")], "http://c:3/own"),
    ] {
        let settings = read(flag, environment).unwrap().unwrap();
        assert_eq!(settings.url, url);
        assert_eq!((settings.ratio, settings.timeout.as_secs()), (1.0, 10));
        assert_eq!(settings.service, "shoal-worker");
    }
}

#[test]
fn the_environment_says_how_many_to_whom_and_as_whom() {
    let environment = [
        ("OTEL_SERVICE_NAME", "tokens"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc, x-team = red"),
    ];
    let settings = read(Some("http://a:1"), &environment).unwrap().unwrap();
    assert_eq!((settings.service.as_str(), settings.ratio), ("tokens", 0.25));
    assert_eq!(settings.timeout, Duration::from_millis(1500));
    let headers = [("authorization", "Bearer abc"), ("x-team", "red")];
    assert_eq!(settings.headers, headers.map(|(n, v)| (n.to_owned(), v.to_owned())));
    let off = [("OTEL_TRACES_SAMPLER", "parentbased_always_off")];
    assert_eq!(read(Some("http://a:1"), &off).unwrap().unwrap().ratio, 0.0);
}

#[test]
fn what_cannot_be_used_is_named_and_secrets_are_not_repeated() {
    for (name, value, words) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c:4318", "plain HTTP"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4318", "http://HOST:PORT"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret", "name=value"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=secret%0d%0ax", "name=value"),
        ("OTEL_TRACES_SAMPLER_ARG", "half", "no number"),
    ] {
        let flag = (name != "OTEL_EXPORTER_OTLP_ENDPOINT").then_some("http://a:1");
        let error = read(flag, &[(name, value)]).unwrap_err();
        assert!(error.contains(words) && error.contains(name), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    for bad in ["", "http://", "http://:4318", "ftp://a", "http://a b", "http://user@a:1"] {
        assert!(bad.parse::<OtlpUrl>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_span_keeps_its_ids_its_times_and_what_it_says() {
    let (tracer, _queue) = Tracer::new(1, 1.0, 1);
    let under = TraceMark { trace: TraceId(0x0102), span: SpanId(3) };
    let mut span = tracer
        .span(under, "stage step", UnixNanos(10), UnixNanos(20))
        .with("shoal.rows", 4u32)
        .with("shoal.samples", true);
    span.error = Some("worker_lost".to_owned());
    let id = span.mark.span.0.to_be_bytes();
    let request = encode::request(vec![span], "shoal-worker", Some(NodeId::worker(2)));
    let of_process = &request.resource_spans[0];
    let named = |key: &str| {
        let attributes = &of_process.resource.as_ref().unwrap().attributes;
        attributes.iter().find(|a| a.key == key).and_then(|a| a.value.clone()?.value)
    };
    let text = |text: &str| Some(any_value::Value::StringValue(text.to_owned()));
    assert_eq!(named("service.name"), text("shoal-worker"));
    assert_eq!(named("service.instance.id"), text("w2"));
    let encoded = &of_process.scope_spans[0].spans[0];
    assert_eq!(encoded.trace_id, 0x0102u128.to_be_bytes());
    assert_eq!(
        (&encoded.span_id[..], &encoded.parent_span_id[..]),
        (&id[..], &[0, 0, 0, 0, 0, 0, 0, 3][..])
    );
    assert_eq!((encoded.start_time_unix_nano, encoded.end_time_unix_nano), (10, 20));
    assert_eq!(encoded.attributes.len(), 2);
    assert_eq!(encoded.status.as_ref().unwrap().message, "worker_lost");
}
