//! The emulated CUDA device: the kernels of `cuda/` on the CPU, under the semantics of CUDA, with checks.
//!
//! [`install`] makes it this process's driver; from then on [`Gpu::open`](crate::device::cuda::Gpu::open) finds one
//! device, and everything above it runs as on a card. Out-of-bounds and uninitialised accesses, data races, divergent
//! barriers and deadlocks end a launch with an error that names the place; streams run in an adverse order, and
//! two operations on one buffer that no event orders are reported, under any schedule (for kernels: in the checked build,
//! by the ends of the range that they touched).

use crate::base::{Error, Result};
use libloading::os::unix::{Library, RTLD_NOW, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};

mod compile;

static LIBRARY: OnceLock<Library> = OnceLock::new();

/// Whether the tests are to run on a real card instead: `PRISMGRAD_ON_CARD=1`. Then nothing is installed, schedules
/// cannot be set, and counters are those of this crate.
pub fn on_card() -> bool {
    std::env::var("PRISMGRAD_ON_CARD").is_ok_and(|v| !v.is_empty() && v != "0")
}

/// Makes the emulator this process's libcuda. Call it before anything that looks for a driver; again does nothing.
pub fn install() {
    if on_card() {
        return;
    }
    LIBRARY.get_or_init(|| {
        let path = env!("PRISMGRAD_EMULATOR");
        // SAFETY: our own library; its initialisers only set variables.
        match unsafe { Library::open(Some(path), RTLD_NOW) } {
            Ok(l) => l,
            Err(e) => panic!("the emulator {path} does not load: {e}; build again"),
        }
    });
}

/// Compiles the text of a kernel file that is not this crate's with the host's C++ compiler, and returns what `cuModuleLoadData` of
/// the emulated device takes for an image. What was compiled is kept beside the emulator, by content.
pub(crate) fn compile(name: &str, text: &str) -> Result<Vec<u8>> {
    let list = |flags: &str| flags.split('\u{1f}').map(String::from).collect();
    let library = Path::new(env!("PRISMGRAD_EMULATOR"));
    let compiler = compile::Compiler {
        path: PathBuf::from(env!("PRISMGRAD_EMULATOR_CXX")),
        common: list(env!("PRISMGRAD_EMULATOR_COMMON")),
        kernels: list(env!("PRISMGRAD_EMULATOR_KERNELS")),
        out: library.parent().unwrap_or(Path::new(".")).join("custom"),
    };
    let made = (|| {
        let text_of = |file: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda").join(file);
            std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
        };
        let headers = text_of("prelude.cuh")? + &text_of("emulator/cuemu.h")?;
        // The text is in a folder of its own, so that reports call the file by its name.
        let folder = compiler.out.join(compile::hash(&[name, text]));
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let file = folder.join(format!("{name}.cu"));
        let part = folder.join(format!("{name}-{}.part", std::process::id()));
        std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, &file)).map_err(|e| e.to_string())?;
        let object = compiler.kernel_file(&file, "custom", &headers)?;
        let shared = object.with_extension("so");
        if !shared.exists() {
            let part = object.with_extension(format!("{}.part", std::process::id()));
            let names = [&part, &object, library].map(|p| p.display().to_string());
            let link = ["-shared", "-Wl,-Bsymbolic", "-o"].map(String::from);
            compiler.run(&[&link[..], &names[..]].concat())?;
            std::fs::rename(part, &shared).map_err(|e| format!("{}: {e}", shared.display()))?;
        }
        Ok(format!("cuemu:{}\0", shared.display()).into_bytes())
    })();
    made.map_err(|e: String| Error::device(format!("compile {name}.cu"), e))
}

/// A function of the library.
fn function<T>(name: &str) -> Symbol<T> {
    install();
    let library = LIBRARY.get().expect("installed above");
    // SAFETY: the callers name functions of the library with their types.
    unsafe { library.get(name.as_bytes()) }.unwrap_or_else(|e| panic!("the emulator lacks {name}: {e}"))
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}

/// Sets an option: `seed` (0: in program order; odd and even ones: two kinds of adverse schedules), `check` (0 off,
/// 1 bounds and initialisation, 2 races as well), `preempt` (a switch of threads about every n accesses), `threads`,
/// `strict_exit`, `smem_limit`, `max_reports`, `allocations_left` (that many allocations succeed, later ones find no memory; negative: all
/// succeed).
pub fn config(key: &str, value: i64) {
    if on_card() {
        return;
    }
    let f: Symbol<unsafe extern "C" fn(*const c_char, i64) -> c_int> = function("prismgrad_emu_config");
    // SAFETY: as declared in driver.cpp.
    assert_eq!(unsafe { f(c(key).as_ptr(), value) }, 0, "the emulator has no option {key}");
}

/// A counter of the driver: `launches`, `allocations`, `synchronisations`, `uploads`, `downloads`.
pub fn stat(key: &str) -> u64 {
    if on_card() {
        let c = crate::device::cuda::Gpu::open(0).map(|gpu| gpu.counts()).unwrap_or_default();
        return match key {
            "launches" => c.launches,
            "allocations" => c.driver_allocations,
            "uploads" => c.uploads,
            "downloads" => c.downloads,
            _ => c.synchronisations,
        };
    }
    let f: Symbol<unsafe extern "C" fn(*const c_char) -> u64> = function("prismgrad_emu_stat");
    // SAFETY: as declared in driver.cpp.
    unsafe { f(c(key).as_ptr()) }
}

/// What was said about the last fault.
pub fn last_report() -> String {
    if on_card() {
        return String::new();
    }
    let f: Symbol<unsafe extern "C" fn() -> *const c_char> = function("prismgrad_emu_report");
    // SAFETY: as declared in driver.cpp; the text is copied before anything else runs.
    unsafe { CStr::from_ptr(f()) }.to_string_lossy().into_owned()
}

/// Makes the device usable again after a fault; its memory stays.
pub fn reset() {
    if on_card() {
        return;
    }
    let f: Symbol<unsafe extern "C" fn(c_int) -> c_int> = function("cuDevicePrimaryCtxReset_v2");
    // SAFETY: as declared in driver.cpp.
    unsafe { f(0) };
}

/// The options are the process's: tests that set them hold this. Options are back at their defaults.
pub fn lock() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let held = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for (key, value) in [("seed", 0), ("threads", 0), ("check", 2), ("preempt", 0), ("strict_exit", 1)] {
        config(key, value);
    }
    held
}

/// Whether the kernels were compiled with checks.
pub fn is_checked() -> bool {
    let f: Symbol<unsafe extern "C" fn() -> c_int> = function("cuemu_instrumented");
    // SAFETY: as declared in cuemu_api.h.
    unsafe { f() != 0 }
}

/// A buffer of its own for [`launch`], with exact bounds.
pub struct Buffer<T: bytemuck::Pod> {
    ptr: *mut T,
    len: usize,
}

impl<T: bytemuck::Pod> Buffer<T> {
    /// Uninitialised, and known to be.
    pub fn new(len: usize) -> Self {
        let f: Symbol<unsafe extern "C" fn(usize, *mut *mut c_void) -> c_int> = function("cuemu_malloc");
        let mut p = std::ptr::null_mut();
        // SAFETY: as declared in cuemu_api.h; the pointer is to a local.
        assert_eq!(unsafe { f(len * size_of::<T>(), &mut p) }, 0, "out of memory");
        Buffer { ptr: p.cast(), len }
    }
    /// With these values.
    pub fn from(values: &[T]) -> Self {
        let b = Self::new(values.len());
        // SAFETY: the buffer has as many elements.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), b.ptr, values.len()) };
        b
    }
    /// With a name for reports.
    pub fn named(self, name: &str) -> Self {
        let f: Symbol<unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int> = function("cuemu_set_name");
        // SAFETY: as declared in cuemu_api.h; the name is copied.
        unsafe { f(self.ptr.cast(), c(name).as_ptr()) };
        self
    }
    /// What it holds.
    pub fn get(&self) -> Vec<T> {
        // SAFETY: live and of this length.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }.to_vec()
    }
    /// As a kernel's argument.
    pub fn arg(&self) -> Vec<u8> {
        (self.ptr as usize).to_ne_bytes().to_vec()
    }
}

impl<T: bytemuck::Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        let f: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int> = function("cuemu_free");
        // SAFETY: from cuemu_malloc, freed once.
        unsafe { f(self.ptr.cast()) };
    }
}

/// Runs a kernel at once, past driver and streams. `args` are the bytes of each argument. The error is the report.
pub fn launch(
    kernel: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    cooperative: bool,
    args: &[Vec<u8>],
) -> Result<()> {
    type Find = unsafe extern "C" fn(*const c_char) -> *const c_void;
    type Run = unsafe extern "C" fn(*const c_void, *const u32, *const u32, u32, *mut *mut c_void, c_int) -> c_int;
    type Text = unsafe extern "C" fn() -> *const c_char;
    let (find, run, text): (Symbol<Find>, Symbol<Run>, Symbol<Text>) =
        (function("cuemu_find"), function("cuemu_launch"), function("cuemu_last_error"));
    let mut pointers: Vec<*mut c_void> = args.iter().map(|a| a.as_ptr() as *mut c_void).collect();
    // SAFETY: as declared in cuemu_api.h; the runtime checks what the kernel does with its arguments.
    unsafe {
        let k = find(c(kernel).as_ptr());
        let code = if k.is_null() {
            500
        } else {
            run(k, grid.as_ptr(), block.as_ptr(), shared, pointers.as_mut_ptr(), cooperative as c_int)
        };
        if code == 0 {
            return Ok(());
        }
        Err(Error::device(format!("launch {kernel}"), CStr::from_ptr(text()).to_string_lossy()))
    }
}
