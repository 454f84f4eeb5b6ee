//! The virtual machine of one sandbox: a function from a `VmSpec` and open descriptors to an exit status.
//!
//! Contract: after start nothing is opened by path. What the guest writes (rings, descriptors, registers, packets) is
//! parsed once into checked types in `virtio::{chain, mmio}` and `devices::*::wire`; it can stop its own devices, and
//! nothing else. Threads: main (control socket), one per vCPU, one for the io devices, and one per virtio-fs share.
//! Not here: how the host prepares files, taps and directories (`runtime`).

pub mod boot;
pub mod bus;
pub mod console;
pub mod control;
pub mod counters;
pub mod devices;
pub mod ending;
pub mod fds;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod kvm;
pub mod log;
pub mod machine;
pub mod memory;
pub mod milestones;
pub mod virtio;
