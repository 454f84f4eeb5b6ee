//! The virtio devices, one folder or file each. A device supplies queue processing and nothing else: the transport,
//! the thread and the interrupts are `crate::virtio`'s.
pub mod fs;
