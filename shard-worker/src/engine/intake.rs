//! What comes in from clients: new requests, each checked once, and cancellations.

use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::AdapterId;
use shoal_protocol::plan::BLOCK_TOKENS;
use shoal_protocol::prefix::Tenant;
use shoal_protocol::request::{FinishReason, Generate, SECOND_TEXT};

use super::prefixes::Chain;
use super::sequence::Sequence;
use super::{Action, Arrival, ClientKey, Ending, Engine, failed};

impl Engine {
    /// A request comes in: it waits for its turn, or is answered at once.
    pub(super) fn submit(&mut self, key: ClientKey, mut request: Generate, tenant: Option<Tenant>) {
        let refusal = match &self.fault {
            Some(reason) => Some(WireError::new(
                ErrorCode::WorkerLost,
                format!("{reason}; try again when the deployment has recovered"),
            )),
            None => self.refusal(key, &request),
        };
        if let Some(error) = refusal {
            let event = failed(&error, request.request.0, request.attempt.0, request.choice);
            self.actions.push_back(Action::Emit { key, event });
            return;
        }
        if self.config.encodes {
            // Its vector stands for the one token of an answer.
            request.max_tokens = 1;
        }
        let arrival = Arrival(self.next_arrival);
        self.next_arrival += 1;
        let chain = self.chain(tenant, request.adapter);
        let sequence = Sequence::new(key, request, chain, self.now);
        let used_up = sequence.is_used_up(self.config.context());
        if let Some(deadline) = sequence.deadline() {
            self.deadlines.insert((deadline, arrival));
        }
        self.keys.insert(key, arrival);
        self.waiting.insert(arrival);
        self.sequences.insert(arrival, sequence);
        if used_up {
            // A resumed answer of which only the end was not told.
            let reason = FinishReason::Length;
            self.end(arrival, Some(Ending::Done { reason, stop_token: None }));
        }
    }

    /// The chain of a sequence that shares blocks. Those of an encoder read in both directions, so that
    /// each block depends on what follows it.
    fn chain(&self, tenant: Option<Tenant>, adapter: Option<AdapterId>) -> Option<Chain> {
        let key = self.config.prefix_key.as_ref().filter(|_| !self.config.encodes)?;
        Some(Chain::new(key, tenant?, adapter))
    }

    /// The client went away.
    pub(super) fn cancel(&mut self, key: ClientKey) {
        if let Some(&arrival) = self.keys.get(&key) {
            self.end(arrival, None);
        }
    }

    /// Why a request cannot be taken.
    fn refusal(&self, key: ClientKey, request: &Generate) -> Option<WireError> {
        let refuse = |code, text| Some(WireError::new(code, text));
        if self.keys.contains_key(&key) {
            let text = format!("the stream {} has a request already", key.0);
            return refuse(ErrorCode::Internal, text);
        }
        let (prompt, tokens) = (request.prompt_len as usize, request.tokens.len());
        if prompt == 0 || prompt > tokens {
            let text = format!("a prompt of {prompt} tokens out of {tokens}; send at least one");
            return refuse(ErrorCode::InvalidRequest, text);
        }
        if let Err(error) = request.sampling.check() {
            return refuse(ErrorCode::InvalidRequest, error.to_string());
        }
        let encodes = self.config.encodes;
        if encodes && (request.max_tokens > 0 || tokens > prompt) {
            let text = "this model is an encoder: it makes a vector of its input and writes no text; \
                        ask for embeddings or a ranking";
            return refuse(ErrorCode::InvalidRequest, text.to_owned());
        }
        let (vocab, second) = (self.config.vocab, if encodes { SECOND_TEXT } else { 0 });
        if let Some(token) = request.tokens.iter().find(|&&token| token & !second >= vocab) {
            let text = format!("token id {token} is not below the vocabulary's size, {vocab}");
            return refuse(ErrorCode::InvalidRequest, text);
        }
        let context = self.config.context() as usize;
        if prompt >= context || tokens > context {
            return refuse(ErrorCode::ContextTooLong, self.too_long_text(request));
        }
        let (running_max, queue_max) = (self.config.limits.sequences_max, self.config.queue_max);
        if self.sequences.len() >= running_max as usize + queue_max as usize {
            let text = format!(
                "{} sequences run and {} wait; the replica takes {running_max} and {queue_max}; \
                 try again later",
                self.running.len(),
                self.waiting.len()
            );
            return refuse(ErrorCode::Overloaded, text);
        }
        None
    }

    fn too_long_text(&self, request: &Generate) -> String {
        let limits = &self.config.limits;
        if self.config.encodes {
            return format!(
                "the input has {} tokens, but the replica takes {} at most: the smaller of its \
                 context of {} and a step's {} rows; shorten it, or have it cut with `truncate`",
                request.tokens.len(),
                self.config.context().saturating_sub(1),
                limits.context_max,
                limits.step_rows_max,
            );
        }
        let (prompt, answer) =
            (request.prompt_len as usize, request.tokens.len() - request.prompt_len as usize);
        format!(
            "the prompt has {prompt} tokens and the answer {} or more, but the replica holds {} \
             tokens of one sequence: the smaller of its context of {} and {} KV blocks x {} = {}; \
             shorten the prompt",
            answer.max(1),
            self.config.context(),
            limits.context_max,
            limits.kv_blocks,
            BLOCK_TOKENS,
            u64::from(limits.kv_blocks) * u64::from(BLOCK_TOKENS),
        )
    }
}
