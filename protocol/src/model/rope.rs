//! The rotary part of a `config.json`: base, scaling and how much of a head is rotated.

use serde_json::Value;

use crate::model::config::CONTEXT_MAX;
use crate::model::fields::{Fields, bad, short, unsupported};
use crate::model::options::RopeFactors;
use crate::model::spec::{RopeScaling, SpecError};

/// `rope_theta` where the file does not say; transformers' default, and that of Llama 2.
pub(super) const THETA: f32 = 10_000.0;
/// Far beyond any published base, and small enough for f32.
const THETA_MAX: f64 = 1e15;

/// See the module.
pub(super) struct Rope {
    pub(super) theta: f32,
    pub(super) scaling: RopeScaling,
    /// The part of a head's dimensions that is rotated.
    pub(super) partial: f64,
    pub(super) factors: RopeFactors,
    /// `mscale_all_dim` of YaRN, with which DeepSeek scales scores.
    pub(super) mscale_all_dim: Option<f32>,
}

impl Rope {
    fn plain(theta: f32, partial: f64) -> Self {
        let factors = RopeFactors::default();
        Self { theta, scaling: RopeScaling::None, partial, factors, mscale_all_dim: None }
    }

    /// Checks that there is one factor a pair.
    pub(super) fn check_factors(&self, rotary_dim: u32) -> Result<(), SpecError> {
        let RopeScaling::LongRope { .. } = self.scaling else { return Ok(()) };
        let pairs = rotary_dim as usize / 2;
        for (field, factors) in
            [("short_factor", &self.factors.short), ("long_factor", &self.factors.long)]
        {
            if factors.len() != pairs {
                return Err(SpecError::BadValue {
                    field,
                    value: format!("a list of {}", factors.len()),
                    expected: format!("{pairs} numbers, one for each pair of rotated dimensions"),
                });
            }
        }
        Ok(())
    }
}

/// The base and the scaling, from `rope_parameters` (transformers 5) or `rope_scaling` and
/// `rope_theta` (transformers 4).
pub(super) fn read(
    config: Fields<'_>,
    default_theta: f32,
    context: u32,
) -> Result<Rope, SpecError> {
    let outer = config.get("rope_theta");
    let (field, value) = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(parameters), _) => ("rope_parameters", Some(parameters)),
        (None, scaling) => ("rope_scaling", scaling),
    };
    let original = config.maybe_size("original_max_position_embeddings", CONTEXT_MAX)?;
    let mut rope = read_one((field, value), (outer, default_theta), (context, original))?;
    if let Some(factor) = config.get("partial_rotary_factor") {
        rope.partial = partial(factor)?;
    }
    Ok(rope)
}

fn partial(value: &Value) -> Result<f64, SpecError> {
    value
        .as_f64()
        .filter(|factor| (0.0..=1.0).contains(factor))
        .ok_or_else(|| bad("partial_rotary_factor", value, "a number from 0 to 1"))
}

/// One rotation out of the object that describes it.
pub(super) fn read_one(
    (field, value): (&'static str, Option<&Value>),
    (outer, default_theta): (Option<&Value>, f32),
    (context, original): (u32, Option<u32>),
) -> Result<Rope, SpecError> {
    let Some(value) = value else { return Ok(Rope::plain(theta(outer, default_theta)?, 1.0)) };
    let Value::Object(map) = value else {
        return Err(bad(field, value, "an object, or null"));
    };
    let rope = Fields(map);
    let inner = rope.get("rope_theta");
    if let (Some(inner), Some(outer)) = (inner, outer)
        && inner.as_f64() != outer.as_f64()
    {
        return Err(bad(
            "rope_theta",
            outer,
            format!("the same as `rope_theta` in `{field}`, which is {}", short(inner)),
        ));
    }
    let theta = theta(inner.or(outer), default_theta)?;
    let part = rope.get("partial_rotary_factor").map_or(Ok(1.0), partial)?;
    // Before transformers 4.43 the key was `type`.
    let rope_type = match rope.get("rope_type").or_else(|| rope.get("type")) {
        Some(name) => name.as_str().ok_or_else(|| bad("rope_type", name, "a name"))?,
        // With nothing but a base it is the plain kind; anything else is a kind we would guess.
        None if map.keys().all(|key| key == "rope_theta" || key == "partial_rotary_factor") => {
            "default"
        }
        None => {
            return Err(SpecError::Missing {
                field: "rope_type",
                expected: format!(
                    "it in `{field}`: one of default, linear, llama3, yarn, longrope"
                ),
            });
        }
    };
    // Below 1 the context would shrink; above a million a frequency is 0.
    let factor = || rope.number("factor", 1.0, 1e6);
    let mut read = Rope::plain(theta, part);
    read.scaling = match rope_type {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => llama3(rope, factor()?)?,
        "yarn" => {
            read.mscale_all_dim = rope.maybe_number("mscale_all_dim", 0.0, 1e3)?;
            yarn(rope, factor()?)?
        }
        "longrope" | "su" => {
            read.factors = RopeFactors {
                short: numbers(rope, "short_factor")?,
                long: numbers(rope, "long_factor")?,
            };
            longrope(rope, context, original)?
        }
        other => {
            return Err(unsupported(
                "rope_type",
                format!("`{other}`"),
                "`default`, `linear`, `llama3`, `yarn`, `longrope`",
            ));
        }
    };
    Ok(read)
}

fn llama3(rope: Fields<'_>, factor: f32) -> Result<RopeScaling, SpecError> {
    let low_freq_factor = rope.number("low_freq_factor", 1e-6, 1e6)?;
    let high_freq_factor = rope.number("high_freq_factor", 1e-6, 1e6)?;
    if high_freq_factor <= low_freq_factor {
        return Err(SpecError::BadValue {
            field: "high_freq_factor",
            value: high_freq_factor.to_string(),
            expected: format!("more than `low_freq_factor`, which is {low_freq_factor}"),
        });
    }
    let original_context = rope.size("original_max_position_embeddings", CONTEXT_MAX)?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
}

fn yarn(rope: Fields<'_>, factor: f32) -> Result<RopeScaling, SpecError> {
    let scale = |mscale: f64| 0.1 * mscale * f64::from(factor).ln() + 1.0;
    let given = rope.maybe_number("attention_factor", 1e-6, 1e6)?;
    let mscale = rope.maybe_number("mscale", 0.0, 1e3)?.filter(|scale| *scale != 0.0);
    let all_dim = rope.maybe_number("mscale_all_dim", 0.0, 1e3)?.filter(|scale| *scale != 0.0);
    let attention_factor = match (given, mscale, all_dim) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => {
            (scale(f64::from(mscale)) / scale(f64::from(all_dim))) as f32
        }
        _ => scale(1.0) as f32,
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context: rope.size("original_max_position_embeddings", CONTEXT_MAX)?,
        beta_fast: rope.maybe_number("beta_fast", 1e-6, 1e6)?.unwrap_or(32.0),
        beta_slow: rope.maybe_number("beta_slow", 1e-6, 1e6)?.unwrap_or(1.0),
        attention_factor,
        truncate: rope.flag("truncate", true)?,
    })
}

fn longrope(
    rope: Fields<'_>,
    context: u32,
    original: Option<u32>,
) -> Result<RopeScaling, SpecError> {
    let field = "original_max_position_embeddings";
    let original_context = match (rope.maybe_size(field, CONTEXT_MAX)?, original) {
        (Some(original), _) | (None, Some(original)) => original,
        (None, None) => context,
    };
    let stretch = f64::from(context) / f64::from(original_context);
    let factor = rope.maybe_number("factor", 1.0, 1e6)?.map_or(stretch, f64::from);
    let attention_factor = match rope.maybe_number("attention_factor", 1e-6, 1e6)? {
        Some(given) => given,
        None if factor <= 1.0 || original_context < 2 => 1.0,
        None => (1.0 + factor.ln() / f64::from(original_context).ln()).sqrt() as f32,
    };
    Ok(RopeScaling::LongRope { original_context, attention_factor })
}

/// A list of positive numbers.
fn numbers(rope: Fields<'_>, field: &'static str) -> Result<Vec<f32>, SpecError> {
    let expected = "a list of numbers over 0 and up to 1000000, one for each pair of dimensions";
    let value = rope
        .get(field)
        .ok_or_else(|| SpecError::Missing { field, expected: expected.to_owned() })?;
    let number = |value: &Value| value.as_f64().filter(|n| *n > 0.0 && *n <= 1e6);
    let numbers: Option<Vec<f32>> = value
        .as_array()
        .and_then(|list| list.iter().map(|value| number(value).map(|n| n as f32)).collect());
    numbers.ok_or_else(|| bad(field, value, expected))
}

/// The rotary base, out of whichever place gave it.
pub(super) fn theta(value: Option<&Value>, default: f32) -> Result<f32, SpecError> {
    let Some(value) = value else { return Ok(default) };
    match value.as_f64().filter(|n| *n > 1.0 && *n <= THETA_MAX) {
        Some(theta) => Ok(theta as f32),
        None => Err(bad("rope_theta", value, format!("a number over 1 and up to {THETA_MAX:e}"))),
    }
}
