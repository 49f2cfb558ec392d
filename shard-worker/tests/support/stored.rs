//! What is compared of each stored format: lists that the tests run over, and `tests/models_page.rs` writes down.

use shoal_protocol::model::StoredType;
use shoal_protocol::plan::Numerics;

/// Meshes over which ranks read their parts of what is packed: the name, ranks, contract.
pub const OVER: [(&str, u32, Numerics); 3] =
    [("1x1", 1, Numerics::N1), ("1x2 exact", 2, Numerics::N1), ("1x2 sum", 2, Numerics::N1Sum)];

/// Types of blocks in GGUF files (`tests/formats.rs`, over [`OVER`], held as f32 and as they are stored).
pub const GGUF_BLOCKS: [StoredType; 8] = [
    StoredType::Q4_0,
    StoredType::Q4_1,
    StoredType::Q5_0,
    StoredType::Q5_1,
    StoredType::Q8_0,
    StoredType::Q4K,
    StoredType::Q5K,
    StoredType::Q6K,
];

/// Reference models that stand as GGUF files beside their folders (`tests/formats.rs`, 1x1 and 2x1).
pub const GGUF_WRITTEN: [&str; 5] = [
    "llama31-rope8-bf16",
    "llama-biases-bf16",
    "llama-rope-linear-f16",
    "qwen2-tied-bf16",
    "qwen3-tied-bf16",
];

/// Those that llama.cpp's own converter wrote (`tests/gguf_families.rs`, 1x1 and 2x1).
pub const GGUF_CONVERTED: [&str; 20] = [
    "mistral-saved",
    "starcoder2-bf16",
    "mixtral-bf16",
    "phi3-short",
    "phi3-long",
    "olmo2",
    "granite-bf16",
    "smollm3",
    "gemma2-bf16",
    "gemma3-bf16",
    "cohere-bf16",
    "cohere2",
    "qwen2-moe",
    "qwen3-moe-bf16",
    "qwen3-yarn",
    "gpt-oss-bf16",
    "gpt-oss-mxfp4",
    "deepseek2-groups",
    "deepseek2-lite",
    "deepseek3-bf16",
];

/// Of these those whose tensors the converter merges, or cuts in parts: also over 2x2, under either contract.
pub const GGUF_MERGED: [&str; 5] =
    ["mixtral-bf16", "deepseek3-bf16", "gpt-oss-mxfp4", "phi3-long", "qwen2-moe"];

/// Folders that tools have packed (`tests/quantised.rs`, over [`OVER`], held as f32), and by which tool.
pub const PACKED: [(&str, &str); 6] = [
    ("awq", "AutoAWQ"),
    ("fp8-block", "compressed-tensors"),
    ("fp8-channel", "compressed-tensors"),
    ("fp8-tensor", "compressed-tensors"),
    ("gptq", "AutoGPTQ"),
    ("gptq-act-order", "AutoGPTQ"),
];

/// A state dict of torch (`tests/formats.rs`, 1x1).
pub const TORCH: &str = "llama2-mha";
