//! ○ How generous the limits of an encoder's replica can be.
//!
//! An input goes through the stages whole, so a step has room for the longest one; keys and values are
//! those of one layer of one step, and no more of them are kept. The head's KV blocks are numbers without
//! memory then, and bound how many tokens are let in at once.

use shoal_protocol::model::{EncoderOutput, EncoderSpec, Pooling};
use shoal_protocol::plan::{BLOCK_TOKENS, ReplicaLimits};

use super::memory::KV_TOKENS_MAX;

/// Rows of a step at least: several short inputs travel together.
const STEP_ROWS: u32 = 512;

/// The longest inputs to try where the model's own longest leaves no room; less is refused.
const CONTEXTS: [u32; 5] = [4096, 2048, 1024, 512, 256];

/// (inputs in one step, smallest rows of a step), the most generous first.
const SEQUENCES: [(u32, u32); 2] = [(256, STEP_ROWS), (16, 1)];

/// The limits to try, the most generous first: shorter inputs before fewer.
pub(super) fn limits(spec: &EncoderSpec, stages: usize) -> Vec<ReplicaLimits> {
    let shorter = CONTEXTS.into_iter().filter(|context| *context < spec.context_max);
    let contexts: Vec<u32> = std::iter::once(spec.context_max).chain(shorter).collect();
    let of = |context: u32, (sequences_max, rows): (u32, u32)| ReplicaLimits {
        kv_blocks: KV_TOKENS_MAX.max(context.saturating_add(1)).div_ceil(BLOCK_TOKENS),
        context_max: context,
        step_rows_max: context.max(rows),
        sequences_max,
        // One in each stage, and one that travels.
        steps_in_flight_max: stages as u32 + 1,
    };
    contexts.iter().flat_map(|context| SEQUENCES.map(|steps| of(*context, steps))).collect()
}

/// What an encoder makes of an input, in words.
pub(super) fn explain(spec: &EncoderSpec, limits: &ReplicaLimits) -> String {
    let pooled = |pooling| match pooling {
        Pooling::Cls => "the first token's",
        Pooling::Mean => "the mean of all tokens'",
        Pooling::LastToken => "the last token's",
    };
    let makes = match spec.output {
        EncoderOutput::Embedding { pooling, normalize } => format!(
            "embeddings of {} numbers, {}{}",
            spec.hidden,
            pooled(pooling),
            if normalize { ", at length 1" } else { "" }
        ),
        EncoderOutput::Scores { labels, pooling, sigmoid } => format!(
            "scores of {labels} labels from {}{}",
            pooled(pooling),
            if sigmoid { ", through a sigmoid" } else { "" }
        ),
    };
    format!(
        "encoder: {makes}; inputs of up to {} tokens, the model allows {}, each whole in one step; no KV is kept",
        limits.context_max, spec.context_max,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(context: u32) -> EncoderSpec {
        let config = serde_json::json!({
            "architectures": ["ModernBertModel"], "model_type": "modernbert", "hidden_size": 768,
            "num_attention_heads": 12, "num_hidden_layers": 22, "intermediate_size": 1152,
            "vocab_size": 50368, "max_position_embeddings": context,
        });
        EncoderSpec::from_config(&config).expect("a good config")
    }

    #[test]
    fn a_step_holds_the_longest_input_and_shorter_ones_are_tried() {
        let all = limits(&spec(8192), 3);
        assert_eq!((all[0].context_max, all[0].step_rows_max), (8192, 8192));
        let last = all.last().expect("some");
        assert_eq!((last.context_max, last.step_rows_max, last.sequences_max), (256, 256, 16));
        for limits in &all {
            assert!(limits.step_rows_max >= limits.context_max, "{limits:?}");
            assert!(limits.kv_blocks * BLOCK_TOKENS > limits.context_max, "{limits:?}");
        }
        let short = limits(&spec(512), 1);
        assert_eq!((short[0].context_max, short[0].step_rows_max), (512, 512));
        assert_eq!(short.len(), 4, "512 and 256, each with many inputs and with few");
    }

    #[test]
    fn what_a_model_does_is_said_in_words() {
        let words = explain(&spec(512), &limits(&spec(512), 1)[0]);
        let expected = "encoder: embeddings of 768 numbers, the mean of all tokens'; inputs of up to \
                        512 tokens, the model allows 512, each whole in one step; no KV is kept";
        assert_eq!(words, expected);
    }
}
