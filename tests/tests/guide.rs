//! The operator's guide does what it says: its blocks that begin with `# run: loopback` are run in order,
//! in one shell, and what is shown right below a block is what it printed.

use std::fmt::Write as _;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_tests::proc::{Process, shoal};

const GUIDE: &str = include_str!("../../docs/operating.md");

/// The first line of a block that is run.
const MARK: &str = "# run: loopback";

/// For the whole guide, with a build for debugging on a machine of two cores.
const WITHIN: Duration = Duration::from_secs(240);

/// The addresses that the guide shows, and the variables that give others to its commands.
const ADDRESSES: &[(&str, &str)] = &[
    ("C1", "127.0.0.1:4001"),
    ("C2", "127.0.0.1:4002"),
    ("C3", "127.0.0.1:4003"),
    ("C4", "127.0.0.1:4004"),
    ("API1", "127.0.0.1:8001"),
    ("API2", "127.0.0.1:8002"),
    ("API3", "127.0.0.1:8003"),
    ("API4", "127.0.0.1:8004"),
];

/// A block that is run, and the lines that are shown below it.
#[derive(Debug)]
struct Block<'a> {
    line: usize,
    commands: Vec<&'a str>,
    shown: Vec<&'a str>,
}

/// The blocks of a guide that are run.
fn blocks(guide: &str) -> Vec<Block<'_>> {
    let lines: Vec<&str> = guide.lines().collect();
    let inside = |from: usize| -> Vec<&str> {
        lines[from..].iter().take_while(|line| **line != "```").copied().collect()
    };
    let mut found = Vec::new();
    for (at, pair) in lines.windows(2).enumerate() {
        if pair != ["```sh", MARK] {
            continue;
        }
        let commands = inside(at + 2);
        let end = at + 2 + commands.len();
        let is_shown = lines.get(end + 1) == Some(&"```text");
        let shown = if is_shown { inside(end + 2) } else { Vec::new() };
        found.push(Block { line: at + 1, commands, shown });
    }
    found
}

fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a line was printed that is as shown, where `…` stands for anything.
fn is_as_shown(printed: &str, shown: &str) -> bool {
    let printed = words(printed);
    let mut rest = printed.as_str();
    shown.split('…').map(words).all(|piece| match rest.split_once(piece.as_str()) {
        Some((_, behind)) => {
            rest = behind;
            true
        }
        None => false,
    })
}

/// The first line of those shown that was not printed behind the ones before it.
fn first_missing<'a>(printed: &str, shown: &[&'a str]) -> Option<&'a str> {
    let mut printed = printed.lines();
    shown.iter().find(|shown| !printed.any(|line| is_as_shown(line, shown))).copied()
}

/// An address with a port that is free for TCP and UDP.
fn free_address() -> Result<String> {
    loop {
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let address = tcp.local_addr()?;
        if UdpSocket::bind(address).is_ok() {
            return Ok(address.to_string());
        }
    }
}

/// A script that runs each block in the same shell and keeps what it printed.
fn script(blocks: &[Block<'_>], folder: &Path) -> Result<String> {
    // What a block started ends with the script, however that ends.
    let mut script =
        "set -euo pipefail\ntrap 'kill -KILL $(jobs -p) 2> /dev/null || true' EXIT\n".to_owned();
    for (at, block) in blocks.iter().enumerate() {
        std::fs::write(folder.join(format!("{at}.sh")), block.commands.join("\n") + "\n")?;
        let path = folder.display();
        writeln!(script, ". {path}/{at}.sh > {path}/{at}.out 2>&1; : > {path}/{at}.done")?;
    }
    Ok(script)
}

#[test]
fn the_commands_of_the_operators_guide_do_what_it_says() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path();
    std::os::unix::fs::symlink(shoal(), path.join("shoal"))?;
    let blocks = blocks(GUIDE);
    ensure!(blocks.len() >= 10, "the guide has only {} blocks that are run", blocks.len());
    std::fs::write(path.join("guide.sh"), script(&blocks, path)?)?;

    // It ends its whole group of processes.
    let mut command = Command::new("timeout");
    command.arg("--kill-after=5").arg(WITHIN.as_secs().to_string());
    command.arg("bash").arg(path.join("guide.sh")).env("DATA", path.join("data"));
    let paths = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{paths}", path.display()));
    for name in ["SHOAL_CONTEXT", "SHOAL_TOKEN", "SHOAL_API_KEY"] {
        command.env_remove(name);
    }
    let mut addresses = Vec::new();
    for (variable, shown) in ADDRESSES {
        let address = free_address()?;
        command.env(variable, &address);
        addresses.push((*shown, address));
    }
    let finished = Process::spawn(command)?.finish(WITHIN + Duration::from_secs(10))?;

    for (at, block) in blocks.iter().enumerate() {
        let Block { line, commands, shown } = block;
        let commands = commands.join("\n");
        let printed = std::fs::read_to_string(path.join(format!("{at}.out"))).unwrap_or_default();
        let place = format!("docs/operating.md:{line}\n{commands}\n--- printed\n{printed}");
        let ended = path.join(format!("{at}.done")).exists();
        ensure!(ended, "a command failed ({}, {}): {place}", finished.status, finished.stderr);
        let back = |text: String, (shown, real): &(&str, String)| text.replace(real, shown);
        let as_shown = addresses.iter().fold(printed, back);
        let missing = first_missing(&as_shown, shown);
        ensure!(missing.is_none(), "not printed: {}\n{place}", missing.context("a line")?);
    }
    ensure!(finished.code() == Some(0), "{finished:?}");
    Ok(())
}

#[test]
fn a_block_and_what_is_shown_right_below_it_are_found() {
    let guide = "```sh\nshoal up\n```\n\n```sh\n# run: loopback\na\nb\n```\n```text\nx …\n```\n\n\
                 ```sh\n# run: loopback\nc\n```\n\n```text\nof another\n```\n";
    let found = blocks(guide);
    let all: Vec<_> = found.iter().map(|b| (b.line, b.commands.clone(), b.shown.clone())).collect();
    assert_eq!(all, [(5, vec!["a", "b"], vec!["x …"]), (14, vec!["c"], vec![])]);
}

#[test]
fn what_was_not_printed_in_its_order_is_missing() {
    let printed = "NODE  LINK\nw1    up   12:00 no\nw2    down\n";
    assert_eq!(first_missing(printed, &["w1 up … no", "w2"]), None);
    assert_eq!(first_missing(printed, &["w2 down", "w1 up"]), Some("w1 up"));
    assert_eq!(first_missing(printed, &["w1 up … yes"]), Some("w1 up … yes"));
}
