//! Same bits under every schedule: split K on the tensor cores, Gram norms in parts.
use crate::common::*;
use prismgrad::device::cuda::layouts::{GRAM_SHARED, GemmShape, GramShape, PAIR_PRODUCT};

#[test]
fn same_bits() {
    let _g = setup();
    let (m, n, k) = (70usize, 40usize, 200usize);
    let mut r = Rng(3);
    let (a, b) = (up::<half::bf16>(&r.vec(m * k)), up::<half::bf16>(&r.vec(n * k)));
    let (a32, b32) = (up::<f32>(&r.vec(m * k)), up::<f32>(&r.vec(n * k)));
    let (ids, offsets) = (null::<u32>(), null::<i64>());
    let none = null::<half::bf16>();
    let mut first: Option<(Vec<u16>, Vec<u64>)> = None;
    for s in SEEDS {
        seed(s);
        let (c, part, norms) = (Buf::<half::bf16>::new(m * n), Buf::<f32>::new(m * n * 3), Buf::<f64>::new(2 * 3));
        let gemm = GemmShape {
            m: m as i64,
            n: n as i64,
            k: k as i64,
            a_rs: k as i64,
            a_cs: 1,
            b_rs: 1,
            b_cs: k as i64,
            c_rs: n as i64,
            batch0: 1,
            batch1: 1,
            each: 1,
            alpha: 1.0,
            splits: 3,
            ..bytemuck::Zeroable::zeroed()
        };
        go!("gemm_nt_bf16", [3, 1, 1], 65_536; a.ptr, b.ptr, c.ptr, none, none, null::<f32>(), ids, part.ptr, gemm);
        go!("gemm_splitk_bf16", [3, 1, 1]; part.ptr, c.ptr, none, none, gemm);
        let none64 = null::<f64>();
        let gram = GramShape {
            rd: k as i64,
            cd: k as i64,
            l1_rs: k as i64,
            r1_rs: k as i64,
            l2_rs: k as i64,
            r2_rs: k as i64,
            count1: 2,
            count2: 2,
            each1: 20,
            each2: 20,
            kind: PAIR_PRODUCT,
            same: 1,
            all_pairs: 0,
            reserved: 0,
            gamma_l: 1e-5,
            gamma_r: 1e-5,
            least_l: 0.0,
            least_r: 0.0,
        };
        go!("factor_gram_f32", [3, 2, 1], GRAM_SHARED as u32; a32.ptr, b32.ptr, a32.ptr, b32.ptr, ids, ids, offsets, offsets, ids, ids, norms.ptr, none64, none64, none64, none64, nullm::<f64>(), gram);
        let now = (
            c.get().iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            norms.get().iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        );
        if let Some(f) = &first { assert!(*f == now) } else { first = Some(now) }
    }
}
