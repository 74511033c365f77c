//! The library starts anywhere: no driver, a driver without GPU, an old driver, no kernel compiler, a cache folder that
//! cannot be written, damaged cache entries. Each is the right fallback or one clear sentence.
//!
//! Every case runs in a process of its own, against a libcuda of thirty lines that is compiled here. Without a C compiler
//! the cases are not run, and say so.
#![cfg(unix)]

mod common {
    pub mod scratch;
    pub mod skip;
}

use common::scratch::Scratch;
use common::skip::skip;
use prismgrad::device::Device;
use prismgrad::device::cuda::{Gpu, driver, driver_present, nvrtc::Nvrtc};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A driver with as many GPUs as `STUB_DEVICES` says. It loads machine code and nothing else, and runs nothing.
const STUB: &str = r#"
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
static int number(const char* name, int otherwise) { const char* v = getenv(name); return v ? atoi(v) : otherwise; }
int cuInit(unsigned f) { return number("STUB_DEVICES", 1) ? 0 : 100; }
int cuDriverGetVersion(int* v) { *v = number("STUB_VERSION", 13000); return 0; }
int cuDeviceGetCount(int* n) { *n = number("STUB_DEVICES", 1); return 0; }
int cuGetErrorName(int e, const char** s) { *s = e == 200 ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR"; return 0; }
int cuGetErrorString(int e, const char** s) { *s = e == 200 ? "device kernel image is invalid" : "error"; return 0; }
#ifndef OLD
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* b, int n, int d) { snprintf(b, n, "Stub GPU"); return 0; }
int cuDeviceTotalMem_v2(size_t* b, int d) { *b = 1 << 30; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? number("STUB_MAJOR", 9) : a == 76 ? 0 : a == 97 ? 232448 : 4; return 0; }
static int thing; static __thread void* current;
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = &thing; return 0; }
int cuCtxGetCurrent(void** c) { *c = current; return 0; }
int cuCtxSetCurrent(void* c) { current = c; return 0; }
int cuStreamCreateWithPriority(void** s, unsigned f, int p) { *s = &thing; return 0; }
int cuStreamSynchronize(void* s) { return 0; }
int cuStreamWaitEvent(void* s, void* e, unsigned f) { return 0; }
int cuEventCreate(void** e, unsigned f) { *e = &thing; return 0; }
int cuEventDestroy_v2(void* e) { return 0; }
int cuEventRecord(void* e, void* s) { return 0; }
int cuEventQuery(void* e) { return 0; }
int cuEventSynchronize(void* e) { return 0; }
int cuMemAlloc_v2(unsigned long long* p, size_t n) { *p = (unsigned long long)malloc(n); return 0; }
int cuMemFree_v2(unsigned long long p) { free((void*)p); return 0; }
int cuMemGetInfo_v2(size_t* f, size_t* t) { *f = *t = 1 << 30; return 0; }
int cuMemHostAlloc(void** p, size_t n, unsigned f) { *p = malloc(n); return 0; }
int cuMemFreeHost(void* p) { free(p); return 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long d, const void* s, size_t n, void* q) { memcpy((void*)d, s, n); return 0; }
int cuMemcpyDtoHAsync_v2(void* d, unsigned long long s, size_t n, void* q) { memcpy(d, (void*)s, n); return 0; }
int cuMemcpyDtoDAsync_v2(unsigned long long d, unsigned long long s, size_t n, void* q) { memcpy((void*)d, (void*)s, n); return 0; }
int cuMemsetD8Async(unsigned long long d, unsigned char v, size_t n, void* q) { memset((void*)d, v, n); return 0; }
int cuModuleLoadData(void** m, const void* i) { *m = &thing; return memcmp(i, "\177ELF", 4) ? 200 : 0; }
int cuModuleGetFunction(void** f, void* m, const char* n) { *f = &thing; return 0; }
int cuFuncSetAttribute(void* f, int a, int v) { return 0; }
int cuLaunchKernel(void* f) { return 0; }
#endif
"#;

/// The folder of a compiled stub.
fn stub(name: &str, flags: &[&str]) -> Option<Scratch> {
    let folder = Scratch::new(&format!("start-{name}"));
    std::fs::write(folder.join("stub.c"), STUB).unwrap();
    let compiled = Command::new("cc")
        .current_dir(&*folder)
        .args(["-shared", "-fPIC", "-w", "-o", "libcuda.so", "stub.c"])
        .args(flags)
        .status();
    match compiled {
        Ok(status) => {
            assert!(status.success());
            Some(folder)
        }
        Err(_) => {
            skip("there is no C compiler");
            None
        }
    }
}

/// Runs [`child`] with this environment. Returns its standard output and standard error.
fn run(libraries: &Path, environment: &[(&str, &str)]) -> (String, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "PRISMGRAD_DEVICE", "PRISMGRAD_CUDA_POOL"] {
        command.env_remove(name);
    }
    // Built with the feature `emulator`, a process without a driver has the emulated one; asked for a card, it has not.
    command.env("PRISMGRAD_ON_CARD", "1");
    command.env("LD_LIBRARY_PATH", libraries).envs(environment.iter().copied());
    let out = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{stdout}\n{stderr}");
    (stdout.into_owned(), stderr.into_owned())
}

/// What a child says about one thing.
fn said<'a>(stdout: &'a str, what: &str) -> &'a str {
    let line = stdout.lines().find_map(|l| l.split_once(&format!("{what}: ")));
    line.unwrap_or_else(|| panic!("nothing about {what} in\n{stdout}")).1
}

/// Says how the environment that [`run`] gives it looks.
#[test]
#[ignore = "the other tests run it, each in an environment of its own"]
fn child() {
    let say = |what: &str, r: prismgrad::Result<String>| match r {
        Ok(v) => println!("\n{what}: {v}"),
        Err(e) => println!("\n{what}: error, {}", e.to_string().replace('\n', "⏎")),
    };
    say("driver", driver().map(|d| format!("{} devices", d.devices)));
    say("best", Ok(Device::best().to_string()));
    say("again", Ok(Device::best().to_string()));
    say("cuda", Device::cuda(0).map(|d| d.to_string()));
    say("environment", Device::from_env().map(|d| d.to_string()));
    say(
        "kernel",
        Gpu::open(0).and_then(|gpu| {
            gpu.kernel("device_check", "check_axpy_f32")?;
            gpu.kernel("device_check", "check_args_f32")?;
            Ok(format!("{} compiled", gpu.counts().compiles))
        }),
    );
}

#[test]
fn no_driver() {
    if driver_present() {
        return skip("there is a driver");
    }
    let empty = Scratch::new("start-nothing");
    let (out, err) = run(&empty, &[("PRISMGRAD_DEVICE", "cuda")]);
    assert_eq!(said(&out, "best"), "cpu");
    assert!(!err.contains("prismgrad:"), "nothing to say where there is no GPU: {err}");
    for what in ["driver", "cuda", "environment", "kernel"] {
        let said = said(&out, what);
        assert!(said.contains("libcuda.so.1) cannot be loaded; install the driver") && !said.contains('⏎'), "{said}");
    }
    let (out, _) = run(&empty, &[("PRISMGRAD_DEVICE", "cpu")]);
    assert_eq!(said(&out, "environment"), "cpu");
    let (out, _) = run(&empty, &[("PRISMGRAD_DEVICE", "gpu1")]);
    assert!(said(&out, "environment").contains("\"gpu1\" is no device; it is cpu, cuda or cuda:N"), "{out}");
}

/// Who asks for a GPU by name gets the emulated one where there is no driver; who takes the best device never does.
#[test]
#[cfg(feature = "emulator")]
fn no_driver_but_the_emulator() {
    if driver_present() {
        return skip("there is a driver");
    }
    let empty = Scratch::new("start-emulator");
    let (out, err) = run(&empty, &[("PRISMGRAD_ON_CARD", "0"), ("PRISMGRAD_DEVICE", "cuda")]);
    assert!(
        said(&out, "driver").contains("libcuda.so.1) cannot be loaded"),
        "nothing is there until it is asked for: {out}"
    );
    assert_eq!([said(&out, "best"), said(&out, "again")], ["cpu"; 2]);
    assert_eq!([said(&out, "cuda"), said(&out, "environment")], ["cuda:0"; 2]);
    assert_eq!(said(&out, "kernel"), "0 compiled", "its kernels are built in");
    assert!(!err.contains("prismgrad:"), "{err}");
    let (out, _) = run(&empty, &[("PRISMGRAD_ON_CARD", "0")]);
    assert_eq!(said(&out, "best"), "cpu");
}

#[test]
fn a_driver_without_a_gpu() {
    let Some(folder) = stub("no-gpu", &[]) else { return };
    let (out, err) = run(&folder, &[("STUB_DEVICES", "0"), ("CUDA_VISIBLE_DEVICES", "3")]);
    assert_eq!(said(&out, "best"), "cpu");
    assert!(!err.contains("prismgrad:"), "{err}");
    let sentence = said(&out, "cuda");
    assert!(sentence.contains("no GPU is visible to this process (CUDA_VISIBLE_DEVICES is \"3\")"), "{sentence}");
}

#[test]
fn an_old_driver() {
    let Some(folder) = stub("old", &["-DOLD"]) else { return };
    let (out, _) = run(&folder, &[("STUB_VERSION", "11040")]);
    assert_eq!(said(&out, "best"), "cpu");
    assert!(said(&out, "cuda").contains("supports CUDA 11.4, at least 12.0 is needed; update the driver"), "{out}");
    let (out, _) = run(&folder, &[]);
    assert_eq!(said(&out, "best"), "cpu");
    assert!(said(&out, "cuda").contains("it is too old, update the driver"), "{out}");
}

#[test]
fn a_gpu_without_a_kernel_compiler() {
    let Some(folder) = stub("no-nvrtc", &[]) else { return };
    let nowhere = folder.join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let (out, err) = run(&folder, &[("PRISMGRAD_NVRTC", nowhere), ("PRISMGRAD_CACHE", nowhere)]);
    assert_eq!((said(&out, "best"), said(&out, "again")), ("cpu", "cpu"));
    assert_eq!(err.matches("prismgrad: using the CPU, since the GPU cannot be used").count(), 1, "{err}");
    for what in ["cuda", "kernel"] {
        let sentence = said(&out, what);
        assert!(
            sentence.contains("PRISMGRAD_NVRTC is") && sentence.contains("neither libnvrtc nor a folder"),
            "{sentence}"
        );
    }
    // Nowhere at all. (On a machine with a toolkit it is found, and there is nothing to see.)
    let environment = [("PRISMGRAD_NVRTC", ""), ("PRISMGRAD_CACHE", nowhere), ("PATH", nowhere)];
    let (out, _) = run(&folder, &environment);
    let sentence = said(&out, "cuda");
    assert!(sentence == "cuda:0" || sentence.contains("pip install 'nvidia-cuda-nvrtc"), "{sentence}");
    assert!(!sentence.contains('⏎'), "{sentence}");
}

#[test]
fn compiled_kernels_are_kept_and_damage_is_made_good() {
    let Ok(nvrtc) = Nvrtc::find() else {
        return skip("there is no NVRTC");
    };
    let Some(folder) = stub("cache", &[]) else { return };
    let cache = folder.join("cache");
    let found = nvrtc.found().to_string();
    let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let libraries = PathBuf::from(format!("{}:{libraries}", folder.display()));
    // The loader's own copy has no path to name.
    let named = if found.contains('/') { found.as_str() } else { "" };
    let with = |more: &[(&str, &str)]| {
        let mut environment = vec![("PRISMGRAD_NVRTC", named), ("PRISMGRAD_CACHE", cache.to_str().unwrap())];
        environment.extend(more);
        let (out, _) = run(&libraries, &environment);
        said(&out, "kernel").to_string()
    };
    assert_eq!(with(&[]), "1 compiled");
    assert_eq!(with(&[]), "0 compiled");
    let entries = || -> Vec<PathBuf> {
        let list = std::fs::read_dir(cache.join("kernels")).unwrap();
        list.map(|e| e.unwrap().path()).collect()
    };
    let [entry] = &entries()[..] else { panic!("{:?}", entries()) };
    // Another architecture is another entry, and is none of this one's business.
    assert_eq!(with(&[("STUB_MAJOR", "8")]), "1 compiled");
    assert_eq!(entries().len(), 2);
    assert_eq!(with(&[]), "0 compiled");
    let mut bytes = std::fs::read(entry).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(entry, &bytes).unwrap();
    assert_eq!(with(&[]), "1 compiled", "a damaged entry");
    assert_eq!(with(&[]), "0 compiled");
    std::fs::write(entry, b"").unwrap();
    assert_eq!(with(&[]), "1 compiled", "an empty entry");
    // Without the compiler the cache is enough for what is in it.
    let nowhere = folder.join("nowhere");
    assert_eq!(with(&[("PRISMGRAD_NVRTC", nowhere.to_str().unwrap())]), "0 compiled");
    // A folder that cannot be made: compiled every time, and nothing else happens.
    let file = folder.join("stub.c/below");
    for _ in 0..2 {
        assert_eq!(with(&[("PRISMGRAD_CACHE", file.to_str().unwrap())]), "1 compiled");
    }
    if nvrtc.version().0 > 12 {
        // Machine code of CUDA 13 does not load in a driver of CUDA 12.
        let (out, _) = run(&libraries, &[("PRISMGRAD_NVRTC", named), ("STUB_VERSION", "12040")]);
        assert!(said(&out, "cuda").contains("newer than the driver (CUDA 12.4)"), "{out}");
    }
    assert!(with(&[("STUB_MAJOR", "3")]).contains("compute capability 3.0 is older than"));
}
