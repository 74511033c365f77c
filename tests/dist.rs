//! Ranks as threads: collectives, faults, and training that is the same at any number of them.

mod common {
    pub mod distance;
    pub mod gpt;
    pub mod records;
    pub mod values;
}

use common::distance::distance;
use common::gpt::gpt;
use common::records::losses;
use common::values::values;
use prismgrad::dist::{Communicator, Local};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle, Thresholds};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::{Array, DType, Device, Param};
use std::time::{Duration, Instant};

fn ones(n: usize, value: f64) -> Array {
    Array::full(&[n], value, (DType::F64, &Device::Cpu))
}

#[test]
fn collectives() {
    for n in 1..5 {
        let results = Local::run(n, |r| {
            let me = r.rank() as f64;
            let x = Array::generate(&[2 * n], DType::F64, |i| 10.0 * me + i as f64);
            let total = r.all_reduce("x", &x)?.to_f64();
            let part = r.reduce_scatter("x", &x)?;
            assert_eq!(part.to_f64(), total[2 * r.rank()..2 * r.rank() + 2]);
            assert_eq!(r.all_gather("x", &part)?.to_f64(), total);
            assert_eq!(r.broadcast("x", &x, n - 1)?.to_f64()[0], 10.0 * (n - 1) as f64);
            let swapped = r.all_to_all("x", &x)?.to_f64();
            let want: Vec<f64> =
                (0..n).flat_map(|s| [0, 1].map(|i| 10.0 * s as f64 + (2 * r.rank() + i) as f64)).collect();
            assert_eq!(swapped, want);
            r.barrier()?;
            Ok((total, r.traffic()))
        });
        let all: Vec<_> = results.into_iter().map(|r| r.unwrap()).collect();
        let bytes = 2 * n * 8;
        // All-reduce 2, reduce-scatter, broadcast and all-to-all 1 each, all-gather n parts of 1/n: 6·(N − 1)/N buffers.
        assert!(
            all.iter()
                .all(|(total, t)| *total == all[0].0 && t.calls == 6 && t.bytes as usize == 6 * bytes * (n - 1) / n)
        );
    }
}

#[test]
fn what_goes_wrong_is_told_to_everybody() {
    // Another shape.
    let said: Vec<String> = Local::run(3, |r| r.all_reduce("gradients", &ones(4 + r.rank() / 2, 1.0)))
        .into_iter()
        .map(|r| r.unwrap_err().to_string())
        .collect();
    assert!(said.iter().all(|e| e.contains("gradients") && e.contains("[5]") && e.contains("[4]")), "{said:?}");
    // Another collective.
    let said =
        Local::run(2, |r| if r.rank() == 0 { r.barrier() } else { r.all_reduce("w", &ones(1, 1.0)).map(|_| ()) });
    assert!(said.into_iter().all(|r| r.unwrap_err().to_string().contains("different paths")));
    // A rank that ends, and one that panics.
    for panics in [false, true] {
        let said = Local::run(3, |r| {
            if r.rank() == 1 {
                assert!(!panics, "on purpose");
                return Ok(());
            }
            r.all_reduce("w", &ones(1, 1.0)).map(|_| ())
        });
        for (rank, result) in said.into_iter().enumerate().filter(|(rank, _)| *rank != 1) {
            let e = result.unwrap_err().to_string();
            assert!(e.contains(&format!("rank {rank}")) && e.contains("rank 1 is gone"), "{e}");
        }
    }
    // A rank that stalls.
    let began = Instant::now();
    let mut ranks = Local::group(2, Duration::from_millis(200));
    let (late, here) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let e = here.all_reduce("w", &ones(1, 1.0)).unwrap_err().to_string();
    assert!(e.contains("[1]") && e.contains("stall"), "{e}");
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(late.barrier().unwrap_err().to_string().contains("rank 0 is gone"));
}

fn config(records: usize, batch: f64) -> PrivacyConfig {
    PrivacyConfig::target(1e3, 1e-4).records(records).expected_batch(batch).steps(50).noise_multiplier(1.0)
}

/// Parameters, last gradient, and what was reported, after six steps on `n` ranks.
fn train(n: usize, style: Option<ClipStyle>, thresholds: Thresholds) -> Vec<(Vec<f64>, Vec<f64>, Vec<f64>)> {
    let results = Local::run(n, |rank| {
        let me = rank.rank();
        // Ranks start apart; rank 0's parameters are taken.
        let model = gpt(1, true, DType::F64, &Device::Cpu);
        if me > 0 {
            model.params().all().iter().for_each(|p| p.set(Array::zeros(p.shape(), DType::F64)).unwrap());
        }
        let params: Vec<Param> = model.params().all();
        let schedule = Schedule::constant(1e-2);
        let mut reported = Vec::new();
        let gradient = match &style {
            None => {
                let mut step = PlainStep::new(&params, AdamW::default(), schedule)?.with_ranks(Box::new(rank))?;
                for t in 0..6 {
                    let mine: Vec<usize> = (0..7).map(|i| i + 7 * t).filter(|i| i % n == me).collect();
                    let report = step.run(mine.chunks(3), |ids| losses(&model, ids))?;
                    reported.extend([report.samples as f64, report.loss()?]);
                }
                step.last_gradient().to_f64()
            }
            Some(style) => {
                let c = config(30, 6.0).style(style.clone()).thresholds(thresholds.clone()).clip(ClipFn::Abadi);
                let p = Privacy::new(c, NoiseKey::from_seed_for_tests(5))?;
                let step = PrivateStep::new(&params, p, AdamW::default(), schedule)?;
                let mut step = step.with_ranks(Box::new(rank))?;
                for _ in 0..6 {
                    let report = step.run(3, |ids| losses(&model, ids))?;
                    let known = if report.samples > 0 { report.loss()? } else { 0.0 };
                    reported.extend([report.samples as f64, known, report.clipped()?]);
                }
                step.last_gradient().to_f64()
            }
        };
        Ok((values(&params), gradient, reported))
    });
    results.into_iter().map(|r| r.unwrap()).collect()
}

#[test]
fn training_is_the_same_at_any_number_of_ranks() {
    let adaptive = Thresholds::Adaptive { quantile: 0.5, rate: 0.2, noise: 0.5 };
    let cases = [
        (None, Thresholds::Equal),
        (Some(ClipStyle::AllLayer), Thresholds::Equal),
        (Some(ClipStyle::LayerWise), Thresholds::Equal),
        (Some(ClipStyle::AllLayer), adaptive),
    ];
    for (style, thresholds) in cases {
        let alone = &train(1, style.clone(), thresholds.clone())[0];
        for n in 2..5 {
            let ranks = train(n, style.clone(), thresholds.clone());
            for (k, (values, gradient, reported)) in ranks.iter().enumerate() {
                assert_eq!((values, gradient, reported), (&ranks[0].0, &ranks[0].1, &ranks[0].2), "rank {k} of {n}");
                for (what, got, want) in
                    [("parameters", values, &alone.0), ("gradient", gradient, &alone.1), ("report", reported, &alone.2)]
                {
                    let off = distance(got, want);
                    assert!(off < 1e-8, "{what} of {n} ranks, {style:?}: off by {off:e}");
                }
            }
            assert_eq!(train(n, style.clone(), thresholds.clone()), ranks, "twice the same bits");
        }
    }
}

/// Noise is added once, in the same bits at any number of ranks, to parameters that nobody touched as well.
#[test]
fn noise_does_not_depend_on_the_number_of_ranks() {
    let noise = |n: usize| {
        let results = Local::run(n, |rank| {
            let w = Param::new("idle", Array::zeros(&[1003], DType::F32));
            let p = Privacy::new(config(30, 1e-6), NoiseKey::from_seed_for_tests(5))?;
            let step = PrivateStep::new(&[w], p, Sgd::default(), Schedule::constant(1.0))?;
            let mut step = step.with_ranks(Box::new(rank))?;
            step.run(1, |_| unreachable!())?;
            step.last_gradient().to_vec::<f32>()
        });
        results.into_iter().map(|r| r.unwrap()).collect::<Vec<_>>()
    };
    let want = noise(1).remove(0);
    assert!(want.iter().all(|x| *x != 0.0));
    (2..5).for_each(|n| assert!(noise(n).iter().all(|x| *x == want), "{n} ranks"));
}

/// The records of one Poisson batch, each with exactly one rank.
#[test]
fn ranks_share_one_poisson_batch() {
    let batches = |n: usize| {
        let results = Local::run(n, |rank| {
            let w = Param::new("w", Array::zeros(&[1], DType::F32));
            let p = Privacy::new(config(1000, 100.0), NoiseKey::from_seed_for_tests(5))?;
            let step = PrivateStep::new(std::slice::from_ref(&w), p, Sgd::default(), Schedule::constant(1.0))?;
            let mut mine = Vec::new();
            step.with_ranks(Box::new(rank))?.run(1000, |records| {
                mine.extend_from_slice(records);
                w.per_sample(records.len())?.reshape(&[records.len()])
            })?;
            Ok(mine)
        });
        let mut all: Vec<usize> = results.into_iter().flat_map(|r| r.unwrap()).collect();
        all.sort();
        all
    };
    let want = batches(1);
    assert!(want.len() > 50);
    (2..5).for_each(|n| assert_eq!(batches(n), want));
}

/// Ranks with keys of their own, or with another noise multiplier, are told apart before they take a step together.
#[test]
fn ranks_with_other_keys_or_settings_are_refused() {
    for (other_key, other_sigma) in [(true, false), (false, true)] {
        let results = Local::run(3, |rank| {
            let odd = rank.rank() == 1;
            let w = Param::new("w", Array::zeros(&[1], DType::F32));
            let c = config(30, 6.0).noise_multiplier(if odd && other_sigma { 2.0 } else { 1.0 });
            let p = Privacy::new(c, NoiseKey::from_seed_for_tests(if odd && other_key { 6 } else { 5 }))?;
            let step = PrivateStep::new(&[w], p, Sgd::default(), Schedule::constant(1.0))?;
            step.with_ranks(Box::new(rank)).map(drop)
        });
        for (rank, result) in results.into_iter().enumerate() {
            let e = result.unwrap_err().to_string();
            assert!(e.contains(if rank == 1 { "rank 0 has another" } else { "rank 1 has another" }), "{rank}: {e}");
        }
    }
}
