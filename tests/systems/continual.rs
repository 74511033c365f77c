//! Curvature quantities on digits, against numbers computed with other people's tools; identities; the switch.

#![allow(clippy::approx_constant)] // none of the numbers is meant to be a constant of nature

use prismgrad::data::digits;
use prismgrad::nn::{Init, Params};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::continual::{Curvature, Probes, Switch, curvature};
use prismgrad::privacy::{ClipFn, Public};
use prismgrad::step::{PlainStep, TrainStep};
use prismgrad::{Array, DType, Param, Result, Tensor};

/// Softmax regression without bias on the first rows of the file, features over 16.
struct Regression {
    w: Param,
    x: Array,
    y: Array,
}

impl Regression {
    fn new(rows: usize, w: &Param) -> Regression {
        let images = digits().unwrap();
        let all: Vec<usize> = (0..rows).collect();
        let (pixels, labels) = images.batch(&all).unwrap();
        let x = Array::generate(&[rows, 64], DType::F64, |i| pixels[i] as f64);
        Regression { w: w.clone(), x, y: Array::from_slice(&labels, &[rows]).unwrap() }
    }
    fn losses(&self) -> Result<Tensor> {
        let z = linear(&Tensor::new(self.x.clone()), &self.w, Layout::OutIn, None, Activation::None, None)?;
        cross_entropy(&z, &self.y, &CrossEntropy::default())
    }
}

#[test]
fn curvature_of_softmax_regression_on_digits() {
    let w = Param::new("w", Array::zeros(&[10, 64], DType::F64));
    let (public, all) = (Regression::new(140, &w), Regression::new(1400, &w));
    assert!(all.x.to_f64().iter().fold(0f64, |m, x| m.max(*x)) <= 1.0, "features in [0, 1]");
    let mut step = PlainStep::new(std::slice::from_ref(&w), Sgd::default(), Schedule::constant(0.5)).unwrap();
    // Steps, loss, |G|², GᵀHG, tr(H), tr(HΣ), c, E|g|, B*, D(64), slowdown at 64.
    let rows = [
        (0, [2.3025851, 0.2024454, 0.011463126, 13.504309, 9.9570429, 0.27450544, 3.664258, 125.04, 2.8002, 1.2619]),
        (20, [1.2065365, 0.092102701, 0.020171922, 11.857938, 5.7931038, 0.38830773, 2.7425311, 62.44, 1.2288, 1.1735]),
        (
            100,
            [0.68571068, 0.062451283, 0.02384277, 7.0690236, 2.2222409, 1.2080726, 1.7098907, 14.25, 0.07568, 1.0202],
        ),
    ];
    let mut slowdowns = Vec::new();
    for (steps, want) in rows {
        while step.steps() < steps {
            step.run([()], |_| public.losses()).unwrap();
        }
        let before = w.value().to_f64();
        let c = curvature(&|| all.losses(), std::slice::from_ref(&w), (ClipFn::AutoV, 1.0), Probes::Exact).unwrap();
        assert_eq!(w.value().to_f64(), before, "the parameters are left as they were");
        let got = [
            c.loss,
            c.grad_sq,
            c.ghg,
            c.trace_h.0,
            c.trace_h_sigma.0,
            c.clip,
            c.mean_norm,
            c.best_batch(1.0),
            c.decelerator(1.0, 64.0),
            c.slowdown(1.0, 64.0),
        ];
        for (k, (g, w)) in got.iter().zip(want).enumerate() {
            // B* and D are given to two or three digits.
            let tolerance = if k < 7 { 1e-4 } else { 0.01 };
            assert!((g - w).abs() < tolerance * w.abs(), "{steps} steps, quantity {k}: {g} against {w}");
        }
        if steps == 0 {
            // tr(H) = 0.9·mean|x|² exactly, where all classes are equally likely.
            let mean = all.x.to_f64().iter().map(|x| x * x).sum::<f64>() / 1400.0;
            assert!((c.trace_h.0 - 0.9 * mean).abs() < 1e-6 * c.trace_h.0);
        }
        slowdowns.push(c.slowdown(1.0, 64.0));
        if steps > 20 {
            continue;
        }
        let r = Probes::Random(100, 3);
        let r = curvature(&|| all.losses(), std::slice::from_ref(&w), (ClipFn::AutoV, 1.0), r).unwrap();
        for (name, got, exact) in [("tr(H)", r.trace_h, c.trace_h.0), ("tr(HΣ)", r.trace_h_sigma, c.trace_h_sigma.0)] {
            assert!((got.0 - exact).abs() < 3.5 * got.1 && got.1 < 0.2 * exact, "{name}: {got:?}, exactly {exact}");
        }
        let (b, error) = r.best_batch_with_error(1.0);
        assert!((b - c.best_batch(1.0)).abs() < 3.5 * error, "{b} ± {error}");
    }
    assert!(slowdowns.windows(2).all(|w| w[1] < w[0]), "falling: {slowdowns:?}");
}

/// J_priv(B*) = J_pub(2B*), and the paper's illustrative constants.
#[test]
fn identities_of_the_gain() {
    let make = |ghg: f64, trace_h: f64, trace_h_sigma: f64, clip: f64| Curvature {
        loss: 1.0,
        grad_sq: 0.7,
        ghg,
        trace_h: (trace_h, 0.0),
        trace_h_sigma: (trace_h_sigma, 0.0),
        clip,
        mean_norm: 1.0,
    };
    for (ghg, h, hs, c, sigma) in [(0.3, 20.0, 4.0, 0.2, 1.0), (100.0, 2e8, 2e4, 1.0, 0.5), (1e-3, 5.0, 0.1, 7.0, 3.0)]
    {
        let q = make(ghg, h, hs, c);
        let b = q.best_batch(sigma);
        assert!((q.gain_private(sigma, b) / q.gain_public(2.0 * b) - 1.0).abs() < 1e-12);
        assert!((q.decelerator(sigma, b) / (b * ghg) - 1.0).abs() < 1e-12);
        for other in [0.5 * b, 2.0 * b] {
            assert!(q.gain_private(sigma, other) / other < q.gain_private(sigma, b) / b * 4.0);
            assert!(q.gain_private(sigma, other) < q.gain_private(sigma, b), "B* has the best gain per sample");
        }
    }
    assert!((make(100.0, 2e8, 2e4, 1.0).best_batch(0.5) - 707.107).abs() < 1e-3);
    assert!((make(100.0, 2e6, 2e4, 1.0).best_batch(0.5) - 70.7107).abs() < 1e-4);
}

/// The prediction of one private step's gain, beside many steps taken.
#[test]
fn predicted_gain_beside_simulated_steps() {
    let w = Param::new("w", Array::zeros(&[10, 64], DType::F64));
    let all = Regression::new(1400, &w);
    let c = curvature(&|| all.losses(), std::slice::from_ref(&w), (ClipFn::AutoV, 1.0), Probes::Exact).unwrap();
    let loss_at = |v: &[f64]| {
        w.set(Array::from_slice(v, &[10, 64]).unwrap()).unwrap();
        let l = prismgrad::no_grad(|| all.losses()).unwrap().array().to_f64();
        l.iter().sum::<f64>() / 1400.0
    };
    // Every sample's gradient, once: the steps all start from zero.
    let per = all.losses().unwrap().backward().unwrap().param(&w).unwrap().per_sample().unwrap().to_f64();
    let mut gen_ = prismgrad::check::Gen::new(5);
    for (sigma, batch, want) in [(1.0, 256usize, 0.37267), (1.0, 1024, 0.97540), (3.0, 256, 0.27984)] {
        let eta = c.best_lr(sigma, batch as f64);
        // Times B: the gain of the step, not per sample.
        let predicted = batch as f64 * c.gain_private(sigma, batch as f64);
        let mut gains = Vec::new();
        for _ in 0..100 {
            let mut g: Vec<f64> = (0..640).map(|_| sigma * gen_.normal()).collect();
            for _ in 0..batch {
                let i = gen_.size(0, 1399);
                let one = &per[i * 640..(i + 1) * 640];
                let norm = one.iter().map(|x| x * x).sum::<f64>().sqrt();
                g.iter_mut().zip(one).for_each(|(g, x)| *g += x / norm);
            }
            let moved: Vec<f64> = g.iter().map(|g| -eta * g / batch as f64).collect();
            gains.push(c.loss - loss_at(&moved));
        }
        let gain = gains.iter().sum::<f64>() / 100.0;
        let error = (gains.iter().map(|g| (g - gain).powi(2)).sum::<f64>() / 99.0 / 100.0).sqrt();
        assert!((gain - want).abs() < 4.0 * error, "σ {sigma} B {batch}: simulated {gain} ± {error}, others {want}");
        let off = (predicted - gain).abs();
        assert!(
            off < 0.12 * gain + 2.0 * error,
            "σ {sigma} B {batch}: predicted {predicted}, simulated {gain} ± {error}"
        );
    }
}

#[test]
fn the_switch_listens_to_public_losses() {
    let mut s = Switch::new(2);
    let seen: Vec<bool> = [3.0, 2.0, 2.1, 1.9, 1.9, 2.5].iter().map(|&l| s.observe(Public(l))).collect();
    assert_eq!(seen, [false, false, false, false, false, true]);
}

/// The first moment starts anew and nothing else does.
#[test]
fn only_the_first_moment_is_reset() {
    let w = Param::new("w", Array::zeros(&[10, 64], DType::F64));
    let data = Regression::new(50, &w);
    let mut step = PlainStep::new(std::slice::from_ref(&w), AdamW::default(), Schedule::constant(1e-3)).unwrap();
    step.run([()], |_| data.losses()).unwrap();
    let slots = AdamW::default().slots();
    let second = step.state()[1].1.to_f64();
    step.reset_first_moment().unwrap();
    let state = step.state();
    assert_eq!((state[0].0, state[1].0), (slots[0], slots[1]));
    assert!(state[0].1.to_f64().iter().all(|m| *m == 0.0) && second.iter().any(|v| *v != 0.0));
    assert_eq!((state[1].1.to_f64(), step.steps()), (second, 1));
    let params = Params::new(0, DType::F32);
    let p = params.at("p").param("w", &[2], Init::Ones).unwrap();
    let mut plain = PlainStep::new(&[p], Sgd::default(), Schedule::constant(0.1)).unwrap();
    plain.reset_first_moment().unwrap();
}
