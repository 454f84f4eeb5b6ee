//! A guest with a memory device, for tests and the fuzz target.

use std::sync::{Arc, Mutex, PoisonError};

use caisson_vmm_spec::{MemorySpec, MiB};
use vm_memory::{Bytes, GuestAddress};

use super::{Growth, Slots, serve};
use crate::fuzzing::Image;
use crate::memory::{self, BLOCK_BYTES, CHUNK_BYTES, Mem};
use crate::virtio::{Chain, GuestFault};

/// Size of the room.
pub(super) const ROOM_BYTES: u64 = 4 * CHUNK_BYTES;

/// The chunks that the guest can reach; at most one fewer than there are.
#[derive(Debug, Default)]
pub(super) struct Given(Mutex<Vec<u64>>);

impl Given {
    pub(super) fn chunks(&self) -> Vec<u64> {
        let mut all = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        all.sort_unstable();
        all
    }
}

impl Slots for Given {
    fn give(&self, chunk: u64, addr: u64, host: u64) -> Result<(), String> {
        assert!(addr.is_multiple_of(CHUNK_BYTES) && host.is_multiple_of(BLOCK_BYTES));
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!all.contains(&chunk), "chunk {chunk} is given twice");
        if all.len() == 3 {
            return Err("no more slots".to_owned());
        }
        all.push(chunk);
        Ok(())
    }

    fn take(&self, chunk: u64, _: u64) -> Result<(), String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = all.iter().position(|given| *given == chunk);
        let at = at.ok_or_else(|| "it was not given".to_owned())?;
        all.swap_remove(at);
        Ok(())
    }
}

/// The guest.
pub(super) struct Session {
    pub(super) mem: Mem,
    pub(super) growth: Growth,
    pub(super) given: Arc<Given>,
    pub(super) told: Arc<Mutex<Vec<u64>>>,
}

impl Session {
    #[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
    pub(super) fn new() -> Self {
        let spec = MemorySpec {
            size: MiB(64),
            most: MiB(64 + 512),
            huge_pages: false,
            policy: None,
        };
        let mem = memory::map(&spec).unwrap();
        let (given, told) = (Arc::new(Given::default()), Arc::default());
        let teller: Arc<Mutex<Vec<u64>>> = Arc::clone(&told);
        let tell = move |bytes| {
            teller
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(bytes);
        };
        Self {
            growth: Growth::new(&mem, given.clone(), Box::new(tell)),
            mem,
            given,
            told,
        }
    }

    /// What must be true whatever the guest did.
    pub(super) fn check(&self, most: u64) {
        let room = self.mem.room();
        let blocks = 0..ROOM_BYTES / BLOCK_BYTES;
        let plugged = blocks.filter(|block| room.is_plugged(*block)).count() as u64 * BLOCK_BYTES;
        assert!(plugged <= most, "{plugged} bytes of {most} are plugged");
        let full: Vec<u64> = (0..ROOM_BYTES / CHUNK_BYTES)
            .filter(|chunk| !room.is_empty(*chunk))
            .collect();
        assert_eq!(self.given.chunks(), full);
        for chunk in &full {
            let addr = room.start() + chunk * CHUNK_BYTES;
            let first = room.covers(GuestAddress(addr), 1);
            assert_eq!(self.mem.write_obj(1u8, GuestAddress(addr)).is_ok(), first);
        }
    }

    pub(super) fn serve(&self, chain: &Chain) -> Result<u32, GuestFault> {
        serve(&self.growth, chain)
    }
}

/// A chain as an image (`crate::fuzzing`) is served; then every 19 bytes of it are a request, or by the first byte a wish of
/// the owner's.
pub fn fuzz(bytes: &[u8]) {
    let session = Session::new();
    let mut most = 0;
    let mut image = Image::new(bytes);
    if let Ok(Some(chain)) = image.driver.pop() {
        let _ = session.serve(&chain);
    }
    session.check(most);
    for step in bytes.as_chunks::<19>().0 {
        let [kind, rest @ ..] = *step;
        if kind & 0x80 != 0 {
            let wanted = u64::from(rest[0]) * (ROOM_BYTES / 255);
            let _ = session.growth.ask(wanted);
            most = most.max(wanted.next_multiple_of(BLOCK_BYTES));
            continue;
        }
        let mut raw = [0; super::REQUEST_BYTES];
        raw[0] = kind % 5;
        raw[8..24].copy_from_slice(&rest[2..]);
        if kind & 0x40 != 0 {
            // Near the room: the number of a block.
            let block = u64::from(u16::from_le_bytes([rest[0], rest[1]]));
            let addr = session.mem.room().start().wrapping_add(block * BLOCK_BYTES);
            raw[8..16].copy_from_slice(&addr.to_le_bytes());
        }
        if let Some(request) = super::wire::parse(&raw, session.mem.room()) {
            session.growth.obey(&request);
        }
        session.check(most);
    }
}
