//! The only place where an error becomes a status, OpenAI's error object and public text. Text that
//! is for us alone goes to the log here.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use shoal_protocol::error::ErrorCode;

use super::auth::Denied;
use super::refusal::Refusal;
use super::tokenize::{Gone, LoadError};
use crate::recovery::RecoveryError;
use crate::router::RouteError;

/// An error as a client sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// What kind: the label is the `reason` in the metrics.
    pub code: ErrorCode,
    /// The HTTP status.
    pub status: StatusCode,
    /// Words for a person.
    pub message: String,
    /// The parameter at fault.
    pub param: Option<String>,
    /// When to try again.
    pub retry_after: Option<Duration>,
    /// OpenAI's word for it where it is not that of the code; then it is the `reason` too.
    pub word: Option<&'static str>,
}

/// The value of the `reason` label; travels with the response to the counter of requests.
#[derive(Clone, Copy, Debug)]
pub struct Reason(pub &'static str);

/// `{"error": {…}}`: OpenAI's shape.
#[derive(Serialize)]
struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: &'static str,
}

impl ApiError {
    /// An error whose status follows from its code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let status = status(code);
        Self { code, status, message: message.into(), param: None, retry_after: None, word: None }
    }

    /// An error of HTTP's own, such as 404 or 413.
    pub fn http(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, ..Self::new(ErrorCode::InvalidRequest, message) }
    }

    /// The same error, about this parameter.
    pub fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The JSON that clients get, as a body or as an event in the middle of a stream.
    pub fn json(&self) -> String {
        let inner = Inner {
            message: &self.message,
            r#type: kind(self.status),
            param: self.param.as_deref(),
            code: self.word.unwrap_or_else(|| openai_code(self.code)),
        };
        // A struct of texts always serialises.
        serde_json::to_string(&Body { error: inner }).unwrap_or_default()
    }
}

/// Which status a code gets.
fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::Unsupported | ErrorCode::ContextTooLong => {
            StatusCode::BAD_REQUEST
        }
        ErrorCode::BadToken => StatusCode::UNAUTHORIZED,
        ErrorCode::PermissionDenied => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::AlreadyExists => StatusCode::CONFLICT,
        // Nobody reads it: the client is gone. nginx's number, for the metrics.
        ErrorCode::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        ErrorCode::Overloaded => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::NotReady
        | ErrorCode::WorkerLost
        | ErrorCode::Draining
        | ErrorCode::StaleGeneration
        | ErrorCode::StorageFailed
        | ErrorCode::DoesNotFit => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        // Clients try a 5xx again by themselves.
        ErrorCode::Quarantined => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::ProtocolViolation | ErrorCode::VersionMismatch => StatusCode::BAD_GATEWAY,
        ErrorCode::BadModel | ErrorCode::ComputeFailed | ErrorCode::Internal => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// OpenAI's `type` for a status.
fn kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        // As OpenAI has it: a wrong key is a wrong request.
        401 => "invalid_request_error",
        403 => "permission_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

/// OpenAI's `code`: its own word where it has one that clients look for, else our label.
fn openai_code(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::ContextTooLong => "context_length_exceeded",
        ErrorCode::NotFound => "model_not_found",
        other => other.label(),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.retry_after {
            // HTTP counts in whole seconds; 0 would mean at once.
            headers.insert(header::RETRY_AFTER, after.as_secs().max(1).into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Reason(self.word.unwrap_or(self.code.label())));
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let error = Self::new(refusal.code(), refusal.to_string());
        match refusal.param() {
            Some(param) => error.about(param),
            None => error,
        }
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let (code, word) = match &denied {
            Denied::Rate { .. } | Denied::Concurrent { .. } => {
                (ErrorCode::Overloaded, "rate_limit_exceeded")
            }
            Denied::Missing
            | Denied::NotBearer
            | Denied::Unknown
            | Denied::Expired { .. }
            | Denied::Revoked { .. } => (ErrorCode::BadToken, "invalid_api_key"),
        };
        let retry_after = denied.retry_after();
        Self { retry_after, word: Some(word), ..Self::new(code, denied.to_string()) }
    }
}

impl From<RouteError> for ApiError {
    fn from(error: RouteError) -> Self {
        let api =
            Self { retry_after: error.retry_after(), ..Self::new(error.code(), error.to_string()) };
        match error {
            RouteError::NotFound { .. } => api.about("model"),
            RouteError::NotReady { .. } | RouteError::Overloaded { .. } => api,
        }
    }
}

impl From<RecoveryError> for ApiError {
    fn from(error: RecoveryError) -> Self {
        let code = error.code();
        let retry_after = code.retryable().then_some(Duration::from_secs(1));
        Self { retry_after, ..Self::new(code, error.to_string()) }
    }
}

impl From<LoadError> for ApiError {
    fn from(error: LoadError) -> Self {
        // The file's place is the operator's business.
        tracing::error!(%error, "the text side of a model cannot be loaded");
        Self::new(
            ErrorCode::BadModel,
            "the model's tokenizer or chat template cannot be loaded; the coordinator's log names \
             the file",
        )
    }
}

impl From<Gone> for ApiError {
    fn from(error: Gone) -> Self {
        tracing::error!(%error, "tokenising failed");
        Self::new(ErrorCode::Internal, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::error::Fault;

    use super::*;

    #[test]
    fn every_code_has_a_status_that_says_whose_fault_it_is() {
        for code in ErrorCode::ALL {
            let status = status(*code).as_u16();
            let callers = match code {
                // Not the fault of the one who asks for an answer.
                ErrorCode::BadModel | ErrorCode::DoesNotFit => false,
                ErrorCode::Overloaded => true,
                other => other.fault() == Fault::Caller,
            };
            assert_eq!((400..500).contains(&status), callers, "{code}: {status}");
        }
    }

    #[test]
    fn errors_have_openais_shape() {
        let error = ApiError::new(ErrorCode::NotFound, "no \"x\"").about("model");
        assert_eq!(
            error.json(),
            r#"{"error":{"message":"no \"x\"","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#
        );
        let refusal = ApiError::from(Refusal::Unknown("tempo".to_owned()));
        assert_eq!((refusal.status.as_u16(), refusal.param.as_deref()), (400, Some("tempo")));
    }
}
