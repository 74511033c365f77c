//! Every op of the registry: gradient checks over random shapes, strides and broadcasts, and per-sample checks.

use prismgrad::check::{self, Gen};
use prismgrad::ops::{Differentiable, FactorRule, registry};
use prismgrad::{Gradients, Tensor};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn check_case(seed: u64) {
    for op in registry() {
        if matches!(op.differentiable, Differentiable::No(_)) {
            continue;
        }
        for (k, make) in op.cases.iter().enumerate() {
            let seed = seed.wrapping_mul(31).wrapping_add(k as u64);
            let case = make(&mut Gen::new(seed)).unwrap_or_else(|e| panic!("{} case {k} seed {seed}: {e}", op.name));
            check::gradients(&case, seed, 3, 1e-6).unwrap_or_else(|e| panic!("{} case {k} seed {seed}: {e}", op.name));
            if case.samples.is_some() && !case.params.is_empty() {
                check::per_sample(&|| case.losses(seed), &case.params, seed, 1e-9)
                    .unwrap_or_else(|e| panic!("{} case {k} seed {seed}: {e}", op.name));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn gradients_agree_with_central_differences(seed in any::<u64>()) {
        check_case(seed);
    }
}

#[test]
fn every_op_is_complete() {
    let mut names = BTreeSet::new();
    for op in registry() {
        assert!(names.insert(op.name), "{} is registered twice", op.name);
        assert!(!op.cases.is_empty(), "{} has no cases", op.name);
        match op.differentiable {
            Differentiable::Yes => {}
            Differentiable::No(why) => {
                assert!(!why.is_empty(), "{} does not say why it has no gradient", op.name);
                // It runs on inputs that want gradients, and its result wants none.
                let case = op.cases[0](&mut Gen::new(3)).unwrap();
                let inputs: Vec<Tensor> = case.inputs.iter().map(|a| Tensor::leaf(a.clone())).collect();
                let y = (case.run)(&inputs).unwrap();
                assert!(y.backward_from(y.array().clone(), false, &mut Gradients::default()).is_err(), "{}", op.name);
            }
        }
    }
    assert!(names.len() > 40, "{} ops are registered", names.len());
}

/// What an op says of its parameters' gradients is what its rule delivers, over many cases.
#[test]
fn factor_rules_are_kept() {
    for op in registry() {
        let mut seen = BTreeSet::new();
        for seed in 0..60 {
            for make in op.cases {
                let case = make(&mut Gen::new(seed)).unwrap();
                if matches!(op.differentiable, Differentiable::No(_)) {
                    continue;
                }
                let inputs: Vec<Tensor> = case.inputs.iter().map(|a| Tensor::leaf(a.clone())).collect();
                let y = (case.run)(&inputs).unwrap();
                let mut grads = Gradients::default();
                y.backward_from(y.array().clone(), false, &mut grads).unwrap();
                for p in &case.params {
                    let delivered = grads.param(p).unwrap_or_else(|| panic!("{}: nothing for {}", op.name, p.name()));
                    seen.extend(delivered.factors().iter().map(|f| f.kind()));
                }
            }
        }
        match op.factor {
            // Cases that tie a parameter to another op deliver that op's kinds too.
            FactorRule::Kinds(kinds) => {
                assert!(kinds.iter().all(|k| seen.contains(k)), "{} promises {kinds:?}, delivers {seen:?}", op.name);
                assert!(kinds.len() == seen.len() || op.name == "embedding", "{}: {kinds:?} {seen:?}", op.name);
            }
            FactorRule::None(why) => assert!(seen.is_empty() && !why.is_empty(), "{}: {seen:?}", op.name),
        }
    }
}
