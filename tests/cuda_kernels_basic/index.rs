use crate::common::*;
use prismgrad::ops::embedding::{BagMode, embedding, embedding_bag};
use prismgrad::ops::segment::Segments;
use prismgrad::{Array, Param, Tensor};
fn arr(v: &[f64], s: &[usize]) -> Array {
    Array::from_slice(v, s).unwrap()
}
fn t64(v: &[f64], s: &[usize]) -> Tensor {
    Tensor::leaf(arr(v, s))
}
fn w<T>() -> String {
    format!("b{}", std::mem::size_of::<T>())
}
/// sorted ids and their positions
fn sort_ids(ids: &[u32]) -> (Buf<u32>, Buf<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&i| ids[i as usize]);
    (Buf::from(&order.iter().map(|&i| ids[i as usize]).collect::<Vec<_>>()), Buf::from(&order))
}
fn picks<T: Acc>() {
    let mut r = Rng(1);
    let s = T::NAME;
    for [o, n, i, k] in [[1usize, 1, 1, 1], [2, 5, 3, 7], [3, 4, 1, 40], [1, 9, 70, 3], [2, 3, 300, 70]] {
        let v = round::<T>(&r.vec(o * n * i));
        let ids: Vec<u32> = (0..o * k * i).map(|_| r.below(n) as u32).collect();
        let (x, bi, y) = (up::<T>(&v), Buf::from(&ids), Buf::<T>::new(o * k * i));
        go!(format!("gather_{}", w::<T>()), quads(o * k * i); x.ptr, bi.ptr, y.ptr, (o * k * i) as i64, k as i64, n as i64, i as i64);
        let t = t64(&v, &[o, n, i]);
        let it = Tensor::new(Array::from_slice(&ids, &[o, k, i]).unwrap());
        let g = t.gather(1, &it).unwrap();
        close("gather", &back(&y.get()), &g.array().to_f64(), 0.);
        let gv = round::<T>(&r.vec(o * k * i));
        let want = g.mul(&t64(&gv, &[o, k, i])).unwrap().backward().unwrap().of(&t).unwrap().to_f64();
        let (dg, dx) = (up::<T>(&gv), up::<T::A>(&vec![0.; o * n * i]));
        if size_of::<T>() > 2 {
            go!(format!("scatter_add_{s}"), [(o * i).div_ceil(256) as u32, 1, 1]; dx.ptr, bi.ptr, dg.ptr, o as i64, k as i64, n as i64, i as i64);
            close("scatter_add", &back(&dx.get()), &want, <T::A as El>::TOL * 2.);
        }
        // one list of ids
        let ids = &ids[..k];
        let bi = Buf::from(ids);
        go!(format!("take_{}", w::<T>()), quads(o * k * i); x.ptr, bi.ptr, y.ptr, o as i64, k as i64, n as i64, i as i64);
        let t = t64(&v, &[o, n, i]);
        let g = t.index_select(1, &Tensor::new(Array::from_slice(ids, &[k]).unwrap())).unwrap();
        close("take", &back(&y.get()), &g.array().to_f64(), 0.);
        let want = g.mul(&t64(&gv, &[o, k, i])).unwrap().backward().unwrap().of(&t).unwrap().to_f64();
        if size_of::<T>() == 2 {
            continue;
        }
        for weighted in [false, true] {
            let (sorted, order) = sort_ids(ids);
            let mut gw = gv.clone();
            let wv = round::<f32>(&(0..k).map(|t| if t % 5 == 1 { 0. } else { r.f() }).collect::<Vec<_>>());
            if weighted {
                for t in 0..k {
                    if wv[t] == 0. {
                        for a in 0..o {
                            gw[(a * k + t) * i] = f64::NAN;
                        }
                    }
                }
            }
            let dg = up::<T>(&gw);
            let (out, part, bw) =
                (up::<T::A>(&vec![0.5; o * n * i]), Buf::<T::A>::new(o * k.div_ceil(32) * 2 * i), up::<T::A>(&wv));
            let grid = [(o * k.div_ceil(32) * i.div_ceil(256)) as u32, 1, 1];
            go!(format!("rows_add_{s}"), grid; dg.ptr, sorted.ptr, order.ptr, if weighted { bw.ptr } else { nullm() }, out.ptr, part.ptr, o as i64, k as i64, n as i64, i as i64);
            go!(format!("rows_add_last_{}", T::A::NAME), grid; part.ptr, sorted.ptr, out.ptr, o as i64, k as i64, n as i64, i as i64);
            let mut want: Vec<f64> = want.iter().map(|x| x + 0.5).collect();
            if weighted {
                want.fill(0.5);
                for a in 0..o {
                    for t in 0..k {
                        if wv[t] != 0. {
                            for c in 0..i {
                                want[(a * n + ids[t] as usize) * i + c] += wv[t] * gv[(a * k + t) * i + c];
                            }
                        }
                    }
                }
            }
            close("rows_add", &back(&out.get()), &want, <T::A as El>::TOL * 4.);
        }
    }
}
#[test]
fn index() {
    let _g = setup();
    floats!(picks);
}

fn bags<T: Acc>() {
    let mut r = Rng(2);
    let s = T::NAME;
    for (v, p, lengths) in [(4usize, 3usize, vec![0usize, 2, 1, 5]), (7, 300, vec![3, 0]), (5, 1200, vec![2, 4, 1])] {
        let (n, b) = (lengths.iter().sum::<usize>(), lengths.len());
        let seg = Segments::lengths(&lengths);
        let wv = round::<T>(&r.vec(v * p));
        let ids: Vec<u32> = (0..n).map(|_| r.below(v) as u32).collect();
        let sv = round::<f32>(&r.vec(n));
        let gv = round::<T>(&r.vec(b * p));
        let (bw, bi, bs, off, own) = (
            up::<T>(&wv),
            Buf::from(&ids),
            up::<T::A>(&sv),
            Buf::from(&seg.offsets().iter().map(|&x| x as i64).collect::<Vec<_>>()),
            Buf::from(&seg.ids()[..]),
        );
        let (y, g, rows, dots) = (Buf::<T>::new(b * p), up::<T>(&gv), Buf::<T>::new(n * p), Buf::<T::A>::new(n));
        for (mode, scaled) in
            [(BagMode::Sum, false), (BagMode::Mean, true), (BagMode::Mean, false), (BagMode::Sum, true)]
        {
            let mean = (mode == BagMode::Mean) as i32;
            let table = Param::new("w", arr(&wv, &[v, p]));
            let st = t64(&sv, &[n]);
            let it = Tensor::new(Array::from_slice(&ids, &[n]).unwrap());
            let out = embedding_bag(&table, &it, &seg, mode, scaled.then_some(&st), None).unwrap();
            let ps = if scaled { bs.ptr } else { nullm() };
            go!(format!("embedding_bag_{s}"), [(b * p).div_ceil(256) as u32, 1, 1]; bw.ptr, bi.ptr, off.ptr, ps, y.ptr, b as i64, p as i64, mean);
            close("bag", &back(&y.get()), &out.array().to_f64(), T::TOL);
            let grads = out.mul(&t64(&gv, &[b, p])).unwrap().backward().unwrap();
            if size_of::<T>() == 2 {
                continue;
            }
            go!(format!("bag_rows_{s}"), quads(n * p); g.ptr, own.ptr, off.ptr, ps, rows.ptr, n as i64, p as i64, mean);
            let rr = back(&rows.get());
            let mut want = vec![0.; v * p];
            for t in 0..n {
                for c in 0..p {
                    want[ids[t] as usize * p + c] += rr[t * p + c];
                }
            }
            close("bag rows", &want, &grads.param(&table).unwrap().sum().unwrap().to_f64(), T::TOL * 2.);
            if scaled {
                go!(format!("bag_dots_{s}"), row_grid(n, p); g.ptr, bw.ptr, bi.ptr, own.ptr, off.ptr, dots.ptr, n as i64, p as i64, mean);
                close("bag dots", &back(&dots.get()), &grads.of(&st).unwrap().to_f64(), <T::A as El>::TOL * 4.);
            }
        }
        // padding: gradients of tables are f32 or f64
        if size_of::<T>() == 2 {
            continue;
        }
        let table = Param::new("w", arr(&wv, &[v, p]));
        let out = embedding(&table, &Tensor::new(Array::from_slice(&ids, &[n]).unwrap()), Some(ids[0]), None).unwrap();
        let gv = round::<T>(&r.vec(n * p));
        let grads = out.mul(&t64(&gv, &[n, p])).unwrap().backward().unwrap();
        let (g, z) = (up::<T>(&gv), Buf::<T>::new(n * p));
        go!(format!("zero_rows_{}", w::<T>()), quads(n * p); g.ptr, bi.ptr, z.ptr, n as i64, p as i64, ids[0]);
        let rr = back(&z.get());
        let mut want = vec![0.; v * p];
        for t in 0..n {
            for c in 0..p {
                want[ids[t] as usize * p + c] += rr[t * p + c];
            }
        }
        close("padding", &want, &grads.param(&table).unwrap().sum().unwrap().to_f64(), 1e-6);
    }
}
#[test]
fn bag() {
    let _g = setup();
    floats!(bags);
}

fn segments<T: Acc>() {
    let mut r = Rng(3);
    let s = T::NAME;
    for (width, lengths) in [
        (1usize, vec![0usize, 1, 70, 2, 0]),
        (3, vec![5, 33]),
        (31, vec![2, 0, 40, 1]),
        (32, vec![3, 0, 9]),
        (300, vec![1, 2]),
    ] {
        let (n, b) = (lengths.iter().sum::<usize>(), lengths.len());
        let seg = Segments::lengths(&lengths);
        let mut xv: Vec<f64> = r.vec(n * width).iter().map(|x| (x * 8.).round() / 2.).collect();
        for nan in [false, true] {
            if nan {
                if n > 10 {
                    xv[4 * width] = f64::NAN;
                }
                for i in 0..lengths[0].max(1) {
                    xv[i * width + width / 2] = f64::NEG_INFINITY;
                }
            }
            let xv = round::<T>(&xv);
            let (x, off, own) = (
                up::<T>(&xv),
                Buf::from(&seg.offsets().iter().map(|&x| x as i64).collect::<Vec<_>>()),
                Buf::from(&seg.ids()[..]),
            );
            let (y, idx, z, dz) = (
                Buf::<T>::new(b * width),
                Buf::<u32>::new(b * width),
                Buf::<T>::new(n * width),
                Buf::<T>::new(n * width),
            );
            let grid = if width >= 32 {
                [(b * width).div_ceil(256) as u32, 1, 1]
            } else {
                [(b * width).div_ceil(8) as u32, 1, 1]
            };
            let (bb, ww) = (b as i64, width as i64);
            let gv = round::<T>(&r.vec(b * width));
            let (g, gt) = (up::<T>(&gv), t64(&gv, &[b, width]));
            for mean in [0, 1] {
                let t = t64(&xv, &[n, width]);
                let o = if mean == 1 { t.segment_mean(&seg) } else { t.segment_sum(&seg) }.unwrap();
                go!(format!("segment_sum_{s}"), grid; x.ptr, off.ptr, y.ptr, bb, ww, mean);
                close("segment_sum", &back(&y.get()), &o.array().to_f64(), T::TOL);
                go!(format!("segment_spread_{s}"), quads(n * width); g.ptr, off.ptr, own.ptr, z.ptr, n as i64, ww, mean);
                if !nan {
                    close(
                        "spread",
                        &back(&z.get()),
                        &o.mul(&gt).unwrap().backward().unwrap().of(&t).unwrap().to_f64(),
                        T::TOL,
                    );
                }
            }
            let t = t64(&xv, &[n, width]);
            let o = t.segment_max(&seg).unwrap();
            go!(format!("segment_max_{s}"), grid; x.ptr, off.ptr, y.ptr, idx.ptr, bb, ww);
            close("segment_max", &back(&y.get()), &o.array().to_f64(), 0.);
            go!(format!("segment_max_grad_{}", w::<T>()), quads(n * width); g.ptr, idx.ptr, own.ptr, z.ptr, n as i64, ww);
            close(
                "segment_max grad",
                &back(&z.get()),
                &o.mul(&gt).unwrap().backward().unwrap().of(&t).unwrap().to_f64(),
                0.,
            );
            let t = t64(&xv, &[n, width]);
            let o = t.segment_softmax(&seg).unwrap();
            go!(format!("segment_softmax_{s}"), grid; x.ptr, off.ptr, z.ptr, bb, ww);
            close("segment_softmax", &back(&z.get()), &o.array().to_f64(), T::TOL);
            if nan {
                continue;
            }
            let gv = round::<T>(&r.vec(n * width));
            let g = up::<T>(&gv);
            go!(format!("segment_softmax_grad_{s}"), grid; z.ptr, g.ptr, off.ptr, dz.ptr, bb, ww);
            close(
                "segment_softmax grad",
                &back(&dz.get()),
                &o.mul(&t64(&gv, &[n, width])).unwrap().backward().unwrap().of(&t).unwrap().to_f64(),
                T::TOL * 2.,
            );
        }
    }
}
#[test]
fn segment() {
    let _g = setup();
    floats!(segments);
}
