//! An upgrade as text for people and JSON for scripts. Every function is pure.

use serde::Serialize;
use shoal_protocol::upgrade::UpgradeView;

use super::table::Table;

/// `shoal upgrade status --json`.
#[derive(Debug, Serialize)]
pub struct Upgrade<'a> {
    version: u32,
    #[serde(flatten)]
    upgrade: &'a UpgradeView,
}

impl<'a> From<&'a UpgradeView> for Upgrade<'a> {
    fn from(upgrade: &'a UpgradeView) -> Self {
        Self { version: 1, upgrade }
    }
}

/// `shoal upgrade status`: who speaks what.
pub fn speakers(view: &UpgradeView) -> String {
    let mut table = Table::new(&["NODE", "BUILD", "PROTOCOL"]);
    for node in &view.nodes {
        let build = if node.build.is_empty() { "-" } else { &node.build };
        let protocol = match node.protocol {
            Some(version) => version.to_string(),
            None if node.build.is_empty() => "-".to_owned(),
            None => "unknown".to_owned(),
        };
        table.row([node.node.to_string(), build.to_owned(), protocol]);
    }
    table.to_string()
}

/// Where it stands, in a sentence.
pub fn summary(view: &UpgradeView) -> String {
    let UpgradeView { newest, lowest, workers, .. } = view;
    if lowest < newest {
        return format!(
            "the cluster speaks protocol version {lowest}, this coordinator {newest}: what needs more than \
             {lowest} has to wait for the others"
        );
    }
    match workers < newest {
        true => format!(
            "every node speaks protocol version {newest}; `shoal upgrade finish` keeps older builds out"
        ),
        false => {
            format!(
                "every node speaks protocol version {newest}, and whoever speaks less is refused"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::NodeId;
    use shoal_protocol::upgrade::SpeakerView;

    use super::*;

    fn view(lowest: u16, workers: u16) -> UpgradeView {
        let node = |node, build: &str, protocol| {
            let build = build.to_owned();
            SpeakerView { node, build, protocol }
        };
        let nodes = vec![
            node(NodeId::coordinator(1), "0.2.0", Some(2)),
            node(NodeId::worker(1), "0.1.0", Some(1)),
            node(NodeId::worker(2), "0.1.0", None),
            node(NodeId::worker(3), "", None),
        ];
        UpgradeView { newest: 2, lowest, log: 2, workers, nodes }
    }

    #[test]
    fn a_table_says_who_speaks_what() {
        let lines: Vec<String> = speakers(&view(1, 1)).lines().map(words).collect();
        let expected =
            ["NODE BUILD PROTOCOL", "c1 0.2.0 2", "w1 0.1.0 1", "w2 0.1.0 unknown", "w3 - -"];
        assert_eq!(lines, expected);
    }

    #[test]
    fn a_sentence_says_where_it_stands() {
        let check = |lowest, workers, expected: &str| {
            let words = summary(&view(lowest, workers));
            assert!(words.contains(expected), "{words}");
        };
        check(1, 1, "speaks protocol version 1, this coordinator 2: what needs more than 1");
        check(2, 1, "version 2; `shoal upgrade finish`");
        check(2, 2, "whoever speaks less is refused");
    }

    fn words(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}
