//! A small Mixtral model.

use prismgrad::models::{ExpertCounts, MixtralConfig};

/// A configuration with one layer of width 8 with three experts, 12 tokens and 16 positions.
pub fn mixtral() -> MixtralConfig {
    MixtralConfig {
        vocab_size: 12,
        hidden_size: 8,
        intermediate_size: 6,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 16,
        num_local_experts: ExpertCounts::Same(3),
        ..MixtralConfig::default()
    }
}
