use crate::common::*;
use prismgrad::{Array, Tensor};
fn t64(v: &[f64], s: &[usize]) -> Tensor {
    Tensor::leaf(Array::from_slice(v, s).unwrap())
}

fn reductions<T: Acc>() {
    let mut r = Rng(1);
    let s = T::NAME;
    for [o, n, i] in
        [[1usize, 1, 1], [3, 5, 1], [9, 33, 1], [2, 1100, 1], [2, 7, 5], [3, 40, 33], [1, 600, 3], [10, 1, 4]]
    {
        let count = o * n * i;
        let mut v: Vec<f64> = r.vec(count).iter().map(|x| (x * 8.).round() / 4.).collect();
        if count > 100 {
            v[count / 2] = f64::NAN;
            v[count / 3] = f64::INFINITY;
            v[count - 1] = f64::NEG_INFINITY
        }
        let clean: Vec<f64> = v.iter().map(|x| if x.is_finite() { *x } else { 0.25 }).collect();
        for (nan, v) in [(true, round::<T>(&v)), (false, round::<T>(&clean))] {
            let x = t64(&v, &[o, n, i]);
            let bx = up::<T>(&v);
            let (y, idx) = (Buf::<T>::new(o * i), Buf::<u32>::new(o * i));
            let (oo, nn, ii) = (o as i64, n as i64, i as i64);
            let want = x.mean(&[1], false).unwrap().array().to_f64();
            if !nan {
                go!(format!("sum_cols_{s}"), [(o * i.div_ceil(32)) as u32, 1, 1]; bx.ptr, y.ptr, oo, nn, ii, 1.0 / n as f64);
                close("sum_cols", &back(&y.get()), &want, T::TOL * 4.);
                let part = Buf::<T::A>::new(o * n.div_ceil(7) * i);
                go!(format!("sum_cols_part_{s}"), [(o * n.div_ceil(7) * i.div_ceil(32)) as u32, 1, 1]; bx.ptr, part.ptr, oo, nn, ii, 7i64);
                go!(format!("sum_cols_last_{s}"), [(o * i.div_ceil(32)) as u32, 1, 1]; part.ptr, y.ptr, oo, n.div_ceil(7) as i64, ii, 1.0 / n as f64);
                close("sum_cols_part", &back(&y.get()), &want, T::TOL * 4.);
                if i == 1 {
                    go!(format!("sum_rows_{s}"), row_grid(o, n); bx.ptr, y.ptr, oo, nn, 1.0 / n as f64);
                    close("sum_rows", &back(&y.get()), &want, T::TOL * 4.);
                    let part = Buf::<T::A>::new(o * n.div_ceil(300));
                    go!(format!("sum_rows_part_{s}"), [(o * n.div_ceil(300)) as u32, 1, 1]; bx.ptr, part.ptr, oo, nn, 300i64);
                    go!(format!("sum_rows_last_{s}"), row_grid(o, n.div_ceil(300)); part.ptr, y.ptr, oo, n.div_ceil(300) as i64, 1.0 / n as f64);
                    close("sum_rows_part", &back(&y.get()), &want, T::TOL * 4.);
                }
                for rev in [0, 1] {
                    let dy = Buf::<T>::new(count);
                    let want = if rev == 0 {
                        x.cumsum(1).unwrap().array().to_f64()
                    } else {
                        let g = x.cumsum(1).unwrap().mul(&t64(&v, &[o, n, i])).unwrap().backward().unwrap();
                        g.of(&x).unwrap().to_f64()
                    };
                    go!(format!("cumsum_cols_{s}"), [(o * i).div_ceil(256) as u32, 1, 1]; bx.ptr, dy.ptr, oo, nn, ii, rev);
                    close("cumsum_cols", &back(&dy.get()), &want, T::TOL * 4.);
                    if i == 1 {
                        go!(format!("cumsum_rows_{s}"), row_grid(o, n); bx.ptr, dy.ptr, oo, nn, rev);
                        close("cumsum_rows", &back(&dy.get()), &want, T::TOL * 4.);
                    }
                }
            }
            for mode in 0..3 {
                let want_i: Option<Vec<f64>> = (mode == 2).then(|| x.argmax(1).unwrap().array().to_f64());
                let gv = round::<T>(&r.vec(o * i));
                if i == 1 {
                    let want =
                        (mode < 2).then(|| if mode == 0 { x.max(&[1], false) } else { x.min(&[1], false) }.unwrap());
                    go!(format!("max_rows_{s}"), row_grid(o, n); bx.ptr, y.ptr, idx.ptr, oo, nn, mode);
                    if let Some(w) = &want_i {
                        close("argmax", &back(&idx.get()), w, 0.);
                    }
                    if let Some(w) = &want {
                        for (a, b) in back(&y.get()).iter().zip(w.array().to_f64()) {
                            assert!(*a == b || a.is_nan() && b.is_nan());
                        }
                        let g = w.mul(&t64(&gv, &[o, i])).unwrap().backward().unwrap();
                        let (dg, dx) = (up::<T>(&gv), up::<T>(&vec![0.; count]));
                        go!(format!("unpick_b{}", std::mem::size_of::<T>()), quads(o * i); dg.ptr, idx.ptr, dx.ptr, (o * i) as i64, 1i64, nn, ii);
                        close("unpick", &back(&dx.get()), &g.of(&x).unwrap().to_f64(), 0.);
                    }
                }
            }
            let w = x.logsumexp(&[1], false).unwrap();
            let same = |what: &str, a: &[f64], b: &[f64], tol: f64| {
                for (a, b) in a.iter().zip(b) {
                    assert!(
                        a == b || (a - b).abs() <= tol * (1. + b.abs()) || a.is_nan() && b.is_nan(),
                        "{what} {a} {b}"
                    );
                }
            };
            if i == 1 {
                go!(format!("logsumexp_rows_{s}"), row_grid(o, n); bx.ptr, y.ptr, oo, nn);
                same("lse rows", &back(&y.get()), &w.array().to_f64(), T::TOL * 2.);
            }
            if !nan {
                let gv = round::<T>(&r.vec(o * i));
                let g = w.mul(&t64(&gv, &[o, i])).unwrap().backward().unwrap();
                let (dg, dx) = (up::<T>(&gv), Buf::<T>::new(count));
                let y = up::<T>(&w.array().to_f64());
                let (full, thin) = (row_major(&[o, n, i]), [i, 0, 1]);
                go!(format!("logsumexp_grad_{s}"), quads(count); bx.ptr, y.ptr, dg.ptr, dx.ptr, count as i64, strided(&[o, n, i], [&full, &thin, &thin]));
                close("lse grad", &back(&dx.get()), &g.of(&x).unwrap().to_f64(), T::TOL * 4.);
            }
        }
    }
}
#[test]
fn reduce_ops() {
    let _g = setup();
    floats!(reductions);
}

fn sorts<T: El>() {
    let mut r = Rng(3);
    for (rows, cols, k) in [(1usize, 1usize, 1usize), (5, 7, 3), (3, 100, 100), (2, 2049, 5), (1, 5000, 5000)] {
        let mut v = round::<T>(&r.vec(rows * cols).iter().map(|x| (x * 40.).round() / 8.).collect::<Vec<_>>());
        if cols > 5 {
            v[2] = f64::NAN;
            v[4] = f64::NAN;
            v[1] = f64::NEG_INFINITY;
            v[5] = f64::INFINITY;
            v[0] = -0.0;
            v[3] = 0.0;
        }
        let x = up::<T>(&v);
        for down in [0, 1] {
            let (mut k1, mut i1, mut k2, mut i2) = (
                Buf::<u64>::new(rows * cols),
                Buf::<u32>::new(rows * cols),
                Buf::<u64>::new(rows * cols),
                Buf::<u32>::new(rows * cols),
            );
            go!(format!("sort_tile_{}", T::NAME), [(rows * cols.div_ceil(2048)) as u32, 1, 1]; x.ptr, k1.ptr, i1.ptr, rows as i64, cols as i64, down);
            let mut run = 2048;
            while run < cols {
                go!("sort_merge", [(rows * cols).div_ceil(256) as u32, 1, 1]; k1.ptr, i1.ptr, k2.ptr, i2.ptr, rows as i64, cols as i64, run as i64);
                std::mem::swap(&mut k1, &mut k2);
                std::mem::swap(&mut i1, &mut i2);
                run *= 2;
            }
            let (val, idx) = (Buf::<T>::new(rows * k), Buf::<u32>::new(rows * k));
            go!(format!("sort_pick_b{}", std::mem::size_of::<T>()), [(rows * k).div_ceil(256) as u32, 1, 1]; x.ptr, i1.ptr, val.ptr, idx.ptr, rows as i64, cols as i64, k as i64);
            let t = t64(&v, &[rows, cols]);
            let (wv, wi) = if down == 1 {
                t.topk(k, -1).unwrap()
            } else {
                let (a, b) = t.sort(-1, false).unwrap();
                (a.slice(1, 0..k).unwrap(), b.slice(1, 0..k).unwrap())
            };
            close("sort index", &back(&idx.get()), &wi.array().to_f64(), 0.);
            for (a, b) in back(&val.get()).iter().zip(wv.array().to_f64()) {
                assert!(*a == b || a.is_nan() && b.is_nan());
            }
        }
    }
}
#[test]
fn sort_rows() {
    let _g = setup();
    floats!(sorts);
}

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
