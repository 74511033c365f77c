use crate::common::*;
use prismgrad::ops::conv::Conv;
use prismgrad::{Array, Tensor};
fn t64(v: &[f64], s: &[usize]) -> Tensor {
    Tensor::leaf(Array::from_slice(v, s).unwrap())
}
fn one(n: usize) -> [u32; 3] {
    [n.div_ceil(256) as u32, 1, 1]
}
fn i2(a: [usize; 2]) -> [i64; 2] {
    a.map(|x| x as i64)
}

fn windows<T: Acc>() {
    let mut r = Rng(1);
    let s = T::NAME;
    for _ in 0..12 {
        let (n, c) = (1 + r.below(2), 1 + r.below(3));
        let k = [1 + r.below(3), 1 + r.below(3)];
        let conv = Conv {
            stride: [1 + r.below(3), 1 + r.below(2)],
            padding: [r.below(2), r.below(3)],
            dilation: [1 + r.below(2), 1 + r.below(2)],
            groups: 1,
        };
        let size = [conv.dilation[0] * (k[0] - 1) + 1 + r.below(5), conv.dilation[1] * (k[1] - 1) + 1 + r.below(5)];
        let out: [usize; 2] = std::array::from_fn(|a| {
            (size[a] + 2 * conv.padding[a] - conv.dilation[a] * (k[a] - 1) - 1) / conv.stride[a] + 1
        });
        let w = [i2(size), i2(out), i2(k), i2(conv.stride), i2(conv.padding), i2(conv.dilation)];
        let v = round::<T>(&r.vec(n * c * size[0] * size[1]));
        let rows = n * out[0] * out[1] * c * k[0] * k[1];
        let (x, y, z) = (up::<T>(&v), Buf::<T>::new(rows), Buf::<T>::new(v.len()));
        let t = t64(&v, &[n, c, size[0], size[1]]);
        let u = t.unfold(k, conv).unwrap();
        go!(format!("unfold_b{}", std::mem::size_of::<T>()), one(rows); x.ptr, y.ptr, n as i64, c as i64, w);
        close("unfold", &back(&y.get()), &u.array().to_f64(), 0.);
        go!(format!("fold_{s}"), one(v.len()); y.ptr, z.ptr, n as i64, c as i64, w);
        close("fold", &back(&z.get()), &u.fold(size, k, conv).unwrap().array().to_f64(), T::TOL);
    }
}
#[test]
fn unfolding() {
    let _g = setup();
    floats!(windows);
}

fn pools<T: Acc>() {
    let mut r = Rng(2);
    let s = T::NAME;
    for round_ in 0..16 {
        let (n, c, size) = (1 + r.below(2), 1 + r.below(2), [3 + r.below(6), 3 + r.below(6)]);
        let k = [1 + r.below(3), 1 + r.below(3)];
        let (stride, pad) = ([1 + r.below(3), 1 + r.below(3)], [r.below(k[0] / 2 + 1), r.below(k[1] / 2 + 1)]);
        let adaptive = round_ % 2 == 1;
        let out: [usize; 2] = std::array::from_fn(|a| {
            if adaptive { 1 + r.below(size[a] + 2) } else { (size[a] + 2 * pad[a] - k[a]) / stride[a] + 1 }
        });
        let p = if adaptive {
            [i2(size), i2(out), [0; 2], [0; 2], [0; 2]]
        } else {
            [i2(size), i2(out), i2(k), i2(stride), i2(pad)]
        };
        let (planes, area, places) = (n * c, size[0] * size[1], out[0] * out[1]);
        let mut v = round::<T>(&r.vec(planes * area).iter().map(|x| (x * 6.).round() / 2.).collect::<Vec<_>>());
        let gv = round::<T>(&r.vec(planes * places));
        let (g, y, dx, idx) =
            (up::<T>(&gv), Buf::<T>::new(gv.len()), Buf::<T>::new(v.len()), Buf::<u32>::new(gv.len()));
        let (xs, ys) = ([n, c, size[0], size[1]], [n, c, out[0], out[1]]);
        let x = up::<T>(&v);
        let t = t64(&v, &xs);
        let a = if adaptive { t.adaptive_avg_pool2d(out) } else { t.avg_pool2d(k, stride, pad) }.unwrap();
        go!(format!("avg_pool_{s}"), one(gv.len()); x.ptr, y.ptr, planes as i64, p);
        close("avg_pool", &back(&y.get()), &a.array().to_f64(), T::TOL);
        go!(format!("avg_pool_grad_{s}"), one(v.len()); g.ptr, dx.ptr, planes as i64, p);
        close(
            "avg_pool grad",
            &back(&dx.get()),
            &a.mul(&t64(&gv, &ys)).unwrap().backward().unwrap().of(&t).unwrap().to_f64(),
            T::TOL,
        );
        if adaptive {
            continue;
        }
        if round_ > 8 {
            v[1] = f64::NAN;
            v[area - 1] = f64::NAN;
        }
        let x = up::<T>(&v);
        let t = t64(&v, &xs);
        let a = t.max_pool2d(k, stride, pad).unwrap();
        go!(format!("max_pool_{s}"), one(gv.len()); x.ptr, y.ptr, idx.ptr, planes as i64, p);
        close("max_pool", &back(&y.get()), &a.array().to_f64(), 0.);
        go!(format!("max_pool_grad_{s}"), one(v.len()); g.ptr, idx.ptr, dx.ptr, planes as i64, p);
        close(
            "max_pool grad",
            &back(&dx.get()),
            &a.mul(&t64(&gv, &ys)).unwrap().backward().unwrap().of(&t).unwrap().to_f64(),
            T::TOL,
        );
    }
}
#[test]
fn pooling() {
    let _g = setup();
    floats!(pools);
}
