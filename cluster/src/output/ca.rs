//! The CAs as text for people and JSON for scripts. Every function is pure.

use serde::Serialize;
use shoal_protocol::access::{CaEntry, CaStanding, CaView, RotationView};
use shoal_protocol::id::NodeId;

use super::access::utc;
use super::table::Table;

/// Digits of a fingerprint that people see.
pub const SHOWN: usize = 12;

/// `shoal ca list --json`.
#[derive(Debug, Serialize)]
pub struct CaList<'a> {
    version: u32,
    cas: &'a [CaEntry],
    past: &'a [CaEntry],
    rotation: &'a Option<RotationView>,
}

impl<'a> From<&'a CaView> for CaList<'a> {
    fn from(view: &'a CaView) -> Self {
        Self { version: 1, cas: &view.cas, past: &view.past, rotation: &view.rotation }
    }
}

/// `shoal ca list`.
pub fn cas(view: &CaView) -> String {
    let mut table = Table::new(&["CA", "STANDING", "SINCE"]);
    for ca in view.cas.iter().chain(&view.past) {
        table.row([
            ca.fingerprint.chars().take(SHOWN).collect(),
            standing(ca.standing).to_owned(),
            ca.since_s.map_or("the founding".to_owned(), utc),
        ]);
    }
    let mut text = table.to_string();
    if let Some(rotation) = &view.rotation {
        text += &format!("begun {}: {}\n", utc(rotation.begun_s), rotation.waits);
        if !rotation.waits_for.is_empty() {
            let nodes: Vec<_> = rotation.waits_for.iter().map(NodeId::to_string).collect();
            text += &format!("waiting for {}", nodes.join(", "));
            text += &rotation.ends_s.map_or("\n".to_owned(), |at| format!(", until {}\n", utc(at)));
        }
    }
    text
}

fn standing(standing: CaStanding) -> &'static str {
    match standing {
        CaStanding::Signs => "signs",
        CaStanding::Next => "will sign",
        CaStanding::Leaving => "leaves",
        CaStanding::Past => "not believed",
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden::check;
    use super::super::json;
    use super::*;

    /// 2026-11-21 15:20:00 UTC.
    const NOW: u64 = 1_795_274_400;

    fn entry(digit: char, standing: CaStanding, since_s: Option<u64>) -> CaEntry {
        CaEntry { fingerprint: digit.to_string().repeat(64), standing, since_s }
    }

    #[test]
    fn golden_cas() {
        let alone =
            CaView { cas: vec![entry('a', CaStanding::Signs, None)], past: vec![], rotation: None };
        check("cas-one.txt", &cas(&alone));
        let rotating = CaView {
            cas: vec![
                entry('b', CaStanding::Signs, Some(NOW + 3)),
                entry('a', CaStanding::Leaving, Some(NOW + 3)),
            ],
            past: vec![entry('9', CaStanding::Past, Some(NOW - 86_400))],
            rotation: Some(RotationView {
                begun_s: NOW,
                ends_s: Some(NOW + 86_403),
                waits: "every member is to show a certificate of it".to_owned(),
                waits_for: vec![NodeId::worker(2), NodeId::worker(7)],
            }),
        };
        check("cas.txt", &cas(&rotating));
        check("cas.json", &(json::line(&CaList::from(&rotating)).unwrap() + "\n"));
    }
}
