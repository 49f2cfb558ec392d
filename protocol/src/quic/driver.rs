//! Drivers of connections that a sender may run itself.
//!
//! quinn drives each connection in a task: who writes to a stream wakes that task, and the task
//! encrypts and sends. Where the writer is a thread outside the runtime, and the runtime's thread
//! sleeps, that wake-up takes longer than all the rest of the way to the wire. So a driver can also be
//! run by the thread that has just written ([`Driver::run_here`]); its task is woken all the same and
//! finds nothing left to do.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, TokioRuntime};

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

thread_local! {
    /// The driver that was spawned last on this thread. quinn spawns that of a new connection before
    /// it returns from `connect_with`.
    static SPAWNED: RefCell<Weak<Driver>> = const { RefCell::new(Weak::new()) };
}

/// tokio, with drivers that others can run.
#[derive(Debug)]
pub(super) struct Runtime {
    /// Timers need it, whichever thread makes them.
    handle: tokio::runtime::Handle,
}

impl Runtime {
    /// On the runtime that the caller runs on.
    pub fn current() -> Self {
        Self { handle: tokio::runtime::Handle::current() }
    }
}

impl quinn::Runtime for Runtime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _entered = self.handle.enter();
        quinn::Runtime::new_timer(&TokioRuntime, at)
    }

    fn spawn(&self, work: Work) {
        let driver = Arc::new(Driver(Mutex::new(Inner { work: Some(work), task: None })));
        SPAWNED.with_borrow_mut(|spawned| *spawned = Arc::downgrade(&driver));
        self.handle.spawn(std::future::poll_fn(move |cx| driver.run(cx)));
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _entered = self.handle.enter();
        quinn::Runtime::wrap_udp_socket(&TokioRuntime, socket)
    }
}

/// A task of quinn's: of a connection, or of an endpoint.
pub(super) struct Driver(Mutex<Inner>);

struct Inner {
    /// `None` once it has ended.
    work: Option<Work>,
    /// The task that drives it, for whoever drives it besides: what is waited for wakes the task.
    task: Option<Waker>,
}

impl Driver {
    /// The one that was spawned last on this thread, if it still runs.
    pub fn spawned_here() -> Weak<Self> {
        SPAWNED.take()
    }

    /// Does what there is to do, on the caller's thread. Returns at once where the task is at it: then
    /// the task sees what was written before, or has been woken.
    pub fn run_here(&self) {
        let Ok(mut inner) = self.0.try_lock() else { return };
        // Without a task it has never run, and is about to.
        let Some(task) = inner.task.clone() else { return };
        if inner.poll(&mut Context::from_waker(&task)).is_ready() {
            task.wake();
        }
    }

    /// One run of its task.
    fn run(&self, cx: &mut Context<'_>) -> Poll<()> {
        // After a panic there is no work left in it, and the task ends.
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut inner.task {
            Some(task) => task.clone_from(cx.waker()),
            None => inner.task = Some(cx.waker().clone()),
        }
        inner.poll(cx)
    }
}

impl Inner {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Taken out while it runs, so that what has panicked is gone.
        let Some(mut work) = self.work.take() else { return Poll::Ready(()) };
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() {
            self.work = Some(work);
        }
        polled
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}
