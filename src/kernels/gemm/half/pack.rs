//! Packing: operands are rearranged into the words that a micro-kernel reads in order.

use super::Operand;
use super::kernels::{BLOCK, Kernel, WIDE};
use crate::base::dtype::to_bf16;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::gemm::Mat;
use crate::kernels::gemm::pack::turn;
use half::bf16;
use std::ops::Range;

/// A part of K with its own sum: its numbers, its place among the packed words, its weight, and whether denormal numbers are replaced by
/// zero on every processor.
pub struct Part {
    pub from: usize,
    pub len: usize,
    pub at: usize,
    pub words: usize,
    pub weight: Option<f32>,
    pub zeros: bool,
}

/// A number of an operand, as the bits of a bf16.
trait Number: Copy + Sync {
    fn bits(self) -> u32;
    /// 32 neighbours as 16 words.
    fn words(row: &[Self; 32]) -> [u32; 16];
}

impl Number for bf16 {
    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits() as u32
    }
    /// The words as they are in memory, on a little-endian machine.
    #[inline(always)]
    fn words(row: &[bf16; 32]) -> [u32; 16] {
        bytemuck::cast::<[bf16; 32], [u32; 16]>(*row).map(u32::from_le)
    }
}

impl Number for f32 {
    #[inline(always)]
    fn bits(self) -> u32 {
        to_bf16(self).to_bits() as u32
    }
    #[inline(always)]
    fn words(row: &[f32; 32]) -> [u32; 16] {
        let mut narrow = [bf16::ZERO; 32];
        narrow.iter_mut().zip(row).for_each(|(o, &x)| *o = to_bf16(x));
        bf16::words(&narrow)
    }
}

/// Packs a part of K of the panels `some`, counted from panel `first` of `a`, with `w` rows each; rows past the end are zeros. `to` holds
/// `words` words for every row, panel after panel, from panel `first` on. Calls `special(panel, rows)`, with the panel counted from
/// `first`, if numbers are not finite: bit i of `rows` stands for row i of the panel.
///
/// # Safety
/// No other thread uses this part of these panels.
pub unsafe fn pack(
    (a, index): (&Operand, Option<&[u32]>),
    (first, some): (usize, Range<usize>),
    w: usize,
    part: &Part,
    (kern, tiles, words): (Kernel, bool, usize),
    to: &Shared<u32>,
    mut special: impl FnMut(usize, u32),
) {
    // SAFETY: the caller's promise.
    let place = |p: usize| unsafe { to.slice((p * words + part.at) * w..(p * words + part.at + part.words) * w) };
    let along = match a {
        Operand::Half(m) => m.cs == 1,
        Operand::Full(m) => m.cs == 1,
    };
    // An operand that is contiguous along K is read panel by panel; otherwise some rows of K at a time are read for all panels.
    let step = if along { part.words.max(1) } else { BLOCK };
    for at in (0..part.words).step_by(step) {
        let range = at..(at + step).min(part.words);
        for p in some.clone() {
            let (i0, to) = ((first + p) * w, &mut place(p)[range.start * w..range.end * w]);
            match a {
                Operand::Half(m) => panel(m, index, (i0, w), part, range.clone(), (kern.per, tiles), to),
                Operand::Full(m) => panel(m, index, (i0, w), part, range.clone(), (kern.per, tiles), to),
            }
            if kern.per == 2 && !all_finite(to) {
                // With tiles, a row is a run of words; otherwise each row has every w-th word.
                let row = |at: usize| if tiles { at / BLOCK % w } else { at % w };
                let found = to.iter().enumerate().filter(|(_, x)| !all_finite(&[**x]));
                special(p, found.fold(0, |rows, (at, _)| rows | 1 << row(at)));
            }
        }
    }
}

/// Whether all numbers of these words are finite: if the exponent is all ones, adding one to it carries into the sign bit.
fn all_finite(words: &[u32]) -> bool {
    let any = simd(
        #[inline(always)]
        || words.iter().fold(0, |any, w| any | ((w & 0x7f80_7f80) + 0x0080_0080)),
    );
    any & 0x8000_8000 == 0
}

/// Packs some words of a part of one panel, from a multiple of [`BLOCK`] on.
fn panel<S: Number>(
    a: &Mat<S>,
    index: Option<&[u32]>,
    (i0, w): (usize, usize),
    part: &Part,
    range: Range<usize>,
    (per, tiles): (usize, bool),
    to: &mut [u32],
) {
    let live = w.min(index.map_or(a.rows, <[u32]>::len) - i0);
    let (begin, end) = (part.from + range.start * per, part.from + part.len.min(range.end * per));
    // Zeros for what is not written below: the padding of K, and rows past the end.
    if live < w || end < part.from + range.end * per {
        to.fill(0);
    }
    let count = range.len();
    let row = |i: usize| index.map_or(i0 + i, |x| x[i0 + i] as usize) * a.rs;
    simd(
        #[inline(always)]
        || match (per, a.cs) {
            (1, _) => {
                for (k, o) in (begin..end).zip(to.chunks_exact_mut(w)) {
                    for (i, o) in o.iter_mut().enumerate().take(live) {
                        let x = a.data[row(i) + k * a.cs].bits() << 16;
                        *o = if part.zeros && x & 0x7f80_0000 == 0 { x & 0x8000_0000 } else { x };
                    }
                }
            }
            (_, 1) => {
                let mut stage = [[0u32; BLOCK]; 16];
                for i in (0..live).step_by(16) {
                    let some = 16.min(live - i);
                    for p in (0..count).step_by(BLOCK) {
                        // Words of 16 rows in their order in memory.
                        let k = begin + 2 * p;
                        let ahead = end.saturating_sub(k).min(2 * BLOCK);
                        for (r, s) in stage.iter_mut().enumerate().take(some) {
                            let from = row(i + r) + k;
                            pairs(if ahead > 0 { &a.data[from..from + ahead] } else { &[] }, s);
                        }
                        let wide = BLOCK.min(count - p);
                        if tiles {
                            let at = p * w + i * BLOCK;
                            to[at..at + some * BLOCK].copy_from_slice(&stage.as_flattened()[..some * BLOCK]);
                        } else if (some, wide) == (16, BLOCK) {
                            turn(stage.as_flattened(), BLOCK, &mut to[p * w + i..], w);
                        } else {
                            for (r, s) in stage.iter().enumerate().take(some) {
                                for (k, &x) in s.iter().enumerate().take(wide) {
                                    to[(p + k) * w + i + r] = x;
                                }
                            }
                        }
                    }
                }
            }
            _ if a.rs == 1 && index.is_none() => {
                let zero: &[S] = &[];
                let line = |k: usize| if k < end { &a.data[i0 + k * a.cs..i0 + k * a.cs + live] } else { zero };
                let mut stage = [[0u32; WIDE]; BLOCK];
                for p in 0..count {
                    let k = begin + 2 * p;
                    if !tiles {
                        join(line(k), line(k + 1), &mut to[p * w..p * w + live]);
                        continue;
                    }
                    join(line(k), line(k + 1), &mut stage[p % BLOCK][..live]);
                    if p % BLOCK == BLOCK - 1 {
                        // The words of every row are complete.
                        for i in (0..w).step_by(16) {
                            let at = (p + 1 - BLOCK) * w + i * BLOCK;
                            turn(&stage.as_flattened()[i..], WIDE, &mut to[at..], BLOCK);
                        }
                    }
                }
            }
            _ => {
                for i in 0..live {
                    let at = |k: usize| if k < end { a.data[row(i) + k * a.cs].bits() } else { 0 };
                    for p in 0..count {
                        let o = if tiles { p / BLOCK * BLOCK * w + i * BLOCK + p % BLOCK } else { p * w + i };
                        to[o] = at(begin + 2 * p) | at(begin + 2 * p + 1) << 16;
                    }
                }
            }
        },
    );
}

/// Neighbours of one row as words, with zeros past its end.
#[inline(always)]
fn pairs<S: Number>(row: &[S], out: &mut [u32; 16]) {
    if let Some(row) = row.first_chunk::<32>() {
        *out = S::words(row);
        return;
    }
    *out = [0; 16];
    for (o, x) in out.iter_mut().zip(row.chunks(2)) {
        *o = x[0].bits() | x.get(1).map_or(0, |x| x.bits()) << 16;
    }
}

/// Elements of two neighbouring lines as words. An empty line stands for zeros.
#[inline(always)]
fn join<S: Number>(low: &[S], high: &[S], out: &mut [u32]) {
    if let (Some(low), Some(high), Some(out)) = (low.first_chunk(), high.first_chunk(), out.first_chunk_mut()) {
        let (low, high, out): (&[S; WIDE], &[S; WIDE], &mut [u32; WIDE]) = (low, high, out);
        for i in 0..WIDE {
            out[i] = low[i].bits() | high[i].bits() << 16;
        }
        return;
    }
    match (low.is_empty(), high.is_empty()) {
        (false, false) => {
            out.iter_mut().zip(low.iter().zip(high)).for_each(|(o, (l, h))| *o = l.bits() | h.bits() << 16)
        }
        (false, true) => out.iter_mut().zip(low).for_each(|(o, l)| *o = l.bits()),
        _ => out.fill(0),
    }
}
