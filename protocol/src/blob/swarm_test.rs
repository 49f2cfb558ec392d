//! Who asks whom, played in virtual time.

use std::ops::ControlFlow;

use super::*;
use crate::weights::ModelKey;

const CUT: Cut = Cut { chunk: 100, run: 400 };
const KEY: ModelKey = ModelKey([0; 32]);

fn at(index: u32) -> ChunkId {
    ChunkId { file: 0, index }
}

fn address(node: NodeId) -> SocketAddr {
    ([127, 0, 0, 1], 1000 + node.number as u16).into()
}

fn wants(of: Range<u32>) -> BlobNews {
    BlobNews::Wants { key: KEY, chunks: vec![(0, of)] }
}

fn has(chunks: &[u32]) -> BlobNews {
    let chunks = chunks.iter().map(|index| (at(*index), [*index as u8; 32])).collect();
    BlobNews::Has { key: KEY, chunks }
}

/// Receivers that all want all of a model take turns, one choice each; what the origin sends, in chunks,
/// and how many turns it took each.
fn play(receivers: u32, chunks: u32) -> (u32, Vec<u32>) {
    let now = Instant::now();
    let later = now + GATHER;
    let nodes: Vec<_> = (1..=receivers).map(NodeId::worker).collect();
    let mut swarms: Vec<_> = nodes.iter().map(|node| Swarm::new(*node, now)).collect();
    for swarm in &mut swarms {
        for node in &nodes {
            swarm.hear(*node, address(*node), wants(0..chunks), now);
        }
    }
    let mut missing: Vec<BTreeSet<ChunkId>> =
        nodes.iter().map(|_| (0..chunks).map(at).collect()).collect();
    let mut sent = 0;
    let mut done = vec![0; nodes.len()];
    let ended = (1..100_000).try_for_each(|turn| {
        let mut came = Vec::new();
        for (place, swarm) in swarms.iter().enumerate() {
            match swarm.choose(&missing[place], CUT, later) {
                Choice::Origin(run) => {
                    sent += run.len() as u32;
                    came.extend(run.into_iter().map(|chunk| (place, chunk)));
                }
                Choice::Peer(node, chunk, hash) => {
                    assert_eq!(hash, [chunk.index as u8; 32]);
                    assert!(!missing[node.number as usize - 1].contains(&chunk), "{node} has it");
                    came.push((place, chunk));
                }
                Choice::Wait => {}
            }
        }
        for (place, chunk) in came {
            missing[place].remove(&chunk);
            if missing[place].is_empty() {
                done[place] = turn;
            }
            for swarm in &mut swarms {
                swarm.hear(nodes[place], address(nodes[place]), has(&[chunk.index]), later);
            }
        }
        match missing.iter().all(BTreeSet::is_empty) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    assert!(ended.is_break(), "nobody moves any more");
    (sent, done)
}

#[test]
fn the_origin_sends_each_chunk_once_however_many_want_it() {
    for (receivers, chunks) in [(1, 40), (2, 40), (8, 96), (8, 5), (13, 200)] {
        let (sent, done) = play(receivers, chunks);
        assert_eq!(sent, chunks, "{receivers} receivers");
        let (first, last) = (done.iter().min().unwrap(), done.iter().max().unwrap());
        // Turns are shared by hash, so that shares of few chunks differ; of real ones see `blobs.rs`.
        assert!(*last <= first * 8 / 5 + 4, "the first is done at {first}, the last at {last}");
    }
}

#[test]
fn who_stands_still_is_not_waited_for() {
    let now = Instant::now();
    let (me, other) = (NodeId::worker(1), NodeId::worker(2));
    let mut swarm = Swarm::new(me, now);
    swarm.hear(other, address(other), wants(0..40), now);
    let missing: BTreeSet<_> = (0..40).map(at).collect();
    assert_eq!(swarm.choose(&missing, CUT, now), Choice::Wait, "others may come");
    let theirs: BTreeSet<_> =
        missing.iter().copied().filter(|c| !swarm.is_mine(*c, CUT, now + GATHER)).collect();
    assert!(!theirs.is_empty() && theirs.len() < 40);
    assert_eq!(swarm.choose(&theirs, CUT, now + GATHER), Choice::Wait);
    assert!(matches!(swarm.choose(&theirs, CUT, now + STALL), Choice::Origin(_)));
}

#[test]
fn who_is_avoided_or_gone_is_asked_for_nothing_and_has_no_turn() {
    let now = Instant::now();
    let (me, other) = (NodeId::worker(1), NodeId::worker(2));
    let missing: BTreeSet<_> = (0..40).map(at).collect();
    for gone in [false, true] {
        let mut swarm = Swarm::new(me, now);
        swarm.hear(other, address(other), wants(0..40), now);
        swarm.hear(other, address(other), has(&[3]), now);
        assert_eq!(swarm.choose(&missing, CUT, now), Choice::Peer(other, at(3), [3; 32]));
        match gone {
            true => swarm.hear(other, address(other), BlobNews::Gone { key: KEY }, now),
            false => swarm.avoid(other),
        }
        assert!(missing.iter().all(|chunk| swarm.is_mine(*chunk, CUT, now)));
        assert!(matches!(swarm.choose(&missing, CUT, now + GATHER), Choice::Origin(_)));
    }
}

#[test]
fn a_worker_that_is_busy_is_not_asked_for_more() {
    let now = Instant::now();
    let (a, b) = (NodeId::worker(2), NodeId::worker(3));
    let mut swarm = Swarm::new(NodeId::worker(1), now);
    swarm.hear(a, address(a), has(&[0, 1, 2, 3]), now);
    swarm.hear(b, address(b), has(&[0, 1, 2, 3]), now);
    let missing: BTreeSet<_> = (0..4).map(at).collect();
    let mut asked = BTreeMap::new();
    for _ in 0..2 * BUSY_MAX {
        let Choice::Peer(node, ..) = swarm.choose(&missing, CUT, now) else {
            panic!("both are free")
        };
        swarm.ask(node, true);
        *asked.entry(node).or_insert(0) += 1;
    }
    assert_eq!(asked, BTreeMap::from([(a, BUSY_MAX), (b, BUSY_MAX)]));
    assert_eq!(swarm.choose(&missing, CUT, now), Choice::Wait);
    // Nor does the origin send once more what they have, whoever else wants it.
    assert_eq!(swarm.choose(&missing, CUT, now + GATHER), Choice::Wait);
    swarm.ask(a, false);
    assert!(matches!(swarm.choose(&missing, CUT, now), Choice::Peer(node, ..) if node == a));
    // Unless they do not give it.
    swarm.rest(a, now);
    swarm.rest(b, now);
    assert!(matches!(swarm.choose(&missing, CUT, now + GATHER), Choice::Origin(_)));
}
