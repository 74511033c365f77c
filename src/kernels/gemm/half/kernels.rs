//! Micro-kernels on packed words: matrix tiles, dot products, and single multiply-adds.

use crate::device::cpu::simd::{Bf16Products, bf16_products};
use crate::kernels::gemm::kernel::{Into, Kernels};

/// Columns of the widest kernel.
pub const WIDE: usize = 32;
/// Results of the largest kernel.
pub const MAX_TILE: usize = 32 * 32;

/// Words along K of a tile.
pub const BLOCK: usize = 16;

/// A micro-kernel on packed words, and the layout of its operands.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub mr: usize,
    pub nr: usize,
    /// Numbers in a word.
    pub per: usize,
    /// The number of words along K must be a multiple of this.
    pub step: usize,
    /// Whether the left panel is laid out as rows of tiles.
    pub tiles: bool,
    /// The function, which receives the number of words along K.
    pub into: Into<f32>,
}

/// The kernel of this processor.
pub fn kernel() -> Kernel {
    match bf16_products() {
        #[cfg(target_arch = "x86_64")]
        Bf16Products::Tiles => Kernel { mr: 32, nr: 32, per: 2, step: 16, tiles: true, into: tiles },
        #[cfg(target_arch = "x86_64")]
        Bf16Products::Dots => Kernel { mr: 12, nr: 32, per: 2, step: 1, tiles: false, into: dots },
        _ => {
            let k = f32::kernel();
            Kernel { mr: k.mr, nr: k.nr, per: 1, step: 1, tiles: false, into: k.into }
        }
    }
}

impl Kernel {
    /// The same kernel in f32, for panels with non-finite numbers: tiles and dot products replace a denormal number by zero, and zero times
    /// infinity is NaN.
    pub fn careful(self) -> Kernel {
        match (self.per, self.tiles) {
            (2, true) => Kernel { into: careful::<32, true>, ..self },
            (2, false) => Kernel { into: careful::<12, false>, ..self },
            _ => self,
        }
    }
}

/// MR × 32 results from packed words by single multiply-adds.
unsafe fn careful<const MR: usize, const TILES: bool>(
    words: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: panels hold MR and 32 words for each of `words`.
    let (a, b) = unsafe {
        (
            std::slice::from_raw_parts(a.cast::<u32>(), words * MR),
            std::slice::from_raw_parts(b.cast::<u32>(), words * WIDE),
        )
    };
    for i in 0..MR {
        // SAFETY: the tile has MR rows of 32, `ldc` apart.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(i * ldc), WIDE) };
        if !add {
            c.fill(0.0);
        }
        for p in 0..words {
            let x = if TILES { a[p / BLOCK * BLOCK * MR + i * BLOCK + p % BLOCK] } else { a[p * MR + i] };
            for (c, &y) in c.iter_mut().zip(&b[p * WIDE..(p + 1) * WIDE]) {
                *c = f32::from_bits(x << 16).mul_add(f32::from_bits(y << 16), *c);
                *c = f32::from_bits(x & 0xffff_0000).mul_add(f32::from_bits(y & 0xffff_0000), *c);
            }
        }
    }
}

/// 12 × 32 results in 24 accumulators: for each word along K, 24 dot products of pairs for 2 loads and 12 broadcasts.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn dots(words: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool) {
    use std::arch::x86_64::*;
    const MR: usize = 12;
    let (mut a, mut b) = (a.cast::<i32>(), b);
    let mut acc = [[_mm512_setzero_ps(); 2]; MR];
    // SAFETY: panels hold 12 and 32 words for each of `words`; the tile has 12 rows of 32, `ldc` apart.
    unsafe {
        let pair = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        for _ in 0..words {
            let (b0, b1) = (pair(_mm512_loadu_si512(b.cast())), pair(_mm512_loadu_si512(b.add(16).cast())));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = pair(_mm512_set1_epi32(*a.add(i)));
                acc[0] = _mm512_dpbf16_ps(acc[0], x, b0);
                acc[1] = _mm512_dpbf16_ps(acc[1], x, b1);
            }
            a = a.add(MR);
            b = b.add(32);
        }
        for (i, acc) in acc.iter().enumerate() {
            for (j, &v) in acc.iter().enumerate() {
                let c = c.add(i * ldc + j * 16);
                _mm512_storeu_ps(c, if add { _mm512_add_ps(_mm512_loadu_ps(c), v) } else { v });
            }
        }
    }
}

/// The shape of the eight tile registers: 16 rows of 64 bytes each.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct TileShapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

#[cfg(target_arch = "x86_64")]
static SHAPES: TileShapes = TileShapes {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// 32 × 32 results in four tile registers: for each 16 words along K, 4 loads and 4 products.
///
/// The instructions are written in assembly because the compiler's intrinsics for them are not stable.
#[cfg(target_arch = "x86_64")]
unsafe fn tiles(words: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool) {
    // SAFETY: panels hold 32 words of each operand for each of `words`, a multiple of 16; the tile has 32 rows of 32, `ldc` apart. The
    // tile registers are this block's alone: shaped at its start, released at its end.
    unsafe {
        std::arch::asm!(
            "ldtilecfg [{shapes}]",
            "test {add:e}, {add:e}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {ldc}*1]",
            "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
            "tileloadd tmm2, [{low} + {ldc}*1]",
            "tileloadd tmm3, [{low} + {ldc}*1 + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "test {blocks}, {blocks}",
            "jz 5f",
            "4:",
            "tileloadd tmm4, [{a} + {sa}*1]",
            "tileloadd tmm6, [{b} + {sb}*1]",
            "tileloadd tmm7, [{b} + {sb}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a} + {sa}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {blocks}",
            "jnz 4b",
            "5:",
            "tilestored [{c} + {ldc}*1], tmm0",
            "tilestored [{c} + {ldc}*1 + 64], tmm1",
            "tilestored [{low} + {ldc}*1], tmm2",
            "tilestored [{low} + {ldc}*1 + 64], tmm3",
            "tilerelease",
            shapes = in(reg) &raw const SHAPES,
            add = in(reg) add as u32,
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            c = in(reg) c,
            low = in(reg) c.add(16 * ldc),
            ldc = in(reg) ldc * 4,
            sa = in(reg) 64usize,
            sb = in(reg) 128usize,
            blocks = inout(reg) words / 16 => _,
            options(nostack),
        );
    }
}
