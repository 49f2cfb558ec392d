//! The report: sections of a table each, written as Markdown.

use std::fmt::Write as _;

use super::Machine;

/// One row of the report.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// What was seen: median and spread.
    pub seen: String,
    /// What it should be; empty where nothing was promised.
    pub goal: String,
    /// Whether it is.
    pub met: Option<bool>,
}

/// A section: how it was measured, on what machine, and its rows.
#[derive(Clone, Debug)]
pub struct Section {
    /// The heading.
    pub title: String,
    /// How it was measured.
    pub method: String,
    /// The machine just before.
    pub machine: Option<Machine>,
    /// The figures.
    pub rows: Vec<Row>,
}

impl Section {
    /// A section without rows; measures the machine.
    pub fn new(title: impl Into<String>, method: impl Into<String>) -> Self {
        let machine = Machine::measure();
        eprintln!("{}", machine.line());
        Self {
            title: title.into(),
            method: method.into(),
            machine: Some(machine),
            rows: Vec::new(),
        }
    }

    /// Adds a figure that nobody promised anything about.
    pub fn seen(&mut self, what: impl Into<String>, seen: impl Into<String>) {
        self.push(Row { what: what.into(), seen: seen.into(), goal: String::new(), met: None });
    }

    /// Adds a figure that should be at least `goal`.
    pub fn at_least(
        &mut self,
        what: impl Into<String>,
        value: f64,
        seen: impl Into<String>,
        goal: f64,
    ) {
        let (goal, met) = (format!("≥ {goal}"), Some(value >= goal));
        self.push(Row { what: what.into(), seen: seen.into(), goal, met });
    }

    /// Adds a figure that should be at most `goal`.
    pub fn at_most(
        &mut self,
        what: impl Into<String>,
        value: f64,
        seen: impl Into<String>,
        goal: f64,
    ) {
        let (goal, met) = (format!("≤ {goal}"), Some(value <= goal));
        self.push(Row { what: what.into(), seen: seen.into(), goal, met });
    }

    /// Adds a figure with a goal that is more than a number.
    pub fn judged(
        &mut self,
        what: impl Into<String>,
        seen: impl Into<String>,
        goal: impl Into<String>,
        met: bool,
    ) {
        let (what, seen, goal) = (what.into(), seen.into(), goal.into());
        self.push(Row { what, seen, goal, met: Some(met) });
    }

    fn push(&mut self, row: Row) {
        let met = match row.met {
            None => "",
            Some(true) => "  ok",
            Some(false) => "  MISSED",
        };
        eprintln!("  {}: {} {}{met}", row.what, row.seen, row.goal);
        self.rows.push(row);
    }
}

/// The whole report.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The sections in order.
    pub sections: Vec<Section>,
}

impl Report {
    /// The report as Markdown, with the command that wrote it.
    pub fn markdown(&self, by: &str) -> String {
        let mut out = format!(
            "# Results\n\nWritten by `{by}`. Medians with [min-max]; ratios are medians of pairs taken in turn\n\
             (A B A B …) in one run. The machine was measured just before each table.\n",
        );
        for section in &self.sections {
            let _ = write!(out, "\n## {}\n\n{}\n", section.title, section.method);
            if let Some(machine) = &section.machine {
                let _ = write!(out, "\nMachine: {}.\n", machine.line());
            }
            out.push_str("\n| what | seen | goal | met |\n|---|---|---|---|\n");
            for row in &section.rows {
                let met = match row.met {
                    None => "",
                    Some(true) => "yes",
                    Some(false) => "**no**",
                };
                let _ = writeln!(out, "| {} | {} | {} | {met} |", row.what, row.seen, row.goal);
            }
        }
        out
    }
}
