//! Looks kernels up by name: each is compiled or read from the cache, loaded and looked up once.

use super::cache::{KernelCache, Key};
use super::context::{Gpu, count, lock};
use super::errors::check;
use super::nvrtc::{Compiled, Nvrtc};
use super::sources::{PRELUDE, SOURCES};
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use rayon::prelude::*;
use std::collections::HashMap;
use std::ffi::CString;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};

/// A loaded kernel of one device. Copying it is free.
#[derive(Clone, Copy)]
pub struct Kernel(pub(super) &'static KernelInfo);

pub(super) struct KernelInfo {
    pub(super) text: KernelText,
    pub(super) name: String,
    pub(super) function: sys::CUfunction,
    pub(super) ordinal: usize,
    /// Dynamic shared memory limit last set in the driver, in bytes.
    pub(super) shared: AtomicUsize,
    /// Bytes of each parameter, for kernels that are not this crate's: the arguments of a launch are compared with it.
    pub(super) parameters: Option<Vec<u32>>,
}
// SAFETY: a function handle is never changed and may be used from any thread.
unsafe impl Sync for KernelInfo {}
// SAFETY: as above.
unsafe impl Send for KernelInfo {}

impl Kernel {
    /// The file it is in, without `.cu`.
    pub fn file(&self) -> &'static str {
        self.0.text.name
    }
    /// Its name.
    pub fn name(&self) -> &'static str {
        &self.0.name
    }
}

/// The text of a kernel file.
#[derive(Clone, Copy)]
pub(super) struct KernelText {
    /// The file's name without `.cu`.
    pub(super) name: &'static str,
    pub(super) text: &'static str,
    /// Whether it is one of this crate's own files in `cuda/`.
    pub(super) own: bool,
}

impl KernelText {
    /// Identifies a text without reading it: the address of a static text does not change.
    pub(super) fn id(&self) -> usize {
        self.text.as_ptr() as usize
    }
}

impl std::fmt::Display for KernelText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}.cu", if self.own { "cuda/" } else { "" }, self.name)
    }
}

/// A loaded module; never unloaded.
#[derive(Clone, Copy)]
struct Module(sys::CUmodule);
// SAFETY: as for `KernelInfo`.
unsafe impl Send for Module {}

type ModuleCell = Arc<Mutex<Option<Module>>>;

const RECENT: usize = 8;

/// The kernels of one device.
#[derive(Default)]
pub(crate) struct Modules {
    /// Kernels by name; names are unique in the project.
    kernels: RwLock<HashMap<&'static str, Kernel>>,
    /// Kernels of other texts, by text and name.
    pub(super) custom: RwLock<HashMap<(usize, &'static str), Kernel>>,
    /// Modules by text. Each has its own lock, so that several texts can compile at once and none twice.
    files: Mutex<HashMap<usize, ModuleCell>>,
    frozen: AtomicBool,
    recent: [AtomicPtr<KernelInfo>; RECENT],
    next: AtomicUsize,
}

impl Modules {
    /// Records a launch, for the error message of a fault that is reported later.
    pub(super) fn launched(&self, kernel: Kernel) {
        let i = self.next.fetch_add(1, Relaxed) % RECENT;
        self.recent[i].store(std::ptr::from_ref(kernel.0).cast_mut(), Relaxed);
    }

    /// Names of the last kernels launched, latest first.
    pub(crate) fn last_launched(&self) -> Vec<&'static str> {
        let next = self.next.load(Relaxed);
        let latest = (1..=RECENT.min(next)).map(|back| self.recent[(next - back) % RECENT].load(Relaxed));
        // SAFETY: only pointers to leaked `KernelInfo`s are stored.
        let mut names: Vec<&str> = latest.filter_map(|p| unsafe { p.as_ref() }).map(|k| k.name.as_str()).collect();
        names.dedup();
        names
    }
}

/// Options of every compilation, besides the architecture.
const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "-lineinfo"];

/// The text of one of this crate's kernel files.
fn source(file: &str) -> Result<KernelText> {
    let found = SOURCES.iter().find(|(name, _)| *name == file);
    let (name, text) =
        found.ok_or_else(|| Error::device("find a kernel", format!("there is no cuda/{file}.cu in this build")))?;
    Ok(KernelText { name, text, own: true })
}

/// Compiles one of this crate's kernel files for a target such as `sm_90a`, with further options for NVRTC. Needs no GPU.
pub fn compile_for(file: &str, target: &str, further: &[&str]) -> Result<Compiled> {
    compile(source(file)?, target, further)
}

fn compile(file: KernelText, target: &str, further: &[&str]) -> Result<Compiled> {
    let mut options = vec![format!("--gpu-architecture={target}")];
    options.extend(OPTIONS.iter().chain(further).map(|o| o.to_string()));
    Nvrtc::find()?.compile(&format!("{}.cu", file.name), file.text, &[PRELUDE], &options)
}

/// The compilation target for a compute capability: its own machine code if the compiler supports it, else the newest PTX below it, which
/// the driver translates. Capability 9.0 gets `sm_90a`, which includes Hopper's architecture-specific instructions.
pub fn target_for(capability: (u32, u32), known: &[u32]) -> Result<String> {
    let number = capability.0 * 10 + capability.1;
    let own = if capability == (9, 0) { "sm_90a".to_string() } else { format!("sm_{number}") };
    match known.iter().rfind(|a| **a <= number) {
        Some(a) if *a == number => Ok(own),
        Some(a) => Ok(format!("compute_{a}")),
        None if known.is_empty() => Ok(own),
        None => Err(Error::device(
            "compile kernels",
            format!(
                "compute capability {}.{} is older than {}.{}, the first that this NVRTC compiles for",
                capability.0,
                capability.1,
                known[0] / 10,
                known[0] % 10
            ),
        )),
    }
}

/// Target and key of a kernel file for a compute capability, and its image if the cache has it.
fn cached_image(
    file: KernelText,
    capability: (u32, u32),
    cache: &KernelCache,
) -> Result<(String, Key, Option<Vec<u8>>)> {
    let nvrtc = Nvrtc::find().ok();
    let target = target_for(capability, nvrtc.map_or(&[], |n| n.architectures()))?;
    let key = Key::of([file.text, PRELUDE.1, target.as_str()].into_iter().chain(OPTIONS));
    // Without a compiler there is no version to compare with, so an image of any version is accepted.
    let image = cache.load(file.name, &target, key, nvrtc.map(|n| n.version()));
    Ok((target, key, image))
}

/// The machine code of a kernel file for a compute capability, from the cache or else compiled and stored there. The flag says whether it
/// was compiled.
fn image_for(file: KernelText, capability: (u32, u32), cache: &KernelCache) -> Result<(Vec<u8>, bool)> {
    let (target, key, cached) = cached_image(file, capability, cache)?;
    if let Some(image) = cached {
        return Ok((image, false));
    }
    let image = compile(file, &target, &[])?.image;
    cache.store(file.name, &target, key, Nvrtc::find()?.version(), &image);
    Ok((image, true))
}

impl Gpu {
    /// A kernel by file (without `.cu`) and name. The first use of a file compiles or loads it; later calls cost a look-up (tens of
    /// nanoseconds).
    pub fn kernel(&self, file: &str, name: &str) -> Result<Kernel> {
        if let Some(kernel) = self.modules.kernels.read().unwrap_or_else(|e| e.into_inner()).get(name)
            && kernel.file() == file
        {
            return Ok(*kernel);
        }
        self.find_kernel(file, name)
    }

    #[cold]
    fn find_kernel(&self, file: &str, name: &str) -> Result<Kernel> {
        let kernel = self.load_kernel(source(file)?, name)?;
        let mut kernels = self.modules.kernels.write().unwrap_or_else(|e| e.into_inner());
        match kernels.get(name) {
            Some(other) if other.file() != file => Err(Error::device(
                format!("load kernel {name} of cuda/{file}.cu"),
                format!("cuda/{}.cu has a kernel of that name, too", other.file()),
            )),
            Some(other) => Ok(*other),
            None => {
                kernels.insert(&kernel.0.name, kernel);
                Ok(kernel)
            }
        }
    }

    /// Compiles or loads the text, and looks the kernel up in it.
    pub(super) fn load_kernel(&self, text: KernelText, name: &str) -> Result<Kernel> {
        let op = format!("load kernel {name} of {text}");
        self.refuse_in_capture(&format!("load a kernel for the first time ({name} of {text})"))?;
        let module = self.module(text)?;
        let symbol = CString::new(name).map_err(|_| Error::device(&op, "the name has a zero byte"))?;
        let mut function = null_mut();
        self.bind()?;
        // SAFETY: the module is loaded; the pointers are to locals.
        match unsafe { sys::cuModuleGetFunction(&mut function, module.0, symbol.as_ptr()) } {
            CUresult::CUDA_ERROR_NOT_FOUND => return Err(Error::device(op, "the file has no kernel of that name")),
            code => check(&op, code)?,
        }
        // Leaked on purpose: it exists as long as the process, as its module does, and the number of kernels is bounded.
        Ok(Kernel(Box::leak(Box::new(KernelInfo {
            text,
            name: name.to_string(),
            function,
            ordinal: self.ordinal(),
            shared: AtomicUsize::new(48 << 10),
            parameters: if text.own { None } else { Some(super::module::parameters(&op, function)?) },
        }))))
    }

    fn module(&self, text: KernelText) -> Result<Module> {
        let cell = lock(&self.modules.files).entry(text.id()).or_default().clone();
        let mut cell = lock(&cell);
        if let Some(module) = *cell {
            return Ok(module);
        }
        if self.modules.frozen.load(Relaxed) {
            return Err(Error::device(
                format!("load {text}"),
                "assert_no_compile is on and the file is not loaded yet; call warm_up before",
            ));
        }
        let image = if self.is_emulated() {
            super::module::emulated_image(text)?
        } else {
            let (image, compiled) = image_for(text, self.capability(), &KernelCache::from_env())?;
            if compiled {
                count(&self.counters.compiles);
            }
            image
        };
        self.bind()?;
        let mut module = null_mut();
        // SAFETY: a cubin, or PTX that ends in a zero byte; the driver copies what it keeps.
        let code = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        check(&format!("load {text} on {self:?}"), code)?;
        *cell = Some(Module(module));
        Ok(Module(module))
    }

    /// Compiles (or reads from the cache) and loads every kernel file now, several at once.
    pub fn warm_up(&self) -> Result<()> {
        self.refuse_in_capture("load kernels")?;
        SOURCES.par_iter().try_for_each(|(file, _)| self.module(source(file)?).map(|_| ()))
    }

    /// While `on`, using a kernel file that is not loaded yet is an error instead of a compilation in the middle of training.
    pub fn assert_no_compile(&self, on: bool) {
        self.modules.frozen.store(on, Relaxed);
    }

    /// Checks that kernels are available: NVRTC is installed, or all of them are in the cache. Otherwise the error says what to do.
    pub fn check_kernels(&self) -> Result<()> {
        if self.is_emulated() {
            return Ok(());
        }
        let missing = match Nvrtc::find() {
            // The driver does not load machine code made for a newer major version.
            Ok(nvrtc) if nvrtc.version().0 > super::driver()?.version / 1000 => Error::device(
                "compile kernels",
                format!(
                    "{} is NVRTC {}.{}, newer than the driver (CUDA {}.{}); update the driver, or \
                     `pip install 'nvidia-cuda-nvrtc-cu12'`",
                    nvrtc.found(),
                    nvrtc.version().0,
                    nvrtc.version().1,
                    super::driver()?.version / 1000,
                    super::driver()?.version % 1000 / 10
                ),
            ),
            Ok(_) => return Ok(()),
            // All kernels may still be in the cache.
            Err(missing) => missing,
        };
        let cache = KernelCache::from_env();
        let cached = |file: &str| source(file).and_then(|text| cached_image(text, self.capability(), &cache));
        if SOURCES.iter().all(|(file, _)| matches!(cached(file), Ok((_, _, Some(_))))) { Ok(()) } else { Err(missing) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let known = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
        assert_eq!(target_for((8, 0), &known).unwrap(), "sm_80");
        assert_eq!(target_for((9, 0), &known).unwrap(), "sm_90a");
        assert_eq!(target_for((12, 0), &known).unwrap(), "sm_120");
        assert_eq!(target_for((13, 0), &known).unwrap(), "compute_121");
        assert!(target_for((7, 0), &known).unwrap_err().to_string().contains("7.0 is older than 7.5"));
        assert_eq!(target_for((9, 0), &[]).unwrap(), "sm_90a", "the cache may have it without a compiler");
    }

    #[test]
    fn an_unknown_file_is_named() {
        assert!(compile_for("no_such", "sm_80", &[]).err().unwrap().to_string().contains("cuda/no_such.cu"));
    }
}
