//! ○ Our spans in OTLP's messages.

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{
    self as otlp, ResourceSpans, ScopeSpans, Status, span, status,
};
use shoal_protocol::id::NodeId;
use shoal_protocol::trace::{Span, SpanKind, Value};

/// Bit 0 of OTLP's flags is W3C's: it is sampled.
const SAMPLED: u32 = 1;

/// One batch of one process.
pub fn request(spans: Vec<Span>, service: &str, node: Option<NodeId>) -> ExportTraceServiceRequest {
    let version = env!("CARGO_PKG_VERSION");
    let mut attributes = vec![
        attribute("service.name", service.into()),
        attribute("service.version", version.into()),
        attribute("process.pid", std::process::id().into()),
    ];
    attributes.extend(node.map(|node| attribute("service.instance.id", node.to_string().into())));
    let scope = InstrumentationScope {
        name: "shoal".to_owned(),
        version: version.to_owned(),
        ..InstrumentationScope::default()
    };
    let spans = spans.into_iter().map(encoded).collect();
    let of_scope = ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() };
    let resource = Resource { attributes, ..Resource::default() };
    let of_process = ResourceSpans {
        resource: Some(resource),
        scope_spans: vec![of_scope],
        ..ResourceSpans::default()
    };
    ExportTraceServiceRequest { resource_spans: vec![of_process] }
}

fn encoded(span: Span) -> otlp::Span {
    let kind = match span.kind {
        SpanKind::Internal => span::SpanKind::Internal,
        SpanKind::Server => span::SpanKind::Server,
        SpanKind::Client => span::SpanKind::Client,
    };
    let error = |message| Status { message, code: status::StatusCode::Error as i32 };
    otlp::Span {
        trace_id: span.mark.trace.0.to_be_bytes().to_vec(),
        span_id: span.mark.span.0.to_be_bytes().to_vec(),
        parent_span_id: span.parent.map(|id| id.0.to_be_bytes().to_vec()).unwrap_or_default(),
        flags: SAMPLED,
        name: span.name.to_owned(),
        kind: kind as i32,
        start_time_unix_nano: span.start.0,
        end_time_unix_nano: span.end.0,
        attributes: span.attributes.into_iter().map(|(key, v)| attribute(key, v)).collect(),
        status: span.error.map(error),
        ..otlp::Span::default()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    let value = match value {
        Value::Int(value) => any_value::Value::IntValue(value),
        Value::Text(value) => any_value::Value::StringValue(value),
        Value::Bool(value) => any_value::Value::BoolValue(value),
    };
    let value = Some(AnyValue { value: Some(value) });
    KeyValue { key: key.to_owned(), value, ..KeyValue::default() }
}
