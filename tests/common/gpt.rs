//! The small model that tests train.

use prismgrad::models::{Gpt, GptConfig};
use prismgrad::{DType, Device};

/// A GPT over 17 tokens and 6 positions, of width 8 with two heads, from one seed; `tied`: the head is the table of tokens.
pub fn gpt(layers: usize, tied: bool, dtype: DType, device: &Device) -> Gpt {
    let mut c = GptConfig::small(17, 6, layers, 8, 2);
    c.tie_word_embeddings = tied;
    let model = Gpt::with_dtype(c, 3, dtype).unwrap();
    model.params().to(device).unwrap();
    model
}
