fn main() {
    use prismgrad::device::cpu::gemm::{matmul, Mat};
    for (m, k, n) in [(1024usize, 1024usize, 1024usize), (4096, 768, 3072), (2048, 256, 1024)] {
        for (ta, tb) in [(false, false), (true, false), (false, true)] {
            let a = vec![0.5f32; m * k]; let b = vec![0.25f32; k * n]; let mut c = vec![0f32; m * n];
            let mut best = f64::MAX; let mut all = vec![];
            for _ in 0..12 {
                let ma = if ta { Mat::new(&a, k, m).t() } else { Mat::new(&a, m, k) };
                let mb = if tb { Mat::new(&b, n, k).t() } else { Mat::new(&b, k, n) };
                let t = std::time::Instant::now();
                matmul(ma, mb, false, &mut c);
                let s = t.elapsed().as_secs_f64(); best = best.min(s); all.push(s);
            }
            all.sort_by(f64::total_cmp);
            let g = 2.0 * (m * k * n) as f64 / 1e9;
            println!("{m}x{k}x{n} ta {ta} tb {tb}: median {:.0} best {:.0} GFLOP/s", g / all[6], g / best);
        }
    }
}
