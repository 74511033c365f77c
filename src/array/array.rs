//! The strided array.

use super::{cuda as gpu_ops, elementwise};
use crate::array::shape;
use crate::array::shape::{Dims, Nest};
use crate::array::storage::Storage;
use crate::base::dtype::{DType, Element, of_bf16, to_bf16};
use crate::base::{Error, Result};
use crate::device::Device;
use crate::device::cpu::par;
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::device::cuda::{Block, Gpu};
use crate::with_dtype;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Shape, strides and dtype over shared storage. Views (transpose, slice, expand) share the storage. Writing copies the storage first
/// unless this handle is its only one, so that no other handle sees its values change.
#[derive(Clone)]
pub struct Array {
    storage: Storage,
    dtype: DType,
    shape: Dims,
    strides: Dims,
    offset: usize,
}

/// Element type and device of a new array: made from `DType::F32` for the CPU, or from `(DType::F32, &device)` for any device.
#[derive(Clone, Debug)]
pub struct ArrayOptions {
    /// Element type.
    pub dtype: DType,
    /// The device on which it is created.
    pub device: Device,
}

impl From<DType> for ArrayOptions {
    fn from(dtype: DType) -> ArrayOptions {
        ArrayOptions { dtype, device: Device::Cpu }
    }
}

impl From<(DType, &Device)> for ArrayOptions {
    fn from((dtype, device): (DType, &Device)) -> ArrayOptions {
        ArrayOptions { dtype, device: device.clone() }
    }
}

impl From<(DType, &Arc<Gpu>)> for ArrayOptions {
    fn from((dtype, gpu): (DType, &Arc<Gpu>)) -> ArrayOptions {
        ArrayOptions { dtype, device: Device::Cuda(gpu.clone()) }
    }
}

impl Array {
    // ---- construction ----

    /// An array on the CPU with unspecified contents; the caller writes every element.
    pub(crate) fn uninit(shape: &[usize], dtype: DType) -> Array {
        Array::over(Storage::cpu(shape::bytes(shape, dtype.size())), shape, dtype)
    }
    /// The same on a GPU.
    pub(crate) fn uninit_on(gpu: &Arc<Gpu>, shape: &[usize], dtype: DType) -> Result<Array> {
        Ok(Array::over(Storage::cuda(gpu, shape::bytes(shape, dtype.size()))?, shape, dtype))
    }
    /// Uninitialised memory on a device, for an array whose every element is written next.
    pub(crate) fn uninit_at(device: &Device, shape: &[usize], dtype: DType) -> Result<Array> {
        match device.gpu() {
            Some(gpu) => Array::uninit_on(gpu, shape, dtype),
            None => Ok(Array::uninit(shape, dtype)),
        }
    }
    fn over(storage: Storage, shape: &[usize], dtype: DType) -> Array {
        Array { storage, dtype, shape: shape.into(), strides: shape::contiguous_strides(shape), offset: 0 }
    }
    /// An array of zeros. `at` is the element type, such as `DType::F32`, or the element type and a device, `(DType::F32, &device)`, as in
    /// every function of this kind. If a GPU runs out of memory here, the first use of the array returns the error.
    pub fn zeros(shape: &[usize], at: impl Into<ArrayOptions>) -> Array {
        let ArrayOptions { dtype, device } = at.into();
        let bytes = shape::bytes(shape, dtype.size());
        match device.gpu() {
            None => Array::over(Storage::Cpu(Arc::new(Buffer::zeroed(bytes))), shape, dtype),
            Some(gpu) => Array::made(gpu, shape, dtype, || {
                let a = Array::uninit_on(gpu, shape, dtype)?;
                let (block, at) = a.block("zeros")?;
                if bytes > 0 { gpu.fill(block, at, bytes, 0) } else { Ok(()) }?;
                Ok(a)
            }),
        }
    }
    /// An array whose elements all equal `value`, rounded to the element type.
    pub fn full(shape: &[usize], value: f64, at: impl Into<ArrayOptions>) -> Array {
        let ArrayOptions { dtype, device } = at.into();
        if let Some(gpu) = device.gpu() {
            return Array::made(gpu, shape, dtype, || gpu_ops::full(gpu, shape, value, dtype));
        }
        let mut a = Array::uninit(shape, dtype);
        with_dtype!(dtype, |T| a.fresh_mut::<T>().fill(T::from_f64(value)));
        a
    }
    /// An array of ones.
    pub fn ones(shape: &[usize], at: impl Into<ArrayOptions>) -> Array {
        Array::full(shape, 1.0, at)
    }
    /// A scalar (no dimensions).
    pub fn scalar(value: f64, at: impl Into<ArrayOptions>) -> Array {
        Array::full(&[], value, at)
    }
    /// Copies a slice, row-major. Fails if the length is not the product of `shape`.
    pub fn from_slice<T: Element>(data: &[T], shape: &[usize]) -> Result<Array> {
        if data.len() != shape::numel(shape) {
            return Err(Error::shape(
                "from_slice",
                format!("{} elements given for shape {shape:?}, which has {}", data.len(), shape::numel(shape)),
            ));
        }
        let mut a = Array::uninit(shape, T::DTYPE);
        a.fresh_mut::<T>().copy_from_slice(data);
        Ok(a)
    }
    /// The numbers 0, 1, … n−1.
    pub fn arange(n: usize, at: impl Into<ArrayOptions>) -> Array {
        let ArrayOptions { dtype, device } = at.into();
        match device.gpu() {
            Some(gpu) if matches!(dtype, DType::F32 | DType::F64 | DType::U32 | DType::I64) => {
                Array::made(gpu, &[n], dtype, || gpu_ops::arange(gpu, n, dtype))
            }
            _ => Array::generate(&[n], (dtype, &device), |i| i as f64),
        }
    }
    /// The array whose element `i` (row-major) is `f(i)`, rounded to the element type. The values are computed on the CPU.
    pub fn generate(shape: &[usize], at: impl Into<ArrayOptions>, f: impl Fn(usize) -> f64) -> Array {
        let ArrayOptions { dtype, device } = at.into();
        let mut a = Array::uninit(shape, dtype);
        with_dtype!(dtype, |T| a.fresh_mut::<T>().iter_mut().enumerate().for_each(|(i, x)| *x = T::from_f64(f(i))));
        match device.gpu() {
            Some(gpu) => Array::made(gpu, shape, dtype, || a.to(&device)),
            None => a,
        }
    }
    /// The array that `make` returns; if it fails, an array in its place whose first use returns the error.
    fn made(gpu: &Arc<Gpu>, shape: &[usize], dtype: DType, make: impl FnOnce() -> Result<Array>) -> Array {
        make().unwrap_or_else(|e| Array::over(Storage::failed(gpu, &e), shape, dtype))
    }
    /// An array from little-endian bytes, row-major, as in safetensors.
    pub fn from_bytes(bytes: &[u8], shape: &[usize], dtype: DType) -> Result<Array> {
        let want = shape::numel(shape).saturating_mul(dtype.size());
        if bytes.len() != want {
            return Err(Error::shape(
                "from_bytes",
                format!("{} bytes given, {shape:?} {dtype} needs {want}", bytes.len()),
            ));
        }
        let mut a = Array::uninit(shape, dtype);
        a.fresh_mut_bytes().copy_from_slice(bytes);
        Ok(a)
    }

    // ---- properties and reading ----

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Steps between neighbours along each dimension, in elements; 0 along an expanded dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        shape::numel(&self.shape)
    }
    /// Whether the elements are row-major without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut want = 1;
        for d in (0..self.rank()).rev() {
            if self.shape[d] != 1 && self.strides[d] != want {
                return self.numel() == 0;
            }
            want *= self.shape[d];
        }
        true
    }
    /// Whether this handle is the only one on its storage.
    pub(crate) fn is_unique(&mut self) -> bool {
        self.storage.is_unique()
    }
    /// The device it is on.
    pub fn device(&self) -> Device {
        self.storage.device()
    }
    /// The GPU it is on, if any.
    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.storage.gpu()
    }
    /// The GPU memory block of this array and the offset of its first byte; the error names the op that needed it on a GPU.
    pub(crate) fn block(&self, op: &str) -> Result<(&Block, usize)> {
        Ok((self.storage.block(op)?, self.offset * self.dtype.size()))
    }
    /// The same values on another device; nothing is copied if they are there already. A transfer from a GPU to the CPU waits for the GPU;
    /// a transfer to a GPU does not wait.
    pub fn to(&self, device: &Device) -> Result<Array> {
        if self.device() == *device {
            return Ok(self.clone());
        }
        match (device, &self.storage) {
            (Device::Cuda(gpu), Storage::Cpu(_)) => {
                let a = self.contiguous();
                let block = with_dtype!(a.dtype, |T| gpu.upload(&a.raw::<T>()?[..a.numel()]))?;
                Ok(Array::over(Storage::Cuda(Arc::new(block)), &a.shape, a.dtype))
            }
            (Device::Cpu, Storage::Cuda(_) | Storage::Failed(_)) => {
                let a = self.contiguous();
                let (block, at) = a.block("to")?;
                let mut out = Array::uninit(&a.shape, a.dtype);
                let bytes = a.numel() * a.dtype.size();
                block.gpu().download_into(block, at, &mut out.fresh_mut_bytes()[..bytes])?;
                Ok(out)
            }
            // Between two GPUs, the copy goes through the host.
            _ => self.to(&Device::Cpu)?.to(device),
        }
    }
    /// Whether both are views of the same storage at the same place.
    pub(crate) fn same_storage(&self, other: &Array) -> bool {
        self.storage.same(&other.storage) && self.offset == other.offset
    }
    /// The elements of a contiguous array. Fails on another dtype or a strided view: call [`Array::contiguous`] first.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.expect_dtype::<T>("as_slice")?;
        if !self.is_contiguous() {
            return Err(Error::shape("as_slice", "the array is a strided view; call .contiguous() first"));
        }
        Ok(&self.raw::<T>()?[..self.numel()])
    }
    /// The storage from this array's first element on, for strided loops on the CPU.
    pub(crate) fn raw<T: Element>(&self) -> Result<&[T]> {
        debug_assert_eq!(T::DTYPE, self.dtype);
        if self.numel() == 0 {
            return Ok(&[]);
        }
        Ok(&self.storage.host()?.as_slice::<T>()[self.offset..])
    }
    /// The values on the CPU, for functions that cannot return an error: if the GPU fails, this panics; `to_vec` returns the error instead.
    fn here<T: Element>(&self) -> Vec<T> {
        self.to_vec::<T>().unwrap_or_else(|e| panic!("{e}"))
    }
    /// The elements, row-major.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype::<T>("to_vec")?;
        Ok(self.to(&Device::Cpu)?.contiguous().as_slice::<T>()?.to_vec())
    }
    /// The elements converted to f64, row-major.
    pub fn to_f64(&self) -> Vec<f64> {
        with_dtype!(self.dtype, |T| self.here::<T>().iter().map(|x| x.to_f64()).collect())
    }
    /// The value of an array with one element.
    pub fn item(&self) -> Result<f64> {
        if self.numel() != 1 {
            return Err(Error::shape("item", format!("{:?} has {} elements, not one", self.shape, self.numel())));
        }
        with_dtype!(self.dtype, |T| Ok(self.to_vec::<T>()?[0].to_f64()))
    }
    /// Little-endian bytes, row-major.
    pub fn to_bytes(&self) -> Vec<u8> {
        with_dtype!(self.dtype, |T| bytemuck::cast_slice(&self.here::<T>()).to_vec())
    }
    fn expect_dtype<T: Element>(&self, op: &'static str) -> Result<()> {
        if T::DTYPE == self.dtype {
            Ok(())
        } else {
            Err(Error::dtype(op, format!("asked for {}, the array holds {}; use .cast()", T::DTYPE, self.dtype)))
        }
    }

    // ---- writing ----

    /// The elements for writing, row-major; copies first if the storage is shared or strided.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype::<T>("as_mut_slice")?;
        self.storage.host()?;
        self.make_unique();
        let (n, o) = (self.numel(), self.offset);
        let buffer = self.storage.cpu_mut().ok_or_else(|| Error::invalid("as_mut_slice", "storage is shared"))?;
        Ok(&mut buffer.as_mut_slice::<T>()[o..o + n])
    }
    /// Copies `src` (of this dtype) over the elements from index `at` on, row-major, on the device of this array; if the storage is shared,
    /// it is copied first.
    pub fn write(&mut self, at: usize, src: &Array) -> Result<()> {
        if src.dtype != self.dtype || at.checked_add(src.numel()).is_none_or(|end| end > self.numel()) {
            return Err(Error::shape(
                "write",
                format!("{:?} {} at {at} of {:?} {}", src.shape, src.dtype, self.shape, self.dtype),
            ));
        }
        self.own()?;
        let (src, size) = (src.to(&self.device())?.contiguous(), self.dtype.size());
        if let Some(gpu) = self.gpu() {
            let ((to, to_at), (from, from_at)) = (self.block("write")?, src.block("write")?);
            return gpu.copy(to, to_at + at * size, from, from_at, src.numel() * size);
        }
        with_dtype!(self.dtype, |T| {
            self.as_mut_slice::<T>()?[at..at + src.numel()].copy_from_slice(src.as_slice::<T>()?)
        });
        Ok(())
    }
    /// Copies the values of `src`, of this shape and dtype, into this array's GPU memory in place: all handles on that memory see the new
    /// values. It supplies the inputs of a captured step. Fails on the CPU, and on a strided view.
    pub fn refill(&self, src: &Array) -> Result<()> {
        let (block, at) = self.block("refill")?;
        if src.shape != self.shape || src.dtype != self.dtype || !self.is_contiguous() {
            return Err(Error::shape(
                "refill",
                format!("{:?} {} into a contiguous {:?} {}", src.shape, src.dtype, self.shape, self.dtype),
            ));
        }
        let src = src.contiguous();
        match src.block("refill") {
            Ok((from, from_at)) => block.gpu().copy(block, at, from, from_at, src.numel() * src.dtype.size()),
            Err(_) => with_dtype!(src.dtype, |T| block.gpu().upload_into(block, at, src.as_slice::<T>()?)),
        }
    }
    /// The address of the first element in GPU memory.
    pub(crate) fn address(&self) -> Result<u64> {
        self.block("address").map(|(b, at)| b.ptr() + at as u64)
    }
    /// Makes this handle the only one on its storage, contiguous and on the same device, by a copy if necessary.
    pub(crate) fn own(&mut self) -> Result<()> {
        if !self.is_contiguous() || !self.is_unique() {
            *self = match self.gpu() {
                Some(gpu) => gpu_ops::copy(gpu, self)?,
                None => self.copy(),
            };
        }
        Ok(())
    }
    /// Moves the array to the CPU, unshared and contiguous.
    pub(crate) fn make_unique(&mut self) {
        if !self.is_contiguous() {
            *self = self.contiguous();
        }
        if !self.is_unique() {
            *self = self.copy();
        }
    }
    /// The elements of an array created just before, known to be unshared and contiguous.
    pub(crate) fn fresh_mut<T: Element>(&mut self) -> &mut [T] {
        debug_assert_eq!(T::DTYPE, self.dtype);
        let n = shape::numel(&self.shape);
        match self.storage.cpu_mut() {
            Some(b) => &mut b.as_mut_slice::<T>()[self.offset..self.offset + n],
            None => &mut [],
        }
    }
    fn fresh_mut_bytes(&mut self) -> &mut [u8] {
        match self.storage.cpu_mut() {
            Some(b) => b.as_mut_slice::<u8>(),
            None => &mut [],
        }
    }
    /// Adds `other` (same shape and dtype) in place where this storage is unshared, into a new array otherwise.
    pub(crate) fn add_in_place(&mut self, other: &Array) -> Result<()> {
        if self.shape != other.shape || self.dtype != other.dtype {
            return Err(Error::shape(
                "accumulate",
                format!("{:?} {} and {:?} {} differ", self.shape, self.dtype, other.shape, other.dtype),
            ));
        }
        if let Some(gpu) = self.gpu().cloned() {
            return gpu_ops::add_in_place(&gpu, self, other);
        }
        self.make_unique();
        with_dtype!(self.dtype, |T| {
            let other = other.contiguous();
            let src = &other.raw::<T>()?[..other.numel()];
            elementwise::add_assign(self.as_mut_slice::<T>()?, src);
        });
        Ok(())
    }

    // ---- views ----

    /// The same storage with the dimensions in another order.
    pub fn permute(&self, order: &[usize]) -> Result<Array> {
        let mut seen = vec![false; self.rank()];
        let ok = order.len() == self.rank()
            && order.iter().all(|&d| d < seen.len() && !std::mem::replace(&mut seen[d], true));
        if !ok {
            return Err(Error::shape("permute", format!("{order:?} is not an order of {} dimensions", self.rank())));
        }
        let mut a = self.clone();
        a.shape = order.iter().map(|&d| self.shape[d]).collect();
        a.strides = order.iter().map(|&d| self.strides[d]).collect();
        Ok(a)
    }
    /// Exchanges two dimensions; negative numbers count from the end.
    pub fn transpose(&self, a: isize, b: isize) -> Result<Array> {
        let (a, b) = (shape::dim("transpose", a, self.rank())?, shape::dim("transpose", b, self.rank())?);
        let mut out = self.clone();
        out.shape.swap(a, b);
        out.strides.swap(a, b);
        Ok(out)
    }
    /// The elements `range` of dimension `d`, as a view.
    pub fn slice(&self, d: isize, range: Range<usize>) -> Result<Array> {
        let d = shape::dim("slice", d, self.rank())?;
        if range.start > range.end || range.end > self.shape[d] {
            return Err(Error::shape("slice", format!("{range:?} of dimension {d} with size {}", self.shape[d])));
        }
        let mut a = self.clone();
        a.shape[d] = range.len();
        // An empty view keeps offset 0: the computed offset could be past the end of an empty block.
        if a.numel() > 0 {
            a.offset += range.start * a.strides[d];
        }
        Ok(a)
    }
    /// Every `step`-th element of dimension `d`, as a view.
    pub fn step(&self, d: isize, step: usize) -> Result<Array> {
        let d = shape::dim("step", d, self.rank())?;
        if step == 0 {
            return Err(Error::invalid("step", "a step of 0; use 1 or more"));
        }
        let mut a = self.clone();
        a.shape[d] = a.shape[d].div_ceil(step);
        a.strides[d] *= step;
        Ok(a)
    }
    /// Repeats along dimensions of size 1 (and new leading ones) without a copy.
    pub fn expand(&self, shape: &[usize]) -> Result<Array> {
        let strides = shape::broadcast_strides("expand", &self.shape, &self.strides, shape)?;
        Ok(Array { shape: shape.into(), strides, ..self.clone() })
    }
    /// Another shape with the same number of elements; shares storage where the strides allow it, copies otherwise.
    pub fn reshape(&self, shape: &[usize]) -> Result<Array> {
        if shape::numel(shape) != self.numel() {
            return Err(Error::shape(
                "reshape",
                format!("{:?} has {} elements, {shape:?} has {}", self.shape, self.numel(), shape::numel(shape)),
            ));
        }
        if let Some(strides) = self.view_strides(shape) {
            return Ok(Array { shape: shape.into(), strides, ..self.clone() });
        }
        let mut a = self.contiguous();
        a.strides = shape::contiguous_strides(shape);
        a.shape = shape.into();
        Ok(a)
    }
    /// Strides that let `shape` be a view of this array, if there are any.
    fn view_strides(&self, shape: &[usize]) -> Option<Dims> {
        if self.is_contiguous() {
            return Some(shape::contiguous_strides(shape));
        }
        // Merge the old dimensions that run together, then cut each merged run into new dimensions.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for d in 0..self.rank() {
            let (size, stride) = (self.shape[d], self.strides[d]);
            if size == 1 {
                continue;
            }
            match runs.last_mut() {
                Some((s, st)) if *st == stride * size => {
                    *s *= size;
                    *st = stride;
                }
                _ => runs.push((size, stride)),
            }
        }
        let mut strides: Dims = smallvec::smallvec![1; shape.len()];
        let mut d = shape.len();
        for &(size, stride) in runs.iter().rev() {
            let (mut left, mut step) = (size, stride);
            while left > 1 {
                d = d.checked_sub(1)?;
                if left % shape[d] != 0 {
                    return None;
                }
                strides[d] = step;
                step *= shape[d];
                left /= shape[d];
            }
        }
        Some(strides)
    }
    /// Inserts a dimension of size 1 at `d`.
    pub fn unsqueeze(&self, d: isize) -> Result<Array> {
        let d = shape::dim("unsqueeze", d, self.rank() + 1)?;
        let mut a = self.clone();
        a.shape.insert(d, 1);
        a.strides.insert(d, 0);
        Ok(a)
    }
    /// Removes dimension `d`, of size 1.
    pub fn squeeze(&self, d: isize) -> Result<Array> {
        let d = shape::dim("squeeze", d, self.rank())?;
        if self.shape[d] != 1 {
            return Err(Error::shape("squeeze", format!("dimension {d} of {:?} is not 1", self.shape)));
        }
        let mut a = self.clone();
        a.shape.remove(d);
        a.strides.remove(d);
        Ok(a)
    }
    /// The same values with row-major strides; copies only if needed.
    pub fn contiguous(&self) -> Array {
        if self.is_contiguous() {
            let mut a = self.clone();
            a.strides = shape::contiguous_strides(&a.shape);
            a
        } else {
            self.copy()
        }
    }
    /// A new row-major copy on the same device.
    pub fn copy(&self) -> Array {
        if let Some(gpu) = self.gpu() {
            return Array::made(gpu, &self.shape, self.dtype, || gpu_ops::copy(gpu, self));
        }
        let mut out = Array::uninit(&self.shape, self.dtype);
        with_dtype!(self.dtype, |T| self.copy_to::<T, T>(out.fresh_mut::<T>(), |x| x));
        out
    }
    /// The values converted to `dtype`: rounded to nearest even for floats, truncated for integers.
    pub fn cast(&self, dtype: DType) -> Array {
        if dtype == self.dtype {
            return self.clone();
        }
        if let Some(gpu) = self.gpu() {
            return Array::made(gpu, &self.shape, dtype, || gpu_ops::cast(gpu, self, dtype));
        }
        let mut out = Array::uninit(&self.shape, dtype);
        match (self.dtype, dtype) {
            (DType::F32, DType::BF16) => self.copy_to(out.fresh_mut(), to_bf16),
            (DType::BF16, DType::F32) => self.copy_to(out.fresh_mut(), of_bf16),
            _ => with_dtype!(self.dtype, |S| with_dtype!(dtype, |D| {
                self.copy_to::<S, D>(out.fresh_mut::<D>(), |x| D::from_f64(x.to_f64()))
            })),
        }
        out
    }
    fn copy_to<S: Element, D: Element>(&self, out: &mut [D], f: impl Fn(S) -> D + Sync + Copy) {
        if out.is_empty() {
            return;
        }
        let Ok(src) = self.raw::<S>() else { return };
        let nest = Nest::new(&self.shape, [&self.strides]);
        let n = nest.inner;
        let out = Shared::new(out);
        par::par_chunks(nest.rows() * n, 1 << 15, |range| {
            // A chunk may begin and end inside a run.
            let mut at = range.start;
            while at < range.end {
                let (row, col) = (at / n, at % n);
                let len = (n - col).min(range.end - at);
                let [o] = nest.offsets(row);
                // SAFETY: chunks are disjoint ranges of `out`.
                let dst = unsafe { out.slice(at..at + len) };
                if nest.step[0] == 1 {
                    let src = &src[o + col..o + col + len];
                    simd(
                        #[inline(always)]
                        || dst.iter_mut().zip(src).for_each(|(d, &s)| *d = f(s)),
                    );
                } else {
                    let base = o + col * nest.step[0];
                    dst.iter_mut().enumerate().for_each(|(i, d)| *d = f(src[base + i * nest.step[0]]));
                }
                at += len;
            }
        });
    }
    /// Whether two float arrays agree: |a − b| ≤ atol + rtol·|b| everywhere, and no NaN in either.
    pub fn all_close(&self, other: &Array, rtol: f64, atol: f64) -> bool {
        self.shape == other.shape
            && self.to_f64().iter().zip(other.to_f64()).all(|(a, b)| (a - b).abs() <= atol + rtol * b.abs())
    }
}

impl AsRef<Array> for Array {
    fn as_ref(&self) -> &Array {
        self
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.to_f64();
        let shown: Vec<String> = v.iter().take(8).map(|x| format!("{x:.5}")).collect();
        let more = if v.len() > 8 { ", …" } else { "" };
        write!(f, "Array{:?} {} [{}{more}]", &self.shape[..], self.dtype, shown.join(", "))
    }
}
