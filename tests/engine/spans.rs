//! Attention spans: against a dense masked reference, how far they reach, presets, generation with a cache, conversion, private training,
//! bad input.

use crate::common::distance::distance;
use crate::common::scratch::Scratch;
use prismgrad::check::{self, Gen};
use prismgrad::device_tests;
use prismgrad::models::{Extend, Gpt, GptConfig, Positions, Preset, Sampling, generate, span_cost, spans};
use prismgrad::nn::{Ctx, KvCache, MultiHeadAttention, Params};
use prismgrad::ops::attention::{AttentionOptions, Documents, Span, alibi_slope, attention};
use prismgrad::ops::rotary::RotaryTable;
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::random::{NoiseKey, philox};
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use proptest::prelude::*;

/// Whether a query at position `p` sees key `j` of the same document, which begins at `start`: one line for each span, by its definition.
fn sees(span: Span, p: usize, j: usize, start: usize) -> bool {
    match span {
        Span::Full => true,
        Span::Causal => j <= p,
        Span::Window(w) => j <= p && p - j < w,
        Span::Block(b) => j <= p && p / b == j / b,
        Span::Sinks { window, sinks } => j <= p && (p - j < window || j - start < sinks),
    }
}

/// Attention of `q [B, T, H, D]` over `k, v [B, S, H_kv, D]` with the T × S matrix written out, by ordinary ops; `leak` shows every query
/// one key more, the one before the first that it sees.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, o: &AttentionOptions, offsets: &[usize], leak: bool) -> Result<Tensor> {
    let ([b, t, h, d], [_, s, kv, _]) =
        (<[usize; 4]>::try_from(q.shape()).unwrap(), <[usize; 4]>::try_from(k.shape()).unwrap());
    let wide =
        |x: &Tensor| x.unsqueeze(3)?.expand(&[b, s, kv, h / kv, d])?.reshape(&[b, s, h, d])?.permute(&[0, 2, 1, 3]);
    let scores = q.permute(&[0, 2, 1, 3])?.matmul(&wide(k)?.transpose(-1, -2)?)?;
    let document = |p: usize| offsets.partition_point(|&x| x <= p);
    let seen = |i: usize, j: usize| {
        let (p, n) = (i + s - t, document(j));
        n > 0 && n < offsets.len() + (s > t || offsets == [0]) as usize && document(p) == n && {
            let start = offsets[n - 1];
            let first = (start..s).find(|&x| sees(o.span, p, x, start));
            sees(o.span, p, j, start) || (leak && first.is_some_and(|f| j + 1 == f))
        }
    };
    let bias = Array::generate(&[h, t, s], DType::F64, |x| {
        let (head, i, j) = (x / (t * s), x / s % t, x % s);
        match seen(i, j) {
            false => -1e30,
            true if o.alibi => -alibi_slope(head, h) * (i + s - t).abs_diff(j) as f64,
            true => 0.0,
        }
    });
    let scores = scores.mul_scalar(o.scale.unwrap_or(1.0 / (d as f64).sqrt()))?.add(&Tensor::new(bias))?;
    let p = scores.sub(&scores.logsumexp(&[-1], true)?)?.exp()?;
    // Dropout by (b, h, i, j), and nothing where nothing is seen.
    let kept = Array::generate(&[b, h, t, s], DType::F64, |x| {
        let (i, j) = (x / s % t, x % s);
        let keep = match o.dropout {
            Some((p, seed)) if philox::dropout_uniform(seed, x as u64) < p as f32 => 0.0,
            Some((p, _)) => 1.0 / (1.0 - p),
            None => 1.0,
        };
        if seen(i, j) { keep } else { 0.0 }
    });
    p.mul(&Tensor::new(kept))?.matmul(&wide(v)?)?.permute(&[0, 2, 1, 3])
}

/// Output and gradients of an attention over random inputs.
type Attention<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn run(inputs: &[Array], weights: &Array, dtype: DType, f: Attention) -> Vec<Vec<f64>> {
    let x: Vec<Tensor> = inputs.iter().map(|a| Tensor::leaf(a.cast(dtype))).collect();
    let y = f(&x[0], &x[1], &x[2]).unwrap();
    let grads = y.mul(&Tensor::new(weights.cast(dtype))).unwrap().backward().unwrap();
    std::iter::once(y.array().to_f64()).chain(x.iter().map(|x| grads.of(x).unwrap().to_f64())).collect()
}

fn any_span() -> impl Strategy<Value = Span> {
    prop_oneof![
        Just(Span::Full),
        Just(Span::Causal),
        (1usize..50).prop_map(Span::Window),
        (1usize..50).prop_map(Span::Block),
        (1usize..50, 0usize..40).prop_map(|(window, sinks)| Span::Sinks { window, sinks }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// All spans, odd lengths, grouped queries, documents, sinks, biases by distance, dropout: values and gradients in f64.
    #[test]
    fn every_span_is_dense_attention_with_a_mask(
        span in any_span(), t in 1usize..150, extra in 0usize..40, kv in 1usize..3, group in 1usize..4, d in 1usize..20,
        cuts in prop::option::of(prop::collection::vec(0.0f64..1.0, 1..4)), alibi: bool, dropout: bool, seed: u64,
    ) {
        let (mut o, mut offsets, mut s) = (AttentionOptions::new(span), vec![0], t + extra);
        if let Some(cuts) = cuts {
            // The last cut is the end of the last document: what follows is padding.
            offsets.extend(cuts.iter().map(|c| (c * t as f64).round() as usize));
            offsets.sort();
            (o.documents, s) = (Some(Documents::packed(&offsets)), t);
        }
        (o.alibi, o.dropout) = (alibi, dropout.then_some((0.3, seed)));
        let mut g = Gen::new(seed);
        let inputs = [g.array(&[2, t, kv * group, d]), g.array(&[2, s, kv, d]), g.array(&[2, s, kv, d])];
        let w = g.array(&[2, t, kv * group, d]);
        let want = run(&inputs, &w, DType::F64, &|q, k, v| dense(q, k, v, &o, &offsets, false));
        let got = run(&inputs, &w, DType::F64, &|q, k, v| attention(q, k, v, &o));
        for (part, (g, w)) in ["out", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
            let worst = distance(g, w);
            prop_assert!(worst < 1e-10, "{part} of {o:?}: off by {worst:e}");
        }
    }

    /// The number of pairs in closed form is the number of pairs.
    #[test]
    fn pairs_are_counted(span in any_span(), tokens in 0usize..200) {
        let all = (0..tokens).flat_map(|p| (0..tokens).map(move |j| (p, j)));
        prop_assert_eq!(span.pairs(tokens), all.filter(|&(p, j)| sees(span, p, j, 0)).count() as u64);
    }
}

device_tests! {
    /// Long enough for kernels to leave out tiles between the sinks and the window, in every dtype and both classes of heads.
    fn tiles_between_sinks_and_window_are_left_out(device) {
        let span = Span::Sinks { window: 20, sinks: 5 };
        // Positions: as few as leave a tile out in some kernel of the dtype.
        let dtypes =
            [(DType::F64, 1e-10, 20, 140), (DType::F32, 2e-4, 70, 210), (DType::BF16, 0.06, 16, 270), (DType::F32, 2e-4, 16, 300)];
        let dtypes = if device.is_cpu() { &dtypes[..] } else { &dtypes[..3] };
        for (i, &(dtype, tolerance, d, t)) in dtypes.iter().enumerate() {
            // Under the emulator, which is slow, one combination for each dtype.
            let all: &[(bool, bool)] = &[(true, true), (true, false), (false, true)];
            for &(alibi, packed) in if device.is_cpu() { all } else { &all[i % 3..i % 3 + 1] } {
                let offsets = if packed { vec![0, 17, t] } else { vec![0] };
                let o = AttentionOptions {
                    alibi,
                    documents: packed.then(|| Documents::packed(&offsets)),
                    ..AttentionOptions::new(span)
                };
                let mut g = Gen::new(7);
                let inputs = [g.array(&[1, t, 2, d]), g.array(&[1, t, 1, d]), g.array(&[1, t, 1, d])];
                let (inputs, w) = (inputs.map(|x| x.cast(dtype).cast(DType::F64)), g.array(&[1, t, 2, d]));
                let w = w.cast(dtype).cast(DType::F64);
                let want = run(&inputs, &w, DType::F64, &|q, k, v| dense(q, k, v, &o, &offsets, false));
                let inputs = inputs.map(|x| x.to(device).unwrap());
                let got = run(&inputs, &w.to(device).unwrap(), dtype, &|q, k, v| attention(q, k, v, &o));
                for (part, (g, w)) in ["out", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want)) {
                    let scale = w.iter().fold(1.0f64, |m, x| m.max(x.abs()));
                    let worst = distance(g, w) / scale;
                    assert!(worst < tolerance, "{part} {dtype} {o:?} on {device}: off by {worst:e}");
                }
            }
        }
    }
}

device_tests! {
    /// The last query over the sinks and its window alone, as a cache has them, sees what it sees over all keys.
    fn forgotten_keys_change_no_distance(device) {
        let (t, window, sinks) = (50, 7, 3);
        let mut g = Gen::new(3);
        let x = [g.array(&[2, t, 4, 6]), g.array(&[2, t, 2, 6]), g.array(&[2, t, 2, 6])].map(|x| x.to(device).unwrap());
        let [q, k, v] = x.map(Tensor::new);
        let o = AttentionOptions { alibi: true, ..AttentionOptions::new(Span::Sinks { window, sinks }) };
        let last = |x: &Tensor| x.slice(1, t - 1..t).unwrap();
        let want = last(&attention(&q, &k, &v, &o).unwrap()).array().to_f64();
        let kept = |x: &Tensor| {
            let parts = [x.slice(1, 0..sinks).unwrap(), x.slice(1, t - window..t).unwrap()];
            Tensor::concat(&[&parts[0], &parts[1]], 1).unwrap()
        };
        let o = AttentionOptions { skipped: t - window - sinks, ..o };
        let got = attention(&last(&q), &kept(&k), &kept(&v), &o).unwrap().array().to_f64();
        assert!(distance(&got, &want) < 1e-12, "on {device}");
    }
}

/// For each position, whether the loss at `t` depends on its vector: the largest gradient that it has.
fn influence(forward: &dyn Fn(&Tensor) -> Result<Tensor>, n: usize, d: usize, t: usize) -> Vec<f64> {
    let x = Tensor::leaf(Gen::new(3).ordinary(&[1, n, d]));
    let y = forward(&x).unwrap().slice(1, t..t + 1).unwrap().square().unwrap().sum_all().unwrap();
    let grads = y.backward().unwrap();
    let g = grads.of(&x).unwrap().to_f64();
    g.chunks(d).map(|row| row.iter().fold(0.0f64, |m, x| m.max(x.abs()))).collect()
}

/// Positions on which the loss at `t` depends although it must not.
fn leaks(influence: &[f64], allowed: impl Fn(usize) -> bool) -> Vec<usize> {
    (0..influence.len()).filter(|&s| influence[s] != 0.0 && !allowed(s)).collect()
}

const NOWHERE: [usize; 0] = [];

/// Layers of attention with these spans, and a residual stream.
fn stack(list: &[Span], alibi: bool) -> (Params, Vec<MultiHeadAttention>) {
    let params = Params::new(5, DType::F64);
    let layer = |(i, span): (usize, &Span)| {
        let builder = MultiHeadAttention::builder(8, 2).span(*span).alibi(alibi);
        builder.build(&params.at(&i.to_string())).unwrap()
    };
    let layers = list.iter().enumerate().map(layer).collect();
    (params, layers)
}

fn through(layers: &[MultiHeadAttention], x: &Tensor) -> Result<Tensor> {
    layers.iter().try_fold(x.clone(), |x, layer| x.add(&layer.forward(&x, &Ctx::eval())?))
}

#[test]
fn blocks_pass_nothing_on_and_windows_pass_on_what_they_reach() {
    let (n, b) = (40, 8);
    let of = |list: &[Span], t: usize| {
        let (_params, layers) = stack(list, false);
        influence(&|x| through(&layers, x), n, 8, t)
    };
    for t in [7, 8, 21, 39] {
        let inside = |s: usize| s <= t && s / b == t / b;
        let blocks = of(&[Span::Block(b); 4], t);
        assert_eq!(leaks(&blocks, inside), NOWHERE);
        assert!((0..n).filter(|&s| inside(s)).all(|s| blocks[s] != 0.0), "{t}: {blocks:?}");
        // One full layer, wherever it is, is enough.
        for at in 0..4 {
            let mut list = [Span::Block(b); 4];
            list[at] = Span::Causal;
            let mixed = of(&list, t);
            assert_eq!(leaks(&mixed, |s| s <= t), NOWHERE);
            assert!(mixed[..=t].iter().all(|g| *g != 0.0), "{at} {t}");
        }
    }
    let t = 39;
    for (layers, w) in [(1, 5), (3, 4), (4, 8), (2, 1)] {
        let reach = layers * (w - 1);
        let windows = of(&vec![Span::Window(w); layers], t);
        assert!(
            (0..n).all(|s| (windows[s] != 0.0) == (s <= t && t - s <= reach)),
            "{layers} layers of {w}: {windows:?}"
        );
        let sinks = of(&vec![Span::Sinks { window: w, sinks: 2 }; layers], t);
        assert!(sinks[0] != 0.0 && sinks[1] != 0.0 && sinks[t - reach] != 0.0);
        assert!((2..t - reach).all(|s| sinks[s] == 0.0), "{layers} layers of {w} with sinks: {sinks:?}");
    }
}

/// The check above finds a block layer that shows each query one key too many.
#[test]
fn a_leak_of_one_key_is_found() {
    let (n, b, d) = (40, 8, 8);
    let layer = |x: &Tensor, leak: bool| -> Result<Tensor> {
        let heads = x.reshape(&[1, n, 2, d / 2])?;
        let o = AttentionOptions::new(Span::Block(b));
        x.add(&dense(&heads, &heads, &heads, &o, &[0], leak)?.reshape(&[1, n, d])?)
    };
    for t in [9, 21, 39] {
        let inside = |s: usize| s <= t && s / b == t / b;
        let of = |leak: bool| influence(&|x| layer(&layer(x, leak)?, false), n, d, t);
        assert_eq!(leaks(&of(false), inside), NOWHERE);
        assert_eq!(leaks(&of(true), inside), [t / b * b - 1], "{t}");
    }
}

/// A model's embedding of position s is a row of its own, so that the table's gradient says what the loss depends on.
#[test]
fn a_models_losses_reach_what_its_spans_show() {
    let (n, b) = (24, 8);
    let reach = |preset: &Preset, t: usize| -> Vec<bool> {
        let mut c = GptConfig::small(n, n, 4, 8, 2).with_spans(spans(preset, 4, Span::Block(b)).unwrap()).rotary();
        (c.tie_word_embeddings, c.initializer_range) = (false, 0.5);
        let model = Gpt::with_dtype(c, 1, DType::F64).unwrap();
        let ids = Array::arange(n, DType::U32).reshape(&[1, n]).unwrap();
        let y = model.forward(&ids, &Ctx::eval()).unwrap().slice(1, t..t + 1).unwrap();
        let grads = y.square().unwrap().sum_all().unwrap().backward().unwrap();
        let g = grads.param(&model.params().get("wte.weight").unwrap()).unwrap().sum().unwrap().to_f64();
        g.chunks(8).map(|row| row.iter().any(|x| *x != 0.0)).collect()
    };
    for t in [5, 15, 23] {
        let block: Vec<bool> = (0..n).map(|s| s <= t && s / b == t / b).collect();
        let all: Vec<bool> = (0..n).map(|s| s <= t).collect();
        assert_eq!(reach(&Preset::Sparse, t), block);
        for preset in [Preset::Bottom(1), Preset::Top(1), Preset::Middle(2), Preset::Spread(2), Preset::Full] {
            assert_eq!(reach(&preset, t), all, "{preset}");
        }
    }
}

#[test]
fn presets_say_which_layers_are_full() {
    let full = |preset: &Preset, layers: usize| -> Vec<usize> {
        let list = spans(preset, layers, Span::Block(4)).unwrap();
        (0..layers).filter(|&i| list[i] == Span::Causal).collect()
    };
    let table: [(Preset, &str, &[usize]); 8] = [
        (Preset::Full, "full", &[0, 1, 2, 3, 4, 5]),
        (Preset::Sparse, "sparse", &[]),
        (Preset::Bottom(2), "bottom(2)", &[0, 1]),
        (Preset::Top(2), "top(2)", &[4, 5]),
        (Preset::Middle(2), "middle(2)", &[2, 3]),
        (Preset::Spread(2), "spread(2)", &[1, 4]),
        (Preset::Spread(6), "spread(6)", &[0, 1, 2, 3, 4, 5]),
        (Preset::FirstMiddleLast, "first_middle_last", &[0, 3, 5]),
    ];
    for (preset, name, want) in table {
        assert_eq!(full(&preset, 6), want, "{name}");
        assert_eq!((preset.to_string().as_str(), name.parse::<Preset>().unwrap()), (name, preset));
    }
    for layers in 1..9 {
        for l in 0..=layers {
            for preset in [Preset::Bottom(l), Preset::Top(l), Preset::Middle(l), Preset::Spread(l)] {
                assert_eq!(full(&preset, layers).len(), l, "{preset} of {layers}");
            }
        }
    }
    let list = vec![Span::Window(3), Span::Causal];
    assert_eq!(spans(&Preset::List(list.clone()), 2, Span::Causal).unwrap(), list);
}

/// A model whose layers differ in everything that a cache must get right.
fn mixed(dtype: DType, positions: &[Positions; 4], sizes: [usize; 3]) -> Gpt {
    let [b, w, sinks] = sizes;
    let mut c = GptConfig::small(31, 64, 4, 16, 4);
    let list = vec![Span::Block(b), Span::Window(w), Span::Causal, Span::Sinks { window: w, sinks }];
    c = c.with_spans(list);
    c.layer_positions = Some(positions.to_vec());
    (c.n_head_kv, c.initializer_range) = (Some(2), 0.4);
    Gpt::with_dtype(c, 8, dtype).unwrap()
}

const ALL_POSITIONS: [[Positions; 4]; 3] = [
    [Positions::Rotary, Positions::Alibi, Positions::None, Positions::Alibi],
    [Positions::Alibi, Positions::Rotary, Positions::Alibi, Positions::Rotary],
    [Positions::None; 4],
];

/// Token by token and in pieces of any length, over three block edges and past every window.
#[test]
fn a_cache_changes_no_logit() {
    for (k, positions) in ALL_POSITIONS.iter().enumerate() {
        for pieces in [vec![1; 37], vec![5, 1, 1, 20, 1, 1, 1, 7], vec![10, 27], vec![3, 8, 8, 1, 8, 8, 1]] {
            let sizes = [[8, 5, 3], [10, 7, 1], [1, 1, 2]][k];
            let model = mixed(DType::F64, positions, sizes);
            let ids = Array::generate(&[2, 37], DType::U32, |i| ((i * 7 + i * i) % 31) as f64);
            let want = model.forward(&ids, &Ctx::eval()).unwrap().array().to_f64();
            let (mut caches, mut past) = (vec![KvCache::default(); 4], 0);
            for t in &pieces {
                let part = ids.slice(1, past..past + t).unwrap();
                let got = no_grad(|| model.forward_cached(&part, &mut caches, past, &Ctx::eval())).unwrap();
                for row in 0..2 {
                    let (g, w) = (row * t * 31..(row + 1) * t * 31, (row * 37 + past) * 31);
                    let worst = distance(&got.array().to_f64()[g], &want[w..w + t * 31]);
                    assert!(worst < 1e-10, "{positions:?} {pieces:?} at {past}: off by {worst:e}");
                }
                past += t;
            }
            // What is held is what the spans can still see: 2 · positions · B · H_kv · D elements.
            let [b, w, sinks] = sizes;
            let held = [past % b, w, past, w + sinks].map(|n| n * 2 * 2 * 2 * 4 * 8);
            assert_eq!(caches.iter().map(KvCache::bytes).collect::<Vec<_>>(), held, "{pieces:?}");
            assert!(caches[0].capacity_bytes() <= b * 256 && caches[1].capacity_bytes() <= w * 256);
        }
    }
}

/// Greedy text with the cache is that without one, and the memory is what the cost says.
#[test]
fn generated_text_is_that_without_a_cache() {
    for positions in &ALL_POSITIONS {
        let model = mixed(DType::F32, positions, [8, 5, 3]);
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let got = generate(&model, &[3, 1, 4], 34, &greedy, None).unwrap();
        let mut text = vec![3u32, 1, 4];
        for _ in 0..34 {
            let ids = Array::from_slice(&text, &[1, text.len()]).unwrap();
            let logits = model.forward(&ids, &Ctx::eval()).unwrap();
            let last = logits.array().slice(1, text.len() - 1..text.len()).unwrap().to_f64();
            text.push((0..31).fold(0, |b, i| if last[i] > last[b] { i } else { b }) as u32);
        }
        assert_eq!(got, text[3..], "{positions:?}");
        let mut caches = vec![KvCache::reserving(37); 4];
        let ids = Array::from_slice(&text, &[1, 37]).unwrap();
        no_grad(|| model.forward_cached(&ids, &mut caches, 0, &Ctx::eval())).unwrap();
        let taken: usize = caches.iter().map(KvCache::capacity_bytes).sum();
        assert_eq!(taken, span_cost(model.config(), 37).cache_bytes);
    }
}

#[test]
fn a_model_of_mixed_spans_has_exact_gradients_of_each_sample() {
    for positions in &ALL_POSITIONS[..2] {
        let model = mixed(DType::F64, positions, [3, 2, 1]);
        let ids = |k: usize| Array::generate(&[3, 9], DType::U32, |i| ((i * 11 + k) % 31) as f64);
        let (x, y) = (ids(2), ids(5));
        let losses = || model.losses(&x, &y, &Ctx::eval());
        check::per_sample(&losses, &model.params().all(), 1, 1e-9).unwrap();
    }
}

/// Samples are followed through every span; the step refuses nothing and moves every parameter.
#[test]
fn a_model_of_mixed_spans_trains_privately() {
    let model = mixed(DType::F32, &ALL_POSITIONS[0], [3, 2, 1]);
    let config = PrivacyConfig::target(1e3, 1e-3).records(6).expected_batch(3.0).steps(50).noise_multiplier(1.0);
    let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(3)).unwrap();
    let mut step = PrivateStep::new(&model.params().all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
    let before: Vec<Vec<f64>> = model.params().all().iter().map(|p| p.value().to_f64()).collect();
    for t in 0..4 {
        step.run(6, |records| {
            let ids = |k: usize| {
                Array::generate(&[records.len(), 9], DType::U32, |i| ((records[i / 9] * 5 + i % 9 * 3 + k) % 31) as f64)
            };
            model.losses(ids(0), ids(3), &Ctx::train(t))
        })
        .unwrap();
    }
    for (p, before) in model.params().all().iter().zip(before) {
        assert!(p.value().to_f64().iter().zip(before).all(|(a, b)| *a != b), "{}", p.name());
    }
}

/// Packed documents through a whole model: each has the losses that it has alone, whatever the spans. Rotary positions and distances are
/// relative, so that it does not matter where a document begins; blocks are counted from the start of the sequence.
#[test]
fn packed_documents_are_as_if_alone() {
    let list = vec![Span::Causal, Span::Window(4), Span::Sinks { window: 3, sinks: 2 }, Span::Causal];
    let mut c = GptConfig::small(31, 32, 4, 16, 4).with_spans(list).rotary();
    c.layer_positions = Some(vec![Positions::Rotary, Positions::Alibi, Positions::None, Positions::Rotary]);
    c.initializer_range = 0.4;
    let model = Gpt::with_dtype(c, 8, DType::F64).unwrap();
    let ids = Array::generate(&[1, 29], DType::U32, |i| ((i * 7 + i * i) % 31) as f64);
    let offsets = [0, 11, 12, 29];
    let logits = |ids: &Array, ctx: &Ctx| model.forward(ids, ctx).unwrap().array().to_f64();
    let together = logits(&ids, &Ctx::eval().with_documents(Documents::packed(&offsets)));
    for w in offsets.windows(2) {
        let alone = logits(&ids.slice(1, w[0]..w[1]).unwrap(), &Ctx::eval());
        assert!(distance(&together[w[0] * 31..w[1] * 31], &alone) < 1e-10, "{w:?}");
    }
}

#[test]
fn spans_and_positions_are_saved_with_the_model() {
    let folder = Scratch::new("spans");
    let model = mixed(DType::F32, &ALL_POSITIONS[0], [8, 5, 3]);
    model.save(&*folder).unwrap();
    let again = Gpt::load(&*folder).unwrap();
    assert_eq!(again.config(), model.config());
    let ids = Array::arange(12, DType::U32).reshape(&[1, 12]).unwrap();
    let logits = |m: &Gpt| m.forward(&ids, &Ctx::eval()).unwrap().array().to_f64();
    assert_eq!(logits(&again), logits(&model));
    // Rotary positions and no table.
    let rotary = Gpt::new(GptConfig::small(31, 16, 2, 8, 2).rotary(), 1).unwrap();
    rotary.save(&*folder).unwrap();
    let again = Gpt::load(&*folder).unwrap();
    assert_eq!((again.config(), again.params().get("wpe.weight").is_none()), (rotary.config(), true));
    // A model without spans of its own is a GPT-2's configuration and nothing else.
    Gpt::new(GptConfig::small(31, 16, 2, 8, 2), 1).unwrap().save(&*folder).unwrap();
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    for own in ["spans", "n_head_kv", "learned_positions", "layer_positions", "rope_theta", "moe"] {
        assert!(!text.contains(own), "{own}: {text}");
    }
}

fn bits(model: &Gpt) -> Vec<Vec<u8>> {
    model.params().all().iter().map(|p| p.value().to_bytes()).collect()
}

#[test]
fn a_model_gets_other_spans_and_more_positions() {
    let ids = |n: usize| Array::generate(&[1, n], DType::U32, |i| ((i * 7 + i * i) % 31) as f64);
    let logits = |m: &Gpt, n: usize| m.forward(ids(n), &Ctx::eval()).unwrap().array().to_f64();
    for rotary in [false, true] {
        let plain = GptConfig::small(31, 12, 2, 16, 2);
        let c = if rotary { plain.rotary() } else { plain };
        let make = || Gpt::new(c.clone(), 4).unwrap();
        // Nothing changed: the same bits.
        let same = make().with_spans(vec![Span::Causal; 2], 12, Extend::Fit).unwrap();
        assert_eq!((bits(&same), logits(&same, 12)), (bits(&make()), logits(&make(), 12)));
        // Other spans: a block's width and less is seen as before.
        let blocks = make().with_spans(vec![Span::Block(6); 2], 12, Extend::Fit).unwrap();
        assert_eq!(bits(&blocks), bits(&make()));
        let (a, b) = (logits(&blocks, 12), logits(&make(), 12));
        assert!(a[..6 * 31] == b[..6 * 31] && a[6 * 31..7 * 31] != b[6 * 31..7 * 31]);
        // Longer.
        let long = make().with_spans(vec![Span::Block(6), Span::Causal], 30, Extend::Fit).unwrap();
        assert_eq!(logits(&long, 30).len(), 30 * 31);
        assert_eq!(long.config().n_positions, 30);
        if rotary {
            // The slowest pair turns as far over 30 positions as it did over 12: its frequency is base^(−(D − 2)/D), D = 8.
            let slowest = |base: f64| base.powf(-6.0 / 8.0);
            let (a, b) = (slowest(long.config().rope_theta) * 30.0, slowest(1e4) * 12.0);
            assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
            let plain = make().with_spans(vec![Span::Causal; 2], 30, Extend::Plain).unwrap();
            assert_eq!(plain.config().rope_theta, 1e4);
        } else {
            let table = |m: &Gpt| m.params().get("wpe.weight").unwrap().value().to_f64();
            let (old, new) = (table(&make()), table(&long));
            assert!((0..30 * 16).all(|i| new[i] == old[i % (12 * 16)]));
            let plain = table(&make().with_spans(vec![Span::Causal; 2], 30, Extend::Plain).unwrap());
            assert!(plain[..12 * 16] == old && plain[12 * 16..18 * 16] != old[..6 * 16]);
        }
        // It can be trained further.
        let mut step = PlainStep::new(&long.params().all(), Sgd::default(), Schedule::constant(0.5)).unwrap();
        let mut loss =
            |long: &Gpt| step.run_one(|| long.losses(ids(30), ids(30), &Ctx::train(0))).unwrap().loss().unwrap();
        let first = loss(&long);
        let last = (0..10).fold(0.0, |_, _| loss(&long));
        assert!(last < first, "{last} {first}");
    }
}

/// With l = L a preset is the full model, bit for bit, and a window, block or span with sinks as long as the sequence is causal.
#[test]
fn all_layers_full_is_full() {
    let c = || GptConfig::small(31, 24, 3, 16, 2);
    let ids = Array::generate(&[2, 24], DType::U32, |i| ((i * 7 + i * i) % 31) as f64);
    let of = |list: Vec<Span>| -> Vec<Vec<u8>> {
        let model = Gpt::new(c().with_spans(list), 4).unwrap();
        let grads = model.losses(&ids, &ids, &Ctx::eval()).unwrap().backward().unwrap();
        model.params().all().iter().map(|p| grads.param(p).unwrap().sum().unwrap().to_bytes()).collect()
    };
    let full = of(vec![Span::Causal; 3]);
    for preset in [Preset::Bottom(3), Preset::Top(3), Preset::Middle(3), Preset::Spread(3), Preset::FirstMiddleLast] {
        assert_eq!(of(spans(&preset, 3, Span::Block(4)).unwrap()), full, "{preset}");
    }
    for span in [Span::Window(24), Span::Block(24), Span::Sinks { window: 24, sinks: 4 }] {
        assert_eq!(of(vec![span; 3]), full, "{span:?}");
    }
}

/// Saved shares of the attention of six layers at 512 positions with blocks of 64, as integers of pairs.
#[test]
fn shares_of_pairs_are_those_of_the_paper() {
    let c = GptConfig::small(512, 512, 6, 96, 4).rotary();
    let of = |preset: &Preset, sparse: Span| span_cost(&c.clone().with_spans(spans(preset, 6, sparse).unwrap()), 512);
    let full = of(&Preset::Full, Span::Block(64));
    assert_eq!(full.pairs, vec![512 * 513 / 2; 6]);
    for (preset, sparse, share) in [
        (Preset::Sparse, Span::Block(64), 0.1267),
        (Preset::Bottom(1), Span::Block(64), 0.2723),
        (Preset::Bottom(2), Span::Block(64), 0.4178),
        (Preset::Bottom(3), Span::Block(64), 0.5634),
        (Preset::Sparse, Span::Window(64), 0.2341),
    ] {
        let cost = of(&preset, sparse);
        let (attention, model) = cost.saved(&full);
        assert!((1.0 - attention - share).abs() < 1e-3, "{preset} {sparse:?}: {attention}");
        assert!(model > 0.0 && model < attention / 3.0, "{preset}: {model} of the whole model");
        // 4 · pairs · d, and cache for what is seen.
        assert_eq!(cost.attention_flops, 4 * 96 * cost.pairs.iter().sum::<u64>());
        let seen = cost.pairs.iter().filter(|p| **p == 512 * 513 / 2).count();
        assert_eq!(cost.cache_bytes, (seen * 512 + (6 - seen) * 64) * 2 * 96 * 4);
        assert_eq!(cost.activation_bytes, full.activation_bytes, "spans change nothing that is kept");
    }
}

#[test]
fn what_does_not_fit_is_refused_in_a_sentence() {
    fn says<T>(result: Result<T>, words: &[&str]) {
        let error = result.err().expect("an error").to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{words:?}: {error}");
    }
    let c = || GptConfig::small(31, 16, 2, 8, 2);
    let gpt = |change: &dyn Fn(&mut GptConfig)| {
        let mut c = c();
        change(&mut c);
        Gpt::new(c, 0)
    };
    says(gpt(&|c| c.spans = Some(vec![Span::Causal; 3])), &["3 spans", "2 layers"]);
    says(gpt(&|c| c.spans = Some(vec![Span::Causal, Span::Window(0)])), &["span of 0"]);
    says(gpt(&|c| c.spans = Some(vec![Span::Block(0), Span::Causal])), &["span of 0"]);
    says(gpt(&|c| c.spans = Some(vec![Span::Sinks { window: 0, sinks: 3 }, Span::Causal])), &["span of 0"]);
    says(gpt(&|c| c.spans = Some(vec![Span::Block(17), Span::Causal])), &["blocks of 17", "16 positions"]);
    says(gpt(&|c| c.n_head_kv = Some(3)), &["n_head_kv 3"]);
    says(gpt(&|c| c.n_head_kv = Some(0)), &["n_head_kv 0"]);
    says(gpt(&|c| c.layer_positions = Some(vec![Positions::Rotary])), &["1 entries", "2 layers"]);
    says(gpt(&|c| (c.n_head, c.layer_positions) = (8, Some(vec![Positions::Rotary; 2]))), &["heads of 1"]);
    says(gpt(&|c| c.rope_theta = f64::NAN), &["rope_theta"]);
    says(spans(&Preset::Bottom(5), 4, Span::Block(4)), &["bottom(5)", "4"]);
    says(spans(&Preset::Sparse, 4, Span::Block(0)), &["span of 0"]);
    says(spans(&Preset::List(vec![Span::Causal]), 4, Span::Causal), &["1 spans", "4 layers"]);
    says("bottom".parse::<Preset>(), &["bottom", "known are"]);
    says("bottom(x)".parse::<Preset>(), &["bottom(x)", "known are"]);
    let model = Gpt::new(c(), 0).unwrap();
    let ids = |n: usize| Array::zeros(&[1, n], DType::U32);
    says(model.forward(ids(17), &Ctx::eval()), &["17 positions", "16"]);
    let mut caches = vec![KvCache::default(); 2];
    says(model.forward_cached(ids(1), &mut caches, usize::MAX, &Ctx::eval()), &["positions"]);
    says(model.forward_cached(ids(1), &mut caches[..1], 0, &Ctx::eval()), &["1 caches", "2 layers"]);
    model.forward_cached(ids(3), &mut caches, 0, &Ctx::eval()).unwrap();
    says(model.forward_cached(ids(3), &mut caches, 0, &Ctx::eval()), &["seen 3"]);
    says(model.forward_cached(Array::zeros(&[2, 1], DType::U32), &mut caches, 3, &Ctx::eval()), &["one batch"]);
    says(model.with_spans(vec![Span::Causal], 16, Extend::Fit), &["1 spans"]);
    says(Gpt::new(c(), 0).unwrap().with_spans(vec![Span::Causal; 2], 8, Extend::Fit), &["8 positions", "16"]);
    let params = Params::new(0, DType::F32);
    let builder = || MultiHeadAttention::builder(8, 2);
    says(builder().kv_heads(Some(3)).build(&params.at("a")), &["3 heads of keys"]);
    says(builder().span(Span::Window(0)).build(&params.at("b")), &["span of 0"]);
    says(builder().rotary(Some(RotaryTable::new(4, 6, 1e4).unwrap())).build(&params.at("c")), &["heads of 6"]);
}
