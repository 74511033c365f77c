//! Training on the emulated CUDA device beside the CPU: steps, noise, clipping, waits, stops, resuming.

use crate::common::close::close;
use crate::common::gpt::gpt;
use crate::common::privacy::{empty, keyed, whole};
use crate::common::scratch::Scratch;
use crate::common::texts::tokens_of;
use crate::common::tokens::tokens;
use crate::common::values::values;
use prismgrad::device::emulator::{config, lock, stat};
use prismgrad::models::Gpt;
use prismgrad::nn::{Balance, Ctx, Moe, MoeConfig, Params};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::profile::{self, Kind};
use prismgrad::random::NoiseKey;
use prismgrad::step::{
    CapturedPrivateStep, CapturedStep, PlainStep, Privacy, PrivateReport, PrivateStep, TrainStep, clipped_gradient,
};
use prismgrad::{Array, DType, Device, Param, Result, Samples, Tensor};

static STYLES: [ClipStyle; 3] = [ClipStyle::AllLayer, ClipStyle::LayerWise, ClipStyle::ParameterWise];

fn gpu() -> Device {
    Device::cuda(0).unwrap()
}

/// A plain step, or a private one with every record in every batch.
enum Step {
    Plain(PlainStep),
    Private(PrivateStep),
}

/// What a step reports: its number, samples, learning rate, loss, clipped share, samples that were not finite, ε.
type Reported = (u64, usize, f64, f64, f64, usize, f64);

impl Step {
    fn new(params: &[Param], style: Option<&ClipStyle>, records: usize, optimizer: impl Optimizer + 'static) -> Step {
        let schedule = Schedule::cosine(1e-2, 2, 50);
        match style {
            None => Step::Plain(PlainStep::new(params, optimizer, schedule).unwrap()),
            Some(style) => {
                let p = keyed(whole(records).style(style.clone()), 9);
                Step::Private(PrivateStep::new(params, p, optimizer, schedule).unwrap())
            }
        }
    }
    /// Takes a step over so many records, at most `physical` at a time; `forward` gets their numbers.
    fn run(
        &mut self,
        records: usize,
        physical: usize,
        mut forward: impl FnMut(&[usize]) -> Result<Tensor>,
    ) -> Box<dyn Fn() -> Reported> {
        match self {
            Step::Plain(step) => {
                let all: Vec<usize> = (0..records).collect();
                let r = step.run(all.chunks(physical), forward).unwrap();
                Box::new(move || (r.step, r.samples, r.lr, r.loss().unwrap(), 0.0, 0, 0.0))
            }
            Step::Private(step) => {
                let r = step.run(physical, &mut forward).unwrap();
                Box::new(move || reported(&r))
            }
        }
    }
    fn any(&mut self) -> &mut dyn TrainStep {
        match self {
            Step::Plain(step) => step,
            Step::Private(step) => step,
        }
    }
}

fn reported(r: &PrivateReport) -> Reported {
    (r.step, r.samples, r.lr, r.loss().unwrap(), r.clipped().unwrap(), r.non_finite().unwrap(), r.epsilon)
}

/// Two steps of two microbatches each; the last report, the gradient of the last step and the parameters.
fn train(model: &Gpt, step: &mut Step) -> (Reported, Vec<f64>, Vec<f64>) {
    let mut last = None;
    for t in 0..2 {
        let ctx = Ctx::train(t as u64);
        last = Some(step.run(5, 3, |records| {
            let (x, y) = tokens_of(records, t);
            model.losses(&x, &y, &ctx)
        }));
    }
    (last.unwrap()(), step.any().last_gradient().to_f64(), values(&model.params().all()))
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
                        0 => Step::new(&params, style, 5, Sgd { momentum: 0.9, weight_decay: 0.1 }),
                        _ => Step::new(&params, style, 5, AdamW::default()),
                    };
                    let ((_, samples, lr, loss, clipped, non_finite, _), gradient, params) = train(&model, &mut step);
                    ([loss, clipped, lr, samples as f64], non_finite, gradient, params)
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
        let mut step = Step::new(&model.params().all(), style, 4, AdamW::default());
        let go = |step: &mut Step, t: u64| {
            let (x, y) = tokens(4, t as usize);
            step.run(4, 4, |_| model.losses(&x, &y, &Ctx::train(t)))
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
        assert!(report.unwrap()().3.is_finite());
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
        let mut step =
            PrivateStep::new(std::slice::from_ref(&idle), keyed(empty(4), 9), Sgd::default(), Schedule::constant(0.1))
                .unwrap();
        let report = step.run(4, |_| unreachable!()).unwrap();
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
        let new = |model: &Gpt| Step::new(&model.params().all(), Some(&ClipStyle::LayerWise), 3, AdamW::default());
        let mut step = new(&model);
        for t in 0..4 {
            if cut == Some(t) {
                let (params, steps) = (model.params().all(), step.any().steps());
                let state: Vec<(String, Array)> =
                    step.any().state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
                let next = gpt(1, true, DType::F32, &device);
                next.params().all().iter().zip(&params).for_each(|(n, p)| n.set(p.value()).unwrap());
                model = next;
                step = new(&model);
                step.any().restore(steps, &state).unwrap();
            }
            let (x, y) = tokens(3, t as usize);
            drop(step.run(3, 3, |_| model.losses(&x, &y, &Ctx::train(t))));
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
    let mut step = PlainStep::new(std::slice::from_ref(&w), AdamW::default(), Schedule::cosine(1e-2, 2, 50)).unwrap();
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
    // The record without a gradient in one run has one that is not finite in the other.
    let run = |middle: [f64; 3]| {
        let (w, x) = probe(&[[0.1, 0.2, 0.0], middle, [0.0, 0.3, 0.1]], &device).unwrap();
        let p = keyed(whole(3).clip(ClipFn::Abadi).noise_multiplier(2.0), 4);
        let params = std::slice::from_ref(&w);
        let mut step = PrivateStep::new(params, p, Sgd::default(), Schedule::constant(1.0)).unwrap();
        let report = step.run(3, |_| forward(&w, &x)).unwrap();
        (report.non_finite().unwrap(), w.value().to_f64())
    };
    let (none, want) = run([0.0; 3]);
    let (one, got) = run([f64::NAN, 1.0, 0.0]);
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
    let e = PlainStep::new(&[a, b], AdamW::default(), Schedule::constant(0.1)).err().unwrap().to_string();
    assert!(e.contains("b is on cuda:0") && e.contains("a on cpu"), "{e}");
}

enum Graph {
    Plain(CapturedStep),
    Private(CapturedPrivateStep),
}

/// A recorded private step takes Poisson batches of any size up to its capacity: what is in the places that are left over does
/// not matter, not even NaN, and a larger batch is refused before it costs anything.
#[test]
fn a_replayed_private_step_masks_its_padding() {
    let _one = lock();
    let device = gpu();
    let rows = |records: &[usize]| -> Vec<f64> {
        records.iter().flat_map(|&r| [0.1 * r as f64, 0.2, 0.3 - 0.05 * r as f64]).collect()
    };
    let run = |capacity: usize, recorded: bool, junk: f64| -> Result<_> {
        let (w, x) = probe(&vec![[junk; 3]; capacity], &device)?;
        let c = whole(4).records(12).expected_batch(4.0).clip(ClipFn::Abadi);
        let mut step =
            PrivateStep::new(std::slice::from_ref(&w), keyed(c, 3), Sgd::default(), Schedule::constant(0.1))?;
        let ordinary = |records: &[usize]| {
            let x = Array::from_slice(&rows(records), &[records.len(), 3])?.to(&device)?;
            forward(&w, &x)
        };
        step.run(12, ordinary)?;
        let mut graph = step.capture(capacity, || forward(&w, &x))?;
        let mut found = Vec::new();
        for _ in 0..5 {
            let report = if recorded {
                step.replay(&mut graph, |records| {
                    let mut all = rows(records);
                    all.resize(3 * capacity, junk);
                    x.refill(&Array::from_slice(&all, &[capacity, 3])?)
                })?
            } else {
                step.run(12, ordinary)?
            };
            found.push((report.samples, report.clipped()?, report.epsilon));
        }
        Ok((found, step.last_gradient().to_f64(), w.value().to_f64(), step.privacy().steps()))
    };
    let want = run(12, false, 0.0).unwrap();
    let sizes: Vec<usize> = want.0.iter().map(|f| f.0).collect();
    assert!(sizes.iter().any(|s| *s != sizes[0]), "batches of different sizes: {sizes:?}");
    for junk in [0.0, 7.0, f64::NAN] {
        let got = run(12, true, junk).unwrap();
        assert_eq!(got.0, want.0);
        close("gradient", &got.1, &want.1, 1e-12);
        close("parameters", &got.2, &want.2, 1e-12);
    }
    let e = run(1, true, 0.0).err().unwrap().to_string();
    assert!(e.contains("more than the 1 records"), "{e}");
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
                1 => Step::new(&params, style, 4, Sgd { momentum: 0.9, weight_decay: 0.1 }),
                _ => Step::new(&params, style, 4, AdamW::default()),
            };
            let put = |t: usize| tokens(4, t);
            let (x, y) = put(0);
            let (x, y) = (x.to(&device).unwrap(), y.to(&device).unwrap());
            let mut found = vec![];
            let losses = || model.losses(&x, &y, &Ctx::train(0));
            drop(step.run(4, 4, |_| losses()));
            let mut graph = recorded.then(|| match &mut step {
                Step::Plain(step) => Graph::Plain(step.capture([()], |_| losses()).unwrap()),
                Step::Private(step) => Graph::Private(step.capture(4, losses).unwrap()),
            });
            for t in 1..5 {
                let (a, b) = put(t);
                let fill = || x.refill(&a).and_then(|()| y.refill(&b));
                fill().unwrap();
                let waits = || stat("synchronisations");
                let before = waits();
                found.push(match (&mut graph, &mut step) {
                    // One ordinary step among the replayed ones.
                    (Some(Graph::Plain(g)), Step::Plain(step)) if t != 3 => {
                        let r = step.replay(g).unwrap();
                        assert_eq!(waits(), before, "a replay waits");
                        (r.step, r.samples, r.lr, r.loss().unwrap(), 0.0, 0, 0.0)
                    }
                    (Some(Graph::Private(g)), Step::Private(step)) if t != 3 => {
                        let r =
                            step.replay(g, |records| if records.len() == 4 { fill() } else { unreachable!() }).unwrap();
                        assert_eq!(waits(), before, "a replay waits");
                        reported(&r)
                    }
                    _ => step.run(4, 4, |_| losses())(),
                });
                assert_eq!((found[t - 1].0, found[t - 1].1), (t as u64 + 1, 4));
            }
            match graph {
                Some(Graph::Plain(g)) => assert!(g.kernels() > 50 && g.samples() == 4),
                Some(Graph::Private(g)) => assert!(g.kernels() > 50 && g.capacity() == 4),
                None => {}
            }
            (found, step.any().last_gradient().to_f64(), values(&params))
        };
        let (want, got) = (run(false), run(true));
        assert_eq!(want, got, "{style:?}");
        assert!(want.0.windows(2).all(|w| w[0].3 != w[1].3), "the data changed: {:?}", want.0);
    }
}

#[test]
fn what_cannot_be_captured_says_so() {
    let _one = lock();
    let device = gpu();
    let cpu = gpt(1, true, DType::F32, &Device::Cpu);
    let mut step = PlainStep::new(&cpu.params().all(), AdamW::default(), Schedule::constant(0.1)).unwrap();
    let (x, y) = tokens(2, 1);
    let e = step.capture([()], |_| cpu.losses(&x, &y, &Ctx::eval())).err().unwrap().to_string();
    assert!(e.contains("on the CPU") && e.contains("use run"), "{e}");

    let model = gpt(1, true, DType::F32, &device);
    let mut step = PlainStep::new(&model.params().all(), AdamW::default(), Schedule::constant(0.1)).unwrap();
    let host = (x.clone(), y.clone());
    let (x, y) = (x.to(&device).unwrap(), y.to(&device).unwrap());
    step.run([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    let e = step.capture([host], |(x, y)| model.losses(&x, &y, &Ctx::eval())).err().unwrap().to_string();
    assert!(e.contains("upload"), "{e}");
    let dropped = |_| model.losses(&x, &y, &Ctx::eval())?.dropout(0.5, 1);
    let e = step.capture([()], dropped).err().unwrap().to_string();
    assert!(e.contains("dropout"), "{e}");
    // After all that, capture works; and parameters that somebody holds are not changed under them.
    let mut graph = step.capture([()], |_| model.losses(&x, &y, &Ctx::eval())).unwrap();
    let held = model.params().all()[0].value();
    let before = held.to_f64();
    let e = step.replay(&mut graph).err().unwrap().to_string();
    assert!(e.contains("capture again"), "{e}");
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
    let losses = model.losses(bad.to(&device).unwrap(), &y, &Ctx::eval()).unwrap();
    let e = losses.array().to_vec::<f32>().unwrap_err().to_string();
    assert!(e.contains("position 7") && e.contains("wte") && e.contains("0..17"), "{e}");
    let losses = model.losses(x.to(&device).unwrap(), y.to(&device).unwrap(), &Ctx::eval()).unwrap();
    assert!(losses.array().to_vec::<f32>().unwrap().iter().all(|l| l.is_finite()), "told once");
}

/// Kernels are timed by the device's events and told apart by the op that launched them.
#[test]
fn a_profile_has_the_kernels_of_every_op() {
    let _one = lock();
    let device = gpu();
    let model = gpt(1, true, DType::F32, &device);
    let mut step = Step::new(&model.params().all(), Some(&ClipStyle::AllLayer), 3, AdamW::default());
    let (x, y) = tokens(3, 1);
    // The first step of a private run looks at the records twice more.
    drop(step.run(3, 3, |_| model.losses(&x, &y, &Ctx::eval())));
    let session = profile::start(&device).unwrap();
    assert!(profile::start(&device).is_err(), "one at a time");
    drop(step.run(3, 3, |_| model.losses(&x, &y, &Ctx::eval())));
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
    drop(step.run(3, 3, |_| model.losses(&x, &y, &Ctx::eval())));
    assert!(!profile::is_on());
}

/// With a secret key, noise on a GPU follows from a digest of the sum: the same sum has the same bits, another has other noise. The
/// model has experts with the balance loss of each sample.
#[test]
fn noise_of_a_secret_key_follows_from_the_sum() {
    let _one = lock();
    let device = gpu();
    let released = |slope: f64| -> Vec<f64> {
        let params = Params::new(0, DType::F32);
        let config = MoeConfig { balance: Balance::PerSample(0.01), ..MoeConfig::new(4, 2, 8) };
        let moe = Moe::new(&params.at("moe"), 8, &config).unwrap();
        params.to(&device).unwrap();
        let privacy = Privacy::new(whole(4).noise_multiplier(1.0), NoiseKey::from_bytes([7; 32])).unwrap();
        let mut step = PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
        step.run(4, |records| {
            let x = |i: usize| slope * ((records[i / 24] * 24 + i % 24) as f64 * 0.7).sin();
            let x = Array::generate(&[records.len(), 3, 8], DType::F32, x).to(&device)?;
            let out = moe.forward(&Tensor::new(x), &Ctx::eval())?;
            out.output.square()?.sum(&[1, 2], false)?.add(&out.losses)
        })
        .unwrap();
        step.last_gradient().to_f64()
    };
    let (one, other) = (released(1.0), released(1.0 + 1e-3));
    assert_eq!(one, released(1.0));
    let n = one.len() as f64;
    let apart = one.iter().zip(&other).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / n;
    let size = one.iter().map(|a| a * a).sum::<f64>() / n;
    assert!(apart > size, "the difference of two releases has a variance of {apart:.2e}, one release {size:.2e}");
}

/// Experts with a capacity drop the same tokens on a GPU as on the CPU.
#[test]
fn a_capacity_drops_the_same_tokens() {
    let _one = lock();
    let device = gpu();
    let outputs = |device: &Device| {
        let params = Params::new(0, DType::F64);
        let config = MoeConfig { capacity: Some(0.5), ..MoeConfig::new(3, 2, 8) };
        let moe = Moe::new(&params.at("moe"), 8, &config).unwrap();
        params.to(device).unwrap();
        let x = Array::generate(&[4, 5, 8], DType::F64, |i| (i as f64 * 0.7).sin()).to(device).unwrap();
        moe.forward(&Tensor::new(x), &Ctx::eval()).unwrap().output.array().to_f64()
    };
    close("outputs", &outputs(&device), &outputs(&Device::Cpu), 1e-12);
}
