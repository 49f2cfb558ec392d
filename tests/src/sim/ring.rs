//! ○ How the shards of a layout find each other, and notice that one of them is gone.

use std::collections::BTreeSet;

use shoal_protocol::id::NodeId;
use shoal_protocol::liveness::{Detector, Verdict};
use shoal_protocol::units::Instant;
use shoal_shard_worker::agent::lifecycle::{Event as Told, ShardKey};

use super::agents::beat;
use super::bug::Bug;
use super::wire::{Datagram, Event};
use super::world::World;

impl World {
    /// A shard looks for the others of its layout.
    pub fn ring(&mut self, id: NodeId, life: u64, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get(&key).filter(|shard| !shard.broken) else {
                return;
            };
            let others: BTreeSet<NodeId> =
                shard.assignment.replica.nodes().filter(|node| *node != id).collect();
            let missing: Vec<NodeId> =
                others.iter().copied().filter(|node| !shard.ring.contains_key(node)).collect();
            let early = world.bug == Some(Bug::ReadyBeforeLinked);
            if (missing.is_empty() || early) && !shard.linked {
                if let Some(shard) = process.shards.get_mut(&key) {
                    shard.linked = true;
                    if !shard.is_stopping() {
                        shard.refuse = None;
                    }
                }
                world.check_ring(id, process, key);
                world.tell(id, process, Told::Linked(key));
            }
            if !missing.is_empty() {
                world.at(world.now + 100_000, Event::Ring { at: id, life, key });
            }
            for node in missing {
                world.datagram(id, node, Datagram::RingHello { from: id, life, key });
            }
        });
    }

    /// A datagram of another shard.
    pub fn ring_datagram(&mut self, id: NodeId, datagram: Datagram) {
        let (from, theirs, key) = match datagram {
            Datagram::RingHello { from, life, key }
            | Datagram::RingOk { from, life, key }
            | Datagram::RingBeat { from, life, key } => (from, life, key),
            _ => return,
        };
        self.worker(id, 0, |world, process| {
            let life = process.life;
            let loose = world.bug == Some(Bug::IgnoreGeneration);
            let fits = |ours: &ShardKey| *ours == key || loose && ours.replica == key.replica;
            let Some(ours) = process.shards.keys().copied().rfind(fits) else { return };
            let Some(shard) = process.shards.get_mut(&ours).filter(|shard| !shard.broken) else {
                return;
            };
            match shard.ring.get_mut(&from) {
                Some((known, _)) if *known != theirs => {
                    return world.broken(id, process, ours, &format!("{from} was started again"));
                }
                Some((_, detector)) => detector.heard(Instant(world.now), Some(beat())),
                None if matches!(datagram, Datagram::RingBeat { .. }) => return,
                None => {
                    let mut detector = Detector::new(Instant(world.now));
                    detector.heard(Instant(world.now), Some(beat()));
                    let look = detector.next_look().0;
                    shard.ring.insert(from, (theirs, detector));
                    let peer = from;
                    world.at(look, Event::RingLook { at: id, life, peer, key: ours });
                    world.at(world.now, Event::Ring { at: id, life, key: ours });
                    world.flush(id, process, ours);
                }
            }
            if matches!(datagram, Datagram::RingHello { .. }) {
                world.datagram(id, from, Datagram::RingOk { from: id, life, key });
            }
        });
    }

    /// A neighbour is looked at.
    pub fn ring_look(&mut self, id: NodeId, life: u64, peer: NodeId, key: ShardKey) {
        self.worker(id, life, |world, process| {
            let Some(shard) = process.shards.get_mut(&key) else { return };
            let Some((_, detector)) = shard.ring.get_mut(&peer) else { return };
            if detector.look(Instant(world.now)) == Verdict::Dead {
                return world.broken(id, process, key, &format!("{peer} is silent"));
            }
            let next = detector.next_look().0.max(world.now + 1_000);
            world.at(next, Event::RingLook { at: id, life, peer, key });
        });
    }
}
