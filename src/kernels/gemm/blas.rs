//! Large plain products by cuBLASLt, if it is installed. The crate's own kernel (`cuda/gemm.cu`) computes everything else, and everything
//! if cuBLASLt is missing.
//!
//! The library is searched at the first product that would use it, in the same places as NVRTC: the file or folder named by
//! `PRISMGRAD_CUBLASLT` (`off` disables it), the dynamic loader's path, the wheels of the active Python environment, a toolkit. Before it
//! is used, four small products of each dtype are compared with those of the crate's own kernel; a library that disagrees is not used and
//! is named on standard error. Which products use it depends on their sizes and strides alone. An algorithm is chosen once per shape and
//! must reduce in a fixed order, so that two runs have the same bits.
//!
//! Built with the feature `cublas-sys`, f32 products without bias go to the cuBLAS linked at build time instead.

use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::cuda::library::{Missing, Wanted};
use crate::device::cuda::{Block, Gpu, Stream, Tag, TagScope, lock};
use crate::kernels::gemm::cuda::RowWeights;
use libloading::Library;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr::{from_mut, from_ref, null_mut};
use std::sync::{Arc, Mutex, OnceLock};

type Handle = *mut c_void;

/// An algorithm and its requirements: `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Found {
    algo: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// The cuBLASLt functions used here.
struct Functions {
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    desc: unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int,
    set_desc: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
    layout: unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int,
    set_layout: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
    preference: unsafe extern "C" fn(*mut Handle) -> c_int,
    set_preference: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int,
    heuristic: unsafe extern "C" fn(
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        Handle,
        c_int,
        *mut Found,
        *mut c_int,
    ) -> c_int,
    #[allow(clippy::type_complexity)]
    matmul: unsafe extern "C" fn(
        Handle,
        Handle,
        *const c_void,
        *const c_void,
        Handle,
        *const c_void,
        Handle,
        *const c_void,
        *const c_void,
        Handle,
        *mut c_void,
        Handle,
        *const [u64; 8],
        *mut c_void,
        usize,
        *mut c_void,
    ) -> c_int,
}

// Constants of cublasLt.h.
const TRANSA: c_int = 3;
const TRANSB: c_int = 4;
const EPILOGUE: c_int = 7;
const BIAS_POINTER: c_int = 8;
const EPILOGUE_BIAS: c_int = 4;
const BATCH_COUNT: c_int = 5;
const BATCH_STEP: c_int = 6;
const MAX_WORKSPACE: c_int = 1;
const REDUCTION_SCHEMES: c_int = 3;
/// Reduction scheme: the sums of split contractions are added through the workspace, in the type they are computed in, in a fixed order.
const REDUCE_IN_ORDER: u32 = 2;
const MIN_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];

const ALIGNMENT: usize = 16;
const WORKSPACE: usize = 32 << 20;
/// Below this many multiply-adds the launch dominates a product, and the crate's own kernel can fuse the activation.
const WORTH_IT: usize = 1 << 24;

/// The state of one GPU.
#[derive(Default)]
pub(crate) struct Blas(OnceLock<Option<Lt>>);

struct Lt {
    f: Functions,
    handle: Handle,
    workspace: Block,
    plans: Mutex<HashMap<Product, Option<Plan>>>,
}
// SAFETY: the handle may be used from any thread; descriptors are used under the lock of `plans`.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

/// A row-major operand in cuBLAS's terms: its leading dimension, and whether its rows are contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Operand {
    turned: bool,
    ld: usize,
    step: usize,
}

/// The properties of a product that determine its plan.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Product {
    dtype: DType,
    sizes: [usize; 3],
    batch: usize,
    a: Operand,
    b: Operand,
    out_step: usize,
    bias: bool,
}

struct Plan {
    desc: Handle,
    /// Layouts of B, A, C: cuBLAS is column-major, so row-major matrices are its transposes and the operands are exchanged.
    layouts: [Handle; 3],
    algo: [u64; 8],
    workspace: usize,
}

fn operand(x: &Array, batch: usize) -> Option<Operand> {
    let r = x.rank() - 2;
    let (rows, cols) = (x.shape()[r], x.shape()[r + 1]);
    let (rs, cs) = (x.strides()[r], x.strides()[r + 1]);
    let step = batch_step(x, batch)?;
    let plain = (cs == 1 || cols == 1) && (rs >= cols || rows == 1);
    let turned = (rs == 1 || rows == 1) && (cs >= rows || cols == 1);
    match (plain, turned) {
        (true, _) => Some(Operand { turned: false, ld: rs.max(cols), step }),
        (_, true) => Some(Operand { turned: true, ld: cs.max(rows), step }),
        _ => None,
    }
}

/// The stride between the matrices of a batch, if one stride covers all of them.
fn batch_step(x: &Array, batch: usize) -> Option<usize> {
    let r = x.rank() - 2;
    if batch <= 1 {
        return Some(0);
    }
    let leading = || (0..r).filter(|&d| x.shape()[d] > 1);
    let last = leading().next_back()?;
    let mut run = x.strides()[last] * x.shape()[last];
    for d in leading().rev().skip(1) {
        if x.strides()[d] != run {
            return None;
        }
        run = x.strides()[d] * x.shape()[d];
    }
    Some(x.strides()[last])
}

fn data_type(dtype: DType) -> Option<(c_int, c_int, c_int)> {
    // Types of the matrices, of the sums, and of α and β.
    match dtype {
        DType::F32 => Some((0, 68, 0)),
        DType::F64 => Some((1, 70, 1)),
        DType::F16 => Some((2, 68, 0)),
        DType::BF16 => Some((14, 68, 0)),
        _ => None,
    }
}

fn aligned(x: &Array) -> Result<bool> {
    let (block, at) = x.block("matmul")?;
    Ok((block.ptr() as usize + at).is_multiple_of(ALIGNMENT))
}

/// Computes out = a·b (+ bias per column), or out += a·b, by cuBLASLt; returns true if it was queued there. `out […, m, n]` is contiguous.
pub(crate) fn product(
    gpu: &Arc<Gpu>,
    a: &Array,
    b: &Array,
    out: &Array,
    bias: Option<&Array>,
    weights: Option<&RowWeights>,
    accumulate: bool,
) -> Result<bool> {
    let r = a.rank() - 2;
    let (m, k, n) = (a.shape()[r], a.shape()[r + 1], b.shape()[r + 1]);
    let batch: usize = a.shape()[..r].iter().product();
    if weights.is_some() || m * n * k * batch < WORTH_IT {
        return Ok(false);
    }
    #[cfg(feature = "cublas-sys")]
    if a.dtype() == DType::F32 && batch == 1 && bias.is_none() && !gpu.is_emulated() {
        return linked::product(gpu, a, b, out, accumulate);
    }
    let Some(lt) = slot(gpu).get(gpu)? else { return Ok(false) };
    lt.product(gpu, (a, b, out), bias, accumulate)
}

/// The state of the library on this GPU.
fn slot(gpu: &Gpu) -> &Blas {
    let slot = gpu.products.get_or_init(|| Box::new(Blas::default()));
    slot.downcast_ref().expect("only this file fills the slot")
}

impl Blas {
    fn get(&self, gpu: &Arc<Gpu>) -> Result<Option<&Lt>> {
        if let Some(found) = self.0.get() {
            return Ok(found.as_ref());
        }
        gpu.refuse_in_capture("look for cuBLASLt, which the first large product does")?;
        let lt = match Lt::open(gpu) {
            Ok(lt) => Some(lt),
            Err(None) => None,
            Err(Some(why)) => {
                eprintln!("prismgrad: products are computed by our own kernels. {why}");
                None
            }
        };
        Ok(self.0.get_or_init(|| lt).as_ref())
    }
}

impl Gpu {
    /// Whether large products go to cuBLASLt; searches for the library if that has not been done.
    pub fn uses_cublaslt(self: &Arc<Self>) -> Result<bool> {
        slot(self).get(self).map(|lt| lt.is_some())
    }
}

impl Lt {
    /// Opens the library; `Err(None)` if it is missing or disabled.
    fn open(gpu: &Arc<Gpu>) -> std::result::Result<Lt, Option<Error>> {
        let op = "find cuBLASLt";
        let wanted = Wanted {
            variable: "PRISMGRAD_CUBLASLT",
            start: "libcublasLt.so",
            names: &["libcublasLt.so.13", "libcublasLt.so", "libcublasLt.so.12"],
            wheels: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
        };
        let named = std::env::var_os(wanted.variable).filter(|v| !v.is_empty());
        // The real library does not work on the emulated device.
        if named.as_ref().is_some_and(|v| v == "off") || (named.is_none() && gpu.is_emulated()) {
            return Err(None);
        }
        let f = wanted.find(&[], load).map_err(|missing| match missing {
            Missing::Named(why) => Some(Error::device(op, why)),
            Missing::Nowhere(failed) if failed.is_empty() => None,
            Missing::Nowhere(failed) => Some(Error::device(op, failed.trim_start_matches("; "))),
        })?;
        let mut handle = null_mut();
        gpu.bind()?;
        // SAFETY: a pointer to a local; the context is current.
        check(op, unsafe { (f.create)(&mut handle) })?;
        let workspace = {
            let _tag = TagScope::new(Tag::Workspace);
            gpu.alloc(WORKSPACE)?
        };
        let lt = Lt { f, handle, workspace, plans: Mutex::default() };
        lt.compare(gpu)?;
        Ok(lt)
    }

    /// Compares small products in every dtype and layout with those of the crate's own kernel.
    fn compare(&self, gpu: &Arc<Gpu>) -> Result<()> {
        let there = crate::Device::Cuda(gpu.clone());
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
            for layout in 0..4 {
                let (m, n, k) = (48, 80, 64);
                let make = |rows: usize, cols: usize, turned: bool, seed: usize| -> Result<Array> {
                    let shape = if turned { [cols, rows] } else { [rows, cols] };
                    let x =
                        Array::generate(&shape, dtype, |i| ((i * 37 + seed) % 23) as f64 / 11.5 - 1.0).to(&there)?;
                    if turned { x.transpose(0, 1) } else { Ok(x) }
                };
                let (a, b) = (make(m, k, layout & 1 == 1, 5)?, make(k, n, layout & 2 == 2, 7)?);
                let bias = (layout > 1).then(|| make(1, n, false, 3)?.reshape(&[n])).transpose()?;
                let fresh = || Array::full(&[m, n], 0.5, (dtype, &there));
                let (ours, theirs) = (fresh(), fresh());
                // One of them accumulates into the output.
                let accumulate = layout == 1;
                if !self.product(gpu, (&a, &b, &theirs), bias.as_ref(), accumulate)? {
                    return Err(Error::device("compare cuBLASLt", format!("it has no {dtype} product {m}×{k}×{n}")));
                }
                super::cuda::own(gpu, (&a, &b, &ours), bias.as_ref(), accumulate)?;
                let off = |(x, y): (&f64, &f64)| (x - y).abs() > tolerance * y.abs().max(1.0) || x.is_nan();
                if theirs.to_f64().iter().zip(&ours.to_f64()).any(off) {
                    let why = format!("its {dtype} product in layout {layout} is not our kernel's; please report this");
                    return Err(Error::device("compare cuBLASLt", why));
                }
            }
        }
        Ok(())
    }

    fn product(
        &self,
        gpu: &Arc<Gpu>,
        (a, b, out): (&Array, &Array, &Array),
        bias: Option<&Array>,
        accumulate: bool,
    ) -> Result<bool> {
        let r = a.rank() - 2;
        let (m, k, n) = (a.shape()[r], a.shape()[r + 1], b.shape()[r + 1]);
        let batch: usize = a.shape()[..r].iter().product();
        let (Some(oa), Some(ob), Some(out_step)) = (operand(a, batch), operand(b, batch), batch_step(out, batch))
        else {
            return Ok(false);
        };
        let bias_aligned = bias.map_or(Ok(true), aligned)?;
        if !(aligned(a)? && aligned(b)? && aligned(out)? && bias_aligned) {
            return Ok(false);
        }
        let dtype = a.dtype();
        let key = Product { dtype, sizes: [m, n, k], batch, a: oa, b: ob, out_step, bias: bias.is_some() };
        gpu.bind()?;
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(key) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(self.plan(&key)?),
        };
        let Some(plan) = plan else { return Ok(false) };
        let op = "cublasLtMatmul";
        let at = |x: &Array| x.block("matmul").map(|(block, at)| (block.ptr() + at as u64) as *mut c_void);
        if let Some(bias) = bias {
            let p = at(bias)?;
            // SAFETY: the attribute is a pointer; the descriptor is ours, under the lock.
            check(op, unsafe { (self.f.set_desc)(plan.desc, BIAS_POINTER, from_ref(&p).cast(), size_of_val(&p)) })?;
        }
        let beta = if accumulate { 1.0 } else { 0.0 };
        let (wide, narrow) = ([1.0f64, beta], [1.0f32, beta as f32]);
        let [alpha, beta]: [*const c_void; 2] = match dtype {
            DType::F64 => [from_ref(&wide[0]).cast(), from_ref(&wide[1]).cast()],
            _ => [from_ref(&narrow[0]).cast(), from_ref(&narrow[1]).cast()],
        };
        let [lb, la, lc] = plan.layouts;
        let (pa, pb, pc) = (at(a)?, at(b)?, at(out)?);
        // SAFETY: layouts describe the arrays, whose blocks are used on the compute stream only until they are released to
        // it; scalars are read before the call returns.
        let code = unsafe {
            (self.f.matmul)(
                self.handle,
                plan.desc,
                alpha,
                pb,
                lb,
                pa,
                la,
                beta,
                pc,
                lc,
                pc,
                lc,
                &plan.algo,
                self.workspace.ptr() as *mut c_void,
                plan.workspace,
                gpu.raw_stream(Stream::Compute).cast(),
            )
        };
        check(op, code)?;
        for x in [Some(a), Some(b), Some(out), bias].into_iter().flatten() {
            x.block("matmul")?.0.record_use(Stream::Compute)?;
        }
        crate::device::cuda::count(&gpu.counters.library_products);
        Ok(true)
    }

    /// The library's algorithm for a product, if it has one.
    fn plan(&self, p: &Product) -> Result<Option<Plan>> {
        let op = "plan a product with cuBLASLt";
        let Some((matrix, sums, scale)) = data_type(p.dtype) else { return Ok(None) };
        let [m, n, k] = p.sizes;
        let f = &self.f;
        let (mut desc, mut preference) = (null_mut(), null_mut());
        fn raw<T>(v: &T) -> (*const c_void, usize) {
            (from_ref(v).cast(), size_of::<T>())
        }
        // SAFETY: pointers to locals, attributes of the sizes that cublasLt.h gives them. Descriptors stay with the plan.
        unsafe {
            check(op, (f.desc)(&mut desc, sums, scale))?;
            let set = |attribute: c_int, (v, n): (*const c_void, usize)| check(op, (f.set_desc)(desc, attribute, v, n));
            set(TRANSA, raw(&(p.b.turned as c_int)))?;
            set(TRANSB, raw(&(p.a.turned as c_int)))?;
            if p.bias {
                set(EPILOGUE, raw(&EPILOGUE_BIAS))?;
            }
            let layout = |rows: usize, cols: usize, ld: usize, step: usize| -> Result<Handle> {
                let mut l = null_mut();
                check(op, (f.layout)(&mut l, matrix, rows as u64, cols as u64, ld as i64))?;
                if p.batch > 1 {
                    let (count, step) = (p.batch as c_int, step as i64);
                    let set = |a: c_int, (v, n): (*const c_void, usize)| check(op, (f.set_layout)(l, a, v, n));
                    set(BATCH_COUNT, raw(&count))?;
                    set(BATCH_STEP, raw(&step))?;
                }
                Ok(l)
            };
            let stored = |o: &Operand, rows: usize, cols: usize| {
                let (r, c) = if o.turned { (rows, cols) } else { (cols, rows) };
                layout(r, c, o.ld, o.step)
            };
            let layouts = [stored(&p.b, k, n)?, stored(&p.a, m, k)?, layout(n, m, n, p.out_step)?];
            check(op, (f.preference)(&mut preference))?;
            let prefer = |attribute: c_int, (v, n): (*const c_void, usize)| {
                check(op, (f.set_preference)(preference, attribute, v, n))
            };
            prefer(MAX_WORKSPACE, raw(&WORKSPACE))?;
            prefer(REDUCTION_SCHEMES, raw(&REDUCE_IN_ORDER))?;
            for a in MIN_ALIGNMENTS {
                prefer(a, raw(&(ALIGNMENT as u32)))?;
            }
            let mut found = Found { algo: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
            let mut count = 0;
            let [lb, la, lc] = layouts;
            let code =
                (f.heuristic)(self.handle, desc, lb, la, lc, lc, preference, 1, from_mut(&mut found), &mut count);
            if code != 0 || count == 0 || found.workspace > WORKSPACE {
                return Ok(None);
            }
            Ok(Some(Plan { desc, layouts, algo: found.algo, workspace: found.workspace }))
        }
    }
}

fn check(op: &str, code: c_int) -> Result<()> {
    let what = match code {
        0 => return Ok(()),
        1 => "not initialised",
        3 => "out of memory",
        7 => "an invalid value",
        8 => "not for this GPU",
        13 => "the GPU failed",
        15 => "not supported",
        _ => "cuBLAS failed",
    };
    Err(Error::device(op, format!("{what} (status {code}); PRISMGRAD_CUBLASLT=off does without the library")))
}

fn load(file: &Path) -> std::result::Result<Functions, String> {
    // SAFETY: NVIDIA's library; loading runs only its own start-up code. It is never unloaded, so its functions stay.
    let lib = unsafe { Library::new(file) }.map_err(|e| format!("cannot load {}: {e}", file.display()))?;
    let missing = |e: libloading::Error| format!("{} is not a cuBLASLt of CUDA 12 or later: {e}", file.display());
    macro_rules! get {
        ($name:literal) => {
            // SAFETY: the field's type is that of the function in cublasLt.h.
            *unsafe { lib.get(concat!($name, "\0").as_bytes()) }.map_err(missing)?
        };
    }
    let f = Functions {
        create: get!("cublasLtCreate"),
        desc: get!("cublasLtMatmulDescCreate"),
        set_desc: get!("cublasLtMatmulDescSetAttribute"),
        layout: get!("cublasLtMatrixLayoutCreate"),
        set_layout: get!("cublasLtMatrixLayoutSetAttribute"),
        preference: get!("cublasLtMatmulPreferenceCreate"),
        set_preference: get!("cublasLtMatmulPreferenceSetAttribute"),
        heuristic: get!("cublasLtMatmulAlgoGetHeuristic"),
        matmul: get!("cublasLtMatmul"),
    };
    std::mem::forget(lib);
    Ok(f)
}

/// cuBLAS linked at build time, for single f32 products.
#[cfg(feature = "cublas-sys")]
mod linked {
    use super::*;
    use cublas_sys as sys;

    struct Open(sys::cublasHandle_t);
    // SAFETY: used under the lock.
    unsafe impl Send for Open {}

    pub(super) fn product(gpu: &Arc<Gpu>, a: &Array, b: &Array, out: &Array, accumulate: bool) -> Result<bool> {
        static OPEN: Mutex<Vec<(usize, Open)>> = Mutex::new(Vec::new());
        let op = "cublasSgemm";
        let (Some(oa), Some(ob)) = (operand(a, 1), operand(b, 1)) else { return Ok(false) };
        let r = a.rank() - 2;
        let (m, k, n) = (a.shape()[r], a.shape()[r + 1], b.shape()[r + 1]);
        if [m, k, n, oa.ld, ob.ld].iter().any(|&d| d > c_int::MAX as usize) {
            return Ok(false);
        }
        gpu.bind()?;
        let mut open = lock(&OPEN);
        if !open.iter().any(|(i, _)| *i == gpu.ordinal()) {
            gpu.refuse_in_capture("start cuBLAS, which the first large product does")?;
            let mut handle = null_mut();
            // SAFETY: a pointer to a local; the context is current; the stream is ours.
            unsafe {
                check(op, sys::cublasCreate_v2(&mut handle) as c_int)?;
                check(op, sys::cublasSetStream_v2(handle, gpu.raw_stream(Stream::Compute).cast()) as c_int)?;
            }
            open.push((gpu.ordinal(), Open(handle)));
        }
        let Some((_, handle)) = open.iter().find(|(i, _)| *i == gpu.ordinal()) else { return Ok(false) };
        let at = |x: &Array| x.block("matmul").map(|(block, at)| (block.ptr() + at as u64) as *mut f32);
        let turned = |o: &Operand| match o.turned {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let (alpha, beta) = (1.0f32, if accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: sizes and leading dimensions are the arrays'; cuBLAS is column-major, so that operands change places.
        let code = unsafe {
            sys::cublasSgemm_v2(
                handle.0,
                turned(&ob),
                turned(&oa),
                n as c_int,
                m as c_int,
                k as c_int,
                &alpha,
                at(b)?,
                ob.ld as c_int,
                at(a)?,
                oa.ld as c_int,
                &beta,
                at(out)?,
                n as c_int,
            )
        };
        check(op, code as c_int)?;
        crate::device::cuda::count(&gpu.counters.library_products);
        Ok(true)
    }
}
