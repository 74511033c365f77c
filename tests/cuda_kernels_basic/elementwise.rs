use crate::common::*;
use prismgrad::{Array, DType, Tensor};

type Op = fn(&Tensor) -> Tensor;
const UNARY: &[(&str, Op, char, f64, f64)] = &[
    ("neg", |t| t.neg().unwrap(), 'n', 0., 0.),
    ("exp", |t| t.exp().unwrap(), 'y', 0., 0.),
    ("log", |t| t.log().unwrap(), 'x', 0., 0.),
    ("sqrt", |t| t.sqrt().unwrap(), 'y', 0., 0.),
    ("square", |t| t.square().unwrap(), 'x', 0., 0.),
    ("abs", |t| t.abs().unwrap(), 'x', 0., 0.),
    ("recip", |t| t.recip().unwrap(), 'y', 0., 0.),
    ("sin", |t| t.sin().unwrap(), 'x', 0., 0.),
    ("cos", |t| t.cos().unwrap(), 'x', 0., 0.),
    ("tanh", |t| t.tanh().unwrap(), 'y', 0., 0.),
    ("sigmoid", |t| t.sigmoid().unwrap(), 'y', 0., 0.),
    ("erf", |t| t.erf().unwrap(), 'x', 0., 0.),
    ("relu", |t| t.relu().unwrap(), 'y', 0., 0.),
    ("leaky_relu", |t| t.leaky_relu(0.1).unwrap(), 'x', 0.1, 0.),
    ("gelu", |t| t.gelu().unwrap(), 'x', 0., 0.),
    ("gelu_tanh", |t| t.gelu_tanh().unwrap(), 'x', 0., 0.),
    ("silu", |t| t.silu().unwrap(), 'x', 0., 0.),
    ("softplus", |t| t.softplus().unwrap(), 'x', 0., 0.),
    ("powf", |t| t.powf(2.5).unwrap(), 'x', 2.5, 0.),
    ("add_scalar", |t| t.add_scalar(0.7).unwrap(), 'n', 0.7, 0.),
    ("mul_scalar", |t| t.mul_scalar(-1.7).unwrap(), 'n', -1.7, 0.),
    ("clamp", |t| t.clamp(-0.5, 1.5).unwrap(), 'x', -0.5, 1.5),
];
fn unary<T: El>() {
    let mut r = Rng(1);
    for &(name, f, saved, p, q) in UNARY {
        for shape in [&[1usize][..], &[7], &[1030], &[3, 5, 7], &[2, 4, 8]] {
            let n: usize = shape.iter().product();
            let positive = ["log", "sqrt", "recip", "powf"].contains(&name);
            let mut v: Vec<f64> = r.vec(n).iter().map(|x| if positive { x.abs() * 2. + 0.3 } else { x * 3. }).collect();
            if n == 7 && name != "sin" && name != "cos" {
                v[2] = f64::NAN;
                if !positive {
                    v[4] = 0.0;
                    v[5] = -12.0;
                    v[6] = 9.0
                }
            }
            let v = round::<T>(&v);
            let (dx, dy) = (up::<T>(&v), Buf::<T>::new(n));
            for turned in [false, true] {
                // the last dimension first, read in place
                let a = Array::from_slice(&v, shape).unwrap();
                let a = if turned && shape.len() == 3 { a.permute(&[2, 0, 1]).unwrap() } else { a };
                let x = Tensor::leaf(a.clone());
                let y = f(&x);
                let want = y.array().to_f64();
                go!(format!("{name}_{}", T::NAME), quads(n); dx.ptr, dy.ptr, n as i64, strided(a.shape(), [a.strides()]), p, q);
                close(name, &back(&dy.get()), &want, T::TOL);
                if saved == 'n' {
                    continue;
                }
                let gv = round::<T>(&r.vec(n));
                let g = Tensor::new(Array::from_slice(&gv, a.shape()).unwrap());
                let yr = Array::from_slice(&round::<T>(&want), a.shape()).unwrap();
                let grads = y.mul(&g).unwrap().backward().unwrap();
                let want = grads.of(&x).unwrap().to_f64();
                let (s, ss) = if saved == 'x' {
                    (up::<T>(&v), a.strides().to_vec())
                } else {
                    (up::<T>(&yr.to_f64()), row_major(a.shape()))
                };
                let (dg, d) = (up::<T>(&gv), Buf::<T>::new(n));
                go!(format!("{name}_grad_{}", T::NAME), quads(n); dg.ptr, s.ptr, d.ptr, n as i64, strided(a.shape(), [&row_major(a.shape()), &ss]), p, q);
                close(&format!("{name} grad"), &back(&d.get()), &want, T::TOL * 4.);
            }
        }
    }
}
#[test]
fn unary_ops() {
    let _g = setup();
    floats!(unary);
}

fn binary<T: El>() {
    let mut r = Rng(2);
    type Compare = fn(&Tensor, &Tensor) -> Tensor;
    let ops: [(&str, Compare); 6] = [
        ("add", |a, b| a.add(b).unwrap()),
        ("sub", |a, b| a.sub(b).unwrap()),
        ("mul", |a, b| a.mul(b).unwrap()),
        ("div", |a, b| a.div(b).unwrap()),
        ("maximum", |a, b| a.maximum(b).unwrap()),
        ("minimum", |a, b| a.minimum(b).unwrap()),
    ];
    for (sa, sb) in [
        (&[9usize][..], &[9usize][..]),
        (&[5, 12], &[12]),
        (&[5, 12], &[5, 1]),
        (&[3, 1, 8], &[4, 1]),
        (&[2, 3, 2, 2, 3, 3], &[1, 3, 1, 2, 1, 3]),
        (&[], &[4]),
        (&[40, 30], &[]),
    ] {
        let shape =
            prismgrad::Tensor::zeros(sa, DType::F64).add(&Tensor::zeros(sb, DType::F64)).unwrap().shape().to_vec();
        let n: usize = shape.iter().product();
        let mk = |r: &mut Rng, s: &[usize]| {
            round::<T>(
                &r.vec(s.iter().product())
                    .iter()
                    .map(|x| (x * 4.).round() / 2. + if x.abs() < 0.2 { 0.5 } else { 0. })
                    .collect::<Vec<_>>(),
            )
        };
        let (va, mut vb) = (mk(&mut r, sa), mk(&mut r, sb));
        vb.iter_mut().for_each(|x| {
            if *x == 0.0 {
                *x = 1.5
            }
        });
        let gv = round::<T>(&r.vec(n));
        let (ba, bb, bg) = (up::<T>(&va), up::<T>(&vb), up::<T>(&gv));
        let (a, b) = (Array::from_slice(&va, sa).unwrap(), Array::from_slice(&vb, sb).unwrap());
        let (ea, eb) = (a.expand(&shape).unwrap(), b.expand(&shape).unwrap());
        let g = Tensor::new(Array::from_slice(&gv, &shape).unwrap());
        for (name, f) in ops {
            let (ta, tb) = (Tensor::leaf(ea.clone()), Tensor::leaf(eb.clone()));
            let y = f(&ta, &tb);
            let d = Buf::<T>::new(n);
            go!(format!("{name}_{}", T::NAME), quads(n); ba.ptr, bb.ptr, d.ptr, n as i64, strided(&shape, [ea.strides(), eb.strides()]));
            close(name, &back(&d.get()), &y.array().to_f64(), T::TOL);
            if name == "add" || name == "sub" {
                continue;
            }
            let grads = y.mul(&g).unwrap().backward().unwrap();
            for (side, t) in [(0, &ta), (1, &tb)] {
                go!(format!("{name}_grad_{}", T::NAME), quads(n); ba.ptr, bb.ptr, bg.ptr, d.ptr, n as i64, strided(&shape, [ea.strides(), eb.strides(), &row_major(&shape)]), side);
                close(&format!("{name} grad {side}"), &back(&d.get()), &grads.of(t).unwrap().to_f64(), T::TOL * 2.);
            }
        }
        let (ta, tb) = (Tensor::new(a.clone()), Tensor::new(b.clone()));
        let masks = [ta.eq(&tb), ta.ne(&tb), ta.lt(&tb), ta.le(&tb), ta.gt(&tb), ta.ge(&tb)];
        for (op, m) in masks.into_iter().enumerate() {
            let m = m.unwrap();
            let d = Buf::<u8>::new(n);
            go!(format!("compare_{}", T::NAME), quads(n); ba.ptr, bb.ptr, d.ptr, n as i64, strided(&shape, [ea.strides(), eb.strides()]), op as i32);
            close("compare", &back(&d.get()), &m.array().to_f64(), 0.);
            let w = Buf::<T>::new(n);
            let size = format!("b{}", std::mem::size_of::<T>());
            go!(format!("where_{size}"), quads(n); d.ptr, ba.ptr, bb.ptr, w.ptr, n as i64, strided(&shape, [&row_major(&shape), ea.strides(), eb.strides()]));
            close("where", &back(&w.get()), &Tensor::select(&m, &ta, &tb).unwrap().array().to_f64(), 0.);
            go!(format!("mask_{size}"), quads(n); ba.ptr, d.ptr, w.ptr, n as i64, strided(&shape, [ea.strides(), &row_major(&shape)]), 0);
            close("mask", &back(&w.get()), &Tensor::new(ea.clone()).masked_fill(&m, 0.).unwrap().array().to_f64(), 0.);
        }
        let d = up::<T>(&gv);
        go!(format!("add_assign_{}", T::NAME), quads(n); d.ptr, ba.ptr, n as i64, strided(&shape, [ea.strides()]));
        let want: Vec<f64> = gv.iter().zip(ea.to_f64()).map(|(g, a)| g + a).collect();
        close("add_assign", &back(&d.get()), &want, T::TOL);
    }
}
#[test]
fn binary_ops() {
    let _g = setup();
    floats!(binary);
}

fn rows<T: Acc>() {
    let (rows, cols) = (7usize, 3usize);
    let mut v = round::<T>(&Rng(3).vec(rows * cols));
    v[4] = f64::NAN;
    let x = up::<T>(&v);
    let f = Buf::<u8>::new(rows * cols);
    go!(format!("is_finite_{}", T::NAME), quads(rows * cols); x.ptr, f.ptr, (rows * cols) as i64, flat::<1>(rows * cols));
    close(
        "finite",
        &back(&f.get()),
        &Tensor::new(Array::from_slice(&v, &[21]).unwrap()).is_finite().unwrap().array().to_f64(),
        0.,
    );
}
#[test]
fn is_finite() {
    let _g = setup();
    floats!(rows);
}

#[test]
fn casts() {
    let _g = setup();
    let names = [
        ("f32", DType::F32),
        ("f64", DType::F64),
        ("bf16", DType::BF16),
        ("f16", DType::F16),
        ("u32", DType::U32),
        ("i64", DType::I64),
        ("u8", DType::U8),
    ];
    let mut r = Rng(5);
    let mut v: Vec<f64> = r.vec(50).iter().map(|x| x * 10.).collect();
    v.extend([
        0.,
        -0.,
        0.5,
        -0.5,
        255.5,
        256.,
        -1.,
        65504.,
        65520.,
        65536.,
        1e9,
        -1e9,
        4294967295.,
        5e9,
        1e19,
        -1e19,
        1e300,
        -1e300,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        1e-6,
        6e-8,
        1e-40,
        1e-310,
        0.333333333333,
        1e-7,
        3e-8,
    ]);
    for (sn, sd) in names {
        let a = Array::from_slice(&v, &[v.len()]).unwrap().cast(sd);
        let src = Buf::from(&a.to_bytes());
        for (dn, dd) in names {
            if sn == dn {
                continue;
            }
            // 16-bit targets in one rounding: by way of f32 rounded to odd
            let odd = |x: f64| {
                let f = x as f32;
                if f as f64 == x || !f.is_finite() {
                    return f as f64;
                }
                let u = f.to_bits() - ((f as f64).abs() > x.abs()) as u32;
                f32::from_bits(u | 1) as f64
            };
            let want = match dd {
                DType::BF16 => Array::from_slice(
                    &a.to_f64()
                        .iter()
                        .map(|&x| if x.is_nan() { x } else { half::bf16::of(odd(x)).to() })
                        .collect::<Vec<_>>(),
                    &[v.len()],
                )
                .unwrap(),
                DType::F16 => Array::from_slice(
                    &a.to_f64().iter().map(|&x| half::f16::from_f32(odd(x) as f32).to_f64()).collect::<Vec<_>>(),
                    &[v.len()],
                )
                .unwrap(),
                _ => a.cast(dd),
            };
            let dst = Buf::<u8>::new(v.len() * dd.size());
            go!(format!("cast_{sn}_{dn}"), quads(v.len()); src.ptr, dst.ptr, v.len() as i64, flat::<1>(v.len()));
            let got = Array::from_bytes(&dst.get(), &[v.len()], dd).unwrap();
            close(
                &format!("{sn} {dn}"),
                &got.to_f64().iter().map(|x| if x.is_infinite() { x.signum() * 1e308 } else { *x }).collect::<Vec<_>>(),
                &want
                    .to_f64()
                    .iter()
                    .map(|x| if x.is_infinite() { x.signum() * 1e308 } else { *x })
                    .collect::<Vec<_>>(),
                0.,
            );
        }
    }
}
#[test]
fn moves() {
    let _g = setup();
    for s in SEEDS {
        seed(s);
        let a = Array::arange(2 * 33 * 37, DType::U32).reshape(&[2, 33, 37]).unwrap();
        let src = Buf::from(a.as_slice::<u32>().unwrap());
        let t = a.permute(&[0, 2, 1]).unwrap();
        let dst = Buf::<u32>::new(a.numel());
        let n = a.numel() as i64;
        go!("copy_b4", quads(a.numel()); src.ptr, dst.ptr, n, strided(t.shape(), [t.strides(), &row_major(t.shape())]));
        close("copy", &back(&dst.get()), &t.to_f64(), 0.);
        go!("fill_b4", quads(a.numel()); dst.ptr, n, 7u64);
        go!("transpose_b4", [2 * 2 * 2u32, 1, 1]; src.ptr, dst.ptr, 2i64, 33i64, 37i64);
        close("transpose", &back(&dst.get()), &t.to_f64(), 0.);
        // into a slice of something wider
        let wide = Buf::<u32>::new(2 * 33 * 40);
        go!("fill_b4", quads(2 * 33 * 40); wide.ptr, (2 * 33 * 40) as i64, 9u64);
        go!("copy_b4", quads(a.numel()); src.ptr, unsafe { wide.ptr.add(1) }, n, strided(a.shape(), [a.strides(), &[33 * 40, 40, 1]]));
        let got = wide.get();
        for i in 0..2 * 33 {
            for j in 0..40 {
                assert_eq!(got[i * 40 + j], if j == 0 || j > 37 { 9 } else { (i * 37 + j - 1) as u32 });
            }
        }
        let ids = [2u32, 0, 4, 3];
        let (b, o) = (Buf::from(&ids), Buf::<u16>::new(20));
        go!("one_hot_b2", quads(20); b.ptr, o.ptr, 4i64, 5i64, 3u64);
        assert_eq!(o.get(), (0..20).map(|i| if ids[i / 5] as usize == i % 5 { 3 } else { 0 }).collect::<Vec<u16>>());
        let (ids, out, bad) = (Buf::from(&[1i64, 5, -1, 0]), Buf::<u32>::new(4), Buf::from(&[!0u64]));
        go!("ids_i64", quads(4); ids.ptr, out.ptr, 4i64, 5i64, bad.ptr);
        assert_eq!((out.get(), bad.get()), (vec![1, 0, 0, 0], vec![1]));
        let c = Buf::<f32>::new(9);
        go!("arange_f32", quads(9); c.ptr, 9i64);
        assert_eq!(c.get()[8], 8.);
    }
}
