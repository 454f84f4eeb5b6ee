//! The one way in which a VM ends: any thread names a cause, the first one wins, the main thread is woken.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use caisson_vmm_spec::Cause;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::fds::borrow;

/// Why the VM ends, and one line about it for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The cause, which is also the exit status.
    pub cause: Cause,
    /// One line for people.
    pub message: String,
}

/// Where threads report the end. Shared by reference count.
#[derive(Debug)]
pub struct Ending {
    first: Mutex<Option<End>>,
    wake: EventFd,
}

impl Ending {
    /// An end that has not come yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            first: Mutex::default(),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    /// Ends the VM. Only the first call counts.
    pub fn report(&self, cause: Cause, message: impl Into<String>) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(End {
                cause,
                message: message.into(),
            });
        }
        // Fails only when the counter is full, and then the main thread is awake already.
        let _ = self.wake.write(1);
    }

    /// The end, once it has been reported.
    pub fn reported(&self) -> Option<End> {
        self.first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl AsFd for Ending {
    /// Readable once the end has been reported.
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.wake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_wins() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.reported(), None);
        ending.report(Cause::GuestPanic, "panic");
        ending.report(Cause::GuestReset, "reset");
        assert_eq!(ending.reported().unwrap().cause, Cause::GuestPanic);
    }
}
