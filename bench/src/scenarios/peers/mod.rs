//! Shoal beside llama.cpp on one machine, in turn in one run, with the same weights in the same format and the same threads.
//!
//! llama.cpp is measured by its own programs, inside one process. Shoal is measured from outside: an HTTP client, a
//! coordinator, workers; all of them share the processors with what is computed.

mod llama;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use shoal_protocol::mesh::Objective;
use shoal_protocol::plan::Precision;

use self::llama::{Llama, Place};
use super::Settings;
use super::mesh::bed::{Bed, Served, Wanted, words};
use crate::cluster::process_memory;
use crate::measure::machine::read_bandwidth;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::measure::{Report, Series};
use crate::processes::Host;
use crate::workload::model::Shape;
use crate::workload::prompt;

/// As the weights of other models are numbered.
const SEED: u64 = 5;

/// Tokens of a prompt, and of the answer behind it.
const PROMPT: usize = 128;
const TOKENS: u32 = 32;

/// Streams at once.
const STREAMS: [usize; 4] = [1, 4, 8, 16];

/// Tokens of two answers, between which bytes on the wire are counted.
const WIRE: [u32; 2] = [32, 96];

/// One model in one format, as each of the two reads it.
struct Format {
    name: &'static str,
    /// llama.cpp's file, and what Shoal is given: the same file, where it has the format.
    file: PathBuf,
    model: PathBuf,
    /// What it is held as, where that is not how it is stored.
    precision: Option<Precision>,
    /// What one step reads.
    bytes: f64,
    /// At least so many times llama.cpp's prompt and decoding.
    goals: [f64; 2],
}

/// A part of it that is asked for by name.
type Part = fn(&Settings, &Llama, &[Format]) -> Result<Section>;

/// All parts, in order, or the one that is asked for.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let llama = Llama::open(&settings.llama)?;
    let shape = settings.shape(Shape::PEERS);
    let f16 = shape.write_gguf(&settings.models, SEED)?;
    let stored = shape.write(&settings.models, SEED)?;
    // The embedding is looked up, not read.
    let read = (shape.parameters() - u64::from(shape.vocab) * u64::from(shape.hidden)) as f64;
    let quantised = |name: &'static str, to: &str, bits: f64, goals| -> Result<Format> {
        let file = llama.quantize(&f16, to)?;
        let bytes = read * bits / 8.0;
        Ok(Format { name, model: file.clone(), file, precision: None, bytes, goals })
    };
    let formats = [
        quantised("Q8_0", "Q8_0", 8.5, [1.6, 1.0])?,
        quantised("Q4_0", "Q4_0", 4.5, [1.3, 1.0])?,
        Format {
            name: "bf16 (llama.cpp: f16)",
            file: f16.clone(),
            model: stored,
            precision: Some(Precision::Bf16),
            bytes: read * 2.0,
            goals: [0.0, 1.0],
        },
    ];
    let parts: [(&str, Part); 3] = [("one", one), ("many", many), ("meshes", meshes)];
    settings.check_part(&parts.map(|(name, _)| name))?;
    for (name, part) in parts {
        if settings.only.as_deref().is_none_or(|only| only == name) {
            report.sections.push(part(settings, &llama, &formats)?);
        }
    }
    Ok(())
}

/// Prompts that no cache has seen.
struct Fresh {
    next: u64,
    vocab: u32,
}

impl Fresh {
    fn of(settings: &Settings) -> Self {
        Self { next: 1000, vocab: settings.shape(Shape::PEERS).vocab }
    }

    fn prompt(&mut self, tokens: usize) -> Vec<u32> {
        self.next += 1;
        prompt(self.next, tokens, self.vocab)
    }
}

fn serve(bed: &Bed, format: &Format, vocab: u32, mesh: &str) -> Result<Served> {
    let wanted = Wanted {
        model: &format.model,
        vocab,
        precision: format.precision,
        mesh,
        objective: Objective::Latency,
        reduction: None,
    };
    bed.serve("served", wanted)
}

/// A worker with so many threads.
fn alone(threads: usize) -> Result<Bed> {
    Bed::start(vec![Host { memory: "6GiB".to_owned(), threads, ..Host::default() }], None)
}

/// One stream: a prompt, and tokens behind it.
fn one(settings: &Settings, llama: &Llama, formats: &[Format]) -> Result<Section> {
    let mut section = Section::new(
        "One stream beside llama.cpp",
        format!(
            "{} M parameters of random weights. A prompt of {PROMPT} tokens, and {TOKENS} tokens behind it: llama-bench in one process \
             (`-p {PROMPT}`, then `-n {TOKENS} -d {PROMPT}`), and a client of Shoal's HTTP API (time to the first token; then the mean distance \
             of tokens), in turn. Keys and values are f32 in Shoal and f16 in llama.cpp, as each has them by default. In brackets what was read of weights in a second, as a share of what a plain loop reads with as many threads, measured before each pair.",
            settings.shape(Shape::PEERS).parameters() / 1_000_000
        ),
    );
    let mut fresh = Fresh::of(settings);
    for threads in [1, 2] {
        let bed = alone(threads)?;
        for format in formats {
            forget_peaks(&bed)?;
            let served = serve(&bed, format, fresh.vocab, "1x1")?;
            bed.timed(&served, &fresh.prompt(PROMPT), TOKENS)?;
            let [mut ours, mut theirs] = [(); 2].map(|()| [(); 2].map(|()| Series::default()));
            let [mut share, mut their_share] = [(); 2].map(|()| Series::default());
            let mut peak = 0;
            for pair in 0..settings.pairs {
                let bandwidth = read_bandwidth(threads);
                for turn in [pair % 2, 1 - pair % 2] {
                    if turn == 0 {
                        let place = Place::Here(threads);
                        let (rates, took) = llama.bench(&format.file, place, PROMPT, TOKENS)?;
                        theirs.iter_mut().zip(rates).for_each(|(all, rate)| all.push(rate));
                        their_share.push(rates[1] * format.bytes / bandwidth);
                        peak = peak.max(took);
                    } else {
                        let [first, each] = bed.timed(&served, &fresh.prompt(PROMPT), TOKENS)?;
                        ours[0].push(PROMPT as f64 * 1e3 / first);
                        ours[1].push(1e3 / each);
                        share.push(1e3 / each * format.bytes / bandwidth);
                    }
                }
            }
            let name =
                format!("{}, {threads} thread{}", format.name, if threads > 1 { "s" } else { "" });
            for (which, what) in ["prompt", "decode"].into_iter().enumerate() {
                let said = |series: &Series, share: &Series| match which {
                    0 => series.to_string(),
                    _ => format!("{series} ({})", significant(share.median())),
                };
                section.seen(
                    format!("{name}: {what} tokens/s, llama.cpp"),
                    said(&theirs[which], &their_share),
                );
                section.seen(format!("{name}: {what} tokens/s, Shoal"), said(&ours[which], &share));
                let ratio = ours[which].over(&theirs[which]);
                let what = format!("{name}: {what}, Shoal over llama.cpp");
                match format.goals[which] {
                    0.0 => section.seen(what, ratio.to_string()),
                    goal => section.at_least(what, ratio.median(), ratio.to_string(), goal),
                }
            }
            let own: u64 = peaks(&bed)?.into_iter().sum();
            let mib = |bytes: u64| bytes >> 20;
            section.seen(
                format!("{name}: most memory of the process, llama.cpp; Shoal's worker"),
                format!("{} MiB; {} MiB", mib(peak), mib(own)),
            );
            bed.remove(served)?;
        }
    }
    Ok(section)
}

/// The most memory of each worker so far.
fn peaks(bed: &Bed) -> Result<Vec<u64>> {
    bed.cluster.worker_pids().into_iter().map(|pid| process_memory(pid, "VmHWM")).collect()
}

/// From here on the peak is a new one (`proc(5)`, `clear_refs`).
fn forget_peaks(bed: &Bed) -> Result<()> {
    for pid in bed.cluster.worker_pids() {
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    }
    Ok(())
}

/// Several streams at once, with two threads.
fn many(settings: &Settings, llama: &Llama, formats: &[Format]) -> Result<Section> {
    let mut section = Section::new(
        "Many streams beside llama.cpp",
        format!(
            "Two threads; as many prompts of {PROMPT} tokens at once, and {TOKENS} tokens behind each: llama-batched-bench, and as many clients of Shoal, in turn. \
             Tokens in a second while all of them decode."
        ),
    );
    let mut fresh = Fresh::of(settings);
    let bed = alone(2)?;
    for format in formats {
        let served = serve(&bed, format, fresh.vocab, "1x1")?;
        bed.timed(&served, &fresh.prompt(PROMPT), TOKENS)?;
        let [mut ours, mut theirs] = [(); 2].map(|()| STREAMS.map(|_| Series::default()));
        for pair in 0..settings.pairs {
            for turn in [pair % 2, 1 - pair % 2] {
                if turn == 0 {
                    let rates = llama.batched(&format.file, 2, &STREAMS, (PROMPT, TOKENS))?;
                    theirs.iter_mut().zip(rates).for_each(|(all, rate)| all.push(rate));
                } else {
                    for (all, streams) in ours.iter_mut().zip(STREAMS) {
                        let prompts: Vec<_> = (0..streams).map(|_| fresh.prompt(PROMPT)).collect();
                        all.push(bed.together(&served, &prompts, TOKENS)?);
                    }
                }
            }
        }
        for ((ours, theirs), streams) in ours.iter().zip(&theirs).zip(STREAMS) {
            let name = format!("{}, {streams} streams: decode tokens/s", format.name);
            section.seen(format!("{name}, llama.cpp"), theirs.to_string());
            section.seen(format!("{name}, Shoal"), ours.to_string());
            let ratio = ours.over(theirs);
            let what = format!("{name}, Shoal over llama.cpp");
            match (format.name, streams) {
                ("Q8_0", 8 | 16) => section.at_least(what, ratio.median(), ratio.to_string(), 1.6),
                _ => section.seen(what, ratio.to_string()),
            }
        }
        bed.remove(served)?;
    }
    Ok(section)
}

/// A model cut over processes.
fn meshes(settings: &Settings, llama: &Llama, formats: &[Format]) -> Result<Section> {
    let format = formats.first().context("a format")?;
    let mut section = Section::new(
        "Cut over processes, beside llama.cpp's RPC",
        format!(
            "{}; one thread a process, in turn. llama.cpp: its process alone, and two `ggml-rpc-server` with half of the layers each, each bound to a processor. Shoal: one worker, and meshes of \
             stages x ranks, each worker's thread bound to a processor (four workers share the two). Bytes on the wire: what the machine's loopback carries a token, all of it \
             (Shoal: between workers, to the coordinator, and the client's HTTP; ranks of one machine talk through a socket of its kernel).",
            format.name
        ),
    );
    let mut fresh = Fresh::of(settings);
    let servers = llama.servers(2)?;
    let places = [("one process", Place::Here(1)), ("two RPC servers", Place::Servers(&servers))];
    let meshes = ["1x1", "2x1", "1x2", "2x2"];
    let mut theirs = [(); 2].map(|()| [(); 2].map(|()| Series::default()));
    let mut ours = [(); 4].map(|()| [(); 2].map(|()| Series::default()));
    let mut bytes = [(); 4].map(|()| Series::default());
    let (mut layouts, mut memory) = (Vec::new(), Vec::new());
    let mut wire = Series::default();
    for pair in 0..settings.pairs {
        for turn in [pair % 2, 1 - pair % 2] {
            if turn == 0 {
                for (all, (_, place)) in theirs.iter_mut().zip(places) {
                    let (rates, _) = llama.bench(&format.file, place, PROMPT, TOKENS)?;
                    all.iter_mut().zip(rates).for_each(|(all, rate)| all.push(rate));
                }
                // Each run sends the weights too, so that the difference of two is taken.
                wire.push(a_token(|tokens| {
                    llama.bench(&format.file, places[1].1, PROMPT, tokens).map(drop)
                })?);
                continue;
            }
            for (index, (all, mesh)) in ours.iter_mut().zip(meshes).enumerate() {
                let bed = Bed::start([0, 1, 0, 1].map(Host::computing_on).to_vec(), None)?;
                let served = serve(&bed, format, fresh.vocab, mesh)?;
                bed.timed(&served, &fresh.prompt(PROMPT), TOKENS)?;
                let [first, each] = bed.timed(&served, &fresh.prompt(PROMPT), TOKENS)?;
                all[0].push(PROMPT as f64 * 1e3 / first);
                all[1].push(1e3 / each);
                bytes[index].push(a_token(|tokens| {
                    bed.timed(&served, &fresh.prompt(PROMPT), tokens).map(drop)
                })?);
                if pair == 0 {
                    layouts.push(words(&bed.explain(&served)?));
                    memory.push(peaks(&bed)?);
                }
            }
        }
    }
    let mib = |peaks: &[u64]| {
        let all: Vec<_> = peaks.iter().map(|bytes| (bytes >> 20).to_string()).collect();
        all.join(", ")
    };
    for ((name, _), [prompt, decode]) in places.iter().zip(&theirs) {
        section.seen(
            format!("llama.cpp, {name}: prompt; decode tokens/s"),
            format!("{prompt}; {decode}"),
        );
    }
    section.seen("llama.cpp, two RPC servers: bytes on the wire a token", wire.to_string());
    section.seen("llama.cpp, two RPC servers: most memory, MiB", mib(&servers.peaks()?));
    let whole = bytes[0].median();
    for ((((mesh, [prompt, decode]), bytes), words), peaks) in
        meshes.iter().zip(&ours).zip(&bytes).zip(&layouts).zip(&memory)
    {
        section.seen(
            format!("Shoal, {mesh} ({words}): prompt; decode tokens/s"),
            format!("{prompt}; {decode}"),
        );
        let of = decode.over(&theirs[1][1]);
        section.seen(format!("Shoal, {mesh}: decode over llama.cpp's RPC"), of.to_string());
        match *mesh {
            // The client and the coordinator are there in any case, and are not in llama-bench.
            "2x1" => {
                let between = bytes.median() - whole;
                let seen = format!("{} ({bytes} in all)", significant(between));
                let what = "Shoal, 2x1: bytes on the wire a token, beyond those of 1x1";
                section.at_most(what, between, seen, 10_000.0);
            }
            mesh => {
                let what = format!("Shoal, {mesh}: bytes on the wire a token, in all");
                section.seen(what, bytes.to_string());
            }
        }
        section.seen(format!("Shoal, {mesh}: most memory of the workers, MiB"), mib(peaks));
    }
    let split = ours[1][1].over(&ours[0][1]);
    section.at_least("Shoal, one stream, 2x1 over 1x1", split.median(), split.to_string(), 0.98);
    Ok(section)
}

/// What the loopback carries for one more token of an answer.
fn a_token(mut answer: impl FnMut(u32) -> Result<()>) -> Result<f64> {
    let [short, long] = WIRE.map(|tokens| {
        let before = loopback()?;
        answer(tokens)?;
        anyhow::Ok(loopback()? - before)
    });
    Ok((long? as f64 - short? as f64) / f64::from(WIRE[1] - WIRE[0]))
}

/// Bytes that the loopback has carried so far.
fn loopback() -> Result<u64> {
    let text = std::fs::read_to_string(Path::new("/proc/net/dev"))?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let field = line.and_then(|rest| rest.split_whitespace().next());
    field.and_then(|bytes| bytes.parse().ok()).context("no loopback in /proc/net/dev")
}
