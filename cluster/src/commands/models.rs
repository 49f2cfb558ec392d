//! `shoal models`: what this binary can serve.

use std::fmt::Write;

use shoal_protocol::model::Family;
use shoal_protocol::plan::Precision;

use crate::args::models::ModelsArgs;
use crate::failure::Failure;

/// In which types weights can be held.
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::F16];

/// Prints the families and precisions.
pub fn run(args: &ModelsArgs) -> Result<(), Failure> {
    if !args.json {
        return super::print(&page());
    }
    let families: Vec<_> = Family::ALL
        .iter()
        .map(|family| {
            serde_json::json!({
                "architecture": family.architecture(),
                "model_type": family.model_type(),
            })
        })
        .collect();
    let precisions = PRECISIONS.map(Precision::as_str);
    super::print_json(&serde_json::json!({ "families": families, "precisions": precisions }))
}

fn page() -> String {
    let width = Family::ALL.iter().map(|family| family.architecture().len()).max().unwrap_or(0);
    let mut page = format!("{:width$}  MODEL TYPE\n", "ARCHITECTURE");
    for family in Family::ALL {
        let (architecture, kind) = (family.architecture(), family.model_type());
        // Writing to a text cannot fail.
        let _ = writeln!(page, "{architecture:width$}  {kind}");
    }
    let precisions = PRECISIONS.map(Precision::as_str).join(", ");
    let _ = writeln!(page, "\nprecisions: {precisions}; stored as any of them in safetensors");
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_line() {
        let page = page();
        for family in Family::ALL {
            let line = |line: &&str| line.starts_with(family.architecture());
            assert_eq!(page.lines().filter(line).count(), 1, "{page}");
        }
        assert!(
            page.ends_with("precisions: f32, bf16, f16; stored as any of them in safetensors\n")
        );
    }
}
