//! When to stop: Ctrl-C, SIGTERM, a closed terminal, or the end of the process that started us.

use std::io::Read;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::failure::Failure;

/// Hears every request to stop.
#[derive(Debug)]
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    lifeline: Option<oneshot::Receiver<()>>,
}

impl Stop {
    /// Listens for signals, and with `lifeline` for the end of stdin.
    pub fn listen(lifeline: bool) -> Result<Self, Failure> {
        let hear = |kind| {
            signal(kind).map_err(|error| Failure::failed(format!("cannot hear signals: {error}")))
        };
        Ok(Self {
            interrupt: hear(SignalKind::interrupt())?,
            terminate: hear(SignalKind::terminate())?,
            hangup: hear(SignalKind::hangup())?,
            lifeline: lifeline.then(watch_stdin),
        })
    }

    /// Waits for the next request to stop, and says what it was.
    pub async fn requested(&mut self) -> &'static str {
        let lifeline = async {
            match &mut self.lifeline {
                // Either way of ending means that nobody watches stdin any more.
                Some(closed) => drop(closed.await),
                None => std::future::pending().await,
            }
        };
        let what = tokio::select! {
            _ = self.interrupt.recv() => return "interrupted",
            _ = self.terminate.recv() => return "terminated",
            _ = self.hangup.recv() => return "the terminal was closed",
            () = lifeline => "the lifeline was closed",
        };
        self.lifeline = None;
        what
    }
}

/// The pipe is closed by the system when the process at its other end is gone, however it went.
fn watch_stdin() -> oneshot::Receiver<()> {
    let (closed, receiver) = oneshot::channel();
    // A read from stdin cannot be called off; the thread ends with stdin or with the process.
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; 64];
        while matches!(stdin.read(&mut buffer), Ok(n) if n > 0) {}
        let _ = closed.send(());
    });
    receiver
}
