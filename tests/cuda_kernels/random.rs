//! Random bits and noise against the CPU to the bit, and optimizers with constants that are read from memory.
use crate::common::*;
use prismgrad::optim::{AdamW, FlatLayout, Optimizer, Segment, Sgd, Update};
use prismgrad::random::{NoiseKey, add_gaussian, philox};
use prismgrad::{Array, DType};
fn arr(v: &[f64], s: &[usize]) -> Array {
    Array::from_slice(v, s).unwrap()
}

#[test]
fn philox_bits() {
    let _g = setup();
    let (seed, stream) = (77u64 << 40 | 3, 5u64);
    for n in [1usize, 6, 2001] {
        let (y, z) = (Buf::<f64>::new(n), Buf::<f32>::new(n));
        go!("philox_uniform_f64", [n.div_ceil(512) as u32, 1, 1]; y.ptr, n as i64, seed, stream, 0f64);
        for (i, u) in y.get().iter().enumerate() {
            assert_eq!(*u, philox::uniform(seed, stream, i as u64));
        }
        go!("philox_uniform_f32", [n.div_ceil(512) as u32, 1, 1]; z.ptr, n as i64, seed, stream, 0.3f64);
        for (i, u) in z.get().iter().enumerate() {
            assert_eq!(*u, (0.3 * (2.0 * philox::uniform(seed, stream, i as u64) - 1.0)) as f32);
        }
        go!("philox_normal_f64", [n.div_ceil(512) as u32, 1, 1]; y.ptr, n as i64, seed, stream, 1f64);
        for (i, u) in y.get().iter().enumerate() {
            assert_eq!(*u, philox::normal(seed, stream, i as u64));
        }
        go!("philox_normal_f32", [n.div_ceil(512) as u32, 1, 1]; z.ptr, n as i64, seed, stream, 0.02f64);
        for (i, u) in z.get().iter().enumerate() {
            assert_eq!(*u, (0.02 * philox::normal(seed, stream, i as u64)) as f32);
        }
    }
}
#[test]
fn chacha_bits() {
    let _g = setup();
    for s in SEEDS {
        seed(s);
        let key = NoiseKey::from_bytes(std::array::from_fn(|i| 3 * i as u8 + 1));
        let words: Vec<u32> =
            key.to_bytes().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let words = Buf::from(&words[..]);
        for (first, n, step) in [(0u64, 1usize, 3u64), (5, 700, 1 << 33), (255, 2, 0), (1 << 36, 4097, 7)] {
            let init: Vec<f64> = round::<f32>(&Rng(1).vec(n));
            let (y, z) = (up::<f32>(&init), up::<f64>(&init));
            let groups = (first + n as u64).div_ceil(256) - first / 256;
            let grid = [(16 * groups).div_ceil(256) as u32, 1, 1];
            // 1.5·2⁵² steps of 2⁻²⁰: the grid of a standard deviation from 1 to 2.
            let magic = 1.5 * 2f64.powi(32);
            go!("chacha_gaussian_f32", grid; y.ptr, n as i64, words.ptr, step, first, 1.7f64, magic, null::<u64>());
            let mut want: Vec<f32> = init.iter().map(|&x| x as f32).collect();
            add_gaussian(&key, step, first, 1.7, &mut want);
            assert!(y.get() == want, "{first} {n}");
            let live = Buf::from(&[step]);
            go!("chacha_gaussian_f64", grid; z.ptr, n as i64, words.ptr, 99u64, first, 1.7f64, magic, live.ptr);
            let mut want = init.clone();
            add_gaussian(&key, step, first, 1.7, &mut want);
            assert!(z.get() == want, "{first} {n}");
        }
        // Rare radii: the first block of this key and step with a word below 2¹⁶ in the place of one, found on the CPU.
        let (n, at) = (1usize << 18, 0u64);
        let (y, grid) = (up::<f64>(&vec![0.0; n]), [(16 * n.div_ceil(256)).div_ceil(256) as u32, 1, 1]);
        go!("chacha_gaussian_f64", grid; y.ptr, n as i64, words.ptr, 1u64, at, 1f64, 1.5 * 2f64.powi(32), null::<u64>());
        let mut want = vec![0f64; n];
        add_gaussian(&key, 1, at, 1.0, &mut want);
        assert!(want.iter().any(|z| z.abs() > 4.5) && y.get() == want);
    }
}
#[test]
fn release_keys() {
    let _g = setup();
    let key = NoiseKey::from_bytes(std::array::from_fn(|i| 7 * i as u8));
    let words: [u32; 8] =
        std::array::from_fn(|i| u32::from_le_bytes(key.to_bytes()[4 * i..4 * i + 4].try_into().unwrap()));
    let (step, context, digest) = (5u64 << 32 | 9, [1u32, 2, 3, 4], [5u32, 6, 7, 8]);
    let wide = |a: u32, b: u32| a as u64 | (b as u64) << 32;
    let (low, high) = (wide(context[0], context[1]), wide(context[2], context[3]));
    let bytes = |out: &Buf<u32>| -> Vec<u8> { out.get().iter().flat_map(|w| w.to_le_bytes()).collect() };
    let (given, live, out) = (Buf::from(&digest), Buf::from(&[step]), Buf::<u32>::new(8));
    go!("chacha_release", [1, 1, 1]; words, step, low, high, given.ptr, out.ptr, null::<u64>());
    assert_eq!(bytes(&out), key.for_release(step, context, digest).to_bytes());
    go!("chacha_release", [1, 1, 1]; words, 0u64, low, high, null::<u32>(), out.ptr, live.ptr);
    assert_eq!(bytes(&out), key.for_release(step, context, [0; 4]).to_bytes());
}
fn optimizers<T: El + prismgrad::Element>() {
    let mut r = Rng(1);
    for n in [1usize, 7, 1500] {
        let ends: Vec<usize> = if n > 100 { vec![3, 5, 5, 700, 701, n] } else { vec![n] };
        let segs: Vec<Segment> = ends
            .iter()
            .enumerate()
            .map(|(k, &e)| Segment { range: if k == 0 { 0 } else { ends[k - 1] }..e, decay: k % 2 == 0 })
            .collect();
        let layout = FlatLayout::new(segs, n);
        let [p, g, m, v] = [0; 4].map(|_| round::<T>(&r.vec(n)));
        let v: Vec<f64> = v.iter().map(|x| x.abs()).collect();
        let dt = if T::NAME == "f32" { DType::F32 } else { DType::F64 };
        let a = |x: &[f64]| arr(x, &[n]).cast(dt);
        let (be, bd) = (
            Buf::from(&ends.iter().map(|&e| e as i64).collect::<Vec<_>>()),
            Buf::from(&(0..ends.len()).map(|k| (k % 2 == 0) as u8).collect::<Vec<_>>()),
        );
        let o = AdamW { weight_decay: 0.1, ..AdamW::default() };
        let (mut wp, mut state) = (a(&p), vec![a(&m), a(&v)]);
        o.update(Update::new((5, 0.01), &mut wp, &a(&g), &mut state, &layout)).unwrap();
        let (c1, c2) = (1.0 - o.beta1.powi(5), 1.0 - o.beta2.powi(5));
        let args =
            [o.beta1, 1.0 - o.beta1, o.beta2, 1.0 - o.beta2, 0.01 / c1, 1.0 / f64::sqrt(c2), o.eps, 1.0 - 0.01 * 0.1];
        for live in [false, true] {
            let [bp, bg, bm, bv] = [&p, &g, &m, &v].map(|x| up::<T>(x));
            let bl = Buf::from(&[args[4], args[5], args[7]]);
            let mut args = args;
            if live {
                args[4] = 9.;
                args[5] = 9.;
                args[7] = 9.;
            }
            go!(format!("adamw_{}", T::NAME), quads(n); bp.ptr, bg.ptr, bm.ptr, bv.ptr, n as i64, be.ptr, bd.ptr, ends.len() as i32, args, if live { bl.ptr } else { nullm() }, null::<u64>());
            close("adamw p", &back(&bp.get()), &wp.to_f64(), T::TOL / 10.);
            close("adamw m", &back(&bm.get()), &state[0].to_f64(), T::TOL / 10.);
            close("adamw v", &back(&bv.get()), &state[1].to_f64(), T::TOL / 10.);
        }
        for mu in [0.0, 0.9] {
            let o = Sgd { momentum: mu, weight_decay: 0.1 };
            let (mut wp, mut state) = (a(&p), if mu == 0. { vec![] } else { vec![a(&m)] });
            o.update(Update::new((1, 0.01), &mut wp, &a(&g), &mut state, &layout)).unwrap();
            let [bp, bg, bm] = [&p, &g, &m].map(|x| up::<T>(x));
            go!(format!("sgd_{}", T::NAME), quads(n); bp.ptr, bg.ptr, if mu == 0. { nullm() } else { bm.ptr }, n as i64, be.ptr, bd.ptr, ends.len() as i32, 0.01f64, mu, 1.0 - 0.01 * 0.1, null::<f64>(), null::<u64>());
            close("sgd", &back(&bp.get()), &wp.to_f64(), T::TOL / 10.);
        }
    }
}
#[test]
fn optim() {
    let _g = setup();
    for s in SEEDS {
        seed(s);
        optimizers::<f32>();
        optimizers::<f64>();
    }
}
