//! Random tensors: element i is a function of (seed, i), the same bits on every device.

mod cuda;

use crate::Tensor;
use crate::array::Array;
use crate::autograd::{Case, Differentiable, Gen, NO_PARAMS, OpInfo};
use crate::base::{DType, Result, philox};
use crate::device::{Device, spans};

/// The distribution.
#[derive(Clone, Copy)]
pub(crate) enum Law {
    /// Uniform in [0, 1).
    Uniform,
    /// Standard normal.
    Normal,
}

fn case(g: &mut Gen, f: fn(&[usize], DType, u64, &Device) -> Result<Tensor>) -> Result<Case> {
    let (shape, dtype, seed) = (g.shape(3), g.dtype(), g.bits());
    // The input determines the device.
    Ok(Case::new(vec![g.array(&[1])], move |t| f(&shape, dtype, seed, &t[0].device())))
}

static RAND: OpInfo = OpInfo {
    name: "rand",
    differentiable: Differentiable::No("random numbers depend on nothing"),
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::rand)],
};
static RANDN: OpInfo = OpInfo {
    name: "randn",
    differentiable: Differentiable::No("random numbers depend on nothing"),
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::randn)],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&RAND, &RANDN];

fn generate(law: Law, shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Array> {
    match device.gpu() {
        // f32 and f64 are generated directly; other dtypes are rounded from f32, as on the CPU.
        Some(gpu) => Ok(cuda::generate(gpu, law, shape, dtype.compute(), seed)?.cast(dtype)),
        None => Ok(Array::generate(shape, dtype.compute(), |i| match law {
            Law::Uniform => philox::uniform(seed, 0, i as u64),
            Law::Normal => philox::normal(seed, 0, i as u64),
        })
        .cast(dtype)),
    }
}

impl Tensor {
    /// Uniform random numbers in [0, 1) on a device, without history. The same seed gives the same numbers on every device.
    ///
    /// ```
    /// use prismgrad::{DType, Device, Tensor};
    /// let x = Tensor::rand(&[2, 3], DType::F32, 7, &Device::Cpu)?;
    /// assert!(x.array().to_f64().iter().all(|x| (0.0..1.0).contains(x)));
    /// # Ok::<(), prismgrad::Error>(())
    /// ```
    pub fn rand(shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
        let _op = spans::op("rand");
        dtype.expect_float("rand")?;
        Ok(Tensor::new(generate(Law::Uniform, shape, dtype, seed, device)?))
    }
    /// Standard normal random numbers on a device, without history. The same seed gives the same numbers on every device.
    pub fn randn(shape: &[usize], dtype: DType, seed: u64, device: &Device) -> Result<Tensor> {
        let _op = spans::op("randn");
        dtype.expect_float("randn")?;
        Ok(Tensor::new(generate(Law::Normal, shape, dtype, seed, device)?))
    }
}
