//! The cases on which speed is compared. Each gives one JSON line:
//!
//! ```text
//! cargo run --release --example bench_cases -- [substring…] [--threads N] [--min-seconds S] [--isolate] [--profile]
//! ```
//!
//! `gemm/MxKxN`, `linear/PART/MxKxN` (a layer's parts beside bare products of the same shapes: `gemm_share`), `gpt/S`, `gpt/M`, `mlp`,
//! `elt/OP`, `attn/SPAN[_fwd][/N]` (8 heads of 64 over 2,048 positions, or N), `moe/top2` (2,048 tokens of width 256, two each of 8 experts
//! of 1,024, forwards and backwards, beside its products), `hyper/grid` (one layer of HyTrel, width 128, 4 heads, over 256 tables of 11 × 6
//! cells, forwards and backwards), `hyper/sum/N` (sums of rows of 16 over N incidences, forwards and backwards), `merge/4` (four vectors
//! and a base added in a pool), `dp/MODEL/STYLE`. A training case is a whole step: forward, backward, optimizer. `--isolate` runs each case
//! in a process of its own, so that `peak_rss_mb` is the case's; `base_rss_mb` is what the process held before it. `ceiling_share` is the
//! case's rate divided by the rate that this machine reached just before: the best of three products of 1024 × 1024 matrices (4096 on a
//! GPU), or the best of three copies of 64 MiB (256 on a GPU). `--profile` prints a table of ops after each case. `PRISMGRAD_DEVICE=cuda`
//! runs all of it on a GPU, including `gpt/124M`.

use clap::{Arg, ArgAction, Command, value_parser};
use prismgrad::data::Hypergraph;
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::hypergraph::HyperTrans;
use prismgrad::nn::{Balance, Ctx, Linear, Moe, MoeConfig, Params};
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::ops::incidence::Incidence;
use prismgrad::ops::linear::Activation;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::ops::norm::layer_norm;
use prismgrad::ops::segment::Segments;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::ClipFn;
use prismgrad::random::{NoiseKey, Rng, philox};
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::systems::editing::{Cost, Merge, Tags, VectorPool};
use prismgrad::{Array, DType, Device, Param, Result, Tensor, profile};
use std::sync::OnceLock;
use std::time::Instant;

/// The device of all cases.
static DEVICE: OnceLock<Device> = OnceLock::new();

fn device() -> &'static Device {
    DEVICE.get_or_init(Device::cpu)
}

/// The work of a case.
enum Work {
    Gflop(f64),
    Gigabytes(f64),
    Tokens(f64, f64),
    /// The case is timed in turn with the bare products in it.
    Products(f64, Step),
    None,
}

/// One loss per sample.
type Losses = Box<dyn Fn() -> Result<Tensor>>;
type Step = Box<dyn FnMut() -> Result<()>>;
type Make = fn(&str) -> Result<(Step, Work, usize)>;

const NAMES: &[(&str, Make)] = &[
    ("gemm/1024x1024x1024", gemm),
    ("gemm/4096x768x3072", gemm),
    ("gemm/2048x256x1024", gemm),
    ("linear/forward/2048x256x768", linear),
    ("linear/gelu/2048x256x1024", linear),
    ("linear/gelu/2048x384x1536", linear),
    ("linear/forward/2048x1024x256", linear),
    ("linear/backward/2048x256x768", linear),
    ("linear/backward/2048x1024x256", linear),
    ("linear/backward/2048x384x1536", linear),
    ("gpt/S", gpt),
    ("gpt/M", gpt),
    ("gpt/124M", gpt),
    ("mlp", mlp),
    ("elt/copy", elt),
    ("elt/add", elt),
    ("elt/gelu", elt),
    ("elt/gelu_bwd", elt),
    ("elt/softmax", elt),
    ("elt/softmax_bwd", elt),
    ("elt/layernorm", elt),
    ("elt/layernorm_bwd", elt),
    ("elt/sum", elt),
    ("merge/4", merge),
    ("attn/causal", attn),
    ("attn/causal_fwd", attn),
    ("attn/window256", attn),
    ("attn/window256_fwd", attn),
    ("attn/block256", attn),
    ("attn/block256_fwd", attn),
    ("attn/sinks252+4", attn),
    ("attn/alibi", attn),
    ("attn/causal/8192", attn),
    ("attn/window1024/8192", attn),
    ("attn/block1024/8192", attn),
    ("attn/window1024/32768", attn),
    ("attn/block1024/32768", attn),
    ("attn/causal/32768", attn),
    ("moe/top2", moe),
    ("hyper/grid", hyper),
    ("hyper/sum/100000", hyper_sum),
    ("hyper/sum/1000000", hyper_sum),
    ("hyper/sum/10000000", hyper_sum),
    ("dp/gptS/nonprivate", dp),
    ("dp/gptS/layer-wise", dp),
    ("dp/gptS/all-layer", dp),
    ("dp/gptS/param-wise", dp),
    ("dp/gptM/nonprivate", dp),
    ("dp/gptM/layer-wise", dp),
    ("dp/gptM/all-layer", dp),
    ("dp/gptM/param-wise", dp),
    ("dp/mlp/nonprivate", dp),
    ("dp/mlp/layer-wise", dp),
    ("dp/mlp/all-layer", dp),
    ("dp/mlp/param-wise", dp),
    ("dp/moe/nonprivate", dp),
    ("dp/moe/layer-wise", dp),
    ("dp/moe/all-layer", dp),
    ("dp/moe/param-wise", dp),
];

fn random(shape: &[usize], seed: u64) -> Result<Array> {
    Array::generate(shape, DType::F32, |i| 2.0 * philox::uniform(seed, 7, i as u64) - 1.0).to(device())
}

/// Random numbers in the dtype of activations.
fn activations(shape: &[usize], seed: u64) -> Result<Array> {
    Ok(random(shape, seed)?.cast(activation_dtype()))
}

fn ids(shape: &[usize], below: usize, seed: u64) -> Result<Array> {
    Array::generate(shape, DType::U32, |i| (philox::bits(seed, 9, i as u64) % below as u64) as f64).to(device())
}

fn gemm(name: &str) -> Result<(Step, Work, usize)> {
    let d: Vec<usize> = name[5..].split('x').filter_map(|x| x.parse().ok()).collect();
    let (m, k, n) = (d[0], d[1], d[2]);
    let (a, b) = (Tensor::new(activations(&[m, k], 1)?), Tensor::new(activations(&[k, n], 2)?));
    let step = move || a.matmul(&b).map(drop);
    Ok((Box::new(step), Work::Gflop(2.0 * (m * k * n) as f64 / 1e9), 0))
}

/// A linear layer with bias, beside only the products in it: forwards (with GELU, which keeps the pre-activation, or without), or forwards
/// and backwards with the contraction of the weight's gradient.
fn linear(name: &str) -> Result<(Step, Work, usize)> {
    let (part, shape) = name[7..].split_once('/').unwrap_or_default();
    let d: Vec<usize> = shape.split('x').filter_map(|x| x.parse().ok()).collect();
    let (m, k, n) = (d[0], d[1], d[2]);
    let params = Params::new(1, DType::F32);
    let layer = Linear::new(&params, k, n)?;
    params.to(device())?;
    let x = Tensor::leaf(activations(&[8, m / 8, k], 1)?);
    let (rows, seed) = (Tensor::new(x.array().reshape(&[m, k])?), activations(&[8, m / 8, n], 2)?);
    let (w, g) = (Tensor::new(layer.weight().value().copy().cast(x.dtype())), Tensor::new(seed.reshape(&[m, n])?));
    let backward = part == "backward";
    let act = if part == "gelu" { Activation::Gelu } else { Activation::None };
    let step = move || {
        let y = layer.forward_act(&x, act, &Ctx::train(0))?;
        if backward {
            let mut grads = prismgrad::Gradients::default();
            y.backward_from(seed.clone(), false, &mut grads)?;
            grads.param(layer.weight()).map(|g| g.sum()).transpose()?;
        }
        Ok(())
    };
    let bare = move || {
        rows.matmul(&w.transpose(0, 1)?)?;
        if backward {
            g.matmul(&w)?;
            g.transpose(0, 1)?.matmul(&rows)?;
        }
        Ok(())
    };
    let products = if backward { 3.0 } else { 1.0 };
    Ok((Box::new(step), Work::Products(products * 2.0 * (m * k * n) as f64 / 1e9, Box::new(bare)), 0))
}

fn gpt_model(name: &str) -> Result<(Gpt, Array, Array)> {
    let (vocab, t, layers, d, heads) = match &name[4..] {
        "S" => (512, 256, 4, 256, 4),
        "124M" => (50_257, 1024, 12, 768, 12),
        _ => (4096, 256, 6, 384, 6),
    };
    let mut config = GptConfig::small(vocab, t, layers, d, heads);
    config.tie_word_embeddings = name.ends_with("124M");
    let model = Gpt::new(config, 1)?;
    model.params().to(device())?;
    let batch = if name.ends_with("124M") { 16 } else { 8 };
    Ok((model, ids(&[batch, t], vocab, 3)?, ids(&[batch, t], vocab, 4)?))
}

/// The dtype given by `--dtype`.
static DTYPE: std::sync::OnceLock<DType> = std::sync::OnceLock::new();

/// The dtype of activations; parameters are f32 everywhere.
fn activation_dtype() -> DType {
    DTYPE.get().copied().unwrap_or(DType::F32)
}

/// The dtype of a case's activations.
fn dtype(name: &str) -> DType {
    if name.ends_with("124M") { DType::BF16 } else { activation_dtype() }
}

/// The context for training with a case's activations.
fn ctx(name: &str) -> Ctx {
    Ctx::train(0).with_dtype(dtype(name))
}

fn gpt(name: &str) -> Result<(Step, Work, usize)> {
    let (model, x, y) = gpt_model(name)?;
    let params = model.params().count();
    let mut step = PlainStep::new(&model.params().all(), AdamW::default(), Schedule::constant(1e-3))?;
    // Only products are counted, three times the forward pass, with attention halved for causality.
    let gflop = match &name[4..] {
        "S" => 43.5,
        "124M" => 16.0 * 1024.0 * (6.0 * 123.7e6 + 6.0 * 12.0 * 768.0 * 1024.0) / 1e9,
        _ => 157.0,
    };
    let tokens = x.numel() as f64;
    let ctx = ctx(name);
    let run = move || step.run([()], |_| model.losses(&x, &y, &ctx)).map(|_| ());
    Ok((Box::new(run), Work::Tokens(tokens, gflop), params))
}

struct Mlp([Linear; 3]);
impl Mlp {
    fn new(params: &Params) -> Result<Mlp> {
        let l = |n: &str, i, o| Linear::new(&params.at(n), i, o);
        Ok(Mlp([l("0", 784, 512)?, l("1", 512, 512)?, l("2", 512, 10)?]))
    }
    fn losses(&self, x: &Tensor, y: &Array) -> Result<Tensor> {
        let c = ctx("mlp");
        let x = &x.cast(c.dtype.unwrap_or(DType::F32))?;
        let h = self.0[0].forward_act(x, Activation::Relu, &c)?;
        let h = self.0[1].forward_act(&h, Activation::Relu, &c)?;
        cross_entropy(&self.0[2].forward(&h, &c)?, y, &CrossEntropy::default())
    }
}

fn mlp(_: &str) -> Result<(Step, Work, usize)> {
    let params = Params::new(1, DType::F32);
    let model = Mlp::new(&params)?;
    params.to(device())?;
    let (x, y) = (Tensor::new(random(&[256, 784], 1)?), ids(&[256], 10, 2)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(1e-3))?;
    let gflop = 6.0 * 256.0 * (784.0 * 512.0 + 512.0 * 512.0 + 5120.0) / 1e9;
    Ok((Box::new(move || step.run([()], |_| model.losses(&x, &y)).map(|_| ())), Work::Gflop(gflop), params.count()))
}

fn elt(name: &str) -> Result<(Step, Work, usize)> {
    let (op, shape) = (name[4..].to_string(), [16384, 1024]);
    let x = Tensor::new(activations(&shape, 1)?);
    let y = Tensor::new(activations(&shape, 2)?);
    let (w, b) =
        (Param::new("w", Array::ones(&[1024], DType::F32)), Param::new("b", Array::zeros(&[1024], DType::F32)));
    w.to(device())?;
    b.to(device())?;
    w.set_trainable(false);
    b.set_trainable(false);
    let bytes = ((activation_dtype().size() * 16) << 20) as f64 / 1e9;
    let forward = move |op: &str, x: &Tensor| match op {
        "gelu" => x.gelu(),
        "softmax" => x.softmax(-1),
        _ => layer_norm(x, Some(&w), Some(&b), 1e-5, None),
    };
    let passes = match op.as_str() {
        "add" | "gelu_bwd" | "softmax_bwd" | "layernorm_bwd" => 3.0,
        "sum" => 1.0,
        _ => 2.0,
    };
    let step: Step = match op.as_str() {
        "copy" => Box::new(move || {
            x.array().copy();
            Ok(())
        }),
        "add" => Box::new(move || x.add(&y).map(|_| ())),
        "sum" => Box::new(move || x.sum_all().map(|_| ())),
        op if op.ends_with("_bwd") => {
            let leaf = Tensor::leaf(x.into_array());
            let out = forward(op.trim_end_matches("_bwd"), &leaf)?;
            let seed = y.into_array();
            Box::new(move || out.backward_from(seed.clone(), true, &mut prismgrad::Gradients::default()))
        }
        _ => Box::new(move || forward(&op, &x).map(|_| ())),
    };
    Ok((step, Work::Gigabytes(passes * bytes), 0))
}

/// Four vectors are added to a base in memory, as for a candidate in a search over weights; six arrays of 32 MiB are read or written.
fn merge(_: &str) -> Result<(Step, Work, usize)> {
    let params = Params::new(1, DType::F32);
    let p = params.param("w", &[8192, 1024], prismgrad::nn::Init::Zeros)?;
    let set = |seed: u64| Array::generate(p.shape(), DType::F32, |i| philox::uniform(seed, 7, i as u64));
    // Differences of values between 1 and 2 are exact.
    p.set(Tensor::new(set(0)).add_scalar(1.0)?.into_array())?;
    let mut pool = VectorPool::new(&params, Tags::new())?;
    for i in 1..5 {
        p.set(Tensor::new(set(i)).add_scalar(1.0)?.into_array())?;
        pool.add(&i.to_string(), &params, Tags::new(), Cost::default())?;
    }
    params.to(device())?;
    pool.to(device())?;
    let weights = Merge::Weights(vec![0.3, 0.2, 0.4, 0.1]);
    let step = move || pool.apply(&weights, &params);
    Ok((Box::new(step), Work::Gigabytes(6.0 * 32.0 * 1048576.0 / 1e9), 0))
}

fn attn(name: &str) -> Result<(Step, Work, usize)> {
    let (case, n) = match name[5..].split_once('/') {
        Some((case, n)) => (case, n.parse().unwrap_or(2048)),
        None => (&name[5..], 2048usize),
    };
    let ((d, h), case) = ((64usize, 8usize), case.trim_end_matches("_fwd"));
    let width = |prefix: &str| case.strip_prefix(prefix).and_then(|w| w.parse().ok());
    let span = match (width("window"), width("block")) {
        (Some(w), _) => Span::Window(w),
        (_, Some(b)) => Span::Block(b),
        _ if case.starts_with("sinks") => Span::Sinks { window: 252, sinks: 4 },
        _ => Span::Causal,
    };
    let pairs = span.pairs(n) as usize;
    let shape = [1, n, h, d];
    let t = (0..3).map(|i| Ok(Tensor::leaf(activations(&shape, i)?))).collect::<Result<Vec<Tensor>>>()?;
    let seed = activations(&shape, 9)?;
    let options = AttentionOptions { alibi: case == "alibi", ..AttentionOptions::new(span) };
    let fwd_only = name.ends_with("_fwd");
    let flops = (if fwd_only { 4.0 } else { 14.0 }) * (pairs * d * h) as f64;
    let step = move || {
        if fwd_only {
            return prismgrad::no_grad(|| attention(&t[0], &t[1], &t[2], &options)).map(|_| ());
        }
        let y = attention(&t[0], &t[1], &t[2], &options)?;
        y.backward_from(seed.clone(), false, &mut prismgrad::Gradients::default())
    };
    Ok((Box::new(step), Work::Gflop(flops / 1e9), 0))
}

/// A mixture of 8 experts of width 256 and hidden width 1,024, with two experts for each token.
fn experts(params: &Params, balance: Balance) -> Result<Moe> {
    let moe = Moe::new(params, 256, &MoeConfig { balance, ..MoeConfig::new(8, 2, 1024) })?;
    params.to(device())?;
    Ok(moe)
}

/// The mixture forwards and backwards with the contraction of every gradient, beside products with the same number of rows for each expert.
fn moe(_: &str) -> Result<(Step, Work, usize)> {
    let params = Params::new(1, DType::F32);
    let moe = experts(&params, Balance::Off)?;
    let x = Tensor::leaf(activations(&[8, 256, 256], 1)?);
    let seed = activations(&[8, 256, 256], 2)?;
    let load = moe.forward(&x, &Ctx::train(0))?.stats.read()?.load;
    let (all, count) = (params.all(), params.count());
    let step = move || {
        let y = moe.forward(&x, &Ctx::train(0))?.output;
        let mut grads = prismgrad::Gradients::default();
        y.backward_from(seed.clone(), false, &mut grads)?;
        all.iter().filter_map(|p| grads.param(p)).try_for_each(|g| g.sum().map(drop))
    };
    // The operands are x, its hidden rows, and both matrices of each expert.
    let operands = load.iter().enumerate().map(|(e, &n)| {
        let t = |shape: &[usize], k: u64| Ok(Tensor::new(activations(shape, 10 * e as u64 + k)?));
        Ok([t(&[n as usize, 256], 3)?, t(&[n as usize, 1024], 4)?, t(&[256, 1024], 5)?, t(&[1024, 256], 6)?])
    });
    let operands = operands.collect::<Result<Vec<[Tensor; 4]>>>()?;
    let bare = move || {
        for [x, h, fc, proj] in &operands {
            x.matmul(fc)?;
            h.matmul(proj)?;
            x.matmul(&proj.transpose(0, 1)?)?;
            h.transpose(0, 1)?.matmul(x)?;
            h.matmul(&fc.transpose(0, 1)?)?;
            x.transpose(0, 1)?.matmul(h)?;
        }
        Ok(())
    };
    let gflop = 6.0 * 2.0 * 4096.0 * 256.0 * 1024.0 / 1e9;
    Ok((Box::new(step), Work::Products(gflop, Box::new(bare)), count))
}

/// One layer of HyTrel, forwards and backwards with the contraction of every gradient.
fn hyper(_: &str) -> Result<(Step, Work, usize)> {
    const D: usize = 128;
    let params = Params::new(1, DType::F32);
    let layer = HyperTrans::new(&params, D, 4)?;
    params.to(device())?;
    let tables = vec![Hypergraph::table(11, 6)?; 256];
    let graph = Hypergraph::batch(&tables)?.with_own_edges()?;
    let (n, m) = (graph.nodes(), graph.edges());
    let (x, e) = (Tensor::leaf(activations(&[n, D], 1)?), Tensor::leaf(random(&[m, D], 2)?));
    let seed = activations(&[n + m, D], 3)?;
    let (all, count) = (params.all(), params.count());
    let step = move || {
        let (x, e) = layer.forward(&x, &e, graph.structure(), &Ctx::train(0))?;
        let mut grads = prismgrad::Gradients::default();
        Tensor::concat(&[&x, &e], 0)?.backward_from(seed.clone(), false, &mut grads)?;
        all.iter().filter_map(|p| grads.param(p)).try_for_each(|g| g.sum().map(drop))
    };
    // The products are keys, values, both feed-forward parts and fusion; backwards takes twice as many.
    let gflop = 3.0 * (D * D * (20 * n + 24 * m)) as f64 / 1e9;
    Ok((Box::new(step), Work::Gflop(gflop), count))
}

/// Sums over random sets of 10 members on average.
fn hyper_sum(name: &str) -> Result<(Step, Work, usize)> {
    const D: usize = 16;
    let n: usize = name.rsplit('/').next().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let mut rng = Rng::new(1);
    let nodes = n / 10;
    let sets = Segments::uniform(n / 10, 10);
    let members = (0..sets.rows()).map(|_| rng.below(nodes as u64) as u32).collect();
    let sets = Incidence::new(&sets, members, nodes)?;
    let (x, seed) = (Tensor::leaf(activations(&[nodes, D], 1)?), random(&[sets.targets(), D], 2)?);
    let gigabytes = 2.0 * ((n + nodes) * D * 4) as f64 / 1e9;
    let step =
        move || x.incidence_sum(&sets, None)?.backward_from(seed.clone(), false, &mut prismgrad::Gradients::default());
    Ok((Box::new(step), Work::Gigabytes(gigabytes), 0))
}

fn dp(name: &str) -> Result<(Step, Work, usize)> {
    let (model, style) = name[3..].split_once('/').unwrap_or_default();
    // Every record is in every batch (rate 1), so that each step has the same work.
    let make = |params: &[Param], batch: usize, losses: Losses| -> Result<Step> {
        let (optimizer, schedule) = (AdamW::default(), Schedule::constant(1e-3));
        if style == "nonprivate" {
            let mut step = PlainStep::new(params, optimizer, schedule)?;
            return Ok(Box::new(move || step.run_one(&losses).map(drop)));
        }
        let config = PrivacyConfig::target(1e3, 1e-6).records(batch).expected_batch(batch as f64).steps(100_000);
        let config = config.style(style.parse()?).clip(ClipFn::Abadi).noise_multiplier(100.0);
        let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(1))?;
        let mut step = PrivateStep::new(params, privacy, optimizer, schedule)?;
        Ok(Box::new(move || step.run(batch, |_| losses()).map(drop)))
    };
    if model == "mlp" {
        let params = Params::new(1, DType::F32);
        let m = Mlp::new(&params)?;
        params.to(device())?;
        let (x, y) = (Tensor::new(random(&[256, 784], 1)?), ids(&[256], 10, 2)?);
        let step = make(&params.all(), 256, Box::new(move || m.losses(&x, &y)))?;
        return Ok((step, Work::None, params.count()));
    }
    if model == "moe" {
        let params = Params::new(1, DType::F32);
        let m = experts(&params, Balance::PerSample(0.01))?;
        let x = Tensor::new(activations(&[8, 256, 256], 1)?);
        let losses = move || {
            let out = m.forward(&x, &Ctx::train(0))?;
            out.output.cast(DType::F32)?.square()?.mean(&[1, 2], false)?.add(&out.losses)
        };
        let step = make(&params.all(), 8, Box::new(losses))?;
        return Ok((step, Work::Tokens(2048.0, 0.0), params.count()));
    }
    let (m, x, y) = gpt_model(&model.replace("gpt", "gpt/"))?;
    let params = m.params().clone();
    let step = make(&params.all(), 8, Box::new(move || m.losses(&x, &y, &ctx(""))))?;
    Ok((step, Work::Tokens(2048.0, 0.0), params.count()))
}

/// A field of /proc/self/status, in MB.
fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap_or("");
    line.split_whitespace().nth(1).and_then(|v| v.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

/// GFLOP/s of a matrix product and GB/s of a copy (read and written), each the best of three.
fn ceilings() -> Result<(f64, f64)> {
    let best = |step: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        step()?;
        device().synchronize()?;
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let t = Instant::now();
            step()?;
            device().synchronize()?;
            best = best.min(t.elapsed().as_secs_f64());
        }
        Ok(best)
    };
    let (product, rows) = match device() {
        Device::Cpu => ("gemm/1024x1024x1024", 16_384),
        Device::Cuda(_) => ("gemm/4096x4096x4096", 65_536),
    };
    let (mut product, work, _) = gemm(product)?;
    let Work::Gflop(flop) = work else { return Ok((f64::NAN, f64::NAN)) };
    let x = random(&[rows, 1024], 1)?;
    let mut copy = || {
        x.copy();
        Ok(())
    };
    Ok((flop / best(&mut *product)?, 8.0 * 1024.0 * rows as f64 / 1e9 / best(&mut copy)?))
}

fn measure(
    name: &str,
    make: Make,
    (min_seconds, profiled): (f64, bool),
    threads: usize,
    ceilings: (f64, f64),
) -> Result<()> {
    let base = status("VmRSS");
    let (mut step, mut work, params) = make(name)?;
    let mut step = || {
        step()?;
        device().synchronize()
    };
    step()?;
    step()?;
    let (mut times, mut bare, begin) = (Vec::new(), Vec::new(), Instant::now());
    while times.len() < 5 || begin.elapsed().as_secs_f64() < min_seconds {
        let t = Instant::now();
        step()?;
        times.push(t.elapsed().as_secs_f64());
        if let Work::Products(_, products) = &mut work {
            let t = Instant::now();
            products()?;
            device().synchronize()?;
            bare.push(t.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    bare.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let mut line = serde_json::json!({
        "tool": "prismgrad", "version": env!("CARGO_PKG_VERSION"), "case": format!("{name}/{}", dtype(name)),
        "device": device().to_string(), "median_ms": median * 1e3, "min_ms": times[0] * 1e3,
        "p90_ms": times[(times.len() * 9 / 10).min(times.len() - 1)] * 1e3, "reps": times.len(),
        "peak_rss_mb": status("VmHWM"), "base_rss_mb": base, "threads": threads,
    });
    let mut put = |k: &str, v: f64| line[k] = serde_json::json!((v * 100.0).round() / 100.0);
    match work {
        Work::Gflop(g) => {
            put("gflops", g / median);
            put("ceiling_share", g / median / ceilings.0);
        }
        Work::Products(g, _) => {
            put("gflops", g / median);
            put("ceiling_share", g / median / ceilings.0);
            put("gemm_share", bare[bare.len() / 2] / median);
        }
        Work::Gigabytes(g) => {
            put("gb_per_s", g / median);
            put("ceiling_share", g / median / ceilings.1);
        }
        Work::Tokens(t, g) => {
            put("tokens_per_s", t / median);
            if g > 0.0 {
                put("gflops", g / median);
                put("ceiling_share", g / median / ceilings.0);
            }
        }
        Work::None => {}
    }
    if params > 0 {
        put("params", params as f64);
    }
    if let Some(gpu) = device().gpu() {
        line["gpu"] = serde_json::json!(gpu.name());
        line["peak_device_mb"] = serde_json::json!((gpu.memory_report().total.peak >> 20) as f64);
    }
    println!("{line}");
    if profiled {
        let session = profile::start(device())?;
        (0..3).try_for_each(|_| step())?;
        eprintln!("{name}, 3 steps:\n{}", session.finish()?.table());
    }
    Ok(())
}

fn main() {
    if let Err(message) = run() {
        eprintln!("bench_cases: {message}");
        std::process::exit(2);
    }
}

fn run() -> std::result::Result<(), String> {
    let option = |name: &'static str, text: &'static str| Arg::new(name).long(name).help(text);
    let flag = |name: &'static str, text: &'static str| option(name, text).action(ArgAction::SetTrue);
    let seconds = option("min-seconds", "measures a case for at least this long").default_value("3");
    let matches = Command::new("bench_cases")
        .about("Times the speed cases whose names contain one of the words given, and prints a JSON line for each.")
        .override_usage("cargo run --release --example bench_cases -- [options] [words]")
        .disable_version_flag(true)
        .arg(Arg::new("words").action(ArgAction::Append).help("parts of case names; every case if there are none"))
        .arg(flag("list", "prints the names of the cases"))
        .arg(flag("isolate", "runs each case in a process of its own, so that its memory is measured alone"))
        .arg(flag("exact", "takes the words as whole names"))
        .arg(flag("profile", "prints the table of ops as well"))
        .arg(seconds.value_parser(value_parser!(f64)))
        .arg(option("threads", "threads, up to 1024; all cores if 0").default_value("0").value_parser(|t: &str| {
            match t.parse::<usize>() {
                Ok(n) if n <= 1024 => Ok(n),
                _ => Err("give 0 to 1024 threads"),
            }
        }))
        .arg(option("dtype", "dtype of activations, f32 or bf16").default_value("f32").value_parser(["f32", "bf16"]))
        .arg(option("ceilings", "GFLOP/s,GB/s of this machine; measured if not given"))
        .get_matches();
    if matches.get_flag("list") {
        NAMES.iter().for_each(|(n, _)| println!("{n}"));
        return Ok(());
    }
    let (isolate, exact, profiled) =
        (matches.get_flag("isolate"), matches.get_flag("exact"), matches.get_flag("profile"));
    let min_seconds = matches.get_one::<f64>("min-seconds").copied().unwrap_or(3.0);
    let threads = matches.get_one::<usize>("threads").copied().unwrap_or(0);
    let wanted: Vec<String> = matches.get_many::<String>("words").unwrap_or_default().cloned().collect();
    let ceilings = match matches.get_one::<String>("ceilings") {
        None => None,
        Some(text) => {
            let two: Vec<f64> = text.split(',').filter_map(|x| x.parse().ok()).collect();
            let [product, copy] = two[..] else {
                return Err(format!("--ceilings {text}: two numbers, GFLOP/s,GB/s"));
            };
            Some((product, copy))
        }
    };
    let bf16 = matches.get_one::<String>("dtype").is_some_and(|d| d == "bf16");
    DTYPE.get_or_init(|| if bf16 { DType::BF16 } else { DType::F32 });
    let there = Device::from_env().map_err(|e| e.to_string())?;
    DEVICE.get_or_init(|| there);
    let cases: Vec<_> = NAMES
        .iter()
        .filter(|(n, _)| {
            // A step takes minutes on a CPU, so this case runs only if it is named.
            let large = n.ends_with("124M") && device().is_cpu() && !wanted.iter().any(|w| w == n);
            !large && (wanted.is_empty() || wanted.iter().any(|w| if exact { n == w } else { n.contains(w.as_str()) }))
        })
        .collect();
    if cases.is_empty() {
        return Err(format!("no case contains {wanted:?}; --list names them"));
    }
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|e| e.to_string())?;
    // A case in a process of its own gets the ceilings as an argument, so that its memory does not include that of measuring them.
    let ceilings = match ceilings {
        Some(c) => c,
        None => self::ceilings().map_err(|e| e.to_string())?,
    };
    if isolate {
        let me = std::env::current_exe().map_err(|e| e.to_string())?;
        for (n, _) in cases {
            let mut c = std::process::Command::new(&me);
            c.args([n, "--min-seconds", &min_seconds.to_string(), "--threads", &threads.to_string()]);
            if profiled {
                c.arg("--profile");
            }
            c.args(["--exact", "--dtype", &dtype("").to_string()]);
            c.args(["--ceilings", &format!("{},{}", ceilings.0, ceilings.1)]);
            c.status().map_err(|e| format!("{n}: {e}"))?;
        }
        return Ok(());
    }
    for (n, make) in cases {
        let threads = rayon::current_num_threads();
        measure(n, *make, (min_seconds, profiled), threads, ceilings).map_err(|e| format!("{n}: {e}"))?;
    }
    Ok(())
}
