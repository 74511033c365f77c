//! The sandbox on Linux: what is asked of the kernel for each of the two processes, and how they are watched.

use super::{Judge, Layer, Limits, Program, Report, Verdict};
use crate::base::{Error, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PROGRAM: &str = concat!(include_str!("plain.py"), "\n\n", include_str!("program.py"));
const JUDGE: &str = concat!(include_str!("plain.py"), "\n\n", include_str!("judge.py"));
/// How often CPU clocks are read.
const TICK: Duration = Duration::from_millis(10);
/// The most that a judge may say.
const LONGEST_VERDICT: u64 = 64 << 10;

/// Runs Python programs that nobody has read.
#[derive(Clone, Debug)]
pub struct Sandbox {
    inner: Arc<Inner>,
    limits: Limits,
}

#[derive(Debug)]
struct Inner {
    python: PathBuf,
    version: String,
    readable: Vec<PathBuf>,
    filter: BpfProgram,
    namespaces: libc::c_int,
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
    /// As [`Sandbox::new`].
    pub fn with_python(python: impl AsRef<Path>, limits: Limits) -> Result<Sandbox> {
        Sandbox::without(python, limits, &[])
    }
    /// As [`Sandbox::with_python`] on a kernel that lacks some layers, by name: for tests of what is refused then.
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
        // A program that does nothing must pass: else the interpreter needs something that is not allowed here.
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
    /// The version of the interpreter, such as `3.11.2`: tokens and messages depend on it, verdicts hardly.
    pub fn python_version(&self) -> &str {
        &self.inner.version
    }
    /// Runs one program with its tests.
    pub fn run(&self, program: &Program) -> Report {
        let start = Instant::now();
        let mut report = self.attempt(program).unwrap_or_else(|e| Report {
            verdict: Verdict::Infrastructure(e.to_string()),
            message: String::new(),
            cpu_seconds: 0.0,
            wall_seconds: 0.0,
        });
        report.wall_seconds = start.elapsed().as_secs_f64();
        report
    }
    /// Runs programs on as many threads as the machine has cores; reports come in the order of the programs.
    pub fn run_all(&self, programs: &[Program]) -> Vec<Report> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(programs.len());
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Report>>> = Mutex::new(vec![None; programs.len()]);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(program) = programs.get(i) else { break };
                        let report = self.run(program);
                        if let Ok(mut done) = done.lock() {
                            done[i] = Some(report);
                        }
                    }
                });
            }
        });
        let done = done.into_inner().unwrap_or_default();
        let lost = || Report {
            verdict: Verdict::Infrastructure("the thread that ran it ended".into()),
            message: String::new(),
            cpu_seconds: 0.0,
            wall_seconds: 0.0,
        };
        done.into_iter().map(|r| r.unwrap_or_else(lost)).collect()
    }

    fn attempt(&self, program: &Program) -> std::io::Result<Report> {
        let secret = secret()?;
        // Calls go from the judge to the program, answers back, and the verdict to us.
        let (calls_in, mut calls_out) = pipe()?;
        let (answers_in, mut answers_out) = pipe()?;
        let (verdict_in, verdict_out) = pipe()?;
        // Each descriptor that a child gets is closed here at once: the end of a process must be the end of its pipe.
        let judge = self.spawn(JUDGE, answers_in.into(), calls_out.try_clone()?.into(), verdict_out.into())?;
        for text in [secret.as_str(), &program.entry_point, &program.test] {
            send(&mut answers_out, text)?;
        }
        let child = self.spawn(PROGRAM, calls_in.into(), answers_out.into(), Stdio::null())?;
        send(&mut calls_out, &program.source)?;
        drop(calls_out);
        self.watch(judge, child, verdict_in, &secret)
    }

    /// Waits for the verdict or a limit, ends both processes, and says what became of the program.
    fn watch(&self, judge: Process, child: Process, verdict: PipeReader, secret: &str) -> std::io::Result<Report> {
        let (start, limit) = (Instant::now(), self.limits.cpu_seconds);
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
            if start.elapsed().as_secs_f64() > self.limits.wall_seconds {
                ended = Some(Verdict::Wall);
                break;
            }
        }
        let judge = judge.end(Duration::ZERO)?;
        let said = String::from_utf8_lossy(&said).into_owned();
        // A program that closed its pipe may be about to end by itself, and then its signal is known.
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

    /// Starts an interpreter that has given up every right that it does not need.
    fn spawn(&self, driver: &str, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> std::io::Result<Process> {
        let mut rules = Some(ruleset(&self.inner.readable).map_err(std::io::Error::other)?);
        let (inner, limits, parent) = (self.inner.clone(), self.limits.clone(), unsafe { libc::getpid() });
        let mut command = Command::new(&inner.python);
        command.args(["-S", "-s", "-B", "-X", "utf8", "-c", driver]).env_clear();
        // The order of a set of strings is part of what a program does.
        command.env("PYTHONHASHSEED", "0").current_dir("/");
        command.stdin(stdin).stdout(stdout).stderr(stderr).process_group(0);
        // SAFETY: between fork and exec only system calls are made; nothing is allocated, and no lock is taken.
        unsafe {
            command.pre_exec(move || confine(&inner, &limits, parent, rules.take()));
        }
        let child = command.spawn()?;
        Ok(Process { pid: child.id() as libc::pid_t, reaped: false })
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

/// 32 letters from the system's generator.
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

/// A child, killed and waited for at the latest when this is dropped.
struct Process {
    pid: libc::pid_t,
    reaped: bool,
}

/// How a child ended.
struct End {
    cpu_seconds: f64,
    signal: Option<i32>,
    code: i32,
    /// Whether the signal was ours.
    killed: bool,
}

impl End {
    fn describe(&self) -> String {
        match self.signal {
            _ if self.killed => "its descriptors were closed".into(),
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("ended with code {} before it had answered", self.code),
        }
    }
}

impl Process {
    /// CPU seconds so far.
    fn cpu(&self) -> f64 {
        // SAFETY: plain data, written by the call. The child is not waited for yet, so the number is its own.
        unsafe {
            let (mut clock, mut time) = (0, std::mem::zeroed::<libc::timespec>());
            match libc::clock_getcpuclockid(self.pid, &mut clock) == 0 && libc::clock_gettime(clock, &mut time) == 0 {
                true => time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9,
                false => 0.0,
            }
        }
    }
    fn wait(&mut self, options: libc::c_int) -> Option<End> {
        // SAFETY: as above.
        unsafe {
            let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
            loop {
                match libc::wait4(self.pid, &mut status, options, &mut usage) {
                    0 => return None,
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    _ => break,
                }
            }
            self.reaped = true;
            let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
            Some(End {
                cpu_seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
                signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
                code: libc::WEXITSTATUS(status),
                killed: false,
            })
        }
    }
    /// Ends the process and its group after a while in which it may end by itself.
    fn end(mut self, patience: Duration) -> std::io::Result<End> {
        let start = Instant::now();
        loop {
            if let Some(end) = self.wait(libc::WNOHANG) {
                return Ok(end);
            }
            if start.elapsed() >= patience {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.kill();
        match self.wait(0) {
            Some(end) => Ok(End { killed: true, ..end }),
            None => Err(std::io::Error::other("a child could not be waited for")),
        }
    }
    fn kill(&self) {
        // SAFETY: the child is not waited for yet, so the number is its own.
        unsafe {
            libc::kill(-self.pid, libc::SIGKILL);
            libc::kill(self.pid, libc::SIGKILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            self.wait(0);
        }
    }
}

/// The interpreter itself, its version, and what it reads. `python3` may be a script that starts another file.
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

const FILES: ABI = ABI::V5;

/// Everything that Landlock handles is denied but to read these files, and to run the interpreter among them.
fn ruleset(readable: &[PathBuf]) -> Result<RulesetCreated, landlock::RulesetError> {
    let net: BitFlags<AccessNet> = AccessNet::from_all(ABI::V4);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(FILES))?
        .handle_access(net)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    for path in readable {
        let Ok(fd) = PathFd::new(path) else { continue };
        let mut access = AccessFs::ReadFile | AccessFs::Execute;
        if path.is_dir() {
            access |= AccessFs::ReadDir;
        }
        rules = rules.add_rule(PathBeneath::new(fd, access))?;
    }
    if let Ok(fd) = PathFd::new("/dev/null") {
        rules = rules.add_rule(PathBeneath::new(fd, AccessFs::ReadFile | AccessFs::WriteFile))?;
    }
    Ok(rules)
}

/// The system calls that an interpreter needs; all others are refused with EPERM. None starts a process or a thread, opens a
/// socket, sends a signal, maps another process, or changes a file's name, mode or length.
fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let always = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_close,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_lseek,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_openat,
        libc::SYS_dup,
        libc::SYS_dup3,
        libc::SYS_pipe2,
        libc::SYS_pselect6,
        libc::SYS_ppoll,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_clock_gettime,
        libc::SYS_clock_getres,
        libc::SYS_gettimeofday,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_getgid,
        libc::SYS_geteuid,
        libc::SYS_getegid,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_uname,
        libc::SYS_getdents64,
        libc::SYS_getcwd,
        libc::SYS_readlinkat,
        libc::SYS_sysinfo,
        libc::SYS_times,
        libc::SYS_getrusage,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_set_tid_address,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_getrandom,
        libc::SYS_execve,
        libc::SYS_restart_syscall,
        libc::SYS_setitimer,
        libc::SYS_membarrier,
    ];
    #[cfg(target_arch = "x86_64")]
    let older = [
        libc::SYS_open,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_dup2,
        libc::SYS_pipe,
        libc::SYS_select,
        libc::SYS_poll,
        libc::SYS_time,
        libc::SYS_readlink,
        libc::SYS_getrlimit,
        libc::SYS_arch_prctl,
        libc::SYS_alarm,
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let older: [i64; 0] = [];
    for call in always.into_iter().chain(older) {
        rules.insert(call, vec![]);
    }
    let equal = |argument, length: SeccompCmpArgLen, value: u64| {
        SeccompRule::new(vec![SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value)?])
    };
    // A limit may be read, not changed, whoever's it is.
    rules.insert(libc::SYS_prlimit64, vec![equal(2, SeccompCmpArgLen::Qword, 0)?]);
    // No F_SETOWN with F_SETSIG, which would send signals.
    let commands = [libc::F_DUPFD, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
    let rule = |c: &libc::c_int| equal(1, SeccompCmpArgLen::Dword, *c as u64);
    rules.insert(libc::SYS_fcntl, commands.iter().map(rule).collect::<Result<_, _>>()?);
    let requests: [u64; 3] = [0x5401, 0x5450, 0x5451]; // TCGETS, FIONCLEX, FIOCLEX
    let rule = |r: &u64| equal(1, SeccompCmpArgLen::Dword, *r);
    rules.insert(libc::SYS_ioctl, requests.iter().map(rule).collect::<Result<_, _>>()?);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow, arch)?.try_into()
}

/// In the child, between fork and exec.
fn confine(inner: &Inner, limits: &Limits, parent: libc::pid_t, rules: Option<RulesetCreated>) -> std::io::Result<()> {
    let failed = || std::io::Error::last_os_error();
    let seconds = limits.cpu_seconds.ceil() as u64 + 1;
    let bounds = [
        (libc::RLIMIT_CPU, seconds, seconds + 1),
        (libc::RLIMIT_AS, limits.memory, limits.memory),
        (libc::RLIMIT_DATA, limits.memory, limits.memory),
        (libc::RLIMIT_FSIZE, 0, 0),
        (libc::RLIMIT_CORE, 0, 0),
        (libc::RLIMIT_NOFILE, 64, 64),
        (libc::RLIMIT_MEMLOCK, 0, 0),
        (libc::RLIMIT_MSGQUEUE, 0, 0),
    ];
    // SAFETY: system calls on plain data of this frame.
    unsafe {
        // Should this program be killed, the child goes with it; the second line is for a parent that is gone already.
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(failed());
        }
        if libc::getppid() != parent {
            return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
        }
        if inner.namespaces != 0 && libc::unshare(inner.namespaces) != 0 {
            return Err(failed());
        }
        for (which, soft, hard) in bounds {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            if libc::setrlimit(which, &limit) != 0 {
                return Err(failed());
            }
        }
        // What another thread had open without the flag is not for the child.
        libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 4u32 /* CLOEXEC */);
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(failed());
        }
        if let Some(rules) = rules {
            let status = rules.restrict_self().map_err(|_| std::io::Error::from_raw_os_error(libc::ENOTSUP))?;
            if status.ruleset == landlock::RulesetStatus::NotEnforced {
                return Err(std::io::Error::from_raw_os_error(libc::ENOTSUP));
            }
        }
        drop_capabilities()?;
    }
    seccompiler::apply_filter(&inner.filter).map_err(|_| std::io::Error::from_raw_os_error(libc::ENOTSUP))
}

/// Gives up all capabilities; with `no_new_privs`, exec gives none back, not even to root.
///
/// # Safety
/// A system call on plain data.
unsafe fn drop_capabilities() -> std::io::Result<()> {
    #[repr(C)]
    struct Header(u32, i32);
    let (header, none) = (Header(0x2008_0522, 0), [0u32; 6]);
    // SAFETY: version 3 takes two triples of 32 bits.
    match unsafe { libc::syscall(libc::SYS_capset, &header as *const Header, none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether this can be done in a child.
fn try_in_child(mut what: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> bool {
    let mut command = Command::new("/proc/self/exe");
    // The program is never started: the closure ends with an error either way, and which one says whether it worked.
    // SAFETY: `what` makes system calls alone.
    unsafe {
        command.pre_exec(move || {
            what()?;
            Err(std::io::Error::from_raw_os_error(libc::EXDEV))
        });
    }
    command.spawn().is_err_and(|e| e.raw_os_error() == Some(libc::EXDEV))
}

/// User, IPC, UTS and network namespaces, if the system allows them together.
fn allowed_namespaces() -> libc::c_int {
    let all = libc::CLONE_NEWUSER | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
    // SAFETY: one system call.
    let unshare = move || match unsafe { libc::unshare(all) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    if try_in_child(unshare) { all } else { 0 }
}

fn layers(namespaces: libc::c_int) -> Vec<Layer> {
    // SAFETY: asks for the version, and makes nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, 1u32) };
    let landlock = match abi {
        1.. => Ok(format!("version {abi}")),
        _ => Err(format!("the kernel has none, or it is switched off: {}", std::io::Error::last_os_error())),
    };
    // SAFETY: as above, of a filter's actions: whether "errno" is known.
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    let seccomp =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0u32, &action as *const u32) };
    let seccomp = match seccomp {
        0 => Ok("a list of allowed system calls".to_string()),
        _ => Err(format!("the kernel has no filters: {}", std::io::Error::last_os_error())),
    };
    let spaces = match namespaces {
        0 => Err("the system allows no user namespaces".to_string()),
        _ => Ok("user, network, IPC and host name".to_string()),
    };
    let layer = |name, against, necessary, state| Layer { name, against, necessary, state };
    let held = |text: &str| Ok(text.to_string());
    vec![
        layer("Landlock", "reading and writing files", true, landlock),
        layer("seccomp", "starting processes, sockets, signals and tracing", true, seccomp),
        layer("no_new_privs", "gaining rights by starting a program", true, held("set before the interpreter starts")),
        layer("capabilities", "the rights of root", true, held("all dropped")),
        layer("limits", "CPU, memory, file size, descriptors", true, held("set, and not to be raised")),
        layer("namespaces", "the network and shared memory, a second time", false, spaces),
    ]
}
