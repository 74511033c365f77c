//! Panels of bf16 numbers for ops with their own tile loops.

use super::Operand;
use super::kernels::{BLOCK, Kernel, WIDE, kernel};
use super::pack::{Part, pack};
use crate::base::dtype::to_bf16;
use crate::device::cpu::shared::Shared;
use crate::kernels::gemm::Mat;
use crate::kernels::gemm::pack::turn;
use crate::kernels::gemm::panels::Panels;
use half::bf16;
use std::ops::Range;

/// Operands in bf16, results in f32.
#[derive(Clone, Copy)]
pub struct HalfPanels(Kernel);

impl HalfPanels {
    pub(in crate::kernels::gemm) fn new() -> Self {
        HalfPanels(kernel())
    }
    fn pack(
        &self,
        a: &Mat<bf16>,
        panels: Range<usize>,
        (width, tiles): (usize, bool),
        k: Range<usize>,
        out: &mut [u32],
    ) -> bool {
        let words = self.words(k.len());
        let part = Part { from: k.start, len: k.len(), at: 0, words, weight: None, zeros: false };
        let (some, mut special) = (0..panels.len(), false);
        // SAFETY: the panels are this thread's alone.
        unsafe {
            pack(
                (&Operand::Half(*a), None),
                (panels.start, some),
                width,
                &part,
                (self.0, tiles, words),
                &Shared::new(out),
                |_, _| special = true,
            )
        }
        special
    }
}

/// A word from two neighbours along K.
#[inline(always)]
fn word(low: f32, high: f32) -> u32 {
    to_bf16(low).to_bits() as u32 | (to_bf16(high).to_bits() as u32) << 16
}

impl Panels for HalfPanels {
    type Item = bf16;
    type Sum = f32;
    type Word = u32;
    #[inline(always)]
    fn mr(&self) -> usize {
        self.0.mr
    }
    #[inline(always)]
    fn nr(&self) -> usize {
        self.0.nr
    }
    #[inline(always)]
    fn words(&self, k: usize) -> usize {
        k.div_ceil(self.0.per).next_multiple_of(self.0.step)
    }
    fn left(&self, a: &Mat<bf16>, k: Range<usize>, out: &mut [u32]) -> bool {
        self.pack(a, 0..a.rows.div_ceil(self.0.mr), (self.0.mr, self.0.tiles), k, out)
    }
    fn right(&self, b: &Mat<bf16>, panels: Range<usize>, k: Range<usize>, out: &mut [u32]) -> bool {
        self.pack(&b.t(), panels, (self.0.nr, false), k, out)
    }
    #[inline(always)]
    fn rows_as_right<'a>(&self, rows: &'a [f32], room: &'a mut [u32]) -> &'a [u32] {
        let nr = self.0.nr;
        if self.0.per == 1 {
            let room = &mut room[..rows.len()];
            room.iter_mut().zip(rows).for_each(|(o, &x)| *o = (to_bf16(x).to_bits() as u32) << 16);
            return room;
        }
        // Two rows become one row of words.
        let room = &mut room[..rows.len().div_ceil(2)];
        for (o, two) in room.chunks_exact_mut(WIDE).zip(rows.chunks_exact(2 * nr)) {
            let (low, high) = two.split_at(WIDE);
            for ((o, &low), &high) in o.iter_mut().zip(low).zip(high) {
                *o = word(low, high);
            }
        }
        room
    }
    #[inline(always)]
    fn tile_as_left(&self, tile: &[f32], at: usize, cols: usize, out: &mut [u32]) {
        let (mr, nr) = (self.0.mr, self.0.nr);
        let words = self.words(nr);
        let out = &mut out[at * words * mr..(at + 1) * words * mr];
        if self.0.per == 1 {
            for (r, row) in tile.chunks_exact(nr).enumerate() {
                for (c, &x) in row.iter().enumerate() {
                    out[c * mr + r] = if c < cols { (to_bf16(x).to_bits() as u32) << 16 } else { 0 };
                }
            }
            return;
        }
        // A row of a tile is 32 numbers: 16 words.
        let mut narrow = [0u32; BLOCK * WIDE];
        for (o, row) in narrow.chunks_exact_mut(BLOCK).zip(tile.chunks_exact(WIDE)) {
            let mut wide = [0u16; WIDE];
            let row = row.first_chunk::<WIDE>().unwrap_or(&[0.0; WIDE]);
            for (c, (o, &x)) in wide.iter_mut().zip(row).enumerate() {
                *o = if c < cols { to_bf16(x).to_bits() } else { 0 };
            }
            let pairs = bytemuck::cast::<[u16; WIDE], [u32; BLOCK]>(wide);
            o.iter_mut().zip(pairs).for_each(|(o, x)| *o = u32::from_le(x));
        }
        if self.0.tiles {
            out.copy_from_slice(&narrow[..mr * BLOCK]);
            return;
        }
        // 12 rows of 16 words, transposed; the four rows below are zeros.
        let mut turned = [0u32; BLOCK * BLOCK];
        turn(&narrow, BLOCK, &mut turned, BLOCK);
        for (o, x) in out.chunks_exact_mut(mr).zip(turned.chunks_exact(BLOCK)) {
            o.copy_from_slice(&x[..mr]);
        }
    }
    fn careful(self) -> Self {
        HalfPanels(self.0.careful())
    }
    #[inline(always)]
    unsafe fn multiply(&self, words: usize, a: *const u32, b: *const u32, tile: *mut f32, add: bool) {
        // SAFETY: the caller's promise.
        unsafe { (self.0.into)(words, a.cast(), b.cast(), tile, self.0.nr, add) }
    }
}
