//! Every op of the registry on the emulated CUDA device, beside the CPU: values, gradients of inputs, gradients of
//! parameters, under several schedules with all checks on.
#![cfg(feature = "emulator")]

use prismgrad::check::{self, Gen};
use prismgrad::emulator::{config, lock, stat};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::Ctx;
use prismgrad::ops::{Differentiable, registry};
use prismgrad::{Array, DType, Device, Gradients, Result, Tensor};
use std::collections::BTreeSet;

struct Outcome {
    value: Vec<f64>,
    inputs: Vec<Vec<f64>>,
    params: Vec<(String, Vec<f64>, Vec<f64>)>,
    /// How often the host waited for the device during forward and backward.
    waits: u64,
}

fn run(make: fn(&mut Gen) -> Result<check::Case>, seed: u64, differentiable: bool, device: &Device) -> Result<Outcome> {
    let case = make(&mut Gen::new(seed))?;
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

fn close(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= 1e-10 * scale || (g.is_nan() && w.is_nan()),
            "{what}[{i}]: {g} on the device, {w} on the CPU"
        );
    }
}

#[test]
fn every_op_agrees_with_the_cpu() {
    let _one = lock();
    let device = Device::cuda(0).unwrap();
    let (mut waiting, mut cases) = (BTreeSet::new(), 0);
    for op in registry() {
        let differentiable = matches!(op.differentiable, Differentiable::Yes);
        for (k, &make) in op.cases.iter().enumerate() {
            for (seed, preempt) in [(0, 0), (1, 0), (2, 0), (3, 20), (4, 7)] {
                config("seed", seed as i64);
                config("preempt", preempt);
                let what = format!("{} case {k} seed {seed}", op.name);
                let want =
                    run(make, 100 + seed, differentiable, &Device::Cpu).unwrap_or_else(|e| panic!("{what}: {e}"));
                let got = run(make, 100 + seed, differentiable, &device).unwrap_or_else(|e| panic!("{what}: {e}"));
                if got.waits > 0 {
                    waiting.insert(op.name);
                }
                close(&what, &got.value, &want.value);
                for (i, (g, w)) in got.inputs.iter().zip(&want.inputs).enumerate() {
                    close(&format!("{what}, gradient of input {i}"), g, w);
                }
                for (g, w) in got.params.iter().zip(&want.params) {
                    close(&format!("{what}, gradient of {}", g.0), &g.1, &w.1);
                    close(&format!("{what}, norms of {}", g.0), &g.2, &w.2);
                }
                cases += 1;
            }
        }
    }
    assert!(cases > 250, "{cases} cases");
    assert!(waiting.is_empty(), "ops that make the host wait for the device: {waiting:?}");
}

/// A whole model: losses and every parameter's gradient and per-sample norms.
#[test]
fn a_gpt_agrees_with_the_cpu() {
    let _one = lock();
    config("seed", 3);
    let device = Device::cuda(0).unwrap();
    let make = |device: &Device| {
        let model = Gpt::with_dtype(GptConfig::small(17, 6, 2, 8, 2), 3, DType::F64).unwrap();
        model.params().to(device).unwrap();
        let ids = |k: usize| Array::generate(&[3, 6], DType::U32, |i| ((i * 7 + i * i * 3 + k) % 17) as f64);
        let losses = model.losses(&ids(1), &ids(6), &Ctx::eval()).unwrap();
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
    close("losses", &got.0, &want.0);
    for (g, w) in got.1.iter().zip(&want.1) {
        close(&g.0, &g.1, &w.1);
        close(&g.0, &g.2, &w.2);
    }
}
