//! What a backward rule hands over for a parameter: the operands of its gradient, not the gradient.
//!
//! | kind | gradient of the parameter | from |
//! |---|---|---|
//! | outer | Σₙ leftₙ ⊗ rightₙ | linear, convolution after unfolding |
//! | row sum | Σₙ gradₙ | bias |
//! | scaled row sum | Σₙ gradₙ ⊙ scaleₙ | norm gains |
//! | lookup | row idₙ receives gradₙ | embedding, per-group bias |
//! | grouped outer | in group eₙ: leftₙ ⊗ rightₙ | experts, grouped convolution |
//! | per sample | Σᵢ gradsᵢ | a parameter broadcast over the sample axis |
//! | dense | grad | anything else: no per-sample meaning |
//!
//! n runs over rows; [`Samples`] says whose they are.
//!
//! Each kind has a file here, in which a view of its operands answers what `Kind` asks. A new kind is a variant of
//! [`Factor`], a line of `with_kind!` and such a file.

mod change;
pub(crate) mod cpu;
pub(crate) mod cuda;
mod dense;
mod grouped_outer;
mod lookup;
mod outer;
mod per_sample;
mod row_sum;
mod scaled_row_sum;

use crate::array::Array;
use crate::autograd::{Groups, Samples};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::Gpu;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{self, Bounded};
use change::Change;
use cuda::{Parts, Side};
use std::ops::Range;
use std::sync::Arc;

/// The operands of one use's gradient of one parameter. Arrays are contiguous, f32 or f64; those of an outer product and of a
/// row sum on the CPU may be bf16, whose sums are f32.
#[derive(Clone, Debug)]
pub enum Factor {
    /// Σₙ leftₙ ⊗ rightₙ for a parameter of r·c elements, row-major: `left [N, r]`, `right [N, c]`.
    Outer {
        /// `[N, r]`.
        left: Array,
        /// `[N, c]`.
        right: Array,
        /// Whose rows.
        samples: Samples,
    },
    /// Σₙ gradₙ: `grad [N, p]`.
    RowSum {
        /// `[N, p]`.
        grad: Array,
        /// Whose rows.
        samples: Samples,
    },
    /// Σₙ gradₙ ⊙ scaleₙ: both `[N, p]`.
    ScaledRowSum {
        /// `[N, p]`.
        grad: Array,
        /// `[N, p]`.
        scale: Array,
        /// Whose rows.
        samples: Samples,
    },
    /// Row `ids[n]` of a `[V, p]` parameter receives `grad[n]`.
    Lookup {
        /// `[N]`, u32.
        ids: Array,
        /// `[N, p]`.
        grad: Array,
        /// Whose rows.
        samples: Samples,
    },
    /// Block `group[n]` of a parameter of groups·r·c elements receives leftₙ ⊗ rightₙ. Rows of one group are best kept
    /// together.
    GroupedOuter {
        /// `[N, r]`.
        left: Array,
        /// `[N, c]`.
        right: Array,
        /// Group of each row.
        group: Groups,
        /// Whose rows.
        samples: Samples,
    },
    /// Already apart: `grads [B, shape…]`.
    PerSample {
        /// `[B, shape…]`.
        grads: Array,
    },
    /// The summed gradient, with no per-sample meaning.
    Dense {
        /// In the parameter's shape.
        grad: Array,
    },
}

/// Runs the body with `$k` bound to the view of a factor's operands, which is a [`Kind`]. This is the only place that
/// names every kind.
macro_rules! with_kind {
    ($factor:expr, |$k:ident| $body:expr) => {
        match $factor {
            Factor::Outer { left, right, samples } => {
                let $k = outer::Outer { left, right, samples };
                $body
            }
            Factor::RowSum { grad, samples } => {
                let $k = row_sum::RowSum { grad, samples };
                $body
            }
            Factor::ScaledRowSum { grad, scale, samples } => {
                let $k = scaled_row_sum::ScaledRowSum { grad, scale, samples };
                $body
            }
            Factor::Lookup { ids, grad, samples } => {
                let $k = lookup::Lookup { ids, grad, samples };
                $body
            }
            Factor::GroupedOuter { left, right, group, samples } => {
                let $k = grouped_outer::GroupedOuter { left, right, group, samples };
                $body
            }
            Factor::PerSample { grads } => {
                let $k = per_sample::PerSample { grads };
                $body
            }
            Factor::Dense { grad } => {
                let $k = dense::Dense { grad };
                $body
            }
        }
    };
}

/// The questions that a kind of factor answers, through a view of its operands that is valid for `'a`.
///
/// The first half has to be answered. The second half has answers that are right for any kind; a kind gives its own where
/// it has a shorter way. Whatever is asked about a single sample is asked of a factor whose rows are sorted by sample.
pub(crate) trait Kind<'a>: Copy {
    /// Its name, as in the registry.
    fn name(&self) -> &'static str;
    /// The arrays that hold its values: one, and a second where there is one. Indices are not among them.
    fn values(&self) -> (&'a Array, Option<&'a Array>);
    /// Whose rows its operands have; `None` for a kind without rows.
    fn owners(&self) -> Option<&'a Samples>;
    /// Whether the operands fit each other and a parameter of this shape.
    fn fits(&self, shape: &[usize]) -> bool;
    /// A factor of the same kind after the same change to each operand.
    fn changed(&self, change: &Change) -> Result<Factor>;
    /// Adds Σᵢ wᵢ·(gradient of sample i) to `out`; all weights are 1 if none are given.
    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()>;
    /// The same on a GPU; `weights [B]` and `out [numel]` are contiguous and of the factor's dtype. A sample of weight
    /// zero is left out whatever it holds.
    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()>;

    /// Number of samples that it tells apart; `None` if it cannot.
    fn count(&self) -> Option<usize> {
        self.owners().map(Samples::count)
    }
    /// The rows of sample `i`; a kind without rows has one entry for each sample.
    fn range(&self, i: usize) -> Range<usize> {
        self.owners().map_or(i..i + 1, |s| s.range(i))
    }
    /// FLOPs of a sum, where they are worth counting.
    fn flops(&self) -> f64 {
        0.0
    }
    /// Adds the gradient of sample `i` to `out`.
    fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        self.changed(&Change::Only(self.range(i)))?.add_to::<T>(None, out)
    }
    /// |gradient of sample i|², for a parameter of `numel` elements, and what bounds it.
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let sq = formed(numel, |x: &mut [T]| self.sample_add(i, x))?;
        Ok(Norm { sq, reach: sq.value.sqrt(), rows: 1 })
    }
    /// Columns of all operands: what a pair of rows costs in an inner product.
    fn widths(&self) -> usize {
        1
    }
    /// Roundings that a part of a sample's gradient may go through, as part of a larger sum, before the rest of it has been added.
    fn chain(&self) -> usize {
        self.owners().map_or(1, Samples::rows) + 4
    }
    /// ⟨gradient of sample i, gradient of sample j by `other`⟩ where it can be taken without forming either. It is enough
    /// that one of two kinds knows the other.
    fn inner<T: Kernels>(&self, _i: usize, _other: &Factor, _j: usize) -> Result<Option<Bounded>> {
        Ok(None)
    }
    /// Norms and clipped sum in one pass, as in [`ParamGrad::clipped_sum`](crate::ParamGrad::clipped_sum): adds to `out`
    /// and returns the totals. `None`, with `out` untouched, where the kind has no such pass or the pass does not pay.
    fn clipped_add<T: Kernels>(
        &self,
        _base: &[f64],
        _clip: &(dyn Fn(f64) -> f64 + Sync),
        _out: &mut [T],
    ) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }
    /// Whether there is a [`Kind::clipped_add`] that may pay.
    fn fuses(&self) -> bool {
        false
    }
    /// Whether forming every sample's gradient is one pass over the operands that costs no more than a sum.
    fn forms_as_it_sums(&self) -> bool {
        false
    }
    /// Whether [`Kind::form`] has a shorter way than the general one, which norms have to go anyway.
    fn forms_for_norms(&self) -> bool {
        false
    }
    /// Writes every sample's gradient into `out [B, numel]`, whatever that held, and returns |gᵢ|² of each.
    fn form<T: Kernels>(&self, out: &mut [T]) -> Result<Vec<f64>> {
        let count = self.count().unwrap_or(0);
        let numel = out.len().checked_div(count).unwrap_or(0);
        let one = |i: usize, x: &mut [T]| {
            x.fill(T::ZERO);
            self.sample_add(i, x)?;
            Ok(x.iter().map(|x| x.to_f64() * x.to_f64()).sum())
        };
        (0..count).map(|i| one(i, &mut out[i * numel..(i + 1) * numel])).collect()
    }
    /// The parts of |gᵢ|² of every sample on a GPU; `None` where the samples' gradients have to be formed.
    fn norm_parts(&self, _gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        Ok(None)
    }
    /// Adds Σₜ |termₜ| over the rows of each sample to `reach [B]` on a GPU.
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        let (left, right) = self.values();
        cuda::add_reach(gpu, (left, right), None, self.owners(), reach)
    }
    /// How the Gram kernel takes inner products with `other`, this factor first (`PAIR_…` of the kernels' layouts); `None`
    /// where it cannot. It is enough that one of two kinds knows the other.
    fn pairing(&self, _other: &Factor) -> Option<i32> {
        None
    }
    /// The operands as the Gram kernel takes them for a pairing; `second` is the factor's place.
    fn side(&self, _gpu: &Arc<Gpu>, _pairing: i32, _second: bool) -> Result<Side<'a>> {
        Err(Error::invalid("gram", format!("a {} factor has no such form", self.name())))
    }
    /// Adds the gradients of the samples in `range` to `out [len, numel]` on a GPU, all at once. `false`, with `out`
    /// untouched, where they have to be added one by one. The rows may be in any order here.
    fn form_on(&self, _gpu: &Arc<Gpu>, _range: Range<usize>, _out: &mut Array) -> Result<bool> {
        Ok(false)
    }
}

/// |gradient of a sample|², and what bounds the norm of what the sample adds to a clipped sum.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Norm {
    /// Of the gradient as some sum of its terms gives it, but for the error of taking the norm.
    pub sq: Bounded,
    /// Sum of the norms of its terms.
    pub reach: f64,
    /// Number of its terms.
    pub rows: usize,
}

impl Norm {
    /// An upper bound on the squared norm of the gradient as any sum in T gives it, where parts of it go through `chain` further
    /// roundings within a larger sum.
    ///
    /// A sum of terms xₜ in floating point, in any order, is off by at most γ·Σ|xₜ| element by element, with γ the number of
    /// roundings of a term times the unit roundoff u (Higham 2002, section 4.2), so by γ·reach in norm.
    pub fn bound<T: Kernels>(&self, chain: usize) -> f64 {
        let gamma = 1.01 * (2 * self.rows + chain + 4) as f64 * T::UNIT;
        let computed = (self.sq.value.max(0.0) + self.sq.error).sqrt();
        // A NaN of the value stays one: max() would drop it.
        let bound = computed + gamma * self.reach + 0.0 * self.sq.value;
        norms::upwards(T::UNIT) * bound * bound
    }
}

/// |x|² of the gradient that `add` adds to zeros.
fn formed<T: Kernels>(numel: usize, add: impl FnOnce(&mut [T]) -> Result<()>) -> Result<Bounded> {
    let mut x = vec![T::ZERO; numel];
    add(&mut x)?;
    Ok(Bounded { value: norms::sum_sq(&x), error: 0.0 })
}

/// Number of columns.
fn width(a: &Array) -> usize {
    a.shape().last().copied().unwrap_or(1)
}

/// Whether an array is a matrix with a row for each row of `samples`.
fn is_rows(a: &Array, samples: &Samples) -> bool {
    a.rank() == 2 && a.shape()[0] == samples.rows()
}

impl Factor {
    /// Name of the kind, as in the registry.
    pub fn kind(&self) -> &'static str {
        with_kind!(self, |k| k.name())
    }
    /// Number of samples it tells apart; `None` if it cannot.
    pub fn samples(&self) -> Option<usize> {
        with_kind!(self, |k| k.count())
    }
    /// Fails if it cannot tell samples apart.
    fn expect_samples(&self, query: &'static str) -> Result<()> {
        match self.samples() {
            Some(_) => Ok(()),
            None => Err(Error::autograd(query, format!("a {} gradient has no per-sample meaning", self.kind()))),
        }
    }
    /// Bytes held by the operands.
    pub fn bytes(&self) -> usize {
        let (first, second) = with_kind!(self, |k| k.values());
        let bytes = |a: &Array| a.numel() * a.dtype().size();
        bytes(first) + second.map_or(0, bytes)
    }
    /// The dtype of the gradient: that of its values, or f32 where they are bf16.
    pub(crate) fn dtype(&self) -> DType {
        with_kind!(self, |k| k.values().0.dtype()).compute()
    }
    /// FLOPs of a sum, where they are worth counting.
    pub(crate) fn flops(&self) -> f64 {
        with_kind!(self, |k| k.flops())
    }

    /// Checks the operands against each other and the parameter, and makes them contiguous.
    pub(crate) fn checked(self, name: &str, shape: &[usize], dtype: DType) -> Result<Factor> {
        if !with_kind!(&self, |k| k.fits(shape)) {
            let message = format!("a {} factor whose operands do not fit it: {self:?}", self.kind());
            return Err(Error::shape("factor", format!("{name} {shape:?}: {message}")));
        }
        if self.dtype() != dtype {
            return Err(Error::dtype(
                "factor",
                format!(
                    "{name}: gradients of this parameter are {dtype}, the {} factor is {}",
                    self.kind(),
                    self.dtype()
                ),
            ));
        }
        self.changed(&Change::Contiguous)
    }
    /// The same factor after the same change to each operand.
    fn changed(&self, change: &Change) -> Result<Factor> {
        with_kind!(self, |k| k.changed(change))
    }
    /// The same operands on a device; on a GPU in the dtype of the gradient.
    pub(crate) fn to(self, device: &Device) -> Result<Factor> {
        self.changed(&Change::To(device))
    }
    /// The same factor with each sample's rows together, in order.
    pub(crate) fn sorted(&self) -> Result<Factor> {
        match with_kind!(self, |k| k.owners()).and_then(Samples::order) {
            Some(order) => self.changed(&Change::Order(order)),
            None => Ok(self.clone()),
        }
    }
    /// Sample `i`'s rows alone, as views. The factor must be sorted.
    fn only(&self, i: usize) -> Result<Factor> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.changed(&Change::Only(k.range(i))))
    }

    /// Adds Σᵢ wᵢ·(gradient of sample i) to `out`; all weights 1 if none are given.
    pub(crate) fn add_to<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        with_kind!(self, |k| k.add(weights, out))
    }
    /// Adds sample `i`'s gradient to `out`. The factor must be sorted.
    pub(crate) fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.sample_add(i, out))
    }
    /// ⟨gradient of sample i by this factor, gradient of sample j by `other`⟩, without forming either where the kinds
    /// allow it. Both must be sorted. `numel` is the size of the parameter.
    pub(crate) fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize, numel: usize) -> Result<Bounded> {
        if let Some(inner) = with_kind!(self, |k| k.inner::<T>(i, other, j))? {
            return Ok(inner);
        }
        if let Some(inner) = with_kind!(other, |k| k.inner::<T>(j, self, i))? {
            return Ok(inner);
        }
        // Vectors, or kinds without a shortcut: form both.
        let (mut x, mut y) = (vec![T::ZERO; numel], vec![T::ZERO; numel]);
        self.sample_add(i, &mut x)?;
        other.sample_add(j, &mut y)?;
        Ok(Bounded { value: x.iter().zip(&y).map(|(&x, &y)| x.to_f64() * y.to_f64()).sum(), error: 0.0 })
    }
    /// |gradient of sample i by this factor|² and what bounds it. The factor must be sorted.
    pub(crate) fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        self.expect_samples("sample_sq_norms")?;
        with_kind!(self, |k| k.norm::<T>(i, numel))
    }
    /// Columns of all operands.
    pub(crate) fn widths(&self) -> usize {
        with_kind!(self, |k| k.widths())
    }
    /// [`Kind::chain`].
    pub(crate) fn chain(&self) -> usize {
        with_kind!(self, |k| k.chain())
    }
    /// Number of rows of sample `i`. The factor must be sorted.
    pub(crate) fn rows_of(&self, i: usize) -> usize {
        with_kind!(self, |k| k.range(i)).len()
    }
    /// Norms and clipped sum in one pass, where the kind has such a pass and it pays ([`Kind::clipped_add`]).
    pub(crate) fn clipped_add<T: Kernels>(
        &self,
        base: &[f64],
        clip: &(dyn Fn(f64) -> f64 + Sync),
        out: &mut [T],
    ) -> Result<Option<Vec<f64>>> {
        with_kind!(self, |k| k.clipped_add(base, clip, out))
    }
    /// Whether norms and clipped sum can be one pass.
    pub(crate) fn fuses(&self) -> bool {
        with_kind!(self, |k| k.fuses())
    }
    /// Whether forming every sample's gradient is one pass over the operands that costs no more than a sum.
    pub(crate) fn forms_as_it_sums(&self) -> bool {
        with_kind!(self, |k| k.forms_as_it_sums())
    }
    /// Whether [`Factor::form`] has a shorter way than the general one, which norms have to go anyway.
    pub(crate) fn forms_for_norms(&self) -> bool {
        with_kind!(self, |k| k.forms_for_norms())
    }
    /// Writes every sample's gradient into `out [B, numel]`, whatever that held, and returns |gᵢ|² of each. The factor must
    /// be sorted.
    pub(crate) fn form<T: Kernels>(&self, out: &mut [T]) -> Result<Vec<f64>> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.form(out))
    }

    /// The weighted sum on a GPU ([`Kind::add_on`]).
    pub(crate) fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        with_kind!(self, |k| k.add_on(gpu, weights, out))
    }
    /// The parts of the squared norms on a GPU, where nothing has to be formed for them.
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        self.expect_samples("sample_sq_norms")?;
        with_kind!(self, |k| k.norm_parts(gpu))
    }
    /// [`Kind::add_reach_on`].
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        with_kind!(self, |k| k.add_reach_on(gpu, reach))
    }
    /// Roundings that a part of a sample's gradient may go through in a sum on a GPU before the rest has been added, and those of
    /// the sample's own sum: the rows of a product, in whatever order.
    fn chain_on_gpu(&self, gpu: &Arc<Gpu>) -> Result<usize> {
        let Some(samples) = with_kind!(self, |k| k.owners()) else { return Ok(2) };
        let (owners, rows) = (samples.on_gpu(gpu)?, samples.rows());
        let across = match self {
            // The rows of a sample follow each other, but for where the contraction is cut.
            Factor::Outer { .. } if owners.order.is_none() => rows.min(512) + rows / 512,
            _ => rows,
        };
        Ok(2 * owners.longest + across)
    }
    /// How the Gram kernel takes inner products of this factor and `other`, in this order.
    fn pairing(&self, other: &Factor) -> Option<i32> {
        with_kind!(self, |k| k.pairing(other))
    }
    /// The operands as the Gram kernel takes them for a pairing; `second` is the factor's place.
    fn side(&self, gpu: &Arc<Gpu>, pairing: i32, second: bool) -> Result<Side<'_>> {
        with_kind!(self, |k| k.side(gpu, pairing, second))
    }
    /// Adds the gradients of the samples in `range` to `out [len, numel]` on a GPU, if that can be done all at once.
    fn form_on(&self, gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        with_kind!(self, |k| k.form_on(gpu, range, out))
    }
}
