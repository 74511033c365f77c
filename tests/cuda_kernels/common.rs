//! Buffers, launches and comparisons.

use bytemuck::Pod;
use prismgrad::device::emulator::{Buffer, config};
use std::sync::MutexGuard;

pub struct Rng(pub u64);
impl Rng {
    /// In [−1, 1).
    pub fn f(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f64 / (1u64 << 24) as f64) * 2.0 - 1.0
    }
    pub fn vec(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.f()).collect()
    }
    pub fn below(&mut self, n: usize) -> usize {
        self.f();
        (self.0 >> 33) as usize % n
    }
}

/// An element type: its name in kernel names, and the error a few operations in it may make.
pub trait El: Pod {
    const NAME: &'static str;
    const TOL: f64;
    fn of(x: f64) -> Self;
    fn to(self) -> f64;
}
macro_rules! el {
    ($($t:ty, $name:literal, $tol:expr, |$x:ident| $of:expr, |$s:ident| $to:expr;)*) => {$(
        impl El for $t {
            const NAME: &'static str = $name;
            const TOL: f64 = $tol;
            fn of($x: f64) -> Self { $of }
            fn to(self) -> f64 { let $s = self; $to }
        }
    )*};
}
el! {
    f32, "f32", 2e-5, |x| x as f32, |s| s as f64;
    f64, "f64", 1e-12, |x| x, |s| s;
    half::bf16, "bf16", 1e-2, |x| half::bf16::from_f32(x as f32), |s| s.to_f64();
    half::f16, "f16", 2e-3, |x| half::f16::from_f32(x as f32), |s| s.to_f64();
    u8, "u8", 0.0, |x| x as u8, |s| s as f64;
    u32, "u32", 0.0, |x| x as u32, |s| s as f64;
    i64, "i64", 0.0, |x| x as i64, |s| s as f64;
}
/// A device buffer and its address.
pub struct Buf<T: Pod> {
    buffer: Buffer<T>,
    pub ptr: *mut T,
}
impl<T: Pod> Buf<T> {
    fn over(buffer: Buffer<T>) -> Self {
        let at = buffer.arg().try_into().expect("an address has as many bytes as a usize");
        Buf { buffer, ptr: usize::from_ne_bytes(at) as *mut T }
    }
    pub fn new(len: usize) -> Self {
        Buf::over(Buffer::new(len))
    }
    pub fn from(values: &[T]) -> Self {
        Buf::over(Buffer::from(values))
    }
    pub fn get(&self) -> Vec<T> {
        self.buffer.get()
    }
}
pub fn put<T: El>(v: &[f64]) -> Vec<T> {
    v.iter().map(|&x| T::of(x)).collect()
}
pub fn up<T: El>(v: &[f64]) -> Buf<T> {
    Buf::from(&put::<T>(v))
}
pub fn back<T: El>(v: &[T]) -> Vec<f64> {
    v.iter().map(|&x| x.to()).collect()
}
/// Rounded to T.
pub fn round<T: El>(v: &[f64]) -> Vec<f64> {
    v.iter().map(|&x| T::of(x).to()).collect()
}
pub fn null<T>() -> *const T {
    std::ptr::null()
}
pub fn nullm<T>() -> *mut T {
    std::ptr::null_mut()
}

/// |a − b| ≤ tol·(1 + |b|), or equal, or both NaN.
pub fn close(what: &str, a: &[f64], b: &[f64], tol: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let same = |a: f64, b: f64| (a - b).abs() <= tol * (1.0 + b.abs()) || a == b || (a.is_nan() && b.is_nan());
    let bad: Vec<usize> = (0..a.len()).filter(|&i| !same(a[i], b[i])).collect();
    if let Some(&i) = bad.first() {
        panic!("{what}: {} of {} differ, first [{i}] {} want {}", bad.len(), a.len(), a[i], b[i]);
    }
}

pub const SEEDS: [(i64, i64); 4] = [(0, 0), (1, 0), (2, 0), (3, 50)];
pub fn seed(s: (i64, i64)) {
    config("seed", s.0);
    config("preempt", s.1);
}
pub fn setup() -> MutexGuard<'static, ()> {
    prismgrad::device::emulator::lock()
}
/// Grid of an elementwise kernel.
pub fn quads(n: usize) -> [u32; 3] {
    [n.div_ceil(1024) as u32, 1, 1]
}
/// The bytes of an argument without padding.
pub fn bytes<T: Copy>(v: &T) -> Vec<u8> {
    // SAFETY: plain values, read once.
    unsafe { std::slice::from_raw_parts((v as *const T).cast::<u8>(), size_of::<T>()) }.to_vec()
}
/// Launches with blocks of 256 (and so many bytes of shared memory); a fault fails the test with its report.
macro_rules! go {
    ($name:expr, $grid:expr; $($a:expr),*) => { go!($name, $grid, 0; $($a),*) };
    ($name:expr, $grid:expr, $shared:expr; $($a:expr),*) => {{
        let name: String = $name.to_string();
        let args = [$($crate::common::bytes(&$a)),*];
        if let Err(e) = prismgrad::device::emulator::launch(&name, $grid, [256, 1, 1], $shared, false, &args) {
            panic!("{name}: {e}");
        }
    }};
}
