//! The driver's result codes as sentences that say what failed and what to do about it.

use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;

/// Turns a driver result into ours. `op` names the operation that was running.
pub(crate) fn check(op: &str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(explain(op, code)) }
}

/// The error of a failed driver call.
#[cold]
pub(crate) fn explain(op: &str, code: CUresult) -> Error {
    Error::device(op, format!("{}{}", describe(code), advice(code)))
}

/// The driver's name and text for a code, such as "out of memory (CUDA_ERROR_OUT_OF_MEMORY)".
pub(crate) fn describe(code: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const core::ffi::c_char) -> CUresult| {
        let mut p = std::ptr::null();
        // SAFETY: a result code can only have come from a loaded driver; the call returns a static string or null.
        unsafe {
            (get(code, &mut p) == CUresult::CUDA_SUCCESS && !p.is_null())
                .then(|| CStr::from_ptr(p).to_string_lossy().into_owned())
        }
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("CUDA error {}", code as u32));
    match text(sys::cuGetErrorString) {
        Some(words) if words != name => format!("{words} ({name})"),
        _ => name,
    }
}

/// Advice for a code, as a continuation of the sentence.
fn advice(code: CUresult) -> &'static str {
    use CUresult::*;
    match code {
        CUDA_ERROR_OUT_OF_MEMORY => "; use a smaller batch, recompute activations, or free what is no longer needed",
        CUDA_ERROR_ILLEGAL_ADDRESS | CUDA_ERROR_MISALIGNED_ADDRESS | CUDA_ERROR_INVALID_ADDRESS_SPACE => {
            "; a kernel read or wrote outside its buffers and the context is lost: run again with \
             PRISMGRAD_CUDA_SYNC=1 to name the kernel, and with PRISMGRAD_CUDA_POOL=guard under \
             `compute-sanitizer --tool memcheck` to name the line"
        }
        CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_HARDWARE_STACK_ERROR => {
            "; a kernel failed on the device and the context is lost: run again with PRISMGRAD_CUDA_SYNC=1 to name \
             the kernel, and under `compute-sanitizer` to name the line"
        }
        CUDA_ERROR_LAUNCH_TIMEOUT => "; the display driver's watchdog stopped a kernel: use a GPU without a display",
        CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => {
            "; the block needs more registers or shared memory than a multiprocessor has: use a smaller block"
        }
        CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_UNSUPPORTED_PTX_VERSION | CUDA_ERROR_INVALID_IMAGE => {
            "; the kernels were compiled for another architecture or by an NVRTC newer than the driver: use an NVRTC \
             no newer than the driver (see PRISMGRAD_NVRTC)"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "; another process holds the GPU exclusively, or it is in prohibited mode (see nvidia-smi)"
        }
        CUDA_ERROR_ECC_UNCORRECTABLE | CUDA_ERROR_NVLINK_UNCORRECTABLE => {
            "; the hardware reports an error: see nvidia-smi -q"
        }
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        | CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        | CUDA_ERROR_STREAM_CAPTURE_MERGE
        | CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
        | CUDA_ERROR_STREAM_CAPTURE_UNJOINED
        | CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        | CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
        | CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD => {
            "; while a graph is captured nothing may wait for the device, and only one thread may use it"
        }
        CUDA_ERROR_NO_DEVICE => "; no GPU is visible to this process (see nvidia-smi and CUDA_VISIBLE_DEVICES)",
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "; the kernel module and the driver library differ: reboot after the update"
        }
        _ => "",
    }
}
