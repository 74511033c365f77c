//! UNCURL and its rivals: planted structure is found, merges are exact where they can be, plans and files survive.

use crate::common::scratch::Scratch;
use prismgrad::models::{ExpertCounts, Gpt, GptConfig, Mixtral, MixtralConfig};
use prismgrad::nn::{Balance, Ctx, ExpertKind, MoeConfig};
use prismgrad::ops::linear::Activation;
use prismgrad::random::{Rng, philox};
use prismgrad::systems::pruning::*;
use prismgrad::{Array, DType, Param, Result, no_grad};

const VOCAB: usize = 50;
const T: usize = 12;

fn config(experts: usize, top_k: usize, expert: ExpertKind) -> GptConfig {
    let mut c = GptConfig::small(VOCAB, T, 2, 16, 2);
    let moe = MoeConfig { expert, ..MoeConfig::new(experts, top_k, 24) };
    c.moe = Some(vec![Some(moe), Some(moe)]);
    c.initializer_range = 0.3;
    c
}

fn kinds() -> [ExpertKind; 2] {
    [ExpertKind::Mlp(Activation::Gelu), ExpertKind::SwiGlu]
}

/// A model whose biases are not zeros either.
fn model(c: GptConfig, seed: u64) -> Gpt {
    let model = Gpt::new(c, seed).unwrap();
    for p in model.params().all().iter().filter(|p| p.name().ends_with("bias")) {
        p.set(Array::generate(p.shape(), DType::F32, |i| 0.3 * philox::normal(seed, p.numel() as u64, i as u64)))
            .unwrap();
    }
    model
}

fn ids(b: usize, seed: u64) -> Array {
    Array::generate(&[b, T], DType::U32, |i| (philox::bits(seed, 9, i as u64) % VOCAB as u64) as f64)
}

fn seen<M: SparseModel>(model: &M) -> Statistics {
    observe(model, (0..4).map(|s| Ok(Batch::new(ids(8, s)))), &Observe::default()).unwrap()
}

fn logits<M: SparseModel>(model: &M) -> Vec<f64> {
    no_grad(|| model.run(&ids(6, 77), &Ctx::eval())).unwrap().0.array().to_f64()
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

fn experts_of(model: &Gpt, layer: usize) -> Vec<Param> {
    model.moe()[layer].unwrap().params().at("experts").all()
}

/// Where the hidden units lie in one expert's part.
fn hidden_dim(p: &Param) -> Option<usize> {
    match p.name() {
        n if n.ends_with("c_fc.weight") || n.ends_with("down_proj.weight") => Some(1),
        n if n.ends_with("c_proj.bias") => None,
        _ => Some(0),
    }
}

/// Makes expert `to` of every layer a copy of `from` with its hidden units permuted, plus noise. Returns the orders.
fn copy_permuted(model: &Gpt, from: usize, to: usize, noise: f64, seed: u64) -> Vec<Vec<usize>> {
    let mut orders = Vec::new();
    for layer in 0..2 {
        let mut order: Vec<usize> = (0..24).collect();
        Rng::new(seed + layer as u64).shuffle(&mut order);
        for p in experts_of(model, layer) {
            let each: usize = p.shape()[1..].iter().product();
            let columns = if p.shape().len() == 3 { p.shape()[2] } else { 1 };
            let mut all = p.value().to_f64();
            for i in 0..each {
                let (r, c) = (i / columns, i % columns);
                let at = match hidden_dim(&p) {
                    Some(0) => order[r] * columns + c,
                    Some(_) => r * columns + order[c],
                    None => i,
                };
                all[to * each + at] =
                    all[from * each + i] + noise * philox::normal(seed, 5, (layer * 100_000 + i) as u64);
            }
            p.set(Array::from_slice(&all, p.shape()).unwrap().cast(DType::F32)).unwrap();
        }
        orders.push(order);
    }
    orders
}

fn set_router(model: &Gpt, layer: usize, f: impl Fn(usize, usize, &[f64]) -> f64) {
    let w = model.moe()[layer].unwrap().router().weight().clone();
    let (old, d) = (w.value().to_f64(), w.shape()[1]);
    w.set(Array::generate(w.shape(), DType::F32, |i| f(i / d, i % d, &old))).unwrap();
}

#[test]
fn a_planted_permutation_is_recovered_and_the_merged_expert_is_the_original() {
    for kind in kinds() {
        let m = model(config(2, 1, kind), 1);
        let orders = copy_permuted(&m, 0, 1, 0.0, 3);
        for (layer, order) in orders.iter().enumerate() {
            let found = alignment(m.moe()[layer].unwrap(), 0, 1).unwrap();
            assert_eq!(found.iter().map(|&u| u as usize).collect::<Vec<_>>(), *order, "{kind:?}");
        }
        let plan = Reduce::new(Keep::Same(1)).plan(&m, &seen(&m)).unwrap();
        let small = plan.apply(&m).unwrap();
        let anchor = plan.layers[0].as_ref().unwrap().anchors[0];
        for (old, new) in experts_of(&m, 0).iter().zip(experts_of(&small, 0)) {
            let old = old.value().slice(0, anchor..anchor + 1).unwrap();
            assert!(apart(&old.to_f64(), &new.value().to_f64()) <= 1e-5, "{kind:?} {}", new.name());
        }
        // Without the alignment the mean of the two is another expert.
        let crooked = Reduce { align: false, ..Reduce::new(Keep::Same(1)) };
        let small = crooked.plan(&m, &seen(&m)).unwrap().apply(&m).unwrap();
        let (old, new) = (experts_of(&m, 0)[0].value(), experts_of(&small, 0)[0].value());
        assert!(apart(&old.slice(0, anchor..anchor + 1).unwrap().to_f64(), &new.to_f64()) > 0.1);
    }
}

#[test]
fn planted_clusters_are_found_and_the_reduced_model_is_the_original_with_tied_routers() {
    for kind in kinds() {
        // Four experts, each three times, interleaved.
        let m = model(config(12, 1, kind), 2);
        for e in 4..12 {
            copy_permuted(&m, e % 4, e, 1e-4, 10 + e as u64);
        }
        for layer in 0..2 {
            set_router(&m, layer, |e, i, old| old[e % 4 * 16 + i] + 1e-3 * philox::normal(4, e as u64, i as u64));
        }
        let stats = seen(&m);
        let reduce = Reduce { router: RouterInit::ClusterMean, ..Reduce::new(Keep::Same(4)) };
        let plan = reduce.plan(&m, &stats).unwrap();
        let planted: Vec<usize> = (0..12).map(|e| e % 4).collect();
        for layer in plan.layers.iter().flatten() {
            let mut of = vec![0; 12];
            layer.clusters.iter().enumerate().for_each(|(c, m)| m.iter().for_each(|&e| of[e] = c));
            assert!(adjusted_rand(&of, &planted) >= 0.95, "{of:?}");
        }
        // With one expert for each token the gate of three equal experts is a third of theirs together: the outputs are compared
        // with the gates of the reduced router, which a router of the four alone has.
        let four = model(config(4, 1, kind), 2);
        let order =
            |l: usize| -> Vec<usize> { plan.layers[l].as_ref().unwrap().clusters.iter().map(|c| c[0] % 4).collect() };
        for layer in 0..2 {
            let order = order(layer);
            let w = four.moe()[layer].unwrap().router().weight().clone();
            let old = m.moe()[layer].unwrap().router().weight().value().to_f64();
            w.set(Array::generate(&[4, 16], DType::F32, |i| old[order[i / 16] * 16 + i % 16])).unwrap();
            for (p, q) in experts_of(&four, layer).iter().zip(experts_of(&m, layer)) {
                let (each, old) = (p.numel() / 4, q.value().to_f64());
                p.set(Array::generate(p.shape(), DType::F32, |i| old[order[i / each] * each + i % each])).unwrap();
            }
        }
        for p in four.params().all().iter().filter(|p| !p.name().contains(".experts.") && !p.name().contains("router"))
        {
            p.set(m.params().get(p.name()).unwrap().value()).unwrap();
        }
        let small = plan.apply(&m).unwrap();
        // Tied: the same rows in both.
        for layer in 0..2 {
            let to = small.moe()[layer].unwrap().router().weight().clone();
            to.set(four.moe()[layer].unwrap().router().weight().value()).unwrap();
        }
        assert!(apart(&logits(&small), &logits(&four)) < 2e-2, "{kind:?} {}", apart(&logits(&small), &logits(&four)));
        // The control: clusters of random members give another model.
        let random = Reduce { method: Method::RandomClusters, seed: 5, ..reduce.clone() }.plan(&m, &stats).unwrap();
        let small = random.apply(&m).unwrap();
        assert!(apart(&logits(&small), &logits(&four)) > 0.2);
    }
}

#[test]
fn keeping_every_expert_changes_nothing() {
    for kind in kinds() {
        let m = model(config(6, 2, kind), 3);
        let stats = seen(&m);
        for method in
            [Method::Uncurl, Method::Greedy, Method::AnchorMerge, Method::Ream, Method::Reap { renormalise: true }]
        {
            for router in [RouterInit::Keep, RouterInit::ClusterMean] {
                let plan = Reduce { method, router, ..Reduce::new(Keep::Same(6)) }.plan(&m, &stats).unwrap();
                assert!(apart(&logits(&plan.apply(&m).unwrap()), &logits(&m)) < 1e-4, "{method:?}");
            }
        }
    }
}

#[test]
fn the_best_static_merge_meets_its_formula_and_nothing_beats_it() {
    let (gate, output) = (
        |t: usize, e: u64| philox::uniform(1, e, t as u64),
        |t: usize, e: u64, i: usize| philox::normal(2, 10 * e + i as u64, t as u64),
    );
    let (n, d) = (4000, 5);
    let gates: Vec<(f64, f64)> = (0..n).map(|t| (gate(t, 0), gate(t, 1))).collect();
    let far = |t: usize| (0..d).map(|i| (output(t, 0, i) - output(t, 1, i)).powi(2)).sum::<f64>();
    let apart: Vec<f64> = (0..n).map(far).collect();
    let found = best_static_merge(&gates, &apart).unwrap();
    // Measured on the outputs themselves.
    let error = |share: f64| {
        let of = |t: usize| {
            let (a, b) = gates[t];
            (0..d)
                .map(|i| {
                    let (f, g) = (output(t, 0, i), output(t, 1, i));
                    (a * f + b * g - (a + b) * (share * f + (1.0 - share) * g)).powi(2)
                })
                .sum::<f64>()
        };
        (0..n).map(of).sum::<f64>() / n as f64
    };
    assert!((error(found.share) - found.error).abs() <= 1e-6 * found.error, "{} {}", error(found.share), found.error);
    for other in [found.share - 0.01, found.share + 0.01, 0.0, 0.5, 1.0] {
        assert!(error(other) >= found.error);
    }
    // A router that never changes its mind between the two loses nothing.
    assert!(best_static_merge(&[(0.3, 0.6), (0.1, 0.2)], &[1.0, 2.0]).unwrap().error < 1e-30);
    assert!(best_static_merge(&[(0.3, 0.6)], &[]).unwrap_err().to_string().contains("1 pairs of gates"));
}

#[test]
fn statistics_are_a_pure_function_of_model_and_task_and_leave_padding_out() {
    let m = model(config(6, 2, kinds()[0]), 4);
    assert_eq!(seen(&m), seen(&m));
    // Two halves of a batch, or one: the same sums.
    let whole = observe(&m, [Ok(Batch::new(ids(8, 0)))], &Observe::default()).unwrap();
    let parts = [0..4, 4..8].map(|r| Ok(Batch::new(ids(8, 0).slice(0, r).unwrap())));
    let parts = observe(&m, parts, &Observe::default()).unwrap();
    for (a, b) in whole.layers.iter().flatten().zip(parts.layers.iter().flatten()) {
        assert_eq!((a.tokens, &a.load), (b.tokens, &b.load));
        assert!(apart(&a.saliency, &b.saliency) < 1e-4 && apart(&a.products, &b.products) < 1e-3);
    }
    // The last tokens of each sequence do not count: as if they were not there, since attention looks back only.
    let counted: Vec<bool> = (0..8 * T).map(|i| i % T < 7).collect();
    let masked = observe(&m, [Ok(Batch::counting(ids(8, 0), counted))], &Observe::default()).unwrap();
    let short = ids(8, 0).slice(1, 0..7).unwrap().contiguous();
    let short = observe(&m, [Ok(Batch::new(short))], &Observe::default()).unwrap();
    for (a, b) in masked.layers.iter().flatten().zip(short.layers.iter().flatten()) {
        assert_eq!((a.tokens, &a.load), (56, &b.load));
        assert!(apart(&a.saliency_renormalised, &b.saliency_renormalised) < 1e-4);
        assert_eq!(a.load.iter().sum::<f64>(), 112.0);
    }
    let error = |b: Batch| observe(&m, [Ok(b)], &Observe::default()).unwrap_err().to_string();
    assert!(error(Batch::counting(ids(1, 0), vec![true; 3])).contains("a mask of 3 for tokens [1, 12]"));
    assert!(error(Batch::counting(ids(1, 0), vec![false; T])).contains("no token was observed"));
}

#[test]
fn saliency_is_gate_times_norm_of_the_output() {
    // One layer, one token for each sequence, top 1: what the layer adds is gate × output.
    let mut c = config(4, 1, kinds()[0]);
    c.moe = Some(vec![c.moe.unwrap()[0], None]);
    let m = model(c, 6);
    let tokens = Array::from_slice(&[3u32, 9, 27, 40], &[4, 1]).unwrap();
    let stats = observe(&m, [Ok(Batch::new(tokens.clone()))], &Observe::default()).unwrap();
    let out = no_grad(|| m.run(&tokens, &Ctx::eval())).unwrap().1[0].clone().unwrap();
    let routed = out.output.array().to_f64();
    let choices = out.stats.routing().choices().to_f64();
    let mut want = vec![0.0; 4];
    for (t, row) in routed.chunks_exact(16).enumerate() {
        want[choices[t] as usize] += row.iter().map(|x| x * x).sum::<f64>().sqrt();
    }
    assert!(apart(&stats.layers[0].as_ref().unwrap().saliency, &want) < 1e-5);
    assert!(stats.layers[1].is_none());
    // Without the flag nothing is kept.
    assert!(out.stats.seen().is_none());
}

#[test]
fn log_sum_exp_gives_a_cluster_the_probability_of_its_experts() {
    // Experts 0 to 2 have the same router rows: a cluster of three equal rows is worth ln 3 more, which a linear router without a bias
    // can give where the inputs have a constant part.
    let m = model(config(6, 1, kinds()[0]), 8);
    for layer in 0..2 {
        set_router(&m, layer, |e, i, old| old[if e < 3 { 0 } else { e } * 16 + i]);
    }
    let stats = seen(&m);
    let plan = |router| Reduce { router, ..Reduce::new(Keep::Same(4)) }.plan(&m, &stats).unwrap();
    let error = |router: RouterInit| {
        let plan = plan(router);
        let (layer, stats) = (plan.layers[0].as_ref().unwrap(), stats.layers[0].as_ref().unwrap());
        let softmax = |h: Vec<f64>| {
            let all: f64 = h.iter().map(|x| x.exp()).sum();
            h.into_iter().map(|x| x.exp() / all).collect::<Vec<f64>>()
        };
        let mut sum = 0.0;
        for (x, h) in stats.inputs.chunks_exact(16).zip(stats.logits.chunks_exact(6)) {
            let full = softmax(h.iter().map(|&x| x as f64).collect());
            let new = |row: &Vec<f64>| row.iter().zip(x).map(|(w, &x)| w * x as f64).sum::<f64>();
            let small = softmax(layer.router.iter().map(new).collect());
            for (p, members) in small.iter().zip(&layer.clusters) {
                sum += (p - members.iter().map(|&e| full[e]).sum::<f64>()).abs();
            }
        }
        sum
    };
    assert!(error(RouterInit::LogSumExp) < 0.5 * error(RouterInit::ClusterMean));
    let few = observe(&m, [Ok(Batch::new(ids(1, 0)))], &Observe::default()).unwrap();
    let refused = Reduce { router: RouterInit::LogSumExp, ..Reduce::new(Keep::Same(4)) }.plan(&m, &few);
    assert!(refused.unwrap_err().to_string().contains("12 kept tokens for a router of width 16"));
}

#[test]
fn plans_are_saved_and_nonsense_is_refused() -> Result<()> {
    let dir = Scratch::new("pruning-plan");
    let m = model(config(6, 1, kinds()[0]), 5);
    let stats = seen(&m);
    let plan = Reduce { method: Method::Ream, ..Reduce::new(Keep::PerLayer(vec![Some(2), None])) }.plan(&m, &stats)?;
    plan.save(dir.join("plan.json"))?;
    let again = Plan::load(dir.join("plan.json"))?;
    assert_eq!(again, plan);
    let small = again.apply(&m)?;
    assert_eq!(small.experts(), [Some(2), Some(6)]);
    assert_eq!(apart(&logits(&small), &logits(&plan.apply(&m)?)), 0.0);
    assert!(small.experts_per_layer().unwrap_err().to_string().contains("[2, 6] experts"));
    // The model's own file says so, and gives it back.
    small.save(&*dir)?;
    let back = Gpt::load(&*dir)?;
    assert_eq!((back.experts(), apart(&logits(&back), &logits(&small))), (small.experts(), 0.0));

    let says =
        |r: Result<Plan>, what: &str| assert!(r.as_ref().unwrap_err().to_string().contains(what), "{:?}", r.err());
    says(Reduce::new(Keep::Same(0)).plan(&m, &stats), "layer 0 cannot keep 0 experts: it has 6");
    says(Reduce::new(Keep::Same(7)).plan(&m, &stats), "cannot keep 7 experts");
    says(Reduce::new(Keep::PerLayer(vec![Some(2)])).plan(&m, &stats), "1 numbers of experts for 2 layers");
    let other = model(config(5, 1, kinds()[0]), 5);
    says(Reduce::new(Keep::Same(2)).plan(&other, &stats), "of a model with other layers or experts");
    let two = model(config(6, 2, kinds()[0]), 5);
    says(Reduce::new(Keep::Same(1)).plan(&two, &seen(&two)), "each token goes to 2");
    assert!(plan.apply(&other).err().unwrap().to_string().contains("the plan is of 6 experts in layer 0, which has 5"));
    let mut edited = plan.clone();
    edited.layers[0].as_mut().unwrap().clusters[0].push(17);
    assert!(edited.apply(&m).err().unwrap().to_string().contains("is none of 6 experts"));
    let mut edited = plan;
    edited.layers[0].as_mut().unwrap().permutations.iter_mut().flatten().for_each(|p| p[0] = p[1]);
    assert!(edited.apply(&m).is_err());
    Ok(())
}

#[test]
fn msmoe_keeps_the_number_asked_for_on_average() {
    let m = model(config(8, 1, kinds()[0]), 9);
    let stats = seen(&m);
    let plan = Reduce { method: Method::MSmoe, ..Reduce::new(Keep::Same(3)) }.plan(&m, &stats).unwrap();
    let counts: Vec<usize> = plan.layers.iter().flatten().map(|l| l.clusters.len()).collect();
    assert_eq!(counts.iter().sum::<usize>(), 6);
    assert!(counts.iter().all(|&n| n >= 1));
    // Everything is in a cluster, and each cluster's weights add up to 1.
    for layer in plan.layers.iter().flatten() {
        assert_eq!(layer.clusters.iter().map(Vec::len).sum::<usize>(), 8);
        for members in &layer.clusters {
            assert!((members.iter().map(|&e| layer.weights[e]).sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn mixtral_files_with_different_counts_round_trip() -> Result<()> {
    let dir = Scratch::new("pruning-mixtral");
    let config = MixtralConfig {
        vocab_size: VOCAB,
        hidden_size: 16,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: T,
        num_local_experts: ExpertCounts::Same(6),
        initializer_range: 0.3,
        ..MixtralConfig::default()
    };
    let m = Mixtral::new(config, 3)?;
    let stats = seen(&m);
    let reduce = Reduce { router: RouterInit::ClusterMean, ..Reduce::new(Keep::PerLayer(vec![Some(2), Some(4)])) };
    let small = reduce.plan(&m, &stats)?.apply(&m)?;
    small.save(&*dir)?;
    let back = Mixtral::load(&*dir)?;
    assert_eq!(back.config().num_local_experts, ExpertCounts::PerLayer(vec![2, 4]));
    assert_eq!(apart(&logits(&back), &logits(&small)), 0.0);
    let sentence = back.config().num_local_experts.same().unwrap_err().to_string();
    assert!(sentence.contains("the layers have [2, 4] experts: there is no one number"), "{sentence}");
    // As many in each layer is one number again, which every reader takes.
    let even = Reduce { keep: Keep::Same(3), ..reduce }.plan(&m, &stats)?.apply(&m)?;
    let other = Scratch::new("pruning-mixtral-even");
    even.save(&*other)?;
    let text = std::fs::read_to_string(other.join("config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["num_local_experts"], 3);
    // A list of the wrong length.
    let wrong = MixtralConfig { num_local_experts: ExpertCounts::PerLayer(vec![2]), ..back.config().clone() };
    assert!(wrong.validate().unwrap_err().to_string().contains("1 numbers of experts for 2 layers"));
    Ok(())
}

#[test]
fn routers_are_trained_alone_and_a_distilled_one_comes_closer() -> Result<()> {
    let m = model(config(6, 1, kinds()[0]), 12);
    let small = Reduce::new(Keep::Same(3)).plan(&m, &seen(&m))?.apply(&m)?;
    let before: Vec<(String, Vec<f64>)> =
        small.params().all().iter().map(|p| (p.name().to_string(), p.value().to_f64())).collect();
    small.params().all()[0].set_trainable(false);
    let loss = |m2: &Gpt, t: u64| {
        let ids = ids(8, t % 4);
        let full = no_grad(|| m.forward(&ids, &Ctx::eval()))?;
        distillation(&m2.forward(&ids, &Ctx::train(t))?, &full)
    };
    let losses = train_routers(&small, 60, 0.02, loss)?;
    let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
    assert!(mean(&losses[56..]) < 0.9 * mean(&losses[..4]), "{:?}", (&losses[..4], &losses[56..]));
    for (p, (name, old)) in small.params().all().iter().zip(&before) {
        assert_eq!(p.value().to_f64() != *old, name.ends_with("router.weight"), "{name}");
        assert_eq!(p.trainable(), p.name() != before[0].0);
    }
    assert!(train_routers(&small, 1, f64::NAN, loss).unwrap_err().to_string().contains("learning rate of NaN"));
    let dense = Gpt::new(GptConfig::small(VOCAB, T, 1, 16, 2), 0)?;
    assert!(train_routers(&dense, 1, 0.1, |d, _| d.losses(ids(1, 0), ids(1, 1), &Ctx::eval())).is_err());
    assert!(dense.experts_per_layer().unwrap_err().to_string().contains("no mixture of experts"));
    Ok(())
}

#[test]
fn a_bias_that_balances_follows_the_anchors() -> Result<()> {
    let mut c = config(4, 1, kinds()[0]);
    let moe = MoeConfig { balance: Balance::Bias { rate: 0.01 }, ..c.moe.as_ref().unwrap()[0].unwrap() };
    c.moe = Some(vec![Some(moe); 2]);
    let m = model(c, 2);
    let small = Reduce { method: Method::Greedy, ..Reduce::new(Keep::Same(2)) };
    let plan = small.plan(&m, &seen(&m))?;
    let after = plan.apply(&m)?;
    for (layer, plan) in plan.layers.iter().enumerate() {
        let bias = |m: &Gpt| m.moe()[layer].unwrap().params().get("balance_bias").unwrap().value().to_f64();
        let want: Vec<f64> = plan.as_ref().unwrap().anchors.iter().map(|&a| bias(&m)[a]).collect();
        assert_eq!(bias(&after), want);
    }
    Ok(())
}
