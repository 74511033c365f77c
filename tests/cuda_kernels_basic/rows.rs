use crate::common::*;
use prismgrad::ops::loss::{CrossEntropy, Reduce, binary_cross_entropy_with_logits, cross_entropy};
use prismgrad::ops::norm::{layer_norm, rms_norm};
use prismgrad::{Array, Param, Samples, Tensor};
fn arr(v: &[f64], s: &[usize]) -> Array {
    Array::from_slice(v, s).unwrap()
}
fn t64(v: &[f64], s: &[usize]) -> Tensor {
    Tensor::leaf(arr(v, s))
}
const SIZES: [[usize; 2]; 6] = [[1, 1], [3, 5], [17, 33], [9, 1024], [2, 1025], [1, 3000]];

fn softmaxes<T: Acc>() {
    let mut r = Rng(1);
    let s = T::NAME;
    for [n, d] in SIZES {
        let mut v: Vec<f64> = r.vec(n * d).iter().map(|x| x * 8.).collect();
        if n == 17 {
            v[40] = f64::NAN;
            v[80] = f64::INFINITY;
            (100..132).for_each(|i| v[i] = f64::NEG_INFINITY);
            (33 * 5..33 * 6).for_each(|i| v[i] = f64::NEG_INFINITY);
        }
        let v = round::<T>(&v);
        let (x, y, dx) = (up::<T>(&v), Buf::<T>::new(n * d), Buf::<T>::new(n * d));
        for log in [false, true] {
            let t = t64(&v, &[n, d]);
            let w = if log { t.log_softmax(-1) } else { t.softmax(-1) }.unwrap();
            let name = if log { "log_softmax" } else { "softmax" };
            go!(format!("{name}_{s}"), row_grid(n, d); x.ptr, y.ptr, n as i64, d as i64);
            let clip =
                |v: Vec<f64>| v.into_iter().map(|x| if x == f64::NEG_INFINITY { -1e9 } else { x }).collect::<Vec<_>>();
            close(name, &clip(back(&y.get())), &clip(w.array().to_f64()), T::TOL);
            if n == 17 {
                continue;
            }
            let g = round::<T>(&r.vec(n * d));
            let want = w.mul(&t64(&g, &[n, d])).unwrap().backward().unwrap().of(&t).unwrap().to_f64();
            let dy = up::<T>(&g);
            go!(format!("{name}_grad_{s}"), row_grid(n, d); y.ptr, dy.ptr, dx.ptr, n as i64, d as i64);
            close(&format!("{name} grad"), &back(&dx.get()), &want, T::TOL * if log { 20. } else { 4. });
        }
    }
}
#[test]
fn softmax() {
    let _g = setup();
    floats!(softmaxes);
}

fn norms<T: Acc>() {
    let mut r = Rng(2);
    let s = T::NAME;
    for [n, d] in SIZES {
        if d == 1 {
            continue;
        }
        let v = round::<T>(&r.vec(n * d).iter().map(|x| x + 0.5).collect::<Vec<_>>());
        let (gv, bv) = (round::<f32>(&r.vec(d)), round::<f32>(&r.vec(d)));
        let (x, gain, bias) = (up::<T>(&v), up::<T::A>(&gv), up::<T::A>(&bv));
        let (y, stats, dx, xhat) =
            (Buf::<T>::new(n * d), Buf::<T::A>::new(2 * n), Buf::<T>::new(n * d), Buf::<T::A>::new(n * d));
        for kind in 0..3 {
            let (g, b) = (Param::new("g", arr(&gv, &[d])), Param::new("b", arr(&bv, &[d])));
            let t = t64(&v, &[n, d]);
            let w = match kind {
                0 => layer_norm(&t, Some(&g), Some(&b), 1e-5, None),
                1 => rms_norm(&t, Some(&g), 1e-5, None),
                _ => layer_norm(&t, None, None, 1e-5, None),
            }
            .unwrap();
            let (pg, pb) = (if kind < 2 { gain.ptr } else { nullm() }, if kind == 0 { bias.ptr } else { nullm() });
            let center = (kind != 1) as i32;
            go!(format!("norm_{s}"), row_grid(n, d); x.ptr, pg, pb, y.ptr, stats.ptr, n as i64, d as i64, 1e-5f64, center);
            close("norm", &back(&y.get()), &w.array().to_f64(), T::TOL * 4.);
            let dyv = round::<T>(&r.vec(n * d));
            let back_ = w.mul(&t64(&dyv, &[n, d])).unwrap().backward().unwrap();
            let dy = up::<T>(&dyv);
            go!(format!("norm_grad_{s}"), row_grid(n, d); x.ptr, stats.ptr, dy.ptr, pg, dx.ptr, if kind < 2 { xhat.ptr } else { nullm() }, nullm::<T::A>(), n as i64, d as i64, center);
            close("norm grad", &back(&dx.get()), &back_.of(&t).unwrap().to_f64(), T::TOL * 8.);
            if kind < 2 {
                let h = back(&xhat.get());
                let mut sum = vec![0.; d];
                for i in 0..n * d {
                    sum[i % d] += h[i] * dyv[i];
                }
                let w = back_.param(&g).unwrap().sum().unwrap().to_f64();
                close("gain grad", &sum, &w, T::TOL * 8.);
            }
        }
    }
}
#[test]
fn norm() {
    let _g = setup();
    floats!(norms);
}

fn losses<T: Acc>() {
    let mut r = Rng(3);
    let s = T::NAME;
    for [n, d] in [[4usize, 1usize], [6, 5], [40, 33], [6, 1500]] {
        let v = round::<T>(&r.vec(n * d).iter().map(|x| x * 5.).collect::<Vec<_>>());
        let mut targets: Vec<u32> = (0..n).map(|_| r.below(d) as u32).collect();
        if d > 1 {
            targets[0] = 9999;
            targets[1] = 9999;
            targets[5] = 9999;
        }
        let owner: Vec<u32> = (0..n).map(|_| r.below(3) as u32).collect();
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by_key(|&i| owner[i as usize]);
        let offsets: Vec<i64> = (0..=3).map(|k| owner.iter().filter(|&&o| (o as i64) < k).count() as i64).collect();
        for uniform in [true, false] {
            for (smooth, mean) in [(0.0, true), (0.1, false)] {
                let t = t64(&v, &[n / 2, 2, d]);
                let b = if uniform { n / 2 } else { 3 };
                let samples =
                    if uniform { Samples::uniform(n / 2, 2) } else { Samples::owners(owner.clone(), 3).unwrap() };
                let o = CrossEntropy {
                    ignore_index: Some(9999),
                    label_smoothing: smooth,
                    reduce: if mean { Reduce::Mean } else { Reduce::Sum },
                    samples: Some(samples),
                };
                let w = cross_entropy(&t, Array::from_slice(&targets, &[n / 2, 2]).unwrap(), &o).unwrap();
                let want = w.array().to_f64();
                let (x, bt, l, z) = (up::<T>(&v), Buf::from(&targets), Buf::<T::A>::new(n), Buf::<T::A>::new(n));
                go!(format!("cross_entropy_{s}"), row_grid(n, d); x.ptr, bt.ptr, l.ptr, z.ptr, n as i64, d as i64, smooth, 9999i64);
                let (off, ord, own) = (Buf::from(&offsets), Buf::from(&order), Buf::from(&owner));
                let (out, weight) = (Buf::<T::A>::new(b), Buf::<T::A>::new(n));
                let (po, pr, pw) = if uniform { (nullm(), nullm(), nullm()) } else { (off.ptr, ord.ptr, own.ptr) };
                go!(format!("sample_loss_{}", T::A::NAME), [b.div_ceil(8) as u32, 1, 1]; l.ptr, bt.ptr, po, pr, out.ptr, weight.ptr, b as i64, 2i64, 9999i64, mean as i32);
                close("loss", &back(&out.get()), &want, <T::A as El>::TOL * 2.);
                let gv = round::<f32>(&r.vec(b));
                let want = w.mul(&t64(&gv, &[b])).unwrap().backward().unwrap().of(&t).unwrap().to_f64();
                let (g, dx) = (up::<T::A>(&gv), Buf::<T>::new(n * d));
                go!(format!("cross_entropy_grad_{s}"), row_grid(n, d); x.ptr, z.ptr, bt.ptr, weight.ptr, g.ptr, pw, dx.ptr, n as i64, d as i64, 2i64, smooth, 9999i64);
                close("loss grad", &back(&dx.get()), &want, T::TOL * 2.);
            }
        }
    }
    let (n, xv, tv, gv) = (
        37usize,
        round::<T>(&r.vec(37)),
        round::<T>(&r.vec(37).iter().map(|x| x.abs()).collect::<Vec<_>>()),
        round::<T>(&r.vec(37)),
    );
    let (x, t, g, y) = (up::<T>(&xv), up::<T>(&tv), up::<T>(&gv), Buf::<T>::new(n));
    let a = t64(&xv, &[n]);
    let w = binary_cross_entropy_with_logits(&a, &t64(&tv, &[n]).detach(), Reduce::Sum).unwrap();
    if size_of::<T>() == 2 {
        return;
    }
    go!(format!("bce_{s}"), quads(n); x.ptr, t.ptr, y.ptr, n as i64, flat::<2>(n));
    close("bce", &back(&y.get()), &w.array().to_f64(), T::TOL);
    let want = w.mul(&t64(&gv, &[n])).unwrap().backward().unwrap().of(&a).unwrap().to_f64();
    go!(format!("bce_grad_{s}"), quads(n); x.ptr, t.ptr, g.ptr, y.ptr, n as i64, flat::<3>(n));
    close("bce grad", &back(&y.get()), &want, T::TOL);
    if size_of::<T>() == 4 {
        return;
    }
    go!(format!("xlogx_{s}"), quads(n); t.ptr, y.ptr, n as i64, flat::<1>(n));
    close(
        "xlogx",
        &back(&y.get()),
        &tv.iter().map(|&x| if x > 0. { x * x.ln() } else { 0. }).collect::<Vec<_>>(),
        T::TOL,
    );
}
#[test]
fn loss() {
    let _g = setup();
    floats!(losses);
}
