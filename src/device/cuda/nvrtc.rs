//! NVRTC: NVIDIA's compiler as a library. Found at run time, needs no GPU, no CUDA headers and no toolkit.
//!
//! It is loaded by path and called through its own few functions, so that the copy named by `PRISMGRAD_NVRTC` is the one
//! that runs, whatever else the machine has installed.

use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

type Program = *mut core::ffi::c_void;

/// The functions in use.
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
    /// What the compiler said.
    pub log: String,
}

impl Nvrtc {
    /// The NVRTC of this machine: the one `PRISMGRAD_NVRTC` names (file or folder), else the loader's, else that of the
    /// active Python's wheel, else the toolkit's.
    pub fn find() -> Result<&'static Nvrtc> {
        // Only success is kept, so that a later call can find what was installed meanwhile.
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

    /// Where it was found.
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
        // SAFETY: NVRTC answers any code with a static string.
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
        // SAFETY: the program is alive; the buffer has the size that NVRTC has just asked for.
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

// ---- finding it

fn search() -> Result<Nvrtc> {
    let op = "find NVRTC";
    if let Some(named) = std::env::var_os("PRISMGRAD_NVRTC").filter(|v| !v.is_empty()) {
        let named = PathBuf::from(named);
        let file = if named.is_dir() { library_in(&named) } else { Some(named.clone()).filter(|p| p.is_file()) };
        let Some(file) = file else {
            return Err(Error::device(
                op,
                format!("PRISMGRAD_NVRTC is {}, which is neither libnvrtc nor a folder that has it", named.display()),
            ));
        };
        return load_file(&file).map_err(|e| Error::device(op, format!("PRISMGRAD_NVRTC: {e}")));
    }
    let mut failed = String::new();
    for name in ["libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.12"] {
        if let Ok(found) = load(Path::new(name)) {
            return Ok(found);
        }
    }
    // Asking Python costs a process, so it comes after the folders that are known without it.
    for folders in [environment_folders, toolkit_folders, python_folders] {
        for folder in folders() {
            if let Some(file) = library_in(&folder) {
                match load_file(&file) {
                    Ok(found) => return Ok(found),
                    Err(e) => failed.push_str(&format!("; {e}")),
                }
            }
        }
    }
    Err(Error::device(
        op,
        format!(
            "the kernel compiler libnvrtc.so.13 is not on the loader's path, in the active Python, under CUDA_HOME or in \
             /usr/local/cuda{failed}; `pip install 'nvidia-cuda-nvrtc==13.0.*'`, or name the file or its folder in \
             PRISMGRAD_NVRTC"
        ),
    ))
}

/// Where wheels put it, below a site-packages folder.
const WHEELS: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

fn environment_folders() -> Vec<PathBuf> {
    let mut folders = vec![];
    if let Some(root) = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from) {
        let versions = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten();
        for site in versions.map(|v| v.path().join("site-packages")).filter(|p| p.is_dir()) {
            folders.extend(WHEELS.map(|w| site.join(w)));
        }
    }
    folders.extend(std::env::var_os("CONDA_PREFIX").map(|p| PathBuf::from(p).join("lib")));
    folders
}

fn toolkit_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .flat_map(|p| ["lib64", "lib"].map(|l| PathBuf::from(&p).join(l)))
        .collect();
    folders.extend(["/usr/local/cuda/lib64", "/usr/local/cuda-13.0/lib64", "/opt/cuda/lib64"].map(PathBuf::from));
    folders
}

fn python_folders() -> Vec<PathBuf> {
    let ask = "import site,sysconfig;p=sysconfig.get_paths();print('\\n'.join([p['purelib'],p['platlib'],site.getusersitepackages()]))";
    let answer = std::process::Command::new("python3").args(["-c", ask]).stdin(std::process::Stdio::null()).output();
    let Ok(answer) = answer else { return vec![] };
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    let mut folders: Vec<PathBuf> = text.lines().flat_map(|site| WHEELS.map(|w| Path::new(site).join(w))).collect();
    folders.dedup();
    folders
}

/// The NVRTC in a folder, the newest by name.
fn library_in(folder: &Path) -> Option<PathBuf> {
    newest(folder, "libnvrtc.so")
}

fn newest(folder: &Path, start: &str) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(start)))
        .collect();
    found.sort();
    found.pop()
}

/// By path: the built-in functions first, since NVRTC looks for them by bare name when it compiles.
fn load_file(file: &Path) -> std::result::Result<Nvrtc, String> {
    if let Some(builtins) = file.parent().and_then(|f| newest(f, "libnvrtc-builtins.so")) {
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
