//! A head that answers by script, over real QUIC on a runtime of its own (so that it can vanish
//! without a word, as a killed process does).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::frame::{Flat, FrameKind};
use shoal_protocol::id::TokenId;
use shoal_protocol::prefix::{ReusedHeader, Tenant, TenantHeader};
use shoal_protocol::quic::{
    Alpn, Connection, Endpoint, FrameReceiver, FrameSender, Identity, close_code,
};
use shoal_protocol::request::{
    CandidateRecord, DoneHeader, FailedHeader, FinishReason, Generate, HeadEvent, NO_LOGPROBS,
    TokenHeader,
};
use shoal_protocol::trace::{TraceHeader, TraceMark};
use tokio::sync::watch;

/// What the head does with every sequence. One of which it is told a part goes on behind it.
#[derive(Clone, Debug)]
pub struct Script {
    /// The answer; cut at `max_tokens`.
    pub tokens: Vec<TokenId>,
    /// The time between two tokens.
    pub pace: Duration,
    /// What follows the last token.
    pub end: End,
}

#[derive(Clone, Debug)]
pub enum End {
    /// Done: by length where `max_tokens` is used up, else by this stop token.
    Done(TokenId),
    /// Failed.
    Failed(ErrorCode, &'static str),
    /// Nothing more, until the coordinator gives up.
    Silence,
    /// The stream ends without `Done`.
    Cut,
    /// The stream is reset.
    Reset,
    /// A token with an index that leaves a gap.
    Gap,
    /// The last token once more, and one of another attempt; then done.
    Twice,
}

/// What the head has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub requests: Vec<Generate>,
    /// What stood before each of them.
    pub marks: Vec<Option<TraceMark>>,
    /// Whose each of them is.
    pub tenants: Vec<Option<Tenant>>,
    /// Sequences that were reset.
    pub cancelled: usize,
}

pub struct Head {
    pub address: SocketAddr,
    pub script: Arc<Mutex<Script>>,
    /// What the next sequences get instead, one each.
    first: Arc<Mutex<VecDeque<Script>>>,
    seen: watch::Receiver<Seen>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Head {
    pub fn start(identity: Identity, script: Script) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let (seen_by, seen) = watch::channel(Seen::default());
        let script = Arc::new(Mutex::new(script));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = runtime
            .block_on(async { Endpoint::bind(any, Arc::new(identity), &[Alpn::Requests]) })
            .expect("a free port");
        let address = endpoint.local_address();
        let first = Arc::<Mutex<VecDeque<Script>>>::default();
        let world = World { script: Arc::clone(&script), first: Arc::clone(&first), seen: seen_by };
        runtime.spawn(async move {
            while let Some(accepting) = endpoint.accept().await {
                let world = world.clone();
                tokio::spawn(async move {
                    let connection = accepting.establish().await.expect("mutual TLS");
                    world.connection(connection).await;
                });
            }
        });
        Self { address, script, first, seen, runtime: Some(runtime) }
    }

    pub fn set(&self, script: Script) {
        *self.script.lock().expect("no panic") = script;
    }

    /// The next sequences get one of these each, later ones the script that is set.
    pub fn set_first(&self, scripts: impl IntoIterator<Item = Script>) {
        self.first.lock().expect("no panic").extend(scripts);
    }

    /// Waits until what the head has seen passes `ok`.
    pub async fn sees(&self, ok: impl FnMut(&Seen) -> bool) -> Seen {
        let mut seen = self.seen.clone();
        let waited = tokio::time::timeout(Duration::from_secs(5), seen.wait_for(ok)).await;
        waited.expect("seen in time").expect("the head lives").clone()
    }

    pub fn last_request(&self) -> Generate {
        self.seen.borrow().requests.last().expect("a request").clone()
    }

    pub fn marks(&self) -> Vec<Option<TraceMark>> {
        self.seen.borrow().marks.clone()
    }

    pub fn tenants(&self) -> Vec<Option<Tenant>> {
        self.seen.borrow().tenants.clone()
    }

    pub fn requests(&self) -> Vec<Generate> {
        self.seen.borrow().requests.clone()
    }

    /// Gone, without a word to anybody.
    pub fn vanish(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        self.vanish();
    }
}

#[derive(Clone)]
struct World {
    script: Arc<Mutex<Script>>,
    first: Arc<Mutex<VecDeque<Script>>>,
    seen: watch::Sender<Seen>,
}

impl World {
    async fn connection(self, connection: Connection) {
        while let Ok((send, receive)) = connection.accept_bi().await {
            let world = self.clone();
            tokio::spawn(async move { world.sequence(send, receive).await });
        }
    }

    async fn sequence(self, mut send: FrameSender, mut receive: FrameReceiver) {
        let Ok(Some(mut frame)) = receive.next().await else { return };
        let mut mark = None;
        if frame.kind == FrameKind::Trace {
            let trace = TraceHeader::read_from(frame.header()).expect("a header");
            mark = Some(trace.mark().expect("a mark"));
            frame = receive.next().await.expect("a frame").expect("Generate");
        }
        let mut tenant = None;
        if frame.kind == FrameKind::Tenant {
            let named = TenantHeader::read_from(frame.header()).expect("a header");
            tenant = Some(named.tenant());
            frame = receive.next().await.expect("a frame").expect("Generate");
        }
        assert_eq!(frame.kind, FrameKind::Generate);
        let body = receive.body(&frame, 1 << 20).await.expect("a body");
        let request = Generate::decode(frame.header(), &body).expect("a valid request");
        let first = self.first.lock().expect("no panic").pop_front();
        let script = first.unwrap_or_else(|| self.script.lock().expect("no panic").clone());
        self.seen.send_modify(|seen| {
            seen.requests.push(request.clone());
            seen.marks.push(mark);
            seen.tenants.push(tenant);
        });
        if tenant.is_some() {
            reuse(&mut send, &request).await;
        }
        tokio::select! {
            // The answer first: at its end the coordinator finishes its half.
            biased;
            () = play(&mut send, &request, &script) => {
                send.finish();
                send.stopped().await;
            }
            reset = receive.reset_by_peer() => {
                if reset {
                    self.seen.send_modify(|seen| seen.cancelled += 1);
                }
            }
        }
    }
}

/// All of the prompt but its last token was there already; an attempt before this one had nothing.
async fn reuse(send: &mut FrameSender, request: &Generate) {
    let said = |attempt, tokens| HeadEvent::Reused {
        header: ReusedHeader {
            request: request.request.0,
            attempt,
            choice: request.choice,
            tokens,
            reserved: 0,
        },
    };
    say(send, said(request.attempt.0, request.prompt_len - 1)).await;
    say(send, said(request.attempt.0.wrapping_sub(1), 0)).await;
}

async fn play(send: &mut FrameSender, request: &Generate, script: &Script) {
    let tokens = script.tokens.iter().take(request.max_tokens as usize);
    let known = request.tokens.len() - request.prompt_len as usize;
    let mut sent = known as u32;
    if request.attempt.0 > 0 {
        // What an attempt before it might still have said, and what is known already.
        say(send, token_event(request, request.attempt.0 - 1, sent, 3)).await;
        if sent > 0 {
            say(send, token_event(request, request.attempt.0, sent - 1, 3)).await;
        }
    }
    for (index, token) in tokens.enumerate().skip(known) {
        if index > known && !script.pace.is_zero() {
            tokio::time::sleep(script.pace).await;
        }
        say(send, token_event(request, request.attempt.0, index as u32, *token)).await;
        sent += 1;
    }
    let by_length = sent == request.max_tokens;
    let done = |stop_token| HeadEvent::Done {
        header: DoneHeader {
            request: request.request.0,
            attempt: request.attempt.0,
            choice: request.choice,
            reason: if by_length { FinishReason::Length } else { FinishReason::Stop } as u32,
            tokens: sent,
            preemptions: 0,
            stop_token: if by_length { u32::MAX } else { stop_token },
        },
        reason: if by_length { FinishReason::Length } else { FinishReason::Stop },
    };
    match script.end {
        End::Done(stop) => say(send, done(stop)).await,
        End::Failed(code, message) => {
            let header = FailedHeader {
                request: request.request.0,
                attempt: request.attempt.0,
                choice: request.choice,
                code: u32::from(code.number()),
                reserved: 0,
            };
            let message = WireError::new(code, message).message;
            say(send, HeadEvent::Failed { header, code, message }).await;
        }
        End::Silence => std::future::pending().await,
        End::Cut => {}
        End::Reset => send.reset(close_code::STALE),
        End::Gap => say(send, token_event(request, request.attempt.0, sent + 1, 1)).await,
        End::Twice => {
            say(send, token_event(request, request.attempt.0, sent - 1, 1)).await;
            say(send, token_event(request, request.attempt.0 + 1, sent, 1)).await;
            say(send, done(1)).await;
        }
    }
}

/// Token `index` has log-probability -(index + 1)/2; its candidates are itself and the ids above it,
/// each one less likely.
fn token_event(request: &Generate, attempt: u32, index: u32, token: TokenId) -> HeadEvent {
    let wanted = request.sampling.logprobs;
    let logprob = -(index as f32 + 1.0) / 2.0;
    let candidates = match wanted {
        NO_LOGPROBS => Vec::new(),
        count => (0..count)
            .map(|i| CandidateRecord { token: token + i, logprob: logprob - i as f32 })
            .collect(),
    };
    let header = TokenHeader {
        request: request.request.0,
        attempt,
        choice: request.choice,
        index,
        token,
        logprob: if wanted == NO_LOGPROBS { f32::NAN } else { logprob },
        candidates: candidates.len() as u32,
        queue_us: 10,
        prefill_us: 20,
    };
    HeadEvent::Token { header, candidates }
}

async fn say(send: &mut FrameSender, event: HeadEvent) {
    let (kind, header, body) = event.encode();
    if send.send_encoded(kind, &header, body).await.is_err() {
        // The coordinator has hung up: the reset ends this.
        std::future::pending().await
    }
}
