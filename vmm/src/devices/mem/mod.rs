//! virtio-mem: memory that comes and goes while the guest runs.
//!
//! | file | is |
//! |---|---|
//! | `wire.rs` | the guest's requests, checked |
//! | `growth.rs` | how much the guest is to have and has; who reaches which memory |
//!
//! Contract: a device of no kind until the owner asks for the first growth ([`Growth::ask`]); then the guest's agent binds
//! the driver. What is not plugged is memory for no device (`memory::Room`), and for the guest only as far as its chunk has
//! another block that is plugged; the driver has to know that (UNPLUGGED_INACCESSIBLE).
//! A request of another size is a fault; one that makes no sense is refused as the specification says.
//! Spec: virtio 1.2, 5.15.

mod growth;
mod wire;

use crate::counters::{Counter, Counters};
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, GuestFault, Io};

pub use growth::{Growth, Slots, Tell};
use wire::{REQUEST_BYTES, RESPONSE_BYTES, Response};

/// The device's kind once memory has been asked for.
pub const VIRTIO_ID_MEM: u32 = 24;
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Linux has one request on its way.
const QUEUE_SIZES: [u16; 1] = [16];

/// The device.
pub struct MemoryDevice {
    growth: Growth,
    chain: Chain,
    requests: Counter,
}

impl MemoryDevice {
    /// The device that does what `growth` says.
    pub fn new(growth: Growth, counters: &Counters) -> Self {
        Self {
            chain: Chain::new(growth.mem()),
            growth,
            requests: counters.register("mem.requests"),
        }
    }
}

/// Carries the chain's request out and answers it.
fn serve(growth: &Growth, chain: &Chain) -> Result<u32, GuestFault> {
    let raw: [u8; REQUEST_BYTES] = chain.read_array(0)?;
    // Looked at first: a request that cannot be answered is not carried out.
    if chain.writable_len() < RESPONSE_BYTES {
        return Err(GuestFault::Short {
            need: RESPONSE_BYTES,
            got: chain.writable_len(),
        });
    }
    let response = wire::parse(&raw, growth.mem().room())
        .map_or(Response::Error, |request| growth.obey(&request));
    chain.write(0, &response.bytes())?;
    // 10: fits.
    Ok(u32::try_from(RESPONSE_BYTES).unwrap_or(0))
}

impl Device for MemoryDevice {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn id(&self) -> u32 {
        0
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        self.growth.config()
    }

    fn activate(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        if io.features & 1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(GuestFault::Protocol("a driver that reads unplugged memory").into());
        }
        Ok(())
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(index) else {
            return Ok(());
        };
        while queue.pop(&mut self.chain)? {
            self.requests.add(1);
            let written = serve(&self.growth, &self.chain)?;
            queue.push(self.chain.head(), written)?;
        }
        Ok(())
    }

    // What is plugged stays so: the guest's kernel uses it, whatever becomes of its driver.
    fn reset(&mut self, _: &mut Io) {}
}

#[cfg(any(test, feature = "fuzzing"))]
mod session;
#[cfg(any(test, feature = "fuzzing"))]
pub use session::fuzz;
#[cfg(test)]
mod tests;
