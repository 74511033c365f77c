//! Rotary position embedding (Su et al. 2021, RoFormer).
//!
//! Pair i of a head of size D is rotated by the angle t·base^(−2i/D) at position t. The gradient of a rotation is the inverse rotation, so
//! only the table is kept for backward. 3·N FLOPs, one pass over memory.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::par_rows;
use crate::device::cpu::simd::simd;
use crate::device::cuda::Gpu;
use crate::device::{Device, spans};
use crate::kernels::{Half, dispatch};
use crate::{Tensor, with_float};
use smallvec::SmallVec;
use std::sync::{Arc, Mutex};

/// The choice of the two elements of a head that are rotated together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Elements i and i + D/2 (GPT-NeoX, Llama in Hugging Face's layout).
    Half,
    /// Elements 2i and 2i + 1 (the paper, GPT-J).
    Interleaved,
}

/// Cosines and sines for every position and pair, computed in f64 and rounded once. Build it once per model and share it between layers;
/// clones are handles.
#[derive(Clone, Debug)]
pub struct RotaryTable(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    len: usize,
    half: usize,
    /// cos and sin, `[len, half]` each.
    f32: [Vec<f32>; 2],
    f64: [Vec<f64>; 2],
    /// The table of one dtype in a GPU's memory, with the GPU's number: the one requested last.
    on_gpu: Mutex<Option<(usize, Array, Array)>>,
}

impl RotaryTable {
    /// Positions `0..len` for heads of `dim` (even) elements; `base` is usually 10000.
    pub fn new(len: usize, dim: usize, base: f64) -> Result<RotaryTable> {
        if !dim.is_multiple_of(2) {
            return Err(Error::shape("rotary", format!("heads of {dim} elements cannot be paired; use an even size")));
        }
        if !(base.is_finite() && base > 0.0) {
            return Err(Error::invalid("rotary", format!("base {base} must be positive")));
        }
        if dim > 1 << 20 {
            return Err(Error::invalid("rotary", format!("heads of {dim} elements; use at most 2^20")));
        }
        let frequencies: Vec<f64> = (0..dim / 2).map(|i| base.powf(-2.0 * i as f64 / dim as f64)).collect();
        RotaryTable::with_frequencies(len, &frequencies)
    }
    /// Positions `0..len`, with pair i rotated by `frequencies[i]` radians per position (for scaled or interpolated variants). At most 2²⁷
    /// angles.
    pub fn with_frequencies(len: usize, frequencies: &[f64]) -> Result<RotaryTable> {
        if let Some(w) = frequencies.iter().find(|w| !w.is_finite()) {
            return Err(Error::invalid("rotary", format!("a frequency of {w}; all must be finite")));
        }
        if len.checked_mul(frequencies.len()).is_none_or(|n| n > 1 << 27) {
            let message =
                format!("a table of {len} positions by {} pairs; it holds at most 2^27 angles", frequencies.len());
            return Err(Error::invalid("rotary", message));
        }
        let table = |f: fn(f64) -> f64| -> Vec<f64> {
            (0..len).flat_map(|t| frequencies.iter().map(move |w| f(t as f64 * w))).collect()
        };
        let f64 = [table(f64::cos), table(f64::sin)];
        let f32 = [0, 1].map(|k: usize| f64[k].iter().map(|&x| x as f32).collect());
        Ok(RotaryTable(Arc::new(Inner { len, half: frequencies.len(), f32, f64, on_gpu: Mutex::default() })))
    }
    /// Number of positions.
    pub fn len(&self) -> usize {
        self.0.len
    }
    /// Whether it has no positions.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }
    /// Size D of the heads it rotates.
    pub fn dim(&self) -> usize {
        2 * self.0.half
    }
    /// cos and sin in a GPU's memory, f32 or f64.
    fn on_gpu(&self, gpu: &Arc<Gpu>, dtype: DType) -> Result<(Array, Array)> {
        let mut slot = self.0.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((ordinal, cos, sin)) = &*slot
            && *ordinal == gpu.ordinal()
            && cos.dtype() == dtype
        {
            return Ok((cos.clone(), sin.clone()));
        }
        let (device, shape) = (Device::Cuda(gpu.clone()), [self.0.len, self.0.half]);
        let table = |k: usize| match dtype {
            DType::F32 => Array::from_slice(&self.0.f32[k], &shape)?.to(&device),
            _ => Array::from_slice(&self.0.f64[k], &shape)?.to(&device),
        };
        let (cos, sin) = (table(0)?, table(1)?);
        *slot = Some((gpu.ordinal(), cos.clone(), sin.clone()));
        Ok((cos, sin))
    }
    fn tables<T: Float>(&self) -> (&[T], &[T]) {
        let cast = |k: usize| -> &[T] {
            if T::DTYPE == DType::F32 {
                bytemuck::cast_slice(&self.0.f32[k])
            } else {
                bytemuck::cast_slice(&self.0.f64[k])
            }
        };
        (cast(0), cast(1))
    }
}

static ROTARY: OpInfo = OpInfo {
    name: "rotary",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g: &mut Gen| {
        let (b, t, h, half) = (g.extent(0, 3), g.extent(0, 4), g.extent(1, 3), g.extent(1, 3));
        let offset = g.size(0, 3);
        let table = RotaryTable::new(offset + t + g.size(0, 2), 2 * half, 100.0)?;
        let pairing = if g.chance(0.5) { Pairing::Half } else { Pairing::Interleaved };
        let turned = if g.chance(0.5) { h } else { g.size(0, h) };
        let x = g.array(&[b, t, h, 2 * half]);
        Ok(Case::new(vec![x], move |x| x[0].rotary_heads(&table, offset, pairing, turned)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&ROTARY];

struct Back {
    table: RotaryTable,
    place: (usize, usize),
    pairing: Pairing,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &ROTARY
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.mixing(3, y.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        back.input(0, turn(&grad, &self.table, self.place, self.pairing, true)?);
        Ok(())
    }
}

/// Rotates the first `turned` heads of `x [B, T, H, D]`, whose row 0 has position `offset`; in the inverse direction if `inverse`. Strided
/// inputs (a slice of a fused projection) are read in place.
fn turn(
    x: &Array,
    table: &RotaryTable,
    (offset, turned): (usize, usize),
    pairing: Pairing,
    inverse: bool,
) -> Result<Array> {
    let x = if x.strides()[3] == 1 { x.clone() } else { x.contiguous() };
    let (t_count, h_count, d) = (x.shape()[1], x.shape()[2], x.shape()[3]);
    let half = d / 2;
    dispatch(
        [x],
        Half::Native,
        |[x]| {
            let mut out = Array::uninit(x.shape(), x.dtype());
            if out.numel() == 0 {
                return Ok(out);
            }
            with_float!("rotary", x.dtype(), |T| {
                let (cos, sin) = table.tables::<T>();
                let sign = if inverse { -T::ONE } else { T::ONE };
                let (src, strides) = (x.raw::<T>()?, x.strides());
                par_rows(out.fresh_mut::<T>(), d, |row, y| {
                    let (h, t, b) = (row % h_count, row / h_count % t_count, row / h_count / t_count);
                    let at = b * strides[0] + t * strides[1] + h * strides[2];
                    let place = (offset + t) * half..(offset + t + 1) * half;
                    if h >= turned {
                        return y.copy_from_slice(&src[at..at + d]);
                    }
                    turn_row(&src[at..at + d], (&cos[place.clone()], &sin[place]), sign, pairing, y);
                });
                Ok(out)
            })
        },
        |gpu, [x]| {
            let (cos, sin) = table.on_gpu(gpu, x.dtype().compute())?;
            cuda::rotary(gpu, &x, (&cos, &sin), (offset, turned), (pairing == Pairing::Interleaved, inverse))
        },
    )
}

/// Rotates one head; `sign` is −1 for the inverse rotation.
fn turn_row<T: Float>(x: &[T], (cos, sin): (&[T], &[T]), sign: T, pairing: Pairing, y: &mut [T]) {
    let half = cos.len();
    simd(
        #[inline(always)]
        || match pairing {
            Pairing::Half => {
                let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
                for i in 0..half {
                    let s = sign * sin[i];
                    y1[i] = x1[i] * cos[i] - x2[i] * s;
                    y2[i] = x2[i] * cos[i] + x1[i] * s;
                }
            }
            Pairing::Interleaved => {
                for (i, (x, y)) in x.chunks_exact(2).zip(y.chunks_exact_mut(2)).enumerate() {
                    let s = sign * sin[i];
                    y[0] = x[0] * cos[i] - x[1] * s;
                    y[1] = x[1] * cos[i] + x[0] * s;
                }
            }
        },
    );
}

impl Tensor {
    /// Rotary position embedding of queries or keys `[B, T, H, D]`; the result has the same shape. Row t has position `offset + t`
    /// (`offset` is the number of cached positions when decoding, 0 otherwise).
    pub fn rotary(&self, table: &RotaryTable, offset: usize, pairing: Pairing) -> Result<Tensor> {
        self.rotary_heads(table, offset, pairing, usize::MAX)
    }
    /// As [`Tensor::rotary`], for the first `turned` heads only; the others are unchanged. A fused projection `[B, T, 3·H, D]` of queries,
    /// keys and values is rotated in one pass with `turned = 2·H`.
    pub fn rotary_heads(&self, table: &RotaryTable, offset: usize, pairing: Pairing, turned: usize) -> Result<Tensor> {
        let _op = spans::op("rotary");
        self.dtype().expect_float("rotary")?;
        let &[_, t, _, d] = self.shape() else {
            return Err(Error::shape("rotary", format!("needs [batch, time, heads, size], got {:?}", self.shape())));
        };
        if d != table.dim() {
            return Err(Error::shape(
                "rotary",
                format!("{:?} with a table for heads of {}", self.shape(), table.dim()),
            ));
        }
        if offset + t > table.len() {
            return Err(Error::invalid(
                "rotary",
                format!("positions {offset}..{} of a table of {}; build a longer table", offset + t, table.len()),
            ));
        }
        let place = (offset, turned.min(self.shape()[2]));
        let y = turn(self.array(), table, place, pairing, false)?;
        Ok(Tensor::record(y, &[self], &[], || Back { table: table.clone(), place, pairing }))
    }
}
