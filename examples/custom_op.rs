//! An op of your own, with exact per-sample gradients: `y = x·exp(w)`, a positive learned scale per channel. Shows the
//! forward pass on arrays, the backward rule with its factor, a CUDA kernel beside the loop for the CPU, and the checks that
//! such an op should pass.
//!
//! ```text
//! cargo run --release --example custom_op                             # on a GPU where there is one, else on the CPU
//! PRISMGRAD_DEVICE=cuda cargo run --features emulator --example custom_op     # on the emulated GPU
//! ```

#[path = "common/args.rs"]
mod args;

use prismgrad::array::ArrayArguments;
use prismgrad::check::{Case, Gen, gradients, independence, per_sample};
use prismgrad::device::cuda::{CudaModule, Gpu, Launch};
use prismgrad::ops::{Differentiable, FactorRule, OpInfo};
use prismgrad::{Array, Cotangents, DType, Device, Error, Factor, Param, Result, Rule, Samples, Tensor, with_float};
use serde_json::json;
use std::sync::Arc;

/// The kernels, compiled when the op first runs on a GPU.
static KERNELS: CudaModule = CudaModule::new("exp_scale", include_str!("custom_op.cu"));

/// The op's name for messages, the kind of factor that it gives for its parameters, and random cases to check it on.
static EXP_SCALE: OpInfo = OpInfo {
    name: "exp_scale",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["scaled row sum"]),
    cases: &[|g: &mut Gen| {
        let (b, t, c) = (g.size(1, 4), g.size(1, 3), g.size(1, 5));
        let w = Param::new("scale", g.array(&[c]));
        let x = g.array(&[b, t, c]);
        let params = vec![w.clone()];
        Ok(Case::new(vec![x], move |x| exp_scale(&x[0], &w)).params(params).samples(b))
    }],
};

/// The data for the backward pass: the output, the parameter, and its value at the time of the forward pass.
struct Back {
    y: Array,
    w: Param,
    value: Array,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &EXP_SCALE
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        if back.needs(0) {
            // ∂y/∂x = exp(w): the op itself, applied to the gradient.
            back.input(0, scaled(&grad, &self.value)?);
        }
        // ∂y/∂w = y: each row n adds gradₙ ⊙ yₙ, and row n belongs to sample n / T. From this the engine computes sums, norms, clipping and
        // inner products per sample; none of them is written here.
        let rows = [self.y.numel() / self.w.numel(), self.w.numel()];
        let samples = Samples::leading(self.y.shape(), 1);
        let (grad, scale) = (grad.contiguous().reshape(&rows)?, self.y.reshape(&rows)?);
        back.param(&self.w, Factor::ScaledRowSum { grad, scale, samples });
        Ok(())
    }
}

/// The computation on arrays, in f32 or f64, on the device of `x`.
fn scaled(x: &Array, w: &Array) -> Result<Array> {
    match &x.device() {
        Device::Cpu => on_the_cpu(&x.contiguous(), w),
        Device::Cuda(gpu) => on_a_gpu(gpu, &x.contiguous(), &w.to(&x.device())?.contiguous()),
    }
}

fn on_the_cpu(x: &Array, w: &Array) -> Result<Array> {
    let mut y = Array::zeros(x.shape(), x.dtype());
    with_float!("exp_scale", x.dtype(), |T| {
        let factors: Vec<T> = w.as_slice::<T>()?.iter().map(|w| w.exp()).collect();
        let (from, to) = (x.as_slice::<T>()?, y.as_mut_slice::<T>()?);
        for (i, (y, &x)) in to.iter_mut().zip(from).enumerate() {
            *y = x * factors[i % factors.len()];
        }
        Ok(())
    })?;
    Ok(y)
}

fn on_a_gpu(gpu: &Arc<Gpu>, x: &Array, w: &Array) -> Result<Array> {
    let mut y = Array::zeros(x.shape(), (x.dtype(), &x.device()));
    let (n, channels) = (x.numel() as i64, w.numel() as i64);
    let name = if x.dtype() == DType::F64 { "exp_scale_f64" } else { "exp_scale_f32" };
    with_float!("exp_scale", x.dtype(), |T| {
        let launch = Launch::of(gpu, KERNELS.kernel(gpu, name)?).grid(x.numel().div_ceil(256), 1, 1).block(256);
        launch.input::<T>(x).input::<T>(w).output::<T>(&mut y).val(n).val(channels).run()
    })?;
    Ok(y)
}

/// `x [B, …, C]` times `exp(w [C])`.
fn exp_scale(x: &Tensor, w: &Param) -> Result<Tensor> {
    if w.numel() == 0 || x.rank() < 2 || w.shape() != &x.shape()[x.rank() - 1..] {
        return Err(Error::shape("exp_scale", format!("input {:?} for {} {:?}", x.shape(), w.name(), w.shape())));
    }
    let value = w.value().cast(x.dtype());
    let y = scaled(x.array(), &value)?;
    Ok(Tensor::record(y.clone(), &[x], &[w], || Back { y, w: w.clone(), value }))
}

const OPTIONS: &[args::Opt] = &[("cases", "20", "5", "random cases to check the op on")];

fn run() -> Result<()> {
    let args = args::Args::parse("custom_op", "Checks an op that is defined in this example.", OPTIONS);
    let cases = args.get("cases", "a whole number from 1 to 1000", |n: &u64| (1..=1000).contains(n));
    let device = Device::from_env()?;
    let mut folder = args.folder(&json!({"cases": cases, "device": device.to_string()}))?;
    let [mut derivative, mut sample, mut coupling, mut apart] = [0.0f64; 4];
    for seed in 0..cases {
        let here = EXP_SCALE.cases[0](&mut Gen::new(seed))?;
        let case = EXP_SCALE.cases[0](&mut Gen::new(seed))?.to(&device)?;
        let (a, b) = (here.losses(seed)?.array().to_f64(), case.losses(seed)?.array().to_f64());
        apart = a.iter().zip(b).fold(apart, |most, (a, b)| most.max((a - b).abs()));
        derivative = derivative.max(gradients(&case, seed, 3, 1e-7)?.worst);
        sample = sample.max(per_sample(&|| case.losses(seed), &case.params, seed, 1e-10)?.worst());
        let losses = |x: &Tensor| (case.run)(std::slice::from_ref(x))?.sum(&[1, 2], false);
        coupling = coupling.max(independence(&losses, &case.inputs[0], seed)?);
    }
    println!("checked on {device}");
    if device.is_cuda() {
        println!("the kernel against the loop on the CPU:      worst error {apart:.1e}");
    }
    println!("backward against central differences:        worst error {derivative:.1e}");
    println!("factored against one-by-one gradients:       worst error {sample:.1e}");
    println!("a loss moved by another sample's change:     at most     {coupling:.1e}");
    folder.finish(&json!({"derivative": derivative, "per_sample": sample, "coupling": coupling, "devices": apart}))?;
    match (coupling > 1e-12, apart > 1e-12) {
        (true, _) => Err(Error::invalid("exp_scale", "it mixes samples")),
        (_, true) => Err(Error::invalid("exp_scale", "the kernel and the loop on the CPU differ")),
        _ => Ok(()),
    }
}

fn main() {
    args::finish(run());
}
