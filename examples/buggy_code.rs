//! How a bug in the context affects a code model.
//!
//! ```text
//! cargo run --release --example buggy_code
//! ```
//!
//! The first part runs if Python and HumanEval are present: buggy prefixes are made from HumanEval and compared with the released ones, and
//! every reference and every flip is run in the sandbox. The second part always runs: a model of a small language is trained and completes
//! clean and buggy prefixes; control edits separate the effect of a bug from that of unusual text; three mitigations are compared; and the
//! model locates the bug. Writes `plots/arms` and `summary.json`. `--full` makes the table of `docs/results/codeeval.md`.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::data::data_file;
use prismgrad::systems::codeeval::buggy::{Generated, Parts, generate, read_problems, read_released};
use prismgrad::systems::codeeval::locate::{Doubt, Searched, choose_threshold, first_above, score};
use prismgrad::systems::codeeval::mini::{Coder, Corpus, Interpreter, Training, renamed, same_meaning};
use prismgrad::systems::codeeval::mitigate::{self, Prefix};
use prismgrad::systems::codeeval::passk::{Count, bootstrap, per_problem};
use prismgrad::systems::codeeval::{
    CodeModel, Draw, FlipMap, Judge, Limits, Mode, Problem, Program, Row, Sandbox, Verdict,
};
use prismgrad::train::plot::BarChart;
use prismgrad::train::{Progress, RunFolder};
use prismgrad::{Error, Result};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;
use study::{interval, verdict};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "models of the mini language, each with its own initial values and order; 3 with --full"),
    ("steps", "700", "60", "training steps of each model, 32 programs each; 1500 with --full"),
    ("samples", "20", "4", "completions of a prefix"),
    ("rows", "2", "1", "the most buggy prefixes of a problem, of each kind; 4 with --full"),
    (
        "python-runs",
        "120",
        "24",
        "programs of HumanEval that are run in the sandbox; all 1896 pairs, three times, with --full",
    ),
    ("full", "", "", "makes the table of docs/results/codeeval.md: three seeds, longer training, every run"),
];

const TEMPERATURE: f64 = 0.6;

/// A source text as a program with the tests of its problem.
fn program(problems: &[Problem], problem: usize, source: String) -> Program {
    let p = &problems[problem];
    Program { source, entry_point: p.entry_point.clone(), test: p.test.clone() }
}

/// HumanEval in the sandbox: the counts of the generator, the verdicts on references and flips, and runs per second.
fn tier_0(runs: Option<usize>) -> Result<Value> {
    let (problems, released) = match (data_file("HumanEval.jsonl.gz"), data_file("buggy-HumanEval.jsonl.gz")) {
        (Ok(problems), Ok(released)) => (read_problems(problems)?, read_released(released)?),
        _ => {
            let why = "HumanEval.jsonl.gz and buggy-HumanEval.jsonl.gz are not in the folder that PRISMGRAD_DATA names";
            println!(
                "HumanEval is left out: {why}; get them from the repositories openai/human-eval and \
                      amazon-science/buggy-code-completion"
            );
            return Ok(json!({"left_out": why}));
        }
    };
    let limits = Limits { cpu_seconds: 1.0, ..Limits::default() };
    let sandbox = match Sandbox::new(limits) {
        Ok(sandbox) => sandbox,
        Err(e) => {
            println!("HumanEval is left out: {e}");
            return Ok(json!({"left_out": e.to_string()}));
        }
    };
    println!("sandbox with Python {}", sandbox.python_version());
    for layer in sandbox.layers() {
        match &layer.state {
            Ok(how) => println!("  {:<13} holds ({how}), against {}", layer.name, layer.against),
            Err(why) => println!("  {:<13} is missing: {why}", layer.name),
        }
    }
    let mut out = json!({"python": sandbox.python_version(), "layers": sandbox.layers()});
    let pairs = |rows: &[&Row]| -> Vec<Program> {
        let of = |r: &&Row| [r.clean_program(), r.buggy_program()].map(|s| program(&problems, r.problem, s));
        rows.iter().flat_map(of).collect()
    };
    let rows: Vec<Row> = if let Some(few) = runs {
        // Without runs that decide which flips fail, a sample of the released rows is rebuilt.
        let whole = |p: &Problem| Parts::of(p).head + &Parts::of(p).body;
        let believe = Believe(problems.iter().map(whole).collect());
        let made = generate(&problems, &FlipMap::paper(), &believe, Mode::Corrected)?;
        let known: BTreeSet<&str> = released.iter().map(|r| r.buggy.as_str()).collect();
        let rows: Vec<Row> = made.rows.into_iter().filter(|r| known.contains(r.buggy.as_str())).collect();
        let every = (2 * rows.len() / few.max(2)).max(1);
        rows.into_iter().step_by(every).collect()
    } else {
        let start = Instant::now();
        let made = generate(&problems, &FlipMap::paper(), &sandbox, Mode::Corrected)?;
        let counts = counts(&made);
        println!("generator: {counts} in {:.0} s", start.elapsed().as_secs_f64());
        let ours: BTreeSet<&str> = made.rows.iter().map(|r| r.buggy.as_str()).collect();
        let theirs: BTreeSet<&str> = released.iter().map(|r| r.buggy.as_str()).collect();
        out["generator"] = counts;
        out["released_rows_unexplained"] = json!(theirs.difference(&ours).count());
        out["released_rows_matched"] = json!(theirs.intersection(&ours).count());
        println!(
            "released rows matched {}, not explained {}",
            out["released_rows_matched"], out["released_rows_unexplained"]
        );
        made.rows
    };
    let programs = pairs(&rows.iter().collect::<Vec<_>>());
    let mut first: Option<Vec<Verdict>> = None;
    let mut differing = 0;
    let mut rates = Vec::new();
    for round in 0..if runs.is_none() { 3 } else { 1 } {
        let start = Instant::now();
        let reports = sandbox.run_all(&programs);
        rates.push(reports.len() as f64 / start.elapsed().as_secs_f64());
        let verdicts: Vec<Verdict> = reports.into_iter().map(|r| r.verdict).collect();
        let passed = |odd: usize| verdicts.iter().skip(odd).step_by(2).filter(|v| **v == Verdict::Passed).count();
        println!(
            "round {}: {} of {} references pass, {} flips pass, {:.0} runs a second",
            round + 1,
            passed(0),
            rows.len(),
            passed(1),
            rates[round]
        );
        match &first {
            None => {
                out["references_passed"] = json!([passed(0), rows.len()]);
                out["flips_passed"] = json!(passed(1));
                let mut classes: BTreeMap<String, usize> = BTreeMap::new();
                for v in verdicts.iter().skip(1).step_by(2) {
                    *classes.entry(v.to_string()).or_default() += 1;
                }
                out["flips"] = json!(classes);
                first = Some(verdicts);
            }
            Some(first) => differing += first.iter().zip(&verdicts).filter(|(a, b)| a != b).count(),
        }
    }
    // Programs that reach no limit show the cost of a run.
    let light: Vec<Program> = programs.iter().step_by(2).take(if runs.is_some() { 60 } else { 300 }).cloned().collect();
    let start = Instant::now();
    sandbox.run_all(&light);
    let rate = light.len() as f64 / start.elapsed().as_secs_f64();
    println!("references alone: {rate:.0} runs a second");
    out["rounds"] = json!(rates.len());
    out["differing_verdicts"] = json!(differing);
    out["runs_a_second"] = json!({"with_flips": rates, "references": rate});
    Ok(out)
}

/// A judge that runs nothing. These references pass and every flip fails, so that rows are rebuilt that were judged before.
struct Believe(BTreeSet<String>);

impl Judge for Believe {
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
        let of = |p: &Program| if self.0.contains(&p.source) { Verdict::Passed } else { Verdict::Failed };
        Ok(programs.iter().map(of).collect())
    }
}

fn counts(made: &Generated) -> Value {
    json!({
        "candidates": made.sites.len(), "failing": made.failing(), "surviving": made.surviving(),
        "rows": made.rows.len(), "sites": made.used_sites(), "problems": made.used_problems(),
    })
}

/// At most `each` rows of every problem, spread over its rows.
fn few(rows: &[Row], each: usize) -> Vec<Row> {
    let mut of: BTreeMap<usize, Vec<&Row>> = BTreeMap::new();
    rows.iter().for_each(|r| of.entry(r.problem).or_default().push(r));
    let pick = |all: Vec<&Row>| {
        let n = all.len().min(each);
        (0..n).map(|i| all[(2 * i + 1) * all.len() / (2 * n)].clone()).collect::<Vec<_>>()
    };
    of.into_values().flat_map(pick).collect()
}

/// Rows of the flips that fail no test, which the generator drops.
fn surviving(made: &Generated, problems: &[Problem]) -> Result<Vec<Row>> {
    struct Turned<'a>(&'a Generated);
    impl Judge for Turned<'_> {
        fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
            let of = |fails: &bool| if *fails { Verdict::Passed } else { Verdict::Failed };
            Ok(match programs.len() == self.0.fails.len() {
                true => self.0.fails.iter().map(of).collect(),
                false => vec![Verdict::Passed; programs.len()],
            })
        }
    }
    Ok(generate(problems, &FlipMap::paper(), &Turned(made), Mode::Corrected)?.rows)
}

/// The results of one model for one list of prefixes, with the pass rate of each.
struct Arm {
    counts: Vec<Count>,
}

impl Arm {
    fn pass_1(&self) -> Result<f64> {
        let each = per_problem(&self.counts, 1)?;
        Ok(each.iter().map(|p| p.1).sum::<f64>() / each.len() as f64)
    }
}

/// One model and its prefixes.
struct Study<'a> {
    coder: &'a Coder,
    problems: &'a [Problem],
    samples: usize,
    seed: u64,
}

impl Study<'_> {
    /// The draws for the completions of an arm, each of which has random numbers of its own.
    fn draw(&self, stream: u64) -> Draw {
        Draw { samples: self.samples, temperature: TEMPERATURE, seed: self.seed * 64 + stream }
    }
    /// Completes prefixes and judges the programs.
    fn complete(&self, prefixes: &[(usize, String)], stream: u64) -> Result<Arm> {
        let texts: Vec<String> = prefixes.iter().map(|p| p.1.clone()).collect();
        let numbers: Vec<usize> = prefixes.iter().map(|p| p.0).collect();
        self.judged(&numbers, self.coder.complete(&texts, &self.draw(stream))?)
    }
    /// Judges the programs of each prefix; `numbers` are the numbers of the prefixes' problems.
    fn judged(&self, numbers: &[usize], done: Vec<Vec<String>>) -> Result<Arm> {
        let judge = Interpreter::default();
        let count = |(problem, programs): (&usize, Vec<String>)| {
            let n = programs.len();
            let programs: Vec<Program> = programs.into_iter().map(|s| program(self.problems, *problem, s)).collect();
            let c = judge.judge(&programs)?.iter().filter(|v| **v == Verdict::Passed).count();
            Ok(Count { problem: self.problems[*problem].task_id.clone(), n, c })
        };
        Ok(Arm { counts: numbers.iter().zip(done).map(count).collect::<Result<_>>()? })
    }
}

/// Names of the arms, in the order of their draws.
const ARMS: [&str; 12] = [
    "clean",
    "clean again",
    "buggy",
    "no prefix",
    "complete, rewrite",
    "rewrite, complete",
    "oracle location",
    "clean: complete, rewrite",
    "clean: rewrite, complete",
    "same meaning",
    "renamed",
    "flip unnoticed",
];

/// The results of one model: pass@1 of every arm, paired drops of the controls, and location.
fn tier_1_seed(corpus: &Corpus, made: &Generated, opts: (u64, usize, usize), seed: u64) -> Result<Value> {
    let (steps, samples, each) = opts;
    let training = Training { steps, seed, ..Training::default() };
    let start = Instant::now();
    let mut progress = Progress::new(format!("seed {seed}: training"), Some(steps), 0);
    let mut tokens = 0;
    let mut last = 0.0;
    let coder = Coder::train(&corpus.train, &training, |t, n, loss| {
        (tokens, last) = (n, loss);
        progress.set(t, &[("loss", loss)]);
    })?;
    progress.finish();
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "seed {seed}: {} parameters, {tokens} tokens in {seconds:.0} s ({:.0} a second), last loss {last:.3}",
        coder.model.params().count(),
        tokens as f64 / seconds
    );
    // The threshold is chosen on validation problems.
    let validation = generate(&corpus.validation, &FlipMap::paper(), &Interpreter::default(), Mode::Corrected)?;
    let rows = few(&validation.rows, each);
    let of = |text: fn(&Row) -> &String| coder.doubts(&rows.iter().map(|r| text(r).clone()).collect::<Vec<_>>());
    let buggy: Vec<(Vec<Doubt>, usize)> = of(|r| &r.buggy)?.into_iter().zip(rows.iter().map(|r| r.bug_line)).collect();
    let threshold = choose_threshold(&buggy, &of(|r| &r.clean)?, &[0.3, 0.5, 0.7, 0.8, 0.9, 0.95]);
    let study = Study { coder: &coder, problems: &corpus.test, samples, seed };
    let rows = few(&made.rows, each);
    let clean: Vec<(usize, String)> = rows.iter().map(|r| (r.problem, r.clean.clone())).collect();
    let buggy: Vec<(usize, String)> = rows.iter().map(|r| (r.problem, r.buggy.clone())).collect();
    let numbers: Vec<usize> = rows.iter().map(|r| r.problem).collect();
    let [clean_prefixes, buggy_prefixes] =
        [Prefix::clean, Prefix::buggy].map(|of| rows.iter().map(of).collect::<Vec<Prefix>>());
    // The oracle replaces the operator at the true place by the most likely one.
    let doubts = coder.doubts(&buggy.iter().map(|b| b.1.clone()).collect::<Vec<_>>())?;
    let clean_doubts = coder.doubts(&clean.iter().map(|b| b.1.clone()).collect::<Vec<_>>())?;
    let mut oracle = Vec::new();
    for ((row, all), clean) in rows.iter().zip(&doubts).zip(&clean_doubts) {
        // The flip is where the two texts differ; both have the same operators in the same order otherwise.
        let place =
            all.iter().zip(clean).find(|(a, b)| a.line == row.bug_line && (a.observed - b.observed).abs() > 1e-6);
        let text = match place {
            Some((d, _)) => coder.replaced(&row.buggy, d)?,
            None => row.buggy.clone(),
        };
        oracle.push((row.problem, text));
    }
    let paired = |edits: Vec<(usize, Option<String>)>| -> (Vec<usize>, Vec<(usize, String)>) {
        let kept = edits.into_iter().enumerate().filter_map(|(i, (p, e))| Some((i, (p, e?))));
        kept.unzip()
    };
    let turned = |r: &Row| {
        let start = made.sites[r.site].start;
        (r.problem, same_meaning(r, &Parts::of(&corpus.test[r.problem]), start))
    };
    let (of_turned, turned) = paired(rows.iter().map(turned).collect());
    let (of_renamed, renamed) = paired(rows.iter().map(|r| (r.problem, renamed(r))).collect());
    let unnoticed = few(&surviving(made, &corpus.test)?, each);
    let unnoticed_clean: Vec<(usize, String)> = unnoticed.iter().map(|r| (r.problem, r.clean.clone())).collect();
    let unnoticed: Vec<(usize, String)> = unnoticed.iter().map(|r| (r.problem, r.buggy.clone())).collect();

    let clean_arm = study.complete(&clean, 0)?;
    let arms = [
        study.complete(&clean, 1)?,
        study.complete(&buggy, 2)?,
        study.judged(&numbers, mitigate::remove(&coder, &buggy_prefixes, &study.draw(3))?)?,
        // The completions of the arm "buggy" are used, so that only the rewriting differs; likewise those of the arm "clean".
        study.judged(&numbers, mitigate::complete_then_rewrite(&coder, &buggy_prefixes, threshold, &study.draw(2))?)?,
        study.judged(&numbers, mitigate::rewrite_then_complete(&coder, &buggy_prefixes, threshold, &study.draw(4))?)?,
        study.complete(&oracle, 5)?,
        study.judged(&numbers, mitigate::complete_then_rewrite(&coder, &clean_prefixes, threshold, &study.draw(0))?)?,
        study.judged(&numbers, mitigate::rewrite_then_complete(&coder, &clean_prefixes, threshold, &study.draw(6))?)?,
        study.complete(&turned, 7)?,
        study.complete(&renamed, 8)?,
        study.complete(&unnoticed, 9)?,
    ];
    let subset = |which: &[usize]| Arm { counts: which.iter().map(|&i| clean_arm.counts[i].clone()).collect() };
    let mut pass = vec![clean_arm.pass_1()?];
    for arm in &arms {
        pass.push(arm.pass_1()?);
    }
    let drops = json!({
        "buggy": pass[0] - pass[2],
        "same meaning": subset(&of_turned).pass_1()? - pass[9],
        "renamed": subset(&of_renamed).pass_1()? - pass[10],
        "flip unnoticed": study.complete(&unnoticed_clean, 10)?.pass_1()? - pass[11],
    });
    for (name, p) in ARMS.iter().zip(&pass) {
        println!("  {name:<24} pass@1 {:.3}", p);
    }
    println!("  drops {drops}");
    // Location by the largest gap, and at random among the operators of the prefix.
    let searched: Vec<Searched> = (rows.iter().zip(doubts).zip(clean_doubts))
        .map(|((r, buggy), clean)| Searched { problem: r.problem, line: r.bug_line, buggy, clean })
        .collect();
    let location = score(&searched, &[0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99])?;
    let alarms = searched.iter().filter(|s| first_above(&s.clean, threshold).is_some()).count() as f64;
    let alarms = alarms / searched.len() as f64;
    println!(
        "  location: {:.3} of rows ({:.3} by problem), at random {:.3} ({:.3}); threshold {threshold}, false alarms on clean \
         prefixes {alarms:.3}",
        location.found, location.by_problem, location.random, location.random_by_problem
    );
    Ok(json!({
        "seed": seed, "training": training, "parameters": coder.model.params().count(), "tokens": tokens, "seconds": seconds,
        "loss": last, "threshold": threshold, "rows": rows.len(),
        "pass_1": ARMS.iter().zip(&pass).map(|(n, p)| (n.to_string(), json!(p))).collect::<serde_json::Map<_, _>>(),
        "rows_of_controls": {"same meaning": turned.len(), "renamed": renamed.len(), "flip unnoticed": unnoticed.len()},
        "drops": drops,
        "location": location, "false_alarms": alarms,
    }))
}

fn tier_1(folder: &mut RunFolder, seeds: u64, opts: (u64, usize, usize), full: bool) -> Result<Value> {
    let start = Instant::now();
    let corpus = Corpus::new(60_000, if full { 2 } else { 1 }, 1)?;
    let judge = Interpreter::default();
    let made = generate(&corpus.test, &FlipMap::paper(), &judge, Mode::Corrected)?;
    let counts = counts(&made);
    println!(
        "mini language: {} training programs, {} test problems, {counts} ({:.1} s)",
        corpus.train.len(),
        corpus.test.len(),
        start.elapsed().as_secs_f64()
    );
    // Checked in every run, since it must hold for any rows: references pass and flips fail.
    for row in &made.rows {
        let both =
            [row.clean_program(), row.buggy_program()].map(|s| judge.run(&program(&corpus.test, row.problem, s)));
        if both[0] != Verdict::Passed || both[1] == Verdict::Passed {
            let message = format!("a reference {} or its flip {}:\n{}", both[0], both[1], row.buggy_program());
            return Err(Error::Invalid { op: "buggy_code", message });
        }
    }
    let mut runs = Vec::new();
    for seed in 0..seeds {
        let run = tier_1_seed(&corpus, &made, opts, seed)?;
        folder.log(seed, &run)?;
        runs.push(run);
    }
    let pass = |arm: &str| -> Vec<f64> { runs.iter().filter_map(|r| r["pass_1"][arm].as_f64()).collect() };
    let drop = |arm: &str| -> Vec<f64> { runs.iter().filter_map(|r| r["drops"][arm].as_f64()).collect() };
    let minus = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
    let controls: Vec<f64> =
        drop("same meaning").iter().zip(drop("renamed")).map(|(a, b)| 2.0 * a.max(b).max(0.0)).collect();
    let verdicts = vec![
        verdict("a buggy prefix is below a clean one", &minus(&pass("clean"), &pass("buggy"))),
        verdict("its drop is at least twice that of both control edits", &minus(&drop("buggy"), &controls)),
        verdict("a buggy prefix is below no prefix", &minus(&pass("no prefix"), &pass("buggy"))),
        verdict("complete, then rewrite, is above buggy", &minus(&pass("complete, rewrite"), &pass("buggy"))),
        verdict("rewrite, then complete, is above buggy", &minus(&pass("rewrite, complete"), &pass("buggy"))),
        verdict(
            "a gap to clean is left after rewriting, then completing",
            &minus(&pass("clean"), &pass("rewrite, complete")),
        ),
        verdict("removing harms clean prefixes", &minus(&pass("clean"), &pass("no prefix"))),
        verdict(
            "completing, then rewriting, harms clean prefixes",
            &minus(&pass("clean"), &pass("clean: complete, rewrite")),
        ),
        verdict(
            "rewriting, then completing, harms clean prefixes",
            &minus(&pass("clean"), &pass("clean: rewrite, complete")),
        ),
    ];
    let again = bootstrap(&minus(&pass("clean"), &pass("clean again")), 200, 0)?;
    println!("null control, the clean prefixes once more: pass@1 differs by {:+.3}", again.mean);
    let mut chart =
        BarChart::new("Completion of clean and buggy prefixes, mini language").label("pass@1, mean over problems");
    for arm in ARMS {
        let (mean, half) = interval(&pass(arm));
        chart = match half.is_finite() {
            true => chart.bar_with_interval(arm, mean, (mean - half).max(0.0), (mean + half).min(1.0)),
            false => chart.bar(arm, mean),
        };
    }
    chart.save(folder.plot("arms"))?;
    Ok(json!({"generator": counts, "runs": runs, "null_control": again.mean, "verdicts": verdicts}))
}

fn run() -> Result<()> {
    let args = args::Args::parse("buggy_code", "How a bug in the context affects a code model.", OPTIONS);
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: u64, range: std::ops::RangeInclusive<u64>| {
        let accepted = format!("a whole number from {} to {}", range.start(), range.end());
        if full && !args.has(name) { full_value } else { args.get(name, &accepted, |n: &u64| range.contains(n)) }
    };
    let seeds = of("seeds", 3, 1..=20);
    let steps = of("steps", 1500, 1..=100_000);
    let samples = of("samples", 20, 1..=1000) as usize;
    let each = of("rows", 4, 1..=1000) as usize;
    let runs = of("python-runs", 0, 0..=100_000) as usize;
    let config = json!({"seeds": seeds, "steps": steps, "samples": samples, "rows": each, "full": full});
    let mut folder = args.folder(&config)?;
    println!(
        "about {} on two free cores",
        match (full, quick) {
            (true, _) => "35 minutes",
            (_, true) => "a minute",
            _ => "4 minutes",
        }
    );
    let start = Instant::now();
    let zero = tier_0((!full || args.has("python-runs")).then_some(runs))?;
    let one = tier_1(&mut folder, seeds, (steps, samples, each), full)?;
    let seconds = start.elapsed().as_secs_f64();
    folder.finish(&json!({"humaneval": zero, "mini": one, "verdicts": one["verdicts"], "seconds": seconds}))?;
    println!("plot and summary in {} after {seconds:.0} s", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
