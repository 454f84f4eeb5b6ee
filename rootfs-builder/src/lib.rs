//! Builds the guest's initial root file system: the agent as `/init`, and the few directories it mounts upon.
//!
//! Contract: the archive is a function of the agent's bytes alone. No time, user, inode or host path enters it.

pub mod cpio;
pub mod initramfs;
