//! Who takes the VM apart once the VMM has ended: the kernel, in its own time.
//!
//! Whoever drops the last reference to a VM waits in the kernel until the shadow pages of the guest are free: a grace
//! period of RCU, ten milliseconds and more, in which the process can neither end nor be waited for. The guest's memory
//! is given back before that and does not depend on it. A ring of io_uring keeps a reference to the files that are
//! registered with it, and the kernel drops those in a worker of its own after the ring was closed.
//!
//! Contract: with a [`Keeper`] the process's end does not wait; without (io_uring is switched off on this host) it does,
//! and nothing else differs. The ring is made disabled and stays so: no request can ever be submitted to it.
#![allow(
    unsafe_code,
    reason = "rings may work on memory behind the program's back"
)]

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io_uring::{
    IoringRegisterOp, IoringSetupFlags, io_uring_params, io_uring_register, io_uring_setup,
};

/// Keeps a VM until a worker of the kernel takes it apart. Dropped before the process ends, it only costs that worker.
#[derive(Debug)]
pub(super) struct Keeper {
    _ring: OwnedFd,
}

impl Keeper {
    /// A keeper of `vm`, where the host allows one.
    pub(super) fn of(vm: &impl AsRawFd) -> Option<Self> {
        let mut params = io_uring_params::default();
        params.flags = IoringSetupFlags::R_DISABLED;
        // SAFETY: nothing maps this ring's queues, and while it is disabled it takes no requests: it touches no memory.
        let ring = unsafe { io_uring_setup(1, &mut params) }.ok()?;
        let files = [vm.as_raw_fd()];
        let (op, list) = (IoringRegisterOp::RegisterFiles, files.as_ptr().cast());
        // SAFETY: the kernel reads one descriptor from `files`, during the call.
        unsafe { io_uring_register(&ring, op, list, 1) }.ok()?;
        Some(Self { _ring: ring })
    }
}
