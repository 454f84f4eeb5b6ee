//! The way out of the VM: the VMM's power port.
//!
//! Contract: [`off`] does not return. Outside a guest (tests) the port is not there: the process ends instead.
#![allow(unsafe_code, reason = "port I/O")]

use caisson_agent_api::{POWER_OFF, POWER_PORT};
use std::arch::asm;

/// Writes the file systems back and ends the VM.
pub fn off() -> ! {
    rustix::fs::sync();
    // SAFETY: ioperm(2) takes numbers only; it opens one port for this thread.
    let allowed = unsafe { libc::ioperm(POWER_PORT.into(), 1, 1) } == 0;
    if allowed && rustix::process::getpid().is_init() {
        // SAFETY: the port was opened above; a byte written there touches no memory of this process.
        unsafe {
            asm!("out dx, al", in("dx") POWER_PORT, in("al") POWER_OFF,
                 options(nomem, nostack, preserves_flags));
        }
    }
    // Still here: a VMM without the port, or no VM at all. The end of PID 1 makes the kernel panic, which ends a VM.
    std::process::exit(1)
}
