//! ○ Everything that can be wrong with a request, in one enum.

use shoal_protocol::error::ErrorCode;
use shoal_protocol::id::TokenId;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The body is no JSON.
    #[error("the request's body is not valid JSON: {0}")]
    Json(String),
    /// The body is JSON, but no object.
    #[error("the request's body is {0}; expected a JSON object")]
    NotAnObject(&'static str),
    /// A parameter that must be there is not.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A parameter of the wrong type.
    #[error("`{param}` is {found}; expected {expected}")]
    WrongType {
        /// The parameter, with its place where it is nested.
        param: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A parameter out of its range.
    #[error("`{param}` is {found}; it must be {expected}")]
    OutOfRange {
        /// The parameter.
        param: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A parameter that is known and not supported yet.
    #[error("`{param}` is not supported yet; leave it out, or set it to {neutral}")]
    Unsupported {
        /// The parameter.
        param: String,
        /// The value that would be taken.
        neutral: &'static str,
    },
    /// A parameter that neither OpenAI nor vLLM documents.
    #[error("`{0}` is not a known parameter; leave it out")]
    Unknown(String),
    /// Parameters that do not go together.
    #[error("{why}")]
    Conflict {
        /// The parameter to change.
        param: &'static str,
        /// What does not go together, and what to do.
        why: String,
    },
    /// A prompt without tokens.
    #[error("the prompt has no tokens; a model needs at least one to go on from")]
    EmptyPrompt {
        /// Where the prompt stands.
        param: &'static str,
    },
    /// A token id that the model does not have.
    #[error("token id {id} is not in the model's vocabulary of {vocab}")]
    NotInVocabulary {
        /// Where the prompt stands.
        param: &'static str,
        /// The id.
        id: TokenId,
        /// The vocabulary's size.
        vocab: u32,
    },
    /// Prompt and answer do not fit.
    #[error(
        "this model's context has {context} tokens, and the request needs {} ({prompt} in the \
         prompt, {answer} for the answer); shorten the prompt or ask for fewer tokens",
        prompt + answer
    )]
    ContextTooLong {
        /// Where the prompt stands.
        param: &'static str,
        /// The context's length.
        context: u64,
        /// Tokens of the prompt.
        prompt: u64,
        /// Tokens that were asked for.
        answer: u64,
    },
    /// An input that is longer than an encoder takes.
    #[error(
        "input {index} has {tokens} tokens, and this model takes {max} at most; shorten it, or send \
         `truncate`: true to have it cut"
    )]
    InputTooLong {
        /// Where the inputs stand.
        param: &'static str,
        /// Which of them, from 0.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// The model's bound.
        max: usize,
    },
    /// Text for a model that takes and gives token ids alone.
    #[error("this model has no tokenizer: {advice}")]
    NoText {
        /// The parameter that needs text.
        param: &'static str,
        /// What to do instead.
        advice: &'static str,
    },
    /// The tokenizer or the chat template refused.
    #[error("{why}")]
    NotEncoded {
        /// Where the prompt stands.
        param: &'static str,
        /// What it said.
        why: String,
    },
}

impl Refusal {
    /// The parameter that is at fault.
    pub fn param(&self) -> Option<&str> {
        match self {
            Refusal::Json(_) | Refusal::NotAnObject(_) => None,
            Refusal::Missing(param)
            | Refusal::Conflict { param, .. }
            | Refusal::EmptyPrompt { param }
            | Refusal::NotInVocabulary { param, .. }
            | Refusal::ContextTooLong { param, .. }
            | Refusal::InputTooLong { param, .. }
            | Refusal::NoText { param, .. }
            | Refusal::NotEncoded { param, .. } => Some(param),
            Refusal::Unknown(param)
            | Refusal::WrongType { param, .. }
            | Refusal::OutOfRange { param, .. }
            | Refusal::Unsupported { param, .. } => Some(param),
        }
    }

    /// Its code.
    pub fn code(&self) -> ErrorCode {
        match self {
            Refusal::Unsupported { .. } => ErrorCode::Unsupported,
            Refusal::ContextTooLong { .. } | Refusal::InputTooLong { .. } => {
                ErrorCode::ContextTooLong
            }
            _ => ErrorCode::InvalidRequest,
        }
    }
}
