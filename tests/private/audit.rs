//! The audit, on steps as they are and on steps with one thing broken. Canaries are samples whose gradient is one coordinate of
//! a parameter that nothing else uses; what the optimizer gets is observed at every step, as the accountant assumes.

use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::{Accountant, ClipFn, ClipStyle, PoissonSampler, audit};
use prismgrad::random::{NoiseKey, add_gaussian};
use prismgrad::step::{Privacy, PrivacyConfig, PrivateStep, TrainStep, clipped_gradient};
use prismgrad::{Array, DType, Param, Result, Tensor};

const CANARIES: usize = 1000;
const STEPS: u64 = 20;
const BATCH: f64 = 500.0;
const SIGMA: f64 = 3.5;
const DELTA: f64 = 1e-6;

/// Sample i's loss is its size times wᵢ.
fn losses(w: &Param, ids: &[usize], sizes: &[f64]) -> Result<Tensor> {
    let x = Array::generate(&[ids.len(), CANARIES], DType::F64, |k| {
        (ids[k / CANARIES] == k % CANARIES) as u8 as f64 * sizes[k / CANARIES]
    });
    Tensor::new(x).mul(&w.per_sample(ids.len())?)?.sum(&[1], false)
}

fn fresh() -> Param {
    Param::new("canary", Array::zeros(&[CANARIES], DType::F64))
}

/// ε that the accountant says, at the audit's δ.
fn promised() -> f64 {
    let mut a = Accountant::new();
    a.record(SIGMA, BATCH / CANARIES as f64, STEPS).unwrap();
    a.epsilon(DELTA).unwrap()
}

/// The lower bound from the sum of what was released over the steps.
fn bound(scores: &[f64], coins: &[bool]) -> f64 {
    audit::one_run(scores, coins, 400, DELTA, 0.999).unwrap().epsilon
}

/// The real step.
fn right(seed: u64) -> f64 {
    let key = NoiseKey::from_seed_for_tests(seed);
    let coins = audit::coins(&NoiseKey::from_seed_for_tests(1000 + seed), CANARIES);
    let w = fresh();
    let config = PrivacyConfig::target(1e3, DELTA).records(CANARIES).expected_batch(BATCH).steps(STEPS);
    let config = config.noise_multiplier(SIGMA).clip(ClipFn::Abadi).style(ClipStyle::AllLayer);
    let privacy = Privacy::new(config, key).unwrap();
    let mut step =
        PrivateStep::new(std::slice::from_ref(&w), privacy, Sgd::default(), Schedule::constant(1e-3)).unwrap();
    let mut scores = vec![0.0; CANARIES];
    for _ in 0..STEPS {
        // A canary whose coin said no has no gradient.
        let size = |i: &usize| if coins[*i] { 50.0 } else { 0.0 };
        step.run(CANARIES, |ids| losses(&w, ids, &ids.iter().map(size).collect::<Vec<f64>>())).unwrap();
        // Descent moves a canary that is in downwards; what is released is the gradient.
        scores.iter_mut().zip(step.last_gradient().to_f64()).for_each(|(s, g)| *s += g);
    }
    bound(&scores, &coins)
}

/// The same step built by hand, so that one thing can be broken.
fn broken(seed: u64, noise: f64, size: f64, threshold: f64) -> f64 {
    let key = NoiseKey::from_seed_for_tests(seed);
    let coins = audit::coins(&NoiseKey::from_seed_for_tests(1000 + seed), CANARIES);
    let sampler = PoissonSampler::new(CANARIES, BATCH / CANARIES as f64, key.clone()).unwrap();
    let w = fresh();
    let mut scores = vec![0.0; CANARIES];
    for t in 0..STEPS {
        let batch: Vec<usize> = sampler.batch(t).into_iter().filter(|&i| coins[i]).collect();
        let mut out = vec![0f32; CANARIES];
        add_gaussian(&key, t, 0, noise * SIGMA, &mut out);
        scores.iter_mut().zip(&out).for_each(|(s, n)| *s += *n as f64);
        if !batch.is_empty() {
            let l = losses(&w, &batch, &vec![size; batch.len()]).unwrap();
            let params = std::slice::from_ref(&w);
            let sum = clipped_gradient(&l, params, &ClipStyle::AllLayer, ClipFn::Abadi, threshold).unwrap();
            scores.iter_mut().zip(sum[0].to_f64()).for_each(|(s, g)| *s += g);
        }
    }
    bound(&scores, &coins)
}

#[test]
fn correct_steps_are_never_accused() {
    let promised = promised();
    let bounds: Vec<f64> = (0..20).map(right).collect();
    assert!(bounds.iter().all(|b| *b <= promised), "accountant {promised}, audits {bounds:?}");
    // The audit is not blind: it sees a part of what is promised.
    let mean = bounds.iter().sum::<f64>() / 20.0;
    assert!(mean > 0.1 * promised, "accountant {promised}, audits {mean} on average");
    // The hand-built step with nothing broken is the same thing.
    assert!((0..5).all(|s| broken(s, 1.0, 50.0, 1.0) <= promised));
}

#[test]
fn planted_bugs_are_caught() {
    let promised = promised();
    for seed in 0..5 {
        let no_noise = broken(seed, 0.0, 50.0, 1.0);
        assert!(no_noise > promised, "no noise: {no_noise} against {promised}");
        // Gradients of norm 50, let through whole.
        let no_clip = broken(seed, 1.0, 50.0, 1e9);
        assert!(no_clip > promised, "no clipping: {no_clip} against {promised}");
    }
}
