//! Text for the small model.

use prismgrad::{Array, DType};

/// Ids and targets of `b` sequences of 6 tokens out of 17; another seed gives other text.
pub fn tokens(b: usize, seed: usize) -> (Array, Array) {
    let f = |k: usize| Array::generate(&[b, 6], DType::U32, |i| ((i * 7 + i * i * 3 + k) % 17) as f64);
    (f(seed), f(seed + 5))
}
