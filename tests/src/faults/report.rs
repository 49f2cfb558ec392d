//! The table of what clients saw.

use std::fmt;
use std::time::Duration;

use super::client::Seen;
use super::{Fault, Parts, Trial};
use crate::proc::relay::Hits;

/// What clients saw of one kind of fault.
#[derive(Clone, Debug)]
pub struct Row {
    /// The fault.
    pub fault: Fault,
    /// How often it was done.
    pub runs: usize,
    /// Streams that were under way.
    pub streams: usize,
    /// Tokens that never came.
    pub lost: usize,
    /// Tokens behind the end of the expected ones.
    pub duplicated: usize,
    /// Tokens that are not the expected ones.
    pub differing: usize,
    /// Streams that ended with an error.
    pub errors: usize,
    /// The longest gap of each stream after the fault, sorted.
    pub stalls: Vec<Duration>,
    /// What the longest stall of each run was made of, where somebody was given up.
    pub parts: Vec<Parts>,
    /// Streams that stalled no longer than the bound, of those that one holds for.
    pub within: (usize, usize),
    /// What the network did, where it was told to.
    pub hits: Hits,
    /// What else was seen, each once.
    pub notes: Vec<String>,
}

impl Row {
    /// Nothing was seen yet.
    pub fn new(fault: Fault) -> Self {
        Self {
            fault,
            runs: 0,
            streams: 0,
            lost: 0,
            duplicated: 0,
            differing: 0,
            errors: 0,
            stalls: Vec::new(),
            parts: Vec::new(),
            within: (0, 0),
            hits: Hits::default(),
            notes: Vec::new(),
        }
    }

    /// Compares a stream with what it should have been.
    pub fn judge(&mut self, seen: &Seen, expected: &[u64]) {
        let common = seen.tokens.iter().zip(expected);
        self.streams += 1;
        self.differing += common.filter(|(found, expected)| found != expected).count();
        self.duplicated += seen.tokens.len().saturating_sub(expected.len());
        match &seen.error {
            // What is missing of a stream that broke with its coordinator is not lost: its client
            // knows, and asks again.
            Some(_) if self.fault.breaks_its_clients() => self.errors += 1,
            Some(error) => {
                eprintln!("{}: a stream failed: {error}", self.fault);
                self.errors += 1;
                self.lost += expected.len().saturating_sub(seen.tokens.len());
            }
            None => {
                self.lost += expected.len().saturating_sub(seen.tokens.len());
                self.stalls.push(seen.longest);
            }
        }
    }

    /// Notes something once.
    pub fn note(&mut self, words: impl Into<String>) {
        let words = words.into();
        if !self.notes.contains(&words) {
            self.notes.push(words);
        }
    }

    pub(super) fn finished(mut self) -> Self {
        self.stalls.sort();
        let Hits { dropped, damaged } = self.hits;
        if self.hits != Hits::default() {
            self.note(format!("{dropped} datagrams were dropped, {damaged} damaged"));
        }
        self
    }

    fn is_clean(&self) -> bool {
        let errors = if self.fault.breaks_its_clients() { 0 } else { self.errors };
        self.lost + self.duplicated + self.differing + errors == 0
    }

    /// The median of one part.
    fn part(&self, of: impl Fn(&Parts) -> f64) -> String {
        let mut all: Vec<_> = self.parts.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).map_or("-".to_owned(), |ms| format!("{ms:.0}"))
    }
}

/// All rows, and the usual gap beside which the stalls stand.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// One for each kind of fault.
    pub rows: Vec<Row>,
    /// The longest gaps of undisturbed streams, sorted.
    pub usual: Vec<Duration>,
    /// One full prefill of a whole answer, by cluster.
    pub prefills: Vec<Duration>,
    /// How disks are filled here.
    pub disks: Option<&'static str>,
}

impl Report {
    pub(super) fn begin(&mut self, trial: &Trial) {
        self.usual.extend(&trial.usual);
        self.prefills.push(trial.full_prefill);
        self.disks = self.disks.or(trial.disks());
    }

    /// Faults that were done.
    pub fn faults(&self) -> usize {
        self.rows.iter().map(|row| row.runs).sum()
    }

    /// Whether no token was lost, doubled or another, and no stream failed but those whose own
    /// coordinator was killed.
    pub fn is_clean(&self) -> bool {
        self.rows.iter().all(Row::is_clean)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| fault | runs | streams hit | tokens lost | twice | different | errors | stall p50 | p99 \
             | detection | plan | load | begin | prefill | within the bound |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")?;
        for r in &self.rows {
            let (half, most) = (quantile(&r.stalls, 0.5), quantile(&r.stalls, 0.99));
            let within = match r.within {
                (_, 0) => "-".to_owned(),
                (within, of) => format!("{within} of {of}"),
            };
            writeln!(
                f,
                "| {} | {} | {} | {} | {} | {} | {} | {half} | {most} | {} | {} | {} | {} | {} | {within} |",
                r.fault,
                r.runs,
                r.streams,
                r.lost,
                r.duplicated,
                r.differing,
                r.errors,
                r.part(|p| p.detection),
                r.part(|p| p.plan),
                r.part(|p| p.load),
                r.part(|p| p.begin),
                r.part(|p| p.prefill),
            )?;
        }
        let (half, most) = (quantile(&self.usual, 0.5), quantile(&self.usual, 0.99));
        let n = self.usual.len();
        writeln!(
            f,
            "| none: the normal gap | - | {n} | 0 | 0 | 0 | 0 | {half} | {most} | - | - | - | - | - | - |"
        )?;
        writeln!(f)?;
        let prefills: Vec<_> = self.prefills.iter().map(|p| ms(*p)).collect();
        writeln!(f, "One full prefill of a whole answer took {}.", prefills.join(" and "))?;
        if let Some(disks) = self.disks {
            writeln!(f, "Disks: {disks}.")?;
        }
        for row in self.rows.iter().filter(|row| !row.notes.is_empty()) {
            writeln!(f, "- {}: {}.", row.fault, row.notes.join("; "))?;
        }
        Ok(())
    }
}

fn ms(d: Duration) -> String {
    format!("{:.0} ms", d.as_secs_f64() * 1000.0)
}

fn quantile(sorted: &[Duration], q: f64) -> String {
    let last = sorted.len().saturating_sub(1);
    sorted.get(((last as f64) * q).round() as usize).map_or("-".to_owned(), |d| ms(*d))
}
