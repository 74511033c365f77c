//! Programs that nobody has read are run here: without files, network, other processes or a way to the verdict.
//!
//! Two interpreters run for each program; both are forked, before they have read anything, from one that was started once (a *worker*) and
//! has given up all but the right to fork. The *judge* has the tests, and the only descriptor on which a verdict is accepted. The
//! *program's* interpreter has the program, and a pipe on which it is asked to call a function and answers with plain data (numbers,
//! strings, lists, tuples, dicts, sets, `None`). So the program's code is never in one address space with the tests, the expected
//! values or the secret with which a verdict begins: ending the process, printing, replacing builtins, or an object that is equal to
//! everything forge no pass. What is not plain data equals nothing.
//!
//! Layers, each listed by [`Sandbox::layers`] with what it is good for: Landlock, seccomp (a list of the system calls that are
//! allowed), `no_new_privs`, dropped capabilities, namespaces where the system allows them, limits of CPU seconds, memory, file
//! size and descriptors, and a process that may start no other process and no thread. A sandbox whose necessary layers are missing
//! is refused by name.
//!
//! Verdicts depend on CPU seconds and not on how busy the machine is; wall time is a backstop for a program that sleeps.

use crate::base::Result;
use serde::Serialize;
use std::fmt;

#[cfg(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod layers;
#[cfg(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod linux;
#[cfg(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod worker;
#[cfg(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub use linux::Sandbox;
#[cfg(not(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod absent;
#[cfg(not(all(feature = "sandbox", target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub use absent::Sandbox;

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// Every assertion held.
    Passed,
    /// An assertion did not hold.
    Failed,
    /// An exception, or the program ended itself.
    Error,
    /// It took more CPU seconds than allowed.
    Cpu,
    /// It took more memory than allowed.
    Memory,
    /// It took fewer CPU seconds, but did not end.
    Wall,
    /// It was not judged, for a reason that is not the program's: never count this as wrong.
    Infrastructure(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Passed => f.write_str("passed"),
            Verdict::Failed => f.write_str("failed"),
            Verdict::Error => f.write_str("error"),
            Verdict::Cpu => f.write_str("too many CPU seconds"),
            Verdict::Memory => f.write_str("too much memory"),
            Verdict::Wall => f.write_str("did not end"),
            Verdict::Infrastructure(why) => write!(f, "not judged: {why}"),
        }
    }
}

/// A program with its tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The whole program, of which nothing is trusted.
    pub source: String,
    /// The function that the tests call.
    pub entry_point: String,
    /// Python that defines `check(candidate)` and is trusted not to be hostile; it is confined all the same.
    pub test: String,
}

/// What a program may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// CPU seconds.
    pub cpu_seconds: f64,
    /// Seconds on the clock, for a program that sleeps; far above `cpu_seconds`, so that a busy machine changes no verdict.
    pub wall_seconds: f64,
    /// Bytes of address space.
    pub memory: u64,
}

impl Default for Limits {
    /// 3 CPU seconds, 30 seconds on the clock, 1 GiB.
    fn default() -> Limits {
        Limits { cpu_seconds: 3.0, wall_seconds: 30.0, memory: 1 << 30 }
    }
}

/// A verdict, and what it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// What became of the program.
    pub verdict: Verdict,
    /// The exception or the signal, for a reader; empty after a pass. It may hold text of the program.
    pub message: String,
    /// CPU seconds of the program's process.
    pub cpu_seconds: f64,
    /// Seconds on the clock.
    pub wall_seconds: f64,
}

impl Report {
    /// Of a program that could not be judged.
    #[allow(dead_code)]
    fn lost(why: String) -> Report {
        let verdict = Verdict::Infrastructure(why);
        Report { verdict, message: String::new(), cpu_seconds: 0.0, wall_seconds: 0.0 }
    }
}

/// A layer of the sandbox, and whether it holds here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Its name.
    pub name: &'static str,
    /// What it keeps a program from.
    pub against: &'static str,
    /// Whether a sandbox is refused without it.
    pub necessary: bool,
    /// How it holds, or why it does not.
    pub state: std::result::Result<String, String>,
}

/// Decides about programs: the sandbox, or an interpreter of a small language.
pub trait Judge {
    /// The verdict of each program, in their order.
    ///
    /// # Errors
    /// If no program can be judged at all; one that could not be is [`Verdict::Infrastructure`].
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>>;
}
