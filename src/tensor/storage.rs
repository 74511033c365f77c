//! Where an array's bytes are.

use crate::device::Device;
use crate::device::cpu::pool::Buffer;
use crate::device::cuda::{Block, Gpu};
use crate::error::Result;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

static READ_BACK: AtomicU64 = AtomicU64::new(0);

/// How often memory of a GPU was read back because an op has no kernel yet and ran on the CPU, in this process.
pub fn read_back() -> u64 {
    READ_BACK.load(Ordering::Relaxed)
}

/// Shared bytes on a device.
#[derive(Clone)]
pub(crate) enum Storage {
    Cpu(Arc<Buffer>),
    Cuda(Arc<OnGpu>),
}

/// Memory of a GPU, and what it held when somebody on the host asked.
pub(crate) struct OnGpu {
    pub block: Block,
    host: OnceLock<Buffer>,
}

impl OnGpu {
    pub fn new(block: Block) -> OnGpu {
        OnGpu { block, host: OnceLock::new() }
    }
    /// A copy on the host, made once: shared memory is never written to.
    pub fn host(&self) -> Result<&Buffer> {
        if let Some(b) = self.host.get() {
            return Ok(b);
        }
        READ_BACK.fetch_add(1, Ordering::Relaxed);
        let mut b = Buffer::uninit(self.block.bytes());
        self.block.gpu().download_into(&self.block, 0, b.as_mut_slice::<u8>())?;
        Ok(self.host.get_or_init(|| b))
    }
}

impl Storage {
    pub fn cpu(bytes: usize) -> Storage {
        Storage::Cpu(Arc::new(Buffer::uninit(bytes)))
    }
    pub fn cuda(gpu: &Arc<Gpu>, bytes: usize) -> Result<Storage> {
        Ok(Storage::Cuda(Arc::new(OnGpu::new(gpu.alloc(bytes)?))))
    }
    pub fn device(&self) -> Device {
        match self {
            Storage::Cpu(_) => Device::Cpu,
            Storage::Cuda(g) => Device::Cuda(g.block.gpu().clone()),
        }
    }
    pub fn is_unique(&mut self) -> bool {
        match self {
            Storage::Cpu(b) => Arc::get_mut(b).is_some(),
            Storage::Cuda(g) => Arc::get_mut(g).is_some(),
        }
    }
    /// Forgets what the host was told of a GPU's memory, which is about to change; only on unshared storage.
    pub fn changed(&mut self) {
        if let Storage::Cuda(g) = self
            && let Some(g) = Arc::get_mut(g)
        {
            g.host = OnceLock::new();
        }
    }
    pub fn same(&self, other: &Storage) -> bool {
        match (self, other) {
            (Storage::Cpu(a), Storage::Cpu(b)) => Arc::ptr_eq(a, b),
            (Storage::Cuda(a), Storage::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
    /// The bytes on the host; of a GPU's memory, a copy.
    pub fn host(&self) -> Result<&Buffer> {
        match self {
            Storage::Cpu(b) => Ok(b),
            Storage::Cuda(g) => g.host(),
        }
    }
    /// The bytes for writing, if they are on the CPU and nobody shares them.
    pub fn cpu_mut(&mut self) -> Option<&mut Buffer> {
        match self {
            Storage::Cpu(b) => Arc::get_mut(b),
            Storage::Cuda(_) => None,
        }
    }
}
