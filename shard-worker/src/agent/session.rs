//! The conversation with a coordinator (`shoal-ctl`): register, report, be told. It begins again for
//! as long as the worker lives; the shards never notice.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_protocol::control::{
    CoordinatorMessage, MESSAGE_LEN_MAX, Register, Report, WorkerMessage,
};
use shoal_protocol::id::Role;
use shoal_protocol::quic::{Alpn, Endpoint, Expect, FrameReceiver, FrameSender, close_code};
use tokio::sync::{mpsc, watch};

use super::renewal::Renewal;

/// How long a coordinator may take to be reached and to say `Welcome`.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause after the first failure; it doubles up to `RETRY_PAUSE_MAX`.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The longest pause: a coordinator that is back is found again within so long.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Reports that follow each other sooner are sent as one.
const REPORT_PAUSE: Duration = Duration::from_millis(10);

/// How often to ask for a new certificate: a third of a certificate's life, so that one failure is
/// not the end.
const RENEW_PERIOD: Duration = Duration::from_secs(8 * 3600);

/// What a session needs.
#[derive(Debug)]
pub(super) struct Session {
    pub endpoint: Endpoint,
    pub coordinator: SocketAddr,
    pub register: Register,
    /// What to report; sent anew to each new coordinator.
    pub reports: watch::Receiver<Report>,
    /// Answers to probes.
    pub answers: mpsc::Receiver<WorkerMessage>,
    /// What the coordinator says.
    pub told: mpsc::Sender<CoordinatorMessage>,
    /// Takes new certificates.
    pub renewal: Renewal,
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("{0}")]
    Unreachable(String),
    #[error("the coordinator refuses this worker: {0}")]
    Refused(shoal_protocol::error::WireError),
    #[error("the coordinator said {0} where a welcome was expected")]
    NoWelcome(&'static str),
    #[error("no welcome within {WELCOME_TIMEOUT:?}")]
    Timeout,
    #[error("the conversation broke off: {0}")]
    Broken(String),
    #[error("the agent has ended")]
    AgentEnded,
}

impl Session {
    /// Holds conversations until the agent ends.
    pub async fn run(mut self) {
        let mut pause = RETRY_PAUSE_MIN;
        // A worker that cannot register says so once, not every second.
        let mut last_words = String::new();
        loop {
            match self.converse(&mut pause).await {
                SessionEnd::AgentEnded => return,
                end => {
                    let words = end.to_string();
                    if words == last_words {
                        tracing::debug!("{words}");
                    } else {
                        tracing::warn!("no conversation with {}: {words}", self.coordinator);
                        last_words = words;
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.told.closed() => return,
            }
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn converse(&mut self, pause: &mut Duration) -> SessionEnd {
        let connecting = self.endpoint.connect(
            self.coordinator,
            Expect::Role(Role::Coordinator),
            Alpn::Control,
            WELCOME_TIMEOUT,
        );
        let connection = tokio::select! {
            connected = connecting => match connected {
                Ok(connection) => connection,
                Err(error) => return SessionEnd::Unreachable(error.to_string()),
            },
            () = self.told.closed() => return SessionEnd::AgentEnded,
        };
        let registering = async {
            let (mut sender, mut receiver) =
                connection.open_bi().await.map_err(|e| SessionEnd::Broken(e.to_string()))?;
            register(&mut sender, &mut receiver, &self.register).await?;
            Ok((sender, receiver))
        };
        let registered = tokio::time::timeout(WELCOME_TIMEOUT, registering).await;
        let end = match registered.unwrap_or(Err(SessionEnd::Timeout)) {
            Err(end) => end,
            Ok((sender, receiver)) => {
                *pause = RETRY_PAUSE_MIN;
                tracing::info!("registered at {} as {}", self.coordinator, self.register.node);
                let listen = listen(receiver, &self.told, &self.renewal);
                let report = report(sender, &mut self.reports, &mut self.answers, &self.renewal);
                tokio::select! {
                    end = listen => end,
                    end = report => end,
                }
            }
        };
        connection.close(close_code::DONE, &end.to_string());
        end
    }
}

async fn register(
    sender: &mut FrameSender,
    receiver: &mut FrameReceiver,
    register: &Register,
) -> Result<(), SessionEnd> {
    let broken = |why: String| SessionEnd::Broken(why);
    let message = WorkerMessage::Register(register.clone());
    sender.send_message(&message, MESSAGE_LEN_MAX).await.map_err(|e| broken(e.to_string()))?;
    let answer = receiver.message(MESSAGE_LEN_MAX).await.map_err(|e| broken(e.to_string()))?;
    match answer {
        Some(CoordinatorMessage::Welcome { version }) => {
            let ours = register.versions;
            if (ours.min..=ours.max).contains(&version) {
                Ok(())
            } else {
                Err(SessionEnd::NoWelcome("a version that this worker does not speak"))
            }
        }
        Some(CoordinatorMessage::Refused(error)) => Err(SessionEnd::Refused(error)),
        Some(CoordinatorMessage::Assign(_)) => Err(SessionEnd::NoWelcome("Assign")),
        Some(CoordinatorMessage::Probe { .. }) => Err(SessionEnd::NoWelcome("Probe")),
        Some(CoordinatorMessage::Drain) => Err(SessionEnd::NoWelcome("Drain")),
        Some(CoordinatorMessage::Renewed { .. }) => Err(SessionEnd::NoWelcome("Renewed")),
        None => Err(SessionEnd::NoWelcome("nothing")),
    }
}

async fn listen(
    mut receiver: FrameReceiver,
    told: &mpsc::Sender<CoordinatorMessage>,
    renewal: &Renewal,
) -> SessionEnd {
    loop {
        match receiver.message(MESSAGE_LEN_MAX).await {
            Ok(Some(CoordinatorMessage::Renewed { certificate })) => renewal.take(certificate),
            Ok(Some(message)) => {
                if told.send(message).await.is_err() {
                    return SessionEnd::AgentEnded;
                }
            }
            Ok(None) => return SessionEnd::Broken("the coordinator ended it".to_owned()),
            Err(error) => return SessionEnd::Broken(error.to_string()),
        }
    }
}

async fn report(
    mut sender: FrameSender,
    reports: &mut watch::Receiver<Report>,
    answers: &mut mpsc::Receiver<WorkerMessage>,
    renewal: &Renewal,
) -> SessionEnd {
    reports.mark_changed();
    // The first one at once: a worker may come back with a certificate that is almost a day old.
    let mut renew = tokio::time::interval(RENEW_PERIOD);
    loop {
        let message = tokio::select! {
            changed = reports.changed() => match changed {
                Ok(()) => {
                    tokio::time::sleep(REPORT_PAUSE).await;
                    WorkerMessage::Report(reports.borrow_and_update().clone())
                }
                Err(_) => return SessionEnd::AgentEnded,
            },
            Some(answer) = answers.recv() => answer,
            _ = renew.tick() => match renewal.request() {
                Some(message) => message,
                None => continue,
            },
        };
        if let Err(error) = sender.send_message(&message, MESSAGE_LEN_MAX).await {
            return SessionEnd::Broken(error.to_string());
        }
    }
}
