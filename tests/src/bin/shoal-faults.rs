//! `make faults`: every kind of fault, so often, on real processes, and the table of what clients saw.
//!
//! ```text
//! shoal-faults [--times N] [--out FILE]
//! ```

use anyhow::{Context, Result, bail};
use shoal_tests::faults::{Fault, run};

const HEAD: &str = "\
# Faults\n\n\
Made by `make faults` (`cargo run --release -p shoal-tests --bin shoal-faults`): 3 coordinators, 4 workers \
and 2 deployments of two stages on one machine,\n4 streams of 400 tokens at a time through coordinators that \
the fault does not hit, but for those marked (*). Every token is compared with an undisturbed stream's.\n\
A stall is the longest gap of a stream after the fault. Its parts, in ms, are those of the longest one of a \
run, the median over the runs:\ndetection (to the first word that somebody is given up), plan (to the new \
layout), load (until all of it is linked), begin (until the last\nanswer has asked its new head), prefill \
(until its client has the next token). The bound of a stream is detection + load + one full\nprefill for \
each stream that stalled + 50 ms; the full prefill is measured beside it, on its own.\n\n\
(*) The clients go through the very process that ends: their streams break where it is killed, which \
counts as an error here and not as\na loss, and each has the whole answer when it asks another \
coordinator; where it is told to stop, it lets them finish.\n\n";

fn main() -> Result<()> {
    let (mut times, mut out) = (5, None);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--times" => times = value()?.parse().context("--times needs a number")?,
            "--out" => out = Some(value()?),
            other => bail!("`{other}` is not known; there are --times N and --out FILE"),
        }
    }
    let report = run(&Fault::ALL, times, |line| eprintln!("{line}"))?;
    let text = format!("{HEAD}{report}");
    print!("{text}");
    if let Some(out) = out {
        std::fs::write(&out, &text).with_context(|| out.clone())?;
    }
    if !report.is_clean() {
        bail!("a token was lost, doubled or another, or a stream failed: see the table");
    }
    Ok(())
}
