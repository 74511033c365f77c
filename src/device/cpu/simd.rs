//! Choice of vector instructions at run time.

use std::sync::OnceLock;

/// The vector instructions of this machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// The compiler's default target.
    Baseline,
    /// 256-bit vectors and fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

/// How products of bf16 numbers are computed on this machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Bf16Products {
    /// In f32, on operands rounded to bf16: no faster than f32.
    Emulated,
    /// By dot products of pairs (AVX-512 BF16): about twice as fast as f32.
    Dots,
    /// By matrix tiles (AMX-BF16): about ten times as fast as f32.
    Tiles,
}

/// The level of this machine, determined once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| detect().min(limit().0))
}

/// How this machine computes products of bf16 numbers, determined once.
pub fn bf16_products() -> Bf16Products {
    static FOUND: OnceLock<Bf16Products> = OnceLock::new();
    *FOUND.get_or_init(|| if level() < Level::Avx512 { Bf16Products::Emulated } else { detect_bf16(limit().1) })
}

/// The best level that may be used. `PRISMGRAD_CPU` limits it to `amx`, `avx512bf16`, `avx512`, `avx2` or `baseline`, so that tests can run
/// the code for older processors. If it is unset or has another value, there is no limit.
fn limit() -> (Level, Bf16Products) {
    match std::env::var("PRISMGRAD_CPU").as_deref() {
        Ok("baseline") => (Level::Baseline, Bf16Products::Emulated),
        Ok("avx2") => (Level::Avx2, Bf16Products::Emulated),
        Ok("avx512") => (Level::Avx512, Bf16Products::Emulated),
        Ok("avx512bf16") => (Level::Avx512, Bf16Products::Dots),
        _ => (Level::Avx512, Bf16Products::Tiles),
    }
}

#[cfg(target_arch = "x86_64")]
fn detect_bf16(limit: Bf16Products) -> Bf16Products {
    if limit >= Bf16Products::Tiles && tiles_granted() {
        return Bf16Products::Tiles;
    }
    match limit >= Bf16Products::Dots && is_x86_feature_detected!("avx512bf16") {
        true => Bf16Products::Dots,
        false => Bf16Products::Emulated,
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn detect_bf16(_: Bf16Products) -> Bf16Products {
    Bf16Products::Emulated
}

/// Whether the processor has AMX-BF16 and the operating system grants this process its registers, which each process must request.
#[cfg(target_arch = "x86_64")]
fn tiles_granted() -> bool {
    use std::arch::x86_64::__cpuid_count;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) != AMX_BF16 | AMX_TILE {
        return false;
    }
    #[cfg(target_os = "linux")]
    {
        // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for all threads of the process.
        let mut answer = 158isize;
        // SAFETY: a system call that touches no memory of ours; it changes rcx and r11.
        unsafe {
            std::arch::asm!("syscall", inout("rax") answer, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _, options(nostack));
        }
        answer == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match (avx512, avx2) {
        (true, true) => Level::Avx512,
        (false, true) => Level::Avx2,
        _ => Level::Baseline,
    }
}
#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Baseline
}

/// Runs `f`, compiled for the widest vectors of this machine. The closure and the functions it calls must be inlined (mark them
/// `#[inline(always)]`). Results do not depend on the level: no operation is fused or reordered. A build without optimisation
/// (`opt-level = 0`) compiles `f` once, for the compiler's default vectors.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(all(target_arch = "x86_64", optimised))]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        match level() {
            // SAFETY: the features were detected.
            Level::Avx512 => return unsafe { avx512(f) },
            // SAFETY: the features were detected.
            Level::Avx2 => return unsafe { avx2(f) },
            Level::Baseline => {}
        }
    }
    f()
}
