//! DeepSeek-V2: attention over a compressed cache, experts chosen within groups, shared experts.

use serde_json::Value;

use crate::model::config::{Common, HEAD_DIM_MAX, HIDDEN_MAX, full_attention_only};
use crate::model::families::Definition;
use crate::model::families::experts::{
    EXPERTS, Experts, SHARED_EXPERTS, expert_width, set_experts,
};
use crate::model::fields::{Fields, bad, short, unsupported};
use crate::model::moe::{Groups, Mla, Moe};
use crate::model::options::Options;
use crate::model::rope;
use crate::model::spec::{Family, ModelSpec, RopeScaling, SpecError};
use crate::model::table::{EMBEDDING, HEAD, INPUT_NORM, MLP, MLP_NORM, Place, Row, Shape};
use crate::model::tensors::Excerpt;
use crate::model::tensors::TensorRole::{self, *};

pub(super) const DEFINITION: Definition = Definition {
    architecture: "DeepseekV2ForCausalLM",
    model_type: "deepseek_v2",
    names: NAMES,
    read,
};

fn read(config: Fields<'_>) -> Result<ModelSpec, SpecError> {
    let (mut spec, moe) = read_deepseek(config, Family::DeepSeek2)?;
    // transformers ignores it, the authors' code does not; no published model sets it.
    if config.flag("norm_topk_prob", false)? {
        return Err(unsupported("norm_topk_prob", "true", "false"));
    }
    let groups = match config.get("topk_method").map(|method| (method, method.as_str())) {
        None | Some((_, Some("greedy"))) => None,
        Some((_, Some("group_limited_greedy"))) => Some(groups(config, &moe, 1)?),
        Some((method, _)) => {
            let supported = "`greedy`, `group_limited_greedy`";
            return Err(unsupported("topk_method", short(method), supported));
        }
    };
    let moe = Moe { groups, normalise: false, ..moe };
    let dense = first_dense(config, 0)?;
    set_experts(&mut spec, moe, |layer| u64::from(layer) >= dense);
    Ok(spec)
}

/// What V2 and V3 share. The layers are still dense.
pub(super) fn read_deepseek(
    config: Fields<'_>,
    family: Family,
) -> Result<(ModelSpec, Moe), SpecError> {
    let mla = Mla {
        q_rank: config.maybe_size("q_lora_rank", HIDDEN_MAX)?,
        kv_rank: config.size("kv_lora_rank", HIDDEN_MAX)?,
        nope: config.size("qk_nope_head_dim", HEAD_DIM_MAX)?,
        rope: config.size("qk_rope_head_dim", HEAD_DIM_MAX)?,
        value: config.size("v_head_dim", HEAD_DIM_MAX)?,
    };
    if !mla.rope.is_multiple_of(2) {
        return Err(SpecError::BadValue {
            field: "qk_rope_head_dim",
            value: mla.rope.to_string(),
            expected: "an even number: rotary embedding turns pairs".into(),
        });
    }
    // Files may say the width of the rotated part here.
    let mut rest = config.0.clone();
    rest.insert("head_dim".into(), mla.rope.into());
    let mut spec = Common { eps: Some(1e-6), ..Common::of(family) }.read(Fields(&rest))?;
    full_attention_only(config)?;
    if spec.kv_heads != spec.heads {
        let expected = format!("`num_attention_heads`, which is {}", spec.heads);
        let value = spec.kv_heads.to_string();
        return Err(SpecError::BadValue { field: "num_key_value_heads", value, expected });
    }
    for field in ["attention_bias", "mlp_bias"] {
        if config.flag(field, false)? {
            return Err(unsupported(field, "true", "false"));
        }
    }
    spec.head_dim = mla.nope + mla.rope;
    let mut scale = (1.0 / f64::from(spec.head_dim).sqrt()) as f32;
    let rope = rope::read(config, rope::THETA, spec.context_max)?;
    if let (RopeScaling::Yarn { factor, .. }, Some(mscale)) = (rope.scaling, rope.mscale_all_dim)
        && mscale != 0.0
    {
        let mscale = 0.1 * f64::from(mscale) * f64::from(factor).ln() + 1.0;
        scale = (f64::from(scale) * mscale * mscale) as f32;
    }
    spec.options = Options {
        rotary_dim: Some(mla.rope),
        interleaved: config.flag("rope_interleave", true)?,
        attention_scale: Some(scale),
        mla: Some(mla),
        ..spec.options
    };
    let width = expert_width(config)?;
    let moe = Experts { count: "n_routed_experts" }.read(config, width)?;
    let shared = config.maybe_size("n_shared_experts", 1 << 10)?.map(|count| count * width);
    let scale = config.maybe_number("routed_scaling_factor", 1e-6, 1e6)?.unwrap_or(1.0);
    Ok((spec, Moe { shared, scale, ..moe }))
}

/// How many of the first layers have no experts.
pub(super) fn first_dense(config: Fields<'_>, default: u64) -> Result<u64, SpecError> {
    let field = "first_k_dense_replace";
    match config.get(field) {
        None => Ok(default),
        Some(value) => value.as_u64().ok_or_else(|| bad(field, value, "a whole number from 0 on")),
    }
}

/// The groups that experts are chosen from.
pub(super) fn groups(config: Fields<'_>, moe: &Moe, best: u32) -> Result<Groups, SpecError> {
    let groups = config.size("n_group", u64::from(moe.experts))?;
    let kept = config.size("topk_group", u64::from(groups))?;
    let wrong = |expected: String| {
        let value = config.get("n_group").unwrap_or(&Value::Null);
        Err(bad("n_group", value, expected))
    };
    if !moe.experts.is_multiple_of(groups) {
        return wrong(format!("a divisor of the number of experts, which is {}", moe.experts));
    }
    let size = moe.experts / groups;
    if size < best || kept * size < moe.top_k {
        return wrong(format!(
            "groups of at least {best} experts, {kept} of which hold the {} of a row",
            moe.top_k
        ));
    }
    Ok(Groups { groups, kept, best })
}

const fn row(role: TensorRole, name: &'static str, shape: fn(&ModelSpec) -> Shape) -> Row {
    Row::new(role, Place::Layer, name, shape)
}

fn mla(spec: &ModelSpec, size: fn(Mla) -> u32) -> u32 {
    spec.options.mla.map_or(0, size)
}

fn q_rank(spec: &ModelSpec) -> Option<u32> {
    spec.options.mla.and_then(|mla| mla.q_rank)
}

const KV_UP: &str = "model.layers.{}.self_attn.kv_b_proj.weight";

/// Where in [`KV_UP`] a head's part begins, `skip` rows in.
fn kv_up(spec: &ModelSpec, head: u32, skip: u32) -> Option<Excerpt> {
    let mla = spec.options.mla?;
    let height = u64::from(mla.nope + mla.value);
    let stored = vec![u64::from(spec.heads) * height, mla.kv_rank.into()];
    Some(Excerpt::rows(stored, u64::from(head) * height + u64::from(skip)))
}

const LATENT_ATTENTION: &[Row] = &[
    row(QueryDown, "model.layers.{}.self_attn.q_a_proj.weight", |m| {
        Shape::Matrix(q_rank(m).unwrap_or(0), m.hidden)
    })
    .when(|m, _| q_rank(m).is_some()),
    row(QueryDownNorm, "model.layers.{}.self_attn.q_a_layernorm.weight", |m| {
        Shape::Vector(q_rank(m).unwrap_or(0))
    })
    .when(|m, _| q_rank(m).is_some()),
    row(Query, "model.layers.{}.self_attn.q_b_proj.weight", |m| {
        Shape::Matrix(m.query_width(), q_rank(m).unwrap_or(0))
    })
    .when(|m, _| q_rank(m).is_some()),
    row(Query, "model.layers.{}.self_attn.q_proj.weight", |m| {
        Shape::Matrix(m.query_width(), m.hidden)
    })
    .when(|m, _| q_rank(m).is_none()),
    row(KvDown, "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight", |m| {
        Shape::Matrix(mla(m, |mla| mla.cached()), m.hidden)
    }),
    row(KvDownNorm, "model.layers.{}.self_attn.kv_a_layernorm.weight", |m| {
        Shape::Vector(mla(m, |mla| mla.kv_rank))
    }),
    row(KeyUp, KV_UP, |m| Shape::Matrix(mla(m, |mla| mla.kv_rank), mla(m, |mla| mla.nope)))
        .each(|m| m.heads)
        .out_of(|m, head| kv_up(m, head, 0).map(|rows| rows.turned(0, 1))),
    row(ValueUp, KV_UP, |m| Shape::Matrix(mla(m, |mla| mla.value), mla(m, |mla| mla.kv_rank)))
        .each(|m| m.heads)
        .out_of(|m, head| kv_up(m, head, mla(m, |mla| mla.nope))),
    row(AttentionOutput, "model.layers.{}.self_attn.o_proj.weight", |m| {
        Shape::Matrix(m.hidden, m.heads * mla(m, |mla| mla.value))
    }),
];

/// Those of V3, too.
pub(super) const NAMES: &[&[Row]] =
    &[EMBEDDING, INPUT_NORM, LATENT_ATTENTION, MLP_NORM, MLP, EXPERTS, SHARED_EXPERTS, HEAD];
