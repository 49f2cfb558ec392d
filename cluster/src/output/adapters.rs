//! Adapters as text for people and JSON for scripts. Every function is pure.

use serde::Serialize;
use shoal_protocol::adapters::AdapterView;

use super::access::utc;
use super::table::Table;

/// `shoal adapters list --json`.
#[derive(Debug, Serialize)]
pub struct AdapterList<'a> {
    version: u32,
    adapters: &'a [AdapterView],
}

impl<'a> From<&'a [AdapterView]> for AdapterList<'a> {
    fn from(adapters: &'a [AdapterView]) -> Self {
        Self { version: 1, adapters }
    }
}

/// `shoal adapters list`.
pub fn list(adapters: &[AdapterView]) -> String {
    if adapters.is_empty() {
        return "no adapter is loaded; `shoal adapters load NAME --deployment D PATH` does it\n"
            .to_owned();
    }
    let mut table = Table::new(&["ADAPTER", "DEPLOYMENT", "REPLICAS", "LOADED", "FOLDER"]);
    for adapter in adapters {
        table.row([
            adapter.name.to_string(),
            adapter.deployment.to_string(),
            format!("{} of {}", adapter.held, adapter.replicas),
            utc(adapter.created_s),
            adapter.path.clone(),
        ]);
    }
    let mut text = table.to_string();
    for adapter in adapters.iter().filter(|adapter| !adapter.reason.is_empty()) {
        text.push_str(&format!("{}: {}\n", adapter.name, adapter.reason));
    }
    text
}

#[cfg(test)]
mod tests {
    use shoal_protocol::id::{AdapterId, DeploymentName};

    use super::super::golden::check;
    use super::super::json;
    use super::*;

    #[test]
    fn golden_adapters() {
        let adapter = |name: &str, held, reason: &str| AdapterView {
            name: DeploymentName::new(name).unwrap(),
            id: AdapterId(1),
            deployment: DeploymentName::new("llama-8b").unwrap(),
            path: format!("/adapters/{name}"),
            created_s: 1_795_274_400,
            held,
            replicas: 2,
            reason: reason.to_owned(),
        };
        let words = "w3 cannot load it for r2: there is no such folder";
        let all = [adapter("sql", 1, words), adapter("support", 2, "")];
        check("adapters.txt", &list(&all));
        check("adapters-none.txt", &list(&[]));
        check("adapters.json", &(json::line(&AdapterList::from(&all[..])).unwrap() + "\n"));
    }
}
