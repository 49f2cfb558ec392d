//! ○ How byte-level tokenizers cut a text before its parts become tokens, by the names that llama.cpp's converter
//! gives (`tokenizer.ggml.pre`). Each is that of the tokenizer.json which the name was made for.

use serde_json::{Value as Json, json};

/// One way to cut.
pub(super) struct Pattern {
    pub(super) names: &'static [&'static str],
    cuts: &'static [Cut],
    nfc: bool,
    /// Whether a part that is a token is one, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a text begins with the first token where the file does not say.
    pub(super) begins: bool,
}

/// A step of it; what one has cut out the next ones cut on.
enum Cut {
    /// Everything that matches, and what is between.
    Regex(&'static str),
    /// Every digit.
    Digits,
    /// As GPT-2 does, which the byte-level step has in it.
    Gpt2,
}

impl Pattern {
    const fn of(names: &'static [&'static str], cuts: &'static [Cut]) -> Self {
        Self { names, cuts, nfc: false, ignore_merges: false, begins: false }
    }

    /// The pattern that a file names.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        PATTERNS.iter().find(|pattern| pattern.names.contains(&name))
    }

    /// The names of all.
    pub(super) fn known() -> Vec<&'static str> {
        PATTERNS.iter().flat_map(|pattern| pattern.names).copied().collect()
    }

    /// What a tokenizer.json has as `normalizer`.
    pub(super) fn normalizer(&self) -> Json {
        if self.nfc { json!({"type": "NFC"}) } else { Json::Null }
    }

    /// What it has as `pre_tokenizer`.
    pub(super) fn pre_tokenizer(&self) -> Json {
        let has_gpt2 = self.cuts.iter().any(|cut| matches!(cut, Cut::Gpt2));
        let step = |cut: &Cut| match cut {
            Cut::Regex(regex) => Some(json!({
                "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
            })),
            Cut::Digits => Some(json!({"type": "Digits", "individual_digits": true})),
            Cut::Gpt2 => None,
        };
        let mut steps: Vec<Json> = self.cuts.iter().filter_map(step).collect();
        steps.push(byte_level(has_gpt2));
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

/// The step that turns bytes into characters.
pub(super) fn byte_level(use_regex: bool) -> Json {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex,
    })
}

pub(super) const PATTERNS: &[Pattern] = &[
    Pattern::of(&["gpt-2", "gpt2"], &[Cut::Gpt2]),
    Pattern {
        ignore_merges: true,
        begins: true,
        ..Pattern::of(&["llama-bpe", "llama3", "llama-v3"], &[Cut::Regex(LLAMA3)])
    },
    // Llama 3's vocabulary in models whose texts do not begin with a token, SmolLM3 among them.
    Pattern { ignore_merges: true, ..Pattern::of(&["smaug-bpe"], &[Cut::Regex(LLAMA3)]) },
    // DBRX, OLMo 2, Phi-4.
    Pattern::of(&["dbrx"], &[Cut::Regex(LLAMA3)]),
    Pattern { nfc: true, ..Pattern::of(&["qwen2", "deepseek-r1-qwen"], &[Cut::Regex(QWEN2)]) },
    // StarCoder2, Granite 3 (`refact`), SmolLM.
    Pattern::of(&["starcoder", "refact", "smollm"], &[Cut::Digits, Cut::Gpt2]),
    Pattern { nfc: true, ..Pattern::of(&["command-r"], &[Cut::Digits, Cut::Gpt2]) },
    // GPT-OSS, Phi-4-mini.
    Pattern::of(&["gpt-4o"], &[Cut::Regex(GPT_4O)]),
    // Mistral's from Nemo on.
    Pattern {
        ignore_merges: true,
        begins: true,
        ..Pattern::of(&["tekken"], &[Cut::Regex(TEKKEN)])
    },
    // DeepSeek-V2 as well.
    Pattern::of(
        &["deepseek-llm"],
        &[
            Cut::Regex("[\r\n]"),
            Cut::Regex(CASED_LETTERS),
            Cut::Regex(
                "\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+",
            ),
            Cut::Regex("\\s+$"),
            Cut::Regex(WIDE),
            Cut::Digits,
        ],
    ),
    Pattern::of(
        &["deepseek-coder"],
        &[
            Cut::Regex("[\r\n]"),
            Cut::Regex("\\s?\\p{L}+"),
            Cut::Regex("\\s?\\p{P}+"),
            Cut::Regex(WIDE),
            Cut::Digits,
        ],
    ),
    // And R1.
    Pattern::of(
        &["deepseek-v3"],
        &[
            Cut::Regex("\\p{N}{1,3}"),
            Cut::Regex("[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+"),
            Cut::Regex(DEEPSEEK3),
        ],
    ),
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// Chinese, Korean, and what lies between.
const WIDE: &str = "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

/// Letters that are large or small.
const CASED_LETTERS: &str = "\\s?[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\
     \u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\
     \u{38C}\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\
     \u{10A0}-\u{10C5}\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\
     \u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\
     \u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\
     \u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\
     \u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\
     \u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\
     \u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\
     \u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\
     \u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\
     \u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\
     \u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\
     \u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+";
