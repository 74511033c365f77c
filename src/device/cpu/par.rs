use rayon::prelude::*;
pub fn par_chunks(len: usize, grain: usize, f: impl Fn(std::ops::Range<usize>) + Sync) {
    if len == 0 { return; }
    if len <= grain { return f(0..len); }
    (0..len.div_ceil(grain)).into_par_iter().for_each(|i| f(i * grain..((i + 1) * grain).min(len)));
}
