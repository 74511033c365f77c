//! NVRTC, NVIDIA's CUDA compiler as a library. It is found at run time and needs no GPU, no CUDA headers and no toolkit.
//!
//! It is loaded by path and called through function pointers of its own, so that the copy named by `PRISMGRAD_NVRTC` is the one that runs,
//! whatever else is installed on the machine.

use super::library::{Missing, Wanted, newest};
use crate::base::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

type Program = *mut core::ffi::c_void;

/// The NVRTC functions used here.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    num_archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// A loaded NVRTC. Never unloaded.
pub struct Nvrtc {
    f: Functions,
    version: (u32, u32),
    found: String,
    archs: Vec<u32>,
}

/// A compiled kernel file.
pub struct Compiled {
    /// A cubin for `sm_…`, PTX text ending in a zero byte for `compute_…`.
    pub image: Vec<u8>,
    /// The compiler's messages.
    pub log: String,
}

impl Nvrtc {
    /// The NVRTC of this machine: the one `PRISMGRAD_NVRTC` names (file or folder); else the one the dynamic loader finds; else that of the
    /// active Python environment's wheel; else the toolkit's.
    pub fn find() -> Result<&'static Nvrtc> {
        // Only success is cached, so that a later call can find a library installed in the meantime.
        static FOUND: OnceLock<Nvrtc> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let found = search()?;
        Ok(FOUND.get_or_init(|| found))
    }

    /// Version, such as (13, 0).
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The place where it was found.
    pub fn found(&self) -> &str {
        &self.found
    }

    /// Architectures it can compile for, such as 90, ascending.
    pub fn architectures(&self) -> &[u32] {
        &self.archs
    }

    /// Compiles one source. `name` is for messages; headers are (name, text), kept in memory.
    pub fn compile(&self, name: &str, source: &str, headers: &[(&str, &str)], options: &[String]) -> Result<Compiled> {
        let op = format!("compile {name}");
        let c = |s: &str| CString::new(s).map_err(|_| Error::device(&op, "a source or option has a zero byte"));
        let (source, file) = (c(source)?, c(name)?);
        let texts = headers.iter().map(|h| c(h.1)).collect::<Result<Vec<_>>>()?;
        let names = headers.iter().map(|h| c(h.0)).collect::<Result<Vec<_>>>()?;
        let options = options.iter().map(|o| c(o)).collect::<Result<Vec<_>>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (texts, names, flags) = (pointers(&texts), pointers(&names), pointers(&options));
        let mut program = Handle { nvrtc: self, raw: std::ptr::null_mut() };
        // SAFETY: all strings live to the end of this function; the counts are those of the vectors.
        let code = unsafe {
            let count = texts.len() as c_int;
            let code = (self.f.create)(
                &mut program.raw,
                source.as_ptr(),
                file.as_ptr(),
                count,
                texts.as_ptr(),
                names.as_ptr(),
            );
            self.check(&op, code)?;
            (self.f.compile)(program.raw, flags.len() as c_int, flags.as_ptr())
        };
        let log = program.fetch(&op, self.f.log_size, self.f.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string();
        if code != 0 {
            let help = if log.contains("libnvrtc-builtins") {
                "\nlibnvrtc-builtins must lie beside libnvrtc: name that folder in PRISMGRAD_NVRTC"
            } else {
                ""
            };
            return Err(Error::device(op, format!("{}:\n{log}{help}", self.error(code))));
        }
        let image = match program.fetch(&op, self.f.cubin_size, self.f.cubin)? {
            cubin if !cubin.is_empty() => cubin,
            _ => program.fetch(&op, self.f.ptx_size, self.f.ptx)?,
        };
        Ok(Compiled { image, log })
    }

    fn error(&self, code: c_int) -> String {
        // SAFETY: NVRTC returns a static string for every code.
        unsafe { CStr::from_ptr((self.f.error)(code)) }.to_string_lossy().into_owned()
    }

    fn check(&self, op: &str, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(Error::device(op, self.error(code))) }
    }
}

/// An NVRTC program, destroyed at the end.
struct Handle<'a> {
    nvrtc: &'a Nvrtc,
    raw: Program,
}

impl Handle<'_> {
    fn fetch(
        &self,
        op: &str,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>> {
        let mut n = 0;
        // SAFETY: the program is alive; the buffer has the size that NVRTC has just returned.
        unsafe {
            self.nvrtc.check(op, size(self.raw, &mut n))?;
            let mut bytes = vec![0u8; n];
            if n > 0 {
                self.nvrtc.check(op, get(self.raw, bytes.as_mut_ptr().cast()))?;
            }
            Ok(bytes)
        }
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `create`, destroyed once.
            unsafe { (self.nvrtc.f.destroy)(&mut self.raw) };
        }
    }
}

// ---- search

fn search() -> Result<Nvrtc> {
    let op = "find NVRTC";
    let wanted = Wanted {
        variable: "PRISMGRAD_NVRTC",
        start: "libnvrtc.so",
        names: &["libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.12"],
        wheels: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    };
    wanted.find(&[], load_file).map_err(|why| match why {
        Missing::Named(why) => Error::device(op, why),
        Missing::Nowhere(failed) => Error::device(
            op,
            format!(
                "the kernel compiler libnvrtc.so.13 is not on the loader's path, in the active Python, under CUDA_HOME or in \
                 /usr/local/cuda{failed}; `pip install 'nvidia-cuda-nvrtc==13.0.*'`, or name the file or its folder in \
                 PRISMGRAD_NVRTC"
            ),
        ),
    })
}

/// Loads by path, the built-in functions first, since NVRTC looks for them by bare file name when it compiles.
fn load_file(file: &Path) -> std::result::Result<Nvrtc, String> {
    if let Some(builtins) = file.parent().filter(|f| f.is_dir()).and_then(|f| newest(f, "libnvrtc-builtins.so")) {
        // SAFETY: NVIDIA's library; loading runs only its own start-up code.
        if let Ok(lib) = unsafe { Library::new(builtins) } {
            std::mem::forget(lib);
        }
    }
    load(file)
}

fn load(file: &Path) -> std::result::Result<Nvrtc, String> {
    // SAFETY: NVIDIA's library; loading runs only its own start-up code. It is never unloaded, so its functions stay.
    let lib = unsafe { Library::new(file) }.map_err(|e| format!("cannot load {}: {e}", file.display()))?;
    let missing = |e: libloading::Error| format!("{} is not an NVRTC of CUDA 12 or later: {e}", file.display());
    macro_rules! get {
        ($name:literal) => {
            // SAFETY: the field's type is that of the function in nvrtc.h.
            *unsafe { lib.get(concat!($name, "\0").as_bytes()) }.map_err(missing)?
        };
    }
    let f = Functions {
        version: get!("nvrtcVersion"),
        num_archs: get!("nvrtcGetNumSupportedArchs"),
        archs: get!("nvrtcGetSupportedArchs"),
        error: get!("nvrtcGetErrorString"),
        create: get!("nvrtcCreateProgram"),
        destroy: get!("nvrtcDestroyProgram"),
        compile: get!("nvrtcCompileProgram"),
        log_size: get!("nvrtcGetProgramLogSize"),
        log: get!("nvrtcGetProgramLog"),
        cubin_size: get!("nvrtcGetCUBINSize"),
        cubin: get!("nvrtcGetCUBIN"),
        ptx_size: get!("nvrtcGetPTXSize"),
        ptx: get!("nvrtcGetPTX"),
    };
    let (mut major, mut minor, mut count) = (0, 0, 0);
    // SAFETY: pointers to locals; the list has the length asked for.
    let archs = unsafe {
        if (f.version)(&mut major, &mut minor) != 0 || (f.num_archs)(&mut count) != 0 || count < 0 {
            return Err(format!("{} does not answer", file.display()));
        }
        let mut archs = vec![0 as c_int; count as usize];
        if (f.archs)(archs.as_mut_ptr()) != 0 {
            return Err(format!("{} does not answer", file.display()));
        }
        archs
    };
    if major < 12 {
        return Err(format!("{} is NVRTC {major}.{minor}; 12.0 or later is needed", file.display()));
    }
    std::mem::forget(lib);
    let mut archs: Vec<u32> = archs.into_iter().map(|a| a.max(0) as u32).collect();
    archs.sort();
    Ok(Nvrtc { f, version: (major as u32, minor as u32), found: file.display().to_string(), archs })
}
