//! Training steps: per-sample gradients of a whole model, clipping bounds, noise, repeatability, resuming, refusals.

use crate::common::distance::distance;
use crate::common::privacy::{empty, keyed, whole};
use crate::common::scratch::Scratch;
use crate::common::skip::skip;
use crate::common::texts::tokens_of;
use crate::common::tokens::tokens;
use crate::common::values::values;
use prismgrad::check::{self, Gen};
use prismgrad::models::Gpt;
use prismgrad::nn::Ctx;
use prismgrad::ops::embedding::embedding;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::norm::layer_norm;
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep, clipped_gradient};
use prismgrad::train::{Existing, RunFolder, state};
use prismgrad::{Array, DType, Device, Error, Param, Result, Samples, Tensor};
use proptest::prelude::*;
use std::path::Path;

fn gpt(tied: bool, dtype: DType) -> Gpt {
    crate::common::gpt::gpt(2, tied, dtype, &Device::Cpu)
}

/// Poisson batches of ten records expected.
fn private(params: &[Param], style: &ClipStyle, steps: u64) -> PrivateStep {
    let c = PrivacyConfig::target(4.0, 1e-3).records(100).expected_batch(10.0).steps(steps).style(style.clone());
    PrivateStep::new(params, keyed(c, 9), AdamW::default(), Schedule::constant(1e-2)).unwrap()
}

/// `n` records in every batch.
fn private_whole(params: &[Param], style: &ClipStyle, n: usize) -> PrivateStep {
    let p = keyed(whole(n).steps(1000).style(style.clone()), 9);
    PrivateStep::new(params, p, AdamW::default(), Schedule::constant(1e-2)).unwrap()
}

fn plain(params: &[Param]) -> PlainStep {
    PlainStep::new(params, AdamW::default(), Schedule::constant(1e-2)).unwrap()
}

static STYLES: [ClipStyle; 3] = [ClipStyle::AllLayer, ClipStyle::LayerWise, ClipStyle::ParameterWise];

#[test]
fn every_parameter_of_a_gpt_per_sample() {
    for tied in [false, true] {
        let model = gpt(tied, DType::F64);
        let (x, y) = tokens(3, 1);
        let losses = || model.losses(&x, &y, &Ctx::eval());
        let report = check::per_sample(&losses, &model.params().all(), 1, 1e-9).unwrap();
        assert!(report.worst() < 1e-9, "tied {tied}: {report:?}");
    }
}

/// A weight used twice over ragged, unsorted samples, with a bias and a per-sample gate.
fn ragged(keep: &[usize]) -> (Tensor, Vec<Param>) {
    let p =
        |n: &str, s: &[usize], k: f64| Param::new(n, Array::generate(s, DType::F64, |i| (k + i as f64 * 0.9).sin()));
    let (w, b, gate) = (p("a.weight", &[4, 4], 0.3), p("a.bias", &[4], 1.0), p("gate", &[4], 2.0));
    let owner = [0usize, 2, 1, 0, 2, 2, 3];
    let rows: Vec<usize> = (0..7).filter(|&r| keep.contains(&owner[r])).collect();
    let ids: Vec<u32> = rows.iter().map(|&r| keep.iter().position(|&k| k == owner[r]).unwrap() as u32).collect();
    let samples = Samples::owners(ids.clone(), keep.len()).unwrap();
    let x = Array::generate(&[rows.len(), 4], DType::F64, |i| (rows[i / 4] * 4 + i % 4) as f64 * 0.21 - 0.5);
    let s = Some(&samples);
    let y = linear(&Tensor::new(x), &w, Layout::OutIn, Some(&b), Activation::Tanh, s).unwrap();
    let y = linear(&y, &w, Layout::InOut, None, Activation::None, s).unwrap();
    let pick = Array::generate(&[keep.len(), rows.len()], DType::F64, |i| {
        (ids[i % rows.len()] as usize == i / rows.len()) as u8 as f64
    });
    let per = Tensor::new(pick).matmul(&y).unwrap().mul(&gate.per_sample(keep.len()).unwrap()).unwrap();
    (per.square().unwrap().sum(&[1], false).unwrap(), vec![w, b, gate])
}

#[test]
fn one_record_moves_the_clipped_sum_by_at_most_the_threshold() {
    let clips = [ClipFn::Abadi, ClipFn::AutoS { gamma: 0.01 }, ClipFn::AutoV, ClipFn::Global];
    for style in &STYLES {
        for clip in clips {
            let sum = |keep: &[usize]| -> Vec<f64> {
                let (l, p) = ragged(keep);
                clipped_gradient(&l, &p, style, clip, 0.7).unwrap().iter().flat_map(Array::to_f64).collect()
            };
            let all = sum(&[0, 1, 2, 3]);
            for without in 0..4 {
                let rest: Vec<usize> = (0..4).filter(|&i| i != without).collect();
                let moved: f64 = all.iter().zip(sum(&rest)).map(|(a, b)| (a - b) * (a - b)).sum();
                assert!(moved.sqrt() <= 0.7 * (1.0 + 1e-9), "{style:?} {clip:?} {without}: {}", moved.sqrt());
            }
        }
    }
}

/// A random model over random ragged samples (some without rows), restricted to the samples in `keep`: a lookup table
/// tied to the output or not, linear layers some of which share a weight, a norm, and a broadcast parameter.
fn random_model(seed: u64, keep: &[bool]) -> (Tensor, Vec<Param>) {
    let mut g = Gen::new(seed);
    let (d, vocabulary, rows) = (g.size(2, 6), g.size(3, 6), g.size(0, 14));
    let (tied, reused, depth) = (g.chance(0.5), g.chance(0.5), g.size(1, 3));
    let mut params: Vec<Param> = Vec::new();
    let mut make = |name: String, shape: &[usize], g: &mut Gen| {
        let p = Param::new(&name, g.array_of(shape, |g| g.normal()).contiguous());
        params.push(p.clone());
        p
    };
    let table = make("table.weight".into(), &[vocabulary, d], &mut g);
    let layers: Vec<(Param, Param)> = (0..depth)
        .map(|i| (make(format!("l{i}.weight"), &[d, d], &mut g), make(format!("l{i}.bias"), &[d], &mut g)))
        .collect();
    let (gain, gate) = (make("norm.weight".into(), &[d], &mut g), make("gate".into(), &[vocabulary], &mut g));
    let all: Vec<(usize, u32)> =
        (0..rows).map(|_| (g.size(0, keep.len() - 1), g.size(0, vocabulary - 1) as u32)).collect();
    let number = |i: usize| keep[..i].iter().filter(|k| **k).count() as u32;
    let live: Vec<(u32, u32)> = all.iter().filter(|(o, _)| keep[*o]).map(|&(o, id)| (number(o), id)).collect();
    let (owners, ids): (Vec<u32>, Vec<u32>) = live.into_iter().unzip();
    let (n, b) = (ids.len(), number(keep.len()) as usize);
    let samples = Samples::owners(owners.clone(), b).unwrap();
    let s = Some(&samples);
    let mut x = embedding(&table, Tensor::from_slice(&ids, &[n]).unwrap(), None, s).unwrap();
    for i in 0..depth {
        let (w, bias) = if reused { &layers[0] } else { &layers[i] };
        x = linear(&x, w, Layout::OutIn, Some(bias), Activation::Tanh, s).unwrap();
    }
    let x = layer_norm(&x, Some(&gain), None, 1e-5, s).unwrap();
    let x = match tied {
        true => linear(&x, &table, Layout::OutIn, None, Activation::None, s).unwrap(),
        false => linear(&x, &layers[0].0, Layout::InOut, None, Activation::Silu, s).unwrap(),
    };
    let width = x.shape()[1];
    let pick = Array::generate(&[b, n], DType::F64, |i| (owners[i % n] as usize == i / n) as u8 as f64);
    let per = Tensor::new(pick).matmul(&x.square().unwrap()).unwrap().sum(&[1], true).unwrap();
    let per = per.mul(&gate.per_sample(b).unwrap()).unwrap();
    let scale = 10f64.powi(g.size(0, 6) as i32 - 3) / width as f64;
    (per.square().unwrap().sum(&[1], false).unwrap().mul_scalar(scale).unwrap(), params)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    /// The private mechanism's promise: adding or removing any one sample moves the clipped sum by at most the stated
    /// sensitivity, whatever the model.
    #[test]
    fn any_one_sample_moves_the_sum_by_at_most_the_sensitivity(
        seed in any::<u64>(),
        samples in 1usize..5,
        style in prop::sample::select(STYLES.to_vec()),
        clip in prop::sample::select(vec![ClipFn::Abadi, ClipFn::AutoS { gamma: 0.01 }, ClipFn::AutoV, ClipFn::Global]),
        threshold in 0.01f64..10.0,
    ) {
        let sum = |keep: &[bool]| -> Vec<f64> {
            let (losses, params) = random_model(seed, keep);
            let sums = clipped_gradient(&losses, &params, &style, clip, threshold).unwrap();
            sums.iter().flat_map(Array::to_f64).collect()
        };
        let all = sum(&vec![true; samples]);
        prop_assert!(all.iter().all(|x| x.is_finite()));
        for without in 0..samples {
            let keep: Vec<bool> = (0..samples).map(|i| i != without).collect();
            let moved = all.iter().zip(sum(&keep)).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            prop_assert!(moved <= threshold * (1.0 + 1e-9), "{style:?} {clip:?} sample {without}: {moved} > {threshold}");
        }
    }
}

#[test]
fn clipped_sums_are_those_of_the_instantiated_gradients() {
    let clip = ClipFn::Abadi;
    let (losses, params) = ragged(&[0, 1, 2, 3]);
    let got = clipped_gradient(&losses, &params, &ClipStyle::AllLayer, clip, 0.4).unwrap();
    let (losses, params) = ragged(&[0, 1, 2, 3]);
    let grads = losses.backward().unwrap();
    let per: Vec<Vec<f64>> = params.iter().map(|p| grads.param(p).unwrap().per_sample().unwrap().to_f64()).collect();
    let sq = |i: usize| -> f64 {
        per.iter().map(|g| g[i * g.len() / 4..(i + 1) * g.len() / 4].iter().map(|x| x * x).sum::<f64>()).sum()
    };
    for (g, per) in got.iter().zip(&per) {
        let n = per.len() / 4;
        for (j, g) in g.to_f64().iter().enumerate() {
            let want: f64 = (0..4).map(|i| clip.factor(sq(i), 0.4) * per[i * n + j]).sum();
            assert!((g - want).abs() < 1e-10, "{g} {want}");
        }
    }
}

/// The bytes of all these parameters.
fn bits(params: &[Param]) -> Vec<u8> {
    params.iter().flat_map(|p| p.value().to_bytes()).collect()
}

#[test]
fn same_bits_at_any_number_of_threads() {
    let run = |threads: usize, style: Option<&ClipStyle>, activations: DType| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let model = gpt(true, DType::F32);
            let params = model.params().all();
            let losses = |t: usize| {
                let (x, y) = tokens(8, t);
                model.losses(&x, &y, &Ctx::train(t as u64).with_dtype(activations))
            };
            match style {
                Some(style) => {
                    let mut step = private_whole(&params, style, 8);
                    (0..3).for_each(|t| drop(step.run(8, |_| losses(t)).unwrap()));
                }
                None => {
                    let mut step = plain(&params);
                    (0..3).for_each(|t| drop(step.run_one(|| losses(t)).unwrap()));
                }
            }
            bits(&params)
        })
    };
    for activations in [DType::F32, DType::BF16] {
        for style in [None, Some(&ClipStyle::AllLayer), Some(&ClipStyle::LayerWise)] {
            let one = run(1, style, activations);
            assert_eq!(one, run(2, style, activations), "{style:?} {activations}");
            assert_eq!(one, run(3, style, activations), "{style:?} {activations}");
        }
    }
}

#[test]
fn microbatches_make_no_difference() {
    for style in [None, Some(&ClipStyle::AllLayer), Some(&ClipStyle::LayerWise)] {
        let run = |physical: usize| {
            let model = gpt(false, DType::F64);
            let params = model.params().all();
            let (x, y) = tokens(4, 1);
            let rows = |a: &Array, r: &[usize]| a.slice(0, r[0]..r[r.len() - 1] + 1).unwrap().contiguous();
            let losses = |r: &[usize]| model.losses(rows(&x, r), rows(&y, r), &Ctx::eval());
            match style {
                Some(style) => drop(private_whole(&params, style, 4).run(physical, losses).unwrap()),
                None => {
                    let mut step = PlainStep::new(&params, Sgd::default(), Schedule::constant(1e-1)).unwrap();
                    step.run([0usize, 1, 2, 3].chunks(physical), losses).unwrap();
                }
            }
            values(&params)
        };
        let whole = run(4);
        for physical in [1, 3] {
            let worst = distance(&whole, &run(physical));
            assert!(worst < 1e-9, "{style:?} in microbatches of {physical}: {worst}");
        }
    }
}

/// A model whose gradient is the data: one weight row, loss x·w.
fn probe(rows: &[[f64; 3]]) -> (Param, Param, Tensor) {
    let (w, idle) =
        (Param::new("w", Array::zeros(&[1, 3], DType::F64)), Param::new("idle", Array::zeros(&[20_000], DType::F64)));
    let y = probe_losses(&w, rows.iter().copied()).unwrap();
    (w, idle, y)
}

fn probe_losses(w: &Param, rows: impl Iterator<Item = [f64; 3]>) -> Result<Tensor> {
    let x: Vec<f64> = rows.flatten().collect();
    let x = Tensor::from_slice(&x, &[x.len() / 3, 3])?;
    linear(&x, w, Layout::OutIn, None, Activation::None, None)?.sum(&[1], false)
}

fn sgd(params: &[Param], config: PrivacyConfig) -> PrivateStep {
    let p = keyed(config.clip(ClipFn::Abadi).noise_multiplier(2.0), 4);
    PrivateStep::new(params, p, Sgd::default(), Schedule::constant(1.0)).unwrap()
}

#[test]
fn every_trainable_element_gets_noise_even_in_an_empty_batch() {
    let (w, idle, _) = probe(&[[0.0; 3]]);
    let mut step = sgd(&[w.clone(), idle.clone()], empty(10));
    let report = step.run(4, |_| unreachable!()).unwrap();
    assert_eq!(report.samples, 0);
    assert!(report.loss().unwrap().is_nan());
    assert!(w.value().to_f64().iter().all(|&x| x != 0.0));
    // σ·R/B = 2·1/10⁻⁶; standard error of the variance over 20,000 elements is 1 %.
    let var = idle.value().to_f64().iter().map(|x| x * x).sum::<f64>() / 20_000.0;
    assert!((var / 4e12 - 1.0).abs() < 0.05, "{var}");
}

#[test]
fn a_sample_that_is_not_finite_is_left_out_and_counted() {
    // The record without a gradient in one run has one that is not finite in the other.
    let run = |middle: [f64; 3]| {
        let rows = [[0.1, 0.2, 0.0], middle, [0.0, 0.3, 0.1]];
        let (w, idle, _) = probe(&rows);
        let mut step = sgd(&[w.clone(), idle], whole(3));
        let forward = |records: &[usize]| probe_losses(&w, records.iter().map(|&r| rows[r]));
        let report = step.run(3, forward).unwrap();
        (report.non_finite().unwrap(), w.value().to_f64())
    };
    let (none, want) = run([0.0; 3]);
    let (one, got) = run([f64::NAN, 1.0, 0.0]);
    assert_eq!((none, one), (0, 1));
    assert_eq!(want, got);
}

#[test]
fn a_resumed_step_continues_bitwise() {
    let run = |cut: Option<u64>| {
        let mut model = gpt(true, DType::F32);
        let mut step = private(&model.params().all(), &ClipStyle::LayerWise, 6);
        for t in 0..6 {
            if cut == Some(t) {
                let (params, state, steps) = (model.params().all(), step.state(), step.steps());
                let next = gpt(true, DType::F32);
                next.params().all().iter().zip(&params).for_each(|(n, p)| n.set(p.value()).unwrap());
                model = next;
                step = private(&model.params().all(), &ClipStyle::LayerWise, 6);
                let state: Vec<(String, Array)> = state.into_iter().map(|(n, a)| (n.to_string(), a)).collect();
                step.restore(steps, &state).unwrap();
            }
            step.run(100, |records| {
                let (x, y) = tokens_of(records, t as usize);
                model.losses(&x, &y, &Ctx::train(t))
            })
            .unwrap();
        }
        bits(&model.params().all())
    };
    let whole = run(None);
    assert_eq!(whole, run(Some(1)));
    assert_eq!(whole, run(Some(4)));
}

#[test]
fn memory_stays_flat() {
    let model = gpt(true, DType::F32);
    let mut step = private_whole(&model.params().all(), &ClipStyle::AllLayer, 8);
    let (x, y) = tokens(8, 1);
    let mut live = Vec::new();
    for t in 0..1000 {
        step.run(8, |_| model.losses(&x, &y, &Ctx::train(t))).unwrap();
        if t % 250 == 249 {
            let Ok(status) = std::fs::read_to_string("/proc/self/statm") else {
                return skip("only Linux says how much memory is resident");
            };
            live.push(status.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / 1e6);
        }
    }
    // Other tests of this process allocate as well; a leak of one activation per step would be far more.
    assert!(live[3] - live[0] < 64.0, "resident MB: {live:?}");
}

#[test]
fn the_budget_is_a_hard_stop_and_nonsense_is_refused() {
    let w = Param::new("w", Array::zeros(&[3], DType::F64));
    let mut step = private(std::slice::from_ref(&w), &ClipStyle::LayerWise, 2);
    let mut run = || step.run(100, |records| w.per_sample(records.len())?.sum(&[1], false));
    for _ in 0..2 {
        assert!(run().unwrap().epsilon <= 4.0);
    }
    let e = run().unwrap_err();
    assert!(matches!(e, Error::BudgetSpent { .. }) && e.to_string().contains("budget"), "{e}");
    let refuse = |f: &dyn Fn(&mut PrivacyConfig), word: &str| {
        let mut c = PrivacyConfig::target(4.0, 1e-3).records(100).expected_batch(10.0).steps(2);
        f(&mut c);
        let e = Privacy::new(c, NoiseKey::from_seed_for_tests(1)).err().unwrap().to_string();
        assert!(e.contains(word), "{e}");
    };
    refuse(&|c| c.epsilon = 0.0, "ε = 0");
    refuse(&|c| c.epsilon = f64::NAN, "ε = NaN");
    refuse(&|c| c.delta = 0.5, "1/records");
    refuse(&|c| c.expected_batch = 101.0, "101");
    refuse(&|c| c.records = 0, "no records");
    refuse(&|c| c.max_grad_norm = 0.0, "threshold");
    refuse(&|c| c.noise_multiplier = Some(0.0), "no privacy");
    refuse(&|c| c.clip = ClipFn::AutoS { gamma: -0.5 }, "γ");
    refuse(&|c| c.steps = 0, "steps");
}

/// Five steps of an optimizer on a matrix and a bias, whose gradients are given, and the same by the formulas of the papers.
fn trajectory(optimizer: impl Optimizer + 'static, rule: impl Fn(i32, f64, [f64; 2], &mut f64, f64) -> [f64; 2]) {
    let gradient = |t: i32, i: usize| (0.7 * t as f64 + 1.3 * i as f64).sin();
    let start = |i: usize| 0.5 - 0.3 * i as f64;
    let w = Param::new("a.weight", Array::generate(&[2, 2], DType::F64, start));
    let b = Param::new("a.bias", Array::generate(&[2], DType::F64, |i| start(4 + i)));
    let mut step = PlainStep::new(&[w.clone(), b.clone()], optimizer, Schedule::constant(0.1)).unwrap();
    let (mut values, mut state) = ((0..6).map(start).collect::<Vec<f64>>(), [[0.0; 2]; 6]);
    for t in 1..=5 {
        step.run_one(|| {
            let of = |p: &Param, from: usize| {
                let g = Tensor::new(
                    Array::generate(p.shape(), DType::F64, |i| gradient(t, from + i)).reshape(&[1, p.numel()])?,
                );
                p.per_sample(1)?.reshape(&[1, p.numel()])?.mul(&g)?.sum(&[1], false)
            };
            of(&w, 0)?.add(&of(&b, 4)?)
        })
        .unwrap();
        for (i, value) in values.iter_mut().enumerate() {
            // λ = 0.4, for matrices only.
            let decay = if i < 4 { 0.4 } else { 0.0 };
            state[i] = rule(t, decay, state[i], value, gradient(t, i));
        }
        let off = distance(&[w.value().to_f64(), b.value().to_f64()].concat(), &values);
        assert!(off < 1e-12, "step {t}: {off:e}");
    }
}

#[test]
fn optimizers_follow_their_formulas() {
    // Loshchilov & Hutter 2019, algorithm 2, with an ε that is not small beside the second moment's root.
    let (beta1, beta2, eps) = (0.8, 0.9, 0.3);
    trajectory(AdamW { beta1, beta2, eps, weight_decay: 0.4 }, |t, decay, [m, v], p, g| {
        let (m, v) = (beta1 * m + (1.0 - beta1) * g, beta2 * v + (1.0 - beta2) * g * g);
        let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
        *p -= 0.1 * (m_hat / (v_hat.sqrt() + eps) + decay * *p);
        [m, v]
    });
    for momentum in [0.0, 0.9] {
        trajectory(Sgd { momentum, weight_decay: 0.4 }, |_, decay, [b, _], p, g| {
            let b = momentum * b + g;
            *p -= 0.1 * (b + decay * *p);
            [b, 0.0]
        });
    }
}

/// How often a run is killed: `PRISMGRAD_KILLS=1000 cargo test --test engine kill_9` takes some minutes.
fn most_kills() -> u64 {
    std::env::var("PRISMGRAD_KILLS").map_or(12, |n| n.parse().unwrap())
}

/// A private run in a folder, from its last checkpoint to the end; a checkpoint after every step.
fn run_in(folder: &Path) -> Vec<u8> {
    let steps = 40.max(5 * most_kills() / 2);
    let model = gpt(true, DType::F32);
    let params = model.params().all();
    let mut step = private(&params, &ClipStyle::LayerWise, steps);
    let mut run = RunFolder::create(folder, &serde_json::json!({}), Existing::Resume, &[]).unwrap();
    let checkpoints = run.checkpoints().unwrap().keep_last(2);
    if let Some(c) = checkpoints.latest().unwrap().checkpoint {
        state::load::<()>(&c, model.params(), &mut step).unwrap();
    }
    run.rewind(step.steps()).unwrap();
    while step.steps() < steps {
        let t = step.steps();
        let losses = |records: &[usize]| {
            let (x, y) = tokens_of(records, t as usize);
            model.losses(&x, &y, &Ctx::train(t))
        };
        let report = step.run(100, losses).unwrap();
        let loss = Some(report.loss().unwrap()).filter(|l| l.is_finite());
        run.log(t + 1, &serde_json::json!({"loss": loss, "epsilon": report.epsilon})).unwrap();
        state::save(&checkpoints, t + 1, None, model.params(), &step, &()).unwrap();
    }
    bits(&params)
}

/// Killed with SIGKILL at random moments and started again, a private run ends with the parameters, the losses and the ε
/// of a run nobody disturbed, bit for bit.
#[test]
fn kill_9_changes_nothing() {
    if let Some(folder) = std::env::var_os("PRISMGRAD_CHILD") {
        run_in(Path::new(&folder));
        return;
    }
    let scratch = Scratch::new("kill-9-training");
    let (calm, rough) = (scratch.join("calm"), scratch.join("rough"));
    let want = run_in(&calm);
    let mut g = Gen::new(std::process::id() as u64);
    let (mut kills, began) = (0, std::time::Instant::now());
    let done = || std::fs::read_to_string(rough.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    loop {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["training::kill_9_changes_nothing", "--exact", "--test-threads=1"])
            .env("PRISMGRAD_CHILD", &rough)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Killed a moment after it has gone some steps further: before that there would be nothing to go on from.
        let (goal, moment) = (done() + g.size(1, 3), std::time::Duration::from_micros(g.size(0, 4000) as u64));
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if done() >= goal && kills < most_kills() {
                std::thread::sleep(moment);
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(std::time::Duration::from_micros(300));
        };
        match ended {
            Some(status) => {
                assert!(status.success(), "{status}");
                break;
            }
            None => kills += 1,
        }
        assert!(began.elapsed().as_secs() < 240 + 2 * most_kills(), "no end after {kills} kills");
    }
    assert!(kills > 3, "the run was over before anybody killed it often enough: {kills}");
    assert_eq!(run_in(&rough), want, "after {kills} kills");
    let lines = |f: &Path| std::fs::read_to_string(f.join("metrics.jsonl")).unwrap();
    assert_eq!(lines(&rough), lines(&calm));
}
