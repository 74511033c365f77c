//! Grouped linear: rows sorted by group, with one matrix for each group (the experts of a mixture).
//!
//! FLOPs 2·N·d·p whatever the number of groups; groups without rows cost nothing. Rows that a router has sorted are gathered while they are
//! read. The weight's gradient stays a grouped outer factor: one `[d, p]` product per group that has rows, and the per-sample gradients of
//! experts are exact although routing has mixed the rows of all samples.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{
    Case, Cotangents, Differentiable, Factor, FactorRule, Gen, Groups, OpInfo, Owner, Rule, Segments, Whose, one,
};
use crate::base::{DType, Element, Error, Result};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::kernels::gemm::half::{self as half_gemm, Operand, Out};
use crate::kernels::gemm::{Epilogue, Mat, gemm};
use crate::kernels::{Activation, Half, dispatch, rows};
use crate::ops::combine::gather_sum;
use crate::ops::linear::{Layout, activation_grad, f32_or_bf16};
use crate::ops::route::{Choice, Gate, Routing, route};
use crate::{Param, Samples, Tensor, with_dtype, with_float};
use smallvec::SmallVec;

static GROUPED_LINEAR: OpInfo = OpInfo {
    name: "grouped_linear",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["grouped outer", "lookup"]),
    cases: &[
        |g: &mut Gen| {
            let (e, d, p, b) = (g.size(1, 4), g.extent(1, 4), g.extent(1, 4), g.size(1, 4));
            let lengths = g.lengths(e, e);
            let e = lengths.len();
            let groups = Segments::lengths(&lengths);
            let n = groups.rows();
            let (w, layout, bias, act) = layer(g, (e, d, p));
            let params = std::iter::once(w.clone()).chain(bias.clone()).collect();
            let owner: Vec<u32> = (0..n).map(|_| g.size(0, b - 1) as u32).collect();
            let samples = Samples::owners(owner.clone(), b)?;
            let pick = Array::generate(&[b, n], g.dtype(), |i| (owner[i % n] as usize == i / n) as u8 as f64);
            Ok(Case::new(vec![g.array(&[n, d])], move |t| {
                let y = grouped_linear(&t[0], &w, layout, bias.as_ref(), act, &groups, &samples)?;
                Tensor::new(pick.clone()).matmul(&y.sin()?)
            })
            .params(params)
            .samples(b))
        },
        // Rows sorted by a router, from samples of any length.
        |g: &mut Gen| {
            let (e, d, p, b) = (g.size(1, 5), g.extent(1, 4), g.extent(1, 4), g.size(1, 3));
            let top_k = g.size(1, e);
            let lengths = g.lengths(b, b);
            let samples = Segments::lengths(&lengths).samples();
            let (t, b) = (samples.rows(), samples.count());
            let (w, layout, bias, act) = layer(g, (e, d, p));
            let params = std::iter::once(w.clone()).chain(bias.clone()).collect();
            let c = Choice { top_k, gate: Gate::Softmax, renormalise: false };
            let routing = route(&Tensor::new(g.distinct(&[t, e])), &c, None)?.1;
            let rows = routing.samples(&samples)?;
            let pick = Array::generate(&[b, t], g.dtype(), |i| (samples.owner(i % t) == i / t) as u8 as f64);
            let weights = g.ordinary(&[t, top_k]);
            Ok(Case::new(vec![g.array(&[t, d])], move |x| {
                let y = grouped_linear(&x[0], &w, layout, bias.as_ref(), act, &routing, &rows)?;
                let y = crate::ops::combine::combine(&y.sin()?, &Tensor::new(weights.clone()), &routing)?;
                Tensor::new(pick.clone()).matmul(&y)
            })
            .params(params)
            .samples(b))
        },
    ],
};

/// The common parts of the cases: a weight in one of the layouts, an optional bias, an activation.
fn layer(g: &mut Gen, (e, d, p): (usize, usize, usize)) -> (Param, Layout, Option<Param>, Activation) {
    let layout = if g.chance(0.5) { Layout::OutIn } else { Layout::InOut };
    let shape = if layout == Layout::OutIn { [e, p, d] } else { [e, d, p] };
    let w = Param::new("weight", g.array(&shape));
    let bias = g.chance(0.7).then(|| Param::new("bias", g.array(&[e, p])));
    let act = [Activation::None, Activation::None, Activation::Gelu, Activation::Silu, Activation::Tanh][g.size(0, 4)];
    (w, layout, bias, act)
}

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&GROUPED_LINEAR];

/// The source of the rows of a grouped product.
#[derive(Clone, Copy, Debug)]
pub enum Grouped<'a> {
    /// The rows of the input, which are already sorted by group.
    Sorted(&'a Segments),
    /// Tokens, gathered while they are read: each goes to the groups that the router chose for it.
    Routed(&'a Routing),
}

impl<'a> From<&'a Segments> for Grouped<'a> {
    fn from(s: &'a Segments) -> Grouped<'a> {
        Grouped::Sorted(s)
    }
}

impl<'a> From<&'a Routing> for Grouped<'a> {
    fn from(r: &'a Routing) -> Grouped<'a> {
        Grouped::Routed(r)
    }
}

struct Back {
    x: Array,
    /// The values before the activation.
    z: Option<Array>,
    w: Param,
    bias: Option<Param>,
    layout: Layout,
    act: Activation,
    groups: Segments,
    routing: Option<Routing>,
    samples: Samples,
}

/// Operations that [`products`] applies to its sums.
#[derive(Default)]
struct Finish<'a> {
    /// `[E, m]`.
    bias: Option<&'a Array>,
    act: Activation,
    /// Whether the values before the activation are returned.
    pre: bool,
}

/// The rows of every group, for a loop over the groups on the CPU.
struct EachGroup<'a> {
    groups: &'a Segments,
    /// The input row that each row reads, if it is not its own.
    token: Option<&'a [u32]>,
    k: usize,
    m: usize,
}

impl EachGroup<'_> {
    /// Calls `product(e, (x, gather), y, z)` for each group e that has rows, with its rows of `x` (as a matrix and the rows to gather from
    /// it) and its rows of `y` and `z` to write.
    fn run<T: Element>(
        &self,
        x: &[T],
        y: &mut [T],
        z: Option<&mut [T]>,
        product: impl Fn(usize, (Mat<T>, Option<&[u32]>), &mut [T], Option<&mut [T]>) + Sync,
    ) {
        let (k, m, offsets) = (self.k, self.m, self.groups.offsets());
        let (y, z) = (Shared::new(y), z.map(Shared::new));
        par_chunks(self.groups.count(), self.groups.grain(m), |part| {
            for e in part {
                let r = offsets[e]..offsets[e + 1];
                if r.is_empty() || m == 0 {
                    continue;
                }
                let at = r.start * m..r.end * m;
                // SAFETY: groups are disjoint runs of rows, since offsets never decrease.
                let (y, z) = unsafe { (y.slice(at.clone()), z.as_ref().map(|z| z.slice(at))) };
                let x = match self.token {
                    Some(token) => (Mat::new(x, x.len().checked_div(k).unwrap_or(0), k), Some(&token[r])),
                    None => (Mat::new(&x[r.start * k..r.end * k], r.len(), k), None),
                };
                product(e, x, y, z);
            }
        });
    }
}

/// y[rows of e] = act(x[rows of e]·W_e (+ b_e)), where W_e is the `k × m` matrix of group e in `w`, stored transposed if `transposed`. With
/// a routing, row j reads the token of row j. The second array holds the values before the activation.
fn products(
    x: &Array,
    w: &Array,
    (groups, routing): (&Segments, Option<&Routing>),
    (k, m): (usize, usize),
    transposed: bool,
    finish: Finish,
) -> Result<(Array, Option<Array>)> {
    let Finish { bias, act, pre } = finish;
    dispatch(
        [x.clone(), w.clone()],
        Half::Bf16,
        |[x, w]| {
            let n = groups.rows();
            let (mut y, mut z) = (Array::uninit(&[n, m], x.dtype()), pre.then(|| Array::uninit(&[n, m], x.dtype())));
            let token = routing.map(|r| r.tokens_of_rows().as_slice::<u32>()).transpose()?;
            let each = EachGroup { groups, token, k, m };
            let bias = bias.map(|b| b.cast(x.dtype().compute()));
            // Matrix e of the weight in its stored layout.
            fn matrix<T>(w: &[T], e: usize, (k, m): (usize, usize), transposed: bool) -> Mat<'_, T> {
                let w = &w[e * k * m..(e + 1) * k * m];
                if transposed { Mat::new(w, m, k).t() } else { Mat::new(w, k, m) }
            }
            if x.dtype() == DType::BF16 {
                let w = f32_or_bf16(w);
                let (wide, narrow) = (w.as_slice::<f32>(), w.as_slice::<half::bf16>());
                let weight = |e: usize| match (&wide, &narrow) {
                    (Ok(w), _) => Ok(Operand::Full(matrix(w, e, (k, m), transposed))),
                    (_, Ok(w)) => Ok(Operand::Half(matrix(w, e, (k, m), transposed))),
                    (_, Err(_)) => Err(Error::dtype("grouped_linear", format!("a weight of {}", w.dtype()))),
                };
                let weights = (0..groups.count()).map(weight).collect::<Result<Vec<_>>>()?;
                let bias = bias.as_ref().map(|b| b.as_slice::<f32>()).transpose()?;
                each.run(x.as_slice()?, y.fresh_mut(), z.as_mut().map(|z| z.fresh_mut()), |e, (x, gather), y, pre| {
                    let bias = bias.map(|b| &b[e * m..(e + 1) * m]);
                    let finish =
                        half_gemm::Epilogue { gather, bias, act, pre: pre.map(Out::Half), ..Default::default() };
                    half_gemm::product(Operand::Half(x), weights[e], finish, Out::Half(y));
                });
                return Ok((y, z));
            }
            with_float!("grouped_linear", x.dtype(), |T| {
                let w = w.cast(T::DTYPE);
                let w = w.as_slice::<T>()?;
                let bias = bias.as_ref().map(|b| b.as_slice::<T>()).transpose()?;
                each.run(x.as_slice()?, y.fresh_mut(), z.as_mut().map(|z| z.fresh_mut()), |e, (x, gather), y, pre| {
                    let bias = bias.map(|b| &b[e * m..(e + 1) * m]);
                    let finish = Epilogue { gather, bias, act, pre, ..Epilogue::default() };
                    gemm(x, matrix::<T>(w, e, (k, m), transposed), finish, y);
                });
                Ok((y, z))
            })
        },
        |gpu, [x, w]| {
            let w = w.cast(x.dtype());
            let w = if transposed { w.transpose(1, 2)? } else { w };
            let bias = bias.map(|b| crate::array::cuda::on(gpu, &b.cast(x.dtype()))).transpose()?;
            let index = routing.map(|r| crate::array::cuda::on(gpu, r.tokens_of_rows())).transpose()?;
            let offsets = groups.on_gpu(gpu)?.offsets;
            let from = cuda::Rows { offsets: &offsets, index: index.as_ref(), count: groups.rows() };
            cuda::rows(gpu, &x, &w, bias.as_ref(), &from, (act, pre))
        },
    )
}

/// The rows of `x` in the router's order, as a contiguous array.
fn gathered(x: &Array, routing: &Routing) -> Result<Array> {
    let (tokens, d) = (x.shape()[0], x.shape()[1]);
    dispatch(
        [x.clone(), routing.tokens_of_rows().clone()],
        Half::Move,
        |[x, token]| {
            let mut y = Array::uninit(&[token.numel(), d], x.dtype());
            with_dtype!(x.dtype(), |T| {
                rows::take(x.as_slice::<T>()?, token.as_slice::<u32>()?, 1, d, y.fresh_mut::<T>());
            });
            Ok(y)
        },
        |gpu, [x, token]| rows::cuda::take(gpu, &x, &token, 1, tokens, d, &[token.numel(), d]),
    )
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &GROUPED_LINEAR
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let (rows, d) = (self.x.shape()[0], self.x.shape()[1]);
        one(match (&self.routing, y.owner) {
            (None, _) => y.by_rows(rows, rows * d),
            (Some(_), Owner::Routed(tokens)) => {
                Whose { owner: tokens, shape: &[rows, 1], ..*y }.by_rows(rows, rows * d)
            }
            (Some(r), _) if r.tokens_of_rows().gpu().is_none() => match r.tokens_of_rows().to_vec::<u32>() {
                Ok(token) => y.taken(&token, rows, d),
                Err(_) => Owner::Unknown,
            },
            _ => Owner::Unknown,
        })
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let mut g = grad.contiguous();
        if let Some(z) = &self.z {
            g = activation_grad(self.act, g, z)?;
        }
        let (d, p) = (self.x.shape()[1], g.shape()[1]);
        if back.needs(0) {
            spans::cost(2.0 * (self.groups.rows() * d * p) as f64, 0.0);
            let turned = self.layout == Layout::InOut;
            let sorted = (&self.groups, None);
            let dx = products(&g, &self.w.value(), sorted, (p, d), turned, Finish::default())?.0;
            back.input(
                0,
                match &self.routing {
                    Some(r) => gather_sum(&dx, None, r)?,
                    None => dx,
                },
            );
        }
        // Factors are f32 or f64: norms and clipped sums of 16-bit products could exceed the clipping threshold by rounding.
        let g = g.cast(g.dtype().compute());
        if self.w.trainable() {
            let x = match &self.routing {
                Some(r) => gathered(&self.x, r)?,
                None => self.x.clone(),
            };
            let (x, g) = (x.cast(g.dtype()), g.clone());
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

/// `y = act(x·W_e (+ b_e))` for the rows of each group e, giving `[N, p]`.
///
/// `rows` describes the rows: the segments of an input `[N, d]` that is sorted by group ([`Segments`]), or a routing of the tokens of an
/// input `[T, d]`, which are gathered while they are read ([`Routing`]). `w` is `[E, p, d]` ([`Layout::OutIn`]) or `[E, d, p]`
/// ([`Layout::InOut`]), `bias` is `[E, p]`; any of the E groups may be empty. `samples` maps the N rows to samples: [`Routing::samples`],
/// or [`Samples::select`] of the map before routing. For bf16 inputs the weights are rounded to bf16, too, and products are summed in f32
/// ([`half`](crate::kernels::gemm::half)); f16 on the CPU is computed in f32.
pub fn grouped_linear<'a>(
    x: &Tensor,
    w: &Param,
    layout: Layout,
    bias: Option<&Param>,
    act: Activation,
    rows: impl Into<Grouped<'a>>,
    samples: &Samples,
) -> Result<Tensor> {
    let _op = spans::op("grouped_linear");
    let op = "grouped_linear";
    x.dtype().expect_float(op)?;
    let (groups, routing) = match rows.into() {
        Grouped::Sorted(s) => (s, None),
        Grouped::Routed(r) => (r.groups(), Some(r)),
    };
    let &[e, a, b] = w.shape() else {
        return Err(Error::shape(op, format!("weight {} is {:?}, not one matrix per group", w.name(), w.shape())));
    };
    let (d, p) = if layout == Layout::OutIn { (b, a) } else { (a, b) };
    let &[given, xd] = x.shape() else {
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
    match routing {
        None => groups.expect_rows(op, given)?,
        Some(r) if r.tokens() == given => {}
        Some(r) => {
            let message = format!("{} tokens were routed, the input has {given} rows", r.tokens());
            return Err(Error::shape(op, message));
        }
    }
    let n = groups.rows();
    if samples.rows() != n {
        return Err(Error::shape(op, format!("the samples map {} rows, the groups have {n}", samples.rows())));
    }
    if let Some(b) = bias
        && b.shape() != [e, p]
    {
        return Err(Error::shape(op, format!("bias {} is {:?}, not [{e}, {p}]", b.name(), b.shape())));
    }
    spans::cost(2.0 * (n * d * p) as f64, ((n * (d + p) + e * d * p) * x.dtype().size()) as f64);
    let xa = x.array().contiguous();
    let bv = bias.map(Param::value);
    // The values before the activation are kept only if a backward pass may need them.
    let pre = act != Activation::None && Tensor::would_record(&[x], &[w]);
    let finish = Finish { bias: bv.as_ref(), act, pre };
    let (y, z) = products(&xa, &w.value(), (groups, routing), (d, p), layout == Layout::OutIn, finish)?;
    let params: Vec<&Param> = std::iter::once(w).chain(bias).collect();
    Ok(Tensor::record(y, &[x], &params, || Back {
        x: xa,
        z,
        w: w.clone(),
        bias: bias.cloned(),
        layout,
        act,
        groups: groups.clone(),
        routing: routing.cloned(),
        samples: samples.clone(),
    }))
}
