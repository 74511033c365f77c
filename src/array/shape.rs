//! Shapes, strides, broadcasting, and the loop nest that visits strided operands.

use crate::base::{Error, Result};
use smallvec::SmallVec;

/// Sizes or strides of the dimensions, outermost first. Up to six need no heap allocation.
pub type Dims = SmallVec<[usize; 6]>;

/// Product of the sizes; 1 for a scalar.
pub fn numel(shape: &[usize]) -> usize {
    match shape.contains(&0) {
        true => 0,
        // If the product overflows, this returns a number that exceeds any memory and any slice length.
        false => shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(usize::MAX),
    }
}

/// Bytes of a contiguous array.
///
/// # Panics
/// If the number is too large for any memory; sizes from files and configurations are validated before this call.
pub fn bytes(shape: &[usize], size: usize) -> usize {
    match numel(shape).checked_mul(size).filter(|b| *b <= isize::MAX as usize) {
        Some(bytes) => bytes,
        None => panic!("an array of shape {shape:?} with {size} bytes an element is larger than any memory"),
    }
}

/// Row-major strides of `shape`, in elements.
pub fn contiguous_strides(shape: &[usize]) -> Dims {
    let mut strides: Dims = SmallVec::from_elem(1, shape.len());
    for d in (0..shape.len().saturating_sub(1)).rev() {
        strides[d] = strides[d + 1].saturating_mul(shape[d + 1].max(1));
    }
    strides
}

/// The shape to which two operands broadcast: shapes are aligned at the last dimension, and sizes must be equal or 1.
pub fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Dims> {
    let n = a.len().max(b.len());
    let at = |s: &[usize], d: usize| if d + s.len() >= n { s[d + s.len() - n] } else { 1 };
    let mut out = Dims::new();
    for d in 0..n {
        let (x, y) = (at(a, d), at(b, d));
        out.push(match (x, y) {
            _ if x == y => x,
            (1, _) => y,
            (_, 1) => x,
            _ => {
                return Err(Error::shape(
                    op,
                    format!("{a:?} and {b:?} do not broadcast: sizes {x} and {y} differ and neither is 1"),
                ));
            }
        });
    }
    Ok(out)
}

/// Strides of an operand of `shape` and `strides` broadcast to `target` (stride 0 along repeated dimensions).
pub fn broadcast_strides(op: &'static str, shape: &[usize], strides: &[usize], target: &[usize]) -> Result<Dims> {
    let bad = || Error::shape(op, format!("{shape:?} cannot be expanded to {target:?}"));
    if shape.len() > target.len() {
        return Err(bad());
    }
    let lead = target.len() - shape.len();
    let mut out: Dims = SmallVec::from_elem(0, target.len());
    for d in 0..shape.len() {
        out[lead + d] = match (shape[d], target[lead + d]) {
            (a, b) if a == b => strides[d],
            (1, _) => 0,
            _ => return Err(bad()),
        };
    }
    Ok(out)
}

/// Resolves a dimension counted from the front (0…) or from the back (−1…).
pub fn dim(op: &'static str, d: isize, rank: usize) -> Result<usize> {
    let r = rank as isize;
    if d < -r || d >= r {
        return Err(Error::shape(op, format!("dimension {d} of a tensor with {rank} dimensions")));
    }
    Ok(if d < 0 { (d + r) as usize } else { d as usize })
}

/// A loop nest over `N` strided operands of one shape. Adjacent dimensions are merged where every operand allows it. The innermost
/// dimension is left to the caller as a run of `inner` elements at fixed steps.
pub struct Nest<const N: usize> {
    outer: SmallVec<[(usize, [usize; N]); 6]>,
    rows: usize,
    /// Elements of a run.
    pub inner: usize,
    /// Step of each operand inside a run.
    pub step: [usize; N],
}

impl<const N: usize> Nest<N> {
    /// A nest over `shape`, with one stride list per operand.
    pub fn new(shape: &[usize], strides: [&[usize]; N]) -> Self {
        let mut dims: SmallVec<[(usize, [usize; N]); 6]> = SmallVec::new();
        for d in 0..shape.len() {
            let (size, step) = (shape[d], std::array::from_fn(|k| strides[k][d]));
            if size == 1 {
                continue;
            }
            match dims.last_mut() {
                Some((s, st)) if (0..N).all(|k| st[k] == step[k] * size) => {
                    *s *= size;
                    *st = step;
                }
                _ => dims.push((size, step)),
            }
        }
        let (inner, step) = dims.pop().unwrap_or((1, [1; N]));
        let rows = dims.iter().map(|d| d.0).product();
        Nest { outer: dims, rows, inner, step }
    }
    /// Number of runs.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Offset of run `row` in each operand.
    pub fn offsets(&self, mut row: usize) -> [usize; N] {
        let mut at = [0; N];
        for (size, step) in self.outer.iter().rev() {
            let i = row % size;
            row /= size;
            for k in 0..N {
                at[k] += i * step[k];
            }
        }
        at
    }
}
