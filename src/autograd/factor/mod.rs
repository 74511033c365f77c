//! The factored gradient of a parameter, as a backward rule returns it: the operands of the gradient, not the gradient itself.
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
//! n runs over rows; [`Samples`] says to which sample each row belongs.
//!
//! Each kind has a file in this folder with a view of its operands that implements `Kind`. A new kind needs a variant of [`Factor`], a line
//! of `with_kind!` and such a file.

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

/// The operands of a parameter's gradient from one use of the parameter. Arrays are contiguous, f32 or f64; on the CPU those of an outer
/// product and of a row sum may also be bf16, with sums in f32.
#[derive(Clone, Debug)]
pub enum Factor {
    /// Σₙ leftₙ ⊗ rightₙ for a parameter of r·c elements, row-major: `left [N, r]`, `right [N, c]`.
    Outer {
        /// `[N, r]`.
        left: Array,
        /// `[N, c]`.
        right: Array,
        /// The sample of each row.
        samples: Samples,
    },
    /// Σₙ gradₙ: `grad [N, p]`.
    RowSum {
        /// `[N, p]`.
        grad: Array,
        /// The sample of each row.
        samples: Samples,
    },
    /// Σₙ gradₙ ⊙ scaleₙ: both `[N, p]`.
    ScaledRowSum {
        /// `[N, p]`.
        grad: Array,
        /// `[N, p]`.
        scale: Array,
        /// The sample of each row.
        samples: Samples,
    },
    /// Row `ids[n]` of a `[V, p]` parameter receives `grad[n]`.
    Lookup {
        /// `[N]`, u32.
        ids: Array,
        /// `[N, p]`.
        grad: Array,
        /// The sample of each row.
        samples: Samples,
    },
    /// Block `group[n]` of a parameter of groups·r·c elements receives leftₙ ⊗ rightₙ. This is fastest if the rows of each group are
    /// consecutive.
    GroupedOuter {
        /// `[N, r]`.
        left: Array,
        /// `[N, c]`.
        right: Array,
        /// Group of each row.
        group: Groups,
        /// The sample of each row.
        samples: Samples,
    },
    /// Gradients that are separate already: `grads [B, shape…]`.
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

/// Runs the body with `$k` bound to the view of a factor's operands, which implements [`Kind`]. This is the only place that lists every
/// kind.
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

/// The operations of a kind of factor, through a view of its operands that is valid for `'a`.
///
/// The methods of the first half are required. Those of the second half have default implementations that are correct for any kind; a kind
/// overrides them if it has a faster method. Methods about a single sample are called on factors whose rows are sorted by sample.
pub(crate) trait Kind<'a>: Copy {
    /// Its name, as in the registry.
    fn name(&self) -> &'static str;
    /// The arrays that hold its values, one or two. Index arrays are not among them.
    fn values(&self) -> (&'a Array, Option<&'a Array>);
    /// The sample map of its rows; `None` for a kind without rows.
    fn owners(&self) -> Option<&'a Samples>;
    /// Whether the shapes of the operands match each other and a parameter of this shape.
    fn fits(&self, shape: &[usize]) -> bool;
    /// A factor of the same kind with the change applied to each operand.
    fn changed(&self, change: &Change) -> Result<Factor>;
    /// Adds Σᵢ wᵢ·(gradient of sample i) to `out`; without weights they are all 1.
    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()>;
    /// The same on a GPU; `weights [B]` and `out [numel]` are contiguous and of the factor's dtype. A sample of weight zero is skipped,
    /// even if it is not finite.
    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()>;

    /// Number of samples that it can separate; `None` if it cannot separate them.
    fn count(&self) -> Option<usize> {
        self.owners().map(Samples::count)
    }
    /// The rows of sample `i`; for a kind without rows, entry `i`.
    fn range(&self, i: usize) -> Range<usize> {
        self.owners().map_or(i..i + 1, |s| s.range(i))
    }
    /// FLOPs of a sum, if they are significant.
    fn flops(&self) -> f64 {
        0.0
    }
    /// Adds the gradient of sample `i` to `out`.
    fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        self.changed(&Change::Only(self.range(i)))?.add_to::<T>(None, out)
    }
    /// |gradient of sample i|² for a parameter of `numel` elements, with its error bounds.
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let sq = formed(numel, |x: &mut [T]| self.sample_add(i, x))?;
        Ok(Norm { sq, reach: sq.value.sqrt(), rows: 1 })
    }
    /// Total columns of all operands: the cost of a pair of rows in an inner product.
    fn widths(&self) -> usize {
        1
    }
    /// The number of roundings that a partial sum of a sample's gradient may go through, within a larger sum, before the rest of it has
    /// been added.
    fn chain(&self) -> usize {
        self.owners().map_or(1, Samples::rows) + 4
    }
    /// ⟨gradient of sample i, gradient of sample j by `other`⟩ if it can be computed without forming either. It is enough that one of the
    /// two kinds supports the other.
    fn inner<T: Kernels>(&self, _i: usize, _other: &Factor, _j: usize) -> Result<Option<Bounded>> {
        Ok(None)
    }
    /// Norms and clipped sum in one pass, as in [`ParamGrad::clipped_sum`](crate::ParamGrad::clipped_sum): adds to `out` and returns the
    /// totals. `None`, with `out` unchanged, if the kind has no such pass or the pass does not pay.
    fn clipped_add<T: Kernels>(
        &self,
        _base: &[f64],
        _clip: &(dyn Fn(f64) -> f64 + Sync),
        _out: &mut [T],
    ) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }
    /// Whether [`Kind::clipped_add`] is implemented and may pay.
    fn fuses(&self) -> bool {
        false
    }
    /// Whether forming every sample's gradient is one pass over the operands that costs no more than a sum.
    fn forms_as_it_sums(&self) -> bool {
        false
    }
    /// Whether [`Kind::form`] is faster than the general method and computes the norms on the way.
    fn forms_for_norms(&self) -> bool {
        false
    }
    /// Writes every sample's gradient into `out [B, numel]`, overwriting its contents, and returns |gᵢ|² of each.
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
    /// Partial sums of |gᵢ|² of every sample on a GPU; `None` if the samples' gradients have to be formed.
    fn norm_parts(&self, _gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        Ok(None)
    }
    /// Adds Σₜ |termₜ| over the rows of each sample to `reach [B]` on a GPU.
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        let (left, right) = self.values();
        cuda::add_reach(gpu, (left, right), None, self.owners(), reach)
    }
    /// The method by which the Gram kernel computes inner products with `other`, this factor first (`PAIR_…` of the kernels' layouts);
    /// `None` if it cannot. It is enough that one of the two kinds supports the other.
    fn pairing(&self, _other: &Factor) -> Option<i32> {
        None
    }
    /// The operands in the Gram kernel's form for a pairing; `second` says whether the factor is the second of the pair.
    fn side(&self, _gpu: &Arc<Gpu>, _pairing: i32, _second: bool) -> Result<Side<'a>> {
        Err(Error::invalid("gram", format!("a {} factor has no such form", self.name())))
    }
    /// Adds the gradients of the samples in `range` to `out [len, numel]` on a GPU, all at once. Returns `false`, with `out` unchanged, if
    /// they have to be added one by one. The rows may be in any order here.
    fn form_on(&self, _gpu: &Arc<Gpu>, _range: Range<usize>, _out: &mut Array) -> Result<bool> {
        Ok(false)
    }
}

/// |gradient of a sample|², and the quantities that bound the norm of the sample's contribution to a clipped sum.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Norm {
    /// The squared norm of the gradient as one order of summation gives it; its error is that of computing the norm.
    pub sq: Bounded,
    /// Sum of the norms of its terms.
    pub reach: f64,
    /// Number of its terms.
    pub rows: usize,
}

impl Norm {
    /// An upper bound on the squared norm of the gradient as any order of summation in T gives it, if partial sums go through `chain`
    /// further roundings within a larger sum.
    ///
    /// A floating-point sum of terms xₜ, in any order, has an error of at most γ·Σ|xₜ| in each element, with γ the number of roundings of a
    /// term times the unit roundoff u (Higham 2002, section 4.2), and therefore of at most γ·reach in norm.
    pub fn bound<T: Kernels>(&self, chain: usize) -> f64 {
        let gamma = 1.01 * (2 * self.rows + chain + 4) as f64 * T::UNIT;
        let computed = (self.sq.value.max(0.0) + self.sq.error).sqrt();
        // A NaN value must stay NaN: max() would drop it.
        let bound = computed + gamma * self.reach + 0.0 * self.sq.value;
        norms::upwards(T::UNIT) * bound * bound
    }
}

/// |x|² of the gradient, which `add` adds to zeros.
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
    /// Number of samples that it can separate; `None` if it cannot separate them.
    pub fn samples(&self) -> Option<usize> {
        with_kind!(self, |k| k.count())
    }
    /// Fails if the factor cannot separate samples.
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
    /// The dtype of the gradient: that of its values, or f32 if they are bf16.
    pub(crate) fn dtype(&self) -> DType {
        with_kind!(self, |k| k.values().0.dtype()).compute()
    }
    /// FLOPs of a sum, if they are significant.
    pub(crate) fn flops(&self) -> f64 {
        with_kind!(self, |k| k.flops())
    }

    /// Checks the shapes of the operands against each other and the parameter, and makes the operands contiguous.
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
    /// The same factor with the change applied to each operand.
    fn changed(&self, change: &Change) -> Result<Factor> {
        with_kind!(self, |k| k.changed(change))
    }
    /// The same operands on a device; on a GPU they get the dtype of the gradient.
    pub(crate) fn to(self, device: &Device) -> Result<Factor> {
        self.changed(&Change::To(device))
    }
    /// The same factor with rows sorted by sample, in order within each sample.
    pub(crate) fn sorted(&self) -> Result<Factor> {
        match with_kind!(self, |k| k.owners()).and_then(Samples::order) {
            Some(order) => self.changed(&Change::Order(order)),
            None => Ok(self.clone()),
        }
    }
    /// The rows of sample `i` alone, as views. The factor must be sorted.
    fn only(&self, i: usize) -> Result<Factor> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.changed(&Change::Only(k.range(i))))
    }

    /// Adds Σᵢ wᵢ·(gradient of sample i) to `out`; without weights they are all 1.
    pub(crate) fn add_to<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        with_kind!(self, |k| k.add(weights, out))
    }
    /// Adds sample `i`'s gradient to `out`. The factor must be sorted.
    pub(crate) fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.sample_add(i, out))
    }
    /// ⟨gradient of sample i by this factor, gradient of sample j by `other`⟩, without forming either if the kinds allow it. Both must be
    /// sorted. `numel` is the size of the parameter.
    pub(crate) fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize, numel: usize) -> Result<Bounded> {
        if let Some(inner) = with_kind!(self, |k| k.inner::<T>(i, other, j))? {
            return Ok(inner);
        }
        if let Some(inner) = with_kind!(other, |k| k.inner::<T>(j, self, i))? {
            return Ok(inner);
        }
        // Vectors, or kinds without a faster method: form both gradients.
        let (mut x, mut y) = (vec![T::ZERO; numel], vec![T::ZERO; numel]);
        self.sample_add(i, &mut x)?;
        other.sample_add(j, &mut y)?;
        Ok(Bounded { value: x.iter().zip(&y).map(|(&x, &y)| x.to_f64() * y.to_f64()).sum(), error: 0.0 })
    }
    /// |gradient of sample i by this factor|² with its error bounds. The factor must be sorted.
    pub(crate) fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        self.expect_samples("sample_sq_norms")?;
        with_kind!(self, |k| k.norm::<T>(i, numel))
    }
    /// Total columns of all operands.
    pub(crate) fn widths(&self) -> usize {
        with_kind!(self, |k| k.widths())
    }
    /// See [`Kind::chain`].
    pub(crate) fn chain(&self) -> usize {
        with_kind!(self, |k| k.chain())
    }
    /// Number of rows of sample `i`. The factor must be sorted.
    pub(crate) fn rows_of(&self, i: usize) -> usize {
        with_kind!(self, |k| k.range(i)).len()
    }
    /// Norms and clipped sum in one pass, if the kind has such a pass and it pays ([`Kind::clipped_add`]).
    pub(crate) fn clipped_add<T: Kernels>(
        &self,
        base: &[f64],
        clip: &(dyn Fn(f64) -> f64 + Sync),
        out: &mut [T],
    ) -> Result<Option<Vec<f64>>> {
        with_kind!(self, |k| k.clipped_add(base, clip, out))
    }
    /// Whether norms and clipped sum can be computed in one pass.
    pub(crate) fn fuses(&self) -> bool {
        with_kind!(self, |k| k.fuses())
    }
    /// Whether forming every sample's gradient is one pass over the operands that costs no more than a sum.
    pub(crate) fn forms_as_it_sums(&self) -> bool {
        with_kind!(self, |k| k.forms_as_it_sums())
    }
    /// Whether [`Factor::form`] is faster than the general method and computes the norms on the way.
    pub(crate) fn forms_for_norms(&self) -> bool {
        with_kind!(self, |k| k.forms_for_norms())
    }
    /// Writes every sample's gradient into `out [B, numel]`, overwriting its contents, and returns |gᵢ|² of each. The factor must be
    /// sorted.
    pub(crate) fn form<T: Kernels>(&self, out: &mut [T]) -> Result<Vec<f64>> {
        self.expect_samples("per_sample")?;
        with_kind!(self, |k| k.form(out))
    }

    /// The weighted sum on a GPU ([`Kind::add_on`]).
    pub(crate) fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        with_kind!(self, |k| k.add_on(gpu, weights, out))
    }
    /// Partial sums of the squared norms on a GPU; `None` if gradients have to be formed for them.
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        self.expect_samples("sample_sq_norms")?;
        with_kind!(self, |k| k.norm_parts(gpu))
    }
    /// See [`Kind::add_reach_on`].
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        with_kind!(self, |k| k.add_reach_on(gpu, reach))
    }
    /// The number of roundings that a partial sum of a sample's gradient may go through on a GPU before the rest has been added, plus those
    /// of the sample's own sum over its rows, in any order.
    fn chain_on_gpu(&self, gpu: &Arc<Gpu>) -> Result<usize> {
        let Some(samples) = with_kind!(self, |k| k.owners()) else { return Ok(2) };
        let (owners, rows) = (samples.on_gpu(gpu)?, samples.rows());
        let across = match self {
            // The rows of a sample are consecutive, except where the contraction is split.
            Factor::Outer { .. } if owners.order.is_none() => rows.min(512) + rows / 512,
            _ => rows,
        };
        Ok(2 * owners.longest + across)
    }
    /// The method by which the Gram kernel computes inner products of this factor and `other`, in this order.
    fn pairing(&self, other: &Factor) -> Option<i32> {
        with_kind!(self, |k| k.pairing(other))
    }
    /// The operands in the Gram kernel's form for a pairing; `second` says whether the factor is the second of the pair.
    fn side(&self, gpu: &Arc<Gpu>, pairing: i32, second: bool) -> Result<Side<'_>> {
        with_kind!(self, |k| k.side(gpu, pairing, second))
    }
    /// Adds the gradients of the samples in `range` to `out [len, numel]` on a GPU, if that can be done all at once; returns whether it
    /// was.
    fn form_on(&self, gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        with_kind!(self, |k| k.form_on(gpu, range, out))
    }
}
