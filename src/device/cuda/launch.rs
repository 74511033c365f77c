//! One kernel launch: grid, block, shared memory, arguments.
//!
//! Arguments are copied into a buffer inside the builder; a launch allocates nothing on the heap until its arguments exceed 32 words. The
//! host's part costs about a microsecond in addition to the driver's.

use super::context::{Gpu, Stream, count};
use super::errors::describe;
use super::kernels::Kernel;
use super::pool::Block;
use crate::base::{Error, Result};
use crate::device::spans;
use bytemuck::NoUninit;
use cudarc::driver::sys::{self, CUfunction_attribute, CUresult};
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// The largest grid dimension in y and z; in x it is 2³¹ − 1.
pub const MAX_GRID_YZ: usize = 65_535;

/// Builder of one kernel launch.
///
/// ```no_run
/// # use prismgrad::device::cuda::{Gpu, Launch};
/// # fn main() -> prismgrad::Result<()> {
/// let gpu = Gpu::open(0)?;
/// let (x, y) = (gpu.upload(&[1f32; 1000])?, gpu.upload(&[2f32; 1000])?);
/// Launch::new(&gpu, "device_check", "check_axpy_f32")?
///     .grid(4, 1, 1)
///     .block(256)
///     .buf(&x, 0)
///     .buf(&y, 0)
///     .val(0.5f32)
///     .val(1000i64)
///     .run()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a launch does nothing before run()"]
pub struct Launch<'a> {
    gpu: &'a Arc<Gpu>,
    kernel: Kernel,
    grid: [usize; 3],
    block: usize,
    shared: usize,
    stream: Stream,
    cooperative: bool,
    /// The arguments, each at a multiple of 8 bytes.
    words: SmallVec<[u64; 32]>,
    /// Start of each argument in `words`, and its size in bytes.
    starts: SmallVec<[(u32, u32); 24]>,
    /// The blocks that the pointer arguments point into.
    blocks: SmallVec<[&'a Block; 8]>,
    error: Option<Error>,
}

impl<'a> Launch<'a> {
    /// A launch of one block of 256 threads on the compute stream; the other methods change these defaults.
    pub fn new(gpu: &'a Arc<Gpu>, file: &str, name: &str) -> Result<Launch<'a>> {
        Ok(Launch::of(gpu, gpu.kernel(file, name)?))
    }

    /// The same for a kernel that was looked up already.
    pub fn of(gpu: &'a Arc<Gpu>, kernel: Kernel) -> Launch<'a> {
        Launch {
            gpu,
            kernel,
            grid: [1; 3],
            block: 256,
            shared: 0,
            stream: Stream::Compute,
            cooperative: false,
            words: SmallVec::new(),
            starts: SmallVec::new(),
            blocks: SmallVec::new(),
            error: None,
        }
    }

    /// Number of blocks in each dimension. If one of them is zero, `run` does nothing.
    #[inline]
    pub fn grid(mut self, x: usize, y: usize, z: usize) -> Self {
        self.grid = [x, y, z];
        self
    }

    /// Number of blocks in x for `n` elements at `per_block` each, capped at about 16 times what fills the device: for kernels with a
    /// grid-stride loop.
    #[inline]
    pub fn grid_stride(mut self, n: usize, per_block: usize) -> Self {
        let most = self.gpu.multiprocessors() as usize * 128;
        self.grid = [n.div_ceil(per_block.max(1)).min(most.max(1)), 1, 1];
        self
    }

    /// Threads in a block.
    #[inline]
    pub fn block(mut self, threads: usize) -> Self {
        self.block = threads;
        self
    }

    /// Dynamic shared memory in bytes. Above 48 KiB the limit is raised in the driver, once per kernel.
    #[inline]
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }

    /// Launches on another stream. Blocks that belong to a different stream are kept until this launch is done.
    #[inline]
    pub fn on(mut self, stream: Stream) -> Self {
        self.stream = stream;
        self
    }

    /// Cooperative launch: all blocks run at the same time, so that they can wait for each other.
    #[inline]
    pub fn cooperative(mut self) -> Self {
        self.cooperative = true;
        self
    }

    /// A pointer argument: the address `offset` bytes into a block.
    #[inline]
    pub fn buf(mut self, block: &'a Block, offset: usize) -> Self {
        if offset > block.bytes() || block.gpu().ordinal() != self.gpu.ordinal() {
            self.refuse(block, offset);
        }
        self.blocks.push(block);
        self.val(block.ptr() + offset as u64)
    }

    /// A null pointer, for an optional argument.
    #[inline]
    pub fn null(self) -> Self {
        self.val(0u64)
    }

    /// Any plain value: a number, or a struct of them laid out as in C (alignment at most 8).
    #[inline]
    pub fn val<T: NoUninit>(mut self, value: T) -> Self {
        const { assert!(align_of::<T>() <= 8, "arguments of a kernel are aligned to at most 8 bytes") };
        let start = self.words.len();
        self.starts.push((start as u32, size_of::<T>() as u32));
        self.words.resize(start + size_of::<T>().div_ceil(8).max(1), 0);
        let bytes = bytemuck::bytes_of(&value);
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.words[start..])[..bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Keeps an error until [`Launch::run`] returns it.
    pub(crate) fn failed(mut self, e: Error) -> Self {
        self.error.get_or_insert(e);
        self
    }

    /// Records a problem with the next argument; [`Launch::run`] returns it as an error.
    #[cold]
    pub(crate) fn refused(self, why: impl std::fmt::Display) -> Self {
        let e = self.fail(format!("argument {}: {why}", self.starts.len()));
        self.failed(e)
    }

    #[cold]
    fn refuse(&mut self, block: &Block, offset: usize) {
        let why = format!("offset {offset} into a block of {} bytes on cuda:{}", block.bytes(), block.gpu().ordinal());
        self.error = Some(Error::device(self.describe(), format!("argument {}: {why}", self.starts.len())));
    }

    fn describe(&self) -> String {
        let [x, y, z] = self.grid;
        format!(
            "launch {} ({}) on cuda:{}, grid {x}×{y}×{z}, {} threads, {} bytes of dynamic shared memory",
            self.kernel.name(),
            self.kernel.0.text,
            self.gpu.ordinal(),
            self.block,
            self.shared
        )
    }

    #[cold]
    fn fail(&self, why: impl std::fmt::Display) -> Error {
        Error::device(self.describe(), why)
    }

    fn validate(&self) -> Result<()> {
        let [x, y, z] = self.grid;
        if x > i32::MAX as usize || y > MAX_GRID_YZ || z > MAX_GRID_YZ {
            return Err(self.fail("the grid may have 2147483647 × 65535 × 65535 blocks"));
        }
        if self.block == 0 || self.block > 1024 {
            return Err(self.fail("a block may have 1 to 1024 threads"));
        }
        if self.shared > self.gpu.shared_limit() {
            return Err(self.fail(format!("a block of this GPU may have {} bytes", self.gpu.shared_limit())));
        }
        if self.kernel.0.ordinal != self.gpu.ordinal() {
            return Err(self.fail(format!("the kernel was loaded for cuda:{}", self.kernel.0.ordinal)));
        }
        if let Some(parameters) = &self.kernel.0.parameters {
            let given: SmallVec<[u32; 24]> = self.starts.iter().map(|s| s.1).collect();
            if given[..] != parameters[..] {
                return Err(self.fail(format!(
                    "the kernel has {} parameters of {parameters:?} bytes, the launch {} arguments of {given:?}",
                    parameters.len(),
                    given.len()
                )));
            }
        }
        Ok(())
    }

    /// Queues the launch. Errors of the kernel itself appear at a later call, unless `PRISMGRAD_CUDA_SYNC=1`.
    pub fn run(mut self) -> Result<()> {
        if let Some(e) = self.error.take() {
            return Err(e);
        }
        if self.grid.contains(&0) {
            return Ok(());
        }
        self.validate()?;
        let (gpu, info) = (self.gpu, self.kernel.0);
        gpu.bind()?;
        if self.shared > info.shared.load(Relaxed) {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function of this context.
            match unsafe { sys::cuFuncSetAttribute(info.function, attribute, self.shared as i32) } {
                CUresult::CUDA_SUCCESS => info.shared.fetch_max(self.shared, Relaxed),
                code => return Err(self.fail(format!("more shared memory than it can have: {}", describe(code)))),
            };
        }
        let base = self.words.as_mut_ptr();
        // SAFETY: every start is inside `words`.
        let mut arguments: SmallVec<[*mut core::ffi::c_void; 24]> =
            self.starts.iter().map(|s| unsafe { base.add(s.0 as usize) }.cast()).collect();
        let [x, y, z] = self.grid.map(|d| d as u32);
        let (threads, shared, stream) = (self.block as u32, self.shared as u32, gpu.raw_stream(self.stream));
        // SAFETY: the handles are of this context; the driver copies the arguments before it returns. The op's launch code is responsible
        // for passing what the kernel's parameters expect and for its accesses staying inside the blocks; the emulator checks both. Blocks
        // dropped after this call are not reused before the kernel has run.
        let timed = spans::before_kernel(gpu, self.stream);
        let code = unsafe {
            if self.cooperative {
                sys::cuLaunchCooperativeKernel(
                    info.function,
                    x,
                    y,
                    z,
                    threads,
                    1,
                    1,
                    shared,
                    stream,
                    arguments.as_mut_ptr(),
                )
            } else {
                let none = std::ptr::null_mut();
                sys::cuLaunchKernel(info.function, x, y, z, threads, 1, 1, shared, stream, arguments.as_mut_ptr(), none)
            }
        };
        if code != CUresult::CUDA_SUCCESS {
            return gpu.check(&self.describe(), code);
        }
        spans::after_kernel(gpu, self.stream, self.kernel.name(), timed);
        count(&gpu.counters.launches);
        gpu.modules.launched(self.kernel);
        for block in &self.blocks {
            block.record_use(self.stream)?;
        }
        if gpu.sync_each && !gpu.is_capturing() {
            // This wait serves only to locate faults, so it is not among the counted waits.
            // SAFETY: our stream.
            gpu.check(&self.describe(), unsafe { sys::cuStreamSynchronize(stream) })?;
        }
        Ok(())
    }
}
