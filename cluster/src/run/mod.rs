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
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

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
        .with_ansi(false)
        .event_format(OneLine(tracing_subscriber::fmt::format()));
    // It fails only where a subscriber is set already, and then logs go there.
    let _ = subscriber.try_init();
}

/// One event, one line: what is said of a model, or what a peer said, may have several, and whoever reads a log line
/// by line would take the second one for an event.
struct OneLine<F>(F);

impl<S, N, F> FormatEvent<S, N> for OneLine<F>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        writeln!(writer, "{}", in_one_line(&text))
    }
}

/// The lines of a text behind each other, without what else moves a terminal's cursor.
fn in_one_line(text: &str) -> String {
    let lines = text.lines().map(|line| line.trim().replace(char::is_control, " "));
    lines.filter(|line| !line.is_empty()).fold(String::new(), |said, line| {
        let link = match said.chars().last() {
            None => "",
            Some(':' | ';' | ',') => " ",
            Some(_) => "; ",
        };
        said + link + &line
    })
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

    /// Takes what is logged.
    #[derive(Clone, Default)]
    struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn one_event_is_one_line_of_the_log() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(OneLine(tracing_subscriber::fmt::format().without_time()));
        tracing::subscriber::with_default(subscriber.finish(), || {
            tracing::warn!(node = "w1", "Loading:\n  layer 1\r\n\n\tlayer 2\n");
            tracing::info!("ready");
        });
        let bytes = log.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("WARN") && lines[0].contains("node=\"w1\""), "{text}");
        assert!(lines[0].contains("Loading: layer 1; layer 2"), "{text}");
        assert!(lines[1].ends_with("ready"), "{text}");
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
