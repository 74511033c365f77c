//! The sandbox on Linux: it chooses the interpreter, and watches a judge and a program.

use super::layers::{allowed_namespaces, filter, layers};
use super::worker::{Process, Worker};
use super::{Judge, Layer, Limits, Program, Report, Verdict};
use crate::base::{Error, Result};
use seccompiler::BpfProgram;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often CPU clocks are read.
const TICK: Duration = Duration::from_millis(10);
/// The most seconds that are counted as waiting between two readings of the clocks.
const LONGEST_WAIT: f64 = 1.0;
/// The most bytes of a verdict.
const LONGEST_VERDICT: u64 = 64 << 10;

/// Runs untrusted Python programs.
#[derive(Clone, Debug)]
pub struct Sandbox {
    inner: Arc<Inner>,
    limits: Limits,
}

/// The data that all workers share.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) python: PathBuf,
    version: String,
    /// Files and folders that may be read.
    pub(super) readable: Vec<PathBuf>,
    pub(super) filter: BpfProgram,
    pub(super) namespaces: libc::c_int,
    layers: Vec<Layer>,
}

fn refused(what: impl std::fmt::Display) -> Error {
    Error::device("Sandbox", what)
}

impl Sandbox {
    /// A sandbox with the Python of `PRISMGRAD_PYTHON`, else the `python3` on the path.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no Python 3.8 or newer, or if a necessary layer is missing, which is named.
    pub fn new(limits: Limits) -> Result<Sandbox> {
        Sandbox::with_python(std::env::var_os("PRISMGRAD_PYTHON").unwrap_or_else(|| "python3".into()), limits)
    }
    /// A sandbox with a Python of your own.
    ///
    /// # Errors
    /// Those of [`Sandbox::new`].
    pub fn with_python(python: impl AsRef<Path>, limits: Limits) -> Result<Sandbox> {
        Sandbox::without(python, limits, &[])
    }
    /// [`Sandbox::with_python`] as on a kernel that lacks the layers in `missing`, for tests of the errors.
    #[doc(hidden)]
    pub fn without(python: impl AsRef<Path>, limits: Limits, missing: &[&str]) -> Result<Sandbox> {
        if !(limits.cpu_seconds > 0.0 && limits.cpu_seconds.is_finite() && limits.wall_seconds >= limits.cpu_seconds) {
            let message = format!(
                "{} CPU seconds within {} seconds on the clock; give a positive number, and no less on the clock",
                limits.cpu_seconds, limits.wall_seconds
            );
            return Err(Error::invalid("Sandbox", message));
        }
        let (python, version, readable) = interpreter(python.as_ref())?;
        let namespaces = if missing.contains(&"namespaces") { 0 } else { allowed_namespaces() };
        let layers: Vec<Layer> = layers(namespaces)
            .into_iter()
            .map(|mut l| {
                if missing.contains(&l.name) {
                    l.state = Err("left out by the caller".into());
                }
                l
            })
            .collect();
        if let Some(layer) = layers.iter().find(|l| l.necessary && l.state.is_err()) {
            let why = layer.state.as_ref().err().map_or("", String::as_str);
            return Err(refused(format!(
                "no {} on this system ({why}), which keeps programs from {}; nothing is run without it",
                layer.name, layer.against
            )));
        }
        let filter = filter().map_err(|e| refused(format!("the seccomp filter was not built: {e}")))?;
        let inner = Inner { python, version, readable, filter, namespaces, layers };
        let sandbox = Sandbox { inner: Arc::new(inner), limits };
        // A program that does nothing must pass. Otherwise the interpreter needs something that the sandbox does not allow.
        let trial = Program {
            source: "def f(x):\n    return [x, {'a': (1.5, None)}]\n".into(),
            entry_point: "f".into(),
            test: "def check(f):\n    assert f(-1) == [-1, {'a': (1.5, None)}]\n".into(),
        };
        match sandbox.run(&trial) {
            Report { verdict: Verdict::Passed, .. } => Ok(sandbox),
            other => Err(refused(format!(
                "a program that must pass did not with {} ({}): {} {}",
                sandbox.inner.python.display(),
                sandbox.inner.version,
                other.verdict,
                other.message
            ))),
        }
    }
    /// The layers, and whether each holds on this system.
    pub fn layers(&self) -> &[Layer] {
        &self.inner.layers
    }
    /// The version of the interpreter, such as `3.11.2`. Tokens and messages depend on it; verdicts hardly do.
    pub fn python_version(&self) -> &str {
        &self.inner.version
    }
    /// Runs one program with its tests. For many programs [`Sandbox::run_all`] is faster, because it starts an interpreter only once per
    /// thread.
    pub fn run(&self, program: &Program) -> Report {
        self.run_by(&mut None, program)
    }
    /// Runs programs on as many threads as the machine has cores. The reports are in the order of the programs.
    pub fn run_all(&self, programs: &[Program]) -> Vec<Report> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(programs.len());
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Report>>> = Mutex::new(vec![None; programs.len()]);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut worker = None;
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(program) = programs.get(i) else { break };
                        let report = self.run_by(&mut worker, program);
                        if let Ok(mut done) = done.lock() {
                            done[i] = Some(report);
                        }
                    }
                });
            }
        });
        let done = done.into_inner().unwrap_or_default();
        done.into_iter().map(|r| r.unwrap_or_else(|| Report::lost("the thread that ran it ended".into()))).collect()
    }

    /// Runs one program with a worker. The worker is started if there is none, and ended after a program that it could not judge.
    fn run_by(&self, worker: &mut Option<Worker>, program: &Program) -> Report {
        let start = Instant::now();
        let ready = match worker.take() {
            Some(ready) => Ok(ready),
            None => Worker::start(&self.inner, &self.limits),
        };
        let attempt = |ready: Worker| -> std::io::Result<(Report, Worker)> {
            let report = self.attempt(&ready, program)?;
            Ok((report, ready))
        };
        let mut report = match ready.and_then(attempt) {
            Ok((report, ready)) => {
                *worker = (!matches!(report.verdict, Verdict::Infrastructure(_))).then_some(ready);
                report
            }
            Err(e) => Report::lost(e.to_string()),
        };
        report.wall_seconds = start.elapsed().as_secs_f64();
        report
    }

    fn attempt(&self, worker: &Worker, program: &Program) -> std::io::Result<Report> {
        let secret = secret()?;
        // Calls go from the judge to the program, answers go back, and the verdict comes to this process.
        let (calls_in, mut calls_out) = pipe()?;
        let (answers_in, mut answers_out) = pipe()?;
        let (verdict_in, verdict_out) = pipe()?;
        // Each descriptor that a child gets is closed here at once, so that the pipe ends when the child does.
        let judge = worker.fork(b'J', &[answers_in.into(), calls_out.try_clone()?.into(), verdict_out.into()])?;
        for text in [secret.as_str(), &program.entry_point, &program.test] {
            send(&mut answers_out, text)?;
        }
        let child = worker.fork(b'P', &[calls_in.into(), answers_out.into()])?;
        send(&mut calls_out, &program.source)?;
        drop(calls_out);
        self.watch(judge, child, verdict_in, &secret)
    }

    /// Waits for the verdict or a limit, ends both processes, and returns the report.
    fn watch(
        &self,
        judge: Process<'_>,
        child: Process<'_>,
        verdict: PipeReader,
        secret: &str,
    ) -> std::io::Result<Report> {
        let limit = self.limits.cpu_seconds;
        let (mut last, mut waited) = (Instant::now(), 0.0);
        let mut said: Vec<u8> = Vec::new();
        let mut ended = None;
        loop {
            if readable(&verdict, TICK)? {
                let mut part = [0; 4096];
                match (&verdict).read(&mut part)? {
                    0 => break,
                    n if said.len() as u64 > LONGEST_VERDICT => said.truncate(said.len() - n.min(said.len())),
                    n => said.extend_from_slice(&part[..n]),
                }
            }
            if child.cpu() > limit || judge.cpu() > limit {
                ended = Some(Verdict::Cpu);
                break;
            }
            // The time in which the machine, or this program with its children, was suspended must not count as sleep of the program.
            waited += last.elapsed().as_secs_f64().min(LONGEST_WAIT);
            last = Instant::now();
            if waited > self.limits.wall_seconds {
                ended = Some(Verdict::Wall);
                break;
            }
        }
        let judge = judge.end(Duration::ZERO)?;
        let said = String::from_utf8_lossy(&said).into_owned();
        // A program that closed its pipe may be about to end by itself, and its signal is known only then.
        let gone = said.strip_prefix(secret).is_some_and(|s| s.starts_with('G'));
        let child = child.end(Duration::from_millis(if gone { 20 } else { 0 }))?;
        let mut message = String::new();
        let slow = child.cpu_seconds > limit || child.signal == Some(libc::SIGXCPU) || judge.cpu_seconds > limit;
        let verdict = match (ended, said.strip_prefix(secret)) {
            _ if slow => Verdict::Cpu,
            (Some(ended), _) => ended,
            (None, Some(text)) if !text.is_empty() => {
                message = text[1..].to_string();
                match &text[..1] {
                    "P" => Verdict::Passed,
                    "F" => Verdict::Failed,
                    "M" => Verdict::Memory,
                    "E" => Verdict::Error,
                    "G" if child.signal == Some(libc::SIGKILL) && !child.killed => {
                        Verdict::Infrastructure("the system killed the program, which kept its limits".into())
                    }
                    "G" => {
                        message = child.describe();
                        Verdict::Error
                    }
                    _ => Verdict::Infrastructure(std::mem::take(&mut message)),
                }
            }
            (None, _) => {
                let last = said.lines().last().unwrap_or("").to_string();
                Verdict::Infrastructure(format!("the judge gave no verdict ({}) {last}", judge.describe()))
            }
        };
        Ok(Report { verdict, message, cpu_seconds: child.cpu_seconds, wall_seconds: 0.0 })
    }
}

impl Judge for Sandbox {
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>> {
        Ok(self.run_all(programs).into_iter().map(|r| r.verdict).collect())
    }
}

fn send(to: &mut PipeWriter, text: &str) -> std::io::Result<()> {
    to.write_all(format!("S{:08x}", text.len()).as_bytes())?;
    to.write_all(text.as_bytes())
}

/// A secret of 32 letters from the system's random generator.
fn secret() -> std::io::Result<String> {
    let mut bytes = [0u8; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn readable(from: &PipeReader, wait: Duration) -> std::io::Result<bool> {
    let mut poll = libc::pollfd { fd: from.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    let n = unsafe { libc::poll(&mut poll, 1, wait.as_millis() as libc::c_int) };
    match n {
        -1 if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => Ok(false),
        -1 => Err(std::io::Error::last_os_error()),
        n => Ok(n > 0),
    }
}

/// The path of the interpreter itself, its version, and the files that it reads. `python3` may be a script that starts another file.
fn interpreter(python: &Path) -> Result<(PathBuf, String, Vec<PathBuf>)> {
    let code = "import sys\nprint(sys.executable)\nprint('.'.join(map(str, sys.version_info[:3])))\n\
                print(sys.base_prefix)\nprint(*[p for p in sys.path if p], sep='\\n')";
    let out = Command::new(python).args(["-I", "-S", "-c", code]).stdin(Stdio::null()).output().map_err(|e| {
        refused(format!("no Python at {} ({e}); install Python 3, or name one by PRISMGRAD_PYTHON", python.display()))
    })?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut lines = text.lines();
    let (Some(executable), Some(version), Some(prefix)) = (lines.next(), lines.next(), lines.next()) else {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        return Err(refused(format!("{} is no Python 3: {}", python.display(), said.trim())));
    };
    let numbers: Vec<u32> = version.split('.').filter_map(|n| n.parse().ok()).collect();
    if numbers < vec![3, 8] {
        return Err(refused(format!("{} is Python {version}; 3.8 or newer is needed", python.display())));
    }
    let real = std::fs::canonicalize(executable).map_err(|e| Error::io("find", executable, e))?;
    let mut readable: Vec<PathBuf> = lines.map(PathBuf::from).collect();
    readable.push(real.clone());
    readable.push(Path::new(prefix).join("lib"));
    let system =
        ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime"];
    readable.extend(
        system.iter().chain(&["/usr/share/zoneinfo", "/etc/ssl/openssl.cnf", "/dev/urandom"]).map(PathBuf::from),
    );
    readable.retain(|p| p.exists() && p.parent().is_some());
    Ok((real, version.to_string(), readable))
}
