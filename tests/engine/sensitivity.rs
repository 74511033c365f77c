//! One record moves the clipped sum by no more than the stated sensitivity, in f32 as well, whatever the record holds: rows that
//! cancel, huge and tiny ones, parameters that are used several times. A norm that rounding has made too small would break this.

use prismgrad::autograd::Groups;
use prismgrad::device_tests;
use prismgrad::ops::attention::{AttentionOptions, Span, attention_qkv};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::random::Rng;
use prismgrad::step::clipped_gradient;
use prismgrad::{Array, DType, Device, Factor, Param, ParamGrad, Samples, Tensor};

const CLIPS: [ClipFn; 5] =
    [ClipFn::Abadi, ClipFn::AutoS { gamma: 0.01 }, ClipFn::AutoV, ClipFn::Reparameterised, ClipFn::Global];
/// What the roundings of a sum over a few records may add to the bound.
const ROUNDING: f64 = 1e-5;

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Rows `[t, d]` for the left and `[t, p]` for the right operand of a record whose outer products nearly cancel, in pairs: rows
/// of norm `k`, the second of a pair `delta` away from the first. An odd last row, of norm 1, stands alone.
fn cancelling(rng: &mut Rng, (t, d, p): (usize, usize, usize), k: f64, delta: f64) -> (Vec<f64>, Vec<f64>) {
    let mut unit = |n: usize| -> Vec<f64> {
        let v: Vec<f64> = (0..n).map(|_| 2.0 * rng.uniform() - 1.0).collect();
        let s = norm(&v).max(1e-300);
        v.iter().map(|x| x / s).collect()
    };
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for i in 0..t {
        let (a, b) = (unit(d), unit(p));
        if i % 2 == 0 {
            let k = if i + 1 < t { k } else { 1.0 };
            left.extend(a.iter().map(|x| k * x));
            right.extend(b.iter().map(|x| k * x));
        } else {
            let (l, r) = (left[(i - 1) * d..i * d].to_vec(), right[(i - 1) * p..i * p].to_vec());
            left.extend(l.iter().zip(&a).map(|(l, a)| l + delta * a));
            right.extend(r.iter().zip(&b).map(|(r, b)| -r + delta * b));
        }
    }
    (left, right)
}

/// The clipped sum of records, each with its rows, of one weight `[p, d]`.
fn sum_of(
    device: &Device,
    records: &[&(Vec<f64>, Vec<f64>)],
    (t, d, p): (usize, usize, usize),
    (style, clip, bound): (&ClipStyle, ClipFn, f64),
    activations: DType,
) -> Vec<f64> {
    let w = Param::new("layer.weight", Array::zeros(&[p, d], DType::F32).to(device).unwrap());
    let join = |k: usize, n: usize| {
        let all: Vec<f64> = records.iter().flat_map(|r| if k == 0 { r.0.clone() } else { r.1.clone() }).collect();
        Array::from_slice(&all, &[records.len(), t, n]).unwrap().cast(activations).to(device).unwrap()
    };
    let y = linear(&Tensor::new(join(0, d)), &w, Layout::OutIn, None, Activation::None, None).unwrap();
    let losses = y.mul(&Tensor::new(join(1, p))).unwrap().sum(&[1, 2], false).unwrap();
    clipped_gradient(&losses, std::slice::from_ref(&w), style, clip, bound).unwrap()[0].to_f64()
}

device_tests! {
    /// A linear layer, by each form of its norm: one row, Gram matrices, the gradient itself, norm and sum in one pass.
    fn rows_that_cancel_stay_within_the_bound(device) {
        let mut rng = Rng::new(17);
        let cpu = device.is_cpu();
        let shapes: &[(usize, usize, usize)] = match cpu {
            true => &[(1, 64, 64), (2, 128, 128), (3, 512, 512), (8, 256, 128), (15, 200, 300), (16, 64, 96), (33, 40, 100), (64, 256, 256), (64, 8, 512)],
            false => &[(2, 96, 96), (5, 72, 40), (40, 24, 24)],
        };
        let ks: &[f64] = if cpu { &[1.0, 10.0, 1e2, 1e3, 1e4, 1e6] } else { &[1e4] };
        let scales: &[f64] = if cpu { &[1.0, 1e-30, 1e-19, 1e-12, 1e9, 1e14] } else { &[1.0, 1e-19] };
        let mut most = 0f64;
        for &shape in shapes {
            for &k in ks {
                for &delta in if cpu { &[0.0, 1e-3, 1.0][..] } else { &[0.0, 1.0] } {
                    let scale = if delta == 0.0 { scales } else { &scales[..1] };
                    for &s in scale {
                        let mut bad = cancelling(&mut rng, shape, k, delta);
                        bad.0.iter_mut().for_each(|x| *x *= s);
                        bad.1.iter_mut().for_each(|x| *x *= s);
                        let benign: Vec<_> = (0..3).map(|_| cancelling(&mut rng, shape, 1.0, 1.0)).collect();
                        let without: Vec<_> = benign.iter().collect();
                        for &at in if cpu { &[0, 3][..] } else { &[0] } {
                            let mut with = without.clone();
                            with.insert(at, &bad);
                            for (i, &clip) in CLIPS.iter().enumerate().filter(|(i, _)| cpu || *i == 1) {
                                let bound = [1.0, 0.3][i % 2];
                                for activations in [DType::F32, DType::BF16].into_iter().take(if cpu && (i < 2 || s != 1.0) { 2 } else { 1 }) {
                                    let settings = (&ClipStyle::AllLayer, clip, bound);
                                    let sum = |r: &[&(Vec<f64>, Vec<f64>)]| sum_of(device, r, shape, settings, activations);
                                    let moved: Vec<f64> = sum(&with).iter().zip(sum(&without)).map(|(a, b)| a - b).collect();
                                    let share = norm(&moved) / clip.sensitivity(bound);
                                    assert!(
                                        share <= 1.0 + ROUNDING,
                                        "{shape:?}, rows of norm {k:e}·{s:e}, δ {delta}, {clip:?}, {activations}: moved by {share} of the bound"
                                    );
                                    most = most.max(share);
                                }
                            }
                        }
                    }
                }
            }
        }
        // The bound is not kept by leaving everything out. A device has a few cases of AUTO-S, which stays below the bound.
        assert!(most > if cpu { 0.99 } else { 0.95 }, "at most {most} of the bound");
    }

    /// Two rows c·1 and c′·1 against c·1 and −c′·1: the gradient is (c² − c′²)·1·1ᵀ, a fifth of its terms' norm. A dot product of equal
    /// numbers rounds the same way at every addition, c², c′² and c·c′ each its own way, so that the Gram form is off by more than any
    /// sum of the rows. Its error is too small a share of it for the gradient to be formed, and so has to be in the bound.
    fn rows_of_equal_numbers_stay_within_the_bound(device) {
        let (mut rng, cpu) = (Rng::new(41), device.is_cpu());
        let (d, mut most) = (128, 0f64);
        for _ in 0..if cpu { 200 } else { 4 } {
            let c = 1.0 + rng.uniform() as f32;
            let other = c * (0.815 + 0.03 * rng.uniform() as f32);
            let rows = |a: f32, b: f32| [vec![a as f64; d], vec![b as f64; d]].concat();
            let record = (rows(c, other), rows(c, -other));
            let settings = (&ClipStyle::AllLayer, ClipFn::Abadi, 0.5);
            let share = norm(&sum_of(device, &[&record], (2, d, d), settings, DType::F32)) / 0.5;
            assert!(share <= 1.0 + 1e-6, "{c} and {other}: {share} of the bound");
            most = most.max(share);
        }
        assert!(most > 0.99, "at most {most} of the bound");
    }

    /// A sample whose weight is zero takes no part in a sum of any kind, whatever it holds: so one that is not finite is left out.
    fn samples_of_weight_zero_are_left_out(device) {
        let sums = |bad: f64| -> Vec<(&str, Vec<f64>)> {
            let mut all = Vec::new();
            for samples in [Samples::uniform(2, 4), Samples::owners(vec![1, 0, 0, 1, 0, 1, 1, 0], 2).unwrap()] {
                let rows = |n: usize| {
                    let value = |i: usize| if samples.owner(i / n) == 1 { bad } else { (i as f64 * 0.3 + n as f64).sin() };
                    Array::generate(&[8, n], DType::F32, value).to(device).unwrap()
                };
                let ids = Array::from_slice(&[0u32, 4, 1, 1, 2, 0, 4, 4], &[8]).unwrap().to(device).unwrap();
                let group = Groups::of_ids(vec![0, 1, 0, 1, 1, 0, 1, 1], 2).unwrap();
                let grads = Array::generate(&[2, 7], DType::F32, |i| if i < 7 { i as f64 } else { bad }).to(device).unwrap();
                let s = || samples.clone();
                let cases = [
                    ("outer", vec![5, 7], Factor::Outer { left: rows(5), right: rows(7), samples: s() }),
                    ("row sum", vec![7], Factor::RowSum { grad: rows(7), samples: s() }),
                    ("scaled row sum", vec![7], Factor::ScaledRowSum { grad: rows(7), scale: rows(7), samples: s() }),
                    ("lookup", vec![5, 7], Factor::Lookup { ids, grad: rows(7), samples: s() }),
                    ("grouped", vec![2, 5, 7], Factor::GroupedOuter { left: rows(5), right: rows(7), group, samples: s() }),
                    ("per sample", vec![7], Factor::PerSample { grads }),
                ];
                for (name, shape, factor) in cases {
                    let mut grad = ParamGrad::new(Param::new("w", Array::zeros(&shape, DType::F32).to(device).unwrap()), 2);
                    grad.push(factor).unwrap();
                    all.push((name, grad.weighted_sum(&[0.7, 0.0]).unwrap().to_f64()));
                }
            }
            all
        };
        let want = sums(1.0);
        assert!(want.iter().all(|(_, sum)| norm(sum) > 0.1), "{want:?}");
        for bad in [f64::NAN, f64::INFINITY] {
            assert_eq!(sums(bad), want, "the other sample holds {bad}");
        }
    }

    /// Other kinds of factor, parameters with two uses of one kind and of two, ragged rows in any order: the sums that
    /// [`ParamGrad::clipped_sum`] makes.
    fn every_kind_and_reused_parameters_stay_within_the_bound(device) {
        let mut rng = Rng::new(23);
        let cpu = device.is_cpu();
        // Rows of the record that is looked at, and of another one, not sorted.
        let samples = Samples::owners(vec![0, 1, 0, 0, 1, 0], 2).unwrap();
        let ks: &[f64] = if cpu { &[1.0, 30.0, 1e3, 1e5, 1e7] } else { &[1e3] };
        let mut most = 0f64;
        for (d, p) in if cpu { vec![(96, 160), (300, 300), (5, 700)] } else { vec![(20, 40)] } {
            for &k in ks {
                for delta in [0.0, 1e-4] {
                    let (l, r) = cancelling(&mut rng, (4, d, p), k, delta);
                    let (l2, r2) = cancelling(&mut rng, (2, d, p), 1.0, 1.0);
                    let rows = |own: &[f64], other: &[f64], n: usize, flip: bool| {
                        let (mut a, mut b) = (own.chunks(n), other.chunks(n));
                        let all: Vec<f64> = [0, 1, 0, 0, 1, 0]
                            .iter()
                            .flat_map(|&s| if s == 0 { a.next().unwrap() } else { b.next().unwrap() }.to_vec())
                            .map(|x| if flip { -x } else { x })
                            .collect();
                        Array::from_slice(&all, &[6, n]).unwrap().cast(DType::F32).to(device).unwrap()
                    };
                    let (left, right, minus) = (rows(&l, &l2, d, false), rows(&r, &r2, p, false), rows(&r, &r2, p, true));
                    let shifted = rows(&l.iter().map(|x| x + delta).collect::<Vec<_>>(), &l2, d, false);
                    let outer = |left: &Array, right: &Array| Factor::Outer { left: left.clone(), right: right.clone(), samples: samples.clone() };
                    let lookup = |ids: [u32; 6], grad: &Array| Factor::Lookup {
                        ids: Array::from_slice(&ids, &[6]).unwrap().to(device).unwrap(),
                        grad: grad.clone(),
                        samples: samples.clone(),
                    };
                    let group = Groups::of_ids(vec![0, 1, 0, 1, 0, 1], 2).unwrap();
                    let grouped = Factor::GroupedOuter { left: left.clone(), right: right.clone(), group, samples: samples.clone() };
                    // One-hot rows on the left: the same gradient as a lookup's.
                    let hot = Array::generate(&[6, d], DType::F32, |i| (i % d == 3) as u8 as f64).to(device).unwrap();
                    let cases: Vec<(&str, Vec<usize>, Vec<Factor>)> = vec![
                        ("outer", vec![d, p], vec![outer(&left, &right)]),
                        ("grouped", vec![2, d, p], vec![grouped]),
                        ("lookup", vec![d, p], vec![lookup([3; 6], &right)]),
                        ("row sum", vec![p], vec![Factor::RowSum { grad: right.clone(), samples: samples.clone() }]),
                        (
                            "scaled row sum",
                            vec![p],
                            vec![Factor::ScaledRowSum { grad: right.clone(), scale: right.clone(), samples: samples.clone() }],
                        ),
                        ("two uses", vec![d, p], vec![outer(&left, &right), outer(&shifted, &minus)]),
                        ("two lookups", vec![d, p], vec![lookup([3; 6], &right), lookup([3, 3, 3, 3, 3, 4], &minus)]),
                        ("tied", vec![d, p], vec![lookup([3; 6], &right), outer(&hot, &minus)]),
                        ("many uses", vec![d, p], vec![outer(&left, &right); 12]),
                    ];
                    for (name, shape, factors) in cases {
                        let mut grad = ParamGrad::new(Param::new("w", Array::zeros(&shape, DType::F32).to(device).unwrap()), 2);
                        factors.into_iter().for_each(|f| grad.push(f).unwrap());
                        for clip in CLIPS {
                            // The other record gets no weight, so that what is left is the first one's.
                            let factor = |sq: f64| if sq >= 1e300 { 0.0 } else { clip.factor(sq, 0.7) };
                            let (sum, _) = grad.clipped_sum(&[0.0, 1e300], &factor).unwrap();
                            let share = norm(&sum.to_f64()) / clip.sensitivity(0.7);
                            assert!(share <= 1.0 + ROUNDING, "{name} [{d}, {p}], rows of norm {k:e}, δ {delta}, {clip:?}: {share}");
                            most = most.max(share);
                        }
                    }
                }
            }
        }
        assert!(most > 0.95, "at most {most} of the bound");
    }
}

/// Many records that all point the same way, which is where roundings of the sum add up: one more moves it by what it should.
#[test]
fn sums_over_many_records_keep_the_bound() {
    let (records, t, d, p) = (4096, 3, 24, 40);
    let mut rng = Rng::new(5);
    let one = cancelling(&mut rng, (t, d, p), 1.0, 1.0);
    let all: Vec<&(Vec<f64>, Vec<f64>)> = vec![&one; records];
    for style in [ClipStyle::AllLayer, ClipStyle::LayerWise] {
        let sum = |n: usize| sum_of(&Device::Cpu, &all[..n], (t, d, p), (&style, ClipFn::Abadi, 0.1), DType::F32);
        let moved: Vec<f64> = sum(records).iter().zip(sum(records - 1)).map(|(a, b)| a - b).collect();
        let share = norm(&moved) / 0.1;
        assert!(share <= 1.0 + 1e-3, "{style:?}: {share} of the bound");
    }
}

/// Processors' bf16 products take denormal numbers for zeros. A record whose terms cancel only if they are not zeros must not pass with the
/// small norm of one sum and be added with the large norm of another: few rows beside many, scattered rows, and two uses.
#[test]
fn denormal_numbers_are_the_same_in_norms_and_sums() {
    let (tiny, huge) = (2f64.powi(-127), 2f64.powi(127));
    for (own, other, uses) in [(2, 100, 1), (40, 8, 1), (2, 100, 2), (40, 40, 2)] {
        for scattered in [false, true] {
            // Of the record that is looked at half the rows are a denormal number times a huge one, and the other half cancel them.
            let mut owners = vec![0u32; own];
            owners.extend(vec![1; other]);
            if scattered {
                owners.rotate_left(own / 2);
            }
            let mut seen = 0;
            let rows: Vec<(f64, f64)> = owners
                .iter()
                .map(|&o| {
                    seen += (o == 0) as usize;
                    match (o, seen % 2) {
                        (0, 1) => (tiny, huge),
                        (0, _) => (2.0 * tiny, -0.5 * huge),
                        _ => (0.5, 0.25),
                    }
                })
                .collect();
            let column = |f: &dyn Fn(&(f64, f64)) -> f64| {
                let x: Vec<f64> = rows.iter().map(f).collect();
                Array::from_slice(&x, &[rows.len(), 1]).unwrap().cast(DType::BF16)
            };
            let samples = Samples::owners(owners, 2).unwrap();
            let mut grad = ParamGrad::new(Param::new("w", Array::zeros(&[1, 1], DType::F32)), 2);
            for _ in 0..uses {
                let (left, right) = (column(&|r| r.0), column(&|r| r.1));
                grad.push(Factor::Outer { left, right, samples: samples.clone() }).unwrap();
            }
            let factor = |sq: f64| if sq >= 1e300 { 0.0 } else { ClipFn::Abadi.factor(sq, 1e-2) };
            let (sum, totals) = grad.clipped_sum(&[0.0, 1e300], &factor).unwrap();
            let share = norm(&sum.to_f64()) / 1e-2;
            assert!(
                share <= 1.0 + ROUNDING,
                "{own} rows beside {other}, {uses} uses, scattered {scattered}: {share} of the bound, {totals:?}"
            );
        }
    }
}

/// A record whose activations are infinite is left out of the sum, and moves no bit of the others' gradients on the way: they go through
/// the same products, in the same batch.
#[test]
fn an_infinite_record_moves_no_other() {
    let (b, t, d) = (3, 40, 256);
    let param = |name: &str, shape: &[usize], seed: usize| {
        Param::new(name, Array::generate(shape, DType::F32, |i| 0.1 * ((i * 7 + seed) as f64).sin()))
    };
    let params = [param("qkv", &[3 * d, d], 1), param("mlp", &[d, d], 2), param("bias", &[d], 3)];
    for dtype in [DType::F32, DType::BF16] {
        for style in [ClipStyle::LayerWise, ClipStyle::AllLayer] {
            let sum = |overflow: f64| {
                let x = Array::generate(&[b, t, d], DType::F32, |i| {
                    if i == t * d + 17 { overflow } else { (i as f64 * 0.37).cos() }
                });
                let x = Tensor::new(x.cast(dtype));
                let qkv = linear(&x, &params[0], Layout::OutIn, None, Activation::None, None).unwrap();
                let qkv = qkv.reshape(&[b, t, 3, 2, d / 2]).unwrap();
                let y = attention_qkv(&qkv, &AttentionOptions::new(Span::Causal)).unwrap().reshape(&[b, t, d]).unwrap();
                let y = linear(&y, &params[1], Layout::OutIn, Some(&params[2]), Activation::Gelu, None).unwrap();
                // The second record's loss is 0 times what it is.
                let mine = Array::from_slice(&[1.0f32, 0.0, 1.0], &[b, 1, 1]).unwrap().cast(dtype);
                let losses = y.mul(&Tensor::new(mine)).unwrap().sum(&[1, 2], false).unwrap();
                clipped_gradient(&losses, &params, &style, ClipFn::Abadi, 1.0).unwrap()
            };
            let quiet = sum(0.5);
            for overflow in [f64::INFINITY, f64::NAN] {
                for (a, b) in quiet.iter().zip(sum(overflow)) {
                    assert!(a.to_f64().iter().any(|x| *x != 0.0));
                    let (a, b) = (a.to_f64(), b.to_f64());
                    let moved = norm(&a.iter().zip(&b).map(|(a, b)| a - b).collect::<Vec<_>>());
                    // All-layer sums in f32 leave out rows of weight zero, and so add up the others in other stretches.
                    let rounding = if (dtype, &style) == (DType::F32, &ClipStyle::AllLayer) { 1e-6 } else { 0.0 };
                    assert!(moved <= rounding, "{dtype} {style:?} {overflow}: moved by {moved:e}");
                }
            }
        }
    }
}
