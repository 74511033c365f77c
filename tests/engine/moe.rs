//! Mixture of experts: against a loop over tokens, losses in closed form, order and presence of samples, per-sample gradients,
//! private steps, bad input.

use prismgrad::check;
use prismgrad::device_tests;
use prismgrad::kernels::Activation;
use prismgrad::nn::{Balance, Ctx, ExpertKind, Mlp, Moe, MoeConfig, MoeOut, Params, SwiGlu};
use prismgrad::ops::route::Gate;
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::{Array, DType, Param, Result, Samples, Tensor};
use proptest::prelude::*;

const D: usize = 5;

/// Reproducible values without a pattern.
fn noise(i: u64) -> f64 {
    let mut z = i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

fn input(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(Array::generate(shape, DType::F64, |i| noise(seed.wrapping_mul(1_000_003).wrapping_add(i as u64))))
}

/// A layer in f64 whose biases are not zero.
fn layer(config: &MoeConfig, seed: u64) -> (Moe, Params) {
    let params = Params::new(seed, DType::F64);
    let moe = Moe::new(&params, D, config).unwrap();
    for (k, p) in params.all().iter().enumerate().filter(|(_, p)| p.name().ends_with("bias")) {
        p.set(Array::generate(p.shape(), DType::F64, |i| 0.3 * noise(77 * k as u64 + i as u64))).unwrap();
    }
    (moe, params)
}

fn values(params: &Params, name: &str) -> Vec<f64> {
    params.get(name).unwrap().value().to_f64()
}

/// x·W (+ b) for a matrix `[d, p]`, or `[p, d]` if `out_in`.
fn apply(x: &[f64], w: &[f64], b: Option<&[f64]>, out_in: bool) -> Vec<f64> {
    let p = w.len() / x.len();
    let at = |i: usize, j: usize| if out_in { w[j * x.len() + i] } else { w[i * p + j] };
    (0..p).map(|j| b.map_or(0.0, |b| b[j]) + (0..x.len()).map(|i| x[i] * at(i, j)).sum::<f64>()).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// One token through one expert.
fn expert(params: &Params, c: &MoeConfig, e: usize, x: &[f64]) -> Vec<f64> {
    let part = |name: &str| {
        let all = values(params, name);
        all[e * all.len() / c.experts..(e + 1) * all.len() / c.experts].to_vec()
    };
    match c.expert {
        ExpertKind::Mlp(_) => {
            let h = apply(x, &part("experts.c_fc.weight"), Some(&part("experts.c_fc.bias")), false);
            let h: Vec<f64> = h.into_iter().map(f64::tanh).collect();
            apply(&h, &part("experts.c_proj.weight"), Some(&part("experts.c_proj.bias")), false)
        }
        ExpertKind::SwiGlu => {
            let gate = apply(x, &part("experts.gate_proj.weight"), None, true);
            let up = apply(x, &part("experts.up_proj.weight"), None, true);
            let h: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| silu(*g) * u).collect();
            apply(&h, &part("experts.down_proj.weight"), None, true)
        }
    }
}

/// What a loop over tokens makes of an input `[tokens, D]`, samples of `each` tokens: outputs, balance and z losses by sample
/// without their coefficients, load.
fn loop_over_tokens(params: &Params, c: &MoeConfig, x: &[f64], each: usize) -> (Vec<f64>, Vec<[f64; 2]>, Vec<f64>) {
    let (mut out, mut losses, mut all) = (Vec::new(), Vec::new(), vec![0.0; c.experts]);
    for sample in x.chunks(each * D) {
        let (mut f, mut p, mut z) = (vec![0.0; c.experts], vec![0.0; c.experts], 0.0);
        for x in sample.chunks(D) {
            let logits = apply(x, &values(params, "router.weight"), None, true);
            let total: f64 = logits.iter().map(|l| l.exp()).sum();
            let scores: Vec<f64> = match c.gate {
                Gate::Softmax => logits.iter().map(|l| l.exp() / total).collect(),
                Gate::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
            };
            let sum: f64 = scores.iter().sum();
            z += total.ln().powi(2) / each as f64;
            let mut order: Vec<usize> = (0..c.experts).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let chosen = &order[..c.top_k];
            let norm = if c.renormalise { chosen.iter().map(|&e| scores[e]).sum() } else { 1.0 };
            let mut y = vec![0.0; D];
            for &e in chosen {
                f[e] += 1.0 / (c.top_k * each) as f64;
                all[e] += 1.0;
                let part = expert(params, c, e, x);
                y.iter_mut().zip(part).for_each(|(y, p)| *y += scores[e] / norm * p);
            }
            p.iter_mut().zip(&scores).for_each(|(p, s)| *p += s / sum / each as f64);
            out.extend(y);
        }
        let balance = c.experts as f64 * f.iter().zip(&p).map(|(f, p)| f * p).sum::<f64>();
        losses.push([balance, z]);
    }
    (out, losses, all)
}

fn close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-300f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{what}, element {i}: {g}, not {w}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]
    /// Every k ≤ E ≤ 7, fewer tokens than experts among them, both gates and kinds of experts.
    #[test]
    fn a_loop_over_tokens_says_the_same(
        seed in any::<u64>(), experts in 1usize..=7, each in 1usize..6, b in 1usize..4,
        sigmoid in any::<bool>(), swiglu in any::<bool>(), renormalise in any::<bool>(),
    ) {
        for top_k in 1..=experts {
            let c = MoeConfig {
                gate: if sigmoid { Gate::Sigmoid } else { Gate::Softmax },
                expert: if swiglu { ExpertKind::SwiGlu } else { ExpertKind::Mlp(Activation::Tanh) },
                renormalise,
                balance: Balance::PerSample(0.25),
                z: 0.5,
                ..MoeConfig::new(experts, top_k, 4)
            };
            let (moe, params) = layer(&c, seed);
            let x = input(&[b, each, D], seed);
            let out = moe.forward(&x, &Ctx::eval()).unwrap();
            let (y, losses, load) = loop_over_tokens(&params, &c, &x.array().to_f64(), each);
            close(&out.output.array().to_f64(), &y, 1e-12, "output");
            let losses: Vec<f64> = losses.iter().map(|[balance, z]| 0.25 * balance + 0.5 * z).collect();
            close(&out.losses.array().to_f64(), &losses, 1e-12, "losses");
            let stats = out.stats.read().unwrap();
            prop_assert_eq!(&stats.load, &load);
            prop_assert_eq!(stats.idle, load.iter().filter(|&&l| l == 0.0).count());
            // Ragged samples of the same lengths are the same.
            let flat = x.reshape(&[b * each, D]).unwrap();
            let offsets: Vec<usize> = (0..=b).map(|i| i * each).collect();
            let ragged = Ctx::eval().with_samples(Samples::ragged(&offsets).unwrap());
            let again = moe.forward(&flat, &ragged).unwrap();
            close(&again.losses.array().to_f64(), &losses, 1e-12, "losses of ragged samples");
            prop_assert_eq!(again.output.array().to_f64(), out.output.array().to_f64());
        }
    }
}

/// Router weights that send every token to the experts of this order, whatever it holds: the first input is 1 everywhere.
fn steer(params: &Params, logits: &[f64]) {
    let mut w = vec![0.0; logits.len() * D];
    logits.iter().enumerate().for_each(|(e, l)| w[e * D] = *l);
    params.get("router.weight").unwrap().set(Array::from_slice(&w, &[logits.len(), D]).unwrap()).unwrap();
}

fn ones_first(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(Array::generate(
        shape,
        DType::F64,
        |i| if i % D == 0 { 1.0 } else { noise(seed.wrapping_add(i as u64)) },
    ))
}

#[test]
fn one_expert_takes_all_and_the_others_are_idle() {
    let c = MoeConfig::new(4, 1, 6);
    let (moe, params) = layer(&c, 3);
    steer(&params, &[-1.0, 0.5, 3.0, 0.5]);
    let x = ones_first(&[2, 7, D], 5);
    let stats = moe.forward(&x, &Ctx::eval()).unwrap().stats;
    let read = stats.read().unwrap();
    assert_eq!((read.load, read.idle, read.entropy), (vec![0.0, 0.0, 14.0, 0.0], 3, 0.0));
    assert_eq!(stats.co_activation().unwrap().to_f64()[10], 14.0);
    let out = moe.forward(&Tensor::leaf(x.into_array()), &Ctx::eval()).unwrap().output;
    let grads = out.sum(&[1, 2], false).unwrap().backward().unwrap();
    let w = params.get("experts.c_fc.weight").unwrap();
    let sum = grads.param(&w).unwrap().sum().unwrap().to_f64();
    for (e, g) in sum.chunks(sum.len() / 4).enumerate() {
        assert_eq!(g.iter().any(|&g| g != 0.0), e == 2, "expert {e}");
    }
}

#[test]
fn ties_go_to_the_lower_expert() {
    let (moe, params) = layer(&MoeConfig::new(5, 2, 3), 1);
    steer(&params, &[0.0, 1.0, 1.0, 1.0, 0.0]);
    let stats = moe.forward(&ones_first(&[1, 3, D], 1), &Ctx::eval()).unwrap().stats;
    assert_eq!(stats.routing().choices().to_vec::<u32>().unwrap(), [1, 2, 1, 2, 1, 2]);
}

/// Zero logits and even choices: α and (ln E)². One expert for everything: E·α.
#[test]
fn losses_have_their_closed_forms() {
    for form in [Balance::Batch as fn(f64) -> Balance, Balance::PerSample] {
        let c = MoeConfig { balance: form(0.3), ..MoeConfig::new(4, 4, 3) };
        let (moe, params) = layer(&c, 2);
        let x = ones_first(&[3, 8, D], 9);
        steer(&params, &[0.0; 4]);
        let losses = |moe: &Moe| moe.forward(&x, &Ctx::eval()).unwrap().losses.array().to_f64();
        close(&losses(&moe), &[0.3; 3], 1e-14, "even");
        let (moe, params) = layer(&MoeConfig { balance: Balance::Off, z: 0.7, ..c }, 2);
        steer(&params, &[0.0; 4]);
        close(&losses(&moe), &[0.7 * 4f64.ln().powi(2); 3], 1e-14, "z");
        let (moe, params) = layer(&MoeConfig { top_k: 1, ..c }, 2);
        steer(&params, &[0.0, 0.0, 800.0, 0.0]);
        close(&losses(&moe), &[4.0 * 0.3; 3], 1e-14, "one expert");
    }
}

/// The mean over samples of the batch form is α·E·Σ f·P with f and P of all tokens, whatever the samples' lengths.
#[test]
fn the_batch_form_is_that_of_all_tokens() {
    let c = MoeConfig { balance: Balance::Batch(1.0), ..MoeConfig::new(4, 2, 3) };
    let (moe, params) = layer(&c, 8);
    let x = input(&[12, D], 4);
    let ctx = Ctx::eval().with_samples(Samples::ragged(&[0, 1, 1, 9, 12]).unwrap());
    let losses = moe.forward(&x, &ctx).unwrap().losses.array().to_f64();
    let (_, whole, _) = loop_over_tokens(&params, &c, &x.array().to_f64(), 12);
    assert!((losses.iter().sum::<f64>() / 4.0 - whole[0][0]).abs() < 1e-12);
}

/// The sum of outputs and losses, by sample.
fn objective(out: &MoeOut) -> Result<Tensor> {
    let y = out.output.square()?;
    let b = out.losses.shape()[0];
    let rows = y.numel() / b;
    y.reshape(&[b, rows])?.sum(&[1], false)?.add(&out.losses)
}

/// The balance loss reaches the router, with the gradient that differences have.
#[test]
fn the_balance_loss_moves_the_router() {
    for form in [Balance::Batch as fn(f64) -> Balance, Balance::PerSample] {
        let gradient = |alpha: f64| {
            let c = MoeConfig { balance: form(alpha), z: 0.1, ..MoeConfig::new(4, 2, 3) };
            let (moe, params) = layer(&c, 4);
            let x = input(&[3, 4, D], 2);
            let loss = || moe.forward(&x, &Ctx::eval()).unwrap().losses.sum(&[0], false).unwrap();
            let w = moe.router().weight().clone();
            let got = loss().backward().unwrap().param(&w).unwrap().sum().unwrap().to_f64();
            let at = w.value().to_f64();
            let want: Vec<f64> = (0..at.len())
                .map(|i| {
                    let shifted = |h: f64| {
                        let mut v = at.clone();
                        v[i] += h;
                        w.set(Array::from_slice(&v, w.shape()).unwrap()).unwrap();
                        loss().item().unwrap()
                    };
                    (shifted(1e-6) - shifted(-1e-6)) / 2e-6
                })
                .collect();
            assert!(params.count() > 0);
            close(&got, &want, 1e-7, "router");
            got
        };
        let (none, some) = (gradient(0.0), gradient(2.0));
        assert!(none.iter().zip(&some).any(|(a, b)| (a - b).abs() > 1e-3));
    }
}

#[test]
fn per_sample_gradients_are_those_of_each_sample_alone() {
    for (swiglu, gate) in [(false, Gate::Softmax), (true, Gate::Sigmoid)] {
        let c = MoeConfig {
            expert: if swiglu { ExpertKind::SwiGlu } else { ExpertKind::Mlp(Activation::Gelu) },
            gate,
            shared: 1,
            balance: Balance::PerSample(0.1),
            z: 0.01,
            ..MoeConfig::new(5, 2, 4)
        };
        let (moe, params) = layer(&c, 6);
        let x = input(&[4, 6, D], 3);
        let run = || objective(&moe.forward(&x, &Ctx::eval())?);
        check::per_sample(&run, &params.all(), 1, 1e-9).unwrap();
        // Ragged, one of them empty, their rows in any order.
        let owner: Vec<u32> = (0..24).map(|i| [0, 2, 3, 0, 3, 3][i % 6]).collect();
        let ctx = Ctx::eval().with_samples(Samples::owners(owner.clone(), 4).unwrap());
        let flat = input(&[24, D], 3);
        let pick = Array::generate(&[4, 24], DType::F64, |i| (owner[i % 24] as usize == i / 24) as u8 as f64);
        let run = || {
            let out = moe.forward(&flat, &ctx)?;
            let y = out.output.square()?.sum(&[1], true)?;
            Tensor::new(pick.clone()).matmul(&y)?.reshape(&[4])?.add(&out.losses)
        };
        check::per_sample(&run, &params.all(), 1, 1e-9).unwrap();
    }
}

/// Permuting the batch permutes outputs and losses bit for bit; the presence of others changes nothing; nor do threads.
#[test]
fn a_sample_does_not_see_the_others() {
    let c = MoeConfig { balance: Balance::PerSample(0.1), z: 0.1, jitter: 0.2, ..MoeConfig::new(6, 2, 33) };
    let params = Params::new(1, DType::F32);
    let moe = Moe::new(&params, 40, &c).unwrap();
    let x = Array::generate(&[7, 19, 40], DType::F32, |i| noise(i as u64));
    let run = |order: &[usize]| {
        let rows: Vec<Tensor> = order.iter().map(|&i| Tensor::new(x.slice(0, i..i + 1).unwrap())).collect();
        let batch = Tensor::concat(&rows.iter().collect::<Vec<_>>(), 0).unwrap();
        let keys: Vec<u64> = order.iter().map(|&i| i as u64).collect();
        let batch = Tensor::leaf(batch.into_array());
        let out = moe.forward(&batch, &Ctx::train(5).with_keys(keys)).unwrap();
        let (y, l) = (out.output.array().to_f64(), out.losses.array().to_f64());
        let grads = objective(&out).unwrap().backward().unwrap();
        let g = grads.of(&batch).unwrap().to_f64();
        let each = y.len() / order.len();
        order
            .iter()
            .enumerate()
            .map(|(at, &i)| {
                let part = |v: &[f64]| v[at * each..(at + 1) * each].to_vec();
                (i, part(&y), l[at], part(&g))
            })
            .collect::<Vec<_>>()
    };
    let all = run(&[0, 1, 2, 3, 4, 5, 6]);
    for order in [&[6, 2, 0, 5, 1, 4, 3][..], &[3, 1], &[4]] {
        for sample in run(order) {
            assert!(sample == all[sample.0], "sample {} of {order:?}", sample.0);
        }
    }
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(|| run(&[0, 1, 2, 3, 4, 5, 6])) == all, "{threads} threads");
    }
}

/// One expert is the dense layer bit for bit; equal experts with renormalised weights are, at any k.
#[test]
fn one_expert_is_a_dense_layer() {
    for swiglu in [false, true] {
        let kind = if swiglu { ExpertKind::SwiGlu } else { ExpertKind::Mlp(Activation::Gelu) };
        let c = MoeConfig { expert: kind, renormalise: true, ..MoeConfig::new(1, 1, 9) };
        let (moe, params) = layer(&c, 5);
        let dense = Params::new(0, DType::F64);
        let copy = |from: &str, to: &str| {
            let (from, to) = (params.get(from).unwrap().value(), dense.get(to).unwrap());
            to.set(from.reshape(to.shape()).unwrap()).unwrap();
        };
        let x = input(&[2, 6, D], 1);
        let want = if swiglu {
            let layer = SwiGlu::new(&dense, D, 9).unwrap();
            for n in ["gate_proj.weight", "up_proj.weight", "down_proj.weight"] {
                copy(&format!("experts.{n}"), n);
            }
            layer.forward(&x, &Ctx::eval()).unwrap()
        } else {
            let layer = Mlp::new(&dense, D, 9).unwrap();
            for n in ["c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"] {
                copy(&format!("experts.{n}"), n);
            }
            layer.forward(&x, &Ctx::eval()).unwrap()
        };
        let got = moe.forward(&x, &Ctx::eval()).unwrap().output;
        assert_eq!(got.array().to_f64(), want.array().to_f64());
    }
}

#[test]
fn capacity_drops_what_comes_last_and_says_how_much() {
    let c = MoeConfig { capacity: Some(0.5), ..MoeConfig::new(4, 1, 6) };
    let (moe, params) = layer(&c, 3);
    steer(&params, &[0.0, 2.0, 0.0, 0.0]);
    let out = moe.forward(&ones_first(&[2, 8, D], 5), &Ctx::eval()).unwrap();
    // 16 tokens, half of an even share of 4.
    let stats = out.stats.read().unwrap();
    assert_eq!((stats.dropped, stats.load[1]), (14, 16.0));
    let y = out.output.array().to_f64();
    assert!(y[..2 * D].iter().all(|&y| y != 0.0) && y[2 * D..].iter().all(|&y| y == 0.0));
}

/// The bias turns the choice round and does not enter the weights.
#[test]
fn the_bias_evens_the_load_without_a_loss() {
    let c = MoeConfig {
        gate: Gate::Sigmoid,
        renormalise: false,
        balance: Balance::Bias { rate: 0.05 },
        ..MoeConfig::new(4, 1, 3)
    };
    let (moe, params) = layer(&c, 3);
    params.get("balance_bias").unwrap().set(Array::zeros(&[4], DType::F64)).unwrap();
    steer(&params, &[0.0, 0.4, 0.3, 0.1]);
    let x = ones_first(&[1, 5, D], 5);
    let mut first = Vec::new();
    for _ in 0..40 {
        let stats = moe.forward(&x, &Ctx::eval()).unwrap().stats;
        let load = stats.read().unwrap().load;
        first.push(load.iter().position(|&l| l == 5.0).unwrap());
        moe.update_bias(&stats).unwrap();
    }
    assert_eq!(first[0], 1);
    let seen: std::collections::BTreeSet<_> = first[20..].iter().collect();
    assert_eq!(seen.len(), 4, "every expert has its turn: {first:?}");
    assert!(!params.get("balance_bias").unwrap().trainable());
    let loss = moe.forward(&x, &Ctx::eval()).unwrap().losses;
    assert_eq!(loss.array().to_f64(), [0.0]);
}

fn private(params: &[Param], style: ClipStyle) -> PrivateStep {
    let config = PrivacyConfig::target(1e3, 1e-4).records(8).expected_batch(4.0).steps(100).noise_multiplier(1.5);
    let config = config.style(style).clip(ClipFn::Abadi).max_grad_norm(2.0);
    let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(9)).unwrap();
    PrivateStep::new(params, privacy, Sgd::default(), Schedule::constant(0.1)).unwrap()
}

#[test]
fn a_private_step_refuses_what_mixes_samples() {
    let refused = |c: MoeConfig| {
        let params = Params::new(0, DType::F32);
        let moe = Moe::new(&params.at("h.0.moe"), D, &c).unwrap();
        let x = Tensor::zeros(&[8, 3, D], DType::F32);
        let mut step =
            private(&params.all().into_iter().filter(|p| p.trainable()).collect::<Vec<_>>(), ClipStyle::AllLayer);
        let message = step.run(100, |records| {
            let x = Tensor::new(x.array().slice(0, 0..records.len())?);
            objective(&moe.forward(&x, &Ctx::train(0))?)
        });
        // Outside of a private step it is as good as any other.
        let mut plain = PlainStep::new(step.flat().params(), Sgd::default(), Schedule::constant(0.1)).unwrap();
        plain.run_one(|| objective(&moe.forward(&x, &Ctx::train(0))?)).unwrap();
        message.err().map(|e| e.to_string()).unwrap_or_default()
    };
    let c = MoeConfig::new(4, 2, 3);
    let batch = refused(MoeConfig { balance: Balance::Batch(0.1), ..c });
    assert!(["h.0.moe", "Balance::Batch", "Balance::PerSample"].iter().all(|w| batch.contains(w)), "{batch}");
    let bias = refused(MoeConfig { balance: Balance::Bias { rate: 0.1 }, ..c });
    assert!(["h.0.moe", "Balance::Bias", "Balance::PerSample"].iter().all(|w| bias.contains(w)), "{bias}");
    let capacity = refused(MoeConfig { capacity: Some(1.0), ..c });
    assert!(["h.0.moe", "capacity of 1", "None"].iter().all(|w| capacity.contains(w)), "{capacity}");
    assert_eq!(refused(MoeConfig { balance: Balance::PerSample(0.1), z: 0.1, jitter: 0.1, ..c }), "");
}

/// Noise goes to every expert whether a token came to it or not, and to the router: an idle expert moves by exactly its noise,
/// which is what all of it moves by where no loss depends on the parameters. (A test key's noise does not depend on the sum.)
#[test]
fn an_idle_expert_moves_by_exactly_its_noise() {
    for style in [ClipStyle::AllLayer, ClipStyle::LayerWise] {
        let moved = |times: f64| {
            let config = MoeConfig { balance: Balance::PerSample(0.1), ..MoeConfig::new(3, 1, 4) };
            let (moe, params) = layer(&config, 3);
            steer(&params, &[0.0, 0.0, 3.0]);
            let x = ones_first(&[8, 6, D], 5);
            let mut step = private(&params.all(), style.clone());
            let mut drawn = 0;
            let losses = |records: &[usize]| {
                drawn += records.len();
                let rows = records.iter().map(|&r| Ok(Tensor::new(x.array().slice(0, r..r + 1)?)));
                let rows = rows.collect::<Result<Vec<Tensor>>>()?;
                let batch = Tensor::concat(&rows.iter().collect::<Vec<_>>(), 0)?;
                objective(&moe.forward(&batch, &Ctx::train(0))?)?.mul_scalar(times)
            };
            step.run(100, losses).unwrap();
            assert!(drawn > 0);
            params.all().iter().map(|p| (p.name().to_string(), p.value().to_f64())).collect::<Vec<_>>()
        };
        for ((name, with), (_, noise)) in moved(1.0).into_iter().zip(moved(0.0)) {
            let same: Vec<bool> = with.iter().zip(&noise).map(|(a, b)| a == b).collect();
            let idle = if name.starts_with("experts.") { 2 * same.len() / 3 } else { 0 };
            assert!(same[..idle].iter().all(|&s| s), "{name} of idle experts, {style:?}");
            assert!(same[idle..].iter().any(|&s| !s), "{name} of what the losses depend on, {style:?}");
        }
    }
}

device_tests! {
    /// Outputs, losses, statistics and gradients on every device, and nothing is read by the host on the way.
    fn a_layer_is_the_same_on_every_device(device) {
        let c = MoeConfig {
            balance: Balance::PerSample(0.1), z: 0.1, shared: 1, capacity: Some(0.8), ..MoeConfig::new(4, 2, 6)
        };
        let (moe, params) = layer(&c, 6);
        let x = input(&[3, 5, D], 3);
        let want = moe.forward(&x, &Ctx::eval()).unwrap();
        let all = params.all();
        let queries = |out: &MoeOut| {
            let grads = objective(out).unwrap().backward().unwrap();
            all.iter().map(|p| {
                let g = grads.param(p).unwrap();
                (g.sum().unwrap().to_f64(), g.sample_sq_norms().unwrap())
            }).collect::<Vec<_>>()
        };
        let wanted = queries(&want);
        params.to(device).unwrap();
        for ragged in [false, true] {
            let ctx = match ragged {
                true => Ctx::eval().with_samples(Samples::ragged(&[0, 5, 10, 15]).unwrap()),
                false => Ctx::eval(),
            };
            let shape: &[usize] = if ragged { &[15, D] } else { &[3, 5, D] };
            let got = moe.forward(&x.reshape(shape).unwrap().to(device).unwrap(), &ctx).unwrap();
            assert_eq!(got.output.device(), *device);
            close(&got.output.array().to_f64(), &want.output.array().to_f64(), 1e-10, "output");
            close(&got.losses.array().to_f64(), &want.losses.array().to_f64(), 1e-10, "losses");
            let (read, wanted_read) = (got.stats.read().unwrap(), want.stats.read().unwrap());
            assert_eq!((&read.load, read.dropped), (&wanted_read.load, wanted_read.dropped));
            assert!(read.dropped > 0 && (read.entropy - wanted_read.entropy).abs() < 1e-6);
            assert_eq!(got.stats.co_activation().unwrap().to_f64(), want.stats.co_activation().unwrap().to_f64());
            for (p, (g, w)) in all.iter().zip(queries(&got).iter().zip(&wanted)) {
                close(&g.0, &w.0, 1e-9, p.name());
                close(&g.1, &w.1, 1e-9, p.name());
            }
        }
    }
}

/// A private step with experts on the device, recorded or not, is the same step, and the host reads nothing in it.
#[cfg(feature = "emulator")]
#[test]
fn a_recorded_private_step_reads_nothing() {
    use prismgrad::device::emulator::{config, lock, stat};
    let _one = lock();
    config("seed", 1);
    let device = prismgrad::Device::cuda(0).unwrap();
    let run = |recorded: bool| {
        let c = MoeConfig { balance: Balance::PerSample(0.1), z: 0.1, shared: 1, ..MoeConfig::new(3, 2, 4) };
        let params = Params::new(4, DType::F32);
        let moe = Moe::new(&params, D, &c).unwrap();
        params.to(&device).unwrap();
        let batch = |t: u64| Array::generate(&[4, 3, D], DType::F32, |i| noise(100 * t + i as u64));
        let x = batch(0).to(&device).unwrap();
        // Every record in every batch.
        let config = PrivacyConfig::target(1e3, 1e-4).records(4).expected_batch(4.0).steps(100).noise_multiplier(1.5);
        let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(9)).unwrap();
        let mut step = PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
        let losses = || objective(&moe.forward(&Tensor::new(x.clone()), &Ctx::train(0))?);
        step.run(4, |_| losses()).unwrap();
        let mut graph = recorded.then(|| step.capture(4, losses).unwrap());
        for t in 1..4 {
            let (next, before) = (batch(t), stat("synchronisations"));
            match &mut graph {
                Some(graph) => step.replay(graph, |_| x.refill(&next)).map(drop),
                None => x.refill(&next).and_then(|()| step.run(4, |_| losses()).map(drop)),
            }
            .unwrap();
            assert_eq!(stat("synchronisations"), before, "the host waits, recorded {recorded}");
        }
        params.all().iter().map(|p| p.value().to_f64()).collect::<Vec<_>>()
    };
    assert!(run(false) == run(true));
}

#[test]
fn bad_input_is_a_sentence() {
    let says = |c: MoeConfig, words: &[&str]| {
        let e = Moe::new(&Params::new(0, DType::F32), D, &c).err().expect("refused").to_string();
        words.iter().for_each(|w| assert!(e.contains(w), "{e:?} does not mention {w:?}"));
    };
    says(MoeConfig::new(4, 5, 3), &["top_k 5", "4 experts"]);
    says(MoeConfig::new(4, 0, 3), &["top_k 0"]);
    says(MoeConfig::new(0, 1, 3), &["0 experts"]);
    says(MoeConfig::new(4, 1, 0), &["hidden width 0"]);
    says(MoeConfig { jitter: 1.0, ..MoeConfig::new(4, 1, 3) }, &["jitter 1"]);
    says(MoeConfig { capacity: Some(0.0), ..MoeConfig::new(4, 1, 3) }, &["capacity 0"]);
    says(MoeConfig { balance: Balance::Batch(-1.0), ..MoeConfig::new(4, 1, 3) }, &["-1", "balance"]);
    says(MoeConfig { z: f64::NAN, ..MoeConfig::new(4, 1, 3) }, &["NaN", "of z"]);
    let (moe, params) = layer(&MoeConfig::new(4, 2, 3), 1);
    let e = moe.forward(&input(&[2, 3, 4], 1), &Ctx::eval()).err().unwrap().to_string();
    assert!(e.contains("[2, 3, 4]") && e.contains("[B, …, 5]"), "{e}");
    // No token at all.
    let none = moe.forward(&Tensor::zeros(&[0, 3, D], DType::F64), &Ctx::eval()).unwrap();
    assert_eq!((none.output.shape(), none.losses.shape()), ([0, 3, D].as_slice(), [0].as_slice()));
    // Logits that are no numbers: the statistics say so, and so does a training step.
    steer(&params, &[0.0, f64::NAN, 0.0, 0.0]);
    let out = moe.forward(&ones_first(&[2, 3, D], 1), &Ctx::eval()).unwrap();
    let e = out.stats.read().err().unwrap().to_string();
    assert!(e.contains("token 0") && e.contains("expert 1") && e.contains("not finite"), "{e}");
    let mut step = PlainStep::new(&params.all(), Sgd::default(), Schedule::constant(0.1)).unwrap();
    let e = step.run_one(|| objective(&out)).err().unwrap().to_string();
    assert!(e.contains("not finite") || e.contains("NaN"), "{e}");
}
