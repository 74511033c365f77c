//! Grouped linear: rows sorted by group, each group with its own matrix (experts of a mixture).
//!
//! FLOPs 2·N·d·p whatever the number of groups; groups without rows cost nothing. The weight's gradient stays a grouped
//! outer factor: one `[d, p]` product per group that saw rows, and per-sample gradients of experts stay exact although
//! routing has mixed the rows of all samples.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Differentiable, Factor, FactorRule, Flow, Gen, OpInfo, Rule};
use crate::base::{DType, Error, Result};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::{Mat, matmul};
use crate::ops::linear::Layout;
use crate::ops::segment::Segments;
use crate::{Param, Samples, Tensor, with_float};

static GROUPED_LINEAR: OpInfo = OpInfo {
    name: "grouped_linear",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["grouped outer", "lookup"]),
    cases: &[|g: &mut Gen| {
        let (e, d, p, b) = (g.size(1, 4), g.size(1, 4), g.size(1, 4), g.size(1, 4));
        let lengths: Vec<usize> = (0..e).map(|_| g.size(0, 4)).collect();
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

/// out[rows of e] = x[rows of e]·W_e, with W_e the `k × m` matrix at block e of `w`, stored transposed if `transposed`.
fn products<T: Kernels>(x: &[T], w: &[T], groups: &Segments, (k, m): (usize, usize), transposed: bool, out: &mut [T]) {
    if m == 0 || k == 0 {
        return out.fill(T::ZERO);
    }
    let dst = Shared::new(out);
    par_chunks(groups.count(), 1, |range| {
        for e in range.filter(|&e| !groups.range(e).is_empty()) {
            let r = groups.range(e);
            let w = &w[e * k * m..(e + 1) * k * m];
            let w = if transposed { Mat::new(w, m, k).t() } else { Mat::new(w, k, m) };
            // SAFETY: groups are disjoint.
            let o = unsafe { dst.slice(r.start * m..r.end * m) };
            matmul(Mat::new(&x[r.start * k..r.end * k], r.len(), k), w, false, o);
        }
    });
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &GROUPED_LINEAR
    }
    fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
        let g = grad.contiguous();
        let (d, p) = (self.x.shape()[1], g.shape()[1]);
        if flow.wants(0) {
            let w = self.w.value().cast(g.dtype());
            if let Some(gpu) = g.gpu() {
                // The gradient's matrix is p × d.
                let w = if self.layout == Layout::InOut { w.transpose(1, 2)? } else { w };
                flow.input(0, cuda::rows(gpu, &g, &w, None, &self.groups.on_gpu(gpu)?.offsets)?);
            } else {
                let mut dx = Array::uninit(self.x.shape(), g.dtype());
                with_float!("grouped_linear", g.dtype(), T => {
                    let transposed = self.layout == Layout::InOut;
                    products::<T>(g.as_slice()?, w.as_slice()?, &self.groups, (p, d), transposed, dx.fresh_mut());
                    Ok(())
                })?;
                flow.input(0, dx);
            }
        }
        if self.w.trainable() {
            let (x, g) = (self.x.clone(), g.clone());
            let (left, right) = if self.layout == Layout::OutIn { (g, x) } else { (x, g) };
            let group = self.groups.ids().clone();
            flow.param(&self.w, Factor::GroupedOuter { left, right, group, samples: self.samples.clone() });
        }
        if let Some(b) = &self.bias {
            let ids = match g.gpu() {
                Some(gpu) => self.groups.on_gpu(gpu)?.owner,
                None => Array::from_slice(self.groups.ids(), &[self.groups.rows()])?,
            };
            flow.param(b, Factor::Lookup { ids, grad: g, samples: self.samples.clone() });
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
    if x.dtype().is_half() {
        return grouped_linear(&x.cast(DType::F32)?, w, layout, bias, groups, samples)?.cast(x.dtype());
    }
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
    let (xa, wv) = (x.array().contiguous(), w.value().cast(x.dtype()));
    let params: Vec<&Param> = std::iter::once(w).chain(bias).collect();
    let back = |x: Array| Back {
        x,
        w: w.clone(),
        bias: bias.cloned(),
        layout,
        groups: groups.clone(),
        samples: samples.clone(),
    };
    if let Some(gpu) = xa.gpu() {
        let wm = if layout == Layout::OutIn { wv.transpose(1, 2)? } else { wv };
        let bias = bias.map(|b| b.value().cast(x.dtype()));
        let y = cuda::rows(gpu, &xa, &wm, bias.as_ref(), &groups.on_gpu(gpu)?.offsets)?;
        return Ok(Tensor::record(y, &[x], &params, || back(xa)));
    }
    let mut y = Array::uninit(&[n, p], x.dtype());
    with_float!(op, x.dtype(), T => {
        products::<T>(xa.as_slice()?, wv.as_slice()?, groups, (d, p), layout == Layout::OutIn, y.fresh_mut());
        if let Some(b) = bias {
            let b = b.value().cast(x.dtype());
            let (b, dst) = (b.as_slice::<T>()?, Shared::new(y.fresh_mut::<T>()));
            groups.each(p, |e, range| {
                // SAFETY: groups are disjoint.
                let o = unsafe { dst.slice(range.start * p..range.end * p) };
                let b = &b[e * p..(e + 1) * p];
                o.chunks_exact_mut(p.max(1)).for_each(|o| o.iter_mut().zip(b).for_each(|(o, &b)| *o += b));
            });
        }
        Ok(())
    })?;
    Ok(Tensor::record(y, &[x], &params, || back(xa)))
}
