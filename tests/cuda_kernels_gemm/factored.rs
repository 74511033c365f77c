use super::common::*;
use prismgrad::autograd::Groups;
use prismgrad::privacy::ClipFn;
use prismgrad::{Array, DType, Factor, Param, ParamGrad, Samples};

#[repr(C)]
#[derive(Clone, Copy, Default)]
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
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Direct {
    rd: i64,
    cd: i64,
    l: i64,
    r: i64,
    count: i64,
    each: i64,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Rows {
    width: i64,
    g: i64,
    s: i64,
    count: i64,
    each: i64,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Clip {
    count: i64,
    threshold: f64,
    gamma: f64,
    kind: i32,
    res: i32,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RowSum {
    rows: i64,
    width: i64,
    chunk: i64,
    g: i64,
    s: i64,
    each: i64,
}

fn ok(what: &str, e: Result<(), prismgrad::Error>) {
    if let Err(e) = e {
        panic!("{what}: {e}")
    }
}
fn finish(part: &Buf<f64>, count: usize, width: u32) -> Vec<f64> {
    let sq = Buf::<f64>::from(&vec![1.0; count]);
    ok(
        "norms_sum",
        launch!("norms_sum", [2, 1, 1], [256, 1, 1], 0, false; part.ptr, sq.ptr, count as i64, width as i64, 0.5f64, 1i32),
    );
    sq.get().iter().map(|x| (x - 1.0) * 2.0).collect()
}
fn grad(shape: &[usize], count: usize, f: Factor) -> ParamGrad {
    let mut g = ParamGrad::new(Param::new("w", Array::zeros(shape, DType::F64)), count);
    g.push(f).unwrap();
    g
}
fn arr(x: &[f64], w: usize) -> Array {
    Array::from_slice(x, &[x.len() / w, w]).unwrap()
}
fn rel(what: &str, a: &[f64], b: &[f64], tol: f64) {
    let top = b.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    close(what, &a.iter().map(|x| x / top).collect::<Vec<_>>(), &b.iter().map(|x| x / top).collect::<Vec<_>>(), tol);
}

struct Map {
    samples: Samples,
    off: Option<Vec<i64>>,
    order: Option<Vec<u32>>,
    each: usize,
    rows: usize,
    count: usize,
}
fn map(lens: &[usize], mode: usize, r: &mut Rng) -> Map {
    let rows: usize = lens.iter().sum();
    match mode {
        0 => Map {
            samples: Samples::uniform(lens.len(), lens[0]),
            off: None,
            order: None,
            each: lens[0],
            rows: lens[0] * lens.len(),
            count: lens.len(),
        },
        _ => {
            let mut owner: Vec<u32> =
                lens.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n(i as u32, n)).collect();
            if mode == 2 {
                for i in (1..rows).rev() {
                    owner.swap(i, r.below(i + 1));
                }
            }
            let mut off = vec![0i64];
            for &n in lens {
                off.push(off.last().unwrap() + n as i64);
            }
            let samples = Samples::owners(owner, lens.len()).unwrap();
            let order = samples.order().map(|o| o.to_vec());
            Map { samples, off: Some(off), order, each: 0, rows, count: lens.len() }
        }
    }
}
struct Dev {
    _off: Buf<i64>,
    _order: Buf<u32>,
    o: *mut i64,
    ord: *mut u32,
}
fn dev(m: &Map) -> Dev {
    let off = Buf::from(m.off.as_deref().unwrap_or(&[0]));
    let order = Buf::from(m.order.as_deref().filter(|x| !x.is_empty()).unwrap_or(&[0]));
    let (o, ord) =
        (if m.off.is_some() { off.ptr } else { nullm() }, if m.order.is_some() { order.ptr } else { nullm() });
    Dev { _off: off, _order: order, o, ord }
}
fn norms<T: El>(name: &str, gsm: u32, dsm: u32, tol: f64) {
    let mut r = Rng(5);
    let cases: [(&[usize], usize, usize, usize); 7] = [
        (&[3, 3, 3], 0, 5, 7),
        (&[150, 150], 0, 9, 6),
        (&[4, 0, 90, 1], 1, 20, 33),
        (&[5, 0, 140, 2], 2, 3, 17),
        (&[1, 1], 0, 140, 70),
        (&[9, 2], 2, 64, 132),
        (&[0, 0], 1, 4, 4),
    ];
    for (i, &(lens, mode, rd, cd)) in cases.iter().enumerate() {
        seed(SEEDS[i % 4]);
        let m = map(lens, mode, &mut r);
        let d = dev(&m);
        let (l, g) = (round::<T>(&r.vec(m.rows * rd)), round::<T>(&r.vec(m.rows * cd)));
        let what = format!("{} {lens:?} mode {mode} {rd}x{cd}", name);
        let pg = grad(
            &[rd, cd],
            m.count,
            Factor::Outer { left: arr(&l, rd), right: arr(&g, cd), samples: m.samples.clone() },
        );
        let want = pg.sample_sq_norms().unwrap();
        let (bl, bg) = (Buf::from(&put::<T>(&l)), Buf::from(&put::<T>(&g)));
        for x in [1u32, 3] {
            let part = Buf::<f64>::new(m.count * x as usize);
            let s = Gram {
                rd: rd as i64,
                cd: cd as i64,
                l1: rd as i64,
                r1: cd as i64,
                l2: rd as i64,
                r2: cd as i64,
                count1: m.count as i64,
                count2: m.count as i64,
                each1: m.each as i64,
                each2: m.each as i64,
                kind: 0,
                same: 1,
                ..Default::default()
            };
            ok(
                &what,
                launch!(&format!("factor_gram_{}", name), [x, m.count.min(2) as u32, 1], [256, 1, 1], gsm, false; bl.ptr, bg.ptr, bl.ptr, bg.ptr, nullm::<u32>(), nullm::<u32>(), d.o, d.o, d.ord, d.ord, part.ptr, s),
            );
            rel(&format!("gram {what}"), &finish(&part, m.count, x), &want, tol);
            let s = Direct {
                rd: rd as i64,
                cd: cd as i64,
                l: rd as i64,
                r: cd as i64,
                count: m.count as i64,
                each: m.each as i64,
            };
            ok(
                &what,
                launch!(&format!("factor_direct_{}", name), [x, m.count.min(2) as u32, 1], [256, 1, 1], dsm, false; bl.ptr, bg.ptr, nullm::<u32>(), d.o, d.ord, part.ptr, s),
            );
            rel(&format!("direct {what}"), &finish(&part, m.count, x), &want, tol);
        }
        // all pairs
        let part = Buf::<f64>::new(m.count * m.count);
        let s = Gram {
            rd: rd as i64,
            cd: cd as i64,
            l1: rd as i64,
            r1: cd as i64,
            l2: rd as i64,
            r2: cd as i64,
            count1: m.count as i64,
            count2: m.count as i64,
            each1: m.each as i64,
            each2: m.each as i64,
            kind: 0,
            same: 0,
            all: 1,
            res: 0,
        };
        ok(
            &what,
            launch!(&format!("factor_gram_{}", name), [1, 3, 1], [256, 1, 1], gsm, false; bl.ptr, bg.ptr, bl.ptr, bg.ptr, nullm::<u32>(), nullm::<u32>(), d.o, d.o, d.ord, d.ord, part.ptr, s),
        );
        rel(&format!("pairs {what}"), &finish(&part, m.count * m.count, 1), &pg.gram(&pg).unwrap().to_f64(), tol);
        // grouped: three blocks, ids in any order
        if m.rows > 0 {
            let group: Vec<u32> = (0..m.rows).map(|_| r.below(3) as u32).collect();
            let pg = grad(
                &[3, rd, cd],
                m.count,
                Factor::GroupedOuter {
                    left: arr(&l, rd),
                    right: arr(&g, cd),
                    group: Groups::of_ids(group.clone(), 3).unwrap(),
                    samples: m.samples.clone(),
                },
            );
            let want = pg.sample_sq_norms().unwrap();
            let bgr = Buf::from(&group);
            let part = Buf::<f64>::new(m.count * 2);
            let s = Gram { same: 1, all: 0, ..s };
            ok(
                &what,
                launch!(&format!("factor_gram_{}", name), [2, 5, 1], [256, 1, 1], gsm, false; bl.ptr, bg.ptr, bl.ptr, bg.ptr, bgr.ptr, bgr.ptr, d.o, d.o, d.ord, d.ord, part.ptr, s),
            );
            rel(&format!("grouped {what}"), &finish(&part, m.count, 2), &want, tol);
            // lookup
            let pg = grad(
                &[3, cd],
                m.count,
                Factor::Lookup {
                    ids: Array::from_slice(&group, &[m.rows]).unwrap(),
                    grad: arr(&g, cd),
                    samples: m.samples.clone(),
                },
            );
            let s = Gram { rd: cd as i64, l1: cd as i64, l2: cd as i64, kind: 1, ..s };
            ok(
                &what,
                launch!(&format!("factor_gram_{}", name), [2, 5, 1], [256, 1, 1], gsm, false; bg.ptr, nullm::<T>(), bg.ptr, nullm::<T>(), bgr.ptr, bgr.ptr, d.o, d.o, d.ord, d.ord, part.ptr, s),
            );
            rel(&format!("lookup {what}"), &finish(&part, m.count, 2), &pg.sample_sq_norms().unwrap(), tol);
            // lookup tied to a head whose left operand has three columns: sum of both, minus each by itself, is twice the cross term
            let left = round::<T>(&r.vec(m.rows * 3));
            let head = Factor::Outer { left: arr(&left, 3), right: arr(&l, rd), samples: m.samples.clone() };
            let e = round::<T>(&r.vec(m.rows * rd));
            let look = Factor::Lookup {
                ids: Array::from_slice(&group, &[m.rows]).unwrap(),
                grad: arr(&e, rd),
                samples: m.samples.clone(),
            };
            let w = Param::new("w", Array::zeros(&[3, rd], DType::F64));
            let (mut h, mut k) = (ParamGrad::new(w.clone(), m.count), ParamGrad::new(w, m.count));
            h.push(head).unwrap();
            k.push(look).unwrap();
            let want = k.gram(&h).unwrap().to_f64();
            let want: Vec<f64> = (0..m.count).map(|i| want[i * m.count + i]).collect();
            let (be, bleft) = (Buf::from(&put::<T>(&e)), Buf::from(&put::<T>(&left)));
            let s = Gram { rd: rd as i64, l1: rd as i64, l2: rd as i64, r2: 3, kind: 2, same: 0, ..s };
            ok(
                &what,
                launch!(&format!("factor_gram_{}", name), [2, 5, 1], [256, 1, 1], gsm, false; be.ptr, nullm::<T>(), bl.ptr, bleft.ptr, bgr.ptr, nullm::<u32>(), d.o, d.o, d.ord, d.ord, part.ptr, s),
            );
            rel(&format!("tied {what}"), &finish(&part, m.count, 2), &want, tol * 4.0);
            // grouped, direct: rows of a group neighbours within each sample
            if mode < 2 {
                let mut sorted = group.clone();
                for i in 0..m.count {
                    sorted[m.samples.range(i)].sort();
                }
                let pg = grad(
                    &[3, rd, cd],
                    m.count,
                    Factor::GroupedOuter {
                        left: arr(&l, rd),
                        right: arr(&g, cd),
                        group: Groups::of_ids(sorted.clone(), 3).unwrap(),
                        samples: m.samples.clone(),
                    },
                );
                let bgr = Buf::from(&sorted);
                let s = Direct {
                    rd: rd as i64,
                    cd: cd as i64,
                    l: rd as i64,
                    r: cd as i64,
                    count: m.count as i64,
                    each: m.each as i64,
                };
                ok(
                    &what,
                    launch!(&format!("factor_direct_{}", name), [2, 5, 1], [256, 1, 1], dsm, false; bl.ptr, bg.ptr, bgr.ptr, d.o, d.ord, part.ptr, s),
                );
                rel(&format!("grouped direct {what}"), &finish(&part, m.count, 2), &pg.sample_sq_norms().unwrap(), tol);
            }
        }
    }
}
fn rows<T: El, A: El>(tol: f64) {
    let mut r = Rng(8);
    for (lens, mode, p) in [(&[3usize, 3, 3][..], 0, 5), (&[40, 0, 7], 1, 300), (&[40, 3, 7], 2, 70)] {
        let m = map(lens, mode, &mut r);
        let d = dev(&m);
        let (g, sc) = (round::<T>(&r.vec(m.rows * p)), round::<T>(&r.vec(m.rows * p)));
        let (bg, bs) = (Buf::from(&put::<T>(&g)), Buf::from(&put::<T>(&sc)));
        let mut w = round::<A>(&r.vec(m.count));
        w[1] = 0.0;
        let owner = m.samples.owner_ids();
        let (bw, bo) = (Buf::from(&put::<A>(&w)), Buf::from(&owner));
        for scaled in [false, true] {
            let what = format!("rows {} {lens:?} {p} {scaled}", T::NAME);
            let f = if scaled {
                Factor::ScaledRowSum { grad: arr(&g, p), scale: arr(&sc, p), samples: m.samples.clone() }
            } else {
                Factor::RowSum { grad: arr(&g, p), samples: m.samples.clone() }
            };
            let pg = grad(&[p], m.count, f);
            let part = Buf::<f64>::new(m.count * 2);
            let s = Rows { width: p as i64, g: p as i64, s: p as i64, count: m.count as i64, each: m.each as i64 };
            ok(
                &what,
                launch!(&format!("factor_rows_{}", T::NAME), [2, 2, 1], [256, 1, 1], 0, false; bg.ptr, if scaled { bs.ptr } else { nullm() }, d.o, d.ord, part.ptr, s),
            );
            rel(&what, &finish(&part, m.count, 2), &pg.sample_sq_norms().unwrap(), tol);
            let (chunk, n) = (13usize, m.rows.div_ceil(13));
            let part = Buf::<A>::new(n * p);
            let s =
                RowSum { rows: m.rows as i64, width: p as i64, chunk: chunk as i64, g: p as i64, s: p as i64, each: 1 };
            ok(
                &what,
                launch!(&format!("factor_rowsum_{}", T::NAME), [p.div_ceil(32) as u32, n as u32, 1], [256, 1, 1], 0, false; bg.ptr, if scaled { bs.ptr } else { nullm() }, bw.ptr, bo.ptr, part.ptr, s),
            );
            let out = Buf::from(&put::<A>(&vec![2.0; p]));
            ok(
                &what,
                launch!(&format!("factor_rowsum_add_{}", A::NAME), [1, 1, 1], [256, 1, 1], 0, false; part.ptr, out.ptr, n as i64, p as i64, 1i32),
            );
            close(
                &what,
                &back(&out.get()),
                &pg.weighted_sum(&w).unwrap().to_f64().iter().map(|x| x + 2.0).collect::<Vec<_>>(),
                A::TOL.max(1e-5),
            );
        }
    }
}
#[test]
fn norms_f64() {
    let _g = setup();
    norms::<f64>("f64", 34880, 33856, 1e-11);
}
#[test]
fn norms_f32() {
    let _g = setup();
    norms::<f32>("f32", 34880, 33856, 2e-5);
}
#[test]
fn row_sums() {
    let _g = setup();
    rows::<f32, f32>(1e-5);
    rows::<f64, f64>(1e-11);
}
#[test]
fn clip() {
    let _g = setup();
    let sq: Vec<f64> =
        [0.0, 1e-9, 0.25, 1.0, 9.0, 1e30, f64::NAN, f64::INFINITY].into_iter().cycle().take(300).collect();
    let b = Buf::from(&sq);
    for (kind, f) in
        [ClipFn::Abadi, ClipFn::Reparameterised, ClipFn::AutoV, ClipFn::AutoS { gamma: 0.01 }, ClipFn::Global]
            .into_iter()
            .enumerate()
    {
        let (w, stats) = (Buf::<f64>::new(300), Buf::from(&[5u64, 6, 7]));
        ok(
            "clip",
            launch!("clip_weights_f64", [1, 1, 1], [256, 1, 1], 0, false; b.ptr, w.ptr, stats.ptr, Clip { count: 300, threshold: 0.5, gamma: 0.01, kind: kind as i32, res: 0 }),
        );
        assert_eq!(w.get(), sq.iter().map(|&s| f.factor(s, 0.5)).collect::<Vec<_>>(), "{f:?}");
        let n = |p: &dyn Fn(f64) -> bool| sq.iter().filter(|&&x| p(x)).count() as u64;
        assert_eq!(stats.get(), [5 + 300, 6 + n(&|x| x.is_finite() && x.sqrt() > 0.5), 7 + n(&|x| !x.is_finite())]);
        let w = Buf::<f32>::new(300);
        ok(
            "clip",
            launch!("clip_weights_f32", [1, 1, 1], [256, 1, 1], 0, false; b.ptr, w.ptr, nullm::<u64>(), Clip { count: 300, threshold: 0.5, gamma: 0.01, kind: kind as i32, res: 0 }),
        );
        assert_eq!(w.get(), sq.iter().map(|&s| f.factor(s, 0.5) as f32).collect::<Vec<_>>(), "{f:?}");
    }
}
