use super::common::*;
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Rows {
    groups: i64,
    n: i64,
    k: i64,
    x_rs: i64,
    y_rs: i64,
    w_s: i64,
    w_rs: i64,
    w_cs: i64,
    act: i32,
    acc: i32,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Weight {
    groups: i64,
    rd: i64,
    cd: i64,
    l_rs: i64,
    r_rs: i64,
    o_s: i64,
    o_rs: i64,
    each: i64,
    acc: i32,
    res: i32,
}
fn ok(what: &str, e: Result<(), prismgrad::Error>) {
    if let Err(e) = e {
        panic!("{what}: {e}")
    }
}

/// I operands, O results, W the weight's gradient.
fn run<I: El, O: El, W: El>(name: &str, smem: u32, lens: &[usize], (k, n): (usize, usize), gather: bool, tol: f64) {
    let mut r = Rng(lens.len() as u64 + k as u64);
    let e = lens.len();
    let rows: usize = lens.iter().sum();
    let mut off = vec![0i64];
    for &l in lens {
        off.push(off.last().unwrap() + l as i64);
    }
    let tokens = if gather { rows + 3 } else { rows };
    let idx: Vec<u32> = (0..rows).map(|i| if gather { r.below(tokens) as u32 } else { i as u32 }).collect();
    let group = |row: usize| (0..e).find(|&g| (off[g] as usize..off[g + 1] as usize).contains(&row)).unwrap();
    let (x, bias, y0) =
        (round::<I>(&r.vec(tokens.max(1) * k)), round::<O>(&r.vec(e * n)), round::<O>(&r.vec((rows * n).max(1))));
    let boff = Buf::from(&off);
    let bidx = Buf::from(if idx.is_empty() { &[0u32][..] } else { &idx });
    let pidx = if gather { bidx.ptr } else { nullm() };
    for t in [false, true] {
        for acc in [false, true] {
            for grid in [2u32, 7] {
                let w = round::<I>(&r.vec(e * k * n));
                let (w_rs, w_cs) = if t { (1, k) } else { (n, 1) };
                let mut want = y0.clone();
                for row in 0..rows {
                    let g = group(row);
                    for j in 0..n {
                        let mut v: f64 =
                            (0..k).map(|p| x[idx[row] as usize * k + p] * w[g * k * n + p * w_rs + j * w_cs]).sum();
                        if acc {
                            v += y0[row * n + j];
                        }
                        want[row * n + j] = (v + bias[g * n + j]).tanh();
                    }
                }
                let (bx, bw, by, bb) = (
                    Buf::from(&put::<I>(&x)),
                    Buf::from(&put::<I>(&w)),
                    Buf::from(&put::<O>(&y0)),
                    Buf::from(&put::<O>(&bias)),
                );
                let s = Rows {
                    groups: e as i64,
                    n: n as i64,
                    k: k as i64,
                    x_rs: k as i64,
                    y_rs: n as i64,
                    w_s: (k * n) as i64,
                    w_rs: w_rs as i64,
                    w_cs: w_cs as i64,
                    act: 5,
                    acc: acc as i32,
                };
                let kern = format!("grouped_rows_{}_{name}", if t { "t" } else { "n" });
                let what = format!("{kern} {lens:?} {k}x{n} gather {gather} acc {acc}");
                ok(
                    &what,
                    launch!(&kern, [grid, 1, 1], [256, 1, 1], smem, false; bx.ptr, bw.ptr, by.ptr, bb.ptr, nullm::<O>(), boff.ptr, pidx, s),
                );
                close(&what, &back(&by.get()), &want, tol * (k as f64).sqrt());
            }
        }
    }
    // weight gradient: left = x gathered, right = y0; weights by owner, one of them zero with rows of NaN
    let samples = 4;
    let owner: Vec<u32> = (0..rows.max(1)).map(|_| r.below(samples) as u32).collect();
    let mut wt = round::<W>(&r.vec(samples));
    wt[2] = 0.0;
    let mut right = round::<I>(&r.vec((rows * n).max(1)));
    for row in 0..rows {
        if owner[row] == 2 {
            for j in 0..n {
                right[row * n + j] = f64::NAN;
            }
        }
    }
    for acc in [false, true] {
        for weighted in [true, false] {
            let right = if weighted { right.clone() } else { round::<I>(&r.vec((rows * n).max(1))) };
            let o0 = round::<W>(&r.vec(e * k * n));
            let mut want = if acc { o0.clone() } else { vec![0.0; e * k * n] };
            for row in 0..rows {
                let f = if weighted { wt[owner[row] as usize] } else { 1.0 };
                if f != 0.0 {
                    let g = group(row);
                    for i in 0..k {
                        for j in 0..n {
                            want[g * k * n + i * n + j] += f * x[idx[row] as usize * k + i] * right[row * n + j];
                        }
                    }
                }
            }
            // Gradients of weights are taken in f32 and f64 only.
            if !matches!(name, "f32" | "f64") {
                continue;
            }
            let (bl, br, bo) = (Buf::from(&put::<I>(&x)), Buf::from(&put::<I>(&right)), Buf::from(&put::<W>(&o0)));
            let (bw, bown) = (Buf::from(&put::<W>(&wt)), Buf::from(&owner));
            let s = Weight {
                groups: e as i64,
                rd: k as i64,
                cd: n as i64,
                l_rs: k as i64,
                r_rs: n as i64,
                o_s: (k * n) as i64,
                o_rs: n as i64,
                each: 1,
                acc: acc as i32,
                res: 0,
            };
            let what = format!("grouped_weight_{name} {lens:?} {k}x{n} gather {gather} acc {acc} weighted {weighted}");
            ok(
                &what,
                launch!(&format!("grouped_weight_{name}"), [1, 3, 1], [256, 1, 1], smem, false; bl.ptr, br.ptr, bo.ptr, if weighted { bw.ptr } else { nullm() }, if weighted { bown.ptr } else { nullm() }, boff.ptr, pidx, nullm::<u32>(), s),
            );
            close(&what, &back(&bo.get()), &want, tol * (rows as f64).sqrt().max(1.0));
        }
    }
}
fn all<I: El, O: El, W: El>(name: &str, smem: u32, tol: f64) {
    seed((0, 0));
    run::<I, O, W>(name, smem, &[3, 0, 5, 1], (9, 7), false, tol);
    seed((1, 0));
    run::<I, O, W>(name, smem, &[0, 140, 0, 0, 70], (20, 16), false, tol);
    seed((2, 0));
    run::<I, O, W>(name, smem, &[2, 0, 66], (16, 140), true, tol);
    seed((3, 50));
    run::<I, O, W>(name, smem, &[0, 0], (4, 4), false, tol);
    let mut many = vec![0; 70];
    many[1] = 2;
    many[33] = 3;
    many[69] = 1;
    run::<I, O, W>(name, smem, &many, (8, 8), false, tol);
}
#[test]
fn grouped_f32() {
    let _g = setup();
    all::<f32, f32, f32>("f32", 33792, 2e-5);
}
#[test]
fn grouped_f64() {
    let _g = setup();
    all::<f64, f64, f64>("f64", 33792, 1e-12);
}
#[test]
fn grouped_mma() {
    let _g = setup();
    all::<half::bf16, half::bf16, f32>("bf16", 65536, 1e-2);
    all::<half::f16, half::f16, f32>("f16", 65536, 2e-3);
    all::<f32, f32, f32>("tf32", 65536, 1e-3);
}
