//! A way to etcd that can be cut, or on which answers get lost.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What becomes of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They pass.
    Open,
    /// Requests pass, answers are lost.
    Mute,
    /// Connections end, and new ones are refused.
    Cut,
}

/// What connections are told: what becomes of bytes, and how often the way was cut so far. Each cut
/// ends the connections of before, however short it is.
type Told = (Way, u64);

/// One way.
pub struct Proxy {
    way: watch::Sender<Told>,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A way to an address.
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (way, told) = watch::channel((Way::Open, 0));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if told.borrow().0 != Way::Cut
                    && let Ok(server) = TcpStream::connect(&target).await
                {
                    tokio::spawn(pass(client, server, told.clone()));
                }
            }
        });
        Self { way, address, task }
    }

    /// Where it begins.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// What becomes of bytes from now on.
    pub fn set(&self, way: Way) {
        self.way.send_modify(|(now, cuts)| {
            *now = way;
            *cuts += u64::from(way == Way::Cut);
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, server: TcpStream, mut way: watch::Receiver<Told>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let answers = way.clone();
    let before = way.borrow().1;
    let cut = async { drop(way.wait_for(|(_, cuts)| *cuts != before).await) };
    let forth = async { drop(tokio::io::copy(&mut from_client, &mut to_server).await) };
    let back = async {
        let mut bytes = vec![0; 16 << 10];
        while let Ok(len @ 1..) = from_server.read(&mut bytes).await {
            let lost = answers.borrow().0 == Way::Mute;
            if !lost && to_client.write_all(&bytes[..len]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = forth => {}
        () = back => {}
        () = cut => {}
    }
}
