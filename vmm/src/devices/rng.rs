//! virtio entropy device: the host kernel's random bytes, on demand.
//!
//! Contract: at most [`MAX_BYTES`] a chain, whatever its size. Spec: virtio 1.2, 5.4.

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::memory::Mem;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, Io};

/// The most bytes given for one chain.
pub const MAX_BYTES: usize = 256;
const QUEUES: &[u16] = &[16];

/// The entropy device.
#[derive(Debug)]
pub struct Rng {
    config: ConfigSpace,
    chain: Chain,
}

impl Rng {
    /// A device for a guest with this memory.
    pub fn new(mem: &Mem) -> Self {
        Self {
            config: ConfigSpace::default(),
            chain: Chain::new(mem),
        }
    }
}

impl Device for Rng {
    fn name(&self) -> &str {
        "rng"
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, _io: &mut Io) -> Result<(), DeviceError> {
        Ok(())
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let queue = &mut io.queues[index];
        while queue.pop(&mut self.chain)? {
            let mut bytes = [0; MAX_BYTES];
            let len = self.chain.writable_len().min(MAX_BYTES);
            // Up to 256 bytes are always given whole once the host's pool is ready.
            let host = |errno: rustix::io::Errno| DeviceError::Host {
                step: "read random bytes",
                source: errno.into(),
            };
            let got = getrandom(&mut bytes[..len], GetRandomFlags::empty()).map_err(host)?;
            self.chain.write(0, &bytes[..got])?;
            // At most MAX_BYTES.
            queue.push(self.chain.head(), u32::try_from(got).unwrap_or(0))?;
        }
        Ok(())
    }

    fn reset(&mut self, _io: &mut Io) {}
}
