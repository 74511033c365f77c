//! The layers of the sandbox, as requests to the kernel.

use super::Layer;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

const FILES: ABI = ABI::V5;

/// A Landlock ruleset that denies everything it handles, except reading and executing these files and folders, and using `/dev/null`.
pub(super) fn ruleset(readable: &[PathBuf]) -> Result<RulesetCreated, landlock::RulesetError> {
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

/// The system calls that an interpreter needs while it runs; all others are refused with EPERM. None of them starts a program, a process or
/// a thread, opens a socket, sends a signal, maps another process, or changes a file's name, mode or length.
pub(super) fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
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
    // Limits may be read, of any process, but not changed.
    rules.insert(libc::SYS_prlimit64, vec![equal(2, SeccompCmpArgLen::Qword, 0)?]);
    // F_SETOWN and F_SETSIG are refused, because together they send signals.
    let commands = [libc::F_DUPFD, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
    let rule = |c: &libc::c_int| equal(1, SeccompCmpArgLen::Dword, *c as u64);
    rules.insert(libc::SYS_fcntl, commands.iter().map(rule).collect::<Result<_, _>>()?);
    let requests: [u64; 3] = [0x5401, 0x5450, 0x5451]; // TCGETS, FIONCLEX, FIOCLEX
    let rule = |r: &u64| equal(1, SeccompCmpArgLen::Dword, *r);
    rules.insert(libc::SYS_ioctl, requests.iter().map(rule).collect::<Result<_, _>>()?);
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow, arch)?.try_into()
}

/// The rights that a worker gives up between fork and exec, and with it every interpreter that it forks. The limit of CPU seconds and the
/// list of system calls follow in each interpreter, because with them the worker could fork none.
pub(super) fn confine(
    namespaces: libc::c_int,
    memory: u64,
    parent: libc::pid_t,
    rules: Option<RulesetCreated>,
) -> std::io::Result<()> {
    let failed = || std::io::Error::last_os_error();
    let bounds = [
        (libc::RLIMIT_AS, memory),
        (libc::RLIMIT_DATA, memory),
        (libc::RLIMIT_FSIZE, 0),
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_NOFILE, 64),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
    ];
    // SAFETY: system calls on plain data of this frame.
    unsafe {
        // If this program is killed, the child is killed too. The second check is for a parent that has ended already.
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(failed());
        }
        if libc::getppid() != parent {
            return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
        }
        if namespaces != 0 && libc::unshare(namespaces) != 0 {
            return Err(failed());
        }
        for (which, most) in bounds {
            if libc::setrlimit(which, &libc::rlimit { rlim_cur: most, rlim_max: most }) != 0 {
                return Err(failed());
            }
        }
        // The child must not inherit descriptors that another thread opened without the flag.
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
        drop_capabilities()
    }
}

/// Drops all capabilities. With `no_new_privs`, exec restores none, not even for root.
///
/// # Safety
/// It makes a system call on plain data.
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

/// Whether `what` succeeds in a child process.
fn try_in_child(mut what: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> bool {
    let mut command = Command::new("/proc/self/exe");
    // The program is never started: the closure returns an error in either case, and the error code says whether `what` succeeded.
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
pub(super) fn allowed_namespaces() -> libc::c_int {
    let all = libc::CLONE_NEWUSER | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
    // SAFETY: one system call.
    let unshare = move || match unsafe { libc::unshare(all) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    if try_in_child(unshare) { all } else { 0 }
}

pub(super) fn layers(namespaces: libc::c_int) -> Vec<Layer> {
    // SAFETY: the call asks for the version, and creates nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, 1u32) };
    let landlock = match abi {
        1.. => Ok(format!("version {abi}")),
        _ => Err(format!("the kernel has none, or it is switched off: {}", std::io::Error::last_os_error())),
    };
    // SAFETY: the call only asks whether the filter action "errno" is available.
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
