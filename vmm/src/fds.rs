//! The descriptors that the VMM inherits: taken over by number, once each, as owned files.
//!
//! Contract: only numbers that the spec names are touched; each must be open, above [`SPEC_FD`] and named once. They
//! become close-on-exec.
#![allow(unsafe_code, reason = "inherited descriptors are known by number only")]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use caisson_vmm_spec::{Fd, SPEC_FD};
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

/// A descriptor that cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// Standard streams and the spec itself are no devices.
    #[error("{what}: descriptor {fd} is reserved")]
    Reserved {
        /// What it was for.
        what: &'static str,
        /// Its number.
        fd: i32,
    },
    /// Two things cannot own one descriptor.
    #[error("{what}: descriptor {fd} is named twice")]
    Twice {
        /// What it was for the second time.
        what: &'static str,
        /// Its number.
        fd: i32,
    },
    /// It was not inherited.
    #[error("{what}: descriptor {fd} is not open")]
    Closed {
        /// What it was for.
        what: &'static str,
        /// Its number.
        fd: i32,
    },
}

/// Takes inherited descriptors over.
#[derive(Debug, Default)]
pub struct Inherited {
    taken: BTreeSet<i32>,
}

impl Inherited {
    /// The spec's own descriptor. To be called once, first.
    ///
    /// # Errors
    /// [`FdError::Closed`].
    pub fn spec(&mut self) -> Result<File, FdError> {
        self.own("the spec", SPEC_FD).map(File::from)
    }

    /// Takes over the descriptor for `what`.
    ///
    /// # Errors
    /// All of [`FdError`].
    pub fn take(&mut self, what: &'static str, Fd(fd): Fd) -> Result<OwnedFd, FdError> {
        if fd <= SPEC_FD {
            return Err(FdError::Reserved { what, fd });
        }
        self.own(what, fd)
    }

    fn own(&mut self, what: &'static str, fd: i32) -> Result<OwnedFd, FdError> {
        if self.taken.contains(&fd) {
            return Err(FdError::Twice { what, fd });
        }
        // SAFETY: fcntl with F_SETFD reads its integer arguments only; a wrong number is an error.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(FdError::Closed { what, fd });
        }
        self.taken.insert(fd);
        // SAFETY: open (just checked), and owned by nobody: this process was started with it, `taken` says it was not
        // taken before, and the process opens nothing of its own before it has taken all that its spec names.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The KVM device behind an open descriptor.
pub fn kvm(fd: OwnedFd) -> Kvm {
    // SAFETY: the number comes from an `OwnedFd` that is given up here.
    unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of an eventfd, as a borrow: the crate that makes them gives only its number.
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: an `EventFd` keeps its descriptor open for as long as it lives, and the borrow is no longer than that.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_it_is_open() {
        let mut inherited = Inherited::default();
        let file = File::open("/dev/null").unwrap();
        let fd = rustix::io::fcntl_dupfd_cloexec(&file, SPEC_FD + 1)
            .unwrap()
            .into_raw_fd();
        assert_eq!(
            inherited.take("x", Fd(2)).unwrap_err(),
            FdError::Reserved { what: "x", fd: 2 }
        );
        assert_eq!(
            inherited.take("x", Fd(i32::MAX)).unwrap_err(),
            FdError::Closed {
                what: "x",
                fd: i32::MAX
            }
        );
        let _owned = inherited.take("x", Fd(fd)).unwrap();
        assert_eq!(
            inherited.take("y", Fd(fd)).unwrap_err(),
            FdError::Twice { what: "y", fd }
        );
    }
}
