//! A UDP relay that can fall silent: what a peer looks like whose machine has frozen or lost its
//! network.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::loopback;

pub struct Relay {
    pub address: SocketAddr,
    silent: Arc<AtomicBool>,
    _task: JoinSet<()>,
}

impl Relay {
    /// Relays between whoever sends to `address` and `target`.
    pub async fn to(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind(loopback()).await.unwrap());
        let address = front.local_addr().unwrap();
        let silent = Arc::new(AtomicBool::new(false));
        let mut task = JoinSet::new();
        task.spawn(relay(front, target, Arc::clone(&silent)));
        Self { address, silent, _task: task }
    }

    /// Nothing passes any more, in either direction.
    pub fn silence(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }
}

async fn relay(front: Arc<UdpSocket>, target: SocketAddr, silent: Arc<AtomicBool>) {
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut packet = vec![0; 1 << 16];
    loop {
        let Ok((len, from)) = front.recv_from(&mut packet).await else { continue };
        if let Entry::Vacant(entry) = backs.entry(from) {
            let back = Arc::new(UdpSocket::bind(loopback()).await.unwrap());
            back.connect(target).await.unwrap();
            entry.insert(Arc::clone(&back));
            let (front, silent) = (Arc::clone(&front), Arc::clone(&silent));
            answers.spawn(async move {
                let mut packet = vec![0; 1 << 16];
                while let Ok(len) = back.recv(&mut packet).await {
                    if !silent.load(Ordering::Relaxed) {
                        let _ = front.send_to(&packet[..len], from).await;
                    }
                }
            });
        }
        if !silent.load(Ordering::Relaxed) {
            let _ = backs[&from].send(&packet[..len]).await;
        }
    }
}
