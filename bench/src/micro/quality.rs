//! What a precision costs in quality: how far the probabilities of the next token are from those of
//! `f32`, on texts that the model itself wrote in `f32`.
//!
//! The texts: each of the demo model's questions as a prompt, continued by draws at temperature 1 from a
//! seeded generator. So they are what the model takes to be likely, the set is the same in every run, and
//! `f32`'s perplexity on it is the least that there can be but for chance.

use std::path::Path;

use anyhow::{Context, Result};
use shoal_coordinator::api::tokenize::ModelText;
use shoal_coordinator::api::validate::Message;
use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::{
    Activations, BLOCK_TOKENS, KvPrecision, Numerics, Precision, ReplicaLimits,
};
use shoal_protocol::units::{Bytes, LayerRange};

use super::whole::Whole;
use crate::measure::report::Section;

/// Tokens of a text, its prompt included.
const TEXT_TOKENS: usize = 160;
/// Texts of the set.
const TEXTS: usize = 24;
/// Bits of the seeded generator.
const SEED: u64 = 0x5EED;

const LIMITS: ReplicaLimits = ReplicaLimits {
    kv_blocks: TEXT_TOKENS as u32 / BLOCK_TOKENS + 1,
    context_max: TEXT_TOKENS as u32,
    step_rows_max: TEXT_TOKENS as u32,
    sequences_max: TEXT_TOKENS as u32,
    steps_in_flight_max: 1,
};

/// A text, and where its prompt ends.
struct Text {
    tokens: Vec<u32>,
    prompt: usize,
}

/// What holding weights and cache so costs.
struct Cost {
    held: Precision,
    numerics: Numerics,
    sums: Sums,
    bytes: Bytes,
}

/// The largest divergence from f32 that is taken for right, in nats a token: some three times what was
/// seen on the demo model, whose rows are shorter than a block of 256.
fn divergence_max(held: Precision, numerics: Numerics) -> f64 {
    let weights = match held {
        // It is stored so; and it has no experts.
        Precision::F32 | Precision::Bf16 | Precision::Mxfp4 => 1e-9,
        Precision::F16 => 1e-5,
        Precision::Q8_0 => 3e-4,
        Precision::Fp8 | Precision::Q6K => 3e-3,
        Precision::Q5K => 8e-3,
        Precision::Q4K => 2e-2,
        Precision::Q4_0 => 6e-2,
    };
    let rows = match numerics.activations() {
        Activations::F32 => 0.0,
        Activations::Int8 => 5e-4,
    };
    let cache = match numerics.kv() {
        KvPrecision::F32 => 0.0,
        KvPrecision::Bf16 => 2e-5,
        KvPrecision::Q8_0 => 1e-4,
    };
    f64::max(weights, cache).max(rows)
}

/// Runs it on the demo model, which lies in the repository.
pub fn run() -> Result<Section> {
    let costs = costs(TEXTS)?;
    let tokens = costs.first().map_or(0.0, |cost| cost.sums.tokens);
    let mut section = Section::new(
        "Quality of precisions",
        format!(
            "The demo model over {TEXTS} texts that it drew itself in f32 at temperature 1, {tokens} \
             tokens: perplexity; mean of the Kullback-Leibler divergence from f32 at each token, in \
             nats; how often the most likely token is that of f32; bytes of all weights as held. The \
             goal is a bound of the divergence, which a test holds over fewer texts."
        ),
    );
    for Cost { held, numerics, sums, bytes } in costs {
        let (kv, activations) = (numerics.kv(), numerics.activations());
        let what = format!("weights {held}, KV {kv}, activations {activations}");
        let seen = format!("{}, {bytes}", sums.words());
        section.at_most(what, sums.divergence(), seen, divergence_max(held, numerics));
    }
    Ok(section)
}

/// Every precision of weights with a cache of f32, those of whole numbers with rows of whole numbers too, and every
/// cache with weights of f32.
fn costs(count: usize) -> Result<Vec<Cost>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster/demo-model");
    let checkpoint = Checkpoint::open(&folder)?;
    let mut plain = Model::load(&checkpoint, Precision::F32, Numerics::N1)?;
    let texts = texts(&folder, &mut plain, count)?;
    let expected: Vec<Vec<Vec<f64>>> =
        texts.iter().map(|text| plain.log_probabilities(text)).collect::<Result<_>>()?;
    let weights = Precision::ALL.map(|weights| (weights, Numerics::N1));
    let whole = Precision::ALL.into_iter().filter(|held| held.has_numbers());
    let whole = whole.map(|weights| (weights, Numerics::N2));
    let caches = KvPrecision::ALL.map(|kv| (Precision::F32, Numerics::N1.with_kv(kv)));
    let mut costs = Vec::new();
    for (held, numerics) in weights.into_iter().chain(whole).chain(caches.into_iter().skip(1)) {
        let mut model = Model::load(&checkpoint, held, numerics)?;
        let mut sums = Sums::default();
        for (text, expected) in texts.iter().zip(&expected) {
            sums.add(text, &model.log_probabilities(text)?, expected);
        }
        let spec = checkpoint.spec();
        let bytes = spec.weight_bytes(LayerRange::new(0, spec.layers), held);
        costs.push(Cost { held, numerics, sums, bytes });
    }
    Ok(costs)
}

/// What is added up over all tokens.
#[derive(Default)]
struct Sums {
    tokens: f64,
    surprise: f64,
    divergence: f64,
    same: f64,
}

impl Sums {
    fn add(&mut self, text: &Text, found: &[Vec<f64>], expected: &[Vec<f64>]) {
        let best = |row: &[f64]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
        for ((found, expected), token) in
            found.iter().zip(expected).zip(&text.tokens[text.prompt..])
        {
            self.tokens += 1.0;
            self.surprise -= found[*token as usize];
            let pairs = found.iter().zip(expected);
            self.divergence += pairs.map(|(q, p)| p.exp() * (p - q)).sum::<f64>();
            self.same += f64::from(u8::from(best(found) == best(expected)));
        }
    }

    /// Nats a token.
    fn divergence(&self) -> f64 {
        self.divergence / self.tokens
    }

    fn words(&self) -> String {
        format!(
            "perplexity {:.4}, divergence {:.6}, same choice {:.2} %",
            (self.surprise / self.tokens).exp(),
            self.divergence(),
            100.0 * self.same / self.tokens
        )
    }
}

/// The questions of the demo model, each continued by itself.
fn texts(folder: &Path, model: &mut Model, count: usize) -> Result<Vec<Text>> {
    let questions = std::fs::read(folder.join("questions.json")).context("questions.json")?;
    let questions: Vec<serde_json::Value> = serde_json::from_slice(&questions)?;
    let tokenizer = ModelText::load(folder)?;
    let mut dice = SEED;
    let mut draw = || {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 11) as f64 / (1_u64 << 53) as f64
    };
    let step = (questions.len() / count.max(1)).max(1);
    let mut texts = Vec::new();
    for question in questions.iter().step_by(step).take(count) {
        let content = question["question"].as_str().context("a question")?.to_owned();
        let messages = [Message { role: "user".to_owned(), content, name: None }];
        let mut tokens = tokenizer.encode_chat(&messages, true, false, 0)?;
        let prompt = tokens.len();
        let mut done = 0;
        while tokens.len() < TEXT_TOKENS {
            let rows = model.step(&tokens[done..], done, tokens.len() - 1)?;
            done = tokens.len();
            let row = rows.first().context("a row")?;
            let (mut left, mut chosen) = (draw(), 0);
            for (token, probability) in row.iter().enumerate() {
                left -= probability.exp();
                chosen = token;
                if left <= 0.0 {
                    break;
                }
            }
            tokens.push(chosen as u32);
        }
        texts.push(Text { tokens, prompt });
    }
    Ok(texts)
}

/// The model, held in some precisions.
struct Model(Whole);

impl Model {
    fn load(checkpoint: &Checkpoint, held: Precision, numerics: Numerics) -> Result<Self> {
        Ok(Self(Whole::load(checkpoint, (held, numerics), LIMITS)?))
    }

    /// The logarithms of the probabilities of every token after each of a text's, from the prompt's last
    /// on, but for the text's last.
    fn log_probabilities(&mut self, text: &Text) -> Result<Vec<Vec<f64>>> {
        self.step(&text.tokens[..text.tokens.len() - 1], 0, text.prompt - 1)
    }

    /// The same after each token from position `sample_from` on, of tokens from `first` on.
    fn step(&mut self, tokens: &[u32], first: usize, sample_from: usize) -> Result<Vec<Vec<f64>>> {
        Ok(self.0.step(tokens, first, sample_from - first)?.into_iter().map(log_softmax).collect())
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum();
    logits.iter().map(|logit| f64::from(*logit) - max - sum.ln()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;

    #[test]
    fn no_precision_costs_more_than_is_promised_and_the_table_has_each() {
        let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/FORMATS.md");
        let table = std::fs::read_to_string(table).unwrap();
        let costs = costs(2).unwrap();
        assert_eq!(costs.len(), Precision::ALL.len() + 5 + KvPrecision::ALL.len() - 1);
        for Cost { held, numerics, sums, .. } in costs {
            let what = format!("{held}, {numerics}");
            let (found, most) = (sums.divergence(), divergence_max(held, numerics));
            assert!(sums.tokens > 200.0 && found <= most, "{what}: {found:e} > {most:e}");
            assert!(found > -1e-9, "{what}: {found:e}");
            let is_row = |line: &&str| {
                let mut cells = line.split('|').skip(1).map(str::trim);
                let begins = |cell: Option<&str>, word| {
                    cell.is_some_and(|c: &str| c == word || c.starts_with(&format!("{word} ")))
                };
                begins(cells.next(), held.as_str())
                    && begins(cells.next(), numerics.kv().as_str())
                    && begins(cells.next(), numerics.activations().as_str())
            };
            assert_eq!(table.lines().filter(is_row).count(), 1, "a row for {what}");
        }
    }
}
