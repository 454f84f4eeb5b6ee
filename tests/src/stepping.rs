//! `kill -9` of a process before a system call of its own: the moments of a step are counted, not timed.
//!
//! Contract: a process's first thread stops where it begins and where it ends a system call, for as long as a step takes;
//! its other threads, and what it starts, run as ever. A process of the runtime does on that thread what a step asks of it.
//! Two runs of a step have nearly the same stops, so a share of their number is the same moment of the step in each.
//! Threads: whoever calls [`step`] traces, so the step's program must be that thread's child, and its only one then.
//! Spec: ptrace(2), `PTRACE_SEIZE` and `PTRACE_SYSCALL`.

use nix::libc::PTRACE_EVENT_EXEC;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::Running;

/// What has become of the victim.
pub struct Taken {
    /// How often the victim stopped.
    pub stops: u32,
    /// Whether it was killed.
    pub killed: bool,
}

/// Who is watched in a step.
pub enum Victim {
    /// A process that is there before.
    Process(rustix::process::Pid),
    /// The step's own program, a call that [`crate::Call::held`] has made.
    Caller,
}

/// Takes a step, and kills the victim where it stops for the `at`-th time. The step's program has ended then, or will.
///
/// # Panics
///
/// If the victim may not be traced, or is not there.
pub fn step(victim: &Victim, at: Option<u32>, start: impl FnOnce() -> Running) -> (Running, Taken) {
    let (mut running, mut tracee);
    match victim {
        Victim::Process(pid) => {
            tracee = Tracee::seize(*pid);
            running = start();
        }
        Victim::Caller => {
            running = start();
            tracee = Tracee::seize(running.pid());
            // It goes on at the end of its input.
            drop(running.take_stdin());
        }
    }
    let killed = tracee.run(pid_of(running.pid()), at);
    let stops = tracee.stops;
    (running, Taken { stops, killed })
}

fn pid_of(pid: rustix::process::Pid) -> Pid {
    Pid::from_raw(pid.as_raw_pid())
}

/// A traced process, by its first thread.
struct Tracee {
    pid: Pid,
    stops: u32,
}

impl Tracee {
    fn seize(pid: rustix::process::Pid) -> Self {
        let pid = pid_of(pid);
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACEEXEC;
        ptrace::seize(pid, options).expect("trace the victim");
        ptrace::interrupt(pid).expect("stop the victim");
        waitpid(pid, Some(WaitPidFlag::__WALL)).expect("the victim");
        let this = Self { pid, stops: 0 };
        this.go_on(None);
        this
    }

    /// To the next stop; one that has been killed meanwhile has its end still to be told.
    fn go_on(&self, signal: Option<Signal>) {
        let _ = ptrace::syscall(self.pid, signal);
    }

    /// Until the step's program ends, or the victim; true if it was killed.
    fn run(&mut self, program: Pid, at: Option<u32>) -> bool {
        let any = WaitPidFlag::WEXITED
            | WaitPidFlag::WSTOPPED
            | WaitPidFlag::WNOWAIT
            | WaitPidFlag::__WALL
            | WaitPidFlag::__WNOTHREAD;
        loop {
            let next = waitid(Id::All, any).expect("a child");
            let has_ended = matches!(next, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
            if has_ended && next.pid() == Some(program) {
                // Whoever has started it asks for its status.
                if program != self.pid {
                    self.let_go();
                }
                return false;
            }
            match waitpid(self.pid, Some(WaitPidFlag::__WALL)).expect("the victim") {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return false,
                WaitStatus::PtraceSyscall(_) => {
                    self.stops += 1;
                    if at == Some(self.stops) {
                        kill(self.pid, Signal::SIGKILL).expect("kill");
                        if program != self.pid {
                            self.see_the_end();
                        }
                        return true;
                    }
                    self.go_on(None);
                }
                WaitStatus::PtraceEvent(_, _, PTRACE_EVENT_EXEC) => {
                    self.stops = 0;
                    self.go_on(None);
                }
                WaitStatus::Stopped(_, signal) => self.go_on(Some(signal)),
                _ => self.go_on(None),
            }
        }
    }

    /// Its parent hears of it then.
    fn see_the_end(&self) {
        while let Ok(status) = waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
            if matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {
                return;
            }
        }
    }

    fn let_go(&self) {
        // Fails where it has ended; then that is what is told next.
        let _ = ptrace::interrupt(self.pid);
        if let Ok(status) = waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
            let signal = match status {
                WaitStatus::Stopped(_, signal) => Some(signal),
                _ => None,
            };
            let _ = ptrace::detach(self.pid, signal);
        }
    }
}
