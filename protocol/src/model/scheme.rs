//! How `config.json` says that weights are quantised: FP8, GPTQ, AWQ and MXFP4.
//!
//! Such a matrix is several tensors, which [`Scheme::locate`] finds together. A scheme that is not read
//! is refused by name.

use std::sync::Arc;

use serde_json::Value;

use crate::model::checkpoint::{CheckpointError, TensorLocation, unsupported};
use crate::model::files::WeightFiles;
use crate::model::safetensors::HeaderTensor;
use crate::model::spec::SpecError;
use crate::model::stored::{FourBitPacking, StoredPart, StoredScales, StoredType};
use crate::model::tensors::TensorSpec;
use crate::plan::Precision;

/// Numbers of four bits in a word.
const IN_WORD: u64 = 8;
/// What is read, in the words of a refusal.
const SUPPORTED: &str = "`fp8` (e4m3), `compressed-tensors` with float-quantized weights of 8 bits, \
                         `gptq` and `awq` (gemm) with 4 bits, `mxfp4` as GPT-OSS has it; or weights stored as f32, bf16 or f16 \
                         without `quantization_config`";

/// How matrices are quantised.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scheme {
    /// Eight bits each; rows and columns of a block, 0 where there are none.
    Fp8 { block: (u64, u64) },
    /// Four bits each; 0: one group for all columns.
    FourBits { packing: FourBitPacking, group: u64, zero_offset: u8 },
    /// Experts alone: four bits each, an exponent for 32.
    Mxfp4,
}

impl Scheme {
    /// What a `config.json` says.
    pub(super) fn of_config(text: &str) -> Result<Option<Self>, SpecError> {
        let config: Value = serde_json::from_str(text)
            .map_err(|error| SpecError::NotJson { reason: error.to_string() })?;
        let quantization = config.get("quantization_config").filter(|value| !value.is_null());
        quantization.map(Self::of).transpose()
    }

    /// Reads a `quantization_config`.
    pub(super) fn of(quantization: &Value) -> Result<Self, SpecError> {
        let refuse = |what: String| {
            Err(SpecError::Unsupported {
                field: "quantization_config",
                value: what,
                supported: SUPPORTED.to_owned(),
            })
        };
        let text = |name: &str| quantization.get(name).and_then(Value::as_str).unwrap_or_default();
        let number = |name: &str| quantization.get(name).and_then(Value::as_i64);
        let shown = |name: &str| {
            let value = quantization.get(name).unwrap_or(&Value::Null).to_string();
            value.chars().take(80).collect::<String>()
        };
        let method = text("quant_method").to_lowercase();
        let four_bits = |packing, zero_offset| {
            let bits = number("bits").or_else(|| number("w_bit"));
            if bits != Some(4) {
                return refuse(format!("`{method}` with bits {}", shown("bits")));
            }
            let group = number("group_size").or_else(|| number("q_group_size")).unwrap_or(128);
            match group {
                -1 => Ok(Self::FourBits { packing, group: 0, zero_offset }),
                1..=65_536 => Ok(Self::FourBits { packing, group: group as u64, zero_offset }),
                _ => refuse(format!("`{method}` with group_size {group}")),
            }
        };
        match method.as_str() {
            "fp8" => {
                if !matches!(text("fmt"), "" | "e4m3") {
                    return refuse(format!("`fp8` with fmt {}", shown("fmt")));
                }
                match quantization.get("weight_block_size").filter(|size| !size.is_null()) {
                    None => Ok(Self::Fp8 { block: (0, 0) }),
                    Some(size) => match block_size(size) {
                        Some(block) => Ok(Self::Fp8 { block }),
                        None => refuse(format!(
                            "`fp8` with weight_block_size {}",
                            shown("weight_block_size")
                        )),
                    },
                }
            }
            "compressed-tensors" => match compressed_tensors(quantization) {
                Some(block) => Ok(Self::Fp8 { block }),
                None => refuse(format!("`compressed-tensors` with format {}", shown("format"))),
            },
            "gptq" => match text("checkpoint_format") {
                // The first version of the format stores each zero less one.
                "" | "gptq" => four_bits(FourBitPacking::Gptq, 1),
                "gptq_v2" => four_bits(FourBitPacking::Gptq, 0),
                other => refuse(format!("`gptq` with checkpoint_format `{other}`")),
            },
            "awq" => match text("version").to_lowercase().as_str() {
                "" | "gemm" => four_bits(FourBitPacking::Awq, 0),
                other => refuse(format!("`awq` with version `{other}`")),
            },
            "mxfp4" => Ok(Self::Mxfp4),
            _ => refuse(format!("a quantisation with `{method}`")),
        }
    }

    /// The precision that holds such weights as they are stored, where there is one.
    pub(super) fn held(&self) -> Option<Precision> {
        let (weights, _) = Precision::Fp8.block();
        match self {
            // A block of ours lies in one of theirs.
            Self::Fp8 { block: (_, columns) } if columns.is_multiple_of(weights) => {
                Some(Precision::Fp8)
            }
            _ => None,
        }
    }

    /// Finds a matrix and what belongs to it. One that is not quantised is taken as it is.
    pub(super) fn locate(
        &self,
        files: &mut WeightFiles,
        wanted: &TensorSpec,
    ) -> Result<TensorLocation, CheckpointError> {
        if *self == Self::Mxfp4 {
            return locate_mxfp4(files, wanted);
        }
        let [rows, columns] = *wanted.stored_shape() else {
            return files.locate(&wanted.name, wanted.stored_shape());
        };
        let base = wanted.name.strip_suffix("weight").unwrap_or(&wanted.name).to_owned();
        match self {
            Self::Mxfp4 => locate_mxfp4(files, wanted),
            Self::Fp8 { block } => match files.take(&wanted.name) {
                Some((file, found)) if found.dtype == "F8_E4M3" => {
                    expect_shape(&file, &found, wanted.stored_shape())?;
                    let weight = StoredPart::of(file, found, StoredType::F8E4M3);
                    let scales = fp8_scales(files, &base, (rows, columns), *block)?;
                    Ok(TensorLocation { scales: Some(Box::new(scales)), ..weight.alone() })
                }
                Some((file, found)) => TensorLocation::check(file, found, wanted.stored_shape()),
                None => Err(files.missing(&wanted.name, wanted.stored_shape())),
            },
            Self::FourBits { packing, group, zero_offset } => {
                let Some((file, found)) = files.take(&format!("{base}qweight")) else {
                    return files.locate(&wanted.name, wanted.stored_shape());
                };
                let bad = |reason: String| CheckpointError::Quantised {
                    file: file.to_path_buf(),
                    tensor: format!("{base}qweight"),
                    reason,
                };
                let group = if *group == 0 { columns } else { *group };
                if !rows.is_multiple_of(IN_WORD) || !columns.is_multiple_of(IN_WORD) {
                    return Err(bad(format!(
                        "{rows} x {columns} numbers of four bits do not fill words of {IN_WORD}"
                    )));
                }
                let groups = columns.div_ceil(group);
                let shape = match packing {
                    FourBitPacking::Gptq => [columns / IN_WORD, rows],
                    FourBitPacking::Awq => [columns, rows / IN_WORD],
                };
                let words = part(file, found, &shape, WORDS)?;
                let mut other = |name: &str, shape: &[u64], types: &[_]| {
                    let name = format!("{base}{name}");
                    match files.take(&name) {
                        Some((file, found)) => part(file, found, shape, types),
                        None => Err(files.missing(&name, shape)),
                    }
                };
                let zeros = other("qzeros", &[groups, rows / IN_WORD], WORDS)?;
                let scales = other("scales", &[groups, rows], FLOATS)?;
                let groups_of = match (packing, other("g_idx", &[columns], WORDS)) {
                    (FourBitPacking::Gptq, Ok(found)) => Some(found),
                    // It need not be there.
                    (_, Err(CheckpointError::MissingTensor { .. })) | (FourBitPacking::Awq, _) => {
                        None
                    }
                    (_, Err(error)) => return Err(error),
                };
                let scales = StoredScales::FourBits {
                    packing: *packing,
                    group,
                    zeros,
                    scales,
                    groups: groups_of,
                    zero_offset: *zero_offset,
                };
                let shape = wanted.shape.clone();
                Ok(TensorLocation { shape, scales: Some(Box::new(scales)), ..words.alone() })
            }
        }
    }
}

/// Finds the blocks of an expert's matrix, `[experts, columns, rows / 32, 16]`, and their exponents.
fn locate_mxfp4(
    files: &mut WeightFiles,
    wanted: &TensorSpec,
) -> Result<TensorLocation, CheckpointError> {
    let blocks_name = format!("{}_blocks", wanted.name);
    let ([experts, rows, columns], Some((file, found))) =
        (wanted.stored_shape(), files.take(&blocks_name))
    else {
        return files.locate(&wanted.name, wanted.stored_shape());
    };
    let (in_block, bytes) = StoredType::Mxfp4.block();
    if !rows.is_multiple_of(in_block) {
        return Err(CheckpointError::Quantised {
            file: file.to_path_buf(),
            tensor: blocks_name,
            reason: format!("{rows} numbers are no whole blocks of {in_block}"),
        });
    }
    let typed = |file: Arc<std::path::Path>, found: HeaderTensor, shape: &[u64], dtype| {
        if found.dtype != "U8" {
            return Err(unsupported(&file, found));
        }
        expect_shape(&file, &found, shape)?;
        Ok(StoredPart::of(file, found, dtype))
    };
    let blocks = [*experts, *columns, rows / in_block, bytes];
    let weight = typed(file, found, &blocks, StoredType::Mxfp4)?;
    let name = format!("{}_scales", wanted.name);
    let Some((file, found)) = files.take(&name) else {
        return Err(files.missing(&name, &blocks[..3]));
    };
    let scales = typed(file, found, &blocks[..3], StoredType::U8)?;
    let (shape, scales) = (wanted.stored_shape().to_vec(), StoredScales::Exponents { scales });
    Ok(TensorLocation { shape, scales: Some(Box::new(scales)), ..weight.alone() })
}

fn block_size(size: &Value) -> Option<(u64, u64)> {
    let sizes: Vec<u64> = size.as_array()?.iter().filter_map(Value::as_u64).collect();
    match sizes[..] {
        [rows, columns] if rows > 0 && columns > 0 => Some((rows, columns)),
        _ => None,
    }
}

/// The block size where all groups are weights of eight bits with a fraction.
fn compressed_tensors(quantization: &Value) -> Option<(u64, u64)> {
    if quantization.get("format")?.as_str()? != "float-quantized" {
        return None;
    }
    let groups = quantization.get("config_groups")?.as_object()?;
    let mut block = (0, 0);
    for group in groups.values() {
        let weights = group.get("weights")?;
        if weights.get("num_bits")?.as_u64()? != 8 || weights.get("type")?.as_str()? != "float" {
            return None;
        }
        match weights.get("strategy").and_then(Value::as_str)? {
            "tensor" | "channel" => {}
            "block" => block = block_size(weights.get("block_structure")?)?,
            _ => return None,
        }
    }
    Some(block)
}

/// The scales of an FP8 matrix; what they are scales of follows from how many there are.
fn fp8_scales(
    files: &mut WeightFiles,
    base: &str,
    (rows, columns): (u64, u64),
    block: (u64, u64),
) -> Result<StoredScales, CheckpointError> {
    let names = [format!("{base}weight_scale_inv"), format!("{base}weight_scale")];
    let found = names.iter().find_map(|name| files.take(name));
    let Some((file, found)) = found else { return Err(files.missing(&names[1], &[1])) };
    let by_block = (block.0 > 0).then(|| [rows.div_ceil(block.0), columns.div_ceil(block.1)]);
    let elements: u64 = found.shape.iter().product();
    let block = if elements == 1 {
        (0, 0)
    } else if by_block.is_some_and(|shape| found.shape == shape) {
        block
    } else if found.shape == [rows] || found.shape == [rows, 1] {
        (1, 0)
    } else {
        let blocks = by_block.map_or(String::new(), |shape| {
            format!(", or {shape:?}: {rows} x {columns} in blocks of {} x {}", block.0, block.1)
        });
        return Err(CheckpointError::Quantised {
            file: file.to_path_buf(),
            tensor: found.name,
            reason: format!("shape {:?}; expected one scale, or [{rows}, 1]{blocks}", found.shape),
        });
    };
    let shape = found.shape.clone();
    Ok(StoredScales::Blocks { scales: part(file, found, &shape, FLOATS)?, block })
}

fn expect_shape(
    file: &Arc<std::path::Path>,
    found: &HeaderTensor,
    expected: &[u64],
) -> Result<(), CheckpointError> {
    if found.shape == expected {
        return Ok(());
    }
    Err(CheckpointError::WrongShape {
        file: file.to_path_buf(),
        tensor: found.name.clone(),
        found: found.shape.clone(),
        expected: expected.to_vec(),
    })
}

/// What words, zeros and numbers of groups are stored as.
const WORDS: &[(&str, StoredType)] = &[("I32", StoredType::I32)];

/// What scales are stored as.
const FLOATS: &[(&str, StoredType)] =
    &[("F32", StoredType::F32), ("F16", StoredType::F16), ("BF16", StoredType::Bf16)];

/// A tensor of words or scales. Its length follows from shape and type, so both are what they must be.
fn part(
    file: Arc<std::path::Path>,
    found: HeaderTensor,
    expected: &[u64],
    types: &[(&str, StoredType)],
) -> Result<StoredPart, CheckpointError> {
    expect_shape(&file, &found, expected)?;
    match types.iter().find(|(name, _)| *name == found.dtype) {
        Some((_, dtype)) => Ok(StoredPart::of(file, found, *dtype)),
        None => Err(CheckpointError::Quantised {
            file: file.to_path_buf(),
            reason: format!(
                "it is stored as {}; expected {}",
                found.dtype,
                types.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
            ),
            tensor: found.name,
        }),
    }
}

#[cfg(test)]
#[path = "scheme_test.rs"]
mod tests;
