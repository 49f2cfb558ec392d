//! One shard that runs: its compute thread, its links and, on stage 0, the head beside it.
//!
//! ```text
//!            upstream link ─► StageInput ─► compute thread ─► LinkFrame ─► downstream link
//! stage 0:   head ──────────────┘                     last ─► Samples ─► link ─► head
//! ```
//!
//! A shard fails as a whole: whichever part cannot go on, the supervisor tells the head, leaves the
//! ring with words for the neighbours, and keeps the weights for the next generation.

use std::sync::Arc;
use std::time::Duration;

use shoal_protocol::activation::Samples;
use shoal_protocol::control::ShardCounters;
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{Generation, ReplicaId};
use shoal_protocol::plan::Assignment;
use shoal_protocol::quic::close_code;
use shoal_protocol::trace::Tracer;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::adapters::{Served, ShardAdapters};
use super::buffer::BufferPool;
use super::counters::Counters;
use super::driver::{ComputeThread, Ended, Stage, StageParts};
use super::link::{Attached, LinkEnds, LinkEvent, LinkLost, Links, link_events_max};
use super::ring::{BadRing, LinkPlan};
use super::table::StageTable;
use super::wire::{Inlet, StageInput, Takes};
use super::wiring::Wiring;
use crate::engine::{BadEngineConfig, EngineConfig};
use crate::head::{Head, HeadClient, HeadParts};
use crate::model::{Output, ShardModel};
use crate::trace::StageTraces;

/// How long a compute thread may take to end the step that it is in: far more than the largest step.
const STEP_END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long what runs may take to finish when a shard is drained. Longer than most answers; an
/// operator who stops a cluster waits at most so long.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the head of a layout that retires still takes requests: coordinators choose by a table that
/// is as old as their last look at the state, and what they have sent is under way.
pub const LAME_DUCK: Duration = Duration::from_millis(500);

/// How long a stage waits for its head to leave first, beyond the head's own deadline.
const HEAD_FIRST: Duration = Duration::from_secs(2);

/// Weights and cache, with what the head must know of the model.
pub struct LoadedModel {
    /// The shard's part.
    pub model: Box<dyn ShardModel>,
    /// The vocabulary's size, of which only the last stage's part knows.
    pub vocab: u32,
}

impl std::fmt::Debug for LoadedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoadedModel(vocab {})", self.vocab)
    }
}

/// What a shard tells its owner, and which one it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardNews {
    /// The replica.
    pub replica: ReplicaId,
    /// Its layout.
    pub generation: Generation,
    /// What has happened.
    pub event: ShardEvent,
}

/// What happens to a shard: the first at most once, the second at most once and last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShardEvent {
    /// Its links are up, or it needs none.
    Linked,
    /// It cannot go on.
    Failed(WireError),
}

/// How a shard ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardStop {
    /// What runs may finish, within `DRAIN_TIMEOUT`: the others of the ring go on without this one.
    Drain,
    /// The whole ring goes. The head takes what is still on its way to it for `LAME_DUCK`, what runs may
    /// finish within `DRAIN_TIMEOUT`, and the others wait for the head to leave.
    Retire,
    /// At once.
    Now,
}

/// A shard that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The assignment names no ring.
    #[error("the assignment is refused: {0}")]
    Ring(#[from] BadRing),
    /// The plan's bounds are of no use.
    #[error("the assignment is refused: {0}")]
    Engine(#[from] BadEngineConfig),
    /// No thread.
    #[error("cannot start a compute thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// A shard that runs or has failed; either way it is to be stopped.
#[derive(Debug)]
pub struct Shard {
    counters: Arc<Counters>,
    head: Option<HeadClient>,
    adapters: ShardAdapters,
    stop: oneshot::Sender<(ShardStop, String)>,
    task: JoinHandle<Option<LoadedModel>>,
}

impl Shard {
    /// Starts the shard of an assignment.
    pub fn start(
        assignment: &Assignment,
        loaded: LoadedModel,
        links: &Links,
        news: mpsc::Sender<ShardNews>,
    ) -> Result<Self, StartError> {
        let ring = LinkPlan::of(assignment)?;
        let limits = &assignment.replica.limits;
        let steps = limits.steps_in_flight_max as usize;
        let hidden = loaded.model.hidden();
        let pool = BufferPool::new(hidden, limits.step_rows_max as usize, steps);
        let counters = Arc::new(Counters::default());

        // Every step in flight, and `Open`, `Trace` and `Close` of every sequence: it is full only
        // where the stage has stopped.
        let frames_max = steps + 3 * limits.sequences_max as usize;
        let (input, inputs) = mpsc::channel::<StageInput>(frames_max);
        let (stage_queue, served) = (input.downgrade(), Served::default());
        // One more than steps in flight, so that nobody ever waits to put samples in.
        let (drawn, samples) = mpsc::channel::<Samples>(steps + 1);
        let Wiring { outlet, mirrors, outlets, peers, siblings } =
            Wiring::of(assignment, ring.as_ref(), &loaded, (frames_max, &drawn));
        let (fault_to, fault) = mpsc::channel(1);
        let (head, inlet) = if assignment.has_head() {
            let mut config = EngineConfig::of_plan(&assignment.replica, loaded.vocab);
            config.encodes = loaded.model.output() == Output::Vectors;
            let tracer = links.tracer().clone();
            let served = served.clone();
            let parts =
                HeadParts { config, stage: input, samples, fault: fault_to, served, tracer };
            (Some(Head::start(parts, links.runtime())?), Inlet::Head { to: drawn })
        } else {
            let takes = match assignment.is_first() {
                true => Takes::Tokens,
                false => Takes::Hidden { width: hidden, pool: pool.clone() },
            };
            (None, Inlet::Stage { takes, to: input })
        };
        let table =
            StageTable::new(assignment.replica.generation, limits.clone(), assignment.is_last());
        let stage = Stage::new(StageParts {
            index: assignment.stage,
            last: assignment.is_last(),
            table,
            model: loaded.model,
            vocab: loaded.vocab,
            pool,
            outlet,
            mirrors,
            peers,
            counters: Arc::clone(&counters),
            work: links.work().share(),
            traces: StageTraces::new(
                // All ranks of a stage do the same step: one of them tells of it.
                if assignment.rank.0 == 0 { links.tracer().clone() } else { Tracer::off() },
                assignment.replica.id,
                assignment.stage,
                assignment.is_last(),
            ),
        });
        let (stage_number, rank) = (assignment.stage.0, assignment.rank.0);
        let name = match rank {
            0 => format!("{}-s{stage_number}", assignment.replica.id),
            rank => format!("{}-s{stage_number}r{rank}", assignment.replica.id),
        };
        let thread = ComputeThread::start(name, stage, inputs)?;
        let links_down = ring.as_ref().map_or(0, LinkPlan::links);
        let (events, link_events) = mpsc::channel(ring.as_ref().map_or(1, link_events_max));
        let attached = ring.map(|ring| {
            let (counters, work) = (Arc::clone(&counters), thread.sequences());
            links.attach(ring, LinkEnds { inlet, outlets, siblings, events, counters, work })
        });
        let client = head.as_ref().map(Head::client);
        let (stop, stopped) = oneshot::channel();
        let supervisor = Supervisor {
            vocab: loaded.vocab,
            thread,
            head,
            attached,
            links_down,
            link_events,
            fault,
            replica: assignment.replica.id,
            generation: assignment.replica.generation,
            news,
            ended: None,
        };
        let task = tokio::spawn(supervisor.run(stopped));
        let adapters = ShardAdapters::new(stage_queue, served);
        Ok(Self { counters, head: client, adapters, stop, task })
    }

    /// What it has counted.
    pub fn counters(&self) -> ShardCounters {
        self.counters.snapshot()
    }

    /// The head, on stage 0.
    pub fn head(&self) -> Option<&HeadClient> {
        self.head.as_ref()
    }

    /// What brings adapters to it and takes them away.
    pub fn adapters(&self) -> &ShardAdapters {
        &self.adapters
    }

    /// Ends the shard, with words for its streams and its neighbours, and gives its model back,
    /// unless a panic or a hang has taken it.
    pub async fn stop(self, how: ShardStop, why: String) -> Option<LoadedModel> {
        // It fails where the supervisor is gone, which the join says.
        let _ = self.stop.send((how, why));
        self.task.await.unwrap_or_else(|error| {
            tracing::error!("a shard's supervisor panicked: {error}");
            None
        })
    }
}

struct Supervisor {
    vocab: u32,
    thread: ComputeThread,
    head: Option<Head>,
    attached: Option<Attached>,
    /// Links that are not up yet.
    links_down: usize,
    link_events: mpsc::Receiver<LinkEvent>,
    fault: mpsc::Receiver<String>,
    replica: ReplicaId,
    generation: Generation,
    news: mpsc::Sender<ShardNews>,
    /// What the compute thread has left, once it has ended. The inner `None`: nothing.
    ended: Option<Option<Ended>>,
}

/// Why a shard stops running.
enum End {
    Told((ShardStop, String)),
    Failed(WireError),
}

impl Supervisor {
    async fn run(
        mut self,
        mut stop: oneshot::Receiver<(ShardStop, String)>,
    ) -> Option<LoadedModel> {
        let mut linked = false;
        let end = loop {
            if self.links_down == 0 && !linked {
                linked = true;
                self.linked().await;
            }
            tokio::select! {
                // A shard that nobody owns any more is to end.
                told = &mut stop => break End::Told(told.unwrap_or_else(|_| {
                    (ShardStop::Now, "its worker has ended".to_owned())
                })),
                end = failure(
                    &mut self.thread, &mut self.link_events, &mut self.fault, &mut self.ended
                ) => match end {
                    None => self.links_down = self.links_down.saturating_sub(1),
                    Some(error) => break End::Failed(error),
                },
            }
        };
        match end {
            End::Told((how, why)) => {
                match how {
                    ShardStop::Drain => self.drain(Duration::ZERO).await,
                    ShardStop::Retire if self.head.is_some() => self.drain(LAME_DUCK).await,
                    ShardStop::Retire => self.wait_for_head().await,
                    ShardStop::Now => {}
                }
                self.close(&why).await;
            }
            End::Failed(error) => {
                self.close(&error.message).await;
                self.tell(ShardEvent::Failed(error)).await;
                let _ = stop.await;
            }
        }
        self.model().await
    }

    async fn linked(&mut self) {
        if let Some(head) = &self.head {
            head.linked().await;
        }
        self.tell(ShardEvent::Linked).await;
    }

    async fn tell(&mut self, event: ShardEvent) {
        let news = ShardNews { replica: self.replica, generation: self.generation, event };
        // It fails where the owner is gone; then it is told to stop, too.
        let _ = self.news.send(news).await;
    }

    /// Lets out what runs: the head's sequences here, or those that are open at this stage.
    async fn drain(&mut self, lame_duck: Duration) {
        let mut sequences = self.thread.sequences();
        // What is lost meanwhile ends the wait: nothing that runs can finish any more.
        let failed = async {
            while failure(&mut self.thread, &mut self.link_events, &mut self.fault, &mut self.ended)
                .await
                .is_none()
            {}
        };
        if let Some(head) = &mut self.head {
            let drain = async {
                tokio::time::sleep(lame_duck).await;
                head.drain(DRAIN_TIMEOUT).await;
            };
            tokio::select! {
                () = drain => {}
                () = failed => {}
            }
            return;
        }
        let idle_or_failed = async {
            tokio::select! {
                // An error means that the stage has ended.
                _ = sequences.wait_for(|open| *open == 0) => {}
                () = failed => {}
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, idle_or_failed).await.is_err() {
            tracing::warn!("sequences were still open at this stage after {DRAIN_TIMEOUT:?}");
        }
    }

    /// The head knows when the last stream is over; its leaving closes the ring.
    async fn wait_for_head(&mut self) {
        let left = async {
            while failure(&mut self.thread, &mut self.link_events, &mut self.fault, &mut self.ended)
                .await
                .is_none()
            {}
        };
        let patience = LAME_DUCK + DRAIN_TIMEOUT + HEAD_FIRST;
        if tokio::time::timeout(patience, left).await.is_err() {
            tracing::warn!("the head of this layout has not left after {patience:?}");
        }
    }

    /// Fails the head's streams, leaves the ring and lets the compute thread end.
    async fn close(&mut self, why: &str) {
        self.thread.stop();
        if let Some(head) = &self.head {
            head.fault(why.to_owned()).await;
        }
        if let Some(attached) = self.attached.take() {
            attached.leave(close_code::STALE, why).await;
        }
    }

    /// Waits for the compute thread and takes the model from it.
    async fn model(mut self) -> Option<LoadedModel> {
        if let Some(head) = self.head.take() {
            head.stop().await;
        }
        let ended = match self.ended.take() {
            Some(ended) => ended,
            None => tokio::time::timeout(STEP_END_TIMEOUT, self.thread.ended())
                .await
                .unwrap_or_else(|_| {
                    tracing::error!("a compute thread hangs since {STEP_END_TIMEOUT:?}");
                    None
                }),
        };
        Some(LoadedModel { model: ended?.model?, vocab: self.vocab })
    }
}

/// Waits until something happens to the shard: `None` for a link that has come up.
async fn failure(
    thread: &mut ComputeThread,
    links: &mut mpsc::Receiver<LinkEvent>,
    fault: &mut mpsc::Receiver<String>,
    ended: &mut Option<Option<Ended>>,
) -> Option<WireError> {
    tokio::select! {
        // A compute thread that has failed knows better than its links.
        biased;
        end = thread.ended(), if ended.is_none() => {
            let error = match &end {
                Some(Ended { outcome: Err(error), .. }) => Some(error.into()),
                Some(Ended { outcome: Ok(()), .. }) => None,
                None => {
                    Some(WireError::new(ErrorCode::Internal, "the compute thread is gone"))
                }
            };
            // Kept before the next wait: whoever drops this future there still finds the model.
            *ended = Some(end);
            match error {
                Some(error) => Some(error),
                None => Some(link_gone(links).await),
            }
        }
        Some(reason) = fault.recv() => Some(WireError::new(ErrorCode::WorkerLost, reason)),
        Some(event) = links.recv() => match event {
            LinkEvent::Up => None,
            LinkEvent::Lost(lost) => Some(lost_error(&lost)),
        },
    }
}

/// A compute thread ends by itself only because a link has gone; the link says which.
async fn link_gone(links: &mut mpsc::Receiver<LinkEvent>) -> WireError {
    while let Some(event) = links.recv().await {
        if let LinkEvent::Lost(lost) = event {
            return lost_error(&lost);
        }
    }
    WireError::new(ErrorCode::Internal, "the stage's queues have closed")
}

fn lost_error(lost: &LinkLost) -> WireError {
    let code = if lost.violation { ErrorCode::ProtocolViolation } else { ErrorCode::WorkerLost };
    WireError::new(code, lost.to_string())
}
