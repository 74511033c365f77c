//! Packed panels and micro-kernels for ops with their own tile loops: one interface for f32, f64 and bf16.
//!
//! A left panel holds `mr` rows of an operand, a right panel `nr` columns, both in the order in which the micro-kernel reads them along K.
//! K is counted in words: a word is one number, or two neighbours along K if the processor multiplies pairs of bf16 numbers
//! ([`half`](super::half)).

use super::Mat;
use super::half::HalfPanels;
use super::kernel::{Kernel, Kernels};
use super::pack::{pack_a, pack_b};
use crate::base::{Computed, Element};
use half::bf16;
use std::ops::Range;

/// How operands are packed and multiplied. A tile of results has `mr` rows of `nr`, row-major.
pub trait Panels: Copy + Send + Sync {
    /// Elements of the operands.
    type Item: Element;
    /// Elements of the results.
    type Sum: Kernels;
    /// Elements of packed panels.
    type Word: Element;
    /// Rows of a tile.
    fn mr(&self) -> usize;
    /// Columns of a tile.
    fn nr(&self) -> usize;
    /// Number of words for `k` numbers along K, padding included.
    fn words(&self, k: usize) -> usize;
    /// Packs columns `k` of all rows of `a`, panel after panel of mr·words. Rows past the end are zeros. Returns whether some number is not
    /// finite, if that matters to the micro-kernel.
    fn left(&self, a: &Mat<Self::Item>, k: Range<usize>, out: &mut [Self::Word]) -> bool;
    /// Packs rows `k` of the columns of the given right panels of `b`, panel after panel of nr·words.
    fn right(&self, b: &Mat<Self::Item>, panels: Range<usize>, k: Range<usize>, out: &mut [Self::Word]) -> bool;
    /// Rows of nr results as a right panel, one row for each step of K: the rows themselves if they have that layout already, else a copy
    /// in `room`.
    fn rows_as_right<'a>(&self, rows: &'a [Self::Sum], room: &'a mut [Self::Word]) -> &'a [Self::Word];
    /// Writes a tile into a left panel whose K runs over the columns of successive tiles. This is tile number `at`; only its first `cols`
    /// columns are used, and the columns after them become zeros.
    fn tile_as_left(&self, tile: &[Self::Sum], at: usize, cols: usize, out: &mut [Self::Word]);
    /// The variant for panels that contain non-finite numbers.
    fn careful(self) -> Self;
    /// A product of two panels, which replaces the tile or, with `add`, is added to it.
    ///
    /// # Safety
    /// The panels hold `words`·mr and `words`·nr words, the tile mr·nr results.
    unsafe fn multiply(
        &self,
        words: usize,
        a: *const Self::Word,
        b: *const Self::Word,
        tile: *mut Self::Sum,
        add: bool,
    );
}

impl<T: Kernels> Panels for Kernel<T> {
    type Item = T;
    type Sum = T;
    type Word = T;
    #[inline(always)]
    fn mr(&self) -> usize {
        self.mr
    }
    #[inline(always)]
    fn nr(&self) -> usize {
        self.nr
    }
    #[inline(always)]
    fn words(&self, k: usize) -> usize {
        k
    }
    fn left(&self, a: &Mat<T>, k: Range<usize>, out: &mut [T]) -> bool {
        for (i, p) in out.chunks_exact_mut((self.mr * k.len()).max(1)).enumerate().take(a.rows.div_ceil(self.mr)) {
            pack_a(a, i * self.mr, self.mr, k.start, k.len(), None, p);
        }
        false
    }
    fn right(&self, b: &Mat<T>, panels: Range<usize>, k: Range<usize>, out: &mut [T]) -> bool {
        for (j, p) in panels.zip(out.chunks_exact_mut((self.nr * k.len()).max(1))) {
            pack_b(b, j * self.nr, self.nr, k.start, k.len(), p);
        }
        false
    }
    #[inline(always)]
    fn rows_as_right<'a>(&self, rows: &'a [T], _: &'a mut [T]) -> &'a [T] {
        rows
    }
    #[inline(always)]
    fn tile_as_left(&self, tile: &[T], at: usize, cols: usize, out: &mut [T]) {
        let (mr, nr) = (self.mr, self.nr);
        let out = &mut out[at * nr * mr..];
        for r in (0..mr).step_by(4) {
            let row = |i: usize| &tile[(r + i) * nr..(r + i + 1) * nr];
            if r + 4 > mr {
                for (i, c) in (0..mr - r).flat_map(|i| (0..cols).map(move |c| (i, c))) {
                    out[c * mr + r + i] = row(i)[c];
                }
                break;
            }
            let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
            for c in 0..cols {
                let o = &mut out[c * mr + r..c * mr + r + 4];
                o[0] = r0[c];
                o[1] = r1[c];
                o[2] = r2[c];
                o[3] = r3[c];
            }
        }
    }
    fn careful(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn multiply(&self, words: usize, a: *const T, b: *const T, tile: *mut T, add: bool) {
        // SAFETY: the caller's promise.
        unsafe { (self.into)(words, a, b, tile, self.nr, add) }
    }
}

/// An element type of operands, together with its panels on this machine.
pub trait Packed: Computed {
    /// How operands are packed and multiplied.
    type Panels: Panels<Item = Self, Sum = Self::Wide>;
    /// The panels of this machine.
    fn panels() -> Self::Panels;
}

impl Packed for f32 {
    type Panels = Kernel<f32>;
    fn panels() -> Kernel<f32> {
        f32::kernel()
    }
}

impl Packed for f64 {
    type Panels = Kernel<f64>;
    fn panels() -> Kernel<f64> {
        f64::kernel()
    }
}

impl Packed for bf16 {
    type Panels = HalfPanels;
    fn panels() -> HalfPanels {
        HalfPanels::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares a·b of one panel each, computed through the interface and through results that become operands, with sums in f64.
    fn products<T: Packed>(unit: f64) {
        let p = T::panels();
        let (mr, nr) = (p.mr(), p.nr());
        let number = |i: usize, seed: usize| T::from_f64(((i * 7919 + seed * 31) % 101) as f64 / 37.0 - 1.3);
        for (m, n, k) in [(1, 1, 1), (mr + 3, 2 * nr + 5, 65), (2 * mr, nr, 64), (5, 9, 31)] {
            let a: Vec<T> = (0..m * k).map(|i| number(i, 1)).collect();
            let b: Vec<T> = (0..k * n).map(|i| number(i, 2)).collect();
            let (ma, mb) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
            for k0 in [0, k / 3] {
                let words = p.words(k - k0);
                let zero = <<T::Panels as Panels>::Word as Default>::default();
                let mut left = vec![zero; m.div_ceil(mr) * mr * words];
                let mut right = vec![zero; n.div_ceil(nr) * nr * words];
                assert!(!p.left(&ma, k0..k, &mut left) && !p.right(&mb, 0..n.div_ceil(nr), k0..k, &mut right));
                let mut tile = vec![<T::Wide as Default>::default(); mr * nr];
                for (i, j) in (0..m.div_ceil(mr)).flat_map(|i| (0..n.div_ceil(nr)).map(move |j| (i, j))) {
                    let (pa, pb) = (&left[i * mr * words..], &right[j * nr * words..]);
                    // SAFETY: panels of `words`, a tile of mr·nr.
                    unsafe {
                        p.multiply(words, pa.as_ptr(), pb.as_ptr(), tile.as_mut_ptr(), false);
                        p.careful().multiply(words, pa.as_ptr(), pb.as_ptr(), tile.as_mut_ptr(), true);
                    }
                    for (r, c) in (0..mr).flat_map(|r| (0..nr).map(move |c| (r, c))) {
                        let (row, col) = (i * mr + r, j * nr + c);
                        let want = match row < m && col < n {
                            true => {
                                (k0..k).map(|q| a[row * k + q].to_f64() * b[q * n + col].to_f64()).sum::<f64>() * 2.0
                            }
                            false => 0.0,
                        };
                        let got = tile[r * nr + c].to_f64();
                        assert!((got - want).abs() <= 1e-4 * unit.min(1.0) + 1e-3 * unit, "{got} {want}");
                    }
                }
            }
        }
        // Tiles used as operands: their numbers are rounded to the operands' type.
        let sum = |i: usize| T::Wide::from_f64(((i * 131) % 97) as f64 / 41.0 - 1.1);
        let tile: Vec<_> = (0..mr * nr).map(sum).collect();
        let rounded: Vec<f64> = tile.iter().map(|&x| T::rounded(x).to_f64()).collect();
        let zero = <<T::Panels as Panels>::Word as Default>::default();
        let (by_rows, by_cols) = (p.words(mr), p.words(nr));
        let mut room = vec![zero; by_rows.max(mr) * nr];
        let right = p.rows_as_right(&tile, &mut room).to_vec();
        let mut left = vec![zero; 2 * by_cols * mr];
        p.tile_as_left(&tile, 0, nr, &mut left);
        p.tile_as_left(&tile, 1, nr - 1, &mut left);
        let one: Vec<T> = (0..mr.max(2 * nr).pow(2)).map(|i| number(i, 3)).collect();
        // (mr × mr)·tile.
        let own = Mat::new(&one[..mr * mr], mr, mr);
        let mut packed = vec![zero; mr * by_rows];
        p.left(&own, 0..mr, &mut packed);
        let mut out = vec![<T::Wide as Default>::default(); mr * nr];
        // SAFETY: as above.
        unsafe { p.multiply(by_rows, packed.as_ptr(), right.as_ptr(), out.as_mut_ptr(), false) };
        for (i, c) in (0..mr).flat_map(|i| (0..nr).map(move |c| (i, c))) {
            let want: f64 = (0..mr).map(|q| own.data[i * mr + q].to_f64() * rounded[q * nr + c]).sum();
            assert!((out[i * nr + c].to_f64() - want).abs() <= 1e-3 * unit, "{} {want}", out[i * nr + c].to_f64());
        }
        // The tile twice side by side, the second time without its last column, times (2·nr × nr).
        let own = Mat::new(&one[..2 * nr * nr], 2 * nr, nr);
        let words = p.words(2 * nr - 1);
        let mut packed = vec![zero; nr * words];
        p.right(&own, 0..1, 0..2 * nr - 1, &mut packed);
        // SAFETY: as above.
        unsafe { p.multiply(words, left.as_ptr(), packed.as_ptr(), out.as_mut_ptr(), false) };
        for (i, c) in (0..mr).flat_map(|i| (0..nr).map(move |c| (i, c))) {
            let want: f64 = (0..2 * nr - 1).map(|q| rounded[i * nr + q % nr] * own.data[q * nr + c].to_f64()).sum();
            assert!((out[i * nr + c].to_f64() - want).abs() <= 1e-3 * unit, "{} {want}", out[i * nr + c].to_f64());
        }
    }

    #[test]
    fn products_of_every_element_type() {
        products::<f32>(1.0);
        products::<f64>(1e-9);
        products::<bf16>(1.0);
    }
}
