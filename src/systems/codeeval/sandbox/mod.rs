//! The sandbox runs untrusted programs without files, network, other processes or a way to influence the verdict.
//!
//! Two interpreters run for each program. Both are forked, before they have read anything, from one that was started once (a *worker*) and
//! has given up every right except to fork. The *judge* has the tests, and the only descriptor on which a verdict is accepted. The
//! *program's* interpreter has the program, and a pipe from which it reads calls of its functions and to which it writes results as plain
//! data (numbers, strings, lists, tuples, dicts, sets, `None`). The program's code is therefore never in one address space with the tests,
//! the expected values or the secret with which a verdict begins. It cannot forge a pass by ending the process, printing, replacing
//! builtins, or returning an object that is equal to everything. A value that is not plain data equals nothing.
//!
//! The layers, which [`Sandbox::layers`] lists with their purpose, are: Landlock, seccomp (a list of the system calls that are allowed),
//! `no_new_privs`, dropped capabilities, namespaces where the system allows them, limits of CPU seconds, memory, file size and descriptors,
//! and a process that may start no other process and no thread. If a necessary layer is missing, no sandbox is made, and the error names
//! the layer.
//!
//! Verdicts depend on CPU seconds and not on the load of the machine. Wall time is limited only to end a program that sleeps.

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

/// The result of a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// Every assertion held.
    Passed,
    /// An assertion did not hold.
    Failed,
    /// The program raised an exception, or ended itself.
    Error,
    /// The program took more CPU seconds than allowed.
    Cpu,
    /// The program took more memory than allowed.
    Memory,
    /// The program stayed within its CPU seconds, but did not end.
    Wall,
    /// The program was not judged, for a reason that has nothing to do with it. Never count this as a wrong answer.
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
    /// The whole program, which is not trusted.
    pub source: String,
    /// The function that the tests call.
    pub entry_point: String,
    /// Python that defines `check(candidate)`. It is trusted not to be hostile, but is confined as well.
    pub test: String,
}

/// Limits on the resources of a program.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// CPU seconds.
    pub cpu_seconds: f64,
    /// Seconds of wall time, for a program that sleeps. It is far above `cpu_seconds`, so that a busy machine changes no verdict.
    pub wall_seconds: f64,
    /// Bytes of address space.
    pub memory: u64,
}

impl Default for Limits {
    /// 3 CPU seconds, 30 seconds of wall time, 1 GiB.
    fn default() -> Limits {
        Limits { cpu_seconds: 3.0, wall_seconds: 30.0, memory: 1 << 30 }
    }
}

/// A verdict, and the time that was used.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The verdict.
    pub verdict: Verdict,
    /// The exception or the signal, to be read by people; empty after a pass. It may contain text of the program.
    pub message: String,
    /// CPU seconds of the program's process.
    pub cpu_seconds: f64,
    /// Seconds of wall time.
    pub wall_seconds: f64,
}

impl Report {
    /// The report of a program that could not be judged.
    #[allow(dead_code)]
    fn lost(why: String) -> Report {
        let verdict = Verdict::Infrastructure(why);
        Report { verdict, message: String::new(), cpu_seconds: 0.0, wall_seconds: 0.0 }
    }
}

/// A layer of the sandbox, and whether it is active on this system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Its name.
    pub name: &'static str,
    /// What the layer protects against.
    pub against: &'static str,
    /// Whether a sandbox is refused without it.
    pub necessary: bool,
    /// How the layer is active, or why it is not.
    pub state: std::result::Result<String, String>,
}

/// A judge of programs: the sandbox, or an interpreter of a small language.
pub trait Judge {
    /// The verdict of each program, in their order.
    ///
    /// # Errors
    /// If no program can be judged at all. A single program that could not be judged has [`Verdict::Infrastructure`].
    fn judge(&self, programs: &[Program]) -> Result<Vec<Verdict>>;
}
