//! Parallel loops whose pieces depend only on the length, never on the number of threads.

use rayon::prelude::*;
use std::ops::Range;

/// Runs `f` on consecutive pieces of `0..len` of `grain` elements (the last may be shorter), in parallel if there are
/// several. One piece runs on the calling thread without a detour.
pub fn par_chunks(len: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
    if len == 0 {
        return;
    }
    let grain = grain.max(1);
    if len <= grain {
        return f(0..len);
    }
    (0..len.div_ceil(grain)).into_par_iter().for_each(|i| f(i * grain..((i + 1) * grain).min(len)));
}

/// Elements of one parallel chunk.
pub const GRAIN: usize = 1 << 15;
