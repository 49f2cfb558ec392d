//! What was probably meant where a flag is unknown.

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::Args;

/// How alike two flags must be (Jaro-Winkler) for one to be offered for the other.
const ALIKE_MIN: f64 = 0.7;

/// Where clap finds no flag like the unknown one under this verb, looks at all verbs.
pub fn name_the_nearest_flag(
    mut error: clap::Error,
    line: impl IntoIterator<Item = std::ffi::OsString>,
) -> clap::Error {
    if error.kind() != ErrorKind::UnknownArgument || error.get(ContextKind::SuggestedArg).is_some()
    {
        return error;
    }
    let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let unknown = unknown.trim_start_matches('-').to_owned();
    let root = Args::command();
    let verb = line.into_iter().skip(1).find_map(|word| {
        root.get_subcommands().find(|c| word.to_str() == Some(c.get_name())).map(|c| c.get_name())
    });
    let nearest = |verb: &clap::Command| -> Option<(f64, String)> {
        verb.get_arguments()
            .filter(|flag| !flag.is_hide_set())
            .filter_map(|flag| flag.get_long())
            .map(|long| (alike(&unknown, long), long.to_owned()))
            .filter(|(alike, _)| *alike >= ALIKE_MIN)
            .max_by(|a, b| a.0.total_cmp(&b.0))
    };
    let own = verb.and_then(|verb| root.find_subcommand(verb)).and_then(nearest);
    if let Some((_, long)) = own {
        error.insert(ContextKind::SuggestedArg, ContextValue::String(format!("--{long}")));
        return error;
    }
    let elsewhere = root
        .get_subcommands()
        .filter_map(|c| nearest(c).map(|(alike, long)| (alike, long, c.get_name())))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((_, long, verb)) = elsewhere {
        let tip = format!("`shoal {verb}` has a flag '--{long}'");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

/// From 0 to 1. A flag that ends with the whole word (`--memory`, `--worker-memory`) is very alike.
fn alike(unknown: &str, long: &str) -> f64 {
    match long.strip_suffix(unknown) {
        Some(front) if front.ends_with('-') => 0.99,
        _ => strsim::jaro_winkler(unknown, long),
    }
}
