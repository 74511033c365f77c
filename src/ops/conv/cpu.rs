//! Sliding windows over images: unfolding windows into rows, and folding rows back into images.

use crate::base::{Element, Float};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;

/// A window that slides over an input of `size` (height, width) with zero padding.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Input height and width.
    pub size: [usize; 2],
    /// Output height and width: the number of positions of the window.
    pub out: [usize; 2],
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Step between positions.
    pub stride: [usize; 2],
    /// Zeros before and after.
    pub padding: [usize; 2],
    /// Step between the elements of a window.
    pub dilation: [usize; 2],
}

impl Window {
    /// Number of positions.
    pub fn places(&self) -> usize {
        self.out[0] * self.out[1]
    }
    /// Elements of a window.
    pub fn area(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }
    /// Input coordinate of window element `k` at position `o` along `axis`; `None` in the padding.
    #[inline(always)]
    fn at(&self, axis: usize, o: usize, k: usize) -> Option<usize> {
        let i = o * self.stride[axis] + k * self.dilation[axis];
        (i >= self.padding[axis] && i - self.padding[axis] < self.size[axis]).then(|| i - self.padding[axis])
    }
}

/// Rows of windows of one image `x [c, H, W]`, for output line `line`: `out [out width, c·area]`.
fn unfold_line<T: Element>(x: &[T], channels: usize, w: &Window, line: usize, out: &mut [T]) {
    let [h, width] = w.size;
    let (kw, plane) = (w.kernel[1], h * width);
    for (place, row) in out.chunks_exact_mut(channels * w.area()).enumerate() {
        let left = place * w.stride[1];
        // The whole window is inside and its elements are contiguous: copy runs.
        let run = w.dilation[1] == 1 && left >= w.padding[1] && left - w.padding[1] + kw <= width;
        let mut pieces = row.chunks_exact_mut(kw);
        for c in 0..channels {
            for ki in 0..w.kernel[0] {
                let Some(piece) = pieces.next() else { return };
                match w.at(0, line, ki) {
                    None => piece.fill(T::default()),
                    Some(i) if run => {
                        let at = c * plane + i * width + left - w.padding[1];
                        piece.copy_from_slice(&x[at..at + kw]);
                    }
                    Some(i) => {
                        let at = c * plane + i * width;
                        for (kj, p) in piece.iter_mut().enumerate() {
                            *p = w.at(1, place, kj).map_or(T::default(), |j| x[at + j]);
                        }
                    }
                }
            }
        }
    }
}

/// Windows of one image as rows: `x [c, H, W]` to `[positions, c·area]`.
pub fn unfold_one<T: Element>(x: &[T], channels: usize, w: &Window, out: &mut [T]) {
    let line = w.out[1] * channels * w.area();
    if line > 0 {
        out.chunks_exact_mut(line).enumerate().for_each(|(i, o)| unfold_line(x, channels, w, i, o));
    }
}

/// Windows of `n` images as rows: `x [n, c, H, W]` to `[n, positions, c·area]`. It writes about `area` times as much as it reads.
pub fn unfold<T: Element>(x: &[T], n: usize, channels: usize, w: &Window, out: &mut [T]) {
    let (line, image) = (w.out[1] * channels * w.area(), channels * w.size[0] * w.size[1]);
    if out.is_empty() {
        return;
    }
    let dst = Shared::new(out);
    par_chunks(n * w.out[0], (crate::device::cpu::par::GRAIN / line).max(1), |range| {
        for i in range {
            let (b, l) = (i / w.out[0], i % w.out[0]);
            // SAFETY: each line is written once.
            let o = unsafe { dst.slice(i * line..(i + 1) * line) };
            unfold_line(&x[b * image..(b + 1) * image], channels, w, l, o);
        }
    });
}

/// Adds the windows of channel `c` back into its plane `[H, W]`; `rows [positions, channels·area]`.
fn fold_plane<T: Float>(rows: &[T], channels: usize, c: usize, w: &Window, plane: &mut [T]) {
    let (area, kw, width) = (w.area(), w.kernel[1], w.size[1]);
    for oi in 0..w.out[0] {
        for oj in 0..w.out[1] {
            let at = ((oi * w.out[1] + oj) * channels + c) * area;
            for ki in 0..w.kernel[0] {
                let Some(i) = w.at(0, oi, ki) else { continue };
                for kj in 0..kw {
                    if let Some(j) = w.at(1, oj, kj) {
                        plane[i * width + j] += rows[at + ki * kw + kj];
                    }
                }
            }
        }
    }
}

/// Adds rows of windows back into one image: `rows [positions, c·area]` into `x [c, H, W]`.
pub fn fold_one<T: Float>(rows: &[T], channels: usize, w: &Window, x: &mut [T]) {
    let plane = w.size[0] * w.size[1];
    if plane > 0 {
        x.chunks_exact_mut(plane).enumerate().for_each(|(c, x)| fold_plane(rows, channels, c, w, x));
    }
}

/// Adds rows of windows back into `n` images: `[n, positions, c·area]` into `x [n, c, H, W]`. Each plane is summed by one task.
pub fn fold<T: Float>(rows: &[T], n: usize, channels: usize, w: &Window, x: &mut [T]) {
    let (plane, each) = (w.size[0] * w.size[1], w.places() * channels * w.area());
    if plane == 0 {
        return;
    }
    let dst = Shared::new(x);
    par_chunks(n * channels, (crate::device::cpu::par::GRAIN / (w.places() * w.area()).max(1)).max(1), |range| {
        for i in range {
            let (b, c) = (i / channels, i % channels);
            // SAFETY: each plane is visited once.
            let x = unsafe { dst.slice(i * plane..(i + 1) * plane) };
            fold_plane(&rows[b * each..(b + 1) * each], channels, c, w, x);
        }
    });
}

/// Transposes `[n, r, c]` to `[n, c, r]`, in tiles that stay in the cache.
pub fn transpose<T: Element>(x: &[T], n: usize, r: usize, c: usize, out: &mut [T]) {
    const TILE: usize = 16;
    if out.is_empty() {
        return;
    }
    // Output rows are processed in bands, so that one large matrix is divided among threads as well.
    let bands = c.div_ceil(TILE);
    let dst = Shared::new(out);
    par_chunks(n * bands, (crate::device::cpu::par::GRAIN / (r * TILE)).max(1), |range| {
        for i in range {
            let (m, c0) = (i / bands, i % bands * TILE);
            let c1 = (c0 + TILE).min(c);
            let x = &x[m * r * c..(m + 1) * r * c];
            // SAFETY: bands are disjoint.
            let o = unsafe { dst.slice((m * c + c0) * r..(m * c + c1) * r) };
            for r0 in (0..r).step_by(TILE) {
                for j in c0..c1 {
                    for k in r0..(r0 + TILE).min(r) {
                        o[(j - c0) * r + k] = x[k * c + j];
                    }
                }
            }
        }
    });
}
