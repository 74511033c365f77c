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

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Groups, Samples};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::rows;
use crate::with_float;

/// The operands of one use's gradient of one parameter. Arrays are contiguous, f32 or f64.
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

impl Factor {
    /// Name of the kind, as in the registry.
    pub fn kind(&self) -> &'static str {
        match self {
            Factor::Outer { .. } => "outer",
            Factor::RowSum { .. } => "row sum",
            Factor::ScaledRowSum { .. } => "scaled row sum",
            Factor::Lookup { .. } => "lookup",
            Factor::GroupedOuter { .. } => "grouped outer",
            Factor::PerSample { .. } => "per-sample",
            Factor::Dense { .. } => "dense",
        }
    }
    /// Number of samples it tells apart; `None` if it cannot.
    pub fn samples(&self) -> Option<usize> {
        match self {
            Factor::Outer { samples, .. }
            | Factor::RowSum { samples, .. }
            | Factor::ScaledRowSum { samples, .. }
            | Factor::Lookup { samples, .. }
            | Factor::GroupedOuter { samples, .. } => Some(samples.count()),
            Factor::PerSample { grads } => grads.shape().first().copied(),
            Factor::Dense { .. } => None,
        }
    }
    /// Bytes held by the operands.
    pub fn bytes(&self) -> usize {
        let b = |a: &Array| a.numel() * a.dtype().size();
        match self {
            Factor::Outer { left, right, .. } | Factor::GroupedOuter { left, right, .. } => b(left) + b(right),
            Factor::RowSum { grad, .. } | Factor::Lookup { grad, .. } | Factor::Dense { grad } => b(grad),
            Factor::ScaledRowSum { grad, scale, .. } => b(grad) + b(scale),
            Factor::PerSample { grads } => b(grads),
        }
    }
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Factor::Outer { left, .. } | Factor::GroupedOuter { left, .. } => left.dtype(),
            Factor::RowSum { grad, .. }
            | Factor::Lookup { grad, .. }
            | Factor::ScaledRowSum { grad, .. }
            | Factor::Dense { grad } => grad.dtype(),
            Factor::PerSample { grads } => grads.dtype(),
        }
    }

    /// Checks the operands against each other and the parameter, and makes them contiguous.
    pub(crate) fn checked(self, name: &str, shape: &[usize], dtype: DType) -> Result<Factor> {
        let numel: usize = shape.iter().product();
        let bad = |m: String| Err(Error::shape("factor", format!("{name} {shape:?}: {m}")));
        let width = |a: &Array| a.shape().last().copied().unwrap_or(1);
        let two = |a: &Array, s: &Samples| a.rank() == 2 && a.shape()[0] == s.rows();
        let ok = match &self {
            Factor::Outer { left, right, samples } => {
                two(left, samples) && two(right, samples) && width(left) * width(right) == numel
            }
            Factor::RowSum { grad, samples } => two(grad, samples) && width(grad) == numel,
            Factor::ScaledRowSum { grad, scale, samples } => {
                two(grad, samples) && two(scale, samples) && width(grad) == numel && width(scale) == numel
            }
            Factor::Lookup { ids, grad, samples } => {
                two(grad, samples)
                    && ids.numel() == samples.rows()
                    && ids.dtype() == DType::U32
                    && shape[0] * width(grad) == numel
            }
            Factor::GroupedOuter { left, right, group, samples } => {
                let blocks = numel.checked_div(width(left) * width(right)).unwrap_or(0);
                two(left, samples)
                    && two(right, samples)
                    && group.rows() == samples.rows()
                    && blocks * width(left) * width(right) == numel
                    && (group.count() == blocks || numel == 0)
            }
            Factor::PerSample { grads } => grads.rank() == shape.len() + 1 && &grads.shape()[1..] == shape,
            Factor::Dense { grad } => grad.shape() == shape,
        };
        if !ok {
            return bad(format!("a {} factor whose operands do not fit it: {self:?}", self.kind()));
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
        let c = |a: Array| a.contiguous();
        Ok(match self {
            Factor::Outer { left, right, samples } => Factor::Outer { left: c(left), right: c(right), samples },
            Factor::RowSum { grad, samples } => Factor::RowSum { grad: c(grad), samples },
            Factor::ScaledRowSum { grad, scale, samples } => {
                Factor::ScaledRowSum { grad: c(grad), scale: c(scale), samples }
            }
            Factor::Lookup { ids, grad, samples } => Factor::Lookup { ids: c(ids), grad: c(grad), samples },
            Factor::GroupedOuter { left, right, group, samples } => {
                Factor::GroupedOuter { left: c(left), right: c(right), group, samples }
            }
            Factor::PerSample { grads } => Factor::PerSample { grads: c(grads) },
            Factor::Dense { grad } => Factor::Dense { grad: c(grad) },
        })
    }

    /// Adds Σᵢ wᵢ·(gradient of sample i) to `out`; all weights 1 if none are given.
    pub(crate) fn add_to<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let per_row = |s: &Samples| -> Option<Vec<T>> {
            weights.map(|w| match s {
                Samples::Uniform { each, .. } => {
                    w.iter().flat_map(|&w| std::iter::repeat_n(T::from_f64(w), *each)).collect()
                }
                Samples::Ragged(_) => (0..s.rows()).map(|r| T::from_f64(w[s.owner(r)])).collect(),
            })
        };
        match self {
            Factor::Outer { left, right, samples } => {
                let w = per_row(samples);
                cpu::outer_add::<T>(left.as_slice()?, right.as_slice()?, samples.rows(), w.as_deref(), out);
            }
            Factor::RowSum { grad, samples } => {
                cpu::row_sum_add::<T>(grad.as_slice()?, None, samples.rows(), per_row(samples).as_deref(), out)
            }
            Factor::ScaledRowSum { grad, scale, samples } => cpu::row_sum_add::<T>(
                grad.as_slice()?,
                Some(scale.as_slice()?),
                samples.rows(),
                per_row(samples).as_deref(),
                out,
            ),
            Factor::Lookup { ids, grad, samples } => {
                cpu::lookup_add::<T>(ids.as_slice()?, grad.as_slice()?, per_row(samples).as_deref(), out)
            }
            Factor::GroupedOuter { left, right, group, samples } => {
                let (w, l, r) = (per_row(samples), left.as_slice::<T>()?, right.as_slice::<T>()?);
                let (rd, cd, group) = (left.shape()[1], right.shape()[1], group.ids());
                for run in cpu::runs(group, 0..group.len()) {
                    let block = group[run.start] as usize * rd * cd;
                    let w = w.as_ref().map(|w| &w[run.clone()]);
                    cpu::outer_add(
                        &l[run.start * rd..run.end * rd],
                        &r[run.start * cd..run.end * cd],
                        run.len(),
                        w,
                        &mut out[block..block + rd * cd],
                    );
                }
            }
            Factor::PerSample { grads } => {
                let b = grads.shape()[0];
                let ones;
                let w = match weights {
                    Some(w) => {
                        ones = w.iter().map(|&w| T::from_f64(w)).collect::<Vec<T>>();
                        Some(&ones[..])
                    }
                    None => None,
                };
                cpu::row_sum_add::<T>(grads.as_slice()?, None, b, w, out)
            }
            Factor::Dense { grad } => cpu::row_sum_add::<T>(grad.as_slice()?, None, 1, None, out),
        }
        Ok(())
    }

    /// Whether the rows of one sample and one group lie together, for every sample and group.
    pub(crate) fn groups_are_neighbours(&self) -> bool {
        let Factor::GroupedOuter { group, samples, .. } = self else { return true };
        // Groups that are only on a GPU are not read back for this: the general form is right for any.
        if !group.is_on_host() {
            return false;
        }
        let group = group.ids();
        let order = samples.order();
        let mut seen: Vec<u32> = Vec::new();
        (0..samples.count()).all(|i| {
            seen.clear();
            let rows = samples.range(i).map(|at| group[order.map_or(at, |o| o[at] as usize)]);
            rows.for_each(|e| {
                if seen.last() != Some(&e) {
                    seen.push(e);
                }
            });
            seen.sort_unstable();
            seen.windows(2).all(|w| w[0] != w[1])
        })
    }
    /// The same operands on a device.
    pub(crate) fn to(self, device: &Device) -> Result<Factor> {
        let t = |a: Array| a.to(device);
        Ok(match self {
            Factor::Outer { left, right, samples } => Factor::Outer { left: t(left)?, right: t(right)?, samples },
            Factor::RowSum { grad, samples } => Factor::RowSum { grad: t(grad)?, samples },
            Factor::ScaledRowSum { grad, scale, samples } => {
                Factor::ScaledRowSum { grad: t(grad)?, scale: t(scale)?, samples }
            }
            Factor::Lookup { ids, grad, samples } => Factor::Lookup { ids: t(ids)?, grad: t(grad)?, samples },
            Factor::GroupedOuter { left, right, group, samples } => {
                Factor::GroupedOuter { left: t(left)?, right: t(right)?, group, samples }
            }
            Factor::PerSample { grads } => Factor::PerSample { grads: t(grads)? },
            Factor::Dense { grad } => Factor::Dense { grad: t(grad)? },
        })
    }

    /// The same factor with each sample's rows together, in order.
    pub(crate) fn sorted(&self) -> Result<Factor> {
        let order = match self {
            Factor::Outer { samples, .. }
            | Factor::RowSum { samples, .. }
            | Factor::ScaledRowSum { samples, .. }
            | Factor::Lookup { samples, .. }
            | Factor::GroupedOuter { samples, .. } => samples.order(),
            _ => None,
        };
        let Some(order) = order else { return Ok(self.clone()) };
        let take = |a: &Array| -> Result<Array> {
            if let Some(gpu) = a.gpu() {
                let order = Array::from_slice(order, &[order.len()])?;
                return rows::cuda::take(gpu, a, &order, 1, order.numel(), a.shape()[1], a.shape());
            }
            with_float!("factor", a.dtype(), |T| {
                let w = a.shape()[1];
                let mut out = Array::uninit(a.shape(), a.dtype());
                let (src, dst) = (a.as_slice::<T>()?, out.fresh_mut::<T>());
                for (d, &r) in dst.chunks_exact_mut(w.max(1)).zip(order) {
                    d.copy_from_slice(&src[r as usize * w..(r as usize + 1) * w]);
                }
                Ok(out)
            })
        };
        let map = |s: &Samples| s.select(order);
        Ok(match self {
            Factor::Outer { left, right, samples } => {
                Factor::Outer { left: take(left)?, right: take(right)?, samples: map(samples)? }
            }
            Factor::RowSum { grad, samples } => Factor::RowSum { grad: take(grad)?, samples: map(samples)? },
            Factor::ScaledRowSum { grad, scale, samples } => {
                Factor::ScaledRowSum { grad: take(grad)?, scale: take(scale)?, samples: map(samples)? }
            }
            Factor::Lookup { ids, grad, samples } => {
                let ids = match ids.gpu() {
                    Some(_) => take(&ids.reshape(&[order.len(), 1])?)?.reshape(&[order.len()])?,
                    None => {
                        let old = ids.as_slice::<u32>()?;
                        let ids: Vec<u32> = order.iter().map(|&r| old[r as usize]).collect();
                        Array::from_slice(&ids, &[ids.len()])?
                    }
                };
                Factor::Lookup { ids, grad: take(grad)?, samples: map(samples)? }
            }
            Factor::GroupedOuter { left, right, group, samples } => Factor::GroupedOuter {
                left: take(left)?,
                right: take(right)?,
                group: group.select(order)?,
                samples: map(samples)?,
            },
            other => other.clone(),
        })
    }

    /// Adds sample `i`'s gradient to `out`. The factor must be sorted.
    pub(crate) fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        match self {
            Factor::PerSample { grads } => {
                let g = &grads.as_slice::<T>()?[i * out.len()..(i + 1) * out.len()];
                out.iter_mut().zip(g).for_each(|(o, &g)| *o += g);
                Ok(())
            }
            Factor::Dense { .. } => Err(Error::autograd("per_sample", "a dense gradient has no per-sample meaning")),
            _ => self.only(i)?.add_to::<T>(None, out),
        }
    }
    /// Sample `i`'s rows alone, as views. The factor must be sorted.
    pub(crate) fn only(&self, i: usize) -> Result<Factor> {
        let cut = |a: &Array, s: &Samples| a.slice(0, s.range(i));
        let one = |s: &Samples| Samples::uniform(1, s.range(i).len());
        Ok(match self {
            Factor::Outer { left, right, samples } => {
                Factor::Outer { left: cut(left, samples)?, right: cut(right, samples)?, samples: one(samples) }
            }
            Factor::RowSum { grad, samples } => Factor::RowSum { grad: cut(grad, samples)?, samples: one(samples) },
            Factor::ScaledRowSum { grad, scale, samples } => {
                Factor::ScaledRowSum { grad: cut(grad, samples)?, scale: cut(scale, samples)?, samples: one(samples) }
            }
            Factor::Lookup { ids, grad, samples } => Factor::Lookup {
                ids: ids.reshape(&[samples.rows()])?.slice(0, samples.range(i))?,
                grad: cut(grad, samples)?,
                samples: one(samples),
            },
            Factor::GroupedOuter { left, right, group, samples } => Factor::GroupedOuter {
                left: cut(left, samples)?,
                right: cut(right, samples)?,
                group: Groups::of_ids(group.ids()[samples.range(i)].to_vec(), group.count())?,
                samples: one(samples),
            },
            Factor::PerSample { grads } => Factor::PerSample { grads: grads.slice(0, i..i + 1)? },
            Factor::Dense { .. } => {
                return Err(Error::autograd("per_sample", "a dense gradient has no per-sample meaning"));
            }
        })
    }

    /// ⟨gradient of sample i by this factor, gradient of sample j by `other`⟩, without forming either where the kinds
    /// allow it. Both must be sorted. `numel` is the size of the parameter.
    pub(crate) fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize, numel: usize) -> Result<f64> {
        match (self, other) {
            (
                Factor::Outer { left: l1, right: r1, samples: s1 },
                Factor::Outer { left: l2, right: r2, samples: s2 },
            ) if l1.shape()[1] == l2.shape()[1] => {
                let (a, b) = (s1.range(i), s2.range(j));
                Ok(cpu::outer_inner::<T>(
                    cpu::rows(l1.as_slice()?, l1.shape()[1], &a),
                    cpu::rows(r1.as_slice()?, r1.shape()[1], &a),
                    cpu::rows(l2.as_slice()?, l2.shape()[1], &b),
                    cpu::rows(r2.as_slice()?, r2.shape()[1], &b),
                    (a.len(), b.len()),
                ))
            }
            (
                Factor::GroupedOuter { left: l1, right: r1, group: g1, samples: s1 },
                Factor::GroupedOuter { left: l2, right: r2, group: g2, samples: s2 },
            ) => {
                let (rd, cd) = (l1.shape()[1], r1.shape()[1]);
                let (l1, r1, l2, r2) = (l1.as_slice::<T>()?, r1.as_slice()?, l2.as_slice::<T>()?, r2.as_slice()?);
                let (g1, g2, mut sum) = (g1.ids(), g2.ids(), 0.0);
                for a in cpu::runs(g1, s1.range(i)) {
                    for b in cpu::runs(g2, s2.range(j)) {
                        if g1[a.start] == g2[b.start] {
                            sum += cpu::outer_inner::<T>(
                                cpu::rows(l1, rd, &a),
                                cpu::rows(r1, cd, &a),
                                cpu::rows(l2, rd, &b),
                                cpu::rows(r2, cd, &b),
                                (a.len(), b.len()),
                            );
                        }
                    }
                }
                Ok(sum)
            }
            (Factor::Lookup { ids: i1, grad: g1, samples: s1 }, Factor::Lookup { ids: i2, grad: g2, samples: s2 }) => {
                let (a, b, w) = (s1.range(i), s2.range(j), g1.shape()[1]);
                Ok(cpu::lookup_inner::<T>(
                    &i1.as_slice::<u32>()?[a.clone()],
                    cpu::rows(g1.as_slice()?, w, &a),
                    &i2.as_slice::<u32>()?[b.clone()],
                    cpu::rows(g2.as_slice()?, w, &b),
                    w,
                ))
            }
            // An embedding tied to the output head: left holds the logits' gradients, right the head's input.
            (Factor::Lookup { ids, grad, samples: s1 }, Factor::Outer { left, right, samples: s2 })
                if right.shape()[1] == grad.shape()[1] =>
            {
                let (a, b) = (s1.range(i), s2.range(j));
                Ok(cpu::lookup_outer_inner::<T>(
                    &ids.as_slice::<u32>()?[a.clone()],
                    cpu::rows(grad.as_slice()?, grad.shape()[1], &a),
                    cpu::rows(left.as_slice()?, left.shape()[1], &b),
                    cpu::rows(right.as_slice()?, right.shape()[1], &b),
                    (left.shape()[1], right.shape()[1]),
                ))
            }
            (Factor::Outer { .. }, Factor::Lookup { .. }) => other.inner::<T>(j, self, i, numel),
            // Vectors, or kinds without a shortcut: form both.
            _ => {
                let (mut x, mut y) = (vec![T::ZERO; numel], vec![T::ZERO; numel]);
                self.sample_add(i, &mut x)?;
                other.sample_add(j, &mut y)?;
                Ok(x.iter().zip(&y).map(|(&x, &y)| x.to_f64() * y.to_f64()).sum())
            }
        }
    }

    /// |gradient of sample i by this factor|². The factor must be sorted.
    pub(crate) fn sq_norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<f64> {
        match self {
            Factor::Outer { left, right, samples } => {
                let r = samples.range(i);
                Ok(cpu::outer_sq_norm::<T>(
                    cpu::rows(left.as_slice()?, left.shape()[1], &r),
                    cpu::rows(right.as_slice()?, right.shape()[1], &r),
                    r.len(),
                ))
            }
            Factor::GroupedOuter { left, right, group, samples } => {
                let (rd, cd) = (left.shape()[1], right.shape()[1]);
                let mut sum = 0.0;
                let range = samples.range(i);
                let group = group.ids();
                let mut runs: Vec<_> = cpu::runs(group, range.clone()).collect();
                runs.sort_by_key(|r| group[r.start]);
                if runs.windows(2).any(|w| group[w[0].start] == group[w[1].start]) {
                    // Rows of one group apart from each other: the general form.
                    return self.inner::<T>(i, self, i, numel);
                }
                for r in runs {
                    let (l, g) = (cpu::rows(left.as_slice::<T>()?, rd, &r), cpu::rows(right.as_slice()?, cd, &r));
                    sum += cpu::outer_sq_norm::<T>(l, g, r.len());
                }
                Ok(sum)
            }
            Factor::RowSum { .. } | Factor::ScaledRowSum { .. } | Factor::PerSample { .. } => {
                let mut x = vec![T::ZERO; numel];
                self.sample_add(i, &mut x)?;
                Ok(x.iter().map(|x| x.to_f64() * x.to_f64()).sum())
            }
            Factor::Lookup { .. } => self.inner::<T>(i, self, i, numel),
            Factor::Dense { .. } => {
                Err(Error::autograd("sample_sq_norms", "a dense gradient has no per-sample meaning"))
            }
        }
    }
}
