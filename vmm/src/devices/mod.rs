//! The virtio devices, one folder or file each. A device supplies queue processing and nothing else: the transport,
//! the thread and the interrupts are `crate::virtio`'s.

pub mod balloon;
pub mod block;
#[cfg(any(test, feature = "fuzzing"))]
pub mod driver;
pub mod fs;
pub mod mem;
pub mod net;
pub mod rng;
pub mod vsock;
