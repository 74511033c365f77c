use super::common::*;
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::{Array, Tensor};
use std::sync::Arc;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Shape {
    batch: i64,
    queries: i64,
    keys: i64,
    heads: i64,
    kv_heads: i64,
    dim: i64,
    width: i64,
    seed: u64,
    scale: f64,
    drop: f64,
    span: i32,
    documents: i32,
    q: [i64; 3],
    k: [i64; 3],
    v: [i64; 3],
    o: [i64; 3],
    g: [i64; 3],
    dq: [i64; 3],
    dk: [i64; 3],
    dv: [i64; 3],
}

#[derive(Clone, Copy)]
struct Kind {
    rows: usize,
    smem: u32,
    brows: usize,
    bsmem: u32,
    threads: u32,
}

#[allow(clippy::too_many_arguments)]
fn run<T: El, A: El>(
    suffix: &str,
    kd: Kind,
    (b, t, s, h, kv, d): (usize, usize, usize, usize, usize, usize),
    span: Span,
    docs: Option<Vec<usize>>,
    drop: Option<(f64, u64)>,
    odd: bool,
    tol: f64,
) {
    let what = format!("{suffix} b{b} t{t} s{s} h{h}/{kv} d{d} {span:?} docs {docs:?} drop {drop:?} odd {odd}");
    let mut r = Rng(t as u64 * 31 + d as u64);
    // every tensor is a part of a wider buffer, one element off if `odd`
    let extra = if odd { 3 } else { 8 };
    let st = |t: usize, h: usize| [(t * (h * d + extra)) as i64, (h * d + extra) as i64, d as i64];
    let lead = if odd { 1 } else { 8 };
    let place = |t: usize, h: usize| lead + b * t * (h * d + extra);
    let gather = |x: &[f64], t: usize, h: usize| -> Vec<f64> {
        let z = st(t, h);
        let mut o = vec![];
        for bi in 0..b {
            for ti in 0..t {
                for hi in 0..h {
                    for c in 0..d {
                        o.push(x[lead + bi * z[0] as usize + ti * z[1] as usize + hi * z[2] as usize + c]);
                    }
                }
            }
        }
        o
    };
    let (q, k, v, g) = (
        round::<T>(&r.vec(place(t, h))),
        round::<T>(&r.vec(place(s, kv))),
        round::<T>(&r.vec(place(s, kv))),
        round::<T>(&r.vec(place(t, h))),
    );
    let q: Vec<f64> = round::<T>(&q.iter().map(|x| x * 2.0).collect::<Vec<_>>());
    let arr = |x: &[f64], t: usize, h: usize| Array::from_slice(&gather(x, t, h), &[b, t, h, d]).unwrap();
    let (tq, tk, tv) = (Tensor::leaf(arr(&q, t, h)), Tensor::leaf(arr(&k, s, kv)), Tensor::leaf(arr(&v, s, kv)));
    let o = AttentionOptions { span, scale: Some(0.3), documents: docs.clone().map(Arc::new), dropout: drop };
    let y = attention(&tq, &tk, &tv, &o).unwrap();
    let want = y.array().to_f64();
    let grads = y.mul(&Tensor::new(arr(&g, t, h))).unwrap().backward().unwrap();
    let (wq, wk, wv) =
        (grads.of(&tq).unwrap().to_f64(), grads.of(&tk).unwrap().to_f64(), grads.of(&tv).unwrap().to_f64());

    let (sp, w) = match span {
        Span::Full => (0, 0),
        Span::Causal => (1, 0),
        Span::Window(w) => (2, w),
        Span::Block(w) => (3, w),
    };
    let dv: Vec<i64> = docs.iter().flatten().map(|&x| x as i64).collect();
    let sh = Shape {
        batch: b as i64,
        queries: t as i64,
        keys: s as i64,
        heads: h as i64,
        kv_heads: kv as i64,
        dim: d as i64,
        width: w as i64,
        seed: drop.map_or(0, |x| x.1),
        scale: 0.3,
        drop: drop.map_or(0.0, |x| x.0),
        span: sp,
        documents: docs.as_ref().map_or(0, |x| x.len() as i32 - 1),
        q: st(t, h),
        k: st(s, kv),
        v: st(s, kv),
        o: st(t, h),
        g: st(t, h),
        dq: st(t, h),
        dk: st(s, kv),
        dv: st(s, kv),
    };
    let up = |x: &[f64]| Buf::from(&put::<T>(x));
    let (bq, bk, bv, bg) = (up(&q), up(&k), up(&v), up(&g));
    let bd = Buf::from(if dv.is_empty() { &[0i64][..] } else { &dv });
    let new = |t, h| Buf::from(&put::<T>(&vec![7.0; place(t, h)]));
    let (bo, bdq, bdk, bdv) = (new(t, h), new(t, h), new(s, kv), new(s, kv));
    let (lse, delta) = (Buf::<A>::new(b * h * t), Buf::<A>::new(b * h * t));
    let pd = if docs.is_some() { bd.ptr } else { nullm() };
    let at = |p: *mut T| unsafe { p.add(lead) };
    let ok = |e: Result<(), prismgrad::Error>| {
        if let Err(e) = e {
            panic!("{what}: {e}")
        }
    };
    let th = [256, 1, 1];
    let tb = [if kd.threads == 0 { 128 } else { 256 }, 1, 1];
    ok(
        launch!(&format!("attention_fwd_{suffix}"), [(t.div_ceil(kd.rows) * b * h) as u32, 1, 1], th, kd.smem, false; at(bq.ptr), at(bk.ptr), at(bv.ptr), at(bo.ptr), lse.ptr, pd, sh),
    );
    close(&what, &gather(&back(&bo.get()), t, h), &want, tol);
    // the backward pass gets exactly the CPU's rounded output
    ok(
        launch!(&format!("attention_delta_{}", T::NAME), [2, 1, 1], [256, 1, 1], 0, false; at(bo.ptr), at(bg.ptr), delta.ptr, sh),
    );
    ok(
        launch!(&format!("attention_dq_{suffix}"), [(t.div_ceil(kd.brows) * b * h) as u32, 1, 1], tb, kd.bsmem, false; at(bq.ptr), at(bk.ptr), at(bv.ptr), at(bg.ptr), lse.ptr, delta.ptr, pd, at(bdq.ptr), sh),
    );
    ok(
        launch!(&format!("attention_dkv_{suffix}"), [(s.div_ceil(kd.brows) * b * kv) as u32, 1, 1], tb, kd.bsmem, false; at(bq.ptr), at(bk.ptr), at(bv.ptr), at(bg.ptr), lse.ptr, delta.ptr, pd, at(bdk.ptr), at(bdv.ptr), sh),
    );
    close(&format!("{what} dq"), &gather(&back(&bdq.get()), t, h), &wq, tol * 3.0);
    close(&format!("{what} dk"), &gather(&back(&bdk.get()), s, kv), &wk, tol * 3.0);
    close(&format!("{what} dv"), &gather(&back(&bdv.get()), s, kv), &wv, tol * 3.0);
}
fn all<T: El, A: El>(name: &str, k64: Kind, k128: Kind, tol: f64) {
    let spans = [Span::Full, Span::Causal, Span::Window(5), Span::Block(7), Span::Window(70), Span::Block(40)];
    let s64 = format!("d64_{name}");
    let s128 = format!("d128_{name}");
    for (i, &span) in spans.iter().enumerate() {
        seed(SEEDS[i % 4]);
        run::<T, A>(&s64, k64, (2, 37, 37, 2, 1, 8), span, None, None, i % 2 == 1, tol);
        run::<T, A>(&s128, k128, (1, 70, 75, 2, 2, 72), span, None, None, i % 2 == 0, tol);
        run::<T, A>(
            &s64,
            k64,
            (1, 90, 90, 4, 2, 24),
            span,
            Some(vec![0, 3, 3, 41, 90]),
            Some((0.3, 77 + i as u64)),
            false,
            tol,
        );
    }
    seed((0, 0));
    run::<T, A>(&s64, k64, (1, 1, 1, 1, 1, 1), Span::Causal, None, None, true, tol);
    run::<T, A>(&s64, k64, (1, 130, 140, 1, 1, 64), Span::Window(20), None, None, false, tol);
    run::<T, A>(&s64, k64, (1, 20, 5, 1, 1, 64), Span::Full, None, Some((0.5, 1 << 40)), false, tol);
    run::<T, A>(&s128, k128, (1, 33, 33, 2, 1, 128), Span::Causal, None, None, false, tol);
}
fn kind(rows: usize, smem: u32, brows: usize, bsmem: u32, threads: u32) -> Kind {
    Kind { rows, smem, brows, bsmem, threads }
}
#[test]
fn attention_f64() {
    let _g = setup();
    all::<f64, f64>("f64", kind(32, 42496, 32, 76288, 256), kind(32, 75264, 16, 68864, 256), 1e-11);
}
#[test]
fn attention_f32() {
    let _g = setup();
    all::<f32, f32>("f32", kind(64, 52224, 64, 87040, 256), kind(64, 84992, 32, 72192, 256), 2e-5);
}
#[test]
fn attention_bf16() {
    let _g = setup();
    all::<half::bf16, f32>("bf16", kind(128, 49152, 64, 49152, 0), kind(128, 98304, 64, 65536, 0), 2e-2);
}
#[test]
fn attention_f16() {
    let _g = setup();
    all::<half::f16, f32>("f16", kind(128, 49152, 64, 49152, 0), kind(128, 98304, 64, 65536, 0), 3e-3);
}
