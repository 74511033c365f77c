//! Every op of the registry: gradient checks over random shapes, strides and broadcasts, and per-sample checks.

use prismgrad::check::{self, Gen};
use prismgrad::ops::{Differentiable, registry};
use proptest::prelude::*;

fn check_case(seed: u64) {
    for op in registry() {
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
    let mut names = std::collections::HashSet::new();
    for op in registry() {
        assert!(names.insert(op.name), "{} is registered twice", op.name);
        match op.differentiable {
            Differentiable::Yes => assert!(!op.cases.is_empty(), "{} has no cases", op.name),
            Differentiable::No(why) => assert!(!why.is_empty(), "{} does not say why it has no gradient", op.name),
        }
    }
}
