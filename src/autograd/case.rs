//! Random inputs and the functions to check on them.

use crate::array::Array;
use crate::base::{DType, Result};
use crate::{Device, Param, Tensor};

/// A small deterministic source of random shapes, strides and values for cases (SplitMix64).
pub struct Gen {
    state: u64,
    dtype: DType,
}

impl Gen {
    /// Same seed, same case; f64.
    pub fn new(seed: u64) -> Gen {
        Gen::with_dtype(seed, DType::F64)
    }
    /// Same seed, same case, its values rounded to a float dtype.
    pub fn with_dtype(seed: u64, dtype: DType) -> Gen {
        Gen { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678), dtype }
    }
    /// The dtype of the arrays it makes.
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
    /// A shape of `rank` dimensions of 1 to 4.
    pub fn shape(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| self.size(1, 4)).collect()
    }
    /// Normal values in a random layout: contiguous, permuted, or cut out of something larger.
    pub fn array(&mut self, shape: &[usize]) -> Array {
        self.array_of(shape, |g| g.normal())
    }
    /// Values in `low..high` in a random layout.
    pub fn array_in(&mut self, shape: &[usize], low: f64, high: f64) -> Array {
        self.array_of(shape, |g| low + (high - low) * g.uniform())
    }
    /// Values in −1..1 at least 2e-4 apart (before rounding to the dtype), in a random layout: for ops that pick, whose central differences would
    /// step over a tie.
    pub fn distinct(&mut self, shape: &[usize]) -> Array {
        let mut k = self.size(0, 10_000);
        self.array_of(shape, |_| {
            k += 1;
            (k * 7919 % 10_007) as f64 / 5003.5 - 1.0
        })
    }
    /// Values from `f` in a random layout.
    pub fn array_of(&mut self, shape: &[usize], mut f: impl FnMut(&mut Gen) -> f64) -> Array {
        let values = |g: &mut Gen, s: &[usize], f: &mut dyn FnMut(&mut Gen) -> f64| {
            let v: Vec<f64> = (0..s.iter().product()).map(|_| f(g)).collect();
            Array::from_slice(&v, s).map(|a| a.cast(g.dtype))
        };
        let made = match self.size(0, 3) {
            // Stored in another order of dimensions.
            1 if shape.len() >= 2 => {
                let mut order: Vec<usize> = (0..shape.len()).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, self.size(0, i));
                }
                let mut stored = vec![0; shape.len()];
                order.iter().enumerate().for_each(|(d, &o)| stored[o] = shape[d]);
                values(self, &stored, &mut f).and_then(|a| a.permute(&order))
            }
            // A window into a larger array.
            2 if !shape.is_empty() => {
                let d = self.size(0, shape.len() - 1);
                let mut stored = shape.to_vec();
                stored[d] = stored[d] * 2 + 1;
                values(self, &stored, &mut f)
                    .and_then(|a| a.slice(d as isize, 1..1 + 2 * shape[d]))
                    .and_then(|a| a.step(d as isize, 2))
            }
            _ => values(self, shape, &mut f),
        };
        match made {
            Ok(a) => a,
            Err(_) => Array::zeros(shape, self.dtype),
        }
    }
    /// Random ids below `n`, u32.
    pub fn ids(&mut self, shape: &[usize], n: usize) -> Array {
        let v: Vec<u32> = (0..shape.iter().product()).map(|_| self.size(0, n - 1) as u32).collect();
        Array::from_slice(&v, shape).unwrap_or_else(|_| Array::zeros(shape, DType::U32))
    }
}

type Function = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// A function of float tensors and parameters, with inputs to check it on.
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
    /// The same with inputs and parameters on a device.
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
