//! The network between the processes of a cluster, in userspace, so that it can be cut without any
//! privilege.
//!
//! ```text
//! node A (127.77.0.1) ──► front of B's socket ─┬─► a socket of its own for each sender ──► B (127.77.0.2)
//!                     ◄────────────────────────┴◄─────────────────────────────────────────
//! ```
//!
//! Each node has an address of its own out of 127/8, which needs no set-up on Linux, and advertises the
//! fronts of its sockets in the place of the sockets. So the relay knows whose datagram it has by where
//! it comes from, and drops it where that way is cut. A way is cut for all conversations, whoever began
//! them. What a killed process's host would say (ICMP) is lost here, as behind many a firewall.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use tokio::net::UdpSocket;
use tokio::runtime::Runtime;

/// Larger than any datagram.
const DATAGRAM_MAX: usize = 1 << 16;

/// A node of the cluster as the network knows it: its own address out of 127/8.
pub fn address_of(number: u8) -> IpAddr {
    Ipv4Addr::new(127, 77, 0, number).into()
}

/// All fronts of one cluster, and what is cut between whom.
#[derive(Debug)]
pub struct Network {
    runtime: Runtime,
    faults: Arc<Mutex<Faults>>,
}

#[derive(Debug, Default)]
struct Faults {
    /// (from, to).
    cut: BTreeSet<(IpAddr, IpAddr)>,
    /// Of what goes there, one datagram in so many has a bit turned.
    damaged: BTreeMap<IpAddr, u32>,
    hits: Hits,
    dice: u64,
}

/// What a network has done to those who use it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Datagrams that did not pass.
    pub dropped: u64,
    /// Datagrams that had a bit turned.
    pub damaged: u64,
}

impl Faults {
    /// Whether a datagram passes; it may be damaged on the way.
    fn passes(&mut self, from: IpAddr, to: IpAddr, datagram: &mut [u8]) -> bool {
        if self.cut.contains(&(from, to)) {
            self.hits.dropped += 1;
            return false;
        }
        if let Some(one_in) = self.damaged.get(&to).copied()
            && self.draw().is_multiple_of(u64::from(one_in.max(1)))
            && !datagram.is_empty()
        {
            let bit = self.draw() as usize % (datagram.len() * 8);
            datagram[bit / 8] ^= 1 << (bit % 8);
            self.hits.damaged += 1;
        }
        true
    }

    /// xorshift64.
    fn draw(&mut self) -> u64 {
        self.dice = if self.dice == 0 { 0x9e37_79b9_7f4a_7c15 } else { self.dice };
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice
    }
}

impl Network {
    /// A network in which everybody reaches everybody.
    pub fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("relay")
            .enable_all()
            .build()?;
        Ok(Self { runtime, faults: Arc::default() })
    }

    /// Opens a front for a socket of a node; the address that others are to use for it.
    pub fn front(&self, target: SocketAddr) -> Result<SocketAddr> {
        let faults = Arc::clone(&self.faults);
        let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        let front = self.runtime.block_on(UdpSocket::bind(any)).context("no front")?;
        let address = front.local_addr()?;
        self.runtime.spawn(relay(Arc::new(front), target, faults));
        Ok(address)
    }

    /// Nothing goes from one to the other any more.
    pub fn cut(&self, from: IpAddr, to: IpAddr) {
        self.lock().cut.insert((from, to));
    }

    /// One in so many datagrams to this node has a bit turned.
    pub fn damage(&self, to: IpAddr, one_in: u32) {
        self.lock().damaged.insert(to, one_in);
    }

    /// Everything passes again; what was done since the last time.
    pub fn mend(&self) -> Hits {
        let mut faults = self.lock();
        faults.cut.clear();
        faults.damaged.clear();
        std::mem::take(&mut faults.hits)
    }

    fn lock(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Relays to one socket, and its answers, until the network is gone.
async fn relay(front: Arc<UdpSocket>, target: SocketAddr, faults: Arc<Mutex<Faults>>) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        let Ok((len, from)) = front.recv_from(&mut datagram).await else { continue };
        let back = match backs.entry(from) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
                let Ok(back) = UdpSocket::bind(any).await else { continue };
                if back.connect(target).await.is_err() {
                    continue;
                }
                let back = Arc::new(back);
                tokio::spawn(answer(
                    Arc::clone(&front),
                    Arc::clone(&back),
                    (target, from),
                    Arc::clone(&faults),
                ));
                entry.insert(back)
            }
        };
        let datagram = &mut datagram[..len];
        if pass(&faults, from.ip(), target.ip(), datagram) {
            // Where nobody listens, nobody hears.
            let _ = back.send(datagram).await;
        }
    }
}

async fn answer(
    front: Arc<UdpSocket>,
    back: Arc<UdpSocket>,
    (target, to): (SocketAddr, SocketAddr),
    faults: Arc<Mutex<Faults>>,
) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    loop {
        // An error is a port that refuses: its process may come back.
        let Ok(len) = back.recv(&mut datagram).await else {
            tokio::task::yield_now().await;
            continue;
        };
        let datagram = &mut datagram[..len];
        if pass(&faults, target.ip(), to.ip(), datagram) {
            let _ = front.send_to(datagram, to).await;
        }
    }
}

fn pass(faults: &Mutex<Faults>, from: IpAddr, to: IpAddr, datagram: &mut [u8]) -> bool {
    faults.lock().unwrap_or_else(PoisonError::into_inner).passes(from, to, datagram)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use super::*;

    fn socket(number: u8) -> UdpSocket {
        let socket = UdpSocket::bind(SocketAddr::new(address_of(number), 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket
    }

    #[test]
    fn a_way_is_cut_in_one_direction_and_mended() {
        let network = Network::new().unwrap();
        let (a, b) = (socket(1), socket(2));
        let front = network.front(b.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 16];
        a.send_to(b"one", front).unwrap();
        let (len, from_a) = b.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"one");
        network.cut(address_of(2), address_of(1));
        b.send_to(b"lost", from_a).unwrap();
        assert!(a.recv_from(&mut buffer).is_err(), "b does not reach a");
        a.send_to(b"two", front).unwrap();
        assert_eq!(b.recv_from(&mut buffer).unwrap(), (3, from_a), "a still reaches b");
        assert_eq!(network.mend(), Hits { dropped: 1, damaged: 0 });
        b.send_to(b"back", from_a).unwrap();
        assert_eq!(a.recv_from(&mut buffer).unwrap(), (4, front));
        network.damage(address_of(2), 1);
        a.send_to(&[0; 8], front).unwrap();
        b.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..8].iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        assert_eq!(network.mend(), Hits { dropped: 0, damaged: 1 });
        a.send_to(b"well", front).unwrap();
        b.recv_from(&mut buffer).unwrap();
        assert_eq!(network.mend(), Hits::default(), "nothing was hit");
    }
}
