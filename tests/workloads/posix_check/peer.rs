//! Further processes of a check, and other users: a closure runs in a forked child and its verdict comes back.
//!
//! All of them are in the process group of the check, which the runner kills when the check is over, so none is left
//! behind. `Gate` lets processes wait for each other without sleeping.

use std::os::fd::OwnedFd;
use std::process;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Gid, Uid, chown};
use rustix::io::{Errno, read, write};
use rustix::pipe::pipe;
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::sys;
use crate::verdict::{Fail, Verdict};

/// Longest message of a verdict: less than a pipe holds, so that the child never waits for a reader.
const MESSAGE: usize = 4000;

/// A forked child that runs a closure.
pub(crate) struct Peer {
    pub(crate) pid: Pid,
    message: OwnedFd,
}

/// Runs `part` in a child.
pub(crate) fn start(part: impl FnOnce() -> Verdict) -> Result<Peer, Errno> {
    let (message, answer) = pipe()?;
    let Some(pid) = sys::fork()? else {
        drop(message);
        let code = match part() {
            Ok(()) => 0,
            Err(Fail(text)) => {
                let len = text.len().min(MESSAGE);
                // Whoever would read this reports the exit status if it does not come.
                let _ = write(&answer, &text.as_bytes()[..len]);
                1
            }
        };
        process::exit(code);
    };
    Ok(Peer { pid, message })
}

impl Peer {
    /// Waits for the child; its verdict, or how it died instead.
    pub(crate) fn join(self) -> Verdict {
        let status = self.wait()?;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => Ok(()),
            (Some(1), _) => {
                let mut text = vec![0; MESSAGE];
                let len = read(&self.message, &mut text[..])?;
                Err(Fail(String::from_utf8_lossy(&text[..len]).into_owned()))
            }
            (Some(code), _) => Err(Fail(format!("the process ended with status {code}"))),
            (_, Some(14)) => Err(Fail(
                "expected an end in time got none (killed by SIGALRM)".to_owned(),
            )),
            (_, signal) => Err(Fail(format!(
                "the process was killed by signal {}",
                signal.unwrap_or(0)
            ))),
        }
    }

    /// Waits for the child; how it ended.
    pub(crate) fn wait(&self) -> Result<WaitStatus, Errno> {
        loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(Some((_, status))) => return Ok(status),
                Ok(None) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// An unprivileged user.
#[derive(Clone, Copy)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: &'static [u32],
}

pub(crate) const ALICE: User = User {
    uid: 1001,
    gid: 1001,
    groups: &[],
};
pub(crate) const BOB: User = User {
    uid: 1002,
    gid: 1002,
    groups: &[],
};
/// A group in which `ALICE_IN_CREW` is besides her own.
pub(crate) const CREW: u32 = 2000;
pub(crate) const ALICE_IN_CREW: User = User {
    uid: 1001,
    gid: 1001,
    groups: &[CREW],
};

impl User {
    /// Runs `part` in a child as this user; its verdict.
    pub(crate) fn run(self, part: impl FnOnce() -> Verdict) -> Verdict {
        self.start(part)?.join()
    }

    /// Runs `part` in a child as this user.
    pub(crate) fn start(self, part: impl FnOnce() -> Verdict) -> Result<Peer, Errno> {
        start(move || {
            self.become_it()?;
            part()
        })
    }

    fn become_it(self) -> Result<(), Errno> {
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(&groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    }

    /// Makes this user the owner of `path`.
    pub(crate) fn own(self, path: &str) -> Result<(), Errno> {
        chown(
            path,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )
    }
}

/// Runs `part` in a child as root without `lost`; its verdict.
pub(crate) fn root_without(lost: CapabilitySet, part: impl FnOnce() -> Verdict) -> Verdict {
    start(move || {
        let held = capabilities(None)?;
        let sets = CapabilitySets {
            effective: held.effective - lost,
            permitted: held.permitted - lost,
            inheritable: held.inheritable - lost,
        };
        set_capabilities(None, sets)?;
        part()
    })?
    .join()
}

/// A door between processes, shut until somebody opens it once; made before the fork.
pub(crate) struct Gate {
    inside: OwnedFd,
    outside: OwnedFd,
}

impl Gate {
    pub(crate) fn new() -> Result<Self, Errno> {
        let (inside, outside) = pipe()?;
        Ok(Self { inside, outside })
    }

    /// Lets one waiting process through.
    pub(crate) fn open(&self) -> Result<(), Errno> {
        write(&self.outside, b"!").map(drop)
    }

    /// Waits until it is open.
    pub(crate) fn wait(&self) -> Result<(), Errno> {
        read(&self.inside, &mut [0; 1][..]).map(drop)
    }

    /// Whether it is still shut after `milliseconds`: shows that the other side is blocked.
    pub(crate) fn stays_shut(&self, milliseconds: i64) -> Result<bool, Errno> {
        let mut polled = [PollFd::new(&self.inside, PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        Ok(poll(&mut polled, Some(&timeout))? == 0)
    }
}
