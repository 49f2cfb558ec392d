//! Keys, join tokens and nodes as text for people and JSON for scripts. Every function is pure.

use serde::Serialize;
use shoal_protocol::access::{KeyStanding, KeyView, NodeView, TokenView};

use super::table::Table;

const NOTHING: &str = "-";

/// `shoal keys list --json`.
#[derive(Debug, Serialize)]
pub struct KeyList<'a> {
    version: u32,
    keys: &'a [KeyView],
}

impl<'a> From<&'a [KeyView]> for KeyList<'a> {
    fn from(keys: &'a [KeyView]) -> Self {
        Self { version: 1, keys }
    }
}

/// `shoal keys list`.
pub fn keys(keys: &[KeyView]) -> String {
    if keys.is_empty() {
        return "no key was ever made: the API takes requests of its own machine alone; `shoal keys \
                create NAME` makes one\n"
            .to_owned();
    }
    let mut table =
        Table::new(&["KEY", "STANDING", "MADE", "EXPIRES", "A MINUTE", "AT ONCE", "REVOKED"]);
    let limit = |limit: Option<u32>| limit.map_or(NOTHING.to_owned(), |limit| limit.to_string());
    let time = |at: Option<u64>| at.map_or(NOTHING.to_owned(), utc);
    for key in keys {
        table.row([
            key.name.to_string(),
            standing(key.standing).to_owned(),
            utc(key.created_s),
            time(key.expires_s),
            limit(key.limits.requests_per_minute),
            limit(key.limits.concurrent),
            time(key.revoked_s),
        ]);
    }
    table.to_string()
}

/// `shoal token list --json`.
#[derive(Debug, Serialize)]
pub struct TokenList<'a> {
    version: u32,
    tokens: &'a [TokenView],
}

impl<'a> From<&'a [TokenView]> for TokenList<'a> {
    fn from(tokens: &'a [TokenView]) -> Self {
        Self { version: 1, tokens }
    }
}

/// `shoal token list`.
pub fn tokens(tokens: &[TokenView]) -> String {
    if tokens.is_empty() {
        return "no join token can be used; `shoal token create --role worker` makes one\n"
            .to_owned();
    }
    let mut table = Table::new(&["TOKEN", "ROLE", "USES LEFT", "EXPIRES"]);
    for token in tokens {
        table.row([
            token.id.clone(),
            token.role.to_string(),
            token.uses_left.to_string(),
            utc(token.expires_s),
        ]);
    }
    table.to_string()
}

/// `shoal nodes list --json`.
#[derive(Debug, Serialize)]
pub struct NodeList<'a> {
    version: u32,
    nodes: &'a [NodeView],
    /// Null where it is what all coordinators know.
    as_of_s: Option<u64>,
    /// Why it is not; null where it is.
    no_majority: Option<&'a str>,
}

impl<'a> NodeList<'a> {
    /// These nodes, and since when nothing newer is known, where that is so.
    pub fn new(nodes: &'a [NodeView], as_of: Option<AsOf<'a>>) -> Self {
        let as_of_s = as_of.map(|as_of| as_of.at_s);
        let no_majority = as_of.map(|as_of| as_of.why.unwrap_or(MAJORITY_BACK));
        Self { version: 1, nodes, as_of_s, no_majority }
    }
}

/// What one coordinator knew by itself.
#[derive(Clone, Copy, Debug)]
pub struct AsOf<'a> {
    /// When that was last changed, in seconds since 1970.
    pub at_s: u64,
    /// Why it knows nothing newer.
    pub why: Option<&'a str>,
}

/// It answered between the two questions.
const MAJORITY_BACK: &str = "no majority of the coordinators a moment ago; ask again";

/// `shoal nodes list`.
pub fn nodes(nodes: &[NodeView], as_of: Option<AsOf<'_>>) -> String {
    let mut table = Table::new(&["NODE", "ROLE", "LINK", "PLACED", "STARTS", "JOINED", "BUILD"]);
    let or_nothing = |text: &str| if text.is_empty() { NOTHING } else { text }.to_owned();
    for node in nodes {
        let link = node.connected.map_or(NOTHING, |up| if up { "up" } else { "down" });
        table.row([
            node.node.to_string(),
            node.node.role.to_string(),
            link.to_owned(),
            if node.placed { "yes" } else { "no" }.to_owned(),
            node.starts.to_string(),
            utc(node.joined_s),
            or_nothing(&node.build),
        ]);
    }
    if let Some(AsOf { at_s, why }) = as_of {
        let words = format!("nothing newer is known here: {}", why.unwrap_or(MAJORITY_BACK));
        table.note(&format!("as of {}", utc(at_s)), &words);
    }
    table.to_string()
}

fn standing(standing: KeyStanding) -> &'static str {
    match standing {
        KeyStanding::Good => "good",
        KeyStanding::Expired => "expired",
        KeyStanding::Revoked => "revoked",
    }
}

/// Seconds since 1970 as `2026-11-21T15:20:00Z`.
pub fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, so that the leap day is the last: Howard Hinnant's `civil_from_days`.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
#[path = "access_test.rs"]
mod tests;
