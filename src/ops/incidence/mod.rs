//! Sums over the members of sets: from nodes to hyperedges, and from hyperedges to nodes.
//!
//! An [`Incidence`] lists the sources of each target; [`Incidence::flipped`] exchanges targets and sources. Both orders are stored, so that
//! the sum and its gradient are gathers in a fixed order: no atomics, and the same bits at any number of threads. Memory traffic: a
//! source's row is read once for each set that contains it, and a target's row is written once; nothing of size incidences × d is stored.

pub(crate) mod cuda;
mod sets;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Segments, Whose};
use crate::base::{Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::device::cpu::simd::simd;
use crate::device::spans;
use crate::kernels::{Exact, Half, dispatch};
use crate::{Tensor, with_float};
use sets::Side;
use smallvec::SmallVec;

pub use sets::Incidence;

static INCIDENCE_SUM: OpInfo = OpInfo {
    name: "incidence_sum",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| {
            let sets = random(g)?;
            let x = [sets.sources(), g.extent(0, 4)];
            Ok(Case::new(vec![g.array(&x)], move |t| t[0].incidence_sum(&sets, None)))
        },
        |g| {
            let sets = random(g)?;
            let heads = g.size(1, 3);
            let x = [sets.sources(), heads * g.extent(1, 4)];
            let inputs = vec![g.array(&x), g.array(&[sets.len(), heads])];
            Ok(Case::new(inputs, move |t| t[0].incidence_sum(&sets, Some(&t[1]))))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&INCIDENCE_SUM];

/// Sets of any size, with some repeated members, in either direction.
fn random(g: &mut Gen) -> Result<Incidence> {
    let targets = Segments::lengths(&g.lengths(0, 5));
    let sources = if targets.rows() > 0 { g.extent(1, 6) } else { g.extent(0, 6) };
    let members = (0..targets.rows()).map(|_| g.size(0, sources.max(1) - 1) as u32).collect();
    let sets = Incidence::new(&targets, members, sources)?;
    Ok(if g.chance(0.5) { sets.flipped() } else { sets })
}

/// `out[t]` = Σ over t's incidences i of `w[at(i)]`·`x[member(i)]`, in the order of `side`. Weights have a column for each of `heads` equal
/// parts of a row, and `at(i)` is i itself, or its position in the other order if `places`.
fn gather<T: Float>(x: &[T], w: Option<&[T]>, side: &Side, places: bool, (d, heads): (usize, usize), out: &mut [T]) {
    let (members, width) = (side.members(), d / heads.max(1));
    let places = places.then(|| side.places());
    par_units(out, d, side.segments.grain(d), |targets, out| {
        simd(
            #[inline(always)]
            || {
                for (t, out) in targets.zip(out.chunks_exact_mut(d)) {
                    out.fill(T::ZERO);
                    for i in side.segments.range(t) {
                        let row = &x[members[i] as usize * d..][..d];
                        let Some(w) = w else {
                            out.iter_mut().zip(row).for_each(|(o, &x)| *o += x);
                            continue;
                        };
                        let at = places.map_or(i, |p| p[i] as usize) * heads;
                        for (h, &w) in w[at..at + heads].iter().enumerate() {
                            let part = h * width..(h + 1) * width;
                            out[part.clone()].iter_mut().zip(&row[part]).for_each(|(o, &x)| *o += w * x);
                        }
                    }
                }
            },
        );
    });
}

/// The weighted sums of one direction. `w [I, heads]` is in the order of this direction, or of the other one if `places`.
fn sums(x: &Array, w: Option<&Array>, sets: &Incidence, places: bool, heads: usize) -> Result<Array> {
    let shape = [sets.targets(), x.shape()[1]];
    dispatch(
        [x.contiguous()],
        Half::Native,
        |[x]| {
            let mut y = Array::uninit(&shape, x.dtype());
            with_float!("incidence_sum", x.dtype(), |T| {
                let w = w.map(|w| w.as_slice::<T>()).transpose()?;
                gather::<T>(x.as_slice()?, w, sets.side(), places, (shape[1], heads), y.fresh_mut());
                Ok(y)
            })
        },
        |gpu, [x]| cuda::sums(gpu, &x, w, sets.side(), places, heads, &shape),
    )
}

/// ⟨`g[target(i)]`, `x[member(i)]`⟩ for each incidence and head: `[I, heads]`.
fn dots(g: &Array, x: &Array, sets: &Incidence, heads: usize) -> Result<Array> {
    let (d, shape) = (x.shape()[1], [sets.len(), heads]);
    let Exact(dw) = dispatch(
        [g.clone(), x.clone()],
        Half::Native,
        |[g, x]| {
            let mut dw = Array::uninit(&shape, g.dtype());
            with_float!("incidence_sum", g.dtype(), |T| {
                let (g, x) = (g.as_slice::<T>()?, x.as_slice::<T>()?);
                let (targets, members, width) = (sets.segments().ids(), sets.members(), d / heads.max(1));
                par_units(dw.fresh_mut::<T>(), heads, (GRAIN / d.max(1)).max(1), |incidences, dw| {
                    simd(
                        #[inline(always)]
                        || {
                            for (i, dw) in incidences.zip(dw.chunks_exact_mut(heads)) {
                                let (a, b) = (targets[i] as usize * d, members[i] as usize * d);
                                for (h, dw) in dw.iter_mut().enumerate() {
                                    *dw = dot(&g[a + h * width..][..width], &x[b + h * width..][..width]);
                                }
                            }
                        },
                    );
                });
                Ok(Exact(dw))
            })
        },
        |gpu, [g, x]| cuda::dots(gpu, &g, &x, sets.side(), heads).map(Exact),
    )?;
    Ok(dw)
}

/// Dot product with eight partial sums, so that it is vectorised.
#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::ZERO; 8];
    let (x, y) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: T = x.remainder().iter().zip(y.remainder()).map(|(&a, &b)| a * b).sum();
    for (a, b) in x.zip(y) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (&a, &b))| *s += a * b);
    }
    sums.into_iter().sum::<T>() + rest
}

struct Back {
    /// The sources' rows, saved if the weights need a gradient.
    x: Option<Array>,
    w: Option<Array>,
    sets: Incidence,
    d: usize,
    heads: usize,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &INCIDENCE_SUM
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let (targets, n) = (self.sets.targets(), self.sets.len());
        let rows = match self.sets.segments().known_ids() {
            // The owner of each incidence, and from there the owners of the sources.
            Some(ids) => {
                let incidences = y.sent(targets, ids, 1);
                let there = Whose { owner: &incidences, count: y.count, shape: &[n], history: y.history };
                (there.taken(self.sets.members(), self.sets.sources(), self.d), y.sent(targets, ids, self.heads))
            }
            None => (Owner::Unknown, Owner::Unknown),
        };
        // Columns stay separate; each weight is multiplied with those of its head.
        let x = match y.picking(0, &[self.sets.sources(), self.d]) {
            Owner::Unknown => rows.0,
            o => o,
        };
        SmallVec::from_iter([x, rows.1].into_iter().take(1 + self.w.is_some() as usize))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let g = grad.contiguous();
        if back.needs(0) {
            back.input(0, sums(&g, self.w.as_ref(), &self.sets.flipped(), true, self.heads)?);
        }
        if let Some(x) = self.x.as_ref().filter(|_| back.needs(1)) {
            back.input(1, dots(&g, x, &self.sets, self.heads)?);
        }
        Ok(())
    }
}

impl Tensor {
    /// Each target's sum over its members' rows: `[sources, d]` to `[targets, d]`. An empty set gives zeros; a member that is in a set
    /// twice counts twice.
    ///
    /// `weights [I, heads]` has a row for each incidence in the order of [`Incidence::members`] and a column for each of `heads` equal
    /// parts of a row, like the heads of attention. It is differentiable, and is used in the precision in which the rows are computed.
    /// Without weights every member counts once.
    pub fn incidence_sum(&self, sets: &Incidence, weights: Option<&Tensor>) -> Result<Tensor> {
        let _op = spans::op("incidence_sum");
        let op = "incidence_sum";
        self.dtype().expect_float(op)?;
        let &[rows, d] = self.shape() else {
            return Err(Error::shape(op, format!("rows {:?} must be [{}, d]", self.shape(), sets.sources())));
        };
        if rows != sets.sources() {
            let message =
                format!("{rows} rows for sets over {} sources; flipped() is the other direction", sets.sources());
            return Err(Error::shape(op, message));
        }
        let heads = match weights.map(|w| w.shape()) {
            None => 1,
            Some(&[n, heads]) if n == sets.len() && heads > 0 && d.is_multiple_of(heads) => heads,
            Some(other) => {
                let n = sets.len();
                return Err(Error::shape(op, format!("weights {other:?} must be [{n}, heads], heads dividing {d}")));
            }
        };
        spans::cost((2 * sets.len() * d) as f64, ((sets.len() + sets.targets()) * d * self.dtype().size()) as f64);
        let x = self.array().contiguous();
        let weights = weights.map(|w| w.cast(self.dtype().compute())).transpose()?;
        let w = match (&weights, x.gpu()) {
            (Some(w), Some(gpu)) => Some(crate::array::cuda::on(gpu, &w.array().contiguous())?),
            (w, _) => w.as_ref().map(|w| w.array().contiguous()),
        };
        let y = sums(&x, w.as_ref(), sets, false, heads)?;
        let kept = weights.as_ref().is_some_and(|w| w.requires_grad()).then_some(x);
        let back = || Back { x: kept, w, sets: sets.clone(), d, heads };
        Ok(match &weights {
            None => Tensor::record(y, &[self], &[], back),
            Some(weights) => Tensor::record(y, &[self, weights], &[], back),
        })
    }
}
