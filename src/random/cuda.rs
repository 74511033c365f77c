//! Launches of the kernels for the noise and its key (`cuda/random.cu`).

use super::chacha::Grid;
use super::digest::{CHUNK, KEY};
use super::{NoiseKey, digest};
use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// The key of the digest, in the GPU's memory.
pub(crate) fn digest_key(gpu: &Arc<Gpu>, key: &NoiseKey) -> Result<Array> {
    let words = digest::key(key);
    Array::from_slice(&words, &[words.len()])?.to(&crate::Device::Cuda(gpu.clone()))
}

/// The digest of the words of `grads`, with the same bits as on the CPU: `[4]` u32, in the GPU's memory.
fn digest_of(gpu: &Arc<Gpu>, key: &Array, grads: &Array) -> Result<Array> {
    let (mut words, mut from): (usize, Array) = (grads.numel() * grads.dtype().size() / 4, grads.clone());
    let mut level = 0;
    loop {
        let chunks = words.div_ceil(CHUNK).max(1);
        let to = Array::zeros(&[4 * chunks], (DType::U32, gpu));
        let keys = key.slice(0, level * KEY..(level + 1) * KEY)?;
        Launch::new(gpu, "random", "chacha_digest")?
            .grid(chunks, 1, 1)
            .array(&from)
            .val(words as i64)
            .array(&keys)
            .array(&to)
            .run()?;
        if chunks == 1 {
            return Ok(to);
        }
        (words, from, level) = (4 * chunks, to, level + 1);
    }
}

/// Adds the noise of a release to `grads`, with the same bits as on the CPU: derives the release's key from `key`, the step, `context` and,
/// unless `digest_key` is `None`, the digest of `grads`. The number of the step is `step`, or is read from `live`.
pub(crate) fn release(
    gpu: &Arc<Gpu>,
    (key, digest_key): (&NoiseKey, Option<&Array>),
    (step, live): (u64, Option<&Array>),
    context: [u32; 4],
    std: f64,
    grads: &Array,
) -> Result<()> {
    let digest = digest_key.map(|k| digest_of(gpu, k, grads)).transpose()?;
    let own = Array::zeros(&[8], (DType::U32, gpu));
    let wide = |a: u32, b: u32| a as u64 | (b as u64) << 32;
    Launch::new(gpu, "random", "chacha_release")?
        .block(32)
        .grid(1, 1, 1)
        .val(key.words())
        .val(step)
        .val(wide(context[0], context[1]))
        .val(wide(context[2], context[3]))
        .optional(digest.as_ref())
        .array(&own)
        .optional(live)
        .run()?;
    let n = grads.numel();
    let l = Launch::new(gpu, "random", &format!("chacha_gaussian_{}", suffix(grads.dtype())))?;
    // 16 threads process a group of 256 normals.
    let l = l.grid((16 * n.div_ceil(256)).div_ceil(256), 1, 1).array(grads).val(n as i64);
    l.array(&own).val(step).val(0u64).val(std).val(Grid::of(std).magic).optional(live).run()
}
