//! Training on the emulated CUDA device beside the CPU: steps, noise, clipping, waits, stops, resuming.
#![cfg(feature = "emulator")]

mod common {
    pub mod close;
    pub mod gpt;
    pub mod scratch;
    pub mod tokens;
    pub mod values;
}

use common::close::close;
use common::gpt::gpt;
use common::scratch::Scratch;
use common::tokens::tokens;
use common::values::values;
use prismgrad::device::emulator::{config, lock, stat};
use prismgrad::models::Gpt;
use prismgrad::nn::Ctx;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::profile::{self, Kind};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, StepReport, TrainStep, clipped_gradient};
use prismgrad::{Array, DType, Device, Param, Result, Samples, Tensor};

static STYLES: [ClipStyle; 3] = [ClipStyle::AllLayer, ClipStyle::LayerWise, ClipStyle::ParameterWise];

fn gpu() -> Device {
    Device::cuda(0).unwrap()
}

fn step_of(params: &[Param], style: Option<&ClipStyle>, optimizer: impl Optimizer + 'static) -> TrainStep {
    let schedule = Schedule::cosine(1e-2, 2, 50);
    let Some(style) = style else { return TrainStep::plain(params, optimizer, schedule).unwrap() };
    let mut c = PrivacyConfig::new(1e3, 1e-3, 100, 4.0, 10);
    (c.style, c.noise_multiplier) = (style.clone(), Some(1.0));
    let p = Privacy::new(c, NoiseKey::from_seed_for_tests(9)).unwrap();
    TrainStep::private(params, p, optimizer, schedule).unwrap()
}

/// Two steps of two microbatches each; the last report, the gradient of the last step and the parameters.
fn train(model: &Gpt, step: &mut TrainStep) -> (StepReport, Vec<f64>, Vec<f64>) {
    let mut last = None;
    for t in 0..2 {
        let batches = [tokens(3, 1 + t), tokens(2, 4 + t)];
        let ctx = Ctx::train(t as u64);
        last = Some(step.run(batches, |(x, y)| model.losses(&x, &y, &ctx)).unwrap());
    }
    (last.unwrap(), step.last_gradient().to_f64(), values(&model.params().all()))
}

#[test]
fn steps_agree_with_the_cpu() {
    let _one = lock();
    let mut k = 0;
    for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 2e-4)] {
        for tied in [false, true] {
            for style in [None, Some(&STYLES[0]), Some(&STYLES[1]), Some(&STYLES[2])] {
                config("seed", k % 4);
                config("preempt", if k % 5 == 4 { 40 } else { 0 });
                k += 1;
                let what = format!("{dtype} tied {tied} {style:?}");
                let run = |device: &Device| {
                    let model = gpt(1, tied, dtype, device);
                    let params = model.params().all();
                    let mut step = match k % 3 {
                        0 => step_of(&params, style, Sgd { momentum: 0.9, weight_decay: 0.1 }),
                        _ => step_of(&params, style, AdamW::default()),
                    };
                    let (report, gradient, params) = train(&model, &mut step);
                    let found = [report.loss().unwrap(), report.clipped().unwrap(), report.lr, report.samples as f64];
                    (found, report.non_finite().unwrap(), gradient, params)
                };
                let (want, got) = (run(&Device::Cpu), run(&gpu()));
                close(&format!("{what} report"), &got.0, &want.0, tolerance);
                assert_eq!(got.1, want.1, "{what}");
                close(&format!("{what} gradient"), &got.2, &want.2, tolerance);
                // The first steps of AdamW divide by the gradient's size: small differences grow.
                close(&format!("{what} parameters"), &got.3, &want.3, 20.0 * tolerance);
            }
        }
    }
}

#[test]
fn a_private_step_waits_for_nothing_and_allocates_nothing() {
    let _one = lock();
    let device = gpu();
    for style in [None, Some(&STYLES[0]), Some(&STYLES[1])] {
        let model = gpt(1, true, DType::F32, &device);
        let mut step = step_of(&model.params().all(), style, AdamW::default());
        let go = |step: &mut TrainStep, t: u64| {
            let (x, y) = tokens(4, t as usize);
            step.run([(x, y)], |(x, y)| model.losses(&x, &y, &Ctx::train(t))).unwrap()
        };
        let mut report = None;
        (0..3).for_each(|t| report = Some(go(&mut step, t)));
        device.synchronize().unwrap();
        let counts = || {
            let c = device.gpu().unwrap().counts();
            let ours = [c.synchronisations, c.downloads, c.driver_allocations, c.driver_frees, c.compiles];
            (ours, ["synchronisations", "downloads", "allocations"].map(stat))
        };
        let before = counts();
        (3..6).for_each(|t| report = Some(go(&mut step, t)));
        assert_eq!(counts(), before, "{style:?}: waits, downloads, allocations, frees, compilations");
        assert!(report.unwrap().loss().unwrap().is_finite());
        assert!(counts().1[1] > before.1[1], "asking for a loss is a download");
    }
}

/// Noise is the same on every device, and every trainable element gets some even in an empty batch.
#[test]
fn noise_is_the_same_bits_as_on_the_cpu() {
    let _one = lock();
    config("seed", 1);
    let run = |device: &Device, dtype: DType| {
        let idle = Param::new("idle", Array::zeros(&[1003], dtype));
        idle.to(device).unwrap();
        let mut step = step_of(std::slice::from_ref(&idle), Some(&STYLES[0]), Sgd::default());
        let none: [(); 0] = [];
        let report = step.run(none, |_| unreachable!()).unwrap();
        assert!(report.loss().unwrap().is_nan());
        let noise = step.last_gradient().to_f64();
        assert!(noise.iter().all(|&x| x != 0.0));
        noise
    };
    for dtype in [DType::F32, DType::F64] {
        assert_eq!(run(&gpu(), dtype), run(&Device::Cpu, dtype), "{dtype}");
    }
}

/// Two runs, and a run cut and resumed, end in the same bits.
#[test]
fn repeatable_and_resumable_bitwise() {
    let _one = lock();
    let device = gpu();
    let run = |cut: Option<u64>, seed: i64| {
        config("seed", seed);
        let mut model = gpt(1, true, DType::F32, &device);
        let mut step = step_of(&model.params().all(), Some(&ClipStyle::LayerWise), AdamW::default());
        for t in 0..4 {
            if cut == Some(t) {
                let (params, steps) = (model.params().all(), step.steps());
                let state: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
                let next = gpt(1, true, DType::F32, &device);
                next.params().all().iter().zip(&params).for_each(|(n, p)| n.set(p.value()).unwrap());
                model = next;
                step = step_of(&model.params().all(), Some(&ClipStyle::LayerWise), AdamW::default());
                step.restore(steps, &state).unwrap();
            }
            let (x, y) = tokens(3, t as usize);
            step.run([()], |_| model.losses(&x, &y, &Ctx::train(t))).unwrap();
        }
        values(&model.params().all())
    };
    let want = run(None, 0);
    assert!(want.iter().all(|x| x.is_finite()));
    for (cut, seed) in [(None, 1), (None, 2), (Some(2), 0)] {
        assert_eq!(run(cut, seed), want, "{cut:?}, schedule {seed}");
    }
}

/// One weight row; the loss of a sample is x·w, its gradient x.
fn probe(rows: &[[f64; 3]], device: &Device) -> Result<(Param, Array)> {
    let w = Param::new("w", Array::zeros(&[1, 3], DType::F64));
    w.to(device)?;
    let x: Vec<f64> = rows.iter().flatten().copied().collect();
    Ok((w, Array::from_slice(&x, &[rows.len(), 3])?.to(device)?))
}

fn forward(w: &Param, x: &Array) -> Result<Tensor> {
    linear(&Tensor::new(x.clone()), w, Layout::OutIn, None, Activation::None, None)?.sum(&[1], false)
}

#[test]
fn a_loss_that_is_not_finite_stops_updates_until_somebody_asks() {
    let _one = lock();
    let device = gpu();
    let (w, good) = probe(&[[0.1, 0.2, 0.3], [0.5, 0.1, 0.2]], &device).unwrap();
    let (_, bad) = probe(&[[0.1, 0.2, 0.3], [0.5, 0.1, 0.2], [1.0, f64::NAN, 0.0]], &device).unwrap();
    let mut step = step_of(std::slice::from_ref(&w), None, AdamW::default());
    let first = step.run([&good], |x| forward(&w, x)).unwrap();
    let after_one = w.value().to_f64();
    let second = step.run([&good, &bad], |x| forward(&w, x)).unwrap();
    let third = step.run([&good], |x| forward(&w, x)).unwrap();
    assert_eq!(w.value().to_f64(), after_one, "nothing is updated after the bad step");
    assert!(first.loss().is_ok(), "the step before it was fine");
    for report in [second, third] {
        let e = report.loss().unwrap_err().to_string();
        assert!(e.contains("step 2: the loss of sample 4 is NaN"), "{e}");
    }
}

#[test]
fn a_private_sample_that_is_not_finite_is_left_out_and_counted() {
    let _one = lock();
    let device = gpu();
    let good = [[0.1, 0.2, 0.0], [0.0, 0.3, 0.1]];
    let run = |rows: &[[f64; 3]]| {
        let (w, x) = probe(rows, &device).unwrap();
        let mut c = PrivacyConfig::new(1e3, 1e-3, 100, 10.0, 10);
        c.clip = ClipFn::Abadi;
        c.noise_multiplier = Some(2.0);
        let p = Privacy::new(c, NoiseKey::from_seed_for_tests(4)).unwrap();
        let params = std::slice::from_ref(&w);
        let mut step = TrainStep::private(params, p, Sgd::default(), Schedule::constant(1.0)).unwrap();
        let report = step.run([x], |x| forward(&w, &x)).unwrap();
        (report.non_finite().unwrap(), w.value().to_f64())
    };
    let (none, want) = run(&good);
    let (one, got) = run(&[good[0], [f64::NAN, 1.0, 0.0], good[1]]);
    assert_eq!((none, one), (0, 1));
    assert_eq!(want, got);
}

/// A weight used twice over ragged samples in no order, with a bias and a parameter broadcast per sample.
#[test]
fn ragged_samples_clip_as_on_the_cpu() {
    let _one = lock();
    let run = |device: &Device, style: &ClipStyle, clip: ClipFn| {
        let p = |n: &str, s: &[usize], k: f64| {
            let p = Param::new(n, Array::generate(s, DType::F64, |i| (k + i as f64 * 0.9).sin()));
            p.to(device).unwrap();
            p
        };
        let (w, b, gate) = (p("a.weight", &[4, 4], 0.3), p("a.bias", &[4], 1.0), p("gate", &[4], 2.0));
        let owner = vec![0u32, 2, 1, 0, 2, 2, 4];
        let samples = Samples::owners(owner.clone(), 5).unwrap();
        let x = Array::generate(&[7, 4], DType::F64, |i| i as f64 * 0.21 - 0.5).to(device).unwrap();
        let s = Some(&samples);
        let y = linear(&Tensor::new(x), &w, Layout::OutIn, Some(&b), Activation::Tanh, s).unwrap();
        let y = linear(&y, &w, Layout::InOut, Some(&b), Activation::None, s).unwrap();
        let pick = Array::generate(&[5, 7], DType::F64, |i| (owner[i % 7] as usize == i / 7) as u8 as f64);
        let pick = Tensor::new(pick.to(device).unwrap());
        let per = pick.matmul(&y.sin().unwrap()).unwrap().mul(&gate.per_sample(5).unwrap()).unwrap();
        let losses = per.sum(&[1], false).unwrap();
        let params = [w, b, gate];
        let sums = clipped_gradient(&losses, &params, style, clip, 0.4).unwrap();
        sums.iter().flat_map(Array::to_f64).collect::<Vec<f64>>()
    };
    for style in &STYLES {
        for clip in [ClipFn::Abadi, ClipFn::Reparameterised, ClipFn::AutoV, ClipFn::AutoS { gamma: 0.01 }] {
            let (want, got) = (run(&Device::Cpu, style, clip), run(&gpu(), style, clip));
            close(&format!("{style:?} {clip:?}"), &got, &want, 1e-10);
        }
    }
}

#[test]
fn a_model_on_two_devices_is_refused_by_name() {
    let _one = lock();
    let (a, b) = (Param::new("a", Array::zeros(&[3], DType::F32)), Param::new("b", Array::zeros(&[3], DType::F32)));
    b.to(&gpu()).unwrap();
    let e = TrainStep::plain(&[a, b], AdamW::default(), Schedule::constant(0.1)).err().unwrap().to_string();
    assert!(e.contains("b is on cuda:0") && e.contains("a on cpu"), "{e}");
}

/// Recorded steps do what ordinary ones do, bit for bit, with new data, noise and learning rates each time.
#[test]
fn replayed_steps_are_ordinary_steps() {
    let _one = lock();
    let device = gpu();
    for (k, style) in [None, Some(&STYLES[0]), Some(&STYLES[1])].into_iter().enumerate() {
        config("seed", k as i64);
        let run = |recorded: bool| {
            let model = gpt(1, true, DType::F32, &device);
            let params = model.params().all();
            let mut step = match k {
                1 => step_of(&params, style, Sgd { momentum: 0.9, weight_decay: 0.1 }),
                _ => step_of(&params, style, AdamW::default()),
            };
            let put = |t: usize| tokens(4, t);
            let (x, y) = put(0);
            let (x, y) = (x.to(&device).unwrap(), y.to(&device).unwrap());
            let mut losses = vec![];
            step.run([()], |_| model.losses(&x, &y, &Ctx::train(0))).unwrap();
            let mut graph = recorded.then(|| step.record([()], |_| model.losses(&x, &y, &Ctx::train(0))).unwrap());
            for t in 1..5 {
                let (a, b) = put(t);
                x.refill(&a).unwrap();
                y.refill(&b).unwrap();
                let before = (stat("synchronisations"), stat("allocations"));
                let report = match &mut graph {
                    // One ordinary step among the replayed ones.
                    Some(g) if t != 3 => {
                        let report = step.replay(g).unwrap();
                        assert_eq!((stat("synchronisations"), stat("allocations")).0, before.0, "a replay waits");
                        report
                    }
                    _ => step.run([()], |_| model.losses(&x, &y, &Ctx::train(0))).unwrap(),
                };
                assert_eq!((report.step, report.samples), (t as u64 + 1, 4));
                losses.push((report.loss().unwrap(), report.clipped().unwrap(), report.lr, report.epsilon));
            }
            if let Some(g) = graph {
                assert!(g.kernels() > 50 && g.samples() == 4);
            }
            (losses, step.last_gradient().to_f64(), values(&params))
        };
        let (want, got) = (run(false), run(true));
        assert_eq!(want, got, "{style:?}");
        assert!(want.0.windows(2).all(|w| w[0].0 != w[1].0), "the data changed: {:?}", want.0);
    }
}

#[test]
fn what_cannot_be_recorded_says_so() {
    let _one = lock();
    let device = gpu();
    let cpu = gpt(1, true, DType::F32, &Device::Cpu);
    let mut step = step_of(&cpu.params().all(), None, AdamW::default());
    let (x, y) = tokens(2, 1);
    let e = step.record([()], |_| cpu.losses(&x, &y, &Ctx::eval())).err().unwrap().to_string();
    assert!(e.contains("on the CPU") && e.contains("use run"), "{e}");

    let model = gpt(1, true, DType::F32, &device);
    let mut step = step_of(&model.params().all(), None, AdamW::default());
    let host = (x.clone(), y.clone());
    let (x, y) = (x.to(&device).unwrap(), y.to(&device).unwrap());
    step.run([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    let e = step.record([host], |(x, y)| model.losses(&x, &y, &Ctx::eval())).err().unwrap().to_string();
    assert!(e.contains("upload"), "{e}");
    let dropped = |_| model.losses(&x, &y, &Ctx::eval())?.dropout(0.5, 1);
    let e = step.record([()], dropped).err().unwrap().to_string();
    assert!(e.contains("dropout"), "{e}");
    // After all that, recording works; and parameters that somebody holds are not changed under them.
    let mut graph = step.record([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    let held = model.params().all()[0].value();
    let before = held.to_f64();
    let e = step.replay(&mut graph).err().unwrap().to_string();
    assert!(e.contains("record again"), "{e}");
    assert_eq!(held.to_f64(), before);
}

/// Ids that are on the device are checked there, and told when somebody reads something.
#[test]
fn ids_out_of_range_on_the_device_are_told() {
    let _one = lock();
    let device = gpu();
    let model = gpt(1, true, DType::F32, &device);
    let (x, y) = tokens(2, 1);
    let bad = Array::generate(&[2, 6], DType::U32, |i| if i == 7 { 17.0 } else { 3.0 });
    let e = model.losses(&bad, &y, &Ctx::eval()).err().unwrap().to_string();
    assert!(e.contains("id 17 at position 7"), "on the CPU at once: {e}");
    let losses = model.losses(&bad.to(&device).unwrap(), &y, &Ctx::eval()).unwrap();
    let e = losses.array().to_vec::<f32>().unwrap_err().to_string();
    assert!(e.contains("position 7") && e.contains("wte") && e.contains("0..17"), "{e}");
    let losses = model.losses(&x.to(&device).unwrap(), &y.to(&device).unwrap(), &Ctx::eval()).unwrap();
    assert!(losses.array().to_vec::<f32>().unwrap().iter().all(|l| l.is_finite()), "told once");
}

/// Kernels are timed by the device's events and told apart by the op that launched them.
#[test]
fn a_profile_has_the_kernels_of_every_op() {
    let _one = lock();
    let device = gpu();
    let model = gpt(1, true, DType::F32, &device);
    let mut step = step_of(&model.params().all(), Some(&ClipStyle::AllLayer), AdamW::default());
    let (x, y) = tokens(3, 1);
    let session = profile::start(&device).unwrap();
    assert!(profile::start(&device).is_err(), "one at a time");
    step.run([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    let report = session.finish().unwrap();
    let find = |kind: Kind, name: &str| report.lines().iter().find(|l| l.kind == kind && l.name == name);
    for (kind, name) in [
        (Kind::Forward, "linear"),
        (Kind::Forward, "attention"),
        (Kind::Backward, "layer_norm"),
        (Kind::Backward, "norms"),
        (Kind::Backward, "clip and contract"),
        (Kind::Phase, "noise"),
        (Kind::Phase, "update"),
    ] {
        let line = find(kind, name).unwrap_or_else(|| panic!("no {name} in\n{}", report.table()));
        assert!(line.count > 0 && line.device_ms > 0.0, "{line:?}");
    }
    // Forward: 2·(rows·in·out) FLOPs of four matrices in the block and the head.
    let flop = 2.0 * 18.0 * (8.0 * 24.0 + 8.0 * 8.0 + 2.0 * 8.0 * 32.0 + 8.0 * 17.0);
    assert!((find(Kind::Forward, "linear").unwrap().gflop * 1e9 - flop).abs() < 1.0);
    let folder = Scratch::new("trace");
    let trace = folder.join("trace.json");
    report.save_trace(&trace).unwrap();
    let text = std::fs::read_to_string(&trace).unwrap();
    let events = serde_json::from_str::<serde_json::Value>(&text).unwrap()["traceEvents"].as_array().unwrap().clone();
    assert!(events.iter().any(|e| e["name"] == "adamw_f32" && e["cat"] == "kernel" && e["args"]["op"] == "update"));
    // Off again: nothing is recorded any more.
    step.run([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    assert!(!profile::is_on());
}
