//! Processes that run a cluster: configuration in, a node, a drain in order. The only files that name
//! the two libraries are `coordinator` and `worker`.

pub mod announce;
pub mod coordinator;
pub mod stop;
pub mod up;
pub mod worker;

use std::time::Duration;

use shoal_protocol::error::WireError;
use shoal_protocol::quic::ConnectError;

use crate::failure::Failure;

/// How long a node may take to finish what runs before it ends anyway.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

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

/// A start that failed, with all its causes. One that was refused by a cluster says so in its code.
fn explain_start(error: impl std::error::Error + Send + Sync + 'static) -> Failure {
    let error = anyhow::Error::new(error);
    let message = format!("{error:#}");
    for cause in error.chain() {
        if let Some(refused) = cause.downcast_ref::<WireError>() {
            return Failure { message, ..Failure::from(refused.clone()) };
        }
        if cause.downcast_ref::<ConnectError>().is_some() {
            return Failure::unreachable(message);
        }
        let taken = |io: &std::io::Error| io.kind() == std::io::ErrorKind::AddrInUse;
        if cause.downcast_ref::<std::io::Error>().is_some_and(taken) && !message.contains("port 0")
        {
            return Failure::failed(format!(
                "{message}; stop what listens there, or let `:0` as the port pick a free one"
            ));
        }
    }
    Failure::failed(message)
}
