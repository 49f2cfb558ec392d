//! ○ The network: who can reach whom, how long it takes, what gets lost.
//!
//! Datagrams (raft's messages, beats, hellos) are lost, doubled and overtaken. Channels carry what
//! travels on streams: in order and once, later while the way is cut, and only between the two
//! processes that opened them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use shoal_protocol::id::NodeId;

use super::dice::Dice;
use super::wire::Payload;

/// Everything between the machines.
#[derive(Debug, Default)]
pub struct Net {
    /// From, to: nothing gets through.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    /// Datagrams are lost, doubled and late.
    pub rough: bool,
    /// Everything to and from these takes so many times as long.
    pub slow: BTreeMap<NodeId, u64>,
    channels: BTreeMap<(NodeId, NodeId), Channel>,
}

#[derive(Debug, Default)]
struct Channel {
    waiting: VecDeque<(u64, Parcel)>,
}

/// Something on a stream.
#[derive(Debug)]
pub struct Parcel {
    /// The process that must be there to take it; 0: whoever is.
    pub life: u64,
    /// What it is.
    pub payload: Payload,
}

impl Net {
    /// How long a packet takes, in microseconds.
    pub fn delay(&self, dice: &mut Dice, from: NodeId, to: NodeId) -> u64 {
        let mut delay = dice.range(80, 400);
        if self.rough && dice.one_in(4) {
            delay += dice.range(500, 40_000);
        }
        let slow = |node| self.slow.get(&node).copied().unwrap_or(1);
        delay * slow(from).max(slow(to))
    }

    /// When the copies of a datagram arrive: none, one or two.
    pub fn datagram(&self, dice: &mut Dice, from: NodeId, to: NodeId) -> Vec<u64> {
        if self.cut.contains(&(from, to)) || self.rough && dice.one_in(12) {
            return Vec::new();
        }
        let copies = if self.rough && dice.one_in(15) { 2 } else { 1 };
        (0..copies).map(|_| self.delay(dice, from, to)).collect()
    }

    /// Puts a parcel on its way; when to look for it.
    pub fn send(
        &mut self,
        now: u64,
        dice: &mut Dice,
        way: (NodeId, NodeId),
        parcel: Parcel,
    ) -> u64 {
        let at = now + self.delay(dice, way.0, way.1);
        let channel = self.channels.entry(way).or_default();
        // Nothing overtakes on a stream.
        let at = channel.waiting.back().map_or(at, |(last, _)| at.max(*last));
        channel.waiting.push_back((at, parcel));
        at
    }

    /// The next parcel that has arrived; `Err`: when to look again.
    pub fn take(&mut self, now: u64, way: (NodeId, NodeId)) -> Result<Option<Parcel>, u64> {
        let Some(channel) = self.channels.get_mut(&way) else { return Ok(None) };
        let Some((at, _)) = channel.waiting.front() else { return Ok(None) };
        if *at > now {
            return Ok(None);
        }
        if self.cut.contains(&way) {
            return Err(now + 20_000);
        }
        Ok(channel.waiting.pop_front().map(|(_, parcel)| parcel))
    }
}
