//! The shape of an encoder, and `config.json` → [`EncoderSpec`].
//!
//! An encoder takes a whole input at once and makes one vector of it: an embedding, or the scores of a
//! head for classification. Three families, by what their layers are made of:
//!
//! | family | norms | positions | MLP |
//! |---|---|---|---|
//! | BERT | behind attention and MLP, with bias | a table | up, GELU, down |
//! | RoBERTa, XLM-RoBERTa | the same | a table that begins behind the padding's row | the same |
//! | ModernBERT | in front, most without bias | rotary; every n-th layer sees all, the others a window | gated by GELU |
//!
//! How an embedding is pooled stands in other files: [`super::sentence`].

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::config::{
    CONTEXT_MAX, HEADS_MAX, INTERMEDIATE_MAX, LAYERS_MAX, VOCAB_MAX, stored,
};
use crate::model::fields::{Fields, bad, list, short};
use crate::model::options::{Activation, LayerOptions, LayerRope, NormKind, Options};
use crate::model::rope::theta;
use crate::model::spec::{Family, ModelSpec, RopeScaling, SpecError};
use crate::plan::Precision;
use crate::request::VECTOR_MAX;

/// Token types: BERT has 2.
const TYPES_MAX: u64 = 16;
/// ModernBERT's defaults, as published.
const GLOBAL_EVERY: u32 = 3;
const LOCAL_ATTENTION: u32 = 128;
const GLOBAL_THETA: f32 = 160_000.0;
const MODERN_EPS: f64 = 1e-5;
/// BERT's and RoBERTa's.
const BERT_EPS: f64 = 1e-12;

/// What an encoder's layers are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EncoderFamily {
    /// BERT and what distilled it: MiniLM, BGE, E5, GTE.
    Bert,
    /// RoBERTa and XLM-RoBERTa.
    Roberta,
    /// ModernBERT.
    ModernBert,
}

/// (`architectures`, `model_type`, the family, whether it has a head for classification).
const ARCHITECTURES: &[(&str, &str, EncoderFamily, bool)] = {
    use EncoderFamily::{Bert, ModernBert, Roberta};
    &[
        ("BertModel", "bert", Bert, false),
        ("BertForMaskedLM", "bert", Bert, false),
        ("BertForSequenceClassification", "bert", Bert, true),
        ("RobertaModel", "roberta", Roberta, false),
        ("RobertaForMaskedLM", "roberta", Roberta, false),
        ("RobertaForSequenceClassification", "roberta", Roberta, true),
        ("XLMRobertaModel", "xlm-roberta", Roberta, false),
        ("XLMRobertaForMaskedLM", "xlm-roberta", Roberta, false),
        ("XLMRobertaForSequenceClassification", "xlm-roberta", Roberta, true),
        ("ModernBertModel", "modernbert", ModernBert, false),
        ("ModernBertForMaskedLM", "modernbert", ModernBert, false),
        ("ModernBertForSequenceClassification", "modernbert", ModernBert, true),
    ]
};

impl EncoderFamily {
    /// What names of tensors begin with where the model was saved with a head.
    pub const fn prefix(self) -> &'static str {
        match self {
            EncoderFamily::Bert => "bert.",
            EncoderFamily::Roberta => "roberta.",
            EncoderFamily::ModernBert => "model.",
        }
    }
}

/// How the rows of an input become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pooling {
    /// The first row.
    Cls,
    /// Their mean.
    Mean,
    /// The last row.
    LastToken,
}

/// What an encoder makes of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EncoderOutput {
    /// A vector as wide as the stream.
    Embedding {
        /// How rows become one.
        pooling: Pooling,
        /// Whether it is brought to length 1.
        normalize: bool,
    },
    /// One number for each label.
    Scores {
        /// How many.
        labels: u32,
        /// Which row the head reads.
        pooling: Pooling,
        /// Whether a score goes through a sigmoid, as sentence-transformers' `CrossEncoder` does with
        /// one label unless the model says otherwise.
        sigmoid: bool,
    },
}

/// Which positions a row sees, and how they turn it: ModernBERT.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotary {
    /// Each layer whose number is a multiple of this sees all positions.
    pub global_every: u32,
    /// The others see so many positions before and behind their own.
    pub reach: u32,
    /// The base of the rotary frequencies of layers that see all.
    pub global_theta: f32,
    /// That of the others.
    pub local_theta: f32,
}

/// The shape of an encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderSpec {
    /// What its layers are made of.
    pub family: EncoderFamily,
    /// The number of layers.
    pub layers: u32,
    /// The width of the residual stream.
    pub hidden: u32,
    /// Attention heads; divides `hidden`.
    pub heads: u32,
    /// The width of the MLP.
    pub intermediate: u32,
    /// The vocabulary's size.
    pub vocab: u32,
    /// The longest input in tokens, special ones included.
    pub context_max: u32,
    /// Rows of the table of positions; 0 with rotary ones.
    pub positions: u32,
    /// RoBERTa: positions are counted behind that of this token, which has none of its own.
    pub pad_token: Option<u32>,
    /// Rows of the table of token types; 0 without.
    pub types: u32,
    /// Added to the variance in norms.
    pub norm_eps: f32,
    /// Biases in norms.
    pub norm_bias: bool,
    /// Biases on the projections of attention.
    pub attention_bias: bool,
    /// Biases on those of the MLP.
    pub mlp_bias: bool,
    /// A bias on the dense layer of ModernBERT's head for classification.
    pub head_bias: bool,
    /// ModernBERT alone.
    pub rotary: Option<Rotary>,
    /// What it makes of an input.
    pub output: EncoderOutput,
    /// Whether the names in the files begin with [`EncoderFamily::prefix`]; the files say it.
    pub prefixed: bool,
    /// The type of the stored weights.
    pub stored: Precision,
}

impl EncoderSpec {
    /// The width of one head.
    pub fn head_dim(&self) -> u32 {
        self.hidden / self.heads
    }

    /// Its layers in the words of the families: what the shared layers, their scratch and their cut over
    /// ranks are made from. What stands before and behind them has no words there.
    pub fn sizes(&self) -> ModelSpec {
        let rotary = self.rotary.map_or(1.0, |rotary| rotary.global_theta);
        ModelSpec {
            family: Family::Encoder,
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.heads,
            head_dim: self.head_dim(),
            intermediate: self.intermediate,
            vocab: self.vocab,
            context_max: self.context_max,
            norm_eps: self.norm_eps,
            rope_theta: rotary,
            rope_scaling: RopeScaling::None,
            tied_embeddings: false,
            qkv_bias: self.attention_bias,
            o_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            qk_norm: false,
            options: Options {
                norm: NormKind::Layer,
                norm_bias: self.norm_bias,
                activation: Activation::Gelu,
                gated: self.family == EncoderFamily::ModernBert,
                local_rope: self.rotary.map(|rotary| (rotary.local_theta, RopeScaling::None)),
                layers: (0..self.layers).map(|layer| self.layer(layer)).collect(),
                ..Options::default()
            },
            stored: self.stored,
        }
    }

    /// What a layer does otherwise than the others. A window is what a row sees up to its own position;
    /// it sees as many behind it.
    fn layer(&self, layer: u32) -> LayerOptions {
        match self.rotary {
            None => LayerOptions { rope: LayerRope::None, ..LayerOptions::PLAIN },
            Some(rotary) if layer.is_multiple_of(rotary.global_every) => LayerOptions::PLAIN,
            Some(rotary) => LayerOptions {
                window: Some(rotary.reach.saturating_add(1)),
                rope: LayerRope::Local,
                ..LayerOptions::PLAIN
            },
        }
    }

    /// The width of what it makes of an input.
    pub fn output_width(&self) -> u32 {
        match self.output {
            EncoderOutput::Embedding { .. } => self.hidden,
            EncoderOutput::Scores { labels, .. } => labels,
        }
    }

    /// Whether this `config.json` is that of an encoder, by the name of its architecture.
    pub fn is_encoder(config: &Value) -> bool {
        let names = config.get("architectures").and_then(Value::as_array).map(Vec::as_slice);
        matches!(names, Some([Value::String(name)])
            if ARCHITECTURES.iter().any(|(known, ..)| known == name))
    }

    /// The architectures that are known, for messages.
    pub fn architectures() -> impl Iterator<Item = &'static str> {
        ARCHITECTURES.iter().map(|(name, ..)| *name)
    }

    /// The shape that a `config.json` says, where it is an encoder's. What is no JSON is for the decoders'
    /// reader to name.
    pub fn from_config_json(text: &str) -> Result<Option<EncoderSpec>, SpecError> {
        match serde_json::from_str::<Value>(text) {
            Ok(config) if EncoderSpec::is_encoder(&config) => {
                EncoderSpec::from_config(&config).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Reads and checks a `config.json` for which [`EncoderSpec::is_encoder`] holds. Pooling is the
    /// mean, unless the model has a head: what sentence-transformers does with a plain model.
    pub fn from_config(config: &Value) -> Result<EncoderSpec, SpecError> {
        let Some(root) = config.as_object() else {
            return Err(SpecError::NotJson { reason: "it holds no object".to_owned() });
        };
        let config = Fields(root);
        let (family, has_head) = family(config)?;
        refuse_unsupported(config, family)?;
        let hidden = config.size("hidden_size", VECTOR_MAX as u64)?;
        let heads = config.size("num_attention_heads", HEADS_MAX)?;
        if !hidden.is_multiple_of(heads) || !(hidden / heads).is_multiple_of(2) {
            return Err(SpecError::BadValue {
                field: "hidden_size",
                value: hidden.to_string(),
                expected: format!(
                    "an even multiple of `num_attention_heads`, which is {heads}: heads are evenly wide"
                ),
            });
        }
        let modern = family == EncoderFamily::ModernBert;
        let positions = config.size("max_position_embeddings", CONTEXT_MAX)?;
        let pad_token = match family {
            EncoderFamily::Roberta => Some(pad_token(config)?),
            _ => None,
        };
        let context_max = match pad_token {
            Some(pad) => positions.saturating_sub(pad + 1),
            None => positions,
        };
        if context_max < 2 {
            return Err(SpecError::BadValue {
                field: "max_position_embeddings",
                value: positions.to_string(),
                expected: "room for two tokens at least, behind the padding's row".to_owned(),
            });
        }
        Ok(EncoderSpec {
            family,
            layers: config.size("num_hidden_layers", LAYERS_MAX)?,
            hidden,
            heads,
            intermediate: config.size("intermediate_size", INTERMEDIATE_MAX)?,
            vocab: config.size("vocab_size", VOCAB_MAX)?,
            context_max,
            positions: if modern { 0 } else { positions },
            pad_token,
            types: if modern { 0 } else { config.size("type_vocab_size", TYPES_MAX)? },
            norm_eps: match modern {
                true => number_or(config, "norm_eps", MODERN_EPS)?,
                false => number_or(config, "layer_norm_eps", BERT_EPS)?,
            },
            norm_bias: !modern || config.flag("norm_bias", false)?,
            attention_bias: !modern || config.flag("attention_bias", false)?,
            mlp_bias: !modern || config.flag("mlp_bias", false)?,
            head_bias: !modern || config.flag("classifier_bias", false)?,
            rotary: if modern { Some(rotary(config)?) } else { None },
            output: match has_head {
                false => EncoderOutput::Embedding { pooling: Pooling::Mean, normalize: false },
                true => scores(config, family)?,
            },
            prefixed: false,
            stored: stored(config)?,
        })
    }
}

fn family(config: Fields<'_>) -> Result<(EncoderFamily, bool), SpecError> {
    let name = config.get("architectures").and_then(|names| names.get(0)?.as_str());
    let known = ARCHITECTURES.iter().find(|(known, ..)| Some(*known) == name);
    let Some((name, model_type, family, has_head)) = known else {
        return Err(SpecError::Unsupported {
            field: "architectures",
            value: name.unwrap_or_default().to_owned(),
            supported: list(EncoderSpec::architectures()),
        });
    };
    match config.get("model_type") {
        Some(Value::String(kind)) if kind != model_type => Err(SpecError::BadValue {
            field: "model_type",
            value: format!("`{kind}`"),
            expected: format!("`{model_type}`, as `architectures` says {name}"),
        }),
        _ => Ok((*family, *has_head)),
    }
}

fn refuse_unsupported(config: Fields<'_>, family: EncoderFamily) -> Result<(), SpecError> {
    let unsupported = |field, found: &Value, supported: &str| {
        let (value, supported) = (short(found), supported.to_owned());
        Err(SpecError::Unsupported { field, value, supported })
    };
    if let Some(quantization) = config.get("quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return unsupported("quantization_config", method, "an encoder without it");
    }
    let act = match family {
        EncoderFamily::ModernBert => "hidden_activation",
        _ => "hidden_act",
    };
    for field in [act, "classifier_activation"] {
        if let Some(act) = config.get(field)
            && act.as_str() != Some("gelu")
        {
            return unsupported(field, act, "`gelu`");
        }
    }
    if let Some(kind) = config.get("position_embedding_type")
        && !matches!(kind.as_str(), Some("absolute" | "rope"))
    {
        return unsupported("position_embedding_type", kind, "`absolute`");
    }
    for field in ["is_decoder", "add_cross_attention"] {
        if config.flag(field, false)? {
            return unsupported(field, &Value::Bool(true), "false (an encoder)");
        }
    }
    Ok(())
}

fn pad_token(config: Fields<'_>) -> Result<u32, SpecError> {
    // transformers' default for both families.
    const PAD: u32 = 1;
    match config.get("pad_token_id") {
        None => Ok(PAD),
        Some(value) => match value.as_u64().filter(|id| *id < VOCAB_MAX) {
            Some(id) => Ok(id as u32),
            None => Err(bad("pad_token_id", value, "a token id")),
        },
    }
}

fn number_or(config: Fields<'_>, field: &'static str, default: f64) -> Result<f32, SpecError> {
    match config.get(field) {
        None => Ok(default as f32),
        Some(_) => config.number(field, 1e-30, 1.0),
    }
}

/// As transformers 4 writes it (`global_rope_theta` and its kin), and as 5 does (`rope_parameters` by
/// the kind of a layer, `layer_types`).
fn rotary(config: Fields<'_>) -> Result<Rotary, SpecError> {
    let parameters = config.get("rope_parameters");
    let base = |kind: &str, old: &'static str, default: f32| {
        let new = parameters.and_then(|all| all.get(kind));
        if let Some(rope_type) = new.and_then(|new| new.get("rope_type"))
            && rope_type.as_str() != Some("default")
        {
            return Err(SpecError::Unsupported {
                field: "rope_type",
                value: short(rope_type),
                supported: "`default`".to_owned(),
            });
        }
        match new.and_then(|new| new.get("rope_theta")).or_else(|| config.get(old)) {
            value @ Some(_) => theta(value, default),
            None => Ok(default),
        }
    };
    let global_theta = base("full_attention", "global_rope_theta", GLOBAL_THETA)?;
    // Where the file says nothing the local base is the published one, as transformers has it.
    let local_theta = base("sliding_attention", "local_rope_theta", 10_000.0)?;
    let size_or = |field, default| match config.get(field) {
        None => Ok(default),
        Some(_) => config.size(field, CONTEXT_MAX),
    };
    let mut global_every = size_or("global_attn_every_n_layers", GLOBAL_EVERY)?;
    if let Some(types) = config.get("layer_types") {
        let kinds = types.as_array().map(Vec::as_slice).unwrap_or_default();
        let is_global = |kind: &&Value| kind.as_str() == Some("full_attention");
        // The list says all: the second layer that sees everything shows how often one does.
        let second = kinds.iter().skip(1).position(|kind| is_global(&kind));
        global_every = second.map_or(kinds.len().max(1), |at| at + 1) as u32;
        let kind = |i: usize| match (i as u32).is_multiple_of(global_every) {
            true => "full_attention",
            false => "sliding_attention",
        };
        let is_regular = kinds.iter().enumerate().all(|(i, found)| found.as_str() == Some(kind(i)));
        if !is_regular || kinds.is_empty() {
            let expected =
                "`full_attention` first and in every n-th layer, `sliding_attention` between";
            return Err(bad("layer_types", types, expected));
        }
    }
    let reach = size_or("local_attention", LOCAL_ATTENTION)? / 2;
    Ok(Rotary { global_every, reach, global_theta, local_theta })
}

fn scores(config: Fields<'_>, family: EncoderFamily) -> Result<EncoderOutput, SpecError> {
    /// Labels of a head; published ones have a few hundred at most.
    const LABELS_MAX: u64 = 1 << 12;
    let labels = match (config.get("num_labels"), config.get("id2label")) {
        (Some(_), _) => config.size("num_labels", LABELS_MAX)?,
        (None, Some(Value::Object(labels))) => match labels.len() as u64 {
            labels @ 1..=LABELS_MAX => labels as u32,
            _ => return Err(bad("id2label", &Value::Null, "1 to 4096 labels")),
        },
        // transformers' default.
        (None, _) => 2,
    };
    let pooling = match config.get("classifier_pooling").and_then(Value::as_str) {
        Some("mean") if family == EncoderFamily::ModernBert => Pooling::Mean,
        _ => Pooling::Cls,
    };
    Ok(EncoderOutput::Scores { labels, pooling, sigmoid: labels == 1 && !is_identity(config) })
}

/// Whether sentence-transformers is told to leave scores as they are: under its own key, or the one
/// that it had before version 4.
fn is_identity(config: Fields<'_>) -> bool {
    let new = config.get("sentence_transformers").and_then(|own| own.get("activation_fn"));
    let old = config.get("sbert_ce_default_activation_function");
    let name = new.or(old).and_then(Value::as_str);
    name.is_some_and(|name| name.ends_with("Identity"))
}

#[cfg(test)]
#[path = "encoder_test.rs"]
mod tests;
