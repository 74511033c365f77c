//! Batched matrix products of tensors.

use super::{Differentiable, NO_PARAMS, OpInfo};
use crate::array::Array;
use crate::array::shape::{Dims, broadcast, numel};
use crate::autograd::{Case, Cotangents, Gen, Owner, Rule, Whose};
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::spans;
use crate::kernels::gemm::half::{self, Operand, Out};
use crate::kernels::gemm::{Mat, cuda as gpu_gemm, matmul as product};
use crate::kernels::{Half, dispatch};
use crate::{Tensor, with_float};
use ::half::bf16;
use smallvec::SmallVec;

static MATMUL: OpInfo = OpInfo {
    name: "matmul",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        // A contraction so long that it is split.
        |g: &mut Gen| {
            let (m, k, n) = (g.size(1, 2), g.size(1030, 1060), g.size(1, 2));
            Ok(Case::new(vec![g.array(&[m, k]), g.array(&[k, n])], |t| t[0].matmul(&t[1])?.mul_scalar(0.03)))
        },
        // Both transposed.
        |g: &mut Gen| {
            let (m, k, n) = (g.extent(2, 4), g.extent(2, 4), g.extent(2, 4));
            let inputs = vec![g.array(&[k, m]).contiguous(), g.array(&[n, k]).contiguous()];
            Ok(Case::new(inputs, |t| t[0].transpose(0, 1)?.matmul(&t[1].transpose(0, 1)?)))
        },
        |g: &mut Gen| {
            let (m, k, n) = (g.extent(0, 4), g.extent(0, 4), g.extent(0, 4));
            let lead_rank = g.size(0, 2);
            let lead = g.shape(lead_rank);
            let cut = |g: &mut Gen| -> Vec<usize> {
                lead[g.size(0, lead.len())..].iter().map(|&s| if g.chance(0.3) { 1 } else { s }).collect()
            };
            let (mut a, mut b) = (cut(g), cut(g));
            a.extend([m, k]);
            b.extend([k, n]);
            Ok(Case::new(vec![g.array(&a), g.array(&b)], |t| t[0].matmul(&t[1])))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&MATMUL];

struct Back {
    a: Array,
    b: Array,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &MATMUL
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let rank = y.shape.len();
        // Leading dimensions are aligned at their right ends; one of the last two dimensions is the output's.
        let side = |shape: &[usize], kept: usize| {
            let new = rank - shape.len();
            y.along(shape, |d| match d + 2 < rank {
                true => d.checked_sub(new).filter(|&i| shape[i] == y.shape[d]),
                false => (d == kept).then(|| d - new),
            })
        };
        SmallVec::from_iter([y.times(1, side(self.a.shape(), rank - 2)), y.times(0, side(self.b.shape(), rank - 1))])
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        if back.needs(0) {
            let da = batched(&grad, &self.b.transpose(-1, -2)?)?;
            back.input(0, super::reduce::sum_to(&da, self.a.shape())?);
        }
        if back.needs(1) {
            let db = batched(&self.a.transpose(-1, -2)?, &grad)?;
            back.input(1, super::reduce::sum_to(&db, self.b.shape())?);
        }
        Ok(())
    }
}

/// Products over broadcast leading dimensions, for operands of any strides.
fn batched(a: &Array, b: &Array) -> Result<Array> {
    let (ra, rb) = (a.rank() - 2, b.rank() - 2);
    let lead = broadcast("matmul", &a.shape()[..ra], &b.shape()[..rb])?;
    let (m, k, n) = (a.shape()[ra], a.shape()[ra + 1], b.shape()[rb + 1]);
    let count = numel(&lead);
    spans::cost(2.0 * (count * m * k * n) as f64, (count * (m * k + k * n + m * n) * a.dtype().size()) as f64);
    let full = |x: &Array, tail: [usize; 2]| {
        let shape: Dims = lead.iter().copied().chain(tail).collect();
        x.expand(&shape)
    };
    let (a, b) = (full(a, [m, k])?, full(b, [k, n])?);
    let shape: Dims = lead.iter().copied().chain([m, n]).collect();
    let r = lead.len();
    dispatch(
        [a, b],
        Half::Bf16,
        |[a, b]| {
            let both = (a.dtype(), b.dtype()) == (DType::BF16, DType::BF16);
            let wide = |x: Array| if both { x } else { x.cast(x.dtype().compute()) };
            let (a, b) = (wide(a), wide(b));
            let mut out = Array::uninit(&shape, a.dtype());
            if m * n == 0 {
                return Ok(out);
            }
            // Start of the operands of the i-th product.
            let start = |i: usize| {
                let (mut at, mut oa, mut ob) = (i, 0, 0);
                for d in (0..r).rev() {
                    let j = at % lead[d];
                    at /= lead[d];
                    oa += j * a.strides()[d];
                    ob += j * b.strides()[d];
                }
                (oa, ob)
            };
            fn mats<'a, T: Element>(
                (a, b): (&'a Array, &'a Array),
                (m, k, n): (usize, usize, usize),
                (oa, ob): (usize, usize),
            ) -> Result<(Mat<'a, T>, Mat<'a, T>)> {
                let r = a.rank() - 2;
                let of = |x: &'a Array, from: usize, (rows, cols): (usize, usize)| {
                    let (rs, cs) = (x.strides()[r], x.strides()[r + 1]);
                    Ok::<_, Error>(Mat { data: &x.raw::<T>()?[from..], rows, cols, rs, cs })
                };
                Ok((of(a, oa, (m, k))?, of(b, ob, (k, n))?))
            }
            if both {
                let each = out.fresh_mut::<bf16>().chunks_exact_mut(m * n);
                for (i, c) in each.enumerate().filter(|_| k > 0) {
                    let (x, y) = mats((&a, &b), (m, k, n), start(i))?;
                    half::product(Operand::Half(x), Operand::Half(y), Default::default(), Out::Half(c));
                }
                if k == 0 {
                    out.fresh_mut::<bf16>().fill(bf16::ZERO);
                }
                return Ok(out);
            }
            with_float!("matmul", a.dtype(), |T| {
                let c = out.fresh_mut::<T>();
                if k == 0 {
                    c.fill(<T as Float>::ZERO);
                    return Ok(out);
                }
                for (i, c) in c.chunks_exact_mut(m * n).enumerate() {
                    let (x, y) = mats((&a, &b), (m, k, n), start(i))?;
                    product::<T>(x, y, false, c);
                }
                Ok(out)
            })
        },
        |gpu, [a, b]| Ok(gpu_gemm::product(gpu, &a, &b, gpu_gemm::Epilogue::default())?.0),
    )
}

impl Tensor {
    /// Matrix product over the last two dimensions, `[…, m, k]·[…, k, n]` to `[…, m, n]`; leading dimensions broadcast. Transposed and
    /// sliced operands are read in place. 2·m·k·n FLOPs per product.
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        let _op = spans::op("matmul");
        self.dtype().expect_float("matmul")?;
        let bad =
            |why: &str| Err(Error::shape("matmul", format!("{:?} times {:?}: {why}", self.shape(), other.shape())));
        if self.dtype() != other.dtype() {
            return Err(Error::dtype("matmul", format!("{} and {} differ; cast one", self.dtype(), other.dtype())));
        }
        if self.rank() < 2 || other.rank() < 2 {
            return bad("both need at least two dimensions");
        }
        if self.shape()[self.rank() - 1] != other.shape()[other.rank() - 2] {
            return bad("the last dimension of the first must equal the second to last of the second");
        }
        let y = batched(self.array(), other.array())?;
        Ok(Tensor::record(y, &[self, other], &[], || Back { a: self.array().clone(), b: other.array().clone() }))
    }
}
