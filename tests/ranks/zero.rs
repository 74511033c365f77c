//! Ranks that share the model's state: the same training at every stage, what each keeps and sends, noise that is drawn once.

use crate::common::distance::distance;
use crate::common::records::losses;
use crate::common::values::values;
use prismgrad::dist::{Communicator, Local};
use prismgrad::io::CheckpointFolder;
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::{Balance, Ctx, Init, Moe, MoeConfig, Params};
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle, Thresholds};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Load, Machine, PlainStep, Privacy, PrivacyConfig, PrivateStep, Stage, TrainStep, zero_plan};
use prismgrad::train::state;
use prismgrad::{Array, DType, Param, Result, Tensor};

const STAGES: [Stage; 4] = [Stage::Replicated, Stage::Optimizer, Stage::Gradients, Stage::Parameters];

/// About 14,000 parameters, of which a rank's stretch can begin and end anywhere.
fn model(dtype: DType) -> Gpt {
    Gpt::with_dtype(GptConfig::small(17, 6, 1, 32, 2), 3, dtype).unwrap()
}

fn config(records: usize, batch: f64) -> PrivacyConfig {
    PrivacyConfig::target(1e3, 1e-4).records(records).expected_batch(batch).steps(50).noise_multiplier(1.0)
}

/// A step of either kind.
enum Step {
    Plain(PlainStep),
    Private(PrivateStep),
}

impl Step {
    fn any(&mut self) -> &mut dyn TrainStep {
        match self {
            Step::Plain(s) => s,
            Step::Private(s) => s,
        }
    }
    fn new(m: &Gpt, style: &Option<(ClipStyle, Thresholds)>, rank: Local, stage: Stage) -> Result<Step> {
        let (params, schedule) = (m.params().all(), Schedule::constant(1e-2));
        let sgd = Sgd { momentum: 0.9, weight_decay: 0.01 };
        Ok(match style {
            // The bias of attention's keys has a gradient of rounding alone, of which Adam makes steps of full length: in f32, sums in
            // another order would be another model.
            None if params[0].dtype() == DType::F32 => {
                Step::Plain(PlainStep::new(&params, sgd, schedule)?.with_zero(Box::new(rank), stage)?)
            }
            None => Step::Plain(PlainStep::new(&params, AdamW::default(), schedule)?.with_zero(Box::new(rank), stage)?),
            Some((style, thresholds)) => {
                let c = config(30, 6.0).style(style.clone()).thresholds(thresholds.clone()).clip(ClipFn::Abadi);
                let p = Privacy::new(c, NoiseKey::from_seed_for_tests(5))?;
                Step::Private(
                    PrivateStep::new(&params, p, AdamW::default(), schedule)?.with_zero(Box::new(rank), stage)?,
                )
            }
        })
    }
    /// One step; a plain one on seven records, of which this rank has every n-th, three in a microbatch.
    fn take(&mut self, m: &Gpt, t: usize, (rank, n): (usize, usize)) -> Result<Vec<f64>> {
        Ok(match self {
            Step::Plain(step) => {
                let mine: Vec<usize> = (0..7).map(|i| i + 7 * t).filter(|i| i % n == rank).collect();
                let report = step.run(mine.chunks(3), |ids| losses(m, ids))?;
                vec![report.samples as f64, report.loss()?]
            }
            Step::Private(step) => {
                let report = step.run(3, |ids| losses(m, ids))?;
                vec![report.samples as f64, if report.samples > 0 { report.loss()? } else { 0.0 }, report.clipped()?]
            }
        })
    }
}

/// Of each rank: parameters, the optimizer's buffers whole, what was reported.
type Trained = Vec<(Vec<f64>, Vec<f64>, Vec<f64>)>;

fn train(n: usize, stage: Stage, style: &Option<(ClipStyle, Thresholds)>, dtype: DType, steps: usize) -> Trained {
    let results = Local::run(n, |rank| {
        let me = (rank.rank(), n);
        let m = model(dtype);
        if me.0 > 0 {
            // Ranks start apart; rank 0's parameters are taken.
            m.params().all().iter().for_each(|p| p.set(Array::zeros(p.shape(), dtype)).unwrap());
        }
        let mut step = Step::new(&m, style, rank, stage)?;
        let mut reported = Vec::new();
        for t in 0..steps {
            reported.extend(step.take(&m, t, me)?);
        }
        let state = step.any().whole_state()?;
        Ok((values(&m.params().all()), state.iter().flat_map(|s| s.1.to_f64()).collect(), reported))
    });
    results.into_iter().map(|r| r.unwrap()).collect()
}

fn styles() -> Vec<Option<(ClipStyle, Thresholds)>> {
    let adaptive = Thresholds::Adaptive { quantile: 0.5, rate: 0.2, noise: 0.5 };
    let equal = |s| Some((s, Thresholds::Equal));
    vec![
        None,
        equal(ClipStyle::AllLayer),
        equal(ClipStyle::LayerWise),
        equal(ClipStyle::ParameterWise),
        Some((ClipStyle::AllLayer, adaptive)),
    ]
}

/// Sums over other splits of a batch differ in the last bits; noise has the same ones.
#[test]
fn training_is_the_same_at_every_stage_and_number_of_ranks() {
    for style in styles() {
        let alone = train(1, Stage::Replicated, &style, DType::F64, 4).remove(0);
        for n in 1..5 {
            for stage in STAGES {
                let ranks = train(n, stage, &style, DType::F64, 4);
                for (k, rank) in ranks.iter().enumerate() {
                    assert_eq!(rank, &ranks[0], "rank {k} of {n}, {stage:?}");
                }
                for (what, got, want) in [
                    ("parameters", &ranks[0].0, &alone.0),
                    ("state", &ranks[0].1, &alone.1),
                    ("report", &ranks[0].2, &alone.2),
                ] {
                    let off = distance(got, want);
                    assert!(off < 1e-8, "{what} of {n} ranks at {stage:?}, {style:?}: off by {off:e}");
                }
            }
        }
    }
}

#[test]
fn twenty_steps_in_f32_agree_to_two_parts_in_a_million() {
    for style in styles().into_iter().take(2) {
        let alone = train(1, Stage::Replicated, &style, DType::F32, 20).remove(0).0;
        let most = alone.iter().fold(0f64, |m, x| m.max(x.abs()));
        for (n, stage) in [(2, Stage::Optimizer), (3, Stage::Gradients), (4, Stage::Gradients), (4, Stage::Parameters)]
        {
            let got = &train(n, stage, &style, DType::F32, 20)[0].0;
            let off = distance(got, &alone) / most;
            assert!(off <= 2e-6, "{n} ranks at {stage:?}: {off:e}");
            assert_eq!(&train(n, stage, &style, DType::F32, 20)[0].0, got, "twice the same bits");
        }
    }
}

/// With one microbatch nothing is added up in another order: all stages have stage 0's bits.
#[test]
fn stages_have_the_same_bits_with_one_microbatch() {
    for ctx in [Ctx::eval(), Ctx::eval().with_dtype(DType::BF16)] {
        same_bits(&ctx);
    }
}

/// In the precision of the context.
fn losses_in(m: &Gpt, records: &[usize], ctx: &Ctx) -> Result<Tensor> {
    let text =
        |k: usize| Array::generate(&[records.len(), 6], DType::U32, |i| ((records[i / 6] * 5 + i * 7 + k) % 17) as f64);
    m.losses(text(0), text(3), ctx)
}

fn same_bits(ctx: &Ctx) {
    let run = |stage: Stage| {
        let results = Local::run(3, |rank| {
            let (m, me) = (model(DType::F32), rank.rank());
            let p = m.params().all();
            let step = PlainStep::new(&p, AdamW::default(), Schedule::constant(1e-2))?;
            let mut step = step.with_zero(Box::new(rank), stage)?;
            for t in 0..5 {
                step.run_one(|| losses_in(&m, &[3 * t + me, 40 + me], ctx))?;
            }
            Ok(values(&p))
        });
        results.into_iter().map(|r| r.unwrap()).collect::<Vec<_>>()
    };
    let want = run(Stage::Replicated);
    assert_eq!(run(Stage::Optimizer), want);
    assert_eq!(run(Stage::Gradients), want);
    assert_eq!(run(Stage::Parameters), want);
}

/// The noise of one step over `w`, whose sum has no record in it: of each rank its own stretch, put together.
fn noise(n: usize, stage: Stage, numel: usize, dtype: DType, key: fn() -> NoiseKey, records: usize) -> Vec<f64> {
    let results = Local::run(n, |rank| {
        let w = Param::new("w", Array::zeros(&[numel], dtype));
        let c = config(30, if records == 0 { 1e-6 } else { 15.0 }).clip(ClipFn::Abadi).max_grad_norm(1e6);
        let step = PrivateStep::new(
            std::slice::from_ref(&w),
            Privacy::new(c, key())?,
            AdamW::default(),
            Schedule::constant(1.0),
        )?;
        let mut step = step.with_zero(Box::new(rank), stage)?;
        // The gradient of a record is a whole number at every place, so that sums are exact in any order.
        step.run(2, |records| {
            let g: Vec<f64> = records.iter().map(|&r| (r % 5) as f64).collect();
            let rows = Tensor::from_slice(&g, &[records.len(), 1])?.cast(dtype)?;
            w.per_sample(records.len())?.mul(&rows)?.sum(&[1], false)
        })?;
        Ok(step.last_gradient().to_f64())
    });
    let all: Vec<Vec<f64>> = results.into_iter().map(|r| r.unwrap()).collect();
    if stage == Stage::Replicated { all[0].clone() } else { all.concat() }
}

/// With a secret key, noise depends on a digest of the whole sum. The owners make it together.
#[test]
fn noise_has_the_same_bits_at_every_stage_and_number_of_ranks() {
    let secret = || NoiseKey::from_bytes([9; 32]);
    for (numel, dtype) in [(1003, DType::F32), (9001, DType::F64), (20_480, DType::F32)] {
        for records in [0, 15] {
            let want = noise(1, Stage::Replicated, numel, dtype, secret, records);
            assert_eq!(want.len(), numel);
            assert!(want.iter().all(|x| *x != 0.0));
            for n in 1..5 {
                for stage in STAGES {
                    let got = noise(n, stage, numel, dtype, secret, records);
                    assert_eq!(got, want, "{n} ranks at {stage:?}, {numel} {dtype}");
                }
            }
        }
    }
}

/// Owners that drew noise from the beginning of a stream of their own would repeat each other's.
#[test]
fn the_noise_of_two_owners_is_independent_and_has_the_right_variance() {
    const N: usize = 1 << 20;
    let all = noise(4, Stage::Gradients, N, DType::F32, || NoiseKey::from_bytes([3; 32]), 0);
    let unit = (all.iter().map(|x| x * x).sum::<f64>() / N as f64).sqrt();
    // σ·R, divided by the expected batch; the release has a margin of 1/1024 for what rounding may move.
    let want = 1e6 / 1e-6;
    assert!((unit / want - 1.0).abs() < 0.0025 + 1.0 / 1024.0, "{}", unit / want);
    let part = |r: usize| &all[r * N / 4..(r + 1) * N / 4];
    for (a, b) in [(0, 1), (1, 2), (0, 3)] {
        let dot: f64 = part(a).iter().zip(part(b)).map(|(x, y)| x * y).sum();
        let corr = dot / (N as f64 / 4.0) / (unit * unit);
        // Three standard deviations at a quarter of a million pairs.
        assert!(corr.abs() < 6e-3, "owners {a} and {b}: {corr}");
    }
}

#[test]
fn a_rank_keeps_and_sends_what_the_formulas_say() {
    // A million parameters: the stretches' grain of 2,048 is within the 3 %.
    let psi = 1_000_000usize;
    for n in 1..5usize {
        for stage in STAGES {
            let results = Local::run(n, |rank| {
                let w = Param::new("w", Array::zeros(&[psi], DType::F32));
                let step = PlainStep::new(std::slice::from_ref(&w), AdamW::default(), Schedule::constant(0.1))?;
                let mut step = step.with_zero(Box::new(rank), stage)?;
                let before = step.ranks().unwrap().traffic().bytes;
                step.run_one(|| w.per_sample(2)?.sum(&[1], false))?;
                let sent = step.ranks().unwrap().traffic().bytes - before;
                let kept: usize = step.plan().bytes().iter().map(|b| b.1).sum();
                let held: usize = step.state().iter().map(|s| 4 * s.1.numel()).sum::<usize>();
                Ok((sent as f64, kept as f64, held as f64, step.last_gradient().numel() as f64))
            });
            let of = |f: f64| 4.0 * psi as f64 * f;
            let share = 1.0 / n as f64;
            let (kept, optimizer) = match stage {
                Stage::Replicated => (of(4.0), of(2.0)),
                Stage::Optimizer => (of(2.0 + 2.0 * share), of(2.0 * share)),
                Stage::Gradients => (of(1.0 + 3.0 * share), of(2.0 * share)),
                Stage::Parameters => (of(4.0 * share), of(2.0 * share)),
            };
            for (rank, r) in results.into_iter().enumerate() {
                let (sent, got, held, gradient) = r.unwrap();
                assert!((got / kept - 1.0).abs() < 0.03, "{stage:?}, rank {rank} of {n}: {got} beside {kept}");
                assert!((held / optimizer - 1.0).abs() < 0.03);
                if matches!(stage, Stage::Gradients | Stage::Parameters) {
                    assert!((4.0 * gradient / of(share) - 1.0).abs() < 0.03);
                }
                // Gradients and parameters: Ψ(N − 1)/N elements each; counts of records and pieces are a few hundred bytes.
                let want = 2.0 * of(1.0 - share);
                assert!(
                    (sent - want).abs() <= 0.03 * want + 1000.0,
                    "{stage:?}, rank {rank} of {n}: sent {sent}, {want}"
                );
            }
        }
    }
}

/// Private steps send what plain ones send, and the digest: 1/512 of the gradient.
#[test]
fn private_training_sends_nothing_more() {
    for stage in STAGES {
        let sent = |private: bool| {
            let results = Local::run(3, |rank| {
                let m = Params::new(0, DType::F32);
                let w = m.param("w", &[100_000], Init::Zeros)?;
                let loss = |k: usize| w.per_sample(k)?.sum(&[1], false);
                let schedule = Schedule::constant(0.1);
                let bytes = |s: &dyn TrainStep| s.ranks().unwrap().traffic().bytes;
                if private {
                    let p = Privacy::new(config(30, 29.9), NoiseKey::from_seed_for_tests(1))?;
                    let mut s =
                        PrivateStep::new(&m.all(), p, AdamW::default(), schedule)?.with_zero(Box::new(rank), stage)?;
                    let before = bytes(&s);
                    s.run(64, |r| loss(r.len()))?;
                    Ok(bytes(&s) - before)
                } else {
                    let mut s =
                        PlainStep::new(&m.all(), AdamW::default(), schedule)?.with_zero(Box::new(rank), stage)?;
                    let before = bytes(&s);
                    s.run_one(|| loss(10))?;
                    Ok(bytes(&s) - before)
                }
            });
            results.into_iter().map(|r| r.unwrap()).max().unwrap() as f64
        };
        let (plain, private) = (sent(false), sent(true));
        let digest = if stage == Stage::Replicated { 0.0 } else { 4.0 * 100_000.0 / 512.0 };
        assert!(private <= plain + 3.0 * digest + 200.0, "{stage:?}: {private} beside {plain}");
    }
}

/// Poisson batches differ between ranks; one has no microbatch where another has three.
#[test]
fn ranks_with_fewer_microbatches_do_not_hold_the_others_up() {
    let run = |stage: Stage| {
        let results = Local::run(3, |rank| {
            let (m, me) = (model(DType::F64), rank.rank());
            let step = PlainStep::new(&m.params().all(), AdamW::default(), Schedule::constant(1e-2))?;
            let mut step = step.with_zero(Box::new(rank), stage)?;
            for t in 0..3 {
                // Rank 0: none, 1: one, 2: three, and the other way round.
                let mine = [0, 1, 3][(me + t) % 3];
                let report = step.run((0..mine).map(|i| vec![10 * t + i, 20 + i]), |ids| losses(&m, &ids))?;
                assert_eq!(report.samples, 8);
            }
            Ok(values(&m.params().all()))
        });
        results.into_iter().map(|r| r.unwrap()).collect::<Vec<_>>()
    };
    let want = run(Stage::Replicated);
    for stage in [Stage::Optimizer, Stage::Gradients, Stage::Parameters] {
        let got = run(stage);
        assert!(got.iter().all(|g| *g == got[0]));
        assert!(distance(&got[0], &want[0]) < 1e-10);
    }
}

/// A run of four ranks at stage 3 goes on at other numbers and stages.
#[test]
fn a_checkpoint_goes_on_at_any_number_of_ranks_and_stage() {
    for style in [None, styles().remove(4)] {
        let whole = train(4, Stage::Parameters, &style, DType::F64, 8);
        // Five steps, then what a checkpoint has.
        let results = Local::run(4, |rank| {
            let (m, me) = (model(DType::F64), rank.rank());
            let mut step = Step::new(&m, &style, rank, Stage::Parameters)?;
            for t in 0..5 {
                step.take(&m, t, (me, 4))?;
            }
            let own = step.any().state();
            assert!(own.iter().filter(|s| s.0 == "m" || s.0 == "v").all(|s| s.1.numel() < 5000));
            Ok((step.any().whole_state()?, m.params().all().iter().map(|p| p.value().copy()).collect::<Vec<_>>()))
        });
        let (state, params) = results.into_iter().next().unwrap().unwrap();
        let state: Vec<(String, Array)> = state.into_iter().map(|(n, a)| (n.to_string(), a)).collect();
        let others = (1..4).flat_map(|n| STAGES.map(|stage| (n, stage)));
        for (n, stage) in others.chain([(4, Stage::Parameters)]) {
            let results = Local::run(n, |rank| {
                let (m, me) = (model(DType::F64), rank.rank());
                m.params().all().iter().zip(&params).try_for_each(|(p, v)| p.set(v.copy()))?;
                let mut step = Step::new(&m, &style, rank, stage)?;
                step.any().restore(5, &state)?;
                for t in 5..8 {
                    step.take(&m, t, (me, n))?;
                }
                Ok(values(&m.params().all()))
            });
            for got in results {
                let got = got.unwrap();
                assert!(distance(&got, &whole[0].0) < 1e-8, "{n} ranks at {stage:?}");
                if n == 4 {
                    assert_eq!(got, whole[0].0, "the same bits at the same number and stage");
                }
            }
        }
    }
}

#[test]
fn tied_frozen_idle_and_empty_parameters_are_in_their_places() {
    let run = |n: usize, stage: Stage| {
        let results = Local::run(n, |rank| {
            let me = rank.rank();
            let p = Params::new(1, DType::F64);
            let init = Init::Normal { std: 0.5 };
            let a = p.param("a", &[50, 60], init)?;
            let empty = p.param("empty", &[0, 7], init)?;
            let idle = p.param("idle", &[2500], init)?;
            let frozen = p.param("frozen", &[60], init)?;
            frozen.set_trainable(false);
            let b = p.param("b", &[60, 50], init)?;
            let step = PlainStep::new(&p.all(), AdamW::default(), Schedule::constant(1e-2))?;
            let mut step = step.with_zero(Box::new(rank), stage)?;
            for t in 0..4 {
                // `a` is used twice.
                let x = Array::generate(&[1, 50], DType::F64, |i| ((i * 7 + t + 3 * me) % 11) as f64 / 11.0);
                step.run_one(|| {
                    let h = Tensor::new(x).matmul(&a.dense())?.add(&frozen.dense())?.tanh();
                    let h = h?.matmul(&b.dense())?.matmul(&a.dense())?;
                    h.square()?.sum(&[1], false)
                })?;
            }
            assert_eq!(empty.numel(), 0);
            assert!(idle.value().to_f64().iter().any(|x| *x != 0.0));
            Ok(values(&p.all()))
        });
        results.into_iter().map(|r| r.unwrap()).collect::<Vec<_>>()
    };
    for n in [2, 4] {
        let want = run(n, Stage::Replicated);
        for stage in [Stage::Optimizer, Stage::Gradients, Stage::Parameters] {
            assert_eq!(run(n, stage), want, "{n} ranks at {stage:?}");
        }
    }
}

#[test]
fn what_cannot_be_shared_is_refused() {
    // A layer whose experts lie on ranks.
    let said = Local::run(2, |rank| {
        let params = Params::new(0, DType::F32);
        let config = MoeConfig { balance: Balance::PerSample(0.0), ..MoeConfig::new(2, 1, 8) };
        let mut moe = Moe::new(&params.at("moe"), 8, &config)?;
        let ranks = prismgrad::dist::Shared::new(rank)?;
        moe.place(&ranks)?;
        let step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(0.1))?;
        let said = step.with_zero(Box::new(ranks), Stage::Optimizer).map(drop).unwrap_err().to_string();
        let _ = moe.forward(&Tensor::zeros(&[1, 8], DType::F32), &Ctx::eval());
        Ok(said)
    });
    assert!(said.into_iter().all(|s| s.unwrap().contains("belongs to one rank")));
    let said = Local::run(1, |rank| {
        let w = Param::new("w", Array::zeros(&[3], DType::F32));
        let other = Local::group(1, std::time::Duration::from_secs(1)).remove(0);
        let step = PlainStep::new(&[w], AdamW::default(), Schedule::constant(0.1))?;
        step.with_zero(Box::new(rank), Stage::Optimizer)?.with_zero(Box::new(other), Stage::Gradients).map(drop)
    });
    assert!(said.into_iter().all(|s| s.unwrap_err().to_string().contains("once")));
}

/// Four ranks at stage 3 save one checkpoint, which three at stage 1 go on from as if they had never stopped.
#[test]
fn ranks_save_one_checkpoint_together() {
    let path = std::env::temp_dir().join(format!("prismgrad-zero-{}", std::process::id()));
    let folder = || CheckpointFolder::open(&path);
    let whole = train(4, Stage::Parameters, &None, DType::F64, 6).remove(0).0;
    for r in Local::run(4, |rank| {
        let (m, me) = (model(DType::F64), rank.rank());
        let step = PlainStep::new(&m.params().all(), AdamW::default(), Schedule::constant(1e-2))?;
        let mut step = Step::Plain(step.with_zero(Box::new(rank), Stage::Parameters)?);
        for t in 0..4 {
            step.take(&m, t, (me, 4))?;
        }
        let Step::Plain(step) = step else { unreachable!() };
        state::save(&folder()?, 4, None, m.params(), &step, &())
    }) {
        r.unwrap();
    }
    for r in Local::run(3, |rank| {
        let (m, me) = (model(DType::F64), rank.rank());
        let step = PlainStep::new(&m.params().all(), AdamW::default(), Schedule::constant(1e-2))?;
        let mut step = step.with_zero(Box::new(rank), Stage::Optimizer)?;
        state::load::<()>(&folder()?.latest()?.checkpoint.unwrap(), m.params(), &mut step)?;
        let mut step = Step::Plain(step);
        for t in 4..6 {
            step.take(&m, t, (me, 3))?;
        }
        Ok(values(&m.params().all()))
    }) {
        assert!(distance(&r.unwrap(), &whole) < 1e-10);
    }
    std::fs::remove_dir_all(&path).unwrap();
}

/// What is read of the parameters at once is a module and the next one, not the model; the plan says how much.
#[test]
fn parameters_are_gathered_module_by_module() {
    let results = Local::run(2, |rank| {
        let p = Params::new(0, DType::F32);
        let all: Result<Vec<Param>> = (0..8).map(|i| p.param(&format!("h.{i}.w"), &[64, 64], Init::Ones)).collect();
        let (all, me) = (all?, rank.rank());
        let step = PlainStep::new(&p.all(), Sgd::default(), Schedule::constant(1e-3))?;
        let mut step = step.with_zero(Box::new(rank), Stage::Parameters)?;
        assert_eq!(step.plan().gathered_bytes(), 2 * 4 * 64 * 64);
        let held = || all.iter().filter(|p| p.is_here()).count();
        let mut most = 0;
        for _ in 0..2 {
            step.run_one(|| {
                let mut x = Tensor::new(Array::full(&[2, 64], 1.0 + me as f64, DType::F32));
                for w in &all {
                    x = linear(&x, w, Layout::OutIn, None, Activation::Tanh, None)?;
                    most = most.max(held());
                }
                x.sum(&[1], false)
            })?;
            assert_eq!(held(), 0, "nothing is left after the step");
        }
        // Evaluation by one rank alone, after all have gathered.
        step.gather_parameters()?;
        assert_eq!(held(), 8);
        if me == 0 {
            values(&all);
        }
        Ok(most)
    });
    for r in results {
        let most = r.unwrap();
        assert!((1..=2).contains(&most), "{most} of 8 modules at once");
    }
}

/// The plan that is made of names and shapes has the bytes of the steps that are taken, at every stage and number of ranks.
#[test]
fn a_plan_has_the_bytes_of_the_step() {
    let machine = |ranks| Machine { ranks, flops: 1e9, bandwidth: 1e9, latency: 1e-6 };
    for config in [
        GptConfig::small(17, 6, 1, 32, 2),
        GptConfig::small(100, 16, 3, 48, 4),
        GptConfig::small(300, 8, 2, 64, 2),
        GptConfig::small(50, 8, 5, 24, 2),
    ] {
        let described = Gpt::described(config.clone()).unwrap();
        assert!(described.params().all().iter().all(|p| !p.is_here()));
        for n in 1..4 {
            for stage in STAGES {
                let load = Load { microbatches: 1, forward_flops: 1e6, working_bytes: 0, gradients_overlap: true };
                let plan = zero_plan(&described.params().all(), 2, stage, &machine(n), &load).unwrap();
                let results = Local::run(n, |rank| {
                    let (m, first) = (Gpt::new(config.clone(), 0)?, rank.rank() == 0);
                    let step = PlainStep::new(&m.params().all(), AdamW::default(), Schedule::constant(1e-2))?;
                    let mut step = step.with_zero(Box::new(rank), stage)?;
                    let before = step.ranks().unwrap().traffic().bytes;
                    let ids = |k| Array::generate(&[2, 6], DType::U32, |i| ((i + k) % 17) as f64);
                    step.run_one(|| m.losses(ids(0), ids(1), &Ctx::eval()))?;
                    let sent = step.ranks().unwrap().traffic().bytes - before;
                    Ok((first, *step.plan().bytes(), step.plan().gathered_bytes(), sent as f64))
                });
                let all: Vec<_> = results.into_iter().map(|r| r.unwrap()).collect();
                assert_eq!((plan.kept, plan.gathered), (all[0].1, all[0].2), "{n} ranks at {stage:?}");
                // On average over the ranks, but for counts and for modules that are read once.
                let sent = all.iter().map(|a| a.3).sum::<f64>() / n as f64;
                let planned = plan.sent.iter().sum::<f64>();
                // Stretches are of whole chunks of 2,048 elements, and are sent in equal pieces.
                let filled = 4.0 * 2048.0 * (n as f64 - 1.0);
                assert!(sent <= planned * 1.1 + filled + 2000.0, "{n} ranks at {stage:?}: {sent}, planned {planned}");
                assert!(sent >= planned * 0.7, "{n} ranks at {stage:?}: {sent}, planned {planned}");
            }
        }
    }
    let all = Gpt::described(GptConfig::small(17, 6, 1, 32, 2)).unwrap().params().all();
    let load = Load { microbatches: 1, forward_flops: 1e6, working_bytes: 0, gradients_overlap: true };
    let said = zero_plan(&all, 2, Stage::Optimizer, &machine(0), &load).unwrap_err().to_string();
    assert!(said.contains("at least one rank"), "{said}");
    let said = PlainStep::new(&all, AdamW::default(), Schedule::constant(1e-2)).map(drop).unwrap_err().to_string();
    assert!(said.contains("described"), "{said}");
}

/// Values that are set between steps, as by a checkpoint, are those of the next step at every stage.
#[test]
fn values_set_from_outside_are_taken_over() {
    let run = |stage: Stage| {
        let results = Local::run(2, |rank| {
            let (m, me) = (model(DType::F64), rank.rank());
            let p = m.params().all();
            let step = PlainStep::new(&p, Sgd::default(), Schedule::constant(1e-2))?;
            let mut step = step.with_zero(Box::new(rank), stage)?;
            for t in 0..3 {
                if t == 1 {
                    p.iter().try_for_each(|p| p.set(Array::full(p.shape(), 0.02, DType::F64)))?;
                }
                step.run_one(|| losses(&m, &[3 * t + me, 40 + me]))?;
            }
            Ok(values(&p))
        });
        results.into_iter().map(|r| r.unwrap()).collect::<Vec<_>>()
    };
    let want = run(Stage::Replicated);
    for stage in [Stage::Optimizer, Stage::Gradients, Stage::Parameters] {
        assert_eq!(run(stage), want, "{stage:?}");
    }
}
