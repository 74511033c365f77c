//! Clipping groups, thresholds, public data in private steps, neighbouring relations: on every device where it can run.

use crate::common::distance::distance;
use crate::common::records::losses;
use prismgrad::device_tests;
use prismgrad::models::Gpt;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::optim::{Optimizer, Schedule, Sgd};
use prismgrad::privacy::coupling::Mixture;
use prismgrad::privacy::{Accountant, ClipFn, ClipStyle, Neighbouring, Public, Thresholds, Weight};
use prismgrad::random::{Grid, NoiseKey};
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep, clipped_gradient};
use prismgrad::{Array, DType, Device, Param, Tensor};

/// Three layers, so that groups of layers differ from layers and from the whole.
fn gpt(device: &Device) -> Gpt {
    crate::common::gpt::gpt(3, true, DType::F64, device)
}

fn flat(grads: &[Array]) -> Vec<f64> {
    grads.iter().flat_map(Array::to_f64).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn config(records: usize) -> PrivacyConfig {
    PrivacyConfig::target(1e3, 1e-4).records(records).expected_batch(4.0).steps(100).noise_multiplier(1.0)
}

fn private(params: &[Param], config: PrivacyConfig, optimizer: impl Optimizer + 'static) -> PrivateStep {
    PrivateStep::new(params, Privacy::new(config, key()).unwrap(), optimizer, Schedule::constant(0.1)).unwrap()
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

    /// Releases of the same step under the same key that differ in anything carry noise that has nothing in common; the same release
    /// has the same bits, and its values lie on the grid of its noise.
    fn no_two_releases_share_noise(device) {
        const N: usize = 4096;
        let noise = |sigma: f64, bound: f64, clip: ClipFn, from: f64, slope: f64, dtype: DType| -> Vec<f64> {
            let w = Param::new("w", Array::generate(&[N], dtype, |_| from).to(device).unwrap());
            let c = PrivacyConfig::target(1e3, 1e-4).records(40).expected_batch(8.0).steps(100).noise_multiplier(sigma);
            let c = c.max_grad_norm(bound).clip(clip).style(ClipStyle::AllLayer);
            let privacy = Privacy::new(c, NoiseKey::from_bytes([5; 32])).unwrap();
            let params = std::slice::from_ref(&w);
            let mut step = PrivateStep::new(params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
            let mut sum = Vec::new();
            step.run(40, |ids| {
                let losses = || w.per_sample(ids.len())?.square()?.mul_scalar(slope)?.sum(&[1], false);
                sum = clipped_gradient(&losses()?, params, &ClipStyle::AllLayer, clip, bound)?[0].to_f64();
                losses()
            })
            .unwrap();
            let std = sigma * step.privacy().sensitivity();
            let released: Vec<f64> = step.last_gradient().to_f64().iter().map(|g| g * 8.0).collect();
            assert!(released.iter().all(|g| (g / Grid::of(std).step()).fract() == 0.0));
            released.iter().zip(sum).map(|(g, s)| (g - s) / std).collect()
        };
        let of = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / N as f64;
        let first = noise(1.0, 1.0, ClipFn::Abadi, 0.1, 1.0, DType::F32);
        assert!((of(&first, &first) - 1.0).abs() < 0.1, "variance {}", of(&first, &first));
        assert_eq!(first, noise(1.0, 1.0, ClipFn::Abadi, 0.1, 1.0, DType::F32), "the same release");
        for (what, other) in [
            ("another noise multiplier", noise(3.0, 1.0, ClipFn::Abadi, 0.1, 1.0, DType::F32)),
            ("another threshold", noise(1.0, 0.25, ClipFn::Abadi, 0.1, 1.0, DType::F32)),
            ("another threshold with the same noise", noise(4.0, 0.25, ClipFn::Abadi, 0.1, 1.0, DType::F32)),
            ("another clip function", noise(1.0, 1.0, ClipFn::default(), 0.1, 1.0, DType::F32)),
            ("other parameters", noise(1.0, 1.0, ClipFn::Abadi, 1e-3, 1.0, DType::F32)),
            ("another loss", noise(1.0, 1.0, ClipFn::Abadi, 0.1, -1.0, DType::F32)),
            ("another dtype", noise(1.0, 1.0, ClipFn::Abadi, 0.1, 1.0, DType::F64)),
        ] {
            let rho = of(&first, &other);
            assert!(rho.abs() < 4.5 / (N as f64).sqrt(), "{what}: correlation {rho}");
        }
    }

    /// A clipping group closes with the members that were reached: of a layer whose bias takes no part in the losses, the weight is
    /// clipped by its own norm.
    fn a_group_that_is_reached_in_part_keeps_its_gradient(device) {
        let param = |name: &str, n: usize| Param::new(name, Array::zeros(&[1, n], DType::F64).to(device).unwrap());
        let params = [param("a.weight", 3), param("a.bias", 2), param("b.weight", 3), param("b.bias", 1)];
        let rows: [[f64; 3]; 2] = [[0.3, -0.4, 0.0], [1.0, 2.0, -2.0]];
        let x = Array::from_slice(&rows.concat(), &[2, 3]).unwrap().to(device).unwrap();
        let of = |w: &Param, scale: f64| {
            let y = linear(&Tensor::new(x.clone()), w, Layout::OutIn, None, Activation::None, None)?;
            y.mul_scalar(scale)?.sum(&[1], false)
        };
        let losses = of(&params[0], 1.0).unwrap().add(&of(&params[2], 0.1).unwrap()).unwrap();
        let sums = clipped_gradient(&losses, &params, &ClipStyle::LayerWise, ClipFn::Abadi, 1.0).unwrap();
        // Two groups, of 1/√2 each; the norms of the rows are ½ and 3.
        let clipped = |scale: f64| -> Vec<f64> {
            let factor = |n: f64| (0.5f64.sqrt() / (scale * n)).min(1.0) * scale;
            (0..3).map(|i| factor(0.5) * rows[0][i] + factor(3.0) * rows[1][i]).collect()
        };
        for (sum, want) in sums.iter().zip([clipped(1.0), vec![0.0; 2], clipped(0.1), vec![0.0]]) {
            assert!(distance(&sum.to_f64(), &want) < 1e-12, "{sum:?}, not {want:?}");
        }
    }

    /// Sums that are equal, as two empty batches' are, carry noise at two steps that has nothing in common, whatever the key.
    fn steps_with_equal_sums_have_noise_of_their_own(device) {
        const N: usize = 4096;
        for key in [NoiseKey::from_bytes([6; 32]), key()] {
            let w = Param::new("w", Array::zeros(&[N], DType::F32).to(device).unwrap());
            let params = std::slice::from_ref(&w);
            let privacy = Privacy::new(config(40), key).unwrap();
            let mut step = PrivateStep::new(params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
            let noise: Vec<Vec<f64>> = (0..3)
                .map(|_| {
                    step.run(40, |ids| w.per_sample(ids.len())?.mul_scalar(0.0)?.sum(&[1], false)).unwrap();
                    step.last_gradient().to_f64().iter().map(|g| g * 4.0).collect()
                })
                .collect();
            let of = |a: usize, b: usize| noise[a].iter().zip(&noise[b]).map(|(a, b)| a * b).sum::<f64>() / N as f64;
            for i in 0..3 {
                assert!((of(i, i) - 1.0).abs() < 0.1, "variance {}", of(i, i));
                (0..i).for_each(|j| assert!(of(i, j).abs() < 4.5 / (N as f64).sqrt(), "correlation {}", of(i, j)));
            }
        }
    }

    /// A sum that is exact on every device has the same noise on every device: the digest and the key that follows from it are the
    /// same. Its length is no multiple of a chunk of the digest, and it takes two levels.
    fn an_exact_sum_has_the_same_release_everywhere(device) {
        for n in [7, 2048, 5001] {
            let released = |device: &Device| {
                let w = Param::new("w", Array::zeros(&[n], DType::F32).to(device).unwrap());
                let c = config(40).expected_batch(40.0).clip(ClipFn::Global).max_grad_norm(1e4);
                let privacy = Privacy::new(c, NoiseKey::from_bytes([5; 32])).unwrap();
                let params = std::slice::from_ref(&w);
                let mut step = PrivateStep::new(params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
                step.run(40, |ids| {
                    let rows = Array::generate(&[ids.len(), n], DType::F32, |i| ((ids[i / n] + i % n) % 5) as f64);
                    w.per_sample(ids.len())?.mul(&Tensor::new(rows.to(device)?))?.sum(&[1], false)
                })
                .unwrap();
                step.last_gradient().to_f64()
            };
            assert_eq!(released(device), released(&Device::Cpu), "{n}");
        }
    }

    /// g = α·(clipped sum + noise)/B₁ + (1 − α)·mean of the public gradients, however it is cut into microbatches.
    fn coupled_steps_are_the_weighted_mean(device) {
        let public = [7usize, 8, 9];
        let gradient = |alpha: f64, microbatch: usize| {
            let model = gpt(device);
            let mut step = private(&model.params().all(), config(40), Sgd::default());
            let mut ids = Vec::new();
            let report = step
                .run_coupled(microbatch, Public(public.to_vec()), Weight::private(alpha).unwrap(), |p, q| {
                    ids = p.to_vec(); // of the last call, the whole batch where the microbatch is large
                    losses(&model, &[p, q].concat())
                })
                .unwrap();
            (step.last_gradient().to_f64(), ids, report, step.privacy().steps())
        };
        let (clipped, ids, ..) = gradient(1.0, 100);
        let (alone, _, free, spent) = gradient(0.0, 100);
        assert_eq!((spent, free.epsilon), (0, 0.0), "a step without private data costs nothing");
        assert!(!ids.is_empty() && ids.len() != 4, "a batch whose size is not the expected one: {ids:?}");
        // The private half is that of an ordinary private step; the public one that of a plain step.
        let model = gpt(device);
        let mut step = private(&model.params().all(), config(40), Sgd::default());
        let mut last = Vec::new();
        step.run(100, |drawn| {
            last = drawn.to_vec();
            losses(&model, drawn)
        })
        .unwrap();
        assert_eq!(last, ids);
        let close = |a: &[f64], b: &[f64], what: &str| {
            let off = distance(a, b);
            assert!(off < 1e-9, "{what}: {off:e}");
        };
        // Private sums are rounded to the grid of their noise, and this divided by the expected batch.
        let grid = Grid::of(1.0).step() / 4.0;
        close(&clipped, &step.last_gradient().to_f64(), "private");
        let model = gpt(device);
        let mut step = PlainStep::new(&model.params().all(), Sgd::default(), Schedule::constant(0.1)).unwrap();
        step.run_one(|| losses(&model, &public)).unwrap();
        close(&alone, &step.last_gradient().to_f64(), "public");
        for (alpha, microbatch) in [(0.25, 100), (0.25, 3), (0.8, 1)] {
            let (mixed, _, report, spent) = gradient(alpha, microbatch);
            let want: Vec<f64> = clipped.iter().zip(&alone).map(|(a, b)| alpha * a + (1.0 - alpha) * b).collect();
            assert!(distance(&mixed, &want) <= grid * (1.0 + 1e-6), "α = {alpha}: {:e}", distance(&mixed, &want));
            assert_eq!((spent, report.samples), (1, ids.len() + 3));
            assert!(report.loss().unwrap().is_finite());
        }
    }
}

#[test]
fn what_cannot_be_coupled_says_so() {
    let model = gpt(&Device::Cpu);
    let params = model.params().all();
    let go = |public: Vec<usize>, cut: usize, micro: usize| {
        let mut step = private(&params, config(40), Sgd::default());
        let run = |p: &[usize], q: &[usize]| losses(&model, &[p, q].concat()[cut..]);
        step.run_coupled(micro, Public(public), Weight::private(0.5).unwrap(), run).err().unwrap().to_string()
    };
    assert!(go(vec![], 0, 4).contains("no public samples"));
    assert!(go(vec![1], 0, 0).contains("physical batch of 0"));
    assert!(go(vec![1, 2], 1, 100).contains("one loss for each"));
    assert!(Weight::private(1.5).is_err() && Weight::public(f64::NAN).is_err());
}

/// A public sample that is not finite is left out; it cannot spoil the private sum.
#[test]
fn a_public_sample_that_is_not_finite_is_left_out() {
    let w = Param::new("w", Array::zeros(&[1, 3], DType::F64));
    let mut step = private(std::slice::from_ref(&w), config(40), Sgd::default());
    let weight = Weight::private(0.5).unwrap();
    step.run_coupled(64, Public(vec![f64::NAN, 1.0]), weight, |p, q| {
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
    let c = config(40).style(ClipStyle::Uniform(2)).max_grad_norm(10.0);
    let step =
        private(&model.params().all(), c.clone().thresholds(Thresholds::Weighted(vec![3.0, 4.0])), Sgd::default());
    let p = step.privacy();
    assert!(p.thresholds().iter().zip([6.0, 8.0]).all(|(a, b)| (a - b).abs() < 1e-12), "{:?}", p.thresholds());
    assert!((p.sensitivity() - 10.0).abs() < 1e-12);
    let privacy = Privacy::new(c.thresholds(Thresholds::Weighted(vec![1.0])), key()).unwrap();
    let e = PrivateStep::new(&model.params().all(), privacy, Sgd::default(), Schedule::constant(0.1));
    assert!(e.err().unwrap().to_string().contains("2 clipping groups"));
}

/// Adaptive thresholds find the quantile, cost what they are said to, and are the same after a resume.
#[test]
fn adaptive_thresholds_find_the_quantile() {
    // One parameter; sample k has a gradient of norm k + 1, k below 100.
    let base = PrivacyConfig::target(1e3, 1e-4).records(100).expected_batch(50.0).steps(400).clip(ClipFn::Abadi);
    let make = |w: &Param| {
        let c = base.clone().noise_multiplier(0.5).style(ClipStyle::AllLayer);
        let c = c.thresholds(Thresholds::Adaptive { quantile: 0.6, rate: 0.2, noise: 0.05 });
        let p = Privacy::new(c, key()).unwrap();
        PrivateStep::new(std::slice::from_ref(w), p, Sgd::default(), Schedule::constant(1e-9)).unwrap()
    };
    let new = || Param::new("w", Array::zeros(&[1], DType::F64));
    let run = |step: &mut PrivateStep, w: &Param, steps: u64| {
        for _ in 0..steps {
            step.run(100, |ids| {
                let x: Vec<f64> = ids.iter().map(|&k| k as f64 + 1.0).collect();
                let x = Tensor::new(Array::from_slice(&x, &[x.len()])?);
                x.mul(&w.per_sample(ids.len())?.reshape(&[ids.len()])?)
            })
            .unwrap();
        }
    };
    let w = new();
    let mut step = make(&w);
    let p = step.privacy();
    // z⁻² = σ⁻² − M/(2·noise·B)².
    let z = (0.5f64.powi(-2) - 1.0 / (2.0 * 0.05 * 50.0f64).powi(2)).powf(-0.5);
    assert!((p.gradient_noise_multiplier() - z).abs() < 1e-12 && z > 0.5);
    run(&mut step, &w, 100);
    let r = step.privacy().thresholds()[0];
    assert!((50.0..70.0).contains(&r), "the 0.6 quantile of 1..100 is 60, found {r}");
    assert!((step.privacy().sensitivity() - r).abs() < 1e-12, "sensitivity follows");
    let state: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
    run(&mut step, &w, 5);
    let other = new();
    let mut resumed = make(&other);
    resumed.restore(100, &state).unwrap();
    run(&mut resumed, &other, 5);
    assert_eq!(resumed.privacy().thresholds(), step.privacy().thresholds());
    // Too little noise for the counts is refused: they alone would cost more than the whole.
    let c = base.noise_multiplier(10.0).thresholds(Thresholds::Adaptive { quantile: 0.5, rate: 0.2, noise: 0.05 });
    let p = Privacy::new(c.clone(), key()).unwrap();
    let e = PrivateStep::new(&[new()], p, Sgd::default(), Schedule::constant(0.1)).err().unwrap().to_string();
    assert!(e.contains("counts"), "{e}");
    assert!(Privacy::new(c.clip(ClipFn::Reparameterised), key()).err().unwrap().to_string().contains("Abadi"));
}

/// The counts of adaptive thresholds have noise of their own: with the gradient's, whoever sees a threshold move could take it off.
#[test]
fn counts_have_noise_of_their_own() {
    let (batch, noise, quantile, rate) = (50.0, 0.5, 0.6, 0.2);
    let c = PrivacyConfig::target(1e3, 1e-4).records(100).expected_batch(batch).steps(400).clip(ClipFn::Abadi);
    let c = c.noise_multiplier(1.0).thresholds(Thresholds::Adaptive { quantile, rate, noise });
    let w = Param::new("w", Array::zeros(&[1], DType::F64));
    let p = Privacy::new(c, NoiseKey::from_bytes([4; 32])).unwrap();
    let mut step = PrivateStep::new(std::slice::from_ref(&w), p, Sgd::default(), Schedule::constant(1e-9)).unwrap();
    let (mut of_counts, mut of_gradients) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        let before = step.privacy().thresholds()[0];
        // Gradients of 0: the sum is noise alone, and every record is below the threshold.
        let loss = |ids: &[usize]| w.per_sample(ids.len())?.reshape(&[ids.len()])?.mul_scalar(0.0);
        let samples = step.run(100, loss).unwrap().samples as f64;
        let share = quantile - (step.privacy().thresholds()[0] / before).ln() / rate;
        of_counts.push(((share - 0.5) * batch - 0.5 * samples) / (noise * batch));
        of_gradients.push(step.last_gradient().to_f64()[0] * batch / before);
    }
    let mean_square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let (a, b) = (mean_square(&of_counts), mean_square(&of_gradients));
    assert!((0.5..2.0).contains(&a) && (0.5..2.0).contains(&b), "both are normal: {a}, {b}");
    let both = of_counts.iter().zip(&of_gradients).map(|(x, y)| x * y).sum::<f64>() / of_counts.len() as f64;
    // Four and a half standard deviations.
    assert!((both / (a * b).sqrt()).abs() < 0.6, "correlation {}", both / (a * b).sqrt());
}

/// Replacing a record costs more than adding one; setting it to zero the same.
#[test]
fn neighbouring_relations_reach_the_noise() {
    let sigma = |n: Neighbouring| {
        let c = PrivacyConfig::target(3.0, 1e-5).records(10_000).expected_batch(100.0).steps(200);
        let p = Privacy::new(c.neighbouring(n), key()).unwrap();
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

/// Released = (clipped sum + noise)/expected batch, whatever the batch's size: the noise follows the normal law with the
/// standard deviation that the sensitivity asks for (Kolmogorov and Smirnov), and the sum is divided by what was expected.
#[test]
fn the_released_gradient_is_sum_plus_noise_over_the_expected_batch() {
    let make = |w: &Param, records: usize, expected: f64| {
        let c = PrivacyConfig::target(1e3, 1e-4).records(records).expected_batch(expected).steps(100);
        let c = c.noise_multiplier(1.5).max_grad_norm(0.6).clip(ClipFn::Abadi).style(ClipStyle::AllLayer);
        private(std::slice::from_ref(w), c, Sgd::default())
    };
    const N: usize = 20_000;
    let w = Param::new("w", Array::zeros(&[N], DType::F64));
    let mut idle = make(&w, 400, 1e-6);
    idle.run(1, |_| unreachable!()).unwrap();
    let noise: Vec<f64> = idle.last_gradient().to_f64().iter().map(|g| g * 1e-6).collect();
    let std = 1.5 * 0.6;
    let mut sorted: Vec<f64> = noise.iter().map(|x| x / std).collect();
    sorted.sort_by(f64::total_cmp);
    let cdf = |x: f64| 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
    let d = sorted.iter().enumerate().map(|(i, x)| (cdf(*x) - (i as f64 + 0.5) / N as f64).abs()).fold(0.0, f64::max);
    // The 99.9 % point of the Kolmogorov distribution; noise a tenth too small would be at 0.023.
    assert!(d < 1.95 / (N as f64).sqrt(), "{d}");
    for records in [40, 400] {
        let w = Param::new("w", Array::zeros(&[N], DType::F64));
        let rows = |ids: &[usize]| {
            Array::generate(&[ids.len(), N], DType::F64, |i| {
                let (r, k) = (ids[i / N], i % N);
                if (r + k) % 7 == 0 { ((r * N + k) as f64).sin() } else { 0.0 }
            })
        };
        let forward = |ids: &[usize]| Tensor::new(rows(ids)).mul(&w.per_sample(ids.len())?)?.sum(&[1], false);
        let params = std::slice::from_ref(&w);
        let (mut step, mut sum, mut size) = (make(&w, records, 8.0), vec![0.0; N], 0);
        step.run(records, |ids| {
            size = ids.len();
            let one = clipped_gradient(&forward(ids)?, params, &ClipStyle::AllLayer, ClipFn::Abadi, 0.6)?;
            sum = one[0].to_f64();
            forward(ids)
        })
        .unwrap();
        assert!(size > 0 && size != 8, "a batch whose size is not the expected one: {size}");
        let got = step.last_gradient().to_f64();
        let off = got.iter().zip(&noise).zip(sum).map(|((g, n), s)| (g - (s + n) / 8.0).abs());
        // Both were rounded to the grid.
        assert!(off.fold(0.0, f64::max) <= Grid::of(std).step() / 8.0, "a batch of {size}");
        assert!(got.iter().all(|g| (g * 8.0 / Grid::of(std).step()).fract() == 0.0));
    }
}

/// One loss per record: with more, one record would move the sum several times. A step that fails leaves no sum without noise.
#[test]
fn a_record_has_one_loss_and_a_failed_step_leaves_nothing() {
    let w = Param::new("w", Array::zeros(&[3], DType::F64));
    let mut step = private(std::slice::from_ref(&w), config(40).expected_batch(40.0), Sgd::default());
    let many = |ids: &[usize]| w.per_sample(2 * ids.len())?.sum(&[1], false);
    let e = step.run(40, many).err().unwrap().to_string();
    assert!(e.contains("[80]") && e.contains("40 records") && e.contains("one loss for each"), "{e}");
    let mut first = true;
    let e = step.run(20, |ids| {
        if std::mem::take(&mut first) { w.per_sample(ids.len())?.add_scalar(1.0)?.sum(&[1], false) } else { many(ids) }
    });
    assert!(e.is_err() && step.last_gradient().to_f64() == [0.0; 3]);
    assert_eq!((step.steps(), w.value().to_f64()), (0, vec![0.0; 3]));
}

/// Every step draws a batch of its own: over many steps a record is in a tenth of the batches, and a batch has as many records in common
/// with the one before as chance says.
#[test]
fn every_step_draws_a_batch_of_its_own() {
    const STEPS: usize = 1000;
    let w = Param::new("w", Array::zeros(&[1], DType::F64));
    let mut step = private(std::slice::from_ref(&w), config(40).steps(STEPS as u64), Sgd::default());
    let (mut drawn, mut before, mut common) = ([0usize; 40], Vec::new(), 0);
    for _ in 0..STEPS {
        let mut ids = Vec::new();
        step.run(40, |records| {
            ids = records.to_vec();
            w.per_sample(records.len())?.sum(&[1], false)
        })
        .unwrap();
        ids.iter().for_each(|&i| drawn[i] += 1);
        common += ids.iter().filter(|i| before.contains(*i)).count();
        before = ids;
    }
    // Four and a half standard deviations.
    assert!(drawn.iter().all(|n| n.abs_diff(STEPS / 10) < 43), "{drawn:?}");
    assert!(common.abs_diff(STEPS * 40 / 100) < 100, "{common} records in two batches that follow each other");
}

/// Noise that f32 cannot hold would be no noise.
#[test]
fn noise_outside_the_range_of_f32_is_refused() {
    let w = Param::new("w", Array::zeros(&[3], DType::F64));
    for norm in [1e-46, 1e-31, 1e31] {
        let privacy = Privacy::new(config(40).max_grad_norm(norm), key()).unwrap();
        let e = PrivateStep::new(std::slice::from_ref(&w), privacy, Sgd::default(), Schedule::constant(0.1));
        assert!(e.err().unwrap().to_string().contains("range of f32"), "{norm}");
    }
}

/// AUTO-V divides by the norm; of a tiny gradient it makes a short one, not an infinite one.
#[test]
fn tiny_gradients_stay_finite_under_auto_v() {
    for scale in [1e-45f32, 1e-42, 1e-38, 1e-20] {
        let w = Param::new("w", Array::zeros(&[1, 3], DType::F32));
        let x = Tensor::from_slice(&[scale; 3], &[1, 3]).unwrap();
        let losses = linear(&x, &w, Layout::OutIn, None, Activation::None, None).unwrap().sum(&[1], false).unwrap();
        let params = std::slice::from_ref(&w);
        let sum = clipped_gradient(&losses, params, &ClipStyle::AllLayer, ClipFn::AutoV, 1.0).unwrap();
        assert!(norm(&flat(&sum)) <= 1.0 + 1e-6, "{scale:e}: {sum:?}");
    }
}
