//! Frames of one activation link: out of a stream and into one.
//!
//! What comes in is checked against the plan before anything is allocated; a payload is copied once,
//! from QUIC's chunks into the buffer that becomes the tensor. What goes out goes by reference.

use std::time::Instant;

use bytes::Bytes;
use shoal_protocol::activation::{
    CloseHeader, Open, OpenHeader, Partial, Samples, SamplesHeader, Step, StepHeader,
};
use shoal_protocol::frame::{Flat, FrameError, FrameKind};
use shoal_protocol::id::Generation;
use shoal_protocol::plan::ReplicaLimits;
use shoal_protocol::quic::{
    Connection, FrameHead, FrameReceiver, FrameSender, Pulse, RecvError, SendError, Silence,
};
use shoal_protocol::request::SamplingRecord;
use shoal_protocol::trace::TraceHeader;
use tokio::sync::{mpsc, oneshot};

use super::adapters::AdapterOrder;
use super::buffer::{BufferPool, HiddenBuffer};
use super::counters::Counters;
use super::near::Near;
use super::ring::LinkPlan;
use super::ways::Meter;

/// Bytes of one number on the wire.
const FLOAT_LEN: usize = size_of::<f32>();

/// What a stage takes, in the order in which it came.
#[derive(Debug)]
pub enum StageInput {
    /// A sequence begins.
    Open(Open),
    /// The sequence that has just begun is traced.
    Trace(TraceHeader),
    /// A batch.
    Step {
        /// Its header, rows and grants.
        step: Step,
        /// Rows and grants as they stand on the wire: the same at every stage.
        records: Bytes,
        /// What to compute with.
        data: StepData,
    },
    /// A sequence ends.
    Close(CloseHeader),
    /// From the worker itself: an adapter comes or goes.
    Adapter(AdapterOrder),
}

/// What a step computes with.
#[derive(Debug)]
pub enum StepData {
    /// On the first stage: one token id for each row.
    Tokens(Vec<u32>),
    /// On all others: the hidden states of the stage before.
    Hidden(HiddenBuffer),
}

/// What a stage sends to the next one, or the last one to the head.
#[derive(Clone, Debug)]
pub enum LinkFrame {
    /// A sequence begins.
    Open(Open),
    /// The sequence that has just begun is traced.
    Trace(TraceHeader),
    /// A batch.
    Step {
        /// Its header.
        header: StepHeader,
        /// Its rows and grants.
        records: Bytes,
        /// The hidden states; to a rank of the first stage the tokens.
        payload: Bytes,
        /// When the stage had it ready.
        ready: Instant,
    },
    /// A sequence ends.
    Close(CloseHeader),
    /// What was drawn.
    Samples {
        /// All of a step.
        samples: Samples,
        /// When the stage had it ready.
        ready: Instant,
    },
}

/// Where frames from upstream go.
#[derive(Debug)]
pub enum Inlet {
    /// To the stage.
    Stage {
        /// What steps come with.
        takes: Takes,
        /// The stage's queue. When it is full the stream is not read, and QUIC's credit holds back
        /// the stage before.
        to: mpsc::Sender<StageInput>,
    },
    /// From the last stage to the head.
    Head {
        /// The head's queue. It holds a frame for each step in flight, so it is never full.
        to: mpsc::Sender<Samples>,
    },
}

/// What comes with a step.
#[derive(Debug)]
pub enum Takes {
    /// On the ranks of the first stage that have no head: what rank 0 has from it.
    Tokens,
    /// On all other stages.
    Hidden {
        /// The width of a row.
        width: usize,
        /// Where the buffers come from.
        pool: BufferPool,
    },
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkEnd {
    /// The neighbour or the way to it is gone.
    #[error("{0}")]
    Gone(String),
    /// The neighbour is silent, beyond doubt.
    #[error("{0}")]
    Silent(Silence),
    /// The neighbour sent what it may not.
    #[error("it broke the protocol: {0}")]
    Violation(String),
}

impl From<RecvError> for LinkEnd {
    fn from(error: RecvError) -> Self {
        match error {
            RecvError::Stream(_) | RecvError::Truncated => LinkEnd::Gone(error.to_string()),
            RecvError::Frame(_) | RecvError::Decode(_) => LinkEnd::Violation(error.to_string()),
        }
    }
}

impl From<FrameError> for LinkEnd {
    fn from(error: FrameError) -> Self {
        LinkEnd::Violation(error.to_string())
    }
}

impl From<SendError> for LinkEnd {
    fn from(error: SendError) -> Self {
        LinkEnd::Gone(error.to_string())
    }
}

/// Reads frames until the link ends, or, without an error, the stage takes no more.
pub(super) async fn receive(
    mut receiver: FrameReceiver,
    inlet: &Inlet,
    plan: &LinkPlan,
    pulse: &Pulse,
    meter: Meter,
) -> Result<(), LinkEnd> {
    loop {
        let asked = Instant::now();
        let head = receiver.next().await?.ok_or_else(finished)?;
        let begun = Instant::now();
        pulse.heard();
        let taken = match inlet {
            Inlet::Stage { takes, to } => {
                let input = receive_input(&mut receiver, &head, takes, plan).await?;
                meter.received(head.body_len, begun - asked, begun);
                to.send(input).await.is_ok()
            }
            Inlet::Head { to } => {
                to.send(receive_samples(&mut receiver, &head, plan).await?).await.is_ok()
            }
        };
        if !taken {
            return Ok(());
        }
    }
}

async fn receive_input(
    receiver: &mut FrameReceiver,
    head: &FrameHead,
    takes: &Takes,
    plan: &LinkPlan,
) -> Result<StageInput, LinkEnd> {
    let limits = &plan.limits;
    match head.kind {
        FrameKind::Step => {
            let row_len = match takes {
                Takes::Tokens => size_of::<u32>(),
                Takes::Hidden { width, .. } => width * FLOAT_LEN,
            };
            let (header, records_len, _) =
                Step::check(head.header(), head.body_len, limits, row_len)?;
            check_generation(header.generation, plan)?;
            let mut records = vec![0; records_len];
            receiver.read_into(&mut records).await?;
            let step = Step::decode(header, &records)?;
            let rows = header.rows as usize;
            let data = match takes {
                Takes::Tokens => {
                    let mut tokens = vec![0_u32; rows];
                    receiver.read_into(bytemuck::cast_slice_mut(&mut tokens)).await?;
                    StepData::Tokens(tokens)
                }
                Takes::Hidden { pool, .. } => {
                    let mut buffer = pool.take(rows);
                    receiver.read_into(buffer.bytes_mut()).await?;
                    StepData::Hidden(buffer)
                }
            };
            Ok(StageInput::Step { step, records: records.into(), data })
        }
        FrameKind::Open => {
            OpenHeader::read_from(head.header())?;
            let body = receiver.body(head, open_body_max(limits)).await?;
            let open = Open::decode(head.header(), &body, limits)?;
            check_generation(open.generation.0, plan)?;
            Ok(StageInput::Open(open))
        }
        FrameKind::Trace => {
            let trace = TraceHeader::read_from(head.header())?;
            head.body_within(0)?;
            check_generation(trace.generation, plan)?;
            Ok(StageInput::Trace(trace))
        }
        FrameKind::Close => {
            let close = CloseHeader::read_from(head.header())?;
            head.body_within(0)?;
            check_generation(close.generation, plan)?;
            Ok(StageInput::Close(close))
        }
        found => {
            let expected = "Open, Trace, Step or Close";
            Err(FrameError::UnexpectedKind { found, expected }.into())
        }
    }
}

async fn receive_samples(
    receiver: &mut FrameReceiver,
    head: &FrameHead,
    plan: &LinkPlan,
) -> Result<Samples, LinkEnd> {
    if head.kind != FrameKind::Samples {
        return Err(FrameError::UnexpectedKind { found: head.kind, expected: "Samples" }.into());
    }
    let header = SamplesHeader::read_from(head.header())?;
    let body = receiver.body(head, Samples::body_len_max(&header, &plan.limits)).await?;
    let samples = Samples::decode(head.header(), &body, &plan.limits)?;
    check_generation(samples.generation.0, plan)?;
    Ok(samples)
}

fn open_body_max(limits: &ReplicaLimits) -> usize {
    SamplingRecord::LEN + size_of::<u32>() * limits.context_max as usize
}

fn finished() -> LinkEnd {
    LinkEnd::Gone("it ended the stream".to_owned())
}

fn check_generation(found: u64, plan: &LinkPlan) -> Result<(), LinkEnd> {
    if found == plan.generation.0 {
        return Ok(());
    }
    let (found, expected) = (Generation(found), plan.generation);
    Err(LinkEnd::Violation(format!("a frame of {found} on a link of {expected}")))
}

/// Sends frames until the link ends, or, without an error, the stage gives no more.
pub(super) async fn send(
    mut sender: FrameSender,
    connection: &Connection,
    mut outlet: mpsc::Receiver<LinkFrame>,
    counters: &Counters,
    (pulse, mut meter): (&Pulse, Meter),
) -> Result<(), LinkEnd> {
    loop {
        let frame = tokio::select! {
            frame = outlet.recv() => frame,
            // An idle link notices a loss too.
            reason = connection.closed() => return Err(LinkEnd::Gone(reason.to_string())),
        };
        let Some(frame) = frame else { return Ok(()) };
        send_frame(&mut sender, frame, counters).await?;
        pulse.sent();
        meter.sent();
    }
}

async fn send_frame(
    sender: &mut FrameSender,
    frame: LinkFrame,
    counters: &Counters,
) -> Result<(), SendError> {
    match frame {
        LinkFrame::Step { header, records, payload, ready } => {
            let len = records.len() + payload.len();
            sender.send(FrameKind::Step, &header, records, payload).await?;
            counters.sent(len, ready.elapsed());
            Ok(())
        }
        LinkFrame::Samples { samples, ready } => {
            let (header, body) = samples.encode();
            let len = body.len();
            sender.send(FrameKind::Samples, &header, body.into(), Bytes::new()).await?;
            counters.sent(len, ready.elapsed());
            Ok(())
        }
        LinkFrame::Open(open) => {
            let (header, body) = open.encode();
            sender.send(FrameKind::Open, &header, body.into(), Bytes::new()).await
        }
        LinkFrame::Trace(trace) => {
            sender.send(FrameKind::Trace, &trace, Bytes::new(), Bytes::new()).await
        }
        LinkFrame::Close(close) => {
            sender.send(FrameKind::Close, &close, Bytes::new(), Bytes::new()).await
        }
    }
}

/// One end of a link between two ranks of a stage.
#[derive(Debug)]
pub struct RankEnd {
    /// What this rank tells the other one.
    pub told: mpsc::Receiver<Bytes>,
    /// What the other one tells this rank.
    pub heard: mpsc::Sender<Bytes>,
    /// Where the shorter way goes, if there is one; dropped where this link is the way.
    pub near: oneshot::Sender<Near>,
    /// The longest message.
    pub bytes_max: usize,
}

/// Carries rounds both ways until the link ends, or, without an error, the stage has no more.
pub(super) async fn exchange(
    (mut sender, mut receiver): (FrameSender, FrameReceiver),
    connection: &Connection,
    (mut told, heard): (mpsc::Receiver<Bytes>, mpsc::Sender<Bytes>),
    bytes_max: usize,
    plan: &LinkPlan,
    (pulse, [mut sent, got]): (&Pulse, [Meter; 2]),
) -> Result<(), LinkEnd> {
    let generation = plan.generation.0;
    let tell = async {
        for round in 0.. {
            let message = tokio::select! {
                message = told.recv() => message,
                reason = connection.closed() => return Err(LinkEnd::Gone(reason.to_string())),
            };
            let Some(message) = message else { return Ok(()) };
            let header = Partial { generation, round };
            sender.send(FrameKind::Partial, &header, message, Bytes::new()).await?;
            pulse.sent();
            sent.sent();
        }
        Ok(())
    };
    let hear = async {
        for round in 0.. {
            let asked = Instant::now();
            let head = receiver.next().await?.ok_or_else(finished)?;
            let begun = Instant::now();
            pulse.heard();
            if head.kind != FrameKind::Partial {
                let (found, expected) = (head.kind, "Partial");
                return Err(FrameError::UnexpectedKind { found, expected }.into());
            }
            let header = Partial::read_from(head.header())?;
            check_generation(header.generation, plan)?;
            if header.round != round {
                let found = header.round;
                return Err(LinkEnd::Violation(format!("round {found} where {round} comes next")));
            }
            let body = receiver.body(&head, bytes_max).await?;
            got.received(body.len(), begun - asked, begun);
            if heard.send(body.into()).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    };
    tokio::select! {
        end = tell => end,
        end = hear => end,
    }
}
