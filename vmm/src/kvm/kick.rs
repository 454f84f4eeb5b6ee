//! Getting a vCPU out of the guest: a signal, and the flag that makes KVM_RUN return at once if the signal was early.
//!
//! Contract: after [`Kick::out`] the vCPU's thread returns from its current KVM_RUN, or from the next one, with EINTR.
//! The flag is the one byte `kvm_run.immediate_exit`, written from another thread as KVM's API intends.
#![allow(
    unsafe_code,
    reason = "a second mapping of the vCPU's kvm_run page; a signal handler"
)]

use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const PAGE: usize = 4096;

/// The flag of one vCPU.
#[derive(Debug)]
pub struct Kick {
    flag: &'static AtomicU8,
}

impl Kick {
    /// Maps the flag of `vcpu`, for the life of the process.
    ///
    /// # Errors
    /// mmap's.
    pub fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, vcpu.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice; it replaces nothing.
        let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the field's offset is 1, inside the page that was just mapped.
        let flag = unsafe { page.cast::<u8>().add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: mapped above, never unmapped, and accessed only atomically from here and by the kernel.
        let flag = unsafe { AtomicU8::from_ptr(flag) };
        Ok(Self { flag })
    }

    /// Gets the vCPU that `thread` runs out of the guest.
    pub fn out(&self, thread: &JoinHandle<()>) {
        self.flag.store(1, Ordering::SeqCst);
        // Fails only when the thread has ended, and then its vCPU is out.
        let _ = thread.kill(SIGRTMIN());
    }
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick's signal harmless. To be called once, before the first kick.
///
/// # Errors
/// sigaction's.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), interrupt).map_err(io::Error::from)
}
