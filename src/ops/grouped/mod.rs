//! Grouped linear: rows sorted by group, each group with its own matrix (experts of a mixture).
//!
//! FLOPs 2·N·d·p whatever the number of groups; groups without rows cost nothing. The weight's gradient stays a grouped
//! outer factor: one `[d, p]` product per group that saw rows, and per-sample gradients of experts stay exact although
//! routing has mixed the rows of all samples.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Factor, FactorRule, Gen, Groups, OpInfo, Rule, Segments};
use crate::base::{Element, Error, Float, Result};
use crate::device::spans;
use crate::kernels::gemm::{Mat, matmul};
use crate::kernels::{Half, dispatch};
use crate::ops::linear::Layout;
use crate::{Param, Samples, Tensor, with_float};

static GROUPED_LINEAR: OpInfo = OpInfo {
    name: "grouped_linear",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["grouped outer", "lookup"]),
    cases: &[|g: &mut Gen| {
        let (e, d, p, b) = (g.size(1, 4), g.extent(1, 4), g.extent(1, 4), g.size(1, 4));
        let lengths = g.lengths(e, e);
        let e = lengths.len();
        let groups = Segments::lengths(&lengths);
        let n = groups.rows();
        let layout = if g.chance(0.5) { Layout::OutIn } else { Layout::InOut };
        let shape = if layout == Layout::OutIn { [e, p, d] } else { [e, d, p] };
        let w = Param::new("weight", g.array(&shape));
        let bias = g.chance(0.7).then(|| Param::new("bias", g.array(&[e, p])));
        let params = std::iter::once(w.clone()).chain(bias.clone()).collect();
        let owner: Vec<u32> = (0..n).map(|_| g.size(0, b - 1) as u32).collect();
        let samples = Samples::owners(owner.clone(), b)?;
        let pick = Array::generate(&[b, n], g.dtype(), |i| (owner[i % n] as usize == i / n) as u8 as f64);
        Ok(Case::new(vec![g.array(&[n, d])], move |t| {
            let y = grouped_linear(&t[0], &w, layout, bias.as_ref(), &groups, &samples)?;
            Tensor::new(pick.clone()).matmul(&y.sin()?)
        })
        .params(params)
        .samples(b))
    }],
};

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&GROUPED_LINEAR];

struct Back {
    x: Array,
    w: Param,
    bias: Option<Param>,
    layout: Layout,
    groups: Segments,
    samples: Samples,
}

/// y[rows of e] = x[rows of e]·W_e (+ b_e), with W_e the `k × m` matrix of group e in `w`, each stored transposed if
/// `transposed`; `bias [E, m]`.
fn products(
    x: &Array,
    w: &Array,
    bias: Option<&Array>,
    groups: &Segments,
    (k, m): (usize, usize),
    transposed: bool,
) -> Result<Array> {
    dispatch(
        [x.clone(), w.clone()],
        Half::Native,
        |[x, w]| {
            let mut y = Array::uninit(&[x.shape()[0], m], x.dtype());
            with_float!("grouped_linear", x.dtype(), |T| {
                let w = w.cast(T::DTYPE);
                let (x, w) = (x.as_slice::<T>()?, w.as_slice::<T>()?);
                let bias = bias.map(|b| b.cast(T::DTYPE));
                let bias = bias.as_ref().map(|b| b.as_slice::<T>()).transpose()?;
                groups.par_rows(y.fresh_mut::<T>(), m, |e, y| {
                    let r = groups.range(e);
                    if k == 0 || m == 0 {
                        y.fill(T::ZERO);
                    } else if !r.is_empty() {
                        let w = &w[e * k * m..(e + 1) * k * m];
                        let w = if transposed { Mat::new(w, m, k).t() } else { Mat::new(w, k, m) };
                        matmul(Mat::new(&x[r.start * k..r.end * k], r.len(), k), w, false, y);
                    }
                    if let Some(bias) = bias {
                        let b = &bias[e * m..(e + 1) * m];
                        y.chunks_exact_mut(m.max(1)).for_each(|y| y.iter_mut().zip(b).for_each(|(y, &b)| *y += b));
                    }
                });
                Ok(y)
            })
        },
        |gpu, [x, w]| {
            let w = w.cast(x.dtype());
            let w = if transposed { w.transpose(1, 2)? } else { w };
            let bias = bias.map(|b| crate::array::cuda::on(gpu, &b.cast(x.dtype()))).transpose()?;
            cuda::rows(gpu, &x, &w, bias.as_ref(), &groups.on_gpu(gpu)?.offsets)
        },
    )
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &GROUPED_LINEAR
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let g = grad.contiguous();
        let (d, p) = (self.x.shape()[1], g.shape()[1]);
        if back.needs(0) {
            back.input(0, products(&g, &self.w.value(), None, &self.groups, (p, d), self.layout == Layout::InOut)?);
        }
        // Factors are f32 or f64: norms and clipped sums of 16-bit products would round past the threshold.
        let g = g.cast(g.dtype().compute());
        if self.w.trainable() {
            let (x, g) = (self.x.cast(g.dtype()), g.clone());
            let (left, right) = if self.layout == Layout::OutIn { (g, x) } else { (x, g) };
            let group = Groups::of_segments(&self.groups);
            back.param(&self.w, Factor::GroupedOuter { left, right, group, samples: self.samples.clone() });
        }
        if let Some(b) = &self.bias {
            let ids = match g.gpu() {
                Some(gpu) => self.groups.on_gpu(gpu)?.owner,
                None => Array::from_slice(self.groups.ids(), &[self.groups.rows()])?,
            };
            back.param(b, Factor::Lookup { ids, grad: g, samples: self.samples.clone() });
        }
        Ok(())
    }
}

/// `y = x·W_e (+ b_e)` for the rows of each group e: `x [N, d]` sorted by group, `y [N, p]`.
///
/// `w` is `[E, p, d]` ([`Layout::OutIn`]) or `[E, d, p]` ([`Layout::InOut`]), `bias` `[E, p]`; `groups` has E segments,
/// any of them empty. Rows have been routed, so `samples` must say whose each is: [`Samples::select`] of the map before
/// routing. bf16 and f16 inputs are computed in f32 and the result rounded back.
pub fn grouped_linear(
    x: &Tensor,
    w: &Param,
    layout: Layout,
    bias: Option<&Param>,
    groups: &Segments,
    samples: &Samples,
) -> Result<Tensor> {
    let _op = spans::op("grouped_linear");
    let op = "grouped_linear";
    x.dtype().expect_float(op)?;
    let &[e, a, b] = w.shape() else {
        return Err(Error::shape(op, format!("weight {} is {:?}, not one matrix per group", w.name(), w.shape())));
    };
    let (d, p) = if layout == Layout::OutIn { (b, a) } else { (a, b) };
    let &[n, xd] = x.shape() else {
        return Err(Error::shape(op, format!("input {:?} must be rows [N, {d}]; reshape it", x.shape())));
    };
    if xd != d {
        return Err(Error::shape(
            op,
            format!("input {:?} into {} {:?}: rows must have {d}", x.shape(), w.name(), w.shape()),
        ));
    }
    if groups.count() != e {
        let message = format!("offsets of {} groups for the {e} of {} {:?}", groups.count(), w.name(), w.shape());
        return Err(Error::shape(op, message));
    }
    groups.expect_rows(op, n)?;
    if samples.rows() != n {
        return Err(Error::shape(op, format!("the samples map {} rows, the input has {n}", samples.rows())));
    }
    if let Some(b) = bias
        && b.shape() != [e, p]
    {
        return Err(Error::shape(op, format!("bias {} is {:?}, not [{e}, {p}]", b.name(), b.shape())));
    }
    let xa = x.array().contiguous();
    let bv = bias.map(Param::value);
    let y = products(&xa, &w.value(), bv.as_ref(), groups, (d, p), layout == Layout::OutIn)?;
    let params: Vec<&Param> = std::iter::once(w).chain(bias).collect();
    Ok(Tensor::record(y, &[x], &params, || Back {
        x: xa,
        w: w.clone(),
        bias: bias.cloned(),
        layout,
        groups: groups.clone(),
        samples: samples.clone(),
    }))
}
