//! Token ids of numbered records.

use prismgrad::{Array, DType};

/// Input and target ids `[records, 6]`. A record's ids depend only on its number and `seed`.
pub fn tokens_of(records: &[usize], seed: usize) -> (Array, Array) {
    let id = |i: usize, k: usize| ((i * 7 + i * i * 3 + k) % 17) as f64;
    let f = |k: usize| Array::generate(&[records.len(), 6], DType::U32, |i| id(records[i / 6] * 6 + i % 6, k));
    (f(seed), f(seed + 5))
}
