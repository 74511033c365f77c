pub fn simd<R>(f: impl FnOnce() -> R) -> R { f() }
