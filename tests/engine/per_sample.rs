//! Factored gradients: golden values, reuse, ties, hooks, deep graphs.

use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::privacy::{ClipFn, ClipStyle};
use prismgrad::step::clipped_gradient;
use prismgrad::{Array, DType, Error, Gradients, Param, ParamGrad, Tensor, check};

/// Two linear layers on formula-made numbers; the expected values were computed with other people's tools.
fn fixture(dtype: DType) -> (Tensor, Vec<Param>) {
    let x = Array::generate(&[4, 3, 5], dtype, |i| (1.0 + (15 * (i / 15) + 5 * (i / 5 % 3) + i % 5) as f64).sin());
    let p = |n: &str, s: &[usize], f: &dyn Fn(usize) -> f64| Param::new(n, Array::generate(s, dtype, f));
    let w1 = p("1.weight", &[6, 5], &|i| 0.3 * (0.7 * i as f64).cos());
    let b1 = p("1.bias", &[6], &|k| 0.1 * (k as f64).sin());
    let w2 = p("2.weight", &[3, 6], &|i| 0.3 * (1.3 * i as f64 + 0.5).cos());
    let b2 = p("2.bias", &[3], &|m| 0.05 * (m as f64).cos());
    let y = Array::generate(&[4, 3], DType::U32, |i| ((i / 3 + i % 3) % 3) as f64);
    let h = linear(&Tensor::new(x), &w1, Layout::OutIn, Some(&b1), Activation::Tanh, None).unwrap();
    let logits = linear(&h, &w2, Layout::OutIn, Some(&b2), Activation::None, None).unwrap();
    (cross_entropy(&logits, &y, &CrossEntropy::default()).unwrap(), vec![w1, b1, w2, b2])
}

/// One number, within an absolute tolerance.
fn near(what: &str, got: f64, want: f64, tol: f64) {
    assert!((got - want).abs() <= tol, "{what}: got {got:.10}, want {want:.10}");
}

const NORMS: [[f64; 4]; 4] = [
    [0.4189230142, 0.0413920826, 0.5654202464, 0.0152041970],
    [0.3110571270, 0.0398198687, 0.5180099914, 0.0083783499],
    [0.3651588829, 0.0539166947, 0.4304766105, 0.0465563317],
    [0.4109073751, 0.0559435533, 0.5067103443, 0.0310723310],
];

#[test]
fn golden_losses_and_norms() {
    for (dtype, tol) in [(DType::F64, 1e-8), (DType::F32, 1e-5)] {
        let (losses, params) = fixture(dtype);
        let want = [1.0222758756, 1.0613045592, 1.1434913198, 1.0926078838];
        losses.array().to_f64().iter().zip(want).for_each(|(&g, w)| near("loss", g, w, tol));
        let grads = losses.backward().unwrap();
        for (k, p) in params.iter().enumerate() {
            let sq = grads.param(p).unwrap().sample_sq_norms().unwrap();
            (0..4).for_each(|i| near(p.name(), sq[i].sqrt(), NORMS[i][k], tol));
        }
    }
}

#[test]
fn golden_clipped_sums() {
    let (all, layer, each) = (&ClipStyle::AllLayer, &ClipStyle::LayerWise, &ClipStyle::ParameterWise);
    let auto_s = ClipFn::AutoS { gamma: 0.01 };
    let rows: [(&ClipStyle, ClipFn, f64, [f64; 4]); 8] = [
        (all, ClipFn::Abadi, 0.1, [0.083780153, 0.022881166, 0.106300981, 0.003760834]),
        (all, ClipFn::Abadi, 0.5, [0.418900767, 0.114405830, 0.531504906, 0.018804172]),
        (all, ClipFn::AutoV, 1.0, [0.837801533, 0.228811659, 1.063009811, 0.037608343]),
        (all, auto_s, 1.0, [0.825505751, 0.225152663, 1.047706155, 0.036915419]),
        (layer, ClipFn::Abadi, 0.5, [0.479031230, 0.130406704, 0.468127245, 0.017974371]),
        (layer, auto_s, 1.0, [0.938339930, 0.261873191, 0.919517725, 0.035063980]),
        (each, ClipFn::Abadi, 0.5, [0.342240953, 0.141797637, 0.331154573, 0.020626804]),
        (each, auto_s, 1.0, [0.668106977, 1.226238915, 0.650458571, 0.191771716]),
    ];
    for (dtype, tol) in [(DType::F64, 1e-8), (DType::F32, 1e-5)] {
        for (style, clip, r, want) in &rows {
            let (losses, params) = fixture(dtype);
            let sums = clipped_gradient(&losses, &params, style, *clip, *r).unwrap();
            for ((g, w), p) in sums.iter().zip(want).zip(&params) {
                let norm = g.to_f64().iter().map(|x| x * x).sum::<f64>().sqrt();
                near(&format!("{style:?} {clip:?} {r} {}", p.name()), norm, *w, tol);
            }
        }
    }
}

#[test]
fn hooks_see_each_parameter_once() {
    let (losses, params) = fixture(DType::F32);
    let mut seen = Vec::new();
    let mut hook = |p: &Param, g: ParamGrad| {
        seen.push((p.name().to_string(), g.sum()?.numel()));
        Ok(())
    };
    losses.backward_into(&mut hook).unwrap();
    assert_eq!(seen.len(), params.len());
    // Backward order: the last layer first.
    assert!(seen[0].0.starts_with('2') && seen[3].0.starts_with('1'), "{seen:?}");
}

#[test]
fn used_history_is_refused_and_kept_history_is_not() {
    let (losses, _) = fixture(DType::F64);
    let seed = || Array::ones(&[4], DType::F64);
    losses.backward_from(seed(), true, &mut Gradients::default()).unwrap();
    losses.backward_from(seed(), false, &mut Gradients::default()).unwrap();
    let again = losses.backward().err().unwrap().to_string();
    assert!(again.contains("already used"), "{again}");
}

#[test]
fn dense_parameters_train_plainly_and_are_refused_privately() {
    let w = Param::new("gate", Array::ones(&[3], DType::F32));
    let x = Tensor::zeros(&[2, 3], DType::F32);
    let loss = x.add(&w.dense()).unwrap().sum(&[1], false).unwrap();
    let grads = loss.backward().unwrap();
    let g = grads.param(&w).unwrap();
    assert_eq!(g.sum().unwrap().to_f64(), [2.0; 3]);
    let e = g.sample_sq_norms().unwrap_err();
    assert!(matches!(e, Error::Privacy { .. }) && e.to_string().contains("gate"), "{e}");
}

#[test]
fn a_batch_mean_is_refused_by_sample_count() {
    let (losses, params) = fixture(DType::F32);
    let mean = losses.mean(&[0], false).unwrap();
    let grads = mean.backward().unwrap();
    let e = grads.param(&params[0]).unwrap().sample_sq_norms().unwrap_err().to_string();
    assert!(e.contains("4 samples") && e.contains("one loss per sample"), "{e}");
}

#[test]
fn coupled_samples_are_noticed() {
    let x = Array::generate(&[4, 3], DType::F64, |i| (i as f64).sin());
    let apart = |x: &Tensor| x.square()?.sum(&[1], false);
    let coupled = |x: &Tensor| x.sub(&x.mean(&[0], true)?)?.square()?.sum(&[1], false);
    assert_eq!(check::independence(&apart, &x, 1).unwrap(), 0.0);
    assert!(check::independence(&coupled, &x, 1).unwrap() > 1e-3);
}

#[test]
fn a_hundred_thousand_ops_deep() {
    let x = Tensor::leaf(Array::ones(&[2], DType::F64));
    let mut y = x.clone();
    for _ in 0..100_000 {
        y = y.add_scalar(1e-6).unwrap();
    }
    let grads = y.backward().unwrap();
    assert_eq!(grads.of(&x).unwrap().to_f64(), [1.0, 1.0]);
    // And dropped without a backward pass.
    let mut y = x.clone();
    for _ in 0..100_000 {
        y = y.mul(&y.detach()).unwrap();
    }
    drop(y);
}

/// Factors of bf16 operands: every query gives what it gives for the same numbers in f32, to the rounding of sums in f32; rows of a sample
/// together and scattered, many and few.
#[test]
fn bf16_factors_are_those_of_their_numbers() {
    use prismgrad::{Factor, Samples};
    let make = |owners: Vec<u32>, count: usize, dtype: DType| {
        let rows = owners.len();
        let samples = Samples::owners(owners, count).unwrap();
        let of = |cols: usize, k: f64| {
            let x = Array::generate(&[rows, cols], DType::F32, |i| (k * i as f64 + 0.3).sin()).cast(DType::BF16);
            x.cast(dtype)
        };
        let mut grad = ParamGrad::new(Param::new("w", Array::zeros(&[37, 70], DType::F32)), count);
        grad.push(Factor::Outer { left: of(37, 1.7), right: of(70, 0.9), samples: samples.clone() }).unwrap();
        let mut bias = ParamGrad::new(Param::new("b", Array::zeros(&[70], DType::F32)), count);
        bias.push(Factor::RowSum { grad: of(70, 0.9), samples }).unwrap();
        [grad, bias]
    };
    let scattered: Vec<u32> = (0..120).map(|i| i * 7 % 3).collect();
    let sorted: Vec<u32> = (0..120u32)
        .map(|i| {
            if i < 17 {
                0
            } else if i < 60 {
                1
            } else {
                2
            }
        })
        .collect();
    for owners in [scattered, sorted, vec![0, 1, 2, 0, 2]] {
        let pairs = make(owners.clone(), 3, DType::BF16).into_iter().zip(make(owners.clone(), 3, DType::F32));
        for (half, wide) in pairs {
            let close = |what: &str, a: &[f64], b: &[f64]| {
                let size = b.iter().map(|x| x.abs()).fold(0.0, f64::max);
                assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 2e-5 * size), "{what}: {a:?} {b:?}");
            };
            close("sum", &half.sum().unwrap().to_f64(), &wide.sum().unwrap().to_f64());
            let weights = [0.25, 0.0, 3.0];
            close(
                "weighted",
                &half.weighted_sum(&weights).unwrap().to_f64(),
                &wide.weighted_sum(&weights).unwrap().to_f64(),
            );
            close("norms", &half.sample_sq_norms().unwrap(), &wide.sample_sq_norms().unwrap());
            close("per sample", &half.per_sample().unwrap().to_f64(), &wide.per_sample().unwrap().to_f64());
            close("gram", &half.gram(&half).unwrap().to_f64(), &wide.gram(&wide).unwrap().to_f64());
            let clip = |sq: f64| 1.0 / sq.sqrt().max(1.0);
            let ((a, na), (b, nb)) =
                (half.clipped_sum(&[0.0; 3], &clip).unwrap(), wide.clipped_sum(&[0.0; 3], &clip).unwrap());
            close("clipped", &a.to_f64(), &b.to_f64());
            assert!(na.iter().zip(&nb).all(|(x, y)| (x - y).abs() <= 1e-3 * y), "{na:?} {nb:?}");
        }
    }
}
