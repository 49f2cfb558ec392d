//! A random model as a GGUF file, for engines that read nothing else.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use super::Dice;
use super::model::{Shape, values};

/// Where tensors begin.
const ALIGN: usize = 32;

/// Types of metadata and of tensors (ggml's `docs/gguf.md`).
const U32: u32 = 4;
const F32: u32 = 6;
const TEXT: u32 = 8;
const TENSOR_F32: u32 = 0;
const TENSOR_F16: u32 = 1;

/// What most tensors are.
const MOSTLY_F16: u32 = 1;

/// Dimensions of a head.
const HEAD: u64 = 64;

impl Shape {
    /// The model that [`Shape::write`] writes with this seed, in f16, as `root/<shape>-gguf/f16.gguf`, where it is not there
    /// yet. A tokenizer of words is beside it, and none in it: prompts and answers are token ids.
    pub fn write_gguf(&self, root: &Path, seed: u64) -> io::Result<PathBuf> {
        let name = format!("llama-{}x{}-v{}-s{seed}-gguf", self.layers, self.hidden, self.vocab);
        let folder = root.join(name);
        let file = folder.join("f16.gguf");
        if file.exists() {
            return Ok(file);
        }
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("tokenizer.json"), self.tokenizer().to_string())?;
        let unfinished = folder.join("f16.gguf.part");
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&unfinished)?);
        self.write_gguf_to(&mut out, seed)?;
        out.into_inner()?.sync_all()?;
        fs::rename(unfinished, &file)?;
        Ok(file)
    }

    fn write_gguf_to(&self, out: &mut impl Write, seed: u64) -> io::Result<()> {
        let tensors = self.tensors();
        let keys = self.keys();
        let mut header = b"GGUF\x03\0\0\0".to_vec();
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((keys.len() as u64).to_le_bytes());
        for (key, value_type, value) in keys {
            header.extend(text(key));
            header.extend(value_type.to_le_bytes());
            header.extend(value);
        }
        let mut offset = 0_u64;
        for (name, shape) in &tensors {
            let (dtype, bytes) = if shape.len() == 1 { (TENSOR_F32, 4) } else { (TENSOR_F16, 2) };
            header.extend(text(&gguf_name(name)));
            header.extend((shape.len() as u32).to_le_bytes());
            // The fastest dimension first.
            header.extend(shape.iter().rev().flat_map(|dim| dim.to_le_bytes()));
            header.extend(dtype.to_le_bytes());
            header.extend(offset.to_le_bytes());
            let len = shape.iter().product::<u64>() * bytes;
            offset += len.next_multiple_of(ALIGN as u64);
        }
        header.resize(header.len().next_multiple_of(ALIGN), 0);
        out.write_all(&header)?;
        let mut dice = Dice::new(seed);
        for (name, shape) in &tensors {
            // As they are stored elsewhere.
            let values: Vec<f32> =
                values(shape, &mut dice).map(|value| bf16::from_f32(value).to_f32()).collect();
            let mut bytes: Vec<u8> = Vec::with_capacity(values.len() * 4);
            match shape[..] {
                [rows, cols] => {
                    let turned = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
                    for row in 0..rows {
                        let row = if turned { turned_row(row) } else { row };
                        let start = (row * cols) as usize;
                        let row = &values[start..start + cols as usize];
                        bytes.extend(row.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
                    }
                }
                _ => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            }
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    fn keys(&self) -> Vec<(&'static str, u32, Vec<u8>)> {
        let number = |key, value: u32| (key, U32, value.to_le_bytes().to_vec());
        let float = |key, value: f32| (key, F32, value.to_le_bytes().to_vec());
        let word = |key, value| (key, TEXT, text(value));
        vec![
            word("general.architecture", "llama"),
            word("general.name", "random"),
            number("general.file_type", MOSTLY_F16),
            number("llama.context_length", 8192),
            number("llama.embedding_length", self.hidden),
            number("llama.block_count", self.layers),
            number("llama.feed_forward_length", self.intermediate),
            number("llama.attention.head_count", self.heads),
            number("llama.attention.head_count_kv", self.kv_heads),
            number("llama.rope.dimension_count", HEAD as u32),
            number("llama.vocab_size", self.vocab),
            float("llama.rope.freq_base", 10000.0),
            float("llama.attention.layer_norm_rms_epsilon", 1e-5),
            word("tokenizer.ggml.model", "none"),
        ]
    }
}

/// Rows of queries and keys are stored in pairs that turn together; elsewhere each head's first half comes first.
fn turned_row(row: u64) -> u64 {
    let (head, within) = (row / HEAD, row % HEAD);
    head * HEAD + within / 2 + (within % 2) * (HEAD / 2)
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn gguf_name(name: &str) -> String {
    const LAYER: [(&str, &str); 9] = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let whole = |name| match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        other => unreachable!("a Llama has no tensor {other}"),
    };
    let of_layer = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let part = rest.strip_suffix(".weight")?;
        let (_, there) = LAYER.iter().find(|(here, _)| *here == part)?;
        Some(format!("blk.{layer}.{there}.weight"))
    };
    of_layer().unwrap_or_else(|| whole(name).to_owned())
}
