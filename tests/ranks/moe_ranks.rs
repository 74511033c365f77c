//! Experts on several ranks: the numbers of one rank, and the bytes of the formula.

use prismgrad::dist::{Communicator, Local, Shared};
use prismgrad::nn::{Balance, Ctx, ExpertKind, Moe, MoeConfig, Params, expert_traffic};
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::ClipStyle;
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::{Array, DType, Result, Tensor};
use std::time::Duration;

const D: usize = 6;
const SAMPLES: usize = 4;
const TOKENS: usize = 7;

fn config(experts: usize) -> MoeConfig {
    MoeConfig { balance: Balance::PerSample(0.1), z: 0.01, ..MoeConfig::new(experts, 2, 5) }
}

/// The input of the samples in a range; its first element is 1, so that a router can be made to ignore the rest.
fn input(from: usize, to: usize) -> Tensor {
    let at = |i: usize| ((i + from * TOKENS * D) as f64 * 12.9898).sin();
    Tensor::new(Array::generate(&[to - from, TOKENS, D], DType::F32, |i| if i % D == 0 { 1.0 } else { at(i) }))
}

fn losses(moe: &Moe, x: &Tensor) -> Result<Tensor> {
    let out = moe.forward(x, &Ctx::train(0))?;
    out.output.sub(x)?.square()?.sum(&[1, 2], false)?.add(&out.losses)
}

/// What a rank has after ten steps: its name for each parameter and the values, its outputs, and the bytes of its experts in one
/// forward and backward pass beside the formula's.
struct Found {
    params: Vec<(String, Vec<f64>)>,
    output: Vec<f64>,
    bytes: (u64, u64),
}

/// Ten steps as one of `ranks` ranks. `one_expert` sends every token to the same experts.
fn train(c: &MoeConfig, step: Local, experts: Local, one_expert: bool) -> Result<Found> {
    let (rank, n) = (step.rank(), step.size());
    let params = Params::new(7, DType::F32);
    let mut moe = Moe::new(&params, D, c)?;
    if one_expert {
        let w = params.get("router.weight").unwrap();
        w.set(Array::generate(w.shape(), DType::F32, |i| if i % D == 0 { 2.0 - (i / D) as f64 } else { 0.0 }))?;
    }
    let experts = Shared::new(experts)?;
    moe.place(&experts)?;
    let x = input(rank * SAMPLES / n, (rank + 1) * SAMPLES / n);
    // Bytes of one pass.
    let stats = moe.forward(&x, &Ctx::train(0))?.stats;
    let load = stats.read()?.load;
    let own = rank * c.experts / n..(rank + 1) * c.experts / n;
    let all = experts.all_gather("load", &Array::from_slice(&load, &[c.experts])?)?.to_f64();
    let away = (0..c.experts).filter(|e| !own.contains(e)).map(|e| load[e] as usize).sum();
    let others = (0..n).filter(|&r| r != rank);
    let here =
        others.flat_map(|r| own.clone().map(move |e| (r, e))).map(|(r, e)| all[r * c.experts + e] as usize).sum();
    let before = experts.traffic().bytes;
    // With gradients for the input as well, as in a layer that others come before.
    losses(&moe, &Tensor::leaf(x.array().clone()))?.backward()?;
    let sent = experts.traffic().bytes - before;
    let formula = expert_traffic(away, here, D, DType::F32, (c.experts - own.len(), n));
    let mut step =
        PlainStep::new(&params.all(), Sgd::default(), Schedule::constant(0.05))?.with_ranks(Box::new(step))?;
    for _ in 0..10 {
        step.run_one(|| losses(&moe, &x))?;
    }
    let output = moe.forward(&x, &Ctx::eval())?.output.array().to_f64();
    let params = params.all().iter().map(|p| (p.name().to_string(), p.value().to_f64())).collect();
    Ok(Found { params, output, bytes: (sent, formula) })
}

fn run(c: &MoeConfig, ranks: usize, one_expert: bool) -> Vec<Found> {
    let group = || Local::group(ranks, Duration::from_secs(20));
    let pairs: Vec<(Local, Local)> = group().into_iter().zip(group()).collect();
    std::thread::scope(|s| {
        let threads: Vec<_> = pairs.into_iter().map(|(a, b)| s.spawn(|| train(c, a, b, one_expert).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn near(got: &[f64], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= 2e-6 * scale, "{what}: {g}, not {w}");
    }
}

#[test]
fn ranks_have_the_numbers_of_one_and_the_bytes_of_the_formula() {
    // Five experts divide neither by two nor by four ranks; three leave a rank of four without any.
    for (experts, one_expert, swiglu) in [(5, false, false), (5, true, false), (3, false, true)] {
        let mut c = config(experts);
        if swiglu {
            c.expert = ExpertKind::SwiGlu;
        }
        let alone = run(&c, 1, one_expert);
        assert_eq!(alone[0].bytes.0, 0, "nothing is sent to oneself");
        for ranks in [2, 4] {
            let all = run(&c, ranks, one_expert);
            let output: Vec<f64> = all.iter().flat_map(|f| f.output.clone()).collect();
            near(&output, &alone[0].output, "output");
            for (i, (name, want)) in alone[0].params.iter().enumerate() {
                match name.starts_with("experts.") {
                    true => {
                        let parts: Vec<f64> = all.iter().flat_map(|f| f.params[i].1.clone()).collect();
                        near(&parts, want, name);
                    }
                    false => all.iter().for_each(|f| near(&f.params[i].1, want, name)),
                }
            }
            for (rank, f) in all.iter().enumerate() {
                assert_eq!(f.bytes.0, f.bytes.1, "bytes of rank {rank} of {ranks}");
            }
            assert!(all.iter().any(|f| f.bytes.0 > 1000), "{experts} experts on {ranks} ranks send something");
        }
    }
}

#[test]
fn one_communicator_serves_a_step_and_its_layers() {
    let sums = Local::run(2, |rank| {
        let ranks = Shared::new(rank)?;
        let params = Params::new(7, DType::F32);
        let mut moe = Moe::new(&params, D, &config(4))?;
        moe.place(&ranks)?;
        let again = moe.place(&ranks).err().unwrap().to_string();
        assert!(again.contains("on ranks already"), "{again}");
        let x = input(2 * ranks.rank(), 2 * ranks.rank() + 2);
        let all = params.all();
        let mut step = PlainStep::new(&all, Sgd::default(), Schedule::constant(0.05))?.with_ranks(Box::new(ranks))?;
        (0..3).map(|_| step.run_one(|| losses(&moe, &x))?.loss()).collect::<Result<Vec<f64>>>()
    });
    let sums: Vec<Vec<f64>> = sums.into_iter().map(|s| s.unwrap()).collect();
    assert!(sums[0] == sums[1] && sums[0][2] < sums[0][0], "{sums:?}");
}

#[test]
fn a_private_step_refuses_placed_experts() {
    let ranks = Shared::new(Local::group(1, Duration::from_secs(5)).remove(0)).unwrap();
    let params = Params::new(7, DType::F32);
    let mut moe = Moe::new(&params.at("h.0.moe"), D, &config(4)).unwrap();
    moe.place(&ranks).unwrap();
    let config = PrivacyConfig::target(8.0, 1e-4).records(4).expected_batch(3.0).steps(10).style(ClipStyle::AllLayer);
    let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(1)).unwrap();
    let mut step = PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap();
    let e = step.run(4, |records| losses(&moe, &input(0, records.len()))).err().unwrap().to_string();
    assert!(["h.0.moe", "several ranks", "with_ranks"].iter().all(|w| e.contains(w)), "{e}");
}

#[test]
fn rows_go_to_each_rank_whatever_their_number() {
    let got = Local::run(3, |rank| {
        let me = rank.rank();
        // Rank r sends r rows to rank 0, none to rank 1, one to rank 2.
        let rows = [me, 0, 1];
        let x = Array::generate(&[me + 1, 2], DType::F64, |i| (100 * me + i) as f64);
        let (y, from) = rank.all_to_all_rows("x", &x, &rows)?;
        assert_eq!(rank.traffic().bytes, 16 * (me + 1 - rows[me]) as u64 + 16);
        Ok((y.shape().to_vec(), y.to_f64(), from))
    });
    let got: Vec<_> = got.into_iter().map(|g| g.unwrap()).collect();
    assert_eq!(got[0], (vec![3, 2], vec![100.0, 101.0, 200.0, 201.0, 202.0, 203.0], vec![0, 1, 2]));
    assert_eq!(got[1], (vec![0, 2], vec![], vec![0, 0, 0]));
    assert_eq!(got[2], (vec![3, 2], vec![0.0, 1.0, 102.0, 103.0, 204.0, 205.0], vec![1, 1, 1]));
    let wrong = Local::run(1, |rank| rank.all_to_all_rows("x", &Array::zeros(&[3, 2], DType::F32), &[2]));
    assert!(wrong[0].as_ref().err().unwrap().to_string().contains("[2] rows for 1 ranks of [3, 2]"));
}
