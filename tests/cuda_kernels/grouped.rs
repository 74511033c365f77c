//! Grouped rows with what no op asks of them yet: rows taken by index, an activation, sums added to what is there, and fewer
//! blocks than tiles.
use crate::common::*;
use prismgrad::device::cuda::layouts::{ACT_TANH, GroupedRows};

fn run<I: El, O: El>(name: &str, smem: u32, lens: &[usize], (k, n): (usize, usize), gather: bool, tol: f64) {
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
                let s = GroupedRows {
                    groups: e as i64,
                    n: n as i64,
                    k: k as i64,
                    x_rs: k as i64,
                    y_rs: n as i64,
                    w_s: (k * n) as i64,
                    w_rs: w_rs as i64,
                    w_cs: w_cs as i64,
                    act: ACT_TANH,
                    accumulate: acc as i32,
                };
                let kern = format!("grouped_rows_{}_{name}", if t { "t" } else { "n" });
                let what = format!("{kern} {lens:?} {k}x{n} gather {gather} acc {acc}");
                go!(kern, [grid, 1, 1], smem; bx.ptr, bw.ptr, by.ptr, bb.ptr, nullm::<O>(), boff.ptr, pidx, s);
                close(&what, &back(&by.get()), &want, tol * (k as f64).sqrt());
            }
        }
    }
}
fn all<I: El, O: El>(name: &str, smem: u32, tol: f64) {
    seed((0, 0));
    run::<I, O>(name, smem, &[3, 0, 5, 1], (9, 7), false, tol);
    seed((1, 0));
    run::<I, O>(name, smem, &[0, 140, 0, 0, 70], (20, 16), false, tol);
    seed((2, 0));
    run::<I, O>(name, smem, &[2, 0, 66], (16, 140), true, tol);
    seed((3, 50));
    run::<I, O>(name, smem, &[0, 0], (4, 4), false, tol);
    let mut many = vec![0; 70];
    many[1] = 2;
    many[33] = 3;
    many[69] = 1;
    run::<I, O>(name, smem, &many, (8, 8), false, tol);
}
#[test]
fn grouped_f32() {
    let _g = setup();
    all::<f32, f32>("f32", 33792, 2e-5);
}
#[test]
fn grouped_f64() {
    let _g = setup();
    all::<f64, f64>("f64", 33792, 1e-12);
}
#[test]
fn grouped_mma() {
    let _g = setup();
    all::<half::bf16, half::bf16>("bf16", 65536, 1e-2);
    all::<half::f16, half::f16>("f16", 65536, 2e-3);
    all::<f32, f32>("tf32", 65536, 1e-3);
}
