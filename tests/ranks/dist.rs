//! Ranks as threads: collectives, faults, and training that is the same at any number of them.

use crate::common::distance::distance;
use crate::common::gpt::gpt;
use crate::common::records::losses;
use crate::common::values::values;
use prismgrad::dist::{Communicator, Fault, Local, Shared, Simulated};
use prismgrad::nn::{Init, Params};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle, Thresholds};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, Stage, TrainStep};
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

/// A group of some of the ranks computes among itself.
#[test]
fn ranks_split_into_groups() {
    let results = Local::run(5, |r| {
        let group = r.split(r.rank() % 2)?;
        let sum = group.all_reduce("x", &ones(2, r.rank() as f64))?.to_f64()[0];
        // The whole group goes on beside its parts.
        Ok((group.rank(), group.size(), sum, r.all_reduce("x", &ones(1, 1.0))?.item()?))
    });
    let all: Vec<_> = results.into_iter().map(|r| r.unwrap()).collect();
    assert_eq!(all, [(0, 3, 6.0, 5.0), (0, 2, 4.0, 5.0), (1, 3, 6.0, 5.0), (1, 2, 4.0, 5.0), (2, 3, 6.0, 5.0)]);
}

#[test]
fn parts_of_any_length_are_gathered() {
    let results = Local::run(3, |r| {
        let parts = [2, 0, 3];
        let own = ones(parts[r.rank()], r.rank() as f64);
        let all = r.all_gather_parts("x", &own, &parts)?.to_f64();
        assert!(r.all_gather_parts("x", &ones(7, 0.0), &parts).is_err());
        Ok((all, r.traffic().bytes))
    });
    for (rank, r) in results.into_iter().enumerate() {
        let (all, sent) = r.unwrap();
        assert_eq!(all, [0.0, 0.0, 2.0, 2.0, 2.0]);
        assert_eq!(sent, [2 * 2 * 8, 0, 2 * 3 * 8][rank]);
    }
}

/// A collective that was begun goes on while the program computes, in the order in which it was begun.
#[test]
fn collectives_go_on_in_the_background() {
    let latency = Duration::from_millis(150);
    let results = Local::run(2, |r| {
        let ranks = Shared::new(Simulated::new(r, latency, f64::INFINITY)?)?;
        let (x, y) = (ones(1, 1.0), ones(1, 2.0));
        let start = Instant::now();
        let a = ranks.begin(move |r| r.all_reduce("a", &x));
        let b = ranks.begin(move |r| r.all_reduce("b", &y));
        let begun = start.elapsed();
        std::thread::sleep(2 * latency);
        let sums = (a.wait()?.item()?, b.wait()?.item()?);
        Ok((sums, begun, start.elapsed(), ranks.traffic().calls))
    });
    for r in results {
        let (sums, begun, all, calls) = r.unwrap();
        assert_eq!((sums, calls), ((2.0, 4.0), 2));
        assert!(begun < latency, "beginning waited for {begun:?}");
        // Twice the latency beside a computation of twice the latency: one after the other they would take four.
        assert!(all >= 2 * latency && all < 7 * latency / 2, "{all:?}");
    }
}

#[test]
fn a_planted_fault_ends_everybody_with_its_reason() {
    let began = Instant::now();
    let said = Local::run(3, |r| {
        let me = r.rank();
        let ranks = Simulated::new(r, Duration::ZERO, f64::INFINITY)?;
        let ranks = if me == 1 { ranks.fault(2, Fault::Fail) } else { ranks };
        for _ in 0..5 {
            ranks.all_reduce("w", &ones(1, 1.0))?;
        }
        Ok(())
    });
    for (rank, result) in said.into_iter().enumerate() {
        let e = result.unwrap_err().to_string();
        assert!(e.contains("as planted") && (rank == 1 || e.contains("rank 1 is gone")), "{e}");
    }
    let mut ranks = Local::group(2, Duration::from_millis(200));
    let (stalls, here) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let stalls = Simulated::new(stalls, Duration::ZERO, f64::INFINITY)
        .unwrap()
        .fault(0, Fault::Stall(Duration::from_millis(400)));
    let late = std::thread::spawn(move || stalls.barrier().unwrap_err().to_string());
    assert!(here.barrier().unwrap_err().to_string().contains("[1]"));
    assert!(late.join().unwrap().contains("rank 0 is gone"));
    assert!(began.elapsed() < Duration::from_secs(20));
}

/// A rank whose step fails ends the others at once, with its reason and the step; at every stage.
#[test]
fn a_step_that_fails_on_one_rank_fails_on_all_at_once() {
    for stage in [Stage::Replicated, Stage::Optimizer, Stage::Gradients, Stage::Parameters] {
        let began = Instant::now();
        let said = Local::run(3, |rank| {
            let me = rank.rank();
            let model = gpt(1, true, DType::F32, &Device::Cpu);
            let step = PlainStep::new(&model.params().all(), Sgd::default(), Schedule::constant(1e-2))?;
            let mut step = step.with_zero(Box::new(rank), stage)?;
            for t in 0..3 {
                step.run_one(|| {
                    if t == 1 && me == 2 {
                        return Err(prismgrad::Error::Invalid { op: "data", message: "record 7 is torn".into() });
                    }
                    losses(&model, &[t, me])
                })?;
            }
            Ok(())
        });
        for (rank, result) in said.into_iter().enumerate() {
            let e = result.unwrap_err().to_string();
            assert!(e.contains("record 7 is torn"), "{stage:?}, rank {rank}: {e}");
            assert!(rank == 2 || e.contains("rank 2 is gone") && e.contains("step 2"), "{stage:?}, rank {rank}: {e}");
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{stage:?}: nobody waits for a deadline");
    }
}

/// Ranks whose forward passes read parameters in different orders are told so.
#[test]
fn ranks_on_different_paths_are_told() {
    let said = Local::run(2, |rank| {
        let me = rank.rank();
        let p = Params::new(0, DType::F32);
        let (a, b) = (p.param("a.w", &[8], Init::Ones)?, p.param("b.w", &[8], Init::Ones)?);
        let step = PlainStep::new(&p.all(), Sgd::default(), Schedule::constant(1e-2))?;
        let mut step = step.with_zero(Box::new(rank), Stage::Parameters)?;
        step.run_one(|| {
            let (first, then) = if me == 0 { (&a, &b) } else { (&b, &a) };
            first.dense().mul(&then.dense())?.expand(&[1, 8])?.sum(&[1], false)
        })
    });
    for r in said {
        let e = r.unwrap_err().to_string();
        assert!(e.contains("different orders"), "{e}");
    }
}

/// Over a slow link, what goes on in the background takes no time of its own: a step takes what the larger of computing and
/// communicating takes, not their sum.
#[test]
fn a_step_overlaps_with_its_communication() {
    let (blocks, width, compute, steps) = (6usize, 20_000, Duration::from_millis(60), 3);
    // Each block's parameters come twice, and its gradient goes once; at this bandwidth each takes about a third of its computing.
    let (bytes, n) = (4.0 * width as f64, 2.0);
    let bandwidth = bytes * (n - 1.0) / n / compute.as_secs_f64() * 1.5;
    let run = |bandwidth: f64| {
        let results = Local::run(2, |rank| {
            let p = Params::new(0, DType::F32);
            let all = (0..blocks).map(|i| p.param(&format!("h.{i}.w"), &[width], Init::Ones));
            let all = all.collect::<prismgrad::Result<Vec<_>>>()?;
            let step = PlainStep::new(&p.all(), Sgd::default(), Schedule::constant(1e-6))?;
            let ranks = Simulated::new(rank, Duration::ZERO, bandwidth)?;
            let mut step = step.with_zero(Box::new(ranks), Stage::Parameters)?;
            let mut took = Vec::new();
            for _ in 0..steps + 1 {
                let start = Instant::now();
                step.run_one(|| {
                    let mut sum = prismgrad::Tensor::zeros(&[1], DType::F32);
                    for w in &all {
                        sum = sum.add(&w.per_sample(1)?.sum(&[1], false)?)?;
                        // A computation that takes no processor.
                        std::thread::sleep(compute);
                    }
                    Ok(sum)
                })?;
                took.push(start.elapsed().as_secs_f64());
            }
            // The first step does not know the order yet.
            Ok(took[1..].iter().copied().fold(f64::INFINITY, f64::min))
        });
        results.into_iter().map(|r| r.unwrap()).fold(0.0, f64::max)
    };
    let (alone, slow) = (run(f64::INFINITY), run(bandwidth));
    // Gathers of all blocks but the first lie beside the computing; that one, and the gradients after it, do not.
    let each = bytes * (n - 1.0) / n / bandwidth;
    let hidden = (blocks - 1) as f64 * each;
    let open = (blocks + 1) as f64 * each;
    assert!(slow < alone + open + 0.5 * hidden, "{slow} s, {alone} s without a link, {open} s that cannot overlap");
}
