//! Completion of buggy code: the generator against the released file, the sandbox against hostile programs.

use crate::common::skip::skip;
use prismgrad::systems::codeeval::buggy::{Generated, Parts, Released, generate, read_problems, read_released};
use prismgrad::systems::codeeval::locate::{Doubt, most_suspicious};
use prismgrad::systems::codeeval::mini::{Coder, Corpus, Interpreter, Training, Vocabulary, renamed, same_meaning};
use prismgrad::systems::codeeval::ngram::OperatorNgrams;
use prismgrad::systems::codeeval::python::{cut_completion, operators, tokens};
use prismgrad::systems::codeeval::{
    CodeModel, Draw, FlipMap, Judge, Limits, Mode, Problem, Program, Row, Sandbox, Verdict,
};
use prismgrad::{Result, data};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

/// The sandbox, or nothing where it cannot be: then its refusal is a sentence that names what is missing.
fn sandbox(limits: Limits) -> Option<Sandbox> {
    match Sandbox::new(limits) {
        Ok(sandbox) => Some(sandbox),
        Err(e) => {
            let text = e.to_string();
            let known = ["no Landlock", "no seccomp", "no Python", "feature `sandbox`"];
            assert!(known.iter().any(|k| text.contains(k)), "refused without a reason that is known: {text}");
            // A machine of the check may lack Landlock, and nothing hostile is run without it.
            eprintln!("not tested: {text}");
            None
        }
    }
}

fn quick() -> Limits {
    Limits { cpu_seconds: 0.5, wall_seconds: 12.0, memory: 128 << 20 }
}

/// A program with an entry point `f` whose test wants `f(2) == 4`.
fn program(source: &str) -> Program {
    Program {
        source: source.to_string(),
        entry_point: "f".into(),
        test: "def check(f):\n    assert f(2) == 4, 'two'\n".into(),
    }
}

fn humaneval() -> Option<&'static (Vec<Problem>, Vec<Released>)> {
    static READ: OnceLock<Option<(Vec<Problem>, Vec<Released>)>> = OnceLock::new();
    let read = || {
        let files = ["HumanEval.jsonl.gz", "buggy-HumanEval.jsonl.gz"].map(data::data_file);
        let [Ok(problems), Ok(rows)] = files else {
            skip("HumanEval.jsonl.gz and buggy-HumanEval.jsonl.gz are not in the folder of PRISMGRAD_DATA");
            return None;
        };
        Some((read_problems(problems).unwrap(), read_released(rows).unwrap()))
    };
    READ.get_or_init(read).as_ref()
}

#[test]
fn verdicts() {
    let Some(sandbox) = sandbox(quick()) else { return };
    for layer in sandbox.layers() {
        eprintln!("{}: {:?}", layer.name, layer.state);
        assert!(layer.state.is_ok() || !layer.necessary);
    }
    let of = |source: &str| sandbox.run(&program(source)).verdict;
    assert_eq!(of("def f(x):\n    return x * x\n"), Verdict::Passed);
    assert_eq!(of("def f(x):\n    return x + 1\n"), Verdict::Failed);
    assert_eq!(of("def f(x):\n    return x / 0\n"), Verdict::Error);
    assert_eq!(of("def f(x)\n"), Verdict::Error);
    assert_eq!(of("def g(x):\n    return 4\n"), Verdict::Error);
    assert_eq!(of("def f(x):\n    while True: pass\n"), Verdict::Cpu);
    assert_eq!(of("def f(x):\n    return len('a' * (1 << 30))\n"), Verdict::Memory);
}

/// Programs that try to get out, to stay, or to pass; each with the verdict it must have.
fn hostile(secret_file: &str) -> Vec<(&'static str, String, Verdict)> {
    use Verdict::{Cpu, Error, Failed, Memory, Wall};
    let inside =
        |body: &str| format!("import os, sys, time\ndef f(x):\n    {}\n    return 0\n", body.replace('\n', "\n    "));
    let case = |name, body: &str, verdict| (name, inside(body), verdict);
    // A try that must fail: 4 is returned, and so the test passes, only if it succeeds.
    let attempt = |name, body: &str| {
        let body = body.replace('\n', "\n    ");
        (name, inside(&format!("try:\n    {body}\n    return 4\nexcept BaseException:\n    pass")), Failed)
    };
    vec![
        case("fork bomb", "while True:\n    os.fork()", Error),
        attempt("fork", "if os.fork() == 0:\n    time.sleep(100)"),
        attempt("double fork", "if os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(100)"),
        attempt("thread", "import _thread\n_thread.start_new_thread(time.sleep, (100,))"),
        attempt("posix_spawn", "os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 100'], {})\ntime.sleep(1)"),
        attempt("exec of a shell", "os.execv('/bin/sh', ['sh', '-c', 'sleep 100'])"),
        case("10 GB at once", "x = bytearray(10 << 30)", Memory),
        case("10 GB in pieces", "x = []\nwhile True:\n    x.append(bytearray(16 << 20))", Memory),
        case("endless output", "while True:\n    print('x' * 1000)", Cpu),
        case("output to descriptors", "while True:\n    for d in range(3):\n        os.write(d, b'x' * 4096)", Cpu),
        case("closed descriptors", "os.closerange(0, 100)", Error),
        case(
            "garbage on every descriptor",
            "for d in range(3, 64):\n    try:\n        os.write(d, b'z' * 99)\n    except OSError:\n        \
             pass\nos._exit(0)",
            Error,
        ),
        attempt("network", "import _socket\n_socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)"),
        attempt("local socket", "import _socket\n_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)"),
        attempt("write outside", "open('/tmp/prismgrad-escape', 'w').write('x')"),
        attempt("write to shared memory", "open('/dev/shm/prismgrad-escape', 'w').write('x')"),
        attempt("a folder", "os.mkdir('/tmp/prismgrad-escape')"),
        attempt("read of a home file", &format!("open({secret_file:?}).read()")),
        attempt("read of the accounts", "open('/etc/passwd').read()"),
        attempt("read of another process", "open('/proc/%d/environ' % os.getppid(), 'rb').read()"),
        attempt("read of its own process", "os.listdir('/proc/self/fd')"),
        attempt("delete", &format!("os.unlink({secret_file:?})")),
        attempt("change of mode", &format!("os.chmod({secret_file:?}, 0o777)")),
        attempt("kill the parent", "os.kill(os.getppid(), 9)"),
        attempt("kill the group", "os.killpg(0, 9)"),
        attempt("signals by a descriptor", "import fcntl\nfcntl.fcntl(1, 8, os.getppid())"),
        attempt("ptrace", "import ctypes\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"),
        attempt(
            "memory of the parent",
            "import ctypes\nb = ctypes.create_string_buffer(64)\n\
             assert ctypes.CDLL(None).process_vm_readv(os.getppid(), b, 1, b, 1, 0) >= 0",
        ),
        attempt("a higher limit", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))"),
        attempt("root again", "os.setuid(0)\nos.chown('/tmp', 0, 0)"),
        attempt("huge file", "d = os.open('/tmp/prismgrad-huge', os.O_RDWR | os.O_CREAT)\nos.ftruncate(d, 1 << 40)"),
        attempt("anonymous file", "os.memfd_create('x')"),
        case("sleep", "time.sleep(1000)", Wall),
        case(
            "the signal of the limit is caught",
            "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: 0)\nwhile True: pass",
            Cpu,
        ),
        case("input", "input()", Error),
        case("deep recursion", "g = lambda n: g(n + 1)\ng(0)", Error),
        case("crash", "import ctypes\nctypes.string_at(0)", Error),
        // Forged passes.
        case("exit with 0", "sys.exit(0)", Error),
        case("exit at once", "os._exit(0)", Error),
        case("printed pass", "print('P passed')\nos.write(1, b'P')\nos.write(2, b'P')\nos._exit(0)", Error),
        case("equal to everything", "class A:\n    __eq__ = lambda s, o: True\nreturn A()", Failed),
        case("a number equal to everything", "class A(int):\n    __eq__ = lambda s, o: True\nreturn A(3)", Failed),
        case(
            "builtins replaced",
            "import builtins\nbuiltins.AssertionError = builtins.compile = builtins.repr = None",
            Error,
        ),
        // 4 is returned if a text of the test is found.
        case(
            "frames",
            "g = sys._getframe(1)\nwhile g:\n    for v in list(g.f_locals.values()) + list(g.f_globals.values()):\n        \
             if type(v) is str and 'assert ' + 'f(2)' in v:\n            return 4\n    g = g.f_back",
            Failed,
        ),
        case(
            "objects of the collector",
            "import gc\nfor o in gc.get_objects():\n    if type(o) is list and any(type(s) is str and 'assert ' + 'f(2)' in s \
             for s in o):\n        return 4",
            Failed,
        ),
    ]
}

#[test]
fn hostile_programs_neither_escape_nor_stay_nor_pass() {
    let limits = quick();
    let Some(sandbox) = sandbox(limits.clone()) else { return };
    let home = std::env::temp_dir().join(format!("prismgrad-codeeval-{}", std::process::id()));
    fs::write(&home, "a secret of the user").unwrap();
    let cases = hostile(home.to_str().unwrap());
    assert!(cases.len() >= 30);
    let programs: Vec<Program> = cases.iter().map(|c| program(&c.1)).collect();
    let reports = sandbox.run_all(&programs);
    let mut wrong = Vec::new();
    for ((name, _, want), report) in cases.iter().zip(&reports) {
        if *want != report.verdict {
            wrong.push(format!("{name}: {:?} ({}), not {want:?}", report.verdict, report.message));
        }
        let (cpu, wall) = (report.cpu_seconds, report.wall_seconds);
        if cpu > limits.cpu_seconds + 1.0 || wall > limits.wall_seconds + 1.0 {
            wrong.push(format!("{name}: {cpu:.2} CPU seconds, {wall:.2} on the clock"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(fs::read_to_string(&home).unwrap(), "a secret of the user");
    fs::remove_file(&home).unwrap();
    for path in ["/tmp/prismgrad-escape", "/dev/shm/prismgrad-escape", "/tmp/prismgrad-huge"] {
        assert!(!std::path::Path::new(path).exists(), "{path} was made");
    }
    assert_eq!(orphans(), Vec::<String>::new(), "processes are left");
}

/// Interpreters that run the sandbox's text and whose parent is not this process: those of other tests of this file are children
/// of this process until they end.
fn orphans() -> Vec<String> {
    let own = std::process::id().to_string();
    let mut left = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let read = |name| fs::read(entry.path().join(name)).map(|b| String::from_utf8_lossy(&b).into_owned());
        let (Ok(stat), Ok(line)) = (read("stat"), read("cmdline")) else { continue };
        let parent = stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap_or("").to_string();
        if line.contains("class _Unsupported") && parent == "1" && parent != own {
            left.push(stat);
        }
    }
    left
}

#[test]
fn a_missing_layer_is_refused_by_name() {
    #[cfg(all(target_os = "linux", feature = "sandbox"))]
    {
        for layer in ["Landlock", "seccomp"] {
            let Err(e) = Sandbox::without("python3", quick(), &[layer]) else { panic!("no refusal without {layer}") };
            let text = e.to_string();
            assert!(text.contains("no Python") || text.contains("no Landlock") || text.contains(layer), "{text}");
        }
        let refusal = |python: &str| Sandbox::with_python(python, quick()).unwrap_err().to_string();
        assert!(refusal("/no/such/python").contains("install Python 3"), "{}", refusal("/no/such/python"));
        assert!(refusal("true").contains("is no Python 3"), "{}", refusal("true"));
        if let Some(whole) = sandbox(quick()) {
            let fewer = Sandbox::without("python3", quick(), &["namespaces"]).unwrap();
            assert_eq!(fewer.run(&program("def f(x):\n    return 4\n")).verdict, Verdict::Passed);
            assert_eq!(whole.layers().len(), fewer.layers().len());
        }
    }
    assert!(Sandbox::new(Limits { cpu_seconds: 0.0, ..quick() }).is_err());
}

/// What is wrong with the problem, and not with the program, is not counted as wrong.
#[test]
fn a_test_that_cannot_run_is_no_wrong_answer() {
    let Some(sandbox) = sandbox(quick()) else { return };
    let with = |source: &str, test: &str| sandbox.run(&Program { test: test.into(), ..program(source) }).verdict;
    let four = "def f(x):\n    return 4\n";
    let infrastructure = |test: &str, why: &str| match with(four, test) {
        Verdict::Infrastructure(text) => assert!(text.contains(why), "{text}"),
        other => panic!("{other}"),
    };
    infrastructure("def check(f:\n", "does not compile");
    infrastructure("x = 1\n", "no check");
    infrastructure("def check(f):\n    f(object())\n", "not plain data");
    assert_eq!(with(four, "def check(g):\n    assert g(1) == 4 and f(1) == 4\n"), Verdict::Passed);
    let raises = "def f(x):\n    raise ValueError('no')\n";
    let expects = "def check(f):\n    try:\n        f(1)\n    except ValueError as e:\n        assert str(e) == 'no'\n        \
                   return\n    assert False\n";
    assert_eq!(with(raises, expects), Verdict::Passed);
    assert_eq!(with(four, expects), Verdict::Failed);
    let data =
        r"[1, -2.5, 'xé\n', None, True, (1,), {'a': {3}}, set(), 10**4000, float('inf'), 2j - 1, b'\x00', '\ud800']";
    let test = format!("def check(f):\n    d = {data}\n    assert f(d) == d and type(f(d)[5]) is tuple\n");
    assert_eq!(with("def f(x):\n    return x\n", &test), Verdict::Passed);
}

/// A sandbox that runs no program twice: both modes flip the same operators.
struct Once(Sandbox, Mutex<HashMap<String, Verdict>>);

impl Judge for Once {
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
        let mut known = self.1.lock().unwrap();
        let mut new: Vec<&Program> = programs.iter().filter(|p| !known.contains_key(&p.source)).collect();
        new.dedup_by_key(|p| &p.source);
        let verdicts = self.0.judge(&new.iter().map(|p| (*p).clone()).collect::<Vec<_>>())?;
        known.extend(new.iter().map(|p| p.source.clone()).zip(verdicts));
        Ok(programs.iter().map(|p| known[&p.source].clone()).collect())
    }
}

fn made(mode: Mode) -> Option<&'static Generated> {
    static MADE: OnceLock<Option<[Generated; 2]>> = OnceLock::new();
    let make = || {
        let (problems, _) = humaneval()?;
        let judge = Once(sandbox(Limits { cpu_seconds: 1.0, ..Limits::default() })?, Mutex::default());
        let of = |mode| generate(problems, &FlipMap::paper(), &judge, mode).unwrap();
        Some([of(Mode::Corrected), of(Mode::AsReleased)])
    };
    Some(&MADE.get_or_init(make).as_ref()?[usize::from(mode == Mode::AsReleased)])
}

#[test]
fn the_rows_are_those_that_were_released() {
    let Some(corrected) = made(Mode::Corrected) else { return };
    let (problems, released) = humaneval().unwrap();
    assert_eq!(corrected.left_out, []);
    assert_eq!((corrected.sites.len(), corrected.failing(), corrected.surviving()), (521, 494, 27));
    assert_eq!((corrected.used_problems(), corrected.used_sites(), corrected.rows.len()), (107, 404, 1896));
    let key = |g: &Generated| -> Vec<Released> {
        let name = |p: usize| problems[p].task_id.clone();
        let of = |r: &Row| Released { task_id: name(r.problem), clean: r.clean.clone(), buggy: r.buggy.clone() };
        g.rows.iter().map(of).collect()
    };
    let ours: BTreeSet<Released> = key(corrected).into_iter().collect();
    assert_eq!(ours.len(), 1896, "no row twice");
    let theirs: BTreeSet<Released> = released.iter().cloned().collect();
    assert_eq!((released.len(), theirs.len()), (1896, 1867));
    assert_eq!(theirs.difference(&ours).count(), 0, "released rows that are not explained");
    assert_eq!(ours.difference(&theirs).count(), 29);
    // The copies too, each as often as in the file.
    let Some(as_released) = made(Mode::AsReleased) else { return };
    let count = |rows: Vec<Released>| {
        rows.into_iter().fold(BTreeMap::new(), |mut m, r| {
            *m.entry(r).or_insert(0) += 1;
            m
        })
    };
    assert_eq!(count(key(as_released)), count(released.clone()));
}

/// The reference of every row passes and its flip does not, in three rounds on cores that are kept busy, with the same verdicts. A sample
/// of the rows, or all of them where `PRISMGRAD_ALL_ROWS` is set.
#[test]
fn verdicts_do_not_depend_on_the_load() {
    let limits = Limits { cpu_seconds: 1.0, ..Limits::default() };
    let (Some(made), Some(sandbox)) = (made(Mode::Corrected), sandbox(limits)) else { return };
    let (problems, _) = humaneval().unwrap();
    let whole = |r: &Row, source: String| Program {
        source,
        entry_point: problems[r.problem].entry_point.clone(),
        test: problems[r.problem].test.clone(),
    };
    let every = if std::env::var_os("PRISMGRAD_ALL_ROWS").is_some() { 1 } else { made.rows.len().div_ceil(150) };
    let rows: Vec<&Row> = made.rows.iter().step_by(every).collect();
    let both = |r: &&Row| [whole(r, r.clean_program()), whole(r, r.buggy_program())];
    let programs: Vec<Program> = rows.iter().flat_map(both).collect();
    let mut rounds: Vec<Vec<Verdict>> = Vec::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::black_box((0..10_000u64).sum::<u64>());
                }
            });
        }
        for _ in 0..3 {
            let start = Instant::now();
            let reports = sandbox.run_all(&programs);
            eprintln!("{} runs, {:.0} a second", reports.len(), reports.len() as f64 / start.elapsed().as_secs_f64());
            rounds.push(reports.into_iter().map(|r| r.verdict).collect());
        }
        stop.store(true, Ordering::Relaxed);
    });
    for (i, verdict) in rounds[0].iter().enumerate() {
        assert_eq!(*verdict == Verdict::Passed, i % 2 == 0, "{}\n{verdict}", programs[i].source);
        assert!(!matches!(verdict, Verdict::Infrastructure(_)), "{verdict}");
    }
    let differing = |round: &Vec<Verdict>| round.iter().zip(&rounds[0]).filter(|(a, b)| a != b).count();
    assert_eq!(rounds.iter().map(differing).sum::<usize>(), 0, "verdicts differ between rounds");
}

/// Problems of a user: rows are made of those that pass their own tests, and the others are named.
#[test]
fn rows_of_problems_in_a_file() {
    let path = std::env::temp_dir().join(format!("prismgrad-own-problems-{}", std::process::id()));
    let line = |id: &str, body: &str, test: &str| {
        serde_json::json!({"task_id": id, "prompt": "def f(xs):\n    \"\"\"a - b\"\"\"\n\n", "entry_point": "f",
            "canonical_solution": body, "test": test, "source": "of the user"})
    };
    let good = "    s = 0\n    for x in xs:\n        s += x\n\n    return s\n";
    let lines = [
        line("sum", good, "def check(f):\n    assert f([1, 2]) == 3\n"),
        line("weak", good, "def check(f):\n    assert f([0]) == 0\n"),
        line("wrong", good, "def check(f):\n    assert f([1]) == 2\n"),
        line("text", "    return 'a + b\n", "def check(f):\n    pass\n"),
    ];
    fs::write(&path, lines.map(|l| l.to_string()).join("\n\n")).unwrap();
    let problems = read_problems(&path).unwrap();
    fs::remove_file(&path).unwrap();
    // The mini language has neither docstrings nor these tests; a judge by name is enough for what is made of verdicts.
    struct Named;
    impl Judge for Named {
        fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
            let sum = |p: &Program| p.source.contains("s += x");
            let of = |p: &Program| match p.test.as_str() {
                t if t.contains("== 2") => Verdict::Failed,
                t if t.contains("== 3") && !sum(p) => Verdict::Failed,
                _ => Verdict::Passed,
            };
            Ok(programs.iter().map(of).collect())
        }
    }
    let named = generate(&problems, &FlipMap::paper(), &Named, Mode::Corrected).unwrap();
    let whole = sandbox(quick()).map(|s| generate(&problems, &FlipMap::paper(), &s, Mode::Corrected).unwrap());
    for made in [Some(named), whole].into_iter().flatten() {
        assert_eq!((made.sites.len(), made.failing(), made.surviving()), (2, 1, 1));
        let left: Vec<&str> = made.left_out.iter().map(|l| l.0.as_str()).collect();
        assert_eq!(left, ["text", "wrong"]);
        assert!(made.left_out[0].1.contains("line 1: a string that does not end on its line"), "{:?}", made.left_out);
        assert_eq!(made.rows.len(), 1);
        let row = &made.rows[0];
        assert!(row.buggy.ends_with("\n        s -= x") && row.rest == "    return s\n", "{row:?}");
        assert_eq!((row.head_lines, row.bug_line), (2, 4));
    }
}

/// What a text of the lexer's test is made of.
const PIECES: [&str; 48] = [
    "'", "\"", "'''", "\"\"\"", "\\", "\n", "\r\n", "#", "f'", "rb\"", "(", ")", "[", "]", "{", "}", "0x", "1e", "1e-",
    ".", "..", "...", "a", "é", "日", "+", "-", "**", "->", ":=", "!", "?", "$", "`", "\0", "\t", " ", "if", "not",
    "return", "1_0", "\u{feff}", "𝒳", "²", "e", "<=", "else", "j",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]
    /// No text makes the lexer panic, and tokens lie where they say.
    #[test]
    fn the_lexer_takes_any_text(pieces in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40)) {
        let text = pieces.concat();
        if let Ok(all) = tokens(&text) {
            for t in &all {
                prop_assert_eq!(&text[t.start..t.start + t.text.len()], t.text);
            }
            for op in operators(&text, &FlipMap::paper().operators()).unwrap() {
                prop_assert_eq!(&text[op.start..op.start + op.text.len()], op.text);
                prop_assert_eq!(text[..op.start].matches('\n').count(), op.line);
            }
        }
        prop_assert!(text.starts_with(cut_completion(&text)));
    }
}

/// Every family's bodies agree, the references pass, flips that are kept fail, and the parts share no program.
#[test]
fn the_mini_language_has_problems_with_tests() {
    let corpus = Corpus::new(3000, 1, 0).unwrap();
    let names = |p: &[Problem]| p.iter().map(|p| p.task_id.clone()).collect::<BTreeSet<_>>();
    let families =
        |p: &[Problem]| p.iter().map(|p| p.task_id.split('/').nth(1).unwrap().to_string()).collect::<BTreeSet<_>>();
    assert!(families(&corpus.test).len() >= 40, "{}", families(&corpus.test).len());
    assert_eq!(names(&corpus.test).intersection(&names(&corpus.validation)).count(), 0);
    let train: BTreeSet<&String> = corpus.train.iter().collect();
    for p in corpus.test.iter().chain(&corpus.validation) {
        assert!(!train.contains(&(p.prompt.clone() + &p.canonical_solution)), "{} is in both", p.task_id);
    }
    let judge = Interpreter::default();
    let made = generate(&corpus.test, &FlipMap::paper(), &judge, Mode::Corrected).unwrap();
    assert_eq!(made.left_out, []);
    assert!(made.rows.len() > 100 && made.surviving() > 0, "{} rows, {} survive", made.rows.len(), made.surviving());
    let vocabulary = Vocabulary::new();
    for row in &made.rows {
        let whole =
            |source: String| Program { source, entry_point: "f".into(), test: corpus.test[row.problem].test.clone() };
        let ids = vocabulary.encode(&row.buggy_program()).unwrap();
        let again = vocabulary.decode(&ids);
        assert_eq!(vocabulary.encode(&again).unwrap(), ids);
        let verdicts = judge.judge(&[row.clean_program(), again.clone()].map(whole)).unwrap();
        assert_eq!(verdicts[0], Verdict::Passed, "{}", row.clean_program());
        assert_ne!(verdicts[1], Verdict::Passed, "{again}");
        // The control edits change the text and not the meaning.
        let parts = Parts::of(&corpus.test[row.problem]);
        let operands = same_meaning(row, &parts, made.sites[row.site].start).map(|e| format!("{e}\n{}", row.rest));
        let all = Row { clean: row.clean_program(), rest: String::new(), ..row.clone() };
        let edited: Vec<String> = [operands, renamed(&all)].into_iter().flatten().collect();
        for source in edited {
            assert_ne!(source, row.clean_program());
            assert_eq!(judge.run(&whole(source.clone())), Verdict::Passed, "{source}");
            vocabulary.encode(&source).unwrap();
        }
    }
}

/// The interpreter computes what Python computes, for references and flips.
#[test]
fn python_agrees_with_the_interpreter() {
    let Some(sandbox) = sandbox(quick()) else { return };
    let problems = Corpus::new(1, 1, 0).unwrap().test;
    let judge = Interpreter::default();
    let made = generate(&problems, &FlipMap::paper(), &judge, Mode::Corrected).unwrap();
    let programs: Vec<Program> = (made.sites.iter().step_by(3))
        .map(|s| {
            let (p, parts) = (&problems[s.problem], Parts::of(&problems[s.problem]));
            Program { source: parts.head.clone() + &parts.flipped(s), entry_point: "f".into(), test: p.test.clone() }
        })
        .collect();
    for (p, (ours, theirs)) in
        programs.iter().zip(judge.judge(&programs).unwrap().iter().zip(sandbox.run_all(&programs)))
    {
        // Steps and CPU seconds are no common measure: a loop that counts down for ever ends in neither.
        assert_eq!(*ours, theirs.verdict, "{}", p.source);
    }
}

#[test]
fn the_interpreter_refuses_what_it_does_not_have() {
    let of = |source: &str| Interpreter::default().run(&program(source));
    let cases = [
        ("def f(x):\n    return x * x\n", Verdict::Passed),
        ("def f(x):\n    return x * x", Verdict::Passed),
        ("def f(x):\n    if x > 1:\n        return 8 // 2\n    else:\n        return 0\n", Verdict::Passed),
        ("def f(x):\n    return [1, 4][-1] - 7 % 5 + 2.0\n", Verdict::Passed),
        ("def f(x):\n    while x < 4:\n        x += 1\n    return x\n", Verdict::Passed),
        ("def f(x):\n    while x > 0:\n        x += 1\n    return x\n", Verdict::Cpu),
        ("def f(x):\n    x = 9\n", Verdict::Failed),
        ("def f(x):\n    return y\n", Verdict::Error),
        ("def f(x):\n    return x[0]\n", Verdict::Error),
        ("def f(x):\n    return x / 0\n", Verdict::Error),
        ("def f(x):\n    x = 9223372036854775807\n    return x + 1\n", Verdict::Error),
        ("def f(x):\n    import os\n", Verdict::Error),
        ("def f(x):\n    return 'a'\n", Verdict::Error),
        ("def f(x):\n  if x:\n      y = 1\n    return 4\n", Verdict::Error),
        ("def f(x):\n", Verdict::Error),
        ("def f(x):\n    if x:\n", Verdict::Error),
        ("", Verdict::Error),
        ("def f(x):\n    return 4\nprint(1)\n", Verdict::Error),
        ("def f():\n    return 4\n", Verdict::Error),
    ];
    for (source, want) in cases {
        assert_eq!(of(source), want, "{source}");
    }
    let deep = format!("def f(x):\n    return {}x{}\n", "(".repeat(5000), ")".repeat(5000));
    assert_eq!(of(&deep), Verdict::Error);
    assert_eq!(of(&format!("def f(x):\n    return {}x\n", "-".repeat(5000))), Verdict::Error);
    let test = Program { test: "def check(f):\n    f(1)\n".into(), ..program("def f(x):\n    return 4\n") };
    assert!(matches!(Interpreter::default().run(&test), Verdict::Infrastructure(_)));
}

/// A small model learns a little, samples do not depend on what is drawn beside them, and doubts lie where the operators are.
#[test]
fn a_model_of_the_mini_language() {
    let corpus = Corpus::new(200, 1, 0).unwrap();
    let training = Training { width: 32, layers: 1, heads: 2, steps: 60, batch: 8, rate: 5e-3, seed: 0 };
    let mut losses = Vec::new();
    let coder = Coder::train(&corpus.train, &training, |_, _, loss| losses.push(loss)).unwrap();
    assert!(losses[59] < 0.6 * losses[0], "{} {}", losses[0], losses[59]);
    let prefixes: Vec<String> = corpus.test.iter().take(3).map(|p| p.prompt.trim_end().to_string()).collect();
    let draw = Draw { samples: 2, temperature: 0.8, seed: 1 };
    let all = coder.complete(&prefixes, &draw).unwrap();
    let first = coder.complete(&prefixes[..1], &draw).unwrap();
    assert_eq!(all[0], first[0]);
    assert!(all[0].iter().all(|t| t.starts_with("def f")));
    let text = "def f(xs):\n    # the sum of the elements of xs greater than 3\n    s = -1\n    for x in xs:\n        if x > 3:\n            s += x - 1";
    let doubts = &coder.doubts(&[text.to_string()]).unwrap()[0];
    assert_eq!(doubts.iter().map(|d| d.line).collect::<Vec<_>>(), [4, 5, 5]);
    assert!(doubts.iter().all(|d| d.best >= d.observed && d.observed > 0.0 && d.best < 1.0));
    let edited = coder.replaced(text, &Doubt { instead: "<=".into(), ..doubts[0].clone() }).unwrap();
    assert!(edited.contains("if x <= 3:"), "{edited}");
    assert!(coder.doubts(&["def f(unknown):".to_string()]).unwrap_err().to_string().contains("unknown"));
}

/// The standard library of the Python on this machine lexes, and its operators, counted by their neighbours, find flips of
/// HumanEval more often than a guess.
#[test]
fn neighbours_of_operators_find_flips() {
    let Some((problems, released)) = humaneval() else { return };
    let folders = ["/usr/lib/python3.11", "/usr/lib/python3.12", "/usr/lib/python3.13", "/usr/local/lib/python3.11"];
    let Some(folder) = folders.iter().find(|f| std::path::Path::new(f).join("heapq.py").exists()) else {
        eprintln!("not tested: no standard library of Python in {folders:?}");
        return;
    };
    let (mut grams, mut files) = (OperatorNgrams::new(FlipMap::paper()), 0);
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|x| x == "py") {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            grams.count(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            files += 1;
        }
    }
    let head = |r: &Released| {
        let problem = problems.iter().find(|p| p.task_id == r.task_id).unwrap();
        Parts::of(problem).head.lines().count()
    };
    let mut of: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    for r in released {
        let bug = r.clean.lines().zip(r.buggy.lines()).position(|(a, b)| a != b).unwrap();
        let body: Vec<Doubt> = grams.doubts(&r.buggy).unwrap().into_iter().filter(|d| d.line >= head(r)).collect();
        let hit = most_suspicious(&body).is_some_and(|d| d.line == bug);
        let chance = body.iter().filter(|d| d.line == bug).count() as f64 / body.len() as f64;
        let entry = of.entry(&r.task_id).or_default();
        *entry = (entry.0 + f64::from(u8::from(hit)), entry.1 + chance, entry.2 + 1.0);
    }
    let sum = |f: fn(&(f64, f64, f64)) -> f64| of.values().map(f).sum::<f64>();
    let (n, rows) = (of.len() as f64, released.len() as f64);
    let (found, chance, by_problem) = (sum(|e| e.0) / rows, sum(|e| e.1) / rows, sum(|e| e.0 / e.2) / n);
    eprintln!(
        "{files} files, {} operators: {found:.3} of rows, {by_problem:.3} by problem; at random {chance:.3}",
        grams.sites()
    );
    assert!(found > chance + 0.1, "{found} {chance}");
}
