//! The memory that holds an array's bytes.

use crate::base::{Error, Result};
use crate::device::Device;
use crate::device::cpu::pool::Buffer;
use crate::device::cuda::{Block, Gpu};
use std::sync::Arc;

/// Shared bytes on a device.
#[derive(Clone)]
pub(crate) enum Storage {
    Cpu(Arc<Buffer>),
    Cuda(Arc<Block>),
    /// A creation, copy or conversion on a GPU that failed (out of memory, a lost device) where no error could be returned: any use of it
    /// returns the error.
    Failed(Arc<Failure>),
}

/// Why there are no bytes.
pub(crate) struct Failure {
    gpu: Arc<Gpu>,
    why: String,
}

impl Storage {
    pub fn cpu(bytes: usize) -> Storage {
        Storage::Cpu(Arc::new(Buffer::uninit(bytes)))
    }
    pub fn cuda(gpu: &Arc<Gpu>, bytes: usize) -> Result<Storage> {
        Ok(Storage::Cuda(Arc::new(gpu.alloc(bytes)?)))
    }
    pub fn failed(gpu: &Arc<Gpu>, why: &Error) -> Storage {
        Storage::Failed(Arc::new(Failure { gpu: gpu.clone(), why: why.to_string() }))
    }
    pub fn device(&self) -> Device {
        self.gpu().map_or(Device::Cpu, |gpu| Device::Cuda(gpu.clone()))
    }
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Storage::Cpu(_) => None,
            Storage::Cuda(block) => Some(block.gpu()),
            Storage::Failed(failure) => Some(&failure.gpu),
        }
    }
    /// The GPU memory block; the error names the op that needed it on a GPU.
    pub fn block(&self, op: &str) -> Result<&Block> {
        match self {
            Storage::Cuda(block) => Ok(block),
            Storage::Cpu(_) => Err(Error::device(op, "an operand is on the CPU; move it with .to()")),
            Storage::Failed(failure) => Err(Error::device(op, format!("an operand was never made: {}", failure.why))),
        }
    }
    pub fn is_unique(&mut self) -> bool {
        match self {
            Storage::Cpu(b) => Arc::get_mut(b).is_some(),
            Storage::Cuda(b) => Arc::get_mut(b).is_some(),
            Storage::Failed(_) => true,
        }
    }
    pub fn same(&self, other: &Storage) -> bool {
        match (self, other) {
            (Storage::Cpu(a), Storage::Cpu(b)) => Arc::ptr_eq(a, b),
            (Storage::Cuda(a), Storage::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
    /// The bytes on the CPU; for GPU memory, an error that says how to transfer them.
    pub fn host(&self) -> Result<&Buffer> {
        match self {
            Storage::Cpu(b) => Ok(b),
            Storage::Cuda(b) => {
                let why = format!("the array is on cuda:{}; copy it with .to(&Device::Cpu) first", b.gpu().ordinal());
                Err(Error::device("read on the CPU", why))
            }
            Storage::Failed(failure) => {
                Err(Error::device("read", format!("the array was never made: {}", failure.why)))
            }
        }
    }
    /// The bytes for writing, if they are on the CPU and no other handle shares them.
    pub fn cpu_mut(&mut self) -> Option<&mut Buffer> {
        match self {
            Storage::Cpu(b) => Arc::get_mut(b),
            _ => None,
        }
    }
}
