//! The one binary: runs a cluster (`up`, `coordinator`, `worker`) and operates it (the other verbs,
//! which know the admin API alone; `chat` speaks the public one).
//!
//! ```text
//! args ─► run/{up, coordinator, worker}      config ─► node ─► drain
//!             └► otlp: the node's traces, to a collector
//!      └► commands/* ─► client ══shoal-admin══► coordinator ─► output/{table, json} ─► stdout
//! ```

mod args;
mod builtin;
mod client;
mod commands;
mod failure;
mod otlp;
mod output;
mod registry;
mod run;

use std::process::ExitCode;
use std::time::Duration;

use crate::args::{Args, ChildArgs, Command, RolloutCommand};
use crate::failure::{Exit, Failure};
use crate::run::announce::Announcement;

/// How long what is left of a runtime (a blocking read, a file) may hold up the end.
const RUNTIME_END: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match Args::try_from_line(std::env::args_os().collect::<Vec<_>>()) {
        Ok(args) => end(execute(args.command)),
        Err(error) => {
            // Help goes to stdout and is no failure; a mistake goes to stderr.
            let _ = error.print();
            if error.use_stderr() { Exit::Usage.into() } else { ExitCode::SUCCESS }
        }
    }
}

fn execute(command: Command) -> Result<(), Failure> {
    let (threads, log) = match &command {
        Command::Coordinator(_) | Command::Worker(_) => (Threads::Many, "info"),
        _ => (Threads::One, "error"),
    };
    run::log_to_stderr(log);
    let child = child_args(&command);
    let runtime = threads.runtime()?;
    let outcome = runtime.block_on(async {
        match command {
            Command::Up(args) => run::up::run(args).await,
            Command::Coordinator(args) => run::coordinator::run(args).await,
            Command::Worker(args) => run::worker::run(args).await,
            Command::Token { command } => commands::token::run(command).await,
            Command::Coordinators { command } => commands::coordinators::run(command).await,
            Command::Deploy(args) => commands::deploy::run(args).await,
            Command::Undeploy(args) => commands::undeploy::run(args).await,
            Command::Status(args) => commands::status::run(args).await,
            Command::Plan(args) => commands::plan::run(args).await,
            Command::Models(args) => commands::models::run(&args),
            Command::Chat(args) => commands::chat::run(args).await,
            Command::Keys { command } => commands::keys::run(command).await,
            Command::Adapters { command } => commands::adapters::run(command).await,
            Command::Ca { command } => commands::ca::run(command).await,
            Command::Nodes { command } => commands::nodes::run(command).await,
            Command::Upgrade { command } => commands::upgrade::run(command).await,
            Command::Scale(args) => commands::scale::run(args).await,
            Command::Drain(args) => commands::drain::run(args).await,
            Command::Undrain(args) => commands::drain::undo(args).await,
            Command::Rollout { command: RolloutCommand::Status(args) } => {
                commands::rollout::status(args).await
            }
        }
    });
    if let (Err(failure), Some(ChildArgs { announce: true, .. })) = (&outcome, child) {
        Announcement::from(failure).print();
    }
    runtime.shutdown_timeout(RUNTIME_END);
    outcome
}

fn child_args(command: &Command) -> Option<ChildArgs> {
    match command {
        Command::Coordinator(args) => Some(args.child),
        Command::Worker(args) => Some(args.child),
        _ => None,
    }
}

/// How many threads a verb needs.
#[derive(Clone, Copy, Debug)]
enum Threads {
    /// An operator's verb waits for one thing at a time.
    One,
    /// A node serves many at once.
    Many,
}

impl Threads {
    fn runtime(self) -> Result<tokio::runtime::Runtime, Failure> {
        let mut builder = match self {
            Threads::One => tokio::runtime::Builder::new_current_thread(),
            Threads::Many => tokio::runtime::Builder::new_multi_thread(),
        };
        builder
            .enable_all()
            .build()
            .map_err(|error| Failure::failed(format!("cannot start the runtime: {error}")))
    }
}

fn end(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("shoal: {failure}");
            failure.exit.into()
        }
    }
}
