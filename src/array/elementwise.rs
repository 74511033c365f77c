//! Element-by-element sums in place.

use crate::base::Element;
use crate::base::dtype::{of_bf16, to_bf16};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use half::bf16;

/// Adds `src` to `dst` element by element.
pub fn add_assign<T: Element>(dst: &mut [T], src: &[T]) {
    fn go<T: Element>(dst: &mut [T], src: &[T], f: impl Fn(T, T) -> T + Sync + Copy) {
        let n = dst.len();
        let dst = Shared::new(dst);
        par_chunks(n, GRAIN, |r| {
            // SAFETY: chunks are disjoint.
            let d = unsafe { dst.slice(r.clone()) };
            let s = &src[r];
            simd(
                #[inline(always)]
                || {
                    for (d, &s) in d.iter_mut().zip(s) {
                        *d = f(*d, s);
                    }
                },
            );
        });
    }
    match T::DTYPE {
        crate::base::DType::F32 => go::<f32>(bytemuck::cast_slice_mut(dst), bytemuck::cast_slice(src), |a, b| a + b),
        crate::base::DType::BF16 => {
            let (dst, src) = (bytemuck::cast_slice_mut(dst), bytemuck::cast_slice(src));
            go::<bf16>(
                dst,
                src,
                #[inline(always)]
                |a, b| to_bf16(of_bf16(a) + of_bf16(b)),
            )
        }
        _ => go(dst, src, |a, b| T::from_f64(a.to_f64() + b.to_f64())),
    }
}
