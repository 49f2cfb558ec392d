//! Marks on the wire and in headers, sampling, and a queue that never makes anybody wait.

use super::*;
use crate::frame::Flat;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn mark() -> TraceMark {
    TraceMark { trace: TraceId(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736), span: SpanId(7) }
}

#[test]
fn a_traceparent_is_read_as_w3c_wrote_it_and_anything_else_is_ignored() {
    let parent = Traceparent::parse(PARENT).unwrap();
    assert_eq!(parent.mark.trace, mark().trace);
    assert_eq!(parent.mark.span, SpanId(0x00f0_67aa_0ba9_02b7));
    assert!(parent.sampled);
    assert_eq!(parent.to_string(), PARENT);
    let unsampled = PARENT.replace("b7-01", "b7-00");
    assert!(!Traceparent::parse(&unsampled).unwrap().sampled);
    // A later version may say more.
    let later = PARENT.replacen("00", "cc", 1) + "-what";
    assert!(Traceparent::parse(&later).unwrap().sampled);
    for bad in [
        String::new(),
        "00".to_owned(),
        PARENT.to_uppercase(),
        PARENT.replacen("00", "ff", 1),
        format!("{PARENT}-more"),
        PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
        PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
        PARENT.replace("4bf9", "+bf9"),
        PARENT[..54].to_owned(),
    ] {
        assert_eq!(Traceparent::parse(&bad), None, "{bad:?}");
    }
}

#[test]
fn a_mark_survives_the_wire_and_one_of_zeros_is_refused() {
    let header = TraceHeader::of_sequence(mark(), Generation(3), SequenceId(9));
    let mut bytes = Vec::new();
    header.append_to(&mut bytes);
    let read = TraceHeader::read_from(&bytes).unwrap();
    assert_eq!((read.generation, read.sequence), (3, 9));
    assert_eq!(read.mark().unwrap(), mark());
    let error = TraceHeader::default().mark().unwrap_err().to_string();
    assert!(error.contains("TraceHeader") && error.contains("not 0"), "{error}");
}

#[test]
fn the_clients_word_on_sampling_holds_and_without_one_the_ratio_does() {
    let parent = Traceparent::parse(PARENT).unwrap();
    let unsampled = Traceparent { sampled: false, ..parent };
    assert_eq!(Tracer::off().request(Some(parent)), None, "off is off");
    for ratio in [0.0, 1.0] {
        let (tracer, _queue) = Tracer::new(1, ratio, 1);
        let (mine, above) = tracer.request(Some(parent)).unwrap();
        assert_eq!((mine.trace, above), (parent.mark.trace, Some(parent.mark.span)));
        assert_ne!(mine.span, parent.mark.span);
        assert_eq!(tracer.request(Some(unsampled)), None);
        assert_eq!(tracer.request(None).is_some(), ratio == 1.0);
    }
    let (tracer, _queue) = Tracer::new(1, 0.25, 1);
    let traced = (0..4000).filter(|_| tracer.request(None).is_some()).count();
    assert!((900..1100).contains(&traced), "{traced} of 4000");
}

#[test]
fn a_full_queue_drops_and_counts_and_waits_for_nobody() {
    let (tracer, queue) = Tracer::new(1, 1.0, 2);
    let span = || tracer.span(mark(), "x", UnixNanos(5), UnixNanos(3)).with("rows", 4u32);
    (0..5).for_each(|_| tracer.give(span()));
    assert_eq!(tracer.counts().unwrap().queue_full, 3);
    let Given::Span(given) = queue.recv().unwrap() else { panic!("not a span") };
    assert_eq!((given.start, given.end), (UnixNanos(5), UnixNanos(5)), "it does not end before");
    assert_eq!(given.parent, Some(mark().span));
    assert_eq!(given.attributes, [("rows", Value::Int(4))]);
    drop(queue);
    tracer.give(span());
    tracer.exported(2);
    let counts = SpanCounts { exported: 2, queue_full: 3, refused: 1 };
    assert_eq!(tracer.counts(), Some(counts));
    assert_eq!(Tracer::off().counts(), None);
}

#[test]
fn ids_differ_within_a_process_and_between_seeds() {
    let (one, _queue) = Tracer::new(1, 1.0, 1);
    let (other, _queue) = Tracer::new(2, 1.0, 1);
    let ids: std::collections::BTreeSet<u64> =
        (0..1000).flat_map(|_| [one.id().0, other.id().0]).collect();
    assert_eq!(ids.len(), 2000);
}
