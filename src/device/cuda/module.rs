//! Kernels of a user's own op: a source text that is not one of this crate's, compiled and loaded in the same way.

use super::errors::check;
use super::kernels::{Kernel, KernelText};
use super::{Gpu, driver};
use crate::base::{Error, Result};
use cudarc::driver::sys;

/// CUDA source text with the kernels of a custom op.
///
/// On a GPU, NVRTC compiles it at first use, and the machine code is cached on disk like that of the crate's kernels. On the emulated
/// device (feature `emulator`) the host's C++ compiler compiles it. On both it may `#include "prelude.cuh"`, the crate's only header, which
/// has short names of types, conversions of 16-bit floats, sums over warps and blocks, and `SHARED` and `DYN_SHARED` for shared memory.
/// Kernels are declared `extern "C" __global__`.
///
/// A launch is refused unless the number of its arguments and their sizes are those of the kernel, and each array has the element type that
/// the caller names. On a GPU the accesses inside the kernel are not checked: one out of bounds can change other arrays or end the program.
/// The emulated device reports it with its source line.
///
/// ```no_run
/// use prismgrad::array::ArrayArguments;
/// use prismgrad::device::cuda::{CudaModule, Launch};
/// use prismgrad::{Array, DType, Device, Result};
///
/// static DOUBLE: CudaModule = CudaModule::new("double", r#"
///     #include "prelude.cuh"
///     extern "C" __global__ void double_f32(const float* x, float* y, i64 n) {
///         i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
///         if (i < n) y[i] = 2 * x[i];
///     }
/// "#);
///
/// fn double(x: &Array) -> Result<Array> {
///     let device = x.device();
///     let Device::Cuda(gpu) = &device else { return Ok(Array::generate(&[0], DType::F32, |_| 0.0)) };
///     let (x, mut y) = (x.contiguous(), Array::zeros(x.shape(), (DType::F32, &device)));
///     let launch = Launch::of(gpu, DOUBLE.kernel(gpu, "double_f32")?).grid(x.numel().div_ceil(256), 1, 1).block(256);
///     launch.input::<f32>(&x).output::<f32>(&mut y).val(x.numel() as i64).run()?;
///     Ok(y)
/// }
/// ```
pub struct CudaModule(KernelText);

impl CudaModule {
    /// `name` is that of the op: it appears in error messages, in reports of the emulated device and in the names of cached files, and
    /// consists of letters, digits and underscores. Nothing is compiled yet.
    pub const fn new(name: &'static str, text: &'static str) -> CudaModule {
        CudaModule(KernelText { name, text, own: false })
    }

    /// A kernel of this text on a GPU, for [`Launch::of`](super::Launch::of). The first call compiles the text or reads it from the cache,
    /// which takes up to seconds; later calls are a look-up. If the text does not compile, the error contains the compiler's messages.
    pub fn kernel(&self, gpu: &Gpu, name: &str) -> Result<Kernel> {
        if let Some(kernel) = gpu.modules.custom.read().unwrap_or_else(|e| e.into_inner()).get(&(self.0.id(), name)) {
            return Ok(*kernel);
        }
        if self.0.name.is_empty() || !self.0.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            let why = format!("{:?} cannot name a module of kernels; use letters, digits and underscores", self.0.name);
            return Err(Error::invalid("CudaModule", why));
        }
        let kernel = gpu.load_kernel(self.0, name)?;
        let mut kernels = gpu.modules.custom.write().unwrap_or_else(|e| e.into_inner());
        Ok(*kernels.entry((self.0.id(), kernel.name())).or_insert(kernel))
    }
}

/// Bytes of each parameter of a kernel.
pub(super) fn parameters(op: &str, function: sys::CUfunction) -> Result<Vec<u32>> {
    let version = driver()?.version;
    if version < 12_040 {
        let found = format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(Error::device(
            op,
            format!(
                "kernels of your own need a driver of CUDA 12.4 or newer, which tells their parameters; this one is of {found}"
            ),
        ));
    }
    let mut sizes = vec![];
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: a loaded function; the pointers are to locals.
        match unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) } {
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(sizes),
            code => check(op, code)?,
        }
        sizes.push(size as u32);
    }
}

/// The bytes that the emulated device accepts in place of a text's machine code. The crate's own kernels are compiled into the emulator,
/// which ignores their image.
pub(super) fn emulated_image(text: KernelText) -> Result<Vec<u8>> {
    if text.own {
        return Ok(vec![0u8; 16]);
    }
    #[cfg(feature = "emulator")]
    return crate::device::emulator::compile(text.name, text.text);
    #[cfg(not(feature = "emulator"))]
    Err(Error::device(
        format!("compile {text}"),
        "this build has no emulated device; build with the feature `emulator`",
    ))
}
