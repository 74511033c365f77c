//! Checks for a driver and a device, once, before anything else calls CUDA.
//!
//! The bindings load the driver library and each of its functions at first use and *panic* when one is missing. Therefore all calls go
//! through [`driver`], which checks first and returns an error of one sentence.

use super::errors::check;
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::sync::OnceLock;

/// The result of the probe.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// CUDA version of the driver: 1000 × major + 10 × minor.
    pub version: u32,
    /// Number of visible devices, at least 1.
    pub devices: usize,
}

/// Older drivers lack functions that we call.
const OLDEST: u32 = 12_000;

/// Functions that must exist for anything to work.
const NEEDED: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreateWithPriority",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Whether the NVIDIA driver library can be loaded. Never panics, with or without one.
pub fn driver_present() -> bool {
    // SAFETY: opens and closes the library, calls nothing in it.
    unsafe { sys::is_culib_present() }
}

/// Whether the driver is installed and has all of `symbols`. The answer holds for the life of the process.
pub fn has_symbols(symbols: &[&str]) -> bool {
    driver_present() && first_missing(symbols).is_none()
}

fn first_missing<'a>(symbols: &[&'a str]) -> Option<&'a str> {
    // SAFETY: only after `driver_present`, so loading cannot fail; symbols are looked up, not called.
    let lib = unsafe { sys::culib() };
    symbols.iter().find(|s| unsafe { lib.get::<unsafe extern "C" fn()>(s.as_bytes()) }.is_err()).copied()
}

/// The initialised driver with at least one device; otherwise one sentence that says what is missing.
pub fn driver() -> Result<Driver> {
    // Only success is cached: a driver (or the emulator) may be loaded after a first failed probe.
    static FOUND: OnceLock<Driver> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    let op = "CUDA driver";
    if !driver_present() {
        return Err(Error::device(
            op,
            "the NVIDIA driver library (libcuda.so.1) cannot be loaded; install the driver, or choose the CPU with \
             PRISMGRAD_DEVICE=cpu",
        ));
    }
    too_old(first_missing(&[
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuGetErrorName",
        "cuGetErrorString",
    ]))?;
    // SAFETY: the library is loaded and has these functions; the pointers are to locals.
    let (version, devices) = unsafe {
        match sys::cuInit(0) {
            CUresult::CUDA_SUCCESS => {}
            CUresult::CUDA_ERROR_NO_DEVICE => return Err(no_device()),
            code => check("CUDA driver: initialise", code)?,
        }
        let (mut version, mut count) = (0, 0);
        check("CUDA driver: version", sys::cuDriverGetVersion(&mut version))?;
        match sys::cuDeviceGetCount(&mut count) {
            CUresult::CUDA_ERROR_NO_DEVICE => {}
            code => check("CUDA driver: count devices", code)?,
        }
        (version.max(0) as u32, count.max(0) as usize)
    };
    if devices == 0 {
        return Err(no_device());
    }
    if version < OLDEST {
        return Err(Error::device(
            op,
            format!(
                "the driver supports CUDA {}.{}, at least {}.0 is needed; update the driver",
                version / 1000,
                version % 1000 / 10,
                OLDEST / 1000
            ),
        ));
    }
    too_old(first_missing(NEEDED))?;
    Ok(*FOUND.get_or_init(|| Driver { version, devices }))
}

fn too_old(missing: Option<&str>) -> Result<()> {
    let Some(symbol) = missing else { return Ok(()) };
    Err(Error::device("CUDA driver", format!("the driver library has no {symbol}; it is too old, update the driver")))
}

fn no_device() -> Error {
    let visible = match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(v) => format!(" (CUDA_VISIBLE_DEVICES is {v:?})"),
        Err(_) => String::new(),
    };
    Error::device(
        "CUDA driver",
        format!(
            "the driver is there, but no GPU is visible to this process{visible}; see nvidia-smi, or choose the CPU with PRISMGRAD_DEVICE=cpu"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_for_a_driver_is_safe_without_one() {
        match driver() {
            Ok(found) => assert!(found.devices > 0 && found.version >= OLDEST),
            Err(e) => assert!(e.to_string().contains("driver"), "{e}"),
        }
        // Another test of this process may install the emulated driver in between.
        let before = driver_present();
        let symbols = has_symbols(&["cuInit"]);
        assert!(symbols == before || symbols == driver_present());
        assert!(!has_symbols(&["cuNoSuchFunction"]));
    }
}
