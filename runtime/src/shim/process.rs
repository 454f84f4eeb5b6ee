//! A process as containerd knows it: added, started, ended, asked for until it is deleted.
//!
//! Contract: its end is told only after its start has been, whoever is faster: both take [`Process::gate`].
//! Not here: where its container is in its life, which the sandbox's owner knows.

use std::{
    os::fd::OwnedFd,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{self, watch};

use super::stdio::Paths;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) status: u8,
    pub(super) at: SystemTime,
}

/// One process: init, or what `exec` added.
#[derive(Debug)]
pub(super) struct Process {
    /// Empty for init.
    pub(super) id: String,
    /// Its streams on the host.
    pub(super) paths: Paths,
    /// The `process` object of what `exec` added.
    pub(super) spec: Vec<u8>,
    /// Held from the start until it has been told, and before the end is told.
    pub(super) gate: sync::Mutex<()>,
    started: AtomicBool,
    ended: watch::Sender<Option<Ended>>,
    /// Held for a moment.
    input: Mutex<Input>,
}

/// What keeps a process's input from ending.
#[derive(Debug, Default)]
struct Input {
    keeper: Option<OwnedFd>,
    /// `CloseIO` has been asked for: a client may do that before the process runs.
    is_closed: bool,
}

impl Process {
    /// One that has not been started.
    pub(super) fn new(id: &str, paths: Paths, spec: Vec<u8>) -> Self {
        Self {
            id: id.to_owned(),
            paths,
            spec,
            gate: sync::Mutex::new(()),
            started: AtomicBool::new(false),
            ended: watch::Sender::new(None),
            input: Mutex::default(),
        }
    }

    pub(super) fn is_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    pub(super) fn set_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Tells everyone who waits.
    pub(super) fn end(&self, ended: Ended) {
        self.close_input();
        self.ended.send_replace(Some(ended));
    }

    /// Waits for its end.
    pub(super) async fn wait(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        loop {
            if let Some(ended) = *ended.borrow_and_update() {
                return ended;
            }
            // The sender is `self`'s, and alive.
            if ended.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Holds its input open until [`Process::close_input`].
    pub(super) fn hold_input(&self, keeper: Option<OwnedFd>) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if !input.is_closed {
            input.keeper = keeper;
        }
    }

    /// Ends its input once all other writers have gone.
    pub(super) fn close_input(&self) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        *input = Input {
            keeper: None,
            is_closed: true,
        };
    }
}

/// A moment as protobuf has it.
pub(super) fn timestamp(moment: SystemTime) -> Timestamp {
    let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Less than 10^9.
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn everyone_who_waits_learns_the_end_however_late() {
        let process = Process::new("e", Paths::default(), Vec::new());
        let ended = Ended {
            status: 3,
            at: UNIX_EPOCH,
        };
        let early = process.wait();
        process.end(ended);
        assert_eq!(early.await, ended);
        assert_eq!(process.wait().await, ended);
        assert_eq!(process.ended(), Some(ended));
    }

    #[test]
    fn input_that_is_closed_before_the_process_runs_is_not_held() {
        let process = Process::new("e", Paths::default(), Vec::new());
        process.close_input();
        let (mut reader, writer) = std::io::pipe().unwrap();
        process.hold_input(Some(writer.into()));
        assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn moments_are_in_seconds_and_nanoseconds() {
        let told = timestamp(UNIX_EPOCH + Duration::new(5, 7));
        assert_eq!((told.seconds, told.nanos), (5, 7));
    }
}
