//! Sorting of ids: a pass for every 8 bits of the largest. Tables of an op's cases are too short for three passes.
use crate::common::*;

#[test]
fn sort_ids() {
    let _g = setup();
    for s in SEEDS {
        seed(s);
        for (n, v) in [(1usize, 1usize), (5, 3), (1024, 300), (3000, 70_000), (2500, 2)] {
            let mut r = Rng(n as u64);
            let ids: Vec<u32> = (0..n).map(|_| r.below(v) as u32).collect();
            let blocks = n.div_ceil(1024);
            let (mut a, mut o, mut b, mut p) =
                (Buf::from(&ids), Buf::<u32>::new(n), Buf::<u32>::new(n), Buf::<u32>::new(n));
            let c = Buf::<u32>::new(256 * blocks);
            let mut shift = 0;
            while shift == 0 || v >> shift > 0 {
                go!("radix_count", [blocks as u32, 1, 1]; a.ptr, c.ptr, n as i64, shift);
                go!("scan_u32", [1u32, 1, 1]; c.ptr, (256 * blocks) as i64);
                go!("radix_move", [blocks as u32, 1, 1]; a.ptr, if shift == 0 { nullm() } else { o.ptr }, b.ptr, p.ptr, c.ptr, n as i64, shift);
                std::mem::swap(&mut a, &mut b);
                std::mem::swap(&mut o, &mut p);
                shift += 8;
            }
            let mut want: Vec<u32> = (0..n as u32).collect();
            want.sort_by_key(|&i| ids[i as usize]);
            assert_eq!(o.get(), want);
            let st = Buf::<i64>::new(v + 1);
            go!("run_starts", [(v + 1).div_ceil(256) as u32, 1, 1]; a.ptr, st.ptr, n as i64, v as i64);
            let sorted = a.get();
            assert!(
                st.get().iter().enumerate().all(|(k, &x)| x == sorted.partition_point(|&i| (i as usize) < k) as i64)
            );
        }
    }
}
