//! Workers: interpreters that are started and confined once, and fork a new interpreter for each judge and each program. To start an
//! interpreter takes ten times the CPU seconds of forking one.

use super::Limits;
use super::layers::{confine, ruleset};
use super::linux::Inner;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const DRIVER: &str = concat!(
    include_str!("plain.py"),
    "\n\n",
    include_str!("judge.py"),
    "\n\n",
    include_str!("program.py"),
    "\n\n",
    include_str!("worker.py")
);
/// The most descriptors that are passed at once.
const MOST: usize = 3;

/// A confined interpreter that forks others. It runs only its own code, and reads nothing that a program or a judge wrote.
pub(super) struct Worker {
    child: Child,
    /// Carries requests and answers, each as one message.
    control: OwnedFd,
}

fn failed() -> std::io::Error {
    std::io::Error::last_os_error()
}

impl Worker {
    /// Starts an interpreter without any right that forked ones do not need, except the right to fork.
    pub(super) fn start(inner: &Arc<Inner>, limits: &Limits) -> std::io::Result<Worker> {
        let rules = ruleset(&inner.readable).map_err(std::io::Error::other)?;
        // A forked interpreter gets the same rules a second time as a domain of its own, so that it has no rights over the other
        // interpreters.
        let again: Option<OwnedFd> = rules.try_clone().map_err(std::io::Error::other)?.into();
        let again = again.ok_or_else(|| std::io::Error::other("Landlock made no rules"))?;
        let (control, theirs) = channel()?;
        let (namespaces, memory, mut rules) = (inner.namespaces, limits.memory, Some(rules));
        // SAFETY: one system call.
        let parent = unsafe { libc::getpid() };
        let mut command = Command::new(&inner.python);
        command.args(["-S", "-s", "-B", "-X", "utf8", "-c", DRIVER]).env_clear();
        // The order of a set of strings affects what a program does, so the hash seed is fixed.
        command.env("PYTHONHASHSEED", "0").current_dir("/");
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        // SAFETY: between fork and exec only system calls are made; nothing is allocated, and no lock is taken.
        unsafe {
            command.pre_exec(move || confine(namespaces, memory, parent, rules.take()));
        }
        let child = command.spawn()?;
        // The command holds the other end of the channel. After it is dropped, this end is notified when the worker ends.
        drop(command);
        let worker = Worker { child, control };
        let seconds = limits.cpu_seconds.ceil() as u32 + 1;
        let mut message = format!("{seconds:08x}{:08x}", libc::SYS_landlock_restrict_self).into_bytes();
        for i in &inner.filter {
            message.extend(i.code.to_ne_bytes());
            message.extend([i.jt, i.jf]);
            message.extend(i.k.to_ne_bytes());
        }
        match worker.ask(&message, &[again])?.as_str() {
            "ready" => Ok(worker),
            why => Err(std::io::Error::other(format!("the interpreter cannot be confined: {why}"))),
        }
    }

    /// Forks an interpreter with these descriptors as its 0, 1 and 2. `which` is `J` for a judge or `P` for a program.
    pub(super) fn fork(&self, which: u8, descriptors: &[OwnedFd]) -> std::io::Result<Process<'_>> {
        let answer = self.ask(&[which], descriptors)?;
        let no = |_| std::io::Error::other(format!("no interpreter was forked: {answer}"));
        let pid: libc::pid_t = answer.parse().map_err(no)?;
        // SAFETY: the number is that of a process that the worker has not waited for; the returned descriptor is owned here.
        let handle = unsafe {
            match libc::syscall(libc::SYS_pidfd_open, pid, 0u32) {
                -1 => {
                    libc::kill(pid, libc::SIGKILL);
                    return Err(failed());
                }
                fd => OwnedFd::from_raw_fd(fd as libc::c_int),
            }
        };
        Ok(Process { worker: self, pid, handle, reaped: false })
    }

    /// Sends a message with descriptors, and waits for the answer.
    fn ask(&self, message: &[u8], descriptors: &[OwnedFd]) -> std::io::Result<String> {
        let numbers: Vec<libc::c_int> = descriptors.iter().map(AsRawFd::as_raw_fd).take(MOST).collect();
        let bytes = size_of_val(numbers.as_slice());
        let mut answer = [0u8; 256];
        // SAFETY: every pointer is to data of this frame that outlives the calls, with its length; the room for the control message
        // is aligned and holds MOST descriptors.
        let n = unsafe {
            let mut part = libc::iovec { iov_base: message.as_ptr() as *mut libc::c_void, iov_len: message.len() };
            let mut room = [0u64; 8];
            let mut head: libc::msghdr = std::mem::zeroed();
            (head.msg_iov, head.msg_iovlen) = (&mut part, 1);
            if bytes > 0 {
                head.msg_control = room.as_mut_ptr().cast();
                head.msg_controllen = libc::CMSG_SPACE(bytes as u32) as _;
                let control = libc::CMSG_FIRSTHDR(&head);
                ((*control).cmsg_level, (*control).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
                (*control).cmsg_len = libc::CMSG_LEN(bytes as u32) as _;
                std::ptr::copy_nonoverlapping(numbers.as_ptr().cast(), libc::CMSG_DATA(control), bytes);
            }
            let fd = self.control.as_raw_fd();
            if again(|| libc::sendmsg(fd, &head, libc::MSG_NOSIGNAL)) < 0 {
                return Err(failed());
            }
            again(|| libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0))
        };
        match n {
            0 => Err(std::io::Error::other("the interpreter that forks others has ended")),
            n if n < 0 => Err(failed()),
            n => Ok(String::from_utf8_lossy(&answer[..n as usize]).into_owned()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The interpreters that it forked are killed with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A system call, repeated while signals interrupt it.
fn again(mut call: impl FnMut() -> isize) -> isize {
    loop {
        match call() {
            -1 if failed().kind() == std::io::ErrorKind::Interrupted => {}
            n => return n,
        }
    }
}

/// The two ends of a channel of messages. When one end is closed, the other is notified.
fn channel() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let mut both = [0; 2];
    // SAFETY: there is room for two descriptors, which are owned here afterwards.
    unsafe {
        match libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, both.as_mut_ptr()) {
            0 => Ok((OwnedFd::from_raw_fd(both[0]), OwnedFd::from_raw_fd(both[1]))),
            _ => Err(failed()),
        }
    }
}

/// An interpreter that a worker forked. It is killed and waited for when this is dropped, at the latest.
pub(super) struct Process<'a> {
    worker: &'a Worker,
    pid: libc::pid_t,
    /// Readable once the process has ended.
    handle: OwnedFd,
    reaped: bool,
}

/// How an interpreter ended.
pub(super) struct End {
    pub(super) cpu_seconds: f64,
    pub(super) signal: Option<i32>,
    code: i32,
    /// Whether this program sent the signal.
    pub(super) killed: bool,
}

impl End {
    pub(super) fn describe(&self) -> String {
        match self.signal {
            _ if self.killed => "its descriptors were closed".into(),
            Some(signal) => format!("ended by signal {signal}"),
            None => format!("ended with code {} before it had answered", self.code),
        }
    }
}

impl Process<'_> {
    /// CPU seconds used so far.
    pub(super) fn cpu(&self) -> f64 {
        // SAFETY: plain data, written by the call. The process is not waited for yet, so the number is its own.
        unsafe {
            let (mut clock, mut time) = (0, std::mem::zeroed::<libc::timespec>());
            match libc::clock_getcpuclockid(self.pid, &mut clock) == 0 && libc::clock_gettime(clock, &mut time) == 0 {
                true => time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9,
                false => 0.0,
            }
        }
    }
    /// Ends the process and its group. For the time `patience` the process may still end by itself.
    pub(super) fn end(mut self, patience: Duration) -> std::io::Result<End> {
        let mut poll = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which outlives the call.
        let ended = again(|| unsafe { libc::poll(&mut poll, 1, patience.as_millis() as libc::c_int) as isize }) > 0;
        if !ended {
            self.kill();
        }
        let end = self.reap()?;
        Ok(End { killed: !ended, ..end })
    }
    fn kill(&self) {
        // SAFETY: the process is not waited for yet, so the number is its own.
        unsafe {
            libc::kill(-self.pid, libc::SIGKILL);
            libc::kill(self.pid, libc::SIGKILL);
        }
    }
    /// Makes the worker wait for the process. Afterwards its number may belong to another process.
    fn reap(&mut self) -> std::io::Result<End> {
        self.reaped = true;
        let answer = self.worker.ask(format!("W{}", self.pid).as_bytes(), &[])?;
        let numbers: Option<Vec<f64>> = answer.split_whitespace().map(|n| n.parse().ok()).collect();
        let Some([status, cpu_seconds]) = numbers.as_deref() else {
            return Err(std::io::Error::other(format!("a child could not be waited for: {answer}")));
        };
        let status = *status as libc::c_int;
        Ok(End {
            cpu_seconds: *cpu_seconds,
            signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
            code: libc::WEXITSTATUS(status),
            killed: false,
        })
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            let _ = self.reap();
        }
    }
}
