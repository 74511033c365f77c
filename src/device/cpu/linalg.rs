//! Matrix products on strided operands.

use crate::tensor::Float;

/// A strided matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    /// First element on.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Step between rows.
    pub rs: usize,
    /// Step between columns.
    pub cs: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat { data, rows, cols, rs: cols, cs: 1 }
    }
    /// Transposed view.
    pub fn t(self) -> Self {
        Mat { data: self.data, rows: self.cols, cols: self.rows, rs: self.cs, cs: self.rs }
    }
}

/// out = a·b (+ out if `accumulate`), row-major `out`.
pub fn matmul<T: Float>(a: Mat<T>, b: Mat<T>, accumulate: bool, out: &mut [T]) {
    let n = b.cols;
    for i in 0..a.rows {
        for j in 0..n {
            let mut s = if accumulate { out[i * n + j] } else { T::ZERO };
            for k in 0..a.cols {
                s += a.data[i * a.rs + k * a.cs] * b.data[k * b.rs + j * b.cs];
            }
            out[i * n + j] = s;
        }
    }
}
