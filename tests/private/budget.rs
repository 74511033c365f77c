//! What private steps spend: counts, the log of releases, the budget, and what reports say of it.

use crate::common::records::losses;
use crate::common::scratch::Scratch;
use prismgrad::optim::{AdamW, Optimizer, Schedule, Sgd};
use prismgrad::privacy::{Accountant, Public, Weight};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::{Array, DType, Device, Error, Param, Result};

fn config(records: usize) -> PrivacyConfig {
    PrivacyConfig::target(1e3, 1e-4).records(records).expected_batch(4.0).steps(100).noise_multiplier(1.0)
}

fn key() -> NoiseKey {
    NoiseKey::from_seed_for_tests(9)
}

fn private(params: &[Param], config: PrivacyConfig, optimizer: impl Optimizer + 'static) -> PrivateStep {
    PrivateStep::new(params, Privacy::new(config, key()).unwrap(), optimizer, Schedule::constant(0.1)).unwrap()
}

/// A step on three numbers whose loss is the sum of their squares for every record.
fn go(step: &mut PrivateStep, w: &Param) -> Result<f64> {
    step.run(40, |ids| w.per_sample(ids.len())?.square()?.sum(&[1], false)).map(|r| r.epsilon)
}

fn numbers(from: f64) -> Param {
    Param::new("w", Array::full(&[3], from, DType::F64))
}

/// AdamW, too, takes coupled steps; public-only steps spend nothing and private ones what they cost, across a resume.
#[test]
fn only_private_steps_are_counted() {
    let model = crate::common::gpt::gpt(3, true, DType::F64, &Device::Cpu);
    let params = model.params().all();
    let make = || private(&params, config(40), AdamW::default());
    let mut step = make();
    let go = |step: &mut PrivateStep, alpha: f64| {
        let weight = Weight::private(alpha).unwrap();
        step.run_coupled(8, Public(vec![5, 6]), weight, |p, q| losses(&model, &[p, q].concat())).unwrap()
    };
    let spent: Vec<f64> = [0.0, 0.0, 0.5, 0.0, 1.0].iter().map(|&a| go(&mut step, a).epsilon).collect();
    assert!(spent[1] == 0.0 && spent[2] > 0.0 && spent[3] == spent[2] && spent[4] >= spent[2], "{spent:?}");
    assert_eq!((step.steps(), step.privacy().steps()), (5, 2));
    let state: Vec<(String, Array)> = step.state().into_iter().map(|(n, a)| (n.to_string(), a)).collect();
    let mut resumed = make();
    resumed.restore(5, &state).unwrap();
    assert_eq!(resumed.privacy().steps(), 2);
}

/// Every private step is on disk before it is taken: ε after a kill is never below the truth, a repeated step counts once, another
/// sum of the same batch or a step under another key is another release, another rate or a damaged log is refused.
#[test]
fn the_log_of_steps_outlives_a_kill() {
    let folder = Scratch::new("log");
    let path = folder.join("log.jsonl");
    let start = |from: &[f64]| Param::new("w", Array::from_slice(from, &[3]).unwrap());
    let make_from = |w: &Param, seed: u64, sigma: f64| -> Result<PrivateStep> {
        let c = config(40).noise_multiplier(sigma);
        let p = Privacy::new(c, NoiseKey::from_seed_for_tests(seed))?.log_to(&path)?;
        PrivateStep::new(std::slice::from_ref(w), p, Sgd::default(), Schedule::constant(0.1))
    };
    let make = |seed: u64, sigma: f64| make_from(&start(&[0.0; 3]), seed, sigma);
    let try_go = |step: &mut PrivateStep, w: &Param| {
        step.run(40, |ids| w.per_sample(ids.len())?.square()?.sum(&[1], false)).map(|r| r.epsilon)
    };
    let go = |step: &mut PrivateStep, w: &Param| try_go(step, w).unwrap();
    let w = start(&[0.0; 3]);
    let mut first = make_from(&w, 1, 1.0).unwrap();
    let (mut spent, mut saved) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        saved.push(w.value().to_f64());
        spent.push(go(&mut first, &w));
    }
    drop(first);
    // A new process from a checkpoint after two steps: five are spent all the same, and stay spent as they are repeated.
    let w = start(&[9.0; 3]);
    let mut again = make_from(&w, 1, 1.0).unwrap();
    // As loading a checkpoint does: after the step was made.
    w.set(Array::from_slice(&saved[2], &[3]).unwrap()).unwrap();
    again.restore(2, &[]).unwrap();
    let p = again.privacy();
    assert_eq!((again.steps(), p.steps(), p.spent().unwrap()), (2, 5, spent[4]));
    for _ in 0..3 {
        assert_eq!(go(&mut again, &w), spent[4], "the same steps again");
    }
    assert!(go(&mut again, &w) >= spent[4] && again.privacy().steps() == 6);
    // A second run on the same log while this one is open would hide steps.
    let e = make(1, 1.0).err().unwrap().to_string();
    assert!(e.contains("in use by another run"), "{e}");
    drop(again);
    // Under the same key, neither another noise multiplier, nor another threshold, nor other parameters are a repetition: each
    // is a further sum of the batch of step 2, which then tells as much as one with less noise.
    let accounted = |steps: u64, releases: &[f64]| {
        let mut truth = Accountant::new();
        truth.record(1.0, 0.1, steps - 1).unwrap();
        truth.record(releases.iter().map(|s| s.powi(-2)).sum::<f64>().powf(-0.5), 0.1, 1).unwrap();
        truth.epsilon(1e-4).unwrap()
    };
    let mut releases = vec![1.0];
    for (sigma, norm, from) in [(3.0, 1.0, &saved[2]), (1.0, 0.25, &saved[2]), (1.0, 1.0, &vec![7.0; 3])] {
        let w = start(from);
        let c = config(40).noise_multiplier(sigma).max_grad_norm(norm);
        let p = Privacy::new(c, NoiseKey::from_seed_for_tests(1)).unwrap().log_to(&path).unwrap();
        let mut other = PrivateStep::new(std::slice::from_ref(&w), p, Sgd::default(), Schedule::constant(0.1)).unwrap();
        other.restore(2, &[]).unwrap();
        releases.push(sigma);
        let (epsilon, want) = (go(&mut other, &w), accounted(6, &releases));
        assert!((epsilon - want).abs() < 1e-9 && other.privacy().steps() == 6, "σ {sigma}, R {norm}: {epsilon} {want}");
    }
    // Two batches drawn by one key at other rates are not independent.
    let c = config(40).noise_multiplier(1.0).expected_batch(5.0);
    let p = Privacy::new(c, NoiseKey::from_seed_for_tests(1)).unwrap().log_to(&path).unwrap();
    let w = start(&saved[2]);
    let mut other = PrivateStep::new(std::slice::from_ref(&w), p, Sgd::default(), Schedule::constant(0.1)).unwrap();
    other.restore(2, &[]).unwrap();
    let e = try_go(&mut other, &w).err().unwrap().to_string();
    assert!(e.contains("step 2") && e.contains("sampling rate") && e.contains("fresh key"), "{e}");
    drop(other);
    // Cut off in the middle of a line: that step was never taken.
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 9);
    std::fs::write(&path, &text[..text.len() - 9]).unwrap();
    let torn = make(1, 1.0).unwrap();
    let want = accounted(6, &releases[..3]);
    assert!((torn.privacy().spent().unwrap() - want).abs() < 1e-9);
    drop(torn);
    let five: String = text.lines().take(5).map(|l| format!("{l}\n")).collect();
    std::fs::write(&path, five).unwrap();
    let fresh = start(&[0.0; 3]);
    let mut other = make_from(&fresh, 2, 2.0).unwrap();
    let before = other.privacy().spent().unwrap();
    assert!((before - spent[4]).abs() < 1e-3 * before, "{before} {}", spent[4]);
    let after = go(&mut other, &fresh);
    let mut truth = Accountant::new();
    truth.record(1.0, 0.1, 5).unwrap();
    truth.record(2.0, 0.1, 1).unwrap();
    assert!((after - truth.epsilon(1e-4).unwrap()).abs() < 1e-9 && after > before);
    drop(other);
    std::fs::write(&path, "{\"step\": 0}\n").unwrap();
    let e = make(1, 1.0).err().unwrap().to_string();
    assert!(e.contains("line 1") && e.contains("under-report"), "{e}");
    assert!(Privacy::new(config(40), key()).unwrap().log_to("/no/such/folder/log").is_err());
}

/// Without a log as well: a step that is taken again in this process is counted once if it is the same, and otherwise as another
/// sum of the same batch; going back to a checkpoint never lowers the count.
#[test]
fn going_back_spends_nothing_less() {
    let w = Param::new("w", Array::zeros(&[3], DType::F64));
    let mut step = private(std::slice::from_ref(&w), config(40), Sgd::default());
    let go = |step: &mut PrivateStep, scale: f64| {
        step.run(40, |ids| w.per_sample(ids.len())?.mul_scalar(scale)?.sum(&[1], false)).unwrap()
    };
    let mut states = Vec::new();
    for _ in 0..5 {
        states.push(w.value());
        go(&mut step, 1.0);
    }
    let spent = step.privacy().spent().unwrap();
    step.restore(2, &[]).unwrap();
    assert_eq!((step.steps(), step.privacy().steps(), step.privacy().spent().unwrap()), (2, 5, spent));
    let report = go(&mut step, 1.0);
    assert_eq!((report.epsilon, step.privacy().steps()), (spent, 5), "the same sum, whatever the parameters");
    assert!(report.test_key && report.to_string().contains("NOT private"), "{report}");
    step.restore(2, &[]).unwrap();
    w.set(states[2].clone()).unwrap();
    let report = go(&mut step, -1.0);
    let mut truth = Accountant::new();
    truth.record(1.0, 0.1, 4).unwrap();
    truth.record(0.5f64.sqrt(), 0.1, 1).unwrap();
    assert!((report.epsilon - truth.epsilon(1e-4).unwrap()).abs() < 1e-9, "{} {spent}", report.epsilon);
    // A checkpoint that knows of more steps than this process has taken raises the count, and only once.
    (0..2).for_each(|_| step.restore(8, &[]).unwrap());
    assert_eq!(step.privacy().steps(), 8);
    step.restore(3, &[]).unwrap();
    assert_eq!(step.privacy().steps(), 8);
    // What a budget does not allow is refused before the sum has its noise, also where the step is not new.
    let tight = PrivacyConfig { epsilon: spent * 1.001, ..config(40) };
    let mut step = private(std::slice::from_ref(&w), tight, Sgd::default());
    for _ in 0..5 {
        go(&mut step, 1.0);
    }
    step.restore(2, &[]).unwrap();
    go(&mut step, 1.0);
    step.restore(2, &[]).unwrap();
    let e = step.run(40, |ids| w.per_sample(ids.len())?.mul_scalar(-1.0)?.sum(&[1], false)).err().unwrap().to_string();
    assert!(e.contains("budget"), "{e}");
    assert_eq!(step.last_gradient().to_f64(), [0.0; 3]);
}

/// A last line that was cut off by a kill is taken out of the log: what is written after it begins a line of its own.
#[test]
fn a_torn_line_does_not_spoil_the_next_one() {
    let folder = Scratch::new("torn-log");
    let path = folder.join("log.jsonl");
    let open = |w: &Param| {
        let privacy = Privacy::new(config(40), key()).unwrap().log_to(&path).unwrap();
        PrivateStep::new(std::slice::from_ref(w), privacy, Sgd::default(), Schedule::constant(0.1)).unwrap()
    };
    let w = numbers(1.0);
    let mut step = open(&w);
    for _ in 0..2 {
        go(&mut step, &w).unwrap();
    }
    drop(step);
    let text = std::fs::read_to_string(&path).unwrap();
    for cut in [1, 9, text.lines().last().unwrap().len()] {
        std::fs::write(&path, &text[..text.len() - cut]).unwrap();
        let w = numbers(2.0);
        let mut step = open(&w);
        assert_eq!(step.privacy().steps(), 1, "{cut} bytes are missing");
        step.restore(1, &[]).unwrap();
        go(&mut step, &w).unwrap();
        drop(step);
        assert_eq!(open(&numbers(3.0)).privacy().steps(), 2, "{cut} bytes are missing");
        let now = std::fs::read_to_string(&path).unwrap();
        let whole = now.lines().filter(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()).count();
        assert!(whole == 2 && now.ends_with('\n'), "{now}");
    }
}

/// The steps that the budget pays for are taken, and the next one is refused, however little is missing.
#[test]
fn the_budget_ends_where_it_says() {
    let four = Privacy::new(config(40), key()).unwrap().epsilon(4).unwrap();
    for (share, affordable) in [(1.0 + 1e-6, 4), (1.0 - 1e-6, 3)] {
        let w = numbers(1.0);
        let mut step = private(std::slice::from_ref(&w), config(40), Sgd::default());
        for _ in 0..affordable {
            go(&mut step, &w).unwrap();
        }
        let want = w.value().to_f64();
        let w = numbers(1.0);
        let tight = PrivacyConfig { epsilon: four * share, ..config(40) };
        let mut step = private(std::slice::from_ref(&w), tight, Sgd::default());
        for t in 0..affordable {
            let epsilon = go(&mut step, &w).unwrap();
            assert!(epsilon > 0.0, "step {t}");
        }
        let e = go(&mut step, &w).unwrap_err();
        assert!(matches!(e, Error::BudgetSpent { steps, .. } if steps == affordable), "{share}: {e}");
        assert_eq!((step.steps(), step.privacy().steps(), w.value().to_f64()), (affordable, affordable, want));
    }
}

/// The ε of a report, which is read off a table, is no less than what the accountant says of as many steps, and not much more.
#[test]
fn reports_say_no_less_than_was_spent() {
    let w = numbers(1.0);
    // Twenty-four entries for sixty steps.
    let mut step = private(std::slice::from_ref(&w), config(40).steps(60), Sgd::default());
    for t in 1..=12 {
        let said = go(&mut step, &w).unwrap();
        let (spent, soon) = (step.privacy().epsilon(t).unwrap(), step.privacy().epsilon(t + 3).unwrap());
        assert!(said >= spent * (1.0 - 1e-9) && said <= soon * 1.001, "step {t}: {said}, spent {spent}, soon {soon}");
        assert_eq!(step.privacy().spent().unwrap(), said);
    }
}
