//! Distribution-edited models: vectors, merges, searches, files.

use prismgrad::prelude::*;
use prismgrad::random::Rng;
use prismgrad::systems::editing::{Cost, Merge, Privacy, Search, Tags, VectorPool};
use std::path::PathBuf;

/// Parameters of two layers, random around a centre.
fn model(dtype: DType) -> Params {
    let params = Params::new(0, dtype);
    Linear::new(&params.at("a"), 7, 5).unwrap();
    Linear::new(&params.at("b"), 5, 3).unwrap();
    params
}

fn set(params: &Params, seed: u64, scale: f64) {
    let mut rng = Rng::new(seed);
    for p in params.all() {
        let values: Vec<f64> =
            (0..p.numel()).map(|_| (rng.uniform() - 0.5) * scale * 10f64.powf(rng.uniform() * 6.0 - 5.0)).collect();
        p.set(Array::from_slice(&values, p.shape()).unwrap().cast(p.dtype())).unwrap();
    }
}

fn bits(params: &Params) -> Vec<Vec<u8>> {
    params.all().iter().map(|p| p.value().to_bytes()).collect()
}

/// A pool over a base with n sources, and what each source was.
fn pool(n: usize, dtype: DType) -> (VectorPool, Params, Vec<u8>, Vec<Vec<Vec<u8>>>) {
    let params = model(dtype);
    set(&params, 1, 1.0);
    let base = bits(&params).concat();
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    let mut sources = Vec::new();
    for i in 0..n {
        set(&params, 10 + i as u64, 2.0);
        pool.add(&format!("s{i}"), &params, Tags::new(), Cost { tokens: 100, ..Cost::default() }).unwrap();
        sources.push(bits(&params));
    }
    (pool, params, base, sources)
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("prismgrad-editing-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn one_source_alone_is_that_source_to_the_bit() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (pool, params, base, sources) = pool(3, dtype);
        for (i, source) in sources.iter().enumerate() {
            let mut w = vec![0.0; 3];
            w[i] = 1.0;
            pool.apply(&Merge::Weights(w), &params).unwrap();
            assert_eq!(&bits(&params), source, "{dtype} source {i}");
        }
        pool.apply(&Merge::Weights(vec![0.0; 3]), &params).unwrap();
        assert_eq!(bits(&params).concat(), base);
    }
    // Differences that f32 does not hold: values of very different size.
    let params = Params::new(0, DType::F32);
    let p = params.param("w", &[4], prismgrad::nn::Init::Zeros).unwrap();
    let put = |v: [f32; 4]| p.set(Array::from_slice(&v, &[4]).unwrap()).unwrap();
    put([1.0, 1e10, 1.000_000_1, -3.0e-5]);
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    let source = [1.0e-7f32, 1.234_567_8, 1e10, 7.0];
    put(source);
    pool.add("s", &params, Tags::new(), Cost::default()).unwrap();
    put([0.0; 4]);
    pool.apply(&Merge::Weights(vec![1.0]), &params).unwrap();
    assert_eq!(p.value().to_vec::<f32>().unwrap(), source);
}

prismgrad::device_tests! {
    /// On a device a pool forms what it forms on the CPU: single sources to the bit, with what rounding took from their differences.
    fn a_pool_on_a_device_forms_the_same_models(device) {
        for dtype in [DType::F32, DType::BF16] {
            let (mut there, params, base, sources) = pool(3, dtype);
            let here = there.clone();
            there.to(device).unwrap();
            for (i, source) in sources.iter().enumerate() {
                let mut w = vec![0.0; 3];
                w[i] = 1.0;
                there.apply(&Merge::Weights(w), &params).unwrap();
                assert_eq!(&bits(&params), source, "{dtype} source {i}");
            }
            let values = |pool: &VectorPool, merge: &Merge| -> Vec<f64> {
                pool.apply(merge, &params).unwrap();
                params.all().iter().flat_map(|p| p.value().to_f64()).collect()
            };
            for merge in [
                Merge::Weights(vec![0.3, -0.9, 0.2]),
                Merge::PerLayer(vec![("a".to_string(), vec![0.0, 0.4, 1.0])]),
                Merge::Ties { density: 0.5, lambda: 1.0, normalise: true },
                Merge::Dare { density: 0.5, lambda: 1.0, seed: 4 },
            ] {
                let (a, b) = (values(&here, &merge), values(&there, &merge));
                let unit = if dtype == DType::F32 { 1e-7 } else { 1e-2 };
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= unit * a.abs()), "{dtype} {merge:?}");
            }
            assert_eq!(here.diagnose().unwrap(), there.diagnose().unwrap());
            // A source that is added there, one that is taken out, and the base.
            set(&params, 20, 2.0);
            let new = bits(&params);
            there.remove("s1").unwrap();
            there.add("new", &params, Tags::new(), Cost::default()).unwrap();
            there.apply(&Merge::Weights(vec![0.0, 0.0, 1.0]), &params).unwrap();
            assert_eq!(bits(&params), new);
            there.apply(&Merge::Weights(vec![0.0; 3]), &params).unwrap();
            assert_eq!(bits(&params).concat(), base);
        }
    }
}

#[test]
fn a_removed_source_leaves_nothing_behind() {
    let (mut three, params, ..) = pool(3, DType::F32);
    three.remove("s1").unwrap();
    assert_eq!(three.names(), ["s0", "s2"]);
    three.apply(&Merge::Weights(vec![0.3, 0.9]), &params).unwrap();
    let merged = bits(&params);
    // A pool that never had it.
    set(&params, 1, 1.0);
    let mut never = VectorPool::new(&params, Tags::new()).unwrap();
    for i in [0, 2] {
        set(&params, 10 + i, 2.0);
        never.add(&format!("s{i}"), &params, Tags::new(), Cost::default()).unwrap();
    }
    for merge in [
        Merge::Weights(vec![0.3, 0.9]),
        Merge::Dare { density: 0.5, lambda: 1.0, seed: 4 },
        Merge::Ties { density: 0.4, lambda: 1.0, normalise: true },
    ] {
        three.apply(&merge, &params).unwrap();
        let own = bits(&params);
        never.apply(&merge, &params).unwrap();
        assert_eq!(own, bits(&params), "{merge:?}");
    }
    never.apply(&Merge::Weights(vec![0.3, 0.9]), &params).unwrap();
    assert_eq!(merged, bits(&params));
    assert!(three.remove("s1").unwrap_err().to_string().contains("s1"));
    // The bill stays.
    assert_eq!(three.ledger().tokens(), 300);
}

#[test]
fn merges_are_what_their_formulas_say() {
    let params = Params::new(0, DType::F32);
    let w = params.param("layer.weight", &[4], prismgrad::nn::Init::Zeros).unwrap();
    let v = params.param("other.weight", &[1], prismgrad::nn::Init::Zeros).unwrap();
    let put = |x: [f32; 4], y: f32| {
        w.set(Array::from_slice(&x, &[4]).unwrap()).unwrap();
        v.set(Array::from_slice(&[y], &[1]).unwrap()).unwrap();
    };
    put([10.0, 20.0, 30.0, 40.0], 1.0);
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    // Differences [4, −1, 2, 0] and [−2, −3, 1, 5], and 1 and 3.
    put([14.0, 19.0, 32.0, 40.0], 2.0);
    pool.add("one", &params, Tags::new(), Cost::default()).unwrap();
    put([8.0, 17.0, 31.0, 45.0], 4.0);
    pool.add("two", &params, Tags::new(), Cost::default()).unwrap();
    let merged = |m: Merge| {
        pool.apply(&m, &params).unwrap();
        (w.value().to_f64(), v.value().to_f64()[0])
    };
    assert_eq!(merged(Merge::Arithmetic(0.5)), (vec![11.0, 18.0, 31.5, 42.5], 3.0));
    assert_eq!(merged(Merge::Soup), (vec![11.0, 18.0, 31.5, 42.5], 3.0));
    assert_eq!(merged(Merge::Weights(vec![1.0, 2.0])), (vec![10.0, 13.0, 34.0, 50.0], 8.0));
    let layers = vec![("layer".to_string(), vec![1.0, 0.0])];
    assert_eq!(merged(Merge::PerLayer(layers)), (vec![14.0, 19.0, 32.0, 40.0], 1.0));
    // The larger half of each: [4, 0, 2, 0] and [0, −3, 0, 5]; then the sign of the sum; one of one-element tensors is dropped whole.
    let ties = |normalise| Merge::Ties { density: 0.5, lambda: 1.0, normalise };
    assert_eq!(merged(ties(true)), (vec![14.0, 17.0, 32.0, 45.0], 1.0));
    // All entries: sums 2, −4, 3, 5; of the first element only 4 agrees, of the third both.
    let all = |normalise| Merge::Ties { density: 1.0, lambda: 1.0, normalise };
    assert_eq!(merged(all(true)), (vec![14.0, 18.0, 31.5, 45.0], 3.0));
    assert_eq!(merged(all(false)), (vec![14.0, 16.0, 33.0, 45.0], 5.0));
    assert_eq!(merged(Merge::Dare { density: 1.0, lambda: 0.5, seed: 1 }), merged(Merge::Arithmetic(0.5)));
}

/// DARE keeps its share, divided by it, and the same entries every time.
#[test]
fn dare_drops_at_random_and_keeps_the_mean() {
    let params = Params::new(0, DType::F32);
    let p = params.param("w", &[20_000], prismgrad::nn::Init::Zeros).unwrap();
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    p.set(Array::full(&[20_000], 1.0, DType::F32)).unwrap();
    pool.add("s", &params, Tags::new(), Cost::default()).unwrap();
    let merge = |seed| {
        pool.apply(&Merge::Dare { density: 0.25, lambda: 1.0, seed }, &params).unwrap();
        p.value().to_f64()
    };
    let x = merge(3);
    assert!(x.iter().all(|&x| x == 0.0 || x == 4.0));
    let kept = x.iter().filter(|x| **x != 0.0).count() as f64 / 20_000.0;
    // Four standard errors.
    assert!((kept - 0.25).abs() < 4.0 * (0.25f64 * 0.75 / 20_000.0).sqrt(), "{kept}");
    assert_eq!(x, merge(3));
    assert_ne!(x, merge(4));
}

#[test]
fn searches_find_the_minimum_and_end_alike_after_a_kill() {
    let target = [0.3, 0.8, 0.0];
    // The distance to the model with the target's weights: each weight has its own minimum.
    let setting = || {
        let (pool, params, ..) = pool(3, DType::F32);
        pool.apply(&Merge::Weights(target.to_vec()), &params).unwrap();
        let wanted: Vec<Vec<f64>> = params.all().iter().map(|p| p.value().to_f64()).collect();
        (pool, params, wanted)
    };
    fn distance(params: &Params, wanted: &[Vec<f64>]) -> f64 {
        let pairs = params.all();
        let pairs = pairs.iter().zip(wanted).flat_map(|(p, w)| p.value().to_f64().into_iter().zip(w.clone()));
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    }
    let search = Search::Coordinate { grid: 11, rounds: 6 };
    let (mut whole, params, wanted) = setting();
    let found = whole.search(&search, &params, None, |p| Ok(distance(p, &wanted))).unwrap();
    assert!(found.weights.iter().zip(target).all(|(a, b)| (a - b).abs() < 0.051), "{:?}", found.weights);
    // The model has the best weights, not the last.
    assert_eq!(distance(&params, &wanted), found.loss);
    assert_eq!(whole.ledger().searches.len(), 1);
    let grid = Search::Grid { grid: 11 };
    let best = whole.search(&grid, &params, None, |p| Ok(distance(p, &wanted))).unwrap();
    assert!(best.weights.iter().zip(target).all(|(a, b)| (a - b).abs() < 1e-9), "{:?}", best.weights);
    assert_eq!(best.tried.len(), 1331);

    // Killed at the twentieth candidate, by an error here, and started again.
    let dir = folder("search");
    let state = dir.join("search.json");
    let (mut again, params, wanted) = setting();
    let mut calls = 0;
    let killed = again.search(&search, &params, Some(&state), |p| {
        calls += 1;
        if calls == 20 { Err(prismgrad::Error::invalid("test", "killed")) } else { Ok(distance(p, &wanted)) }
    });
    assert!(killed.is_err());
    let mut more = 0;
    let resumed = again.search(&search, &params, Some(&state), |p| {
        more += 1;
        Ok(distance(p, &wanted))
    });
    let resumed = resumed.unwrap();
    assert_eq!((resumed.weights, resumed.tried.len()), (found.weights, found.tried.len()));
    assert!(more <= found.tried.len() - 19, "{more} were tried again");
    // Another search does not take its state.
    let other = again.search(&Search::Random { candidates: 3, seed: 1 }, &params, Some(&state), |_| Ok(0.0));
    assert!(other.unwrap_err().to_string().contains("another pool"));
    // A loss that is no number is never the best.
    let nan = again.search(&Search::Random { candidates: 5, seed: 1 }, &params, None, |p| {
        Ok(if p.all()[0].value().to_f64()[0] > 0.0 { f64::NAN } else { 1.0 })
    });
    assert!(nan.unwrap().tried.len() == 5);
    for bad in [
        Search::Coordinate { grid: 1, rounds: 1 },
        Search::Grid { grid: 200 },
        Search::Random { candidates: 0, seed: 0 },
    ] {
        assert!(again.search(&bad, &params, None, |_| Ok(0.0)).is_err(), "{bad:?}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

/// ∂loss/∂w from the model's gradient is what differences of losses say.
#[test]
fn the_gradient_of_the_weights_is_right() {
    let params = model(DType::F32);
    let layer = (Linear::new(&params.at("c"), 7, 5).unwrap(), Linear::new(&params.at("d"), 5, 3).unwrap());
    let randomise = |seed| {
        let mut rng = Rng::new(seed);
        for p in params.all() {
            let v: Vec<f32> = (0..p.numel()).map(|_| rng.uniform() as f32 - 0.5).collect();
            p.set(Array::from_slice(&v, p.shape()).unwrap()).unwrap();
        }
    };
    randomise(1);
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    for i in 0..2 {
        randomise(5 + i);
        pool.add(&format!("s{i}"), &params, Tags::new(), Cost::default()).unwrap();
    }
    let x = Tensor::new(Array::generate(&[4, 7], DType::F32, |i| (i as f64 * 0.7).sin()));
    let loss = || -> Result<Tensor> {
        let h = layer.0.forward(&x, &Ctx::eval())?.tanh()?;
        layer.1.forward(&h, &Ctx::eval())?.square()?.sum(&[1], false)
    };
    let at = |w: &[f64]| -> f64 {
        pool.apply(&Merge::Weights(w.to_vec()), &params).unwrap();
        loss().unwrap().array().to_f64().iter().sum()
    };
    let w = [0.4, 0.7];
    at(&w);
    let gradients = loss().unwrap().backward().unwrap();
    let own = pool.weight_gradient(&gradients, &params).unwrap();
    for i in 0..2 {
        let (mut up, mut down) = (w, w);
        up[i] += 1e-2;
        down[i] -= 1e-2;
        let numeric = (at(&up) - at(&down)) / 2e-2;
        assert!((numeric - own[i]).abs() < 2e-3 * (1.0 + numeric.abs()), "{i}: {numeric} {own:?}");
    }
}

#[test]
fn what_does_not_belong_together_is_refused_and_changes_nothing() {
    let (mut pool, params, ..) = pool(2, DType::F32);
    let before = bits(&params);
    let refused = |e: Result<()>, what: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(what), "{e}");
    };
    let other = Params::new(0, DType::F32);
    Linear::new(&other.at("a"), 7, 6).unwrap();
    refused(pool.add("x", &other, Tags::new(), Cost::default()), "no relative");
    refused(pool.apply(&Merge::Soup, &other), "no relative");
    let tags: Tags = [("tokenizer".to_string(), "17".to_string())].into();
    refused(pool.add("x", &params, tags.clone(), Cost::default()), "tokenizer");
    refused(pool.add("s0", &params, Tags::new(), Cost::default()), "already");
    refused(pool.replace("x", &params, Tags::new(), Cost::default()), "no source");
    let p = &params.all()[1];
    let value = p.value();
    p.set(Array::full(p.shape(), f64::NAN, DType::F32)).unwrap();
    refused(pool.add("x", &params, Tags::new(), Cost::default()), "not finite");
    refused(VectorPool::new(&params, Tags::new()).map(|_| ()), "not finite");
    p.set(value).unwrap();
    refused(VectorPool::new(&model(DType::F64), Tags::new()).map(|_| ()), "f64");
    for bad in [
        Merge::Weights(vec![1.0]),
        Merge::Weights(vec![1.0, f64::NAN]),
        Merge::Arithmetic(f64::INFINITY),
        Merge::Ties { density: 0.0, lambda: 1.0, normalise: true },
        Merge::Dare { density: 1.5, lambda: 1.0, seed: 0 },
    ] {
        assert!(pool.apply(&bad, &params).is_err(), "{bad:?}");
    }
    assert_eq!(bits(&params), before);
    assert_eq!((pool.len(), pool.ledger().sources.len()), (2, 2));
}

#[test]
fn vectors_go_through_files_to_the_bit() {
    let dir = folder("files");
    let (pool, params, ..) = pool(2, DType::F32);
    pool.save(&dir).unwrap();
    pool.apply(&Merge::Weights(vec![0.7, 1.0]), &params).unwrap();
    let merged = bits(&params);
    set(&params, 1, 1.0);
    let mut read = VectorPool::new(&params, Tags::new()).unwrap();
    for i in 0..2 {
        read.load(dir.join(format!("s{i}.safetensors"))).unwrap();
    }
    read.apply(&Merge::Weights(vec![0.7, 1.0]), &params).unwrap();
    assert_eq!(bits(&params), merged);
    assert_eq!(read.ledger().tokens(), 200);
    // Another base.
    set(&params, 2, 1.0);
    let mut other = VectorPool::new(&params, Tags::new()).unwrap();
    let e = other.load(dir.join("s0.safetensors")).unwrap_err().to_string();
    assert!(e.contains("base") && other.is_empty(), "{e}");
    params.save(dir.join("plain.safetensors")).unwrap();
    assert!(other.load(dir.join("plain.safetensors")).unwrap_err().to_string().contains("no vector"));
    std::fs::remove_dir_all(dir).unwrap();
}

/// Edits that would be lost in bf16, angles and norms of known vectors, and the bill with its ε.
#[test]
fn diagnosis_and_ledger() {
    let params = Params::new(0, DType::F32);
    let a = params.param("x.weight", &[2], prismgrad::nn::Init::Ones).unwrap();
    let b = params.param("y.weight", &[2], prismgrad::nn::Init::Ones).unwrap();
    let mut pool = VectorPool::new(&params, Tags::new()).unwrap();
    let put = |x: [f32; 2], y: [f32; 2]| {
        a.set(Array::from_slice(&x, &[2]).unwrap()).unwrap();
        b.set(Array::from_slice(&y, &[2]).unwrap()).unwrap();
    };
    // bf16 has steps of 2⁻⁷ above 1: an edit of 2⁻¹⁰ is lost.
    put([1.0 + 2f32.powi(-10), 1.0], [4.0, 1.0]);
    pool.add(
        "one",
        &params,
        Tags::new(),
        Cost { tokens: 5, privacy: Some(Privacy { epsilon: 3.0, delta: 1e-5 }), ..Cost::default() },
    )
    .unwrap();
    put([1.0, 3.0], [1.0, 5.0]);
    pool.add("two", &params, Tags::new(), Cost { tokens: 7, ..Cost::default() }).unwrap();
    let d = pool.diagnose().unwrap();
    assert_eq!(d.lost_in_bf16, [1, 0]);
    assert_eq!(d.sources, ["one", "two"]);
    assert!((d.cosines[0][0] - 1.0).abs() < 1e-12 && d.cosines[0][1].abs() < 1e-12);
    assert_eq!(d.norms[0].0, "x");
    assert_eq!((d.norms[0].1[1], d.norms[1].1.clone()), (2.0, vec![3.0, 4.0]));
    let text = pool.ledger().to_string();
    assert!(text.contains("ε 3.000 at δ 1e-5") && text.contains("12"), "{text}");
}
