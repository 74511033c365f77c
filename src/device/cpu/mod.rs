//! The CPU backend: loops and products on slices.
pub mod attention;
pub mod elementwise;
pub mod factored;
pub mod gemm;
pub mod normalize;
pub mod par;
pub mod pool;
pub mod reduce;
pub mod rows;
pub mod shared;
pub mod simd;
pub mod unfold;
pub mod vmath;
