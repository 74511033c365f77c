//! The plan of a step: what it predicts beside what a step takes, and what it says of parameters and groups.

use crate::common::privacy::{keyed, whole};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::Ctx;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::ClipStyle;
use prismgrad::step::{PlainStep, Plan, PrivateStep, Retain, TrainStep};
use prismgrad::{Array, DType, Param, Result, Tensor};

/// A model, the samples of its step, and the losses of so many samples.
type Case = (&'static str, Vec<Param>, usize, Box<dyn Fn(&[usize]) -> Result<Tensor>>);

fn gpt(name: &'static str, (vocab, layers, width): (usize, usize, usize)) -> Case {
    const T: usize = 256;
    let model = Gpt::new(GptConfig::small(vocab, T, layers, width, width / 64), 1).unwrap();
    let params = model.params().all();
    let losses = move |records: &[usize]| {
        let ids = |k: usize| {
            let id = |i: usize| ((i * 7 + i * i * 3 + k) % vocab) as f64;
            Array::generate(&[records.len(), T], DType::U32, |i| id(records[i / T] * T + i % T))
        };
        model.losses(ids(0), ids(5), &Ctx::eval())
    };
    (name, params, 8, Box::new(losses))
}

fn mlp() -> Case {
    let p = |name: &str, shape: &[usize]| {
        Param::new(name, Array::generate(shape, DType::F32, |i| (i as f64 * 0.37).sin() * 0.1))
    };
    let sizes = [784usize, 1024, 1024, 10];
    let layers: Vec<(Param, Param)> = (0..3)
        .map(|i| (p(&format!("{i}.weight"), &[sizes[i + 1], sizes[i]]), p(&format!("{i}.bias"), &[sizes[i + 1]])))
        .collect();
    let params = layers.iter().flat_map(|(w, b)| [w.clone(), b.clone()]).collect();
    let losses = move |records: &[usize]| {
        let value = |i: usize| ((records[i / 784] * 784 + i % 784) as f64 * 0.11).cos();
        let mut x = Tensor::new(Array::generate(&[records.len(), 784], DType::F32, value));
        for (i, (w, b)) in layers.iter().enumerate() {
            let act = if i < 2 { Activation::Relu } else { Activation::None };
            x = linear(&x, w, Layout::OutIn, Some(b), act, None)?;
        }
        let labels = Array::generate(&[records.len()], DType::U32, |i| (records[i] % 10) as f64);
        cross_entropy(&x, &labels, &CrossEntropy::default())
    };
    ("mlp", params, 256, Box::new(losses))
}

fn check(what: &str, plan: &Plan) {
    let (predicted, measured) = (plan.predicted().unwrap(), plan.measured().unwrap());
    let table = plan.explain();
    let close = |a: usize, b: usize| (a as f64 / b as f64 - 1.0).abs() < 0.1;
    assert!(close(predicted.working_bytes, measured.working_bytes), "{what}: predicted is not measured\n{table}");
    let fixed = plan.fixed_bytes();
    assert!(close(fixed + predicted.working_bytes, fixed + measured.working_bytes), "{what}\n{table}");
    // Every parameter is delivered once, and the table has a line for each.
    let mut order = predicted.order.clone();
    order.sort();
    assert_eq!(order, (0..plan.params().len()).collect::<Vec<_>>(), "{what}");
    assert!(plan.params().iter().all(|p| table.contains(&p.name)), "{table}");
    assert!(predicted.factor_bytes.iter().all(|b| *b > 0) && measured.phases.backward > 0.0, "{what}");
}

#[test]
fn plans_predict_what_steps_take() {
    let _alone = crate::alone();
    for make in [mlp, || gpt("gpt/S", (512, 4, 256)), || gpt("gpt/M", (4096, 6, 384))] {
        let (name, params, n, losses) = make();
        let schedule = || Schedule::constant(1e-3);
        let mut step = PlainStep::new(&params, AdamW::default(), schedule()).unwrap();
        step.predict(n, |n| losses(&(0..n).collect::<Vec<_>>())).unwrap();
        let before: Vec<f64> = params[0].value().to_f64();
        assert!(step.last_gradient().to_f64().iter().all(|g| *g == 0.0), "a prediction leaves no gradient");
        assert_eq!((step.steps(), before), (0, params[0].value().to_f64()), "and takes no step");
        step.run_one(|| losses(&(0..n).collect::<Vec<_>>())).unwrap();
        check(&format!("{name} plain"), step.plan());
        assert!(step.plan().params().iter().all(|p| p.retain == Retain::Sum && p.group.is_none()));
        drop(step);
        for style in [ClipStyle::AllLayer, ClipStyle::LayerWise, ClipStyle::ParameterWise] {
            let p = keyed(whole(n).style(style.clone()), 1);
            let mut step = PrivateStep::new(&params, p, AdamW::default(), schedule()).unwrap();
            step.predict(n, &losses).unwrap();
            assert!(step.last_gradient().to_f64().iter().all(|g| *g == 0.0), "a sum without noise is not left behind");
            assert_eq!(step.privacy().steps(), 0, "a prediction costs nothing");
            step.run(n, &losses).unwrap();
            let plan = step.plan();
            check(&format!("{name} {style:?}"), plan);
            let groups: usize = plan.groups().iter().map(|g| g.1).sum();
            assert_eq!(groups, params.len());
            let fused = plan.params().iter().filter(|p| p.retain == Retain::Fused).count();
            let matrices = params.iter().filter(|p| p.shape().len() > 1).count();
            assert_eq!(fused, if style == ClipStyle::AllLayer { 0 } else { matrices }, "{style:?}\n{plan}");
        }
    }
}
