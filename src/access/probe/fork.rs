//! One piece of work in a fork of this process, under limits.
//!
//! The fork starts where this process stands, with ONNX Runtime loaded: that costs a millisecond instead of the
//! fifty of a new process. It is as separate as one: what it breaks, leaks or hangs is its own. Only a process of one
//! thread may do this (the others' locks would stay locked for ever in the fork), so it is refused elsewhere.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::{ANSWER_LIMIT, ProbeLimits};
use crate::error::{Error, Result};

/// How the work ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With what it returned, or less when it died on the way.
    Exited(ExitStatus, Vec<u8>),
    /// It had to be killed when its time on the clock was over.
    Late,
}

/// Does `work` in a fork under `limits`; what it returns comes back as bytes.
///
/// # Errors
/// When this process has other threads, or cannot fork.
pub(super) fn in_fork(limits: &ProbeLimits, work: impl FnOnce() -> String) -> Result<Ended> {
    let failed = |error: std::io::Error| Error::internal(format!("cannot fork: {error}"));
    if threads() != Some(1) {
        return Err(Error::internal("a process with other threads cannot try a model in a fork"));
    }
    let (mut reader, mut writer) = std::io::pipe().map_err(failed)?;
    let deadline = Instant::now() + Duration::from_secs(limits.wall_s);
    // SAFETY: this process has one thread (checked above), so no lock is held by a thread that the fork lacks,
    // and the child may go on as any process of one thread.
    #[allow(unsafe_code)]
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(failed(std::io::Error::last_os_error())),
        0 => {
            drop(reader);
            let done = catch_unwind(AssertUnwindSafe(|| {
                restrict(limits).is_ok() && writer.write_all(work().as_bytes()).is_ok()
            }));
            let code = if matches!(done, Ok(true)) { 0 } else { 101 };
            // SAFETY: never returns: the fork must neither run the destructors nor the loop of its parent.
            #[allow(unsafe_code)]
            unsafe {
                libc::_exit(code)
            }
        }
        child => {
            drop(writer);
            let bytes = read_until(&mut reader, deadline);
            let status = bytes.as_ref().and_then(|_| wait_until(child, deadline));
            match bytes.zip(status) {
                Some((bytes, status)) => Ok(Ended::Exited(status, bytes)),
                None => {
                    kill(child);
                    Ok(Ended::Late)
                }
            }
        }
    }
}

/// Threads of this process; `None` where nobody says.
fn threads() -> Option<usize> {
    if cfg!(target_os = "linux") {
        Some(std::fs::read_dir("/proc/self/task").ok()?.count())
    } else {
        // The verb that ends up here starts none.
        Some(1)
    }
}

/// Applies `limits` to this process, which dies with its parent where the system can do that.
fn restrict(limits: &ProbeLimits) -> std::io::Result<()> {
    let values = [
        (libc::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        // The soft limit sends SIGXCPU, the hard one kills a second later.
        (libc::RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1),
        (libc::RLIMIT_CORE, 0, 0),
        (libc::RLIMIT_FSIZE, 0, 0),
    ];
    for (resource, soft, hard) in values {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: `limit` is a valid rlimit for the duration of the call.
        #[allow(unsafe_code)]
        if unsafe { libc::setrlimit(resource, &raw const limit) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    #[cfg(target_os = "linux")]
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
    #[allow(unsafe_code)]
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    Ok(())
}

/// What comes out of the pipe until it closes; `None` after `deadline`.
fn read_until(reader: &mut std::io::PipeReader, deadline: Instant) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1 << 12];
    loop {
        let left = deadline.checked_duration_since(Instant::now())?;
        let mut wanted = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let left = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX).max(1);
        // SAFETY: `wanted` is one valid pollfd for the duration of the call.
        #[allow(unsafe_code)]
        let ready = unsafe { libc::poll(&raw mut wanted, 1, left) };
        if ready <= 0 {
            continue; // The time is over, or a signal came.
        }
        match reader.read(&mut chunk) {
            Ok(0) => return Some(bytes),
            Ok(read) if bytes.len() + read <= ANSWER_LIMIT => {
                bytes.extend_from_slice(&chunk[..read])
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // Longer than any answer of ours: as if there were none.
            _ => return Some(Vec::new()),
        }
    }
}

/// The exit status of `child`; `None` after `deadline`.
fn wait_until(child: libc::pid_t, deadline: Instant) -> Option<ExitStatus> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for the duration of the call; `child` is ours and not yet waited for.
        #[allow(unsafe_code)]
        let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
        if ended == child {
            return Some(ExitStatus::from_raw(status));
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn kill(child: libc::pid_t) {
    let mut status = 0;
    // SAFETY: `child` is ours and not yet waited for, so its number is nobody else's; `status` is valid.
    #[allow(unsafe_code)]
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, &raw mut status, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test's own threads are enough to be refused; what a fork does is seen from outside, in `tests/it/probe`.
    #[test]
    #[cfg(target_os = "linux")] // Elsewhere nobody counts the threads.
    fn a_process_with_other_threads_does_not_fork() {
        let other = std::thread::spawn(std::thread::park);
        let limits = ProbeLimits { memory_bytes: 1 << 30, cpu_s: 1, wall_s: 1 };
        let error = in_fork(&limits, String::new).unwrap_err();
        assert!(error.to_string().contains("other threads"), "{error}");
        other.thread().unpark();
        other.join().unwrap();
    }
}
