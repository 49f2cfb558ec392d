//! Processes that run a cluster: configuration in, a node, a drain in order. The only files that name
//! the two libraries are `coordinator`, `alone` and `worker`, and `args`, which reads a store's URL.

pub mod alone;
pub mod announce;
pub mod coordinator;
pub mod lock;
pub mod stop;
pub mod up;
pub mod worker;

use std::time::Duration;

use shoal_protocol::error::WireError;
use shoal_protocol::quic::ConnectError;

use crate::failure::Failure;

/// How long a node may take to finish what runs before it ends anyway: longer than a shard's own
/// drain (5 s), so that streams that are cut off still get their last words.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(8);

/// Logs go to stderr: what SHOAL_LOG says (`info`, `debug`, `shoal_coordinator=trace`), else `info`.
pub fn log_to_stderr(default: &str) {
    use tracing_subscriber::EnvFilter;

    let filter = EnvFilter::try_from_env("SHOAL_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    // It fails only where a subscriber is set already, and then logs go there.
    let _ = subscriber.try_init();
}

/// A start that failed, in words, with the code that its cause deserves. `needs_a_person`: the next start would
/// fail so too, and a supervisor must not try it.
fn explain_start(
    error: impl std::error::Error + Send + Sync + 'static,
    needs_a_person: bool,
) -> Failure {
    let error = anyhow::Error::new(error);
    let message = words(&error);
    for cause in error.chain() {
        if let Some(refused) = cause.downcast_ref::<WireError>() {
            return Failure { message, ..Failure::from(refused.clone()) };
        }
        match cause.downcast_ref::<ConnectError>() {
            // It was reached, and is the wrong one.
            Some(ConnectError::OtherCluster { .. }) => return Failure::refused(message),
            Some(_) => return Failure::unreachable(message),
            None => {}
        }
    }
    if needs_a_person { Failure::refused(message) } else { Failure::failed(message) }
}

/// An error and its causes. Many errors quote their cause already; nothing is said twice.
fn words(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !said.contains(&cause) {
            let link = if said.is_empty() { "" } else { ": " };
            said = format!("{said}{link}{cause}");
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::failure::Exit;

    #[derive(Debug, thiserror::Error)]
    enum StartError {
        #[error("cannot listen: {0}; `:0` picks a free one")]
        Listen(#[source] io::Error),
        #[error("cannot join")]
        Join(#[source] WireError),
    }

    #[test]
    fn a_start_that_failed_is_told_once_and_with_the_right_code() {
        use shoal_protocol::error::ErrorCode;

        let failed = explain_start(StartError::Listen(io::ErrorKind::AddrInUse.into()), false);
        assert_eq!(failed.message, "cannot listen: address in use; `:0` picks a free one");
        assert_eq!(failed.exit, Exit::Failed);
        let no_folder = StartError::Listen(io::ErrorKind::NotFound.into());
        assert_eq!(
            explain_start(no_folder, true).exit,
            Exit::Refused,
            "it would be tried for ever"
        );
        let refused = WireError::new(ErrorCode::BadToken, "the token is used up");
        let refused = explain_start(StartError::Join(refused), false);
        assert_eq!(refused.message, "cannot join: the token is used up");
        assert_eq!(refused.exit, Exit::Refused);
        let address = ([10, 0, 0, 1], 4000).into();
        let other = explain_start(ConnectError::OtherCluster { address }, false);
        assert!(other.message.contains("of another cluster"), "{}", other.message);
        assert_eq!(other.exit, Exit::Refused);
    }
}
