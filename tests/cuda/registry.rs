//! Every op of the registry on the emulated CUDA device, beside the CPU: values, gradients of inputs, gradients of
//! parameters, under several schedules with all checks on.

use crate::common::close::{close, differs};
use crate::common::gpt::gpt;
use crate::common::scratch::Scratch;
use crate::common::tokens::tokens;
use prismgrad::check::{self, Gen, Mode};
use prismgrad::device::emulator::{config, lock, stat};
use prismgrad::nn::Ctx;
use prismgrad::ops::embedding::embedding;
use prismgrad::ops::grouped::grouped_linear;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::segment::Segments;
use prismgrad::ops::{Differentiable, FactorRule, OpInfo, registry};
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::step::PlainStep;
use prismgrad::{Array, DType, Device, Gradients, Param, Result, Samples, Tensor};
use std::collections::BTreeSet;

/// Dtype, tolerance beside the largest value, seed of values and schedule, preemption. 16-bit results may round the other
/// way where sums are taken in another order: two units in the last place, and what an op makes of them.
fn runs() -> Vec<(DType, f64, u64, i64)> {
    let mut out: Vec<(DType, f64, u64, i64)> = Vec::new();
    for (dtype, tolerance, seeds) in [
        (DType::F64, 1e-10, 0..5),
        (DType::F32, 2e-5, 5..8),
        (DType::BF16, 1.0 / 64.0, 8..11),
        (DType::F16, 2e-3, 11..14),
    ] {
        out.extend(seeds.map(|s| (dtype, tolerance, s, [0, 0, 0, 20, 7][s as usize % 5])));
    }
    out
}

/// A named result, and how many times the tolerance it may be off.
type Part = (String, Vec<f64>, f64);

/// What came of a case, and how often the host waited for the device during forward and backward.
struct Outcome {
    parts: Vec<Part>,
    waits: u64,
}

fn run(op: &OpInfo, make: fn(&mut Gen) -> Result<check::Case>, mut g: Gen, device: &Device) -> Result<Outcome> {
    let case = make(&mut g)?;
    let inputs: Vec<Tensor> = case.inputs.iter().map(|a| Tensor::leaf(a.clone())).collect();
    let before = stat("synchronisations");
    let y = (case.run)(&inputs)?;
    let mut grads = Gradients::default();
    let differentiable = matches!(op.differentiable, Differentiable::Yes);
    if differentiable {
        assert_eq!(y.device(), *device, "the result is where the operands are");
        // Long sums of these do not cancel: a norm would be the small difference of large numbers.
        let seed = Array::generate(y.shape(), y.dtype(), |i| ((i * 37 % 11) as f64 - 3.0) / 7.0).to(device)?;
        y.backward_from(seed, false, &mut grads)?;
    }
    let waits = stat("synchronisations") - before;
    let exact = if EXACT.contains(&op.name) { 0.0 } else { 1.0 };
    let mut parts = vec![("value".to_string(), y.array().to_f64(), exact)];
    for (i, t) in inputs.iter().enumerate() {
        parts.push((format!("gradient of input {i}"), grads.of(t).map_or(vec![], |g| g.to_f64()), 1.0));
    }
    for p in &case.params {
        let Some(g) = grads.param(p) else { continue };
        parts.push((format!("gradient of {}", p.name()), g.sum()?.to_f64(), 1.0));
        if g.expect_samples().is_ok() {
            parts.push((format!("norms of {}", p.name()), g.sample_sq_norms()?, 2.0));
            // A sample of weight 0 is left out, whatever it holds.
            let weights: Vec<f64> = (0..g.samples()).map(|i| (i % 3) as f64 / 2.0).collect();
            parts.push((format!("weighted sum of {}", p.name()), g.weighted_sum(&weights)?.to_f64(), 1.0));
            if g.samples() <= 40 {
                parts.push((format!("inner products of {}", p.name()), g.gram(g)?.to_f64(), 2.0));
            }
        }
    }
    Ok(Outcome { parts, waits })
}

/// What differs between two outcomes. An op may refuse a case, if it does so on both devices and in the same words.
fn disagreements(mode: Mode, want: Result<Outcome>, got: &Result<Outcome>, tolerance: f64) -> Vec<String> {
    let (want, got) = match (want, got) {
        (Ok(want), Ok(got)) => (want, got),
        (Err(want), Err(got)) if mode != Mode::Small && want.to_string() == got.to_string() => return vec![],
        (want, got) => return vec![format!("CPU {:?}, device {:?}", want.err(), got.as_ref().err())],
    };
    let names = |o: &Outcome| o.parts.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
    if names(&want) != names(got) {
        return vec![format!("CPU has {:?}, device {:?}", names(&want), names(got))];
    }
    let parts = got.parts.iter().zip(&want.parts);
    parts.filter_map(|((what, g, times), (_, w, _))| differs(what, g, w, times * tolerance)).collect()
}

/// Ops that pick, move or compare: their values have the same bits on every device.
const EXACT: &[&str] = &[
    "max",
    "argmax",
    "sort",
    "max_pool",
    "segment_max",
    "segment_repeat",
    "gather",
    "index_select",
    "one_hot",
    "where",
    "compare",
    "is_finite",
    "reshape",
    "permute",
    "expand",
    "concat",
    "pad",
    "unfold",
    "neg",
    "abs",
    "relu",
    "maximum",
    "minimum",
];

/// Ops that came later, the latest last: numbered after the others, whose random cases stay what they were.
const NEW: &[&str] = &["add_scaled"];

fn every_op(mode: Mode, runs: &[(DType, f64, u64, i64)]) {
    let _one = lock();
    let device = Device::cuda(0).unwrap();
    let (mut waiting, mut cases, mut wrong) = (BTreeSet::new(), 0, Vec::new());
    let (new, old): (Vec<_>, Vec<_>) = registry().partition(|op| NEW.contains(&op.name));
    for (number, op) in old.into_iter().chain(new).enumerate() {
        // Products of large matrices take long here: half as many of them.
        let heavy = mode == Mode::Large && matches!(op.factor, FactorRule::Kinds(_));
        for (k, &make) in op.cases.iter().enumerate() {
            for &(dtype, tolerance, seed, preempt) in runs.iter().step_by(1 + heavy as usize) {
                config("seed", seed as i64);
                config("preempt", preempt);
                cases += 1;
                let go = |device: &Device| {
                    run(op, make, Gen::with_dtype(100 * number as u64 + seed, dtype).mode(mode).on(device), device)
                };
                let (want, got) = (go(&Device::Cpu), go(&device));
                if got.as_ref().is_ok_and(|g| g.waits > 0) {
                    waiting.insert(op.name);
                }
                let off = disagreements(mode, want, &got, tolerance);
                wrong.extend(off.into_iter().map(|off| format!("{} case {k} seed {seed} {dtype}, {off}", op.name)));
            }
        }
    }
    assert!(cases > 500, "{cases} cases");
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(waiting.is_empty(), "ops that make the host wait for the device: {waiting:?}");
}

#[test]
fn every_op_agrees_with_the_cpu() {
    every_op(Mode::Small, &runs());
}
/// One case and mode in every dtype, with other sizes and values in each.
fn few() -> Vec<(DType, f64, u64, i64)> {
    runs().into_iter().filter(|r| [3, 4, 5, 6, 8, 9, 11, 12].contains(&r.2)).collect()
}
#[test]
fn every_op_agrees_with_the_cpu_beside_borders() {
    every_op(Mode::Large, &runs());
}
#[test]
fn every_op_agrees_with_the_cpu_on_nothing() {
    every_op(Mode::Empty, &few());
}
#[test]
fn every_op_agrees_with_the_cpu_on_strides() {
    every_op(Mode::Strided, &few());
}
#[test]
fn every_op_agrees_with_the_cpu_on_special_values() {
    every_op(Mode::Special, &few());
}
#[test]
fn every_op_agrees_with_the_cpu_on_ties() {
    every_op(Mode::Ties, &few());
}

/// A whole model: losses and every parameter's gradient and per-sample norms.
#[test]
fn a_gpt_agrees_with_the_cpu() {
    let _one = lock();
    config("seed", 3);
    let device = Device::cuda(0).unwrap();
    let make = |device: &Device| {
        let model = gpt(2, true, DType::F64, device);
        let (x, y) = tokens(3, 1);
        let losses = model.losses(&x, &y, &Ctx::eval()).unwrap();
        assert_eq!(losses.device(), *device);
        let grads = losses.backward().unwrap();
        let all = model.params().all();
        let params = all.iter().map(|p| {
            let g = grads.param(p).unwrap();
            (p.name().to_string(), g.sum().unwrap().to_f64(), g.sample_sq_norms().unwrap())
        });
        (losses.array().to_f64(), params.collect::<Vec<_>>())
    };
    let (want, got) = (make(&Device::Cpu), make(&device));
    close("losses", &got.0, &want.0, 1e-10);
    for (g, w) in got.1.iter().zip(&want.1) {
        close(&g.0, &g.1, &w.1, 1e-10);
        close(&g.0, &g.2, &w.2, 1e-10);
    }
}

/// Every dtype converted to every other, rounded and cut off as on the CPU.
#[test]
fn every_cast_agrees_with_the_cpu() {
    let _one = lock();
    let device = Device::cuda(0).unwrap();
    let all = [DType::F32, DType::F64, DType::BF16, DType::F16, DType::U32, DType::I64, DType::U8];
    for from in all {
        let ends =
            [0.5, 255.5, 256., 65504., 65520., 65536., 4294967295., 5e9, 1e19, 1e300, 1e-6, 6e-8, 3e-8, 1e-40, 1e-310];
        let mut v: Vec<f64> = (0..40).map(|i| i as f64 * 1.37).collect();
        v.extend(ends.into_iter().chain([0.0, f64::INFINITY]).flat_map(|x| [x, -x]).chain([f64::NAN]));
        let x = Array::from_slice(&v, &[v.len()]).unwrap().cast(from);
        for to in all {
            let want = Tensor::new(x.clone()).cast(to).unwrap();
            let got = Tensor::new(x.to(&device).unwrap()).cast(to).unwrap();
            assert_eq!(got.dtype(), to);
            assert_eq!(differs(&format!("{from} to {to}"), &got.array().to_f64(), &want.array().to_f64(), 0.0), None);
        }
    }
}

/// Products where TF32 is allowed: rounded to 10 bits of mantissa forwards and for inputs, and not for parameters.
#[test]
fn tf32_is_for_products_and_not_for_gradients_of_parameters() {
    let _one = lock();
    config("seed", 5);
    let device = Device::cuda(0).unwrap();
    let gpu = device.gpu().unwrap();
    assert!(!gpu.allows_tf32(), "TF32 is off unless it is asked for");
    gpu.allow_tf32(true);
    let random = |shape: &[usize], seed: u64, at: &Device| Tensor::randn(shape, DType::F32, seed, at).unwrap();
    let sizes = [(20, 48, 24), (133, 50, 33), (7, 200, 129)];
    let (mut products, mut exact) = (vec![], vec![]);
    for at in [&Device::Cpu, &device] {
        let mut all: Vec<f64> = vec![];
        for (m, k, n) in sizes {
            let (a, b) = (random(&[m, k], 1, at), random(&[k, n], 2, at));
            let t = |x: &Tensor| x.transpose(0, 1).unwrap().array().contiguous();
            let (at_, bt) = (Tensor::new(t(&a)), Tensor::new(t(&b)));
            let back = |x: &Tensor| x.transpose(0, 1).unwrap();
            for (x, y) in [(&a, &b), (&back(&at_), &b), (&a, &back(&bt)), (&back(&at_), &back(&bt))] {
                all.extend(x.matmul(y).unwrap().array().to_f64());
            }
        }
        let a = random(&[20, 48], 1, at);
        // Experts: rows of two groups.
        let groups = Segments::lengths(&[12, 8]);
        let samples = Samples::uniform(20, 1);
        for layout in [Layout::OutIn, Layout::InOut] {
            let w = Param::new(
                "w",
                random(if layout == Layout::OutIn { &[2, 24, 48] } else { &[2, 48, 24] }, 3, at).into_array(),
            );
            let y = grouped_linear(&a, &w, layout, None, Activation::None, &groups, &samples).unwrap();
            all.extend(y.array().to_f64());
            let grads = y.sum(&[1], false).unwrap().backward().unwrap();
            exact.push(grads.param(&w).unwrap().sum().unwrap().to_f64());
        }
        products.push(all);
    }
    gpu.allow_tf32(false);
    close("products", &products[1], &products[0], 4e-3);
    assert!(differs("", &products[1], &products[0], 1e-6).is_some(), "nothing was rounded to TF32");
    for k in [0, 1] {
        close("gradients", &exact[2 + k], &exact[k], 1e-6);
    }
}

/// A GPT in bf16: norms and losses read and write 16 bits, no cast around them. The kernels of each op are in the trace.
#[test]
fn a_bf16_gpt_casts_around_no_norm_and_no_loss() {
    let _one = lock();
    config("seed", 0);
    let device = Device::cuda(0).unwrap();
    let model = gpt(2, true, DType::F32, &device);
    let (x, y) = tokens(3, 1);
    let ctx = Ctx::train(0).with_dtype(DType::BF16);
    let session = prismgrad::profile::start(&device).unwrap();
    model.losses(&x, &y, &ctx).unwrap().backward().unwrap();
    let folder = Scratch::new("bf16-trace");
    let file = folder.join("trace.json");
    session.finish().unwrap().save_trace(&file).unwrap();
    let trace: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let mut kernels = BTreeSet::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        let op = event["args"]["op"].as_str().unwrap_or_default();
        if ["layer_norm", "cross_entropy"].contains(&op) {
            kernels.insert(format!("{op}: {}", event["name"].as_str().unwrap()));
        }
    }
    assert!(
        kernels.iter().any(|k| k.contains("norm_grad_bf16"))
            && kernels.iter().any(|k| k.contains("cross_entropy_grad_bf16")),
        "{kernels:?}"
    );
    let casts: Vec<&String> = kernels.iter().filter(|k| k.contains(": cast_")).collect();
    assert!(casts.is_empty(), "{casts:?}");
}

/// A padding id: its row receives nothing. (No id of the embedding's cases is one, since differences would not know of it.)
#[test]
fn padding_rows_receive_no_gradient() {
    let _one = lock();
    config("seed", 2);
    let device = Device::cuda(0).unwrap();
    let run = |at: &Device| {
        let w = Param::new("w", Array::generate(&[5, 33], DType::F32, |i| (i % 7) as f64).to(at).unwrap());
        let ids = Tensor::new(Array::generate(&[3, 65], DType::U32, |i| (i * 7 % 5) as f64).to(at).unwrap());
        let y = embedding(&w, &ids, Some(2), None).unwrap().square().unwrap();
        let grads = y.sum(&[1, 2], false).unwrap().backward().unwrap();
        let g = grads.param(&w).unwrap();
        (g.sum().unwrap().to_f64(), g.sample_sq_norms().unwrap())
    };
    let (want, got) = (run(&Device::Cpu), run(&device));
    assert!(want.0[2 * 33..3 * 33].iter().all(|&x| x == 0.0) && want.0[0..33].iter().any(|&x| x != 0.0));
    close("sum", &got.0, &want.0, 1e-5);
    close("norms", &got.1, &want.1, 1e-5);
}

/// What only moves or compares elements, in every dtype.
#[test]
fn moves_and_comparisons_of_every_dtype_agree_with_the_cpu() {
    let _one = lock();
    config("seed", 4);
    let device = Device::cuda(0).unwrap();
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16, DType::U32, DType::I64, DType::U8] {
        let run = |at: &Device| -> Vec<Vec<f64>> {
            let array = |shape: &[usize], k: usize| {
                Array::generate(shape, DType::F64, |i| (i * k % 23) as f64).cast(dtype).to(at).unwrap()
            };
            let (a, b) = (Tensor::new(array(&[20, 24], 7)), Tensor::new(array(&[20, 24], 5)));
            let ids = |n: usize, dtype| {
                Tensor::new(Array::generate(&[n], DType::F64, |i| (i * 3 % 20) as f64).cast(dtype).to(at).unwrap())
            };
            let mask = a.lt(&b).unwrap();
            let picks = Tensor::new(Array::generate(&[20, 3], DType::U32, |i| (i % 24) as f64).to(at).unwrap());
            let mut all = vec![
                a.array().transpose(0, 1).unwrap().contiguous(),
                a.array().step(1, 2).unwrap().contiguous(),
                a.index_select(0, ids(9, DType::U32)).unwrap().into_array(),
                a.index_select(0, ids(9, DType::I64)).unwrap().into_array(),
                a.gather(1, &picks).unwrap().into_array(),
                Tensor::concat(&[&a, &b], 0).unwrap().into_array(),
                ids(5, DType::U32).one_hot(20, dtype).unwrap().into_array(),
                Tensor::select(&mask, &a, &b).unwrap().into_array(),
                Array::full(&[7], 3.0, (dtype, at)),
                Array::arange(11, (dtype, at)),
            ];
            for compare in [Tensor::eq, Tensor::ne, Tensor::lt, Tensor::le, Tensor::gt, Tensor::ge] {
                all.push(compare(&a, &b).unwrap().into_array());
            }
            all.iter().map(|a| a.to_f64()).collect()
        };
        assert_eq!(run(&device), run(&Device::Cpu), "{dtype}");
    }
}

/// A step whose losses are 16 bits wide.
#[test]
fn losses_of_16_bits_are_added_up() {
    let _one = lock();
    let device = Device::cuda(0).unwrap();
    for dtype in [DType::BF16, DType::F16] {
        let w = Param::new("w", Array::ones(&[1, 4], DType::F32).to(&device).unwrap());
        let mut step = PlainStep::new(std::slice::from_ref(&w), Sgd::default(), Schedule::constant(0.1)).unwrap();
        let x = Tensor::randn(&[8, 4], DType::F32, 1, &device).unwrap().cast(dtype).unwrap();
        let report = step
            .run([()], |_| linear(&x, &w, Layout::OutIn, None, Activation::None, None)?.square()?.sum(&[1], false))
            .unwrap();
        assert!(report.loss().unwrap() > 0.0);
    }
}
