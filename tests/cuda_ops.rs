//! Every op of the registry on the emulated CUDA device, beside the CPU: values, gradients of inputs, gradients of
//! parameters, under several schedules with all checks on.
#![cfg(feature = "emulator")]

mod common {
    pub mod close;
    pub mod gpt;
    pub mod tokens;
}

use common::close::{close, differs};
use common::gpt::gpt;
use common::tokens::tokens;
use prismgrad::check::{self, Gen};
use prismgrad::device::emulator::{config, lock, stat};
use prismgrad::nn::Ctx;
use prismgrad::ops::{Differentiable, registry};
use prismgrad::{Array, DType, Device, Gradients, Result, Tensor};
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
