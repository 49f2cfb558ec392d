//! Which tensor of a GGUF file is which of a model, and where in it.
//!
//! ```text
//! metadata ─► config.json's words ─► ModelSpec ─► its tensors ─► name in the file, first row, rows
//! ```
//!
//! Files keep several tensors in one (the experts of a layer, the heads of DeepSeek's compression, Phi-3's fused
//! projections): each is a stretch of whole rows, so a location says all.

use std::collections::HashSet;
use std::path::Path;

use super::architectures::Architecture;
use super::config::{FACTORS, Source};
use super::parts::Parts;
use super::type_name;
use crate::model::checkpoint::{CheckpointError, TensorLocation};
use crate::model::spec::{Family, ModelSpec};
use crate::model::stored::RowOrder;
use crate::model::tensors::{TensorRole, TensorSpec};
use crate::units::LayerRange;

/// What was found in a file, or in all its parts.
pub(in crate::model) struct Found {
    pub(in crate::model) spec: ModelSpec,
    /// As [`ModelSpec::tensors`] lists them, [`renamed`].
    pub(in crate::model) tensors: Vec<(TensorSpec, TensorLocation)>,
    pub(in crate::model) parts: Parts,
}

/// Reads a model's headers and finds the model in them. `path` is its first file.
pub(in crate::model) fn open(path: &Path) -> Result<Found, CheckpointError> {
    let parts = Parts::read(path)?;
    let bad = |reason: String| CheckpointError::Gguf { file: path.to_owned(), reason };
    let source = Source::of(&parts).map_err(bad)?;
    let config = serde_json::Value::Object(source.config()?).to_string();
    let spec = ModelSpec::from_config_json(&config)
        .map_err(|error| bad(format!("its metadata, read as config.json, are refused: {error}")))?;
    let (mut tensors, mut used) = (Vec::new(), HashSet::new());
    for wanted in spec.tensors(LayerRange::new(0, spec.layers)) {
        let wanted = renamed(wanted);
        let (name, location) = locate(&parts, source.architecture, &spec, &wanted)?;
        used.insert(name);
        tensors.push((wanted, location));
    }
    // What would not be read might change what the model says.
    let is_other = |name: &&str| !used.contains(*name) && !is_left_out(name, spec.layers);
    if let Some(other) = parts.names().find(is_other) {
        return Err(bad(format!(
            "it has a tensor `{other}`, and {} as it is read here has none such: not supported",
            spec.family.architecture()
        )));
    }
    Ok(Found { spec, tensors, parts })
}

/// Factors of rotations, which are read with the metadata, and layers that predict further tokens.
fn is_left_out(name: &str, layers: u32) -> bool {
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse().ok());
    layer.is_some_and(|layer: u32| layer >= layers)
        || FACTORS.contains(&name)
        || name.ends_with(".attn_rot_embd")
}

/// A tensor as a checkpoint of GGUF lists it: parts of other families' files are tensors of their own.
pub(in crate::model) fn renamed(tensor: TensorSpec) -> TensorSpec {
    if tensor.excerpt.is_none() {
        return tensor;
    }
    let name = format!("{} ({:?} {})", tensor.name, tensor.role, tensor.index);
    TensorSpec { name, excerpt: None, ..tensor }
}

/// Where a tensor is in a file's.
struct Place {
    name: String,
    /// The first of the rows, or elements of a vector, that are it.
    first: u64,
    /// How many the file's tensor has.
    all: u64,
}

fn locate(
    parts: &Parts,
    architecture: &Architecture,
    spec: &ModelSpec,
    wanted: &TensorSpec,
) -> Result<(String, TensorLocation), CheckpointError> {
    let places = places(spec, wanted);
    let found = places.iter().find_map(|place| Some((place, parts.tensor(&place.name)?)));
    let Some((Place { name, first, all }, (file, tensor))) = found else {
        let file = parts.path().to_owned();
        let Some(Place { name, .. }) = places.into_iter().next() else {
            let reason = format!("`{}` has no name in GGUF files known here", wanted.name);
            return Err(CheckpointError::Gguf { file, reason });
        };
        let expected = wanted.shape.clone();
        return Err(CheckpointError::MissingTensor { file, tensor: name, expected });
    };
    let unsupported = |found: String| CheckpointError::UnsupportedType {
        file: file.to_path_buf(),
        tensor: name.clone(),
        found,
    };
    let dtype = tensor.dtype.map_err(|number| unsupported(type_name(number)))?;
    if !wanted.is_matrix && !dtype.is_plain() {
        return Err(unsupported(format!("{dtype}, a vector")));
    }
    let columns = if wanted.is_matrix { wanted.shape[1] } else { 1 };
    let elements = tensor.shape.iter().try_fold(1_u64, |n, dim| n.checked_mul(*dim));
    let is_as_wide = !wanted.is_matrix || tensor.shape.last() == Some(&columns);
    let row = dtype.row_bytes(columns);
    let (Some(row), true, true) = (row, is_as_wide, elements == all.checked_mul(columns)) else {
        let whole = *all == wanted.shape[0];
        return Err(CheckpointError::WrongShape {
            file: file.to_path_buf(),
            tensor: name.clone(),
            found: tensor.shape.clone(),
            expected: if whole { wanted.shape.clone() } else { vec![*all, columns] },
        });
    };
    let turned = [TensorRole::Query, TensorRole::QueryBias, TensorRole::Key, TensorRole::KeyBias];
    let order = match architecture.is_turned && turned.contains(&wanted.role) {
        true => RowOrder::PairsTogether { head_dim: spec.head_dim },
        false => RowOrder::AsIs,
    };
    let location = TensorLocation {
        file: file.clone(),
        offset: tensor.offset + first * row,
        len: wanted.shape[0] * row,
        dtype,
        shape: wanted.shape.clone(),
        order,
        scales: None,
    };
    Ok((name.clone(), location))
}

/// Where a tensor may be, the usual place first.
fn places(spec: &ModelSpec, wanted: &TensorSpec) -> Vec<Place> {
    use TensorRole::*;
    let Some(name) = name_of(spec, wanted.role) else { return Vec::new() };
    let called = |name: &str| match wanted.layer {
        Some(layer) => format!("blk.{layer}.{name}"),
        None => name.to_owned(),
    };
    let (rows, index) = (wanted.shape[0], u64::from(wanted.index));
    let whole = |name: &str| Place { name: called(name), first: 0, all: rows };
    // One of several, each of so many rows.
    let one_of = |name: &str, each: u64, first: u64, count: u32| Place {
        name: called(name),
        first: index * each + first,
        all: u64::from(count) * each,
    };
    let (query, key) = (u64::from(spec.query_width()), u64::from(spec.kv_width()));
    let fused = |name: &str, first: u64| Place { name: called(name), first, all: query + 2 * key };
    let experts = spec.options.moe.map_or(0, |moe| moe.experts);
    match wanted.role {
        Gate | Up if spec.family == Family::Phi3 => {
            let first = if wanted.role == Up { rows } else { 0 };
            vec![Place { name: called("ffn_up.weight"), first, all: 2 * rows }]
        }
        Query if spec.options.mla.is_some() => vec![whole(name)],
        Query => vec![whole(name), fused("attn_qkv.weight", 0)],
        Key => vec![whole(name), fused("attn_qkv.weight", query)],
        Value => vec![whole(name), fused("attn_qkv.weight", query + key)],
        QueryBias => vec![whole(name), fused("attn_qkv.bias", 0)],
        KeyBias => vec![whole(name), fused("attn_qkv.bias", query)],
        ValueBias => vec![whole(name), fused("attn_qkv.bias", query + key)],
        KeyUp | ValueUp => vec![one_of(name, rows, 0, spec.heads)],
        ExpertGate | ExpertUp | ExpertDown => {
            let first = if wanted.role == ExpertUp { rows } else { 0 };
            let both = one_of("ffn_gate_up_exps.weight", 2 * rows, first, experts);
            // Before they were merged each was a tensor of its own.
            let alone = name.replace("_exps", &format!(".{index}"));
            let mut places = vec![one_of(name, rows, 0, experts), whole(&alone)];
            places.extend((wanted.role != ExpertDown).then_some(both));
            places
        }
        role if role.is_expert() => vec![one_of(name, rows, 0, experts)],
        _ => vec![whole(name)],
    }
}

/// What a tensor is called in GGUF files.
fn name_of(spec: &ModelSpec, role: TensorRole) -> Option<&'static str> {
    use TensorRole::*;
    let is_compressed = spec.options.mla.is_some_and(|mla| mla.q_rank.is_some());
    Some(match role {
        Embedding => "token_embd.weight",
        OutputHead if spec.tied_embeddings => "token_embd.weight",
        OutputHead => "output.weight",
        FinalNorm => "output_norm.weight",
        FinalNormBias => "output_norm.bias",
        AttentionNorm => "attn_norm.weight",
        AttentionNormBias => "attn_norm.bias",
        Query if is_compressed => "attn_q_b.weight",
        Query => "attn_q.weight",
        QueryBias => "attn_q.bias",
        Key => "attn_k.weight",
        KeyBias => "attn_k.bias",
        Value => "attn_v.weight",
        ValueBias => "attn_v.bias",
        QueryNorm => "attn_q_norm.weight",
        KeyNorm => "attn_k_norm.weight",
        Sinks => "attn_sinks.weight",
        QueryDown => "attn_q_a.weight",
        QueryDownNorm => "attn_q_a_norm.weight",
        KvDown => "attn_kv_a_mqa.weight",
        KvDownNorm => "attn_kv_a_norm.weight",
        KeyUp => "attn_k_b.weight",
        ValueUp => "attn_v_b.weight",
        AttentionOutput => "attn_output.weight",
        AttentionOutputBias => "attn_output.bias",
        PostAttentionNorm => "post_attention_norm.weight",
        MlpNorm if spec.family == Family::GptOss => "post_attention_norm.weight",
        MlpNorm => "ffn_norm.weight",
        MlpNormBias => "ffn_norm.bias",
        PostMlpNorm => "post_ffw_norm.weight",
        Gate => "ffn_gate.weight",
        GateBias => "ffn_gate.bias",
        Up => "ffn_up.weight",
        UpBias => "ffn_up.bias",
        Down => "ffn_down.weight",
        DownBias => "ffn_down.bias",
        Router => "ffn_gate_inp.weight",
        RouterBias => "ffn_gate_inp.bias",
        RouterCorrection => "exp_probs_b.bias",
        ExpertGate => "ffn_gate_exps.weight",
        ExpertGateBias => "ffn_gate_exps.bias",
        ExpertUp => "ffn_up_exps.weight",
        ExpertUpBias => "ffn_up_exps.bias",
        ExpertDown => "ffn_down_exps.weight",
        ExpertDownBias => "ffn_down_exps.bias",
        SharedGate => "ffn_gate_shexp.weight",
        SharedUp => "ffn_up_shexp.weight",
        SharedDown => "ffn_down_shexp.weight",
        SharedWeight => "ffn_gate_inp_shexp.weight",
        // Encoders are not read from such files.
        _ => return None,
    })
}
