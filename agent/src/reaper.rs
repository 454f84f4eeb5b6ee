//! The end of processes: SIGCHLD, and who waits for it.
//!
//! Contract: every child of PID 1 is reaped, whoever's it was. A process that is being made is announced with
//! [`Reaper::birth`] before it can exist, so that its end is not lost however soon it comes.
//! Nothing is polled: [`Reaper::run`] wakes on SIGCHLD.

use rustix::process::{WaitOptions, WaitStatus, wait};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

#[derive(Default)]
struct Ends {
    /// Who waits for whom.
    expected: HashMap<i32, oneshot::Sender<u32>>,
    /// Ends that nobody has asked for yet, kept while something is being born.
    unclaimed: HashMap<i32, u32>,
    births: usize,
}

/// Collects ended processes.
#[derive(Clone, Default)]
pub struct Reaper {
    // No await while it is held; no other lock is taken inside.
    ends: Arc<Mutex<Ends>>,
}

/// The announcement of a process to come.
pub struct Birth {
    reaper: Reaper,
}

/// 0..=255, or 128 and the signal: what a shell would call it.
fn exit_code(status: WaitStatus) -> Option<u32> {
    let code = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|s| 128 + s))?;
    u32::try_from(code).ok()
}

impl Reaper {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a process that is about to be made.
    pub fn birth(&self) -> Birth {
        self.ends().births += 1;
        Birth {
            reaper: self.clone(),
        }
    }

    /// Reaps for ever.
    pub async fn run(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(code) = exit_code(status) {
                self.ended(pid.as_raw_nonzero().get(), code);
            }
        }
    }

    fn ended(&self, pid: i32, code: u32) {
        let mut ends = self.ends();
        match ends.expected.remove(&pid) {
            // Nobody left to hear it is fine.
            Some(waiting) => drop(waiting.send(code)),
            None if ends.births > 0 => drop(ends.unclaimed.insert(pid, code)),
            None => {}
        }
    }
}

impl Birth {
    /// The end of the process that was announced, now that its identifier is known.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<u32> {
        let (sender, receiver) = oneshot::channel();
        let mut ends = self.reaper.ends();
        match ends.unclaimed.remove(&pid) {
            Some(code) => drop(sender.send(code)),
            None => drop(ends.expected.insert(pid, sender)),
        }
        receiver
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut ends = self.reaper.ends();
        ends.births -= 1;
        if ends.births == 0 {
            ends.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_before_the_claim_is_not_lost() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        reaper.ended(7, 3);
        assert_eq!(birth.claim(7).try_recv(), Ok(3));
    }

    #[test]
    fn an_end_after_the_claim_is_told() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        let mut end = birth.claim(7);
        drop(birth);
        reaper.ended(8, 1);
        reaper.ended(7, 137);
        assert_eq!(end.try_recv(), Ok(137));
    }

    #[test]
    fn strangers_are_forgotten_when_nothing_is_being_born() {
        let reaper = Reaper::default();
        let birth = reaper.birth();
        reaper.ended(9, 0);
        drop(birth);
        reaper.ended(10, 0);
        assert!(reaper.ends().unclaimed.is_empty());
    }
}
