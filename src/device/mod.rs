//! Devices: where arrays are stored and ops run.

pub mod cpu;
pub mod cuda;
#[cfg(feature = "emulator")]
#[path = "../../cuda/emulator/mod.rs"]
pub mod emulator;
pub mod spans;

use crate::base::{Error, Result};
use std::fmt;
use std::sync::Arc;
use std::sync::Once;

/// A device on which arrays are stored and ops run. Cloning it is cheap.
#[derive(Clone)]
pub enum Device {
    /// The machine's processors and memory.
    Cpu,
    /// An NVIDIA GPU, or its emulator.
    Cuda(Arc<cuda::Gpu>),
}

impl Device {
    /// The first GPU if it can be used, else the CPU. If there is a GPU that cannot be used, the reason is printed once to standard error.
    pub fn best() -> Device {
        if cuda::driver().is_err() {
            return Device::Cpu;
        }
        match Device::cuda(0) {
            Ok(device) => device,
            Err(e) => {
                static SAID: Once = Once::new();
                SAID.call_once(|| eprintln!("prismgrad: using the CPU, since the GPU cannot be used. {e}"));
                Device::Cpu
            }
        }
    }

    /// The CPU.
    pub fn cpu() -> Device {
        Device::Cpu
    }

    /// The GPU with this ordinal among the visible ones. The error says what is missing: a driver, a GPU, or the kernel compiler. In a
    /// build with the feature `emulator` on a machine without a driver this returns the emulated device; [`Device::best`] never returns it.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        #[cfg(feature = "emulator")]
        if !cuda::driver_present() {
            crate::device::emulator::install();
        }
        let gpu = cuda::Gpu::open(ordinal)?;
        gpu.check_kernels()?;
        Ok(Device::Cuda(gpu))
    }

    /// The device named by the environment variable `PRISMGRAD_DEVICE`, in the form of [`Device::parse`]; [`Device::best`] when it is not
    /// set.
    pub fn from_env() -> Result<Device> {
        match std::env::var("PRISMGRAD_DEVICE") {
            Err(std::env::VarError::NotPresent) => Ok(Device::best()),
            Err(std::env::VarError::NotUnicode(v)) => Err(bad_name(&v.to_string_lossy())),
            Ok(name) if name.is_empty() => Ok(Device::best()),
            Ok(name) => Device::parse(&name),
        }
    }

    /// Parses a device name: `cpu`, `cuda` (the first GPU) or `cuda:1`.
    pub fn parse(name: &str) -> Result<Device> {
        match name.split_once(':') {
            None if name == "cpu" => Ok(Device::Cpu),
            None if name == "cuda" => Device::cuda(0),
            Some(("cuda", n)) if n.bytes().all(|b| b.is_ascii_digit()) => {
                Device::cuda(n.parse().map_err(|_| bad_name(name))?)
            }
            _ => Err(bad_name(name)),
        }
    }

    /// Whether it is the CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Device::Cpu)
    }

    /// Whether it is a GPU.
    pub fn is_cuda(&self) -> bool {
        matches!(self, Device::Cuda(_))
    }

    /// The GPU, if the device is one.
    pub fn gpu(&self) -> Option<&Arc<cuda::Gpu>> {
        match self {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(gpu),
        }
    }

    /// Bytes of the device's memory in use now, and the most that were in use since the last call.
    pub(crate) fn watermark(&self) -> (usize, usize) {
        self.gpu().map_or_else(cpu::pool::watermark, |gpu| gpu.watermark())
    }

    /// Waits until all queued work has run; on the CPU it returns at once.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu().map_or(Ok(()), |gpu| gpu.synchronize())
    }
}

fn bad_name(name: &str) -> Error {
    Error::invalid("PRISMGRAD_DEVICE", format!("{name:?} is no device; it is cpu, cuda or cuda:N"))
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        self.gpu().map(|g| g.ordinal()) == other.gpu().map(|g| g.ordinal())
    }
}

impl Eq for Device {}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(gpu) => write!(f, "cuda:{}", gpu.ordinal()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Device::parse("cpu").unwrap(), Device::cpu());
        assert_eq!(Device::Cpu.to_string(), "cpu");
        assert!(Device::Cpu.is_cpu() && !Device::Cpu.is_cuda() && Device::Cpu.gpu().is_none());
        for bad in ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cpu:0", "cuda:99999999999999999999"] {
            let e = Device::parse(bad).unwrap_err().to_string();
            assert!(e.contains("PRISMGRAD_DEVICE") && e.contains(&format!("{bad:?}")), "{e}");
        }
        Device::Cpu.synchronize().unwrap();
    }

    #[test]
    fn a_gpu_that_is_not_there_is_one_sentence() {
        let e = Device::parse("cuda:4711").unwrap_err().to_string();
        assert!(e.contains("driver") || e.contains("no such GPU"), "{e}");
        assert!(!e.contains('\n'));
    }

    #[test]
    fn the_best_device_is_always_some_device() {
        assert_eq!(Device::best(), Device::best());
    }
}
