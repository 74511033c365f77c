//! The small GPT that tests train.

use prismgrad::models::{Gpt, GptConfig};
use prismgrad::{DType, Device};

/// A GPT over 17 tokens and 6 positions, of width 8 with two heads, always with the same seed. With `tied` the output head is the token
/// embedding.
pub fn gpt(layers: usize, tied: bool, dtype: DType, device: &Device) -> Gpt {
    let mut c = GptConfig::small(17, 6, layers, 8, 2);
    c.tie_word_embeddings = tied;
    let model = Gpt::with_dtype(c, 3, dtype).unwrap();
    model.params().to(device).unwrap();
    model
}
