//! Random inputs for checks, and the functions to check on them.

use crate::array::Array;
use crate::base::{DType, Result};
use crate::{Device, Param, Tensor};

/// The kind of sizes and values that a [`Gen`] chooses for a case. A case is written once; the modes vary it towards inputs on which
/// devices may differ: block boundaries, empty arrays, non-contiguous memory, special floating-point values, and ties.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Small sizes, any layout, ordinary values.
    #[default]
    Small,
    /// Some extents just beside a boundary of a warp, a tile or a block.
    Large,
    /// Extents of 0 and 1.
    Empty,
    /// No contiguous arrays: they are permuted, sliced with a step, or expanded with strides of 0.
    Strided,
    /// Ordinary values mixed with NaN, infinities, zeros of both signs, subnormal and very large numbers.
    Special,
    /// Only a few distinct values.
    Ties,
}

/// Extents beside the boundaries of a warp (32), a tile (64, 128), a block (256), and of rows that take one warp (1024).
const BORDERS: [&[usize]; 3] = [&[31, 32, 33], &[65, 127, 129, 257], &[1025]];
/// Upper limit on the product of a case's extents.
const ROOM: usize = 6_000;
/// The values of [`Mode::Ties`].
const TIES: [f64; 6] = [-0.5, -0.0, 0.0, 0.5, 1.0, 1.5];

/// A small deterministic source of random shapes, strides and values for cases (SplitMix64).
pub struct Gen {
    state: u64,
    dtype: DType,
    mode: Mode,
    device: Device,
    /// Product of the extents so far.
    extents: usize,
}

impl Gen {
    /// A generator with this seed and f64 values; equal seeds give equal cases.
    pub fn new(seed: u64) -> Gen {
        Gen::with_dtype(seed, DType::F64)
    }
    /// A generator with this seed whose values are rounded to a float dtype.
    pub fn with_dtype(seed: u64, dtype: DType) -> Gen {
        let state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
        Gen { state, dtype, mode: Mode::Small, device: Device::Cpu, extents: 1 }
    }
    /// The same generator in another mode.
    pub fn mode(mut self, mode: Mode) -> Gen {
        self.mode = mode;
        self
    }
    /// The same generator with its arrays on a device, in the layouts that they have on the CPU.
    pub fn on(mut self, device: &Device) -> Gen {
        self.device = device.clone();
        self
    }
    /// The dtype of the arrays.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// An integer in `low..=high`.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() % (high - low + 1) as u64) as usize
    }
    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }
    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }
    /// An extent that may have any size: `low..=high` in general, beside a boundary in [`Mode::Large`], at most 1 in [`Mode::Empty`]. With
    /// `low` = 0 it may be 0, but only in that mode. A size that must stay small, such as the width of a window, is a [`Gen::size`].
    pub fn extent(&mut self, low: usize, high: usize) -> usize {
        self.extent_within(low, high, ROOM)
    }
    /// An extent whose cost is quadratic, such as the positions of attention.
    pub fn side(&mut self, low: usize, high: usize) -> usize {
        self.extent_within(low, high, 130)
    }
    /// The number of samples, images or similar units: an extent that is never large, since each unit is a separate product.
    pub fn count(&mut self, low: usize, high: usize) -> usize {
        self.extent_within(low, high, 0)
    }
    fn extent_within(&mut self, low: usize, high: usize, most: usize) -> usize {
        let room = most.min(ROOM / self.extents.min(ROOM));
        let borders = &BORDERS[..BORDERS.iter().filter(|b| b[0] <= room).count()];
        let mode = self.mode;
        let extent = match mode {
            Mode::Large if !borders.is_empty() && self.chance(0.5) => {
                let near = borders[self.size(0, borders.len() - 1)];
                near[self.size(0, near.iter().filter(|&&b| b <= room).count() - 1)]
            }
            // Large enough that several threads also meet special values and ties.
            Mode::Special | Mode::Ties if room > 130 && self.chance(0.2) => self.size(30, 130),
            Mode::Empty if low > 1 => low,
            Mode::Empty => self.size(low, 1),
            _ => self.size(low.max(1), high),
        };
        self.extents *= extent.max(1);
        extent
    }
    /// A shape of `rank` extents of 1 to 4; it may be empty in [`Mode::Empty`].
    pub fn shape(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| self.extent(0, 4)).collect()
    }
    /// The lengths of `low..=high` runs of rows, some of them 0; in [`Mode::Large`] one run may be long, or there are many runs.
    pub fn lengths(&mut self, low: usize, high: usize) -> Vec<usize> {
        let mode = self.mode;
        let longest = match mode {
            Mode::Empty => 1,
            Mode::Special | Mode::Ties if self.chance(0.3) => 70,
            _ => 4,
        };
        let (large, mut count, long) = (mode == Mode::Large, self.size(low, high), self.chance(0.5));
        if large && !long {
            count = self.size(30, 70);
        }
        let mut lengths: Vec<usize> = (0..count).map(|_| self.size(0, longest)).collect();
        if large && long && count > 0 {
            let at = self.size(0, count - 1);
            lengths[at] = self.extent(0, longest);
        }
        lengths
    }
    /// Normally distributed values in a random layout: contiguous, permuted, or a slice of a larger array. They are smaller in
    /// [`Mode::Large`], so that results after a long sum of products keep their digits.
    pub fn array(&mut self, shape: &[usize]) -> Array {
        let scale = if self.mode == Mode::Large { 0.25 } else { 1.0 };
        self.array_of(shape, |g| scale * g.normal())
    }
    /// Normally distributed values in every mode, in a random layout: for factors such as a norm's gain, where the order of operations
    /// would decide whether an infinity stays one or becomes NaN.
    pub fn ordinary(&mut self, shape: &[usize]) -> Array {
        let mode = std::mem::replace(&mut self.mode, Mode::Small);
        let made = self.array(shape);
        self.mode = mode;
        made
    }
    /// Values in `low..high` in a random layout.
    pub fn array_in(&mut self, shape: &[usize], low: f64, high: f64) -> Array {
        self.array_of(shape, |g| match g.mode == Mode::Special && g.chance(0.03) {
            // Functions of one element are also tested with values that would overflow in a sum of products.
            true => g.limits().1 * if g.chance(0.5) { 1.0 } else { -1.0 },
            false => low + (high - low) * g.uniform(),
        })
    }
    /// Values in −1..1 at least 2e-4 apart (before rounding to the dtype), in a random layout: for ops that select elements, whose central
    /// differences would step over a tie. In [`Mode::Ties`] there are ties.
    pub fn distinct(&mut self, shape: &[usize]) -> Array {
        let mut k = self.size(0, 10_000);
        self.array_of(shape, |_| {
            k += 1;
            (k * 7919 % 10_007) as f64 / 5003.5 - 1.0
        })
    }
    /// Values from `f` in a random layout, some of which [`Mode::Special`] and [`Mode::Ties`] replace.
    pub fn array_of(&mut self, shape: &[usize], mut f: impl FnMut(&mut Gen) -> f64) -> Array {
        self.laid_out(shape, |g, stored| {
            let v: Vec<f64> = (0..stored.iter().product())
                .map(|_| {
                    let x = f(g);
                    g.replaced(x)
                })
                .collect();
            Ok(Array::from_slice(&v, stored)?.cast(g.dtype))
        })
    }
    /// The smallest normal and the largest number of the dtype.
    fn limits(&self) -> (f64, f64) {
        match self.dtype {
            DType::F64 => (f64::MIN_POSITIVE, f64::MAX),
            DType::F16 => (2f64.powi(-14), 65_504.0),
            DType::BF16 => (f32::MIN_POSITIVE as f64, half::bf16::MAX.to_f64()),
            _ => (f32::MIN_POSITIVE as f64, f32::MAX as f64),
        }
    }
    /// The value that the mode substitutes for an ordinary value.
    fn replaced(&mut self, x: f64) -> f64 {
        let least = self.limits().0;
        let mode = self.mode;
        match mode {
            Mode::Ties => TIES[self.size(0, TIES.len() - 1)],
            Mode::Special if self.chance(0.1) => {
                [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, least / 4.0, -least / 8.0][self.size(0, 6)]
            }
            _ => x,
        }
    }
    /// An array of `shape` in a random layout; `make` makes the stored array.
    fn laid_out(&mut self, shape: &[usize], make: impl FnOnce(&mut Gen, &[usize]) -> Result<Array>) -> Array {
        let make = |g: &mut Gen, stored: &[usize]| make(g, stored).and_then(|a| a.to(&g.device));
        let strided = self.mode == Mode::Strided;
        let made = match self.size(strided as usize, 3) {
            // The dimensions are stored in another order.
            1 if shape.len() >= 2 => {
                let mut order: Vec<usize> = (0..shape.len()).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, self.size(0, i - strided as usize));
                }
                let mut stored = vec![0; shape.len()];
                order.iter().enumerate().for_each(|(d, &o)| stored[o] = shape[d]);
                make(self, &stored).and_then(|a| a.permute(&order))
            }
            // One slice is expanded along a whole dimension.
            3 if strided && !shape.is_empty() => {
                let mut stored = shape.to_vec();
                stored[self.size(0, shape.len() - 1)] = 1;
                make(self, &stored).and_then(|a| a.expand(shape))
            }
            // A slice of a larger array.
            n if (n == 2 || strided) && !shape.is_empty() => {
                let d = self.size(0, shape.len() - 1);
                let mut stored = shape.to_vec();
                stored[d] = stored[d] * 2 + 1;
                make(self, &stored)
                    .and_then(|a| a.slice(d as isize, 1..1 + 2 * shape[d]))
                    .and_then(|a| a.step(d as isize, 2))
            }
            _ => make(self, shape),
        };
        match made {
            Ok(a) => a,
            Err(_) => Array::zeros(shape, self.dtype),
        }
    }
    /// Random ids below `n`, u32, in a random layout.
    pub fn ids(&mut self, shape: &[usize], n: usize) -> Array {
        self.laid_out(shape, |g, stored| {
            let v: Vec<u32> = (0..stored.iter().product()).map(|_| g.size(0, n.max(1) - 1) as u32).collect();
            Array::from_slice(&v, stored)
        })
    }
}

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// A function of float tensors and parameters, with inputs on which to check it.
pub struct Case {
    /// Differentiable inputs, f64, in any layout.
    pub inputs: Vec<Array>,
    /// Parameters the function uses, f64.
    pub params: Vec<Param>,
    /// Number of samples, if dimension 0 of the output counts samples that do not mix: enables the per-sample check.
    pub samples: Option<usize>,
    /// The function.
    pub run: Function,
}

impl Case {
    /// A case without parameters.
    pub fn new(inputs: Vec<Array>, run: impl Fn(&[Tensor]) -> Result<Tensor> + 'static) -> Case {
        Case { inputs, params: Vec::new(), samples: None, run: Box::new(run) }
    }
    /// Adds the parameters `run` uses.
    pub fn params(mut self, params: Vec<Param>) -> Case {
        self.params = params;
        self
    }
    /// The same case with inputs and parameters on a device.
    pub fn to(mut self, device: &Device) -> Result<Case> {
        self.inputs = self.inputs.iter().map(|a| a.to(device)).collect::<Result<_>>()?;
        self.params.iter().try_for_each(|p| p.to(device))?;
        Ok(self)
    }
    /// Declares that dimension 0 of the output counts `n` samples that do not mix.
    pub fn samples(mut self, n: usize) -> Case {
        self.samples = Some(n);
        self
    }
}
