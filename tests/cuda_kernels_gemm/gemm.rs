use super::common::*;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Shape {
    m: i64,
    n: i64,
    k: i64,
    a_rs: i64,
    a_cs: i64,
    b_rs: i64,
    b_cs: i64,
    c_rs: i64,
    batch0: i64,
    batch1: i64,
    a_s0: i64,
    a_s1: i64,
    b_s0: i64,
    b_s1: i64,
    c_s0: i64,
    c_s1: i64,
    each: i64,
    alpha: f64,
    act: i32,
    acc: i32,
    splits: i32,
    res: i32,
}

fn erf(x: f64) -> f64 {
    // series / continued fraction, enough for 1e-14
    let a = x.abs();
    let r = if a < 3.0 {
        let (mut t, mut s, mut n) = (a, a, 0.0);
        while t.abs() > 1e-18 {
            n += 1.0;
            t *= -a * a / n;
            s += t / (2.0 * n + 1.0);
        }
        s * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let mut f = 0.0;
        for i in (1..80).rev() {
            f = i as f64 / 2.0 / (a + f);
        }
        1.0 - (-a * a).exp() / ((a + f) * std::f64::consts::PI.sqrt())
    };
    if x < 0.0 { -r } else { r }
}
fn act(c: i32, x: f64) -> f64 {
    match c {
        1 => x.max(0.0),
        2 => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        3 => 0.5 * x * (1.0 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh()),
        4 => x / (1.0 + (-x).exp()),
        5 => x.tanh(),
        _ => x,
    }
}

struct Opt {
    layout: usize,
    act: i32,
    acc: bool,
    bias: bool,
    pre: bool,
    w: u8,
    splits: i32,
    batch: (usize, usize),
    pad: usize,
    off: usize,
}
/// `I` operands, `O` results, `W` accumulator type.
fn run<I: El, O: El, W: El>(kernel: &str, tile: usize, smem: u32, (m, n, k): (usize, usize, usize), o: &Opt, tol: f64) {
    let mut r = Rng((m * 7 + n * 3 + k + o.layout) as u64);
    let (b0, b1) = o.batch;
    // batch1 broadcast for b
    let (a_rs, a_cs, asz) =
        if o.layout < 2 { (k + o.pad, 1, m * (k + o.pad)) } else { (1, m + o.pad, k * (m + o.pad)) };
    let (b_rs, b_cs, bsz) =
        if o.layout.is_multiple_of(2) { (n + o.pad, 1, k * (n + o.pad)) } else { (1, k + o.pad, n * (k + o.pad)) };
    let (asz, bsz) = (asz.max(1), bsz.max(1));
    let mut av = round::<I>(&r.vec(o.off + asz * b0 * b1));
    let mut bv = round::<I>(&r.vec(o.off + bsz * b0));
    let samples = 5;
    let owner: Vec<u32> = (0..k).map(|_| r.below(samples) as u32).collect();
    let each = k.div_ceil(samples).max(1);
    let mut wv = round::<W>(&r.vec(samples));
    wv[1] = 0.0;
    let own = |p: usize| match o.w {
        1 => p / each,
        2 => owner[p] as usize,
        _ => 0,
    };
    if o.w > 0 {
        for p in 0..k {
            if own(p) == 1 {
                for i in 0..m {
                    av[o.off + i * a_rs + p * a_cs] = f64::NAN;
                }
                for j in 0..n {
                    bv[o.off + p * b_rs + j * b_cs] = f64::INFINITY;
                }
            }
        }
    }
    let c_rs = n + 3;
    let csz = m * c_rs;
    let c0 = round::<O>(&r.vec(csz * b0 * b1));
    let bias = round::<O>(&r.vec(n));
    let alpha = 0.75;
    let (mut want, mut wpre) = (c0.clone(), c0.clone());
    for z0 in 0..b0 {
        for z1 in 0..b1 {
            for i in 0..m {
                for j in 0..n {
                    let mut s = 0.0;
                    for p in 0..k {
                        let w = if o.w == 0 { 1.0 } else { wv[own(p)] };
                        if w != 0.0 {
                            s += w
                                * av[o.off + (z0 * b1 + z1) * asz + i * a_rs + p * a_cs]
                                * bv[o.off + z0 * bsz + p * b_rs + j * b_cs];
                        }
                    }
                    let at = (z0 * b1 + z1) * csz + i * c_rs + j;
                    let mut v = s * alpha;
                    if o.acc {
                        v += c0[at];
                    }
                    if o.bias {
                        v += bias[j];
                    }
                    wpre[at] = v;
                    want[at] = act(o.act, v);
                }
            }
        }
    }
    let (da, db) = (Buf::from(&put::<I>(&av)), Buf::from(&put::<I>(&bv)));
    let (dc, dp, dbias) = (Buf::from(&put::<O>(&c0)), Buf::from(&put::<O>(&c0)), Buf::from(&put::<O>(&bias)));
    let (dw, down) = (Buf::from(&put::<W>(&wv)), Buf::from(&owner));
    let part = Buf::<W>::new((m * n * b0 * b1 * o.splits as usize).max(1));
    let s = Shape {
        m: m as i64,
        n: n as i64,
        k: k as i64,
        a_rs: a_rs as i64,
        a_cs: a_cs as i64,
        b_rs: b_rs as i64,
        b_cs: b_cs as i64,
        c_rs: c_rs as i64,
        batch0: b0 as i64,
        batch1: b1 as i64,
        a_s0: (asz * b1) as i64,
        a_s1: asz as i64,
        b_s0: bsz as i64,
        b_s1: 0,
        c_s0: (csz * b1) as i64,
        c_s1: csz as i64,
        each: each as i64,
        alpha,
        act: o.act,
        acc: o.acc as i32,
        splits: o.splits,
        res: 0,
    };
    let tiles = (m.div_ceil(tile) * n.div_ceil(tile)) as u32;
    let z = (b0 * b1 * o.splits as usize) as u32;
    let what = format!(
        "{kernel} {m}x{n}x{k} act {} acc {} w {} splits {} batch {:?} pad {} off {}",
        o.act, o.acc, o.w, o.splits, o.batch, o.pad, o.off
    );
    let split = o.splits > 1;
    let e = launch!(kernel, [tiles * z, 1, 1], [256, 1, 1], smem, false; unsafe { da.ptr.add(o.off) }, unsafe { db.ptr.add(o.off) }, dc.ptr,
        if o.bias { dbias.ptr } else { nullm() }, if o.pre { dp.ptr } else { nullm() }, if o.w > 0 { dw.ptr } else { nullm() }, if o.w == 2 { down.ptr } else { nullm() }, if split { part.ptr } else { nullm() }, s);
    if let Err(e) = e {
        panic!("{what}: {e}");
    }
    if split {
        let e = launch!(&format!("gemm_splitk_{}", O::NAME), [2, 1, 1], [256, 1, 1], 0, false; part.ptr, dc.ptr, if o.bias { dbias.ptr } else { nullm() }, if o.pre { dp.ptr } else { nullm() }, s);
        if let Err(e) = e {
            panic!("{what}: {e}");
        }
    }
    close(&what, &back(&dc.get()), &want, tol * (k as f64).sqrt().max(1.0));
    if o.pre {
        close(&format!("{what} pre"), &back(&dp.get()), &wpre, tol * (k as f64).sqrt().max(1.0));
    }
}
const PLAIN: Opt =
    Opt { layout: 0, act: 0, acc: false, bias: false, pre: false, w: 0, splits: 1, batch: (1, 1), pad: 0, off: 0 };
const L: [&str; 4] = ["nn", "nt", "tn", "tt"];

fn simt<T: El>(tile: usize) {
    for layout in 0..4 {
        let k = format!("gemm_{}_{}", L[layout], T::NAME);
        for (i, &sz) in
            [(1, 1, 1), (tile + 5, 33, 50), (20, tile * 2 + 4, 16), (7, 5, 0), (64, 64, 64)].iter().enumerate()
        {
            seed(SEEDS[i % 4]);
            run::<T, T, T>(&k, tile, 33792, sz, &Opt { layout, act: i as i32, pre: true, ..PLAIN }, T::TOL);
            run::<T, T, T>(
                &k,
                tile,
                33792,
                sz,
                &Opt { layout, act: 5, bias: true, acc: true, pad: 4, off: i, ..PLAIN },
                T::TOL,
            );
        }
        seed((2, 30));
        run::<T, T, T>(&k, tile, 33792, (36, 40, 70), &Opt { layout, w: 1, acc: true, ..PLAIN }, T::TOL);
        run::<T, T, T>(&k, tile, 33792, (31, 44, 70), &Opt { layout, w: 2, ..PLAIN }, T::TOL);
        run::<T, T, T>(
            &k,
            tile,
            33792,
            (30, 20, 150),
            &Opt { layout, w: 2, splits: 4, bias: true, act: 2, pre: true, acc: true, batch: (2, 2), ..PLAIN },
            T::TOL,
        );
        run::<T, T, T>(&k, tile, 33792, (9, 12, 20), &Opt { layout, batch: (3, 2), ..PLAIN }, T::TOL);
    }
}
#[test]
fn gemm_f32() {
    let _g = setup();
    simt::<f32>(128);
}
#[test]
fn gemm_f64() {
    let _g = setup();
    simt::<f64>(64);
}
#[test]
fn many_tiles() {
    let _g = setup();
    run::<f64, f64, f64>("gemm_nn_f64", 64, 33792, (64 * 9 + 3, 130, 5), &PLAIN, 1e-12);
}

fn mma<I: El, O: El>(name: &str, tol: f64) {
    for layout in 0..4 {
        let k = format!("gemm_{}_{name}", L[layout]);
        for (i, &sz) in [(1, 1, 1), (133, 33, 50), (20, 260, 16), (7, 5, 0), (64, 128, 200)].iter().enumerate() {
            seed(SEEDS[i % 4]);
            run::<I, O, f32>(&k, 128, 65536, sz, &Opt { layout, act: i as i32, pre: true, ..PLAIN }, tol);
            run::<I, O, f32>(
                &k,
                128,
                65536,
                sz,
                &Opt { layout, act: 5, bias: true, acc: true, pad: 4, off: i, ..PLAIN },
                tol,
            );
        }
        seed((2, 30));
        run::<I, O, f32>(&k, 128, 65536, (136, 40, 72), &Opt { layout, w: 1, acc: true, ..PLAIN }, tol);
        run::<I, O, f32>(&k, 128, 65536, (31, 44, 70), &Opt { layout, w: 2, ..PLAIN }, tol);
        run::<I, O, f32>(
            &k,
            128,
            65536,
            (32, 24, 152),
            &Opt { layout, w: 2, splits: 4, bias: true, act: 2, pre: true, acc: true, batch: (2, 2), ..PLAIN },
            tol,
        );
    }
}
#[test]
fn gemm_bf16() {
    let _g = setup();
    mma::<half::bf16, half::bf16>("bf16", 1e-2);
}
#[test]
fn gemm_f16() {
    let _g = setup();
    mma::<half::f16, half::f16>("f16", 2e-3);
}
#[test]
fn gemm_tf32() {
    let _g = setup();
    mma::<f32, f32>("tf32", 1e-3);
}
/// Same bits under every schedule: split K on the tensor cores, Gram norms.
#[test]
fn same_bits() {
    let _g = setup();
    let (m, n, k) = (70usize, 40usize, 200usize);
    let mut r = Rng(3);
    let (a, b) = (Buf::from(&put::<half::bf16>(&r.vec(m * k))), Buf::from(&put::<half::bf16>(&r.vec(n * k))));
    let (a32, b32) = (Buf::from(&put::<f32>(&r.vec(m * k))), Buf::from(&put::<f32>(&r.vec(n * k))));
    let mut first: Option<(Vec<u16>, Vec<u64>)> = None;
    for s in SEEDS {
        seed(s);
        let (c, part, norms) = (Buf::<half::bf16>::new(m * n), Buf::<f32>::new(m * n * 3), Buf::<f64>::new(2 * 3));
        let g = Shape {
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
            ..Default::default()
        };
        launch!("gemm_nt_bf16", [3, 1, 1], [256, 1, 1], 65536, false; a.ptr, b.ptr, c.ptr, nullm::<half::bf16>(), nullm::<half::bf16>(), nullm::<f32>(), nullm::<u32>(), part.ptr, g).unwrap();
        launch!("gemm_splitk_bf16", [3, 1, 1], [256, 1, 1], 0, false; part.ptr, c.ptr, nullm::<half::bf16>(), nullm::<half::bf16>(), g).unwrap();
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Gram {
            rd: i64,
            cd: i64,
            l1: i64,
            r1: i64,
            l2: i64,
            r2: i64,
            count1: i64,
            count2: i64,
            each1: i64,
            each2: i64,
            kind: i32,
            same: i32,
            all: i32,
            res: i32,
        }
        let z = Gram {
            rd: k as i64,
            cd: k as i64,
            l1: k as i64,
            r1: k as i64,
            l2: k as i64,
            r2: k as i64,
            count1: 2,
            count2: 2,
            each1: 20,
            each2: 20,
            kind: 0,
            same: 1,
            all: 0,
            res: 0,
        };
        launch!("factor_gram_f32", [3, 2, 1], [256, 1, 1], 34_880, false; a32.ptr, b32.ptr, a32.ptr, b32.ptr, nullm::<u32>(), nullm::<u32>(), nullm::<i64>(), nullm::<i64>(), nullm::<u32>(), nullm::<u32>(), norms.ptr, z).unwrap();
        let now = (
            c.get().iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            norms.get().iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        );
        if let Some(f) = &first { assert!(*f == now) } else { first = Some(now) }
    }
}
