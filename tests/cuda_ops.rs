//! Every op of the registry on the emulated CUDA device, beside the CPU: values, gradients of inputs, gradients of
//! parameters, under several schedules with all checks on.
#![cfg(feature = "emulator")]

mod common {
    pub mod close;
    pub mod gpt;
    pub mod scratch;
    pub mod tokens;
}

use common::close::{close, differs};
use common::gpt::gpt;
use common::scratch::Scratch;
use common::tokens::tokens;
use prismgrad::check::{self, Gen};
use prismgrad::device::emulator::{config, lock, stat};
use prismgrad::nn::Ctx;
use prismgrad::ops::grouped::grouped_linear;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::segment::Segments;
use prismgrad::ops::{Differentiable, registry};
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

struct Outcome {
    value: Vec<f64>,
    inputs: Vec<Vec<f64>>,
    params: Vec<(String, Vec<f64>, Vec<f64>)>,
    /// How often the host waited for the device during forward and backward.
    waits: u64,
}

fn run(
    make: fn(&mut Gen) -> Result<check::Case>,
    (seed, dtype): (u64, DType),
    differentiable: bool,
    device: &Device,
) -> Result<Outcome> {
    let case = make(&mut Gen::with_dtype(seed, dtype))?;
    case.params.iter().try_for_each(|p| p.to(device))?;
    let inputs: Vec<Tensor> = case.inputs.iter().map(|a| Ok(Tensor::leaf(a.to(device)?))).collect::<Result<_>>()?;
    let before = stat("synchronisations");
    let y = (case.run)(&inputs)?;
    let mut grads = Gradients::default();
    if differentiable {
        assert_eq!(y.device(), *device, "the result is where the operands are");
        let seed = Array::generate(y.shape(), y.dtype(), |i| ((i * 37 % 11) as f64 - 5.0) / 7.0).to(device)?;
        y.backward_from(seed, false, &mut grads)?;
    }
    let waits = stat("synchronisations") - before;
    let mut out = Outcome { value: y.array().to_f64(), inputs: Vec::new(), params: Vec::new(), waits };
    if differentiable {
        for t in &inputs {
            let g = grads.of(t);
            out.inputs.push(g.map_or(Vec::new(), |g| g.to_f64()));
        }
        for p in &case.params {
            if let Some(g) = grads.param(p) {
                let norms = if g.expect_samples().is_ok() { g.sample_sq_norms()? } else { Vec::new() };
                out.params.push((p.name().to_string(), g.sum()?.to_f64(), norms));
            }
        }
    }
    Ok(out)
}

#[test]
fn every_op_agrees_with_the_cpu() {
    let _one = lock();
    let device = Device::cuda(0).unwrap();
    let (mut waiting, mut cases, mut wrong) = (BTreeSet::new(), 0, Vec::new());
    for op in registry() {
        let differentiable = matches!(op.differentiable, Differentiable::Yes);
        for (k, &make) in op.cases.iter().enumerate() {
            for (dtype, tolerance, seed, preempt) in runs() {
                config("seed", seed as i64);
                config("preempt", preempt);
                let what = format!("{} case {k} seed {seed} {dtype}", op.name);
                cases += 1;
                let go = |device: &Device| run(make, (100 + seed, dtype), differentiable, device);
                let (want, got) = match (go(&Device::Cpu), go(&device)) {
                    (Ok(want), Ok(got)) => (want, got),
                    (want, got) => {
                        let said = [want.err(), got.err()].map(|e| e.map(|e| e.to_string()));
                        wrong.push(format!("{what}: CPU {:?}, device {:?}", said[0], said[1]));
                        continue;
                    }
                };
                if got.waits > 0 {
                    waiting.insert(op.name);
                }
                wrong.extend(differs(&what, &got.value, &want.value, tolerance));
                for (i, (g, w)) in got.inputs.iter().zip(&want.inputs).enumerate() {
                    wrong.extend(differs(&format!("{what}, gradient of input {i}"), g, w, tolerance));
                }
                for (g, w) in got.params.iter().zip(&want.params) {
                    wrong.extend(differs(&format!("{what}, gradient of {}", g.0), &g.1, &w.1, tolerance));
                    wrong.extend(differs(&format!("{what}, norms of {}", g.0), &g.2, &w.2, 2.0 * tolerance));
                }
            }
        }
    }
    assert!(cases > 1000, "{cases} cases");
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(waiting.is_empty(), "ops that make the host wait for the device: {waiting:?}");
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
        let x = Array::generate(&[40], DType::F64, |i| i as f64 * 1.37).cast(from);
        for to in all {
            let want = Tensor::new(x.clone()).cast(to).unwrap();
            let got = Tensor::new(x.to(&device).unwrap()).cast(to).unwrap();
            assert_eq!(got.dtype(), to);
            assert_eq!(got.array().to_f64(), want.array().to_f64(), "{from} to {to}");
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
    let (mut products, mut exact) = (vec![], vec![]);
    for at in [&Device::Cpu, &device] {
        let (a, b) = (random(&[20, 48], 1, at), random(&[48, 24], 2, at));
        let t = |x: &Tensor| x.transpose(0, 1).unwrap().array().contiguous();
        let (at_, bt) = (Tensor::new(t(&a)), Tensor::new(t(&b)));
        let back = |x: &Tensor| x.transpose(0, 1).unwrap();
        let mut all: Vec<f64> = vec![];
        for (x, y) in [(&a, &b), (&back(&at_), &b), (&a, &back(&bt)), (&back(&at_), &back(&bt))] {
            all.extend(x.matmul(y).unwrap().array().to_f64());
        }
        // Experts: rows of two groups.
        let groups = Segments::lengths(&[12, 8]);
        let samples = Samples::uniform(20, 1);
        for layout in [Layout::OutIn, Layout::InOut] {
            let w = Param::new(
                "w",
                random(if layout == Layout::OutIn { &[2, 24, 48] } else { &[2, 48, 24] }, 3, at).into_array(),
            );
            let y = grouped_linear(&a, &w, layout, None, &groups, &samples).unwrap();
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
                a.index_select(0, &ids(9, DType::U32)).unwrap().into_array(),
                a.index_select(0, &ids(9, DType::I64)).unwrap().into_array(),
                a.gather(1, &picks).unwrap().into_array(),
                Tensor::concat(&[&a, &b], 0).unwrap().into_array(),
                ids(5, DType::U32).one_hot(20, dtype).unwrap().into_array(),
                Tensor::select(&mask, &a, &b).unwrap().into_array(),
                Array::full_at(at, &[7], 3.0, dtype).unwrap(),
                Array::arange_at(at, 11, dtype).unwrap(),
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
