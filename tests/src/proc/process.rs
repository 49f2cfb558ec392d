//! One process: its output line by line, signals, and its end.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open};

pub use rustix::process::Signal;

/// Lines that may wait to be read: more than any test lets a process print.
const LINES_MAX: usize = 10_000;

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    /// What was read of stderr so far.
    said: Vec<String>,
}

/// How a process ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// All of stdout that was not read before.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
}

impl Finished {
    /// The exit code; a signal is `None`.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Checks the exit code, with everything that was printed in the message.
    pub fn expect_code(self, code: i32) -> Self {
        let signal = self.status.signal();
        assert_eq!(
            self.status.code(),
            Some(code),
            "signal {signal:?}\nstdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self
    }
}

impl Process {
    /// Starts `shoal` with these arguments, with nothing on stdin.
    pub fn shoal<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::shoal_at(super::shoal(), args)
    }

    /// The same with another build of it.
    pub fn shoal_at<A: AsRef<OsStr>>(
        binary: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let mut command = Command::new(binary);
        command.args(args).env_remove("SHOAL_CONTEXT").env_remove("SHOAL_TOKEN");
        Self::spawn(command)
    }

    /// Starts a command; stdin is empty unless the command says otherwise by `Self::spawn_with`.
    pub fn spawn(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null());
        Self::spawn_with(command)
    }

    /// Starts a command whose stdin has been set.
    pub fn spawn_with(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdout = lines(child.stdout.take().context("stdout is piped")?);
        let stderr = lines(child.stderr.take().context("stderr is piped")?);
        Ok(Self { child, stdout, stderr, said: Vec::new() })
    }

    /// The process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The writing end of its stdin, where that is a pipe.
    pub fn take_stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self::signal(self.pid(), signal)
    }

    /// The next line of stdout; an error where it ends or none comes in time.
    pub fn line(&mut self, within: Duration) -> Result<String> {
        match self.stdout.recv_timeout(within) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                bail!("no line on stdout within {within:?}; stderr: {}", self.stderr())
            }
            Err(RecvTimeoutError::Disconnected) => {
                // It has closed stdout, so its end and the rest of stderr are near.
                let status = self.child.wait();
                let rest: Vec<String> = self.stderr.iter().collect();
                self.said.extend(rest);
                bail!("stdout ended ({status:?}); stderr: {}", self.said.join("\n"))
            }
        }
    }

    /// Everything that it has said on stderr so far.
    pub fn stderr(&mut self) -> String {
        self.said.extend(self.stderr.try_iter());
        self.said.join("\n")
    }

    /// What it has said on stderr since this was last asked.
    pub fn news(&mut self) -> Vec<String> {
        let news: Vec<_> = self.stderr.try_iter().collect();
        self.said.extend(news.iter().cloned());
        news
    }

    /// Reads stderr until a line contains `words`.
    pub fn wait_for_words(&mut self, words: &str, within: Duration) -> Result<String> {
        let until = Instant::now() + within;
        if let Some(line) = self.said.iter().find(|line| line.contains(words)) {
            return Ok(line.clone());
        }
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.stderr.recv_timeout(left) {
                Ok(line) => {
                    self.said.push(line.clone());
                    if line.contains(words) {
                        return Ok(line);
                    }
                }
                Err(error) => {
                    bail!(
                        "{words:?} was not said within {within:?} ({error}); said was: {}",
                        self.stderr()
                    )
                }
            }
        }
    }

    /// Waits for its end. A process that does not end in time is an error, and is killed.
    pub fn finish(mut self, within: Duration) -> Result<Finished> {
        if !wait_until_gone(self.pid(), within)? {
            bail!("it did not end within {within:?}; stderr: {}", self.stderr());
        }
        let status = self.child.wait()?;
        let stdout: Vec<String> = self.stdout.iter().collect();
        self.said.extend(self.stderr.iter().collect::<Vec<_>>());
        let text =
            |lines: &[String]| lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        Ok(Finished { status, stdout: text(&stdout), stderr: text(&self.said) })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of a stream, read by a thread that ends with the stream.
fn lines(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = sync_channel(LINES_MAX);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

fn pid_of(pid: u32) -> Result<Pid> {
    Pid::from_raw(i32::try_from(pid)?).context("a process has a number from 1 up")
}

/// Sends a signal to any process of ours.
pub fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill_process(pid_of(pid)?, signal).with_context(|| format!("signal {signal:?} to {pid}"))
}

/// Whether a process runs; one that has ended and was not waited for does not.
pub fn is_running(pid: u32) -> Result<bool> {
    Ok(!wait_until_gone(pid, Duration::ZERO)?)
}

/// Waits for the end of any process; whether it came in time.
pub fn wait_until_gone(pid: u32, within: Duration) -> Result<bool> {
    let Ok(pidfd) = pidfd_open(pid_of(pid)?, PidfdFlags::empty()) else {
        // There is no such process (any more).
        return Ok(true);
    };
    let until = Instant::now() + within;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
