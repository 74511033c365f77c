//! Clipping groups, thresholds, public data in private steps, neighbouring relations: on every device where it can run.

mod common {
    pub mod distance;
    pub mod gpt;
    pub mod records;
    pub mod scratch;
}

use common::distance::distance;
use common::records::losses;
use common::scratch::Scratch;
use prismgrad::device_tests;
use prismgrad::models::Gpt;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::coupling::Mixture;
use prismgrad::privacy::{Accountant, ClipFn, ClipStyle, Neighbouring, Public, Thresholds, Weight};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, TrainStep, clipped_gradient};
use prismgrad::{Array, DType, Device, Param, Result, Tensor};

/// Three layers, so that groups of layers differ from layers and from the whole.
fn gpt(device: &Device) -> Gpt {
    common::gpt::gpt(3, true, DType::F64, device)
}

fn flat(grads: &[Array]) -> Vec<f64> {
    grads.iter().flat_map(Array::to_f64).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn config(records: usize) -> PrivacyConfig {
    let mut c = PrivacyConfig::new(1e3, 1e-4, records, 4.0, 100);
    c.noise_multiplier = Some(1.0);
    c
}

fn key() -> NoiseKey {
    NoiseKey::from_seed_for_tests(9)
}

device_tests! {
    /// Taking any one sample away moves the clipped sum by at most the threshold, in every style; one group and a group per
    /// pattern that matches everything are the same.
    fn every_style_keeps_its_bound(device) {
        let styles = [
            ClipStyle::Uniform(1),
            ClipStyle::Uniform(2),
            ClipStyle::Uniform(5),
            ClipStyle::Named(vec!["h.0.*".into(), "*.bias".into()]),
            ClipStyle::Named(vec!["*".into()]),
        ];
        let model = gpt(device);
        let params = model.params().all();
        let sum = |ids: &[usize], style: &ClipStyle, clip: ClipFn| {
            flat(&clipped_gradient(&losses(&model, ids).unwrap(), &params, style, clip, 0.3).unwrap())
        };
        // All of it on the CPU; a device is slow under the emulator, and has to do the same.
        let (clips, styles, outs) = match device.is_cpu() {
            true => (&[ClipFn::Abadi, ClipFn::AutoV][..], &styles[..], 4),
            false => (&[ClipFn::AutoV][..], &styles[3..], 1),
        };
        for &clip in clips {
            let whole = sum(&[0, 1, 2, 3], &ClipStyle::AllLayer, clip);
            for style in styles {
                let all = sum(&[0, 1, 2, 3], style, clip);
                for out in 0..outs {
                    let kept: Vec<usize> = (0..4).filter(|&k| k != out).collect();
                    let moved: Vec<f64> = all.iter().zip(sum(&kept, style, clip)).map(|(a, b)| a - b).collect();
                    assert!(norm(&moved) <= 0.3 * (1.0 + 1e-9), "{style:?} {clip:?}: {}", norm(&moved));
                    // AUTO-V scales every group to its threshold.
                    assert!(clip == ClipFn::Abadi || norm(&moved) > 0.3 * (1.0 - 1e-9), "{style:?}: {}", norm(&moved));
                }
                if matches!(style, ClipStyle::Uniform(1)) || styles.last() == Some(style) {
                    assert!(all.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-12), "{style:?}");
                }
            }
        }
    }

    /// g = α·(clipped sum + noise)/B₁ + (1 − α)·mean of the public gradients, however it is cut into microbatches.
    fn coupled_steps_are_the_weighted_mean(device) {
        let public = [7usize, 8, 9];
        let gradient = |alpha: f64, microbatch: usize| {
            let model = gpt(device);
            let privacy = Privacy::new(config(40), key()).unwrap();
            let mut step =
                TrainStep::private(&model.params().all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
            let batch = step.next_batch().unwrap();
            let ids = batch.to_vec();
            let report = step
                .run_coupled(batch, Public(public.to_vec()), Weight::private(alpha).unwrap(), microbatch, |p, q| {
                    losses(&model, &[p, q].concat())
                })
                .unwrap();
            (step.last_gradient().to_f64(), ids, report, step.privacy().unwrap().steps())
        };
        let (private, ids, ..) = gradient(1.0, 100);
        let (alone, _, free, spent) = gradient(0.0, 100);
        assert_eq!((spent, free.epsilon), (0, Some(0.0)), "a step without private data costs nothing");
        assert!(!ids.is_empty() && ids.len() != 4, "a batch whose size is not the expected one: {ids:?}");
        // The private half is that of an ordinary private step; the public one that of a plain step.
        let model = gpt(device);
        let params = model.params().all();
        let privacy = Privacy::new(config(40), key()).unwrap();
        let mut step = TrainStep::private(&params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
        step.run([&ids[..]], |ids| losses(&model, ids)).unwrap();
        let close = |a: &[f64], b: &[f64], what: &str| {
            let off = distance(a, b);
            assert!(off < 1e-9, "{what}: {off:e}");
        };
        close(&private, &step.last_gradient().to_f64(), "private");
        let model = gpt(device);
        let mut step = TrainStep::plain(&model.params().all(), Sgd::default(), Schedule::constant(0.1)).unwrap();
        step.run([&public[..]], |ids| losses(&model, ids)).unwrap();
        close(&alone, &step.last_gradient().to_f64(), "public");
        for (alpha, microbatch) in [(0.25, 100), (0.25, 3), (0.8, 1)] {
            let (mixed, _, report, spent) = gradient(alpha, microbatch);
            let want: Vec<f64> = private.iter().zip(&alone).map(|(a, b)| alpha * a + (1.0 - alpha) * b).collect();
            close(&mixed, &want, &format!("α = {alpha}"));
            assert_eq!((spent, report.samples), (1, ids.len() + 3));
            assert!(report.loss().unwrap().is_finite());
        }
    }
}

#[test]
fn what_cannot_be_coupled_says_so() {
    let model = gpt(&Device::Cpu);
    let params = model.params().all();
    let make = || {
        let privacy = Privacy::new(config(40), key()).unwrap();
        TrainStep::private(&params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap()
    };
    let half = || Weight::private(0.5).unwrap();
    let go = |step: &mut TrainStep, public: Vec<usize>, cut: usize, micro: usize| {
        let batch = make().next_batch().unwrap();
        let run = |p: &[usize], q: &[usize]| losses(&model, &[p, q].concat()[cut..]);
        step.run_coupled(batch, Public(public), half(), micro, run).err().unwrap().to_string()
    };
    let mut plain = TrainStep::plain(&params, Sgd::default(), Schedule::constant(0.1)).unwrap();
    assert!(go(&mut plain, vec![1], 0, 4).contains("TrainStep::private"));
    assert!(go(&mut make(), vec![], 0, 4).contains("no public samples"));
    assert!(go(&mut make(), vec![1], 0, 0).contains("microbatches of 0"));
    assert!(go(&mut make(), vec![1, 2], 1, 100).contains("losses for"));
    assert!(Weight::private(1.5).is_err() && Weight::public(f64::NAN).is_err());
}

/// A public sample that is not finite is left out; it cannot spoil the private sum.
#[test]
fn a_public_sample_that_is_not_finite_is_left_out() {
    let w = Param::new("w", Array::zeros(&[1, 3], DType::F64));
    let privacy = Privacy::new(config(40), key()).unwrap();
    let mut step =
        TrainStep::private(std::slice::from_ref(&w), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
    let batch = step.next_batch().unwrap();
    let weight = Weight::private(0.5).unwrap();
    step.run_coupled(batch, Public(vec![f64::NAN, 1.0]), weight, 64, |p, q| {
        let rows: Vec<f64> = p.iter().map(|&k| k as f64).chain(q.iter().copied()).flat_map(|x| [x, 1.0, 0.5]).collect();
        let x = Tensor::new(Array::from_slice(&rows, &[p.len() + q.len(), 3])?);
        linear(&x, &w, Layout::OutIn, None, Activation::None, None)?.sum(&[1], false)
    })
    .unwrap();
    assert!(w.value().to_f64().iter().all(|x| x.is_finite()));
}

/// Formulas of the mixing weight: the measured case, its limits, and both papers' conventions.
#[test]
fn the_best_weight() {
    // Softmax regression on digits at 0 and at 20 public steps, σ = 3, B₁ = 64, B₀ = 16.
    for (clip, trace_h_sigma, trace_h, want) in
        [(0.27450544, 9.9570429, 13.504309, 0.1951), (0.38830773, 5.7931038, 11.857938, 0.2202)]
    {
        let q = Mixture { clip, trace_h_sigma, trace_h, noise: 3.0, private_batch: 64.0, public_batch: 16.0 };
        let best = Weight::best(&q).unwrap();
        assert!((best.of_public() - want).abs() < 1e-4, "{} against {want}", best.of_public());
        assert!((best.of_private() + best.of_public() - 1.0).abs() < 1e-15);
        let noisier = Weight::best(&Mixture { noise: 30.0, ..q }).unwrap();
        assert!(noisier.of_public() > best.of_public() && noisier.of_public() < 1.0);
    }
    let (a, b) = (Weight::public(1.0).unwrap(), Weight::private(1.0).unwrap());
    let at = |t: u64| Weight::linear(a, b, t, 5).of_private();
    assert_eq!([at(0), at(2), at(4), at(9)], [0.0, 0.5, 1.0, 1.0]);
    let none =
        Mixture { clip: 0.0, trace_h_sigma: 1.0, trace_h: 1.0, noise: 1.0, private_batch: 1.0, public_batch: 1.0 };
    assert!(Weight::best(&none).is_err());
}

/// Weighted thresholds compose to the same sensitivity, and the bound of each group is its own.
#[test]
fn weighted_thresholds() {
    let model = gpt(&Device::Cpu);
    let mut c = config(40);
    c.style = ClipStyle::Uniform(2);
    c.thresholds = Thresholds::Weighted(vec![3.0, 4.0]);
    c.threshold = 10.0;
    let privacy = Privacy::new(c.clone(), key()).unwrap();
    let step = TrainStep::private(&model.params().all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
    let p = step.privacy().unwrap();
    assert!(p.thresholds().iter().zip([6.0, 8.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{:?}", p.thresholds());
    assert!((p.sensitivity() - 10.0).abs() < 1e-12);
    c.thresholds = Thresholds::Weighted(vec![1.0]);
    let privacy = Privacy::new(c, key()).unwrap();
    let e = TrainStep::private(&model.params().all(), privacy, Sgd::default(), Schedule::constant(0.1));
    assert!(e.err().unwrap().to_string().contains("2 clipping groups"));
}

/// Adaptive thresholds find the quantile, cost what they are said to, and are the same after a resume.
#[test]
fn adaptive_thresholds_find_the_quantile() {
    // One parameter; sample k has a gradient of norm k + 1, k below 100.
    let make = |w: &Param| {
        let mut c = PrivacyConfig::new(1e3, 1e-4, 100, 50.0, 400);
        c.noise_multiplier = Some(0.5);
        (c.style, c.clip) = (ClipStyle::AllLayer, ClipFn::Abadi);
        c.thresholds = Thresholds::Adaptive { quantile: 0.6, rate: 0.2, noise: 0.05 };
        let p = Privacy::new(c, key()).unwrap();
        TrainStep::private(std::slice::from_ref(w), p, Sgd::default(), Schedule::constant(1e-9)).unwrap()
    };
    let new = || Param::new("w", Array::zeros(&[1], DType::F64));
    let run = |step: &mut TrainStep, w: &Param, steps: u64| {
        for _ in 0..steps {
            let batch = step.next_batch().unwrap();
            step.run([&batch[..]], |ids| {
                let x: Vec<f64> = ids.iter().map(|&k| k as f64 + 1.0).collect();
                let x = Tensor::new(Array::from_slice(&x, &[x.len()])?);
                x.mul(&w.per_sample(ids.len())?.reshape(&[ids.len()])?)
            })
            .unwrap();
        }
    };
    let w = new();
    let mut step = make(&w);
    let p = step.privacy().unwrap();
    // z⁻² = σ⁻² − M/(2·noise·B)².
    let z = (0.5f64.powi(-2) - 1.0 / (2.0 * 0.05 * 50.0f64).powi(2)).powf(-0.5);
    assert!((p.gradient_noise_multiplier() - z).abs() < 1e-12 && z > 0.5);
    run(&mut step, &w, 100);
    let r = step.privacy().unwrap().thresholds()[0];
    assert!((50.0..70.0).contains(&r), "the 0.6 quantile of 1..100 is 60, found {r}");
    assert!((step.privacy().unwrap().sensitivity() - r).abs() < 1e-12, "sensitivity follows");
    let state: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
    run(&mut step, &w, 5);
    let other = new();
    let mut resumed = make(&other);
    resumed.restore(100, &state).unwrap();
    run(&mut resumed, &other, 5);
    assert_eq!(resumed.privacy().unwrap().thresholds(), step.privacy().unwrap().thresholds());
    // Too little noise for the counts is refused: they alone would cost more than the whole.
    let mut c = PrivacyConfig::new(1e3, 1e-4, 100, 50.0, 400);
    c.noise_multiplier = Some(10.0);
    c.clip = ClipFn::Abadi;
    c.thresholds = Thresholds::Adaptive { quantile: 0.5, rate: 0.2, noise: 0.05 };
    let p = Privacy::new(c.clone(), key()).unwrap();
    let e = TrainStep::private(&[new()], p, Sgd::default(), Schedule::constant(0.1)).err().unwrap().to_string();
    assert!(e.contains("counts"), "{e}");
    c.clip = ClipFn::Reparameterised;
    assert!(Privacy::new(c, key()).err().unwrap().to_string().contains("Abadi"));
}

/// Replacing a record costs more than adding one; setting it to zero the same.
#[test]
fn neighbouring_relations_reach_the_noise() {
    let sigma = |n: Neighbouring| {
        let mut c = PrivacyConfig::new(3.0, 1e-5, 10_000, 100.0, 200);
        c.neighbouring = n;
        let p = Privacy::new(c, key()).unwrap();
        let e = p.epsilon(200).unwrap();
        assert!(e <= 3.0 && e > 2.99, "{n:?}: {e}");
        p.noise_multiplier()
    };
    let (add, zero, replace) =
        (sigma(Neighbouring::AddRemove), sigma(Neighbouring::ZeroOut), sigma(Neighbouring::ReplaceOne));
    assert_eq!(add, zero);
    assert!(replace > add, "{replace} {add}");
    let mut a = Accountant::under(Neighbouring::ZeroOut);
    a.record(1.0, 0.01, 1000).unwrap();
    assert!((a.epsilon(1e-5).unwrap() - 1.82824).abs() < 1e-3);
}

/// AdamW, too, takes coupled steps; public-only steps spend nothing and private ones what they cost, across a resume.
#[test]
fn only_private_steps_are_counted() {
    let model = gpt(&Device::Cpu);
    let params = model.params().all();
    let make = || {
        let privacy = Privacy::new(config(40), key()).unwrap();
        TrainStep::private(&params, privacy, AdamW::default(), Schedule::constant(1e-3)).unwrap()
    };
    let mut step = make();
    let go = |step: &mut TrainStep, alpha: f64| {
        let batch = step.next_batch().unwrap();
        let weight = Weight::private(alpha).unwrap();
        step.run_coupled(batch, Public(vec![5, 6]), weight, 8, |p, q| losses(&model, &[p, q].concat())).unwrap()
    };
    let spent: Vec<f64> = [0.0, 0.0, 0.5, 0.0, 1.0].iter().map(|&a| go(&mut step, a).epsilon.unwrap()).collect();
    assert!(spent[1] == 0.0 && spent[2] > 0.0 && spent[3] == spent[2] && spent[4] >= spent[2], "{spent:?}");
    assert_eq!((step.steps(), step.privacy().unwrap().steps()), (5, 2));
    let state: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
    let mut resumed = make();
    resumed.restore(5, &state).unwrap();
    assert_eq!(resumed.privacy().unwrap().steps(), 2);
}

/// Every private step is on disk before it is taken: ε after a kill is never below the truth, a repeated step counts once, one that
/// would reuse noise over other parameters is refused, one under another key is another release, a damaged log is refused.
#[test]
fn the_log_of_steps_outlives_a_kill() {
    let folder = Scratch::new("log");
    let path = folder.join("log.jsonl");
    let start = |from: &[f64]| Param::new("w", Array::from_slice(from, &[3]).unwrap());
    let make_from = |w: &Param, seed: u64, sigma: f64| -> Result<TrainStep> {
        let mut c = config(40);
        c.noise_multiplier = Some(sigma);
        let p = Privacy::new(c, NoiseKey::from_seed_for_tests(seed))?.log_to(&path)?;
        TrainStep::private(std::slice::from_ref(w), p, Sgd::default(), Schedule::constant(0.1))
    };
    let make = |seed: u64, sigma: f64| make_from(&start(&[0.0; 3]), seed, sigma);
    let none: [(); 0] = [];
    let go = |step: &mut TrainStep| step.run(none, |_| unreachable!()).unwrap().epsilon.unwrap();
    let w = start(&[0.0; 3]);
    let mut first = make_from(&w, 1, 1.0).unwrap();
    let (mut spent, mut saved) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        saved.push(w.value().to_f64());
        spent.push(go(&mut first));
    }
    drop(first);
    // A new process from a checkpoint after two steps: five are spent all the same, and stay spent as they are repeated.
    let w = start(&[9.0; 3]);
    let mut again = make_from(&w, 1, 1.0).unwrap();
    // As loading a checkpoint does: after the step was made.
    w.set(Array::from_slice(&saved[2], &[3]).unwrap()).unwrap();
    again.restore(2, &[]).unwrap();
    let p = again.privacy().unwrap();
    assert_eq!((again.steps(), p.steps(), p.spent().unwrap()), (2, 5, spent[4]));
    for _ in 0..3 {
        assert_eq!(go(&mut again), spent[4], "the same steps again");
    }
    assert!(go(&mut again) >= spent[4] && again.privacy().unwrap().steps() == 6);
    // The same noise over other parameters would cancel in the difference.
    let mut elsewhere = make_from(&start(&[7.0; 3]), 1, 1.0).unwrap();
    elsewhere.restore(2, &[]).unwrap();
    let e = elsewhere.run(none, |_| unreachable!()).err().unwrap().to_string();
    assert!(e.contains("step 2") && e.contains("the same noise"), "{e}");
    drop(elsewhere);
    drop(again);
    // Cut off in the middle of a line: that step was never taken.
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 6);
    std::fs::write(&path, &text[..text.len() - 9]).unwrap();
    let torn = make(1, 1.0).unwrap();
    assert_eq!(torn.privacy().unwrap().steps(), 5);
    drop(torn);
    let mut other = make(2, 2.0).unwrap();
    let before = other.privacy().unwrap().spent().unwrap();
    assert!((before - spent[4]).abs() < 1e-3 * before, "{before} {}", spent[4]);
    let after = go(&mut other);
    let mut truth = Accountant::new();
    truth.record(1.0, 0.1, 5).unwrap();
    truth.record(2.0, 0.1, 1).unwrap();
    assert!((after - truth.epsilon(1e-4).unwrap()).abs() < 1e-9 && after > before);
    drop(other);
    std::fs::write(&path, "{\"step\": 0}\n").unwrap();
    let e = make(1, 1.0).err().unwrap().to_string();
    assert!(e.contains("line 1") && e.contains("under-report"), "{e}");
    assert!(Privacy::new(config(40), key()).unwrap().log_to("/no/such/folder/log").is_err());
}

/// Released = (clipped sum + noise)/expected batch, whatever the batch's size: the noise follows the normal law with the
/// standard deviation that the sensitivity asks for (Kolmogorov and Smirnov), and the sum is divided by what was expected.
#[test]
fn the_released_gradient_is_sum_plus_noise_over_the_expected_batch() {
    let make = |w: &Param| {
        let mut c = PrivacyConfig::new(1e3, 1e-4, 400, 8.0, 100);
        (c.noise_multiplier, c.threshold, c.clip) = (Some(1.5), 0.6, ClipFn::Abadi);
        c.style = ClipStyle::AllLayer;
        let p = Privacy::new(c, key()).unwrap();
        TrainStep::private(std::slice::from_ref(w), p, Sgd::default(), Schedule::constant(0.1)).unwrap()
    };
    const N: usize = 20_000;
    let w = Param::new("w", Array::zeros(&[N], DType::F64));
    let none: [(); 0] = [];
    let mut idle = make(&w);
    idle.run(none, |_| unreachable!()).unwrap();
    let noise: Vec<f64> = idle.last_gradient().to_f64().iter().map(|g| g * 8.0).collect();
    let std = 1.5 * 0.6;
    let mut sorted: Vec<f64> = noise.iter().map(|x| x / std).collect();
    sorted.sort_by(f64::total_cmp);
    let cdf = |x: f64| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
    let d = sorted.iter().enumerate().map(|(i, x)| (cdf(*x) - (i as f64 + 0.5) / N as f64).abs()).fold(0.0, f64::max);
    // The 99.9 % point of the Kolmogorov distribution; noise a tenth too small would be at 0.023.
    assert!(d < 1.95 / (N as f64).sqrt(), "{d}");
    for size in [1, 3, 25] {
        let w = Param::new("w", Array::zeros(&[N], DType::F64));
        let rows = Array::generate(&[size, N], DType::F64, |i| if i % 7 == 0 { (i as f64).sin() } else { 0.0 });
        let forward = || Tensor::new(rows.clone()).mul(&w.per_sample(size)?)?.sum(&[1], false);
        let params = std::slice::from_ref(&w);
        let sum = clipped_gradient(&forward().unwrap(), params, &ClipStyle::AllLayer, ClipFn::Abadi, 0.6).unwrap();
        let mut step = make(&w);
        step.run([()], |_| forward()).unwrap();
        let got = step.last_gradient().to_f64();
        let off = got.iter().zip(&noise).zip(sum[0].to_f64()).map(|((g, n), s)| (g - (s + n) / 8.0).abs());
        assert!(off.fold(0.0, f64::max) < 1e-12, "a batch of {size}");
    }
}
