//! `shoal models`: what this binary can serve.

use std::fmt::Write;

use shoal_protocol::model::{EncoderSpec, Family};
use shoal_protocol::plan::{Activations, KvPrecision, Precision};

use crate::args::models::ModelsArgs;
use crate::failure::Failure;

/// What is read; docs/FORMATS.md says more.
const FILES: &str = "safetensors (f32, bf16, f16, fp8, gptq and awq of 4 bits, mxfp4 of gpt-oss), PyTorch \
                     state dicts, GGUF (also in parts)";

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
    let precisions = Precision::ALL.map(Precision::as_str);
    let kv = KvPrecision::ALL.map(KvPrecision::as_str);
    let activations = Activations::ALL.map(Activations::as_str);
    let encoders: Vec<_> = EncoderSpec::architectures().collect();
    super::print_json(&serde_json::json!({
        "families": families, "encoders": encoders, "precisions": precisions, "kv_precisions": kv,
        "activations": activations, "files": FILES,
    }))
}

fn page() -> String {
    let width = Family::ALL.iter().map(|family| family.architecture().len()).max().unwrap_or(0);
    let mut page = format!("{:width$}  MODEL TYPE\n", "ARCHITECTURE");
    for family in Family::ALL {
        let (architecture, kind) = (family.architecture(), family.model_type());
        // Writing to a text cannot fail.
        let _ = writeln!(page, "{architecture:width$}  {kind}");
    }
    let _ = writeln!(page, "\nencoders (/v1/embeddings, /rerank):");
    for architecture in EncoderSpec::architectures() {
        let _ = writeln!(page, "{architecture}");
    }
    let precisions = Precision::ALL.map(Precision::as_str).join(", ");
    let kv = KvPrecision::ALL.map(KvPrecision::as_str).join(", ");
    let _ = writeln!(page, "\nweights held as (--precision): {precisions}");
    let _ = writeln!(page, "keys and values held as (--kv): {kv}");
    let activations = Activations::ALL.map(Activations::as_str).join(", ");
    let _ = writeln!(
        page,
        "multiplied, where they are whole numbers, with rows of (--activations): {activations}"
    );
    let _ = writeln!(page, "read from: {FILES}");
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
        for architecture in ["BertModel", "XLMRobertaForSequenceClassification", "ModernBertModel"]
        {
            assert_eq!(page.lines().filter(|line| *line == architecture).count(), 1, "{page}");
        }
        for word in Precision::ALL.map(Precision::as_str) {
            assert!(page.contains(word), "{word} is not in {page}");
        }
        assert!(page.contains("(--kv): f32, bf16, q8_0\n"), "{page}");
    }
}
