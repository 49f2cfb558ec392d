//! llama.cpp's programs, as `scripts/llama-cpp.sh` builds them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::process_memory;
use crate::processes::pass;

/// How long one of them may take.
const RUN_TIMEOUT: Duration = Duration::from_secs(600);

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How long a server may take until it listens.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the programs are.
#[derive(Clone, Debug)]
pub(super) struct Llama {
    folder: PathBuf,
}

/// What a run has said, and the most memory that it took.
pub(super) struct Said {
    pub out: String,
    pub peak: u64,
}

/// Where its layers are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    /// In the process, with so many threads.
    Here(usize),
    /// On these servers, half of them each.
    Servers(&'a Servers),
}

/// `ggml-rpc-server` processes of a thread each. Killed when dropped.
#[derive(Debug)]
pub(super) struct Servers {
    children: Vec<Child>,
    addresses: Vec<String>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Servers {
    /// The most memory of each.
    pub fn peaks(&self) -> Result<Vec<u64>> {
        self.children.iter().map(|child| process_memory(child.id(), "VmHWM")).collect()
    }
}

impl Place<'_> {
    fn args(self) -> Vec<String> {
        match self {
            Place::Here(threads) => vec!["-t".to_owned(), threads.to_string()],
            Place::Servers(servers) => {
                let even = vec!["1"; servers.addresses.len()].join("/");
                let rpc = servers.addresses.join(",");
                ["-t", "1", "-ngl", "99", "--rpc", &rpc, "-ts", &even].map(str::to_owned).to_vec()
            }
        }
    }
}

impl Llama {
    /// Those in this folder.
    pub fn open(folder: &Path) -> Result<Self> {
        for name in ["llama-bench", "llama-batched-bench", "llama-quantize", "ggml-rpc-server"] {
            let path = folder.join(name);
            ensure!(
                path.exists(),
                "{} is missing; `make bench-peers` builds it with scripts/llama-cpp.sh, or say where it is with --llama",
                path.display()
            );
        }
        Ok(Self { folder: folder.to_owned() })
    }

    /// A file in another precision beside this one, where it is not there yet.
    pub fn quantize(&self, f16: &Path, to: &str) -> Result<PathBuf> {
        let file = f16.with_file_name(format!("{to}.gguf"));
        if !file.exists() {
            let part = f16.with_file_name(format!("{to}.gguf.part"));
            // All matrices in that format, as Shoal reads them, too.
            let mut command = Command::new(self.folder.join("llama-quantize"));
            command.arg("--pure").arg(f16).arg(&part).arg(to);
            run(command)?;
            std::fs::rename(part, &file)?;
        }
        Ok(file)
    }

    /// Tokens in a second of a prompt of `prompt` tokens, and of `tokens` tokens behind it.
    pub fn bench(
        &self,
        model: &Path,
        place: Place<'_>,
        prompt: usize,
        tokens: u32,
    ) -> Result<([f64; 2], u64)> {
        let of = |args: [&str; 6]| -> Result<(f64, u64)> {
            let mut command = Command::new(self.folder.join("llama-bench"));
            command
                .arg("-m")
                .arg(model)
                .args(["-r", "1", "-o", "json"])
                .args(args)
                .args(place.args());
            let said = run(command)?;
            let found: Value = serde_json::from_str(&said.out)
                .with_context(|| format!("llama-bench said `{}`", said.out))?;
            let rate = found[0]["avg_ts"].as_f64().context("no `avg_ts` of llama-bench")?;
            Ok((rate, said.peak))
        };
        let [prompt, tokens] = [prompt.to_string(), tokens.to_string()];
        let (first, _) = of(["-p", &prompt, "-n", "0", "-d", "0"])?;
        let (next, peak) = of(["-p", "0", "-n", &tokens, "-d", &prompt])?;
        Ok(([first, next], peak))
    }

    /// Tokens in a second, all streams together, of so many streams at once.
    pub fn batched(
        &self,
        model: &Path,
        threads: usize,
        streams: &[usize],
        (prompt, tokens): (usize, u32),
    ) -> Result<Vec<f64>> {
        let mut command = Command::new(self.folder.join("llama-batched-bench"));
        let list: Vec<_> = streams.iter().map(usize::to_string).collect();
        let most = streams.iter().max().copied().unwrap_or(1) * (prompt + tokens as usize);
        let [threads, prompt, tokens] =
            [threads.to_string(), prompt.to_string(), tokens.to_string()];
        command.arg("-m").arg(model).args(["-b", "2048", "-ub", "512", "--output-format", "jsonl"]);
        command.args([
            "-c",
            &most.next_multiple_of(1024).to_string(),
            "-npp",
            &prompt,
            "-ntg",
            &tokens,
        ]);
        command.args(["-npl", &list.join(","), "-t", &threads, "-tb", &threads]);
        let said = run(command)?;
        let lines = said.out.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let rates: Vec<f64> = lines.filter_map(|line| line["speed_tg"].as_f64()).collect();
        ensure!(rates.len() == streams.len(), "llama-batched-bench said `{}`", said.out);
        Ok(rates)
    }

    /// So many servers of a thread each.
    pub fn servers(&self, count: usize) -> Result<Servers> {
        let mut servers = Servers { children: Vec::new(), addresses: Vec::new() };
        for index in 0..count {
            // A port that is free now.
            let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            // As the workers that they stand beside, each on a processor of its own.
            let mut command = Command::new("taskset");
            command.args(["-c", &index.to_string()]).arg(self.folder.join("ggml-rpc-server"));
            command.args(["-H", "127.0.0.1", "-t", "1", "-p", &port.to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            servers.children.push(command.spawn().context("cannot start ggml-rpc-server")?);
            servers.addresses.push(format!("127.0.0.1:{port}"));
        }
        let until = Instant::now() + SERVER_TIMEOUT;
        for address in &servers.addresses {
            while std::net::TcpStream::connect(address).is_err() {
                ensure!(Instant::now() < until, "ggml-rpc-server does not listen at {address}");
                pass(LOOK);
            }
        }
        Ok(servers)
    }
}

/// Runs a program to its end; its peak of memory is what it was last seen with.
fn run(mut command: Command) -> Result<Said> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = tempfile::tempfile()?;
    let err = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(err.try_clone()?);
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let until = Instant::now() + RUN_TIMEOUT;
    let mut peak = 0;
    let status = loop {
        peak = process_memory(child.id(), "VmHWM").unwrap_or(peak).max(peak);
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{name} takes longer than {RUN_TIMEOUT:?}");
        }
        pass(LOOK);
    };
    let read = |mut file: std::fs::File| -> Result<String> {
        use std::io::{Read as _, Seek as _};
        file.rewind()?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let out = read(out)?;
    if !status.success() {
        let said = read(err)?;
        let last: Vec<_> = said.lines().rev().take(5).collect();
        bail!("{name} ended with {status}: {}", last.join(" / "));
    }
    Ok(Said { out, peak })
}
