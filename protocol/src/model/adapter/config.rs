//! `adapter_config.json` as PEFT writes it: which low-rank matrices there are and what scales them.
//!
//! What an adapter asks for beyond low-rank matrices beside projections is refused by name, so that
//! nothing is served that is nearly the adapter.

use serde_json::{Map, Value};

use super::AdapterError;

/// The largest rank. Beyond it two thin products cost about as much as the projection of a small model,
/// and a merged checkpoint serves better; published adapters have 8 to 256.
pub const RANK_MAX: u32 = 512;

/// What `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    rank: u32,
    alpha: f64,
    /// Whether the scaling is `alpha / sqrt(rank)`.
    rank_stabilised: bool,
    /// Ranks of modules that have another one.
    ranks: Vec<(String, u32)>,
    /// The same of alphas.
    alphas: Vec<(String, f64)>,
    /// The ends of the names of what it changes; `None` where the file says it in another way.
    targets: Option<Vec<String>>,
}

/// Fields that must be absent or say no, and what they stand for.
const REFUSED: &[(&str, &str)] = &[
    ("use_dora", "DoRA's magnitudes"),
    ("lora_bias", "biases of the low-rank matrices"),
    ("modules_to_save", "whole layers beside the low-rank matrices"),
    ("trainable_token_indices", "trained tokens"),
    ("target_parameters", "parameters that are no projections, as those of experts"),
    ("layer_replication", "layers that are there several times"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "block-diagonal matrices"),
    ("alora_invocation_tokens", "activation by a token (aLoRA)"),
    ("arrow_config", "a router of adapters (Arrow)"),
    ("kasa_config", "KaSA"),
    ("velora_config", "VeLoRA"),
    ("monteclora_config", "MonteCLoRA"),
];

/// Ways to begin a training that change the base model's own weights.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

impl AdapterConfig {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self, AdapterError> {
        let fields: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| AdapterError::NotJson { reason: error.to_string() })?;
        refuse(&fields)?;
        let rank = fields.get("r").map(|value| positive("r", value)).transpose()?.unwrap_or(8);
        let alpha =
            fields.get("lora_alpha").map(|value| number("lora_alpha", value)).transpose()?;
        let mut ranks = Vec::new();
        for (name, value) in pattern(&fields, "rank_pattern")? {
            ranks.push((name, positive("rank_pattern", value)?));
        }
        let mut alphas = Vec::new();
        for (name, value) in pattern(&fields, "alpha_pattern")? {
            alphas.push((name, number("alpha_pattern", value)?));
        }
        Ok(Self {
            rank,
            alpha: alpha.unwrap_or(8.0),
            rank_stabilised: says(fields.get("use_rslora")),
            ranks,
            alphas,
            targets: targets(&fields)?,
        })
    }

    /// The rank that a module has, by its name in the base model.
    pub fn rank(&self, module: &str) -> u32 {
        find(&self.ranks, module).unwrap_or(self.rank)
    }

    /// What multiplies the product of the two matrices.
    pub fn scaling(&self, module: &str) -> f32 {
        let alpha = find(&self.alphas, module).unwrap_or(self.alpha);
        let rank = f64::from(self.rank(module));
        (alpha / if self.rank_stabilised { rank.sqrt() } else { rank }) as f32
    }

    /// The first named target that none of these modules is: matrices that should be there are not.
    pub fn missing_target(&self, modules: &[&str]) -> Option<&str> {
        let mut targets = self.targets.iter().flatten();
        let missing =
            targets.find(|target| !modules.iter().any(|module| ends_with(module, target)));
        missing.map(String::as_str)
    }
}

/// Whether a field is there and says something else than no.
fn says(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

fn refuse(fields: &Map<String, Value>) -> Result<(), AdapterError> {
    let unsupported = |field: &str, value: &Value, supported: &str| {
        Err(AdapterError::Unsupported {
            field: field.to_owned(),
            value: value.to_string(),
            supported: supported.to_owned(),
        })
    };
    let word = |field: &str| fields.get(field).unwrap_or(&Value::Null);
    if word("peft_type") != "LORA" {
        return unsupported("peft_type", word("peft_type"), "\"LORA\"");
    }
    let task = word("task_type");
    if !task.is_null() && task != "CAUSAL_LM" {
        return unsupported("task_type", task, "\"CAUSAL_LM\"");
    }
    let bias = word("bias");
    if !bias.is_null() && bias != "none" {
        return unsupported("bias", bias, "\"none\": an adapter with biases has to be merged");
    }
    for (field, what) in REFUSED {
        if says(fields.get(*field)) {
            let supported = format!("an adapter without it: {what} are not served; merge it");
            return unsupported(field, word(field), &supported);
        }
    }
    let init = word("init_lora_weights");
    let changes = |init: &str| CHANGES_BASE.iter().any(|begin| init.starts_with(begin));
    if init.as_str().is_some_and(changes) {
        let words = "an adapter for the base model as it is: this one was trained beside other base \
                     weights; save it with path_initial_model_for_weight_conversion";
        return unsupported("init_lora_weights", init, words);
    }
    Ok(())
}

/// The ends of the targets' names. A regular expression, or `all-linear`, says no more than the names of
/// the matrices themselves.
fn targets(fields: &Map<String, Value>) -> Result<Option<Vec<String>>, AdapterError> {
    let bad = |value: &Value| AdapterError::BadValue {
        field: "target_modules".to_owned(),
        value: value.to_string(),
        expected: "a list of names, a regular expression or \"all-linear\"".to_owned(),
    };
    match fields.get("target_modules") {
        None | Some(Value::Null | Value::String(_)) => Ok(None),
        Some(list @ Value::Array(names)) => {
            let name = |name: &Value| name.as_str().map(str::to_owned).ok_or_else(|| bad(list));
            names.iter().map(name).collect::<Result<_, _>>().map(Some)
        }
        Some(other) => Err(bad(other)),
    }
}

fn positive(field: &str, value: &Value) -> Result<u32, AdapterError> {
    let found = value.as_u64().and_then(|n| u32::try_from(n).ok());
    found.filter(|n| (1..=RANK_MAX).contains(n)).ok_or_else(|| AdapterError::BadValue {
        field: field.to_owned(),
        value: value.to_string(),
        expected: format!("a rank of 1 to {RANK_MAX}"),
    })
}

fn number(field: &str, value: &Value) -> Result<f64, AdapterError> {
    value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| AdapterError::BadValue {
        field: field.to_owned(),
        value: value.to_string(),
        expected: "a number".to_owned(),
    })
}

/// The entries of a pattern. PEFT takes each key as a regular expression for the end of a name; here it
/// is the end of a name, and one that is more is refused.
fn pattern<'a>(
    fields: &'a Map<String, Value>,
    field: &str,
) -> Result<Vec<(String, &'a Value)>, AdapterError> {
    let Some(Value::Object(entries)) = fields.get(field) else { return Ok(Vec::new()) };
    let plain = |key: &str| {
        key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '-')
    };
    let entry = |(key, value): (&String, &'a Value)| {
        let name = key.trim_start_matches('^').replace("\\.", ".");
        if plain(&name) {
            return Ok((name, value));
        }
        Err(AdapterError::Unsupported {
            field: field.to_owned(),
            value: key.clone(),
            supported: "names of modules or their ends, as `q_proj` or `layers.0.mlp.up_proj`"
                .to_owned(),
        })
    };
    entries.iter().map(entry).collect()
}

/// The value of the first entry that a module's name ends with.
fn find<T: Copy>(entries: &[(String, T)], module: &str) -> Option<T> {
    entries.iter().find(|(end, _)| ends_with(module, end)).map(|(_, value)| *value)
}

/// Whether a name is `end`, or ends with it behind a dot.
fn ends_with(module: &str, end: &str) -> bool {
    module.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
