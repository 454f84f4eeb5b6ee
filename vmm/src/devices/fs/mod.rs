//! virtio-fs: a directory of the host, shared with the guest under a tag.
//!
//! | file | is |
//! |---|---|
//! | `server.rs` | the seam: a chain in, a reply length out; virtiofsd behind it |
//! | `guard.rs` | what stands in front of virtiofsd's file system |
//! | `operations.rs` | every operation, through the guard |
//! | `checks.rs` | what a request may say |
//! | `coherence.rs` | what the guest may cache |
//! | `own.rs` | trees that the guest may believe for longer |
//! | `pins.rs` | removed files that are still in use |
//! | `wire.rs` | messages without a reply |
//! | `thread.rs` | what a serving thread must be |
//! | `view.rs` | guest memory under virtiofsd's type (`unsafe`) |
//!
//! Contract: queue 0 is the high-priority queue, the others carry requests. One queue for requests, because the device
//! has one thread; more threads would be more devices' worth of `FsServer` callers, which it allows.
//! The device sits on a thread of its own: requests block on the host's file system. Descriptors of the host: one per
//! open file of the guest; known but closed files cost none where the host's file system has file handles, else one.
//! Mounts that appear below the share on the host later are served, and shown to the guest as mounts of their own.
//! Spec: virtio 1.2, 5.11.

mod checks;
mod coherence;
mod guard;
mod operations;
mod own;
mod pins;
mod server;
mod thread;
mod view;
mod wire;

use std::io;
use std::os::fd::OwnedFd;

use caisson_vmm_spec::{OwnTrees, ShareSpec};

use crate::counters::{Counter, Counters};
use crate::memory::Mem;
use crate::milestones::Milestones;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, Io};

use server::FsServer;

const VIRTIO_ID_FS: u32 = 26;
const TAG_BYTES: usize = 36;
const HIGH_PRIORITY: usize = 0;
const REQUEST_QUEUES: u32 = 1;
/// The high-priority queue, then the request queues.
const QUEUE_SIZES: [u16; 1 + REQUEST_QUEUES as usize] = [128, 1024];

/// The tag does not fit: 1 to 36 bytes.
#[derive(Debug, thiserror::Error)]
#[error("virtio-fs tag {tag:?}: 1 to 36 bytes are needed")]
pub struct TagError {
    tag: String,
}

/// A shared directory.
pub struct Fs {
    name: String,
    config: ConfigSpace,
    root: OwnedFd,
    mem: Mem,
    chain: Chain,
    descriptors: u64,
    own: Option<OwnTrees>,
    requests: Counter,
    milestones: Milestones,
    /// There from `enter_thread` on.
    server: Option<FsServer>,
}

impl Fs {
    /// The directory `root` as `spec` has it. Raises the process's limit of descriptors to what the host allows.
    ///
    /// # Errors
    /// [`TagError`].
    pub fn new(
        name: &str,
        spec: &ShareSpec,
        root: OwnedFd,
        mem: &Mem,
        counters: &Counters,
    ) -> Result<Self, TagError> {
        Ok(Self {
            name: name.into(),
            config: ConfigSpace::read_only(config_space(&spec.tag)?),
            root,
            mem: mem.clone(),
            chain: Chain::new(mem),
            descriptors: thread::raise_descriptor_limit(),
            own: spec.own.clone(),
            requests: counters.register(format!("{name}.requests")),
            milestones: Milestones::default(),
            server: None,
        })
    }

    /// Notes how far the guest's boot has come.
    #[must_use]
    pub fn noting(mut self, milestones: &Milestones) -> Self {
        self.milestones = milestones.clone();
        self
    }
}

/// `struct virtio_fs_config`: the tag, padded with zeros, and the number of request queues.
fn config_space(tag: &str) -> Result<Vec<u8>, TagError> {
    if !(1..=TAG_BYTES).contains(&tag.len()) {
        return Err(TagError { tag: tag.into() });
    }
    let mut bytes = tag.as_bytes().to_vec();
    bytes.resize(TAG_BYTES, 0);
    bytes.extend(REQUEST_QUEUES.to_le_bytes());
    Ok(bytes)
}

impl Device for Fs {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn enter_thread(&mut self) -> io::Result<()> {
        thread::enter(&self.root)?;
        self.server = Some(FsServer::start(
            &self.mem,
            self.descriptors,
            self.own.take(),
        )?);
        Ok(())
    }

    fn activate(&mut self, _: &mut Io) -> Result<(), DeviceError> {
        self.milestones.drivers();
        Ok(())
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let Some(server) = &self.server else {
            return Ok(());
        };
        let Some(queue) = io.queues.get_mut(index) else {
            return Ok(());
        };
        if index == HIGH_PRIORITY {
            while queue.pop(&mut self.chain)? {
                server.forget(&self.chain)?;
                queue.push(self.chain.head(), 0)?;
            }
            return Ok(());
        }
        while let Some(chain) = queue.pop_raw()? {
            self.milestones.mounted();
            self.requests.add(1);
            let head = chain.head_index();
            let written = server.request(chain)?;
            queue.push(head, written)?;
        }
        Ok(())
    }

    fn reset(&mut self, _: &mut Io) {
        if let Some(server) = &self.server {
            server.reset();
        }
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub use session::fuzz;

#[cfg(any(test, feature = "fuzzing"))]
mod session;
#[cfg(test)]
mod tests;
