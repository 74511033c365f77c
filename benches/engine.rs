//! The hot paths, with their FLOPs. Run them with `cargo bench`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prismgrad::kernels::gemm::{Mat, matmul};
use prismgrad::nn::{Ctx, Moe, MoeConfig, Params};
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::ops::combine::combine;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::norm::layer_norm;
use prismgrad::ops::route::{Choice, Gate, route};
use prismgrad::random::{NoiseKey, add_gaussian};
use prismgrad::{Array, DType, Param, ParamGrad, Tensor};

fn wave(shape: &[usize]) -> Array {
    Array::generate(shape, DType::F32, |i| (i as f64 * 0.37).sin())
}

fn gemm(c: &mut Criterion) {
    let (m, k, n) = (2048, 256, 1024);
    let (a, b, mut out) = (wave(&[m, k]), wave(&[k, n]), vec![0f32; m * n]);
    let mut g = c.benchmark_group("gemm");
    g.throughput(Throughput::Elements(2 * (m * k * n) as u64));
    g.bench_function("2048x256x1024 (elements are FLOPs)", |bench| {
        bench.iter(|| {
            let (a, b) = (a.as_slice::<f32>().unwrap(), b.as_slice::<f32>().unwrap());
            matmul(Mat::new(a, m, k), Mat::new(b, k, n), false, &mut out)
        })
    });
}

/// Queries of a linear layer's factored gradient, for 8 samples of 256 rows and a weight of 256 × 1024.
fn queries(c: &mut Criterion) {
    let (w, x) = (Param::new("w", wave(&[256, 1024])), Tensor::new(wave(&[8, 256, 256])));
    let y = linear(&x, &w, Layout::InOut, None, Activation::None, None).unwrap();
    let losses = y.square().unwrap().sum(&[1, 2], false).unwrap();
    let grads = losses.backward().unwrap();
    let g: &ParamGrad = grads.param(&w).unwrap();
    let mut group = c.benchmark_group("factored gradient");
    group.sample_size(20).throughput(Throughput::Elements(2 * 2048 * 256 * 1024));
    group.bench_function("sum", |b| b.iter(|| g.sum().unwrap()));
    group.bench_function("sample_sq_norms", |b| b.iter(|| g.sample_sq_norms().unwrap()));
    group.bench_function("weighted_sum", |b| b.iter(|| g.weighted_sum(&[0.5; 8]).unwrap()));
    group.bench_function("clipped_sum", |b| b.iter(|| g.clipped_sum(&[0.0; 8], &|s| 1.0 / s.sqrt()).unwrap()));
}

fn layers(c: &mut Criterion) {
    let mut group = c.benchmark_group("layers, forward and backward");
    group.sample_size(20);
    let qkv: Vec<Tensor> = (0..3).map(|_| Tensor::leaf(wave(&[8, 256, 4, 64]))).collect();
    let pairs = 8 * 4 * 256 * 257 / 2;
    group.throughput(Throughput::Elements(14 * 64 * pairs));
    group.bench_function("causal attention [8, 256, 4, 64]", |b| {
        let o = AttentionOptions::new(Span::Causal);
        b.iter(|| attention(&qkv[0], &qkv[1], &qkv[2], &o).unwrap().backward().unwrap())
    });
    let x = Tensor::leaf(wave(&[8, 256, 1024]));
    let (gain, bias) = (Param::new("g", wave(&[1024])), Param::new("b", wave(&[1024])));
    group.throughput(Throughput::Bytes(5 * 8 * 256 * 1024 * 4));
    group.bench_function("layer norm [8, 256, 1024]", |b| {
        b.iter(|| layer_norm(&x, Some(&gain), Some(&bias), 1e-5, None).unwrap().backward().unwrap())
    });
}

/// 2,048 tokens of width 256, each through two of 8 experts with 1,024 hidden units.
fn experts(c: &mut Criterion) {
    let params = Params::new(1, DType::F32);
    let moe = Moe::new(&params, 256, &MoeConfig::new(8, 2, 1024)).unwrap();
    let x = Tensor::leaf(wave(&[8, 256, 256]));
    let logits = Tensor::leaf(Array::generate(&[2048, 8], DType::F32, |i| (i as f64 * 12.9898).sin()));
    let mut group = c.benchmark_group("mixture of experts");
    group.sample_size(20).throughput(Throughput::Elements(12 * 4096 * 256 * 1024));
    group.bench_function("layer, forward and backward (elements are FLOPs)", |b| {
        b.iter(|| moe.forward(&x, &Ctx::train(0)).unwrap().output.backward().unwrap())
    });
    group.throughput(Throughput::Elements(2048));
    let choice = Choice { top_k: 2, gate: Gate::Softmax, renormalise: true };
    group.bench_function("route", |b| b.iter(|| route(&logits, &choice, None).unwrap()));
    let (weights, routing) = route(&logits, &choice, None).unwrap();
    let rows = Tensor::leaf(wave(&[4096, 256]));
    group.bench_function("combine, forward and backward", |b| {
        b.iter(|| combine(&rows, &weights.detach(), &routing).unwrap().backward().unwrap())
    });
}

fn noise(c: &mut Criterion) {
    let (key, mut out) = (NoiseKey::from_seed_for_tests(1), vec![0f32; 1 << 20]);
    let mut group = c.benchmark_group("noise");
    group.throughput(Throughput::Elements(1 << 20));
    group.bench_function("ChaCha20 Gaussian, 1 Mi elements", |b| b.iter(|| add_gaussian(&key, 0, 0, 1.0, &mut out)));
}

criterion_group!(benches, gemm, queries, layers, experts, noise);
criterion_main!(benches);
