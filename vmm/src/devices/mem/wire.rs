//! What the guest asks of the memory device: 24 bytes that become a [`Request`], or are refused.
//!
//! Contract: a [`Blocks`] lies in the room, on the borders of blocks, and is not empty; only [`parse`] makes one.
//! Spec: virtio 1.2, 5.15.6.

use std::ops::Range;

use crate::memory::{BLOCK_BYTES, Room};

/// `struct virtio_mem_req`.
pub(super) const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`.
pub(super) const RESPONSE_BYTES: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Blocks of the room, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks(Range<u64>);

impl Blocks {
    pub(super) fn range(&self) -> Range<u64> {
        self.0.clone()
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.0.end - self.0.start) * BLOCK_BYTES
    }
}

/// What the guest wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Memory in blocks that are not plugged.
    Plug(Blocks),
    /// To give blocks back that are plugged.
    Unplug(Blocks),
    /// To give all back.
    UnplugAll,
    /// To know whether blocks are plugged.
    State(Blocks),
}

/// What it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Not more than was asked for.
    Nack,
    /// The host has no memory now.
    Busy,
    /// Nonsense.
    Error,
    /// All of the blocks are.
    Plugged,
    /// None of the blocks is.
    Unplugged,
    /// Some are.
    Mixed,
}

impl Response {
    /// `struct virtio_mem_resp`.
    pub(super) fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Self::Ack | Self::Plugged => (0, 0),
            Self::Unplugged => (0, 1),
            Self::Mixed => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// The request that the bytes are, if all of it is in the room.
pub(super) fn parse(raw: &[u8; REQUEST_BYTES], room: &Room) -> Option<Request> {
    let [k0, k1, _, _, _, _, _, _, a @ ..] = *raw;
    let [a0, a1, a2, a3, a4, a5, a6, a7, c0, c1, ..] = a;
    let addr = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let count = u64::from(u16::from_le_bytes([c0, c1]));
    let blocks = || {
        let offset = addr.checked_sub(room.start())?;
        let first = offset / BLOCK_BYTES;
        let fits = first + count <= room.bytes() / BLOCK_BYTES;
        (offset.is_multiple_of(BLOCK_BYTES) && count > 0 && fits)
            .then_some(Blocks(first..first + count))
    };
    match u16::from_le_bytes([k0, k1]) {
        PLUG => blocks().map(Request::Plug),
        UNPLUG => blocks().map(Request::Unplug),
        UNPLUG_ALL => Some(Request::UnplugAll),
        STATE => blocks().map(Request::State),
        _ => None,
    }
}

/// The bytes of a request, as a driver writes them.
#[cfg(test)]
pub(super) fn request(kind: u16, addr: u64, count: u16) -> [u8; REQUEST_BYTES] {
    let mut raw = [0; REQUEST_BYTES];
    raw[..2].copy_from_slice(&kind.to_le_bytes());
    raw[8..16].copy_from_slice(&addr.to_le_bytes());
    raw[16..18].copy_from_slice(&count.to_le_bytes());
    raw
}

#[cfg(test)]
mod tests {
    use caisson_vmm_spec::{MemorySpec, MiB};

    use super::*;
    use crate::memory;

    #[test]
    fn only_whole_blocks_of_the_room_are_taken() {
        let spec = MemorySpec {
            size: MiB(64),
            most: MiB(64 + 256),
            huge_pages: false,
            policy: None,
        };
        let mem = memory::map(&spec).unwrap();
        let room = mem.room();
        let parsed = |kind, addr, count| parse(&request(kind, addr, count), room);
        let (start, all) = (room.start(), 128);
        assert_eq!(
            parsed(PLUG, start + BLOCK_BYTES, 2),
            Some(Request::Plug(Blocks(1..3)))
        );
        assert_eq!(
            parsed(STATE, start, all),
            Some(Request::State(Blocks(0..u64::from(all))))
        );
        assert_eq!(parsed(UNPLUG_ALL, 9, 9), Some(Request::UnplugAll));
        for (kind, addr, count) in [
            (PLUG, start, 0),
            (PLUG, start, all + 1),
            (UNPLUG, start + BLOCK_BYTES, all),
            (UNPLUG, start - BLOCK_BYTES, 1),
            (STATE, start + 4096, 1),
            (STATE, u64::MAX - BLOCK_BYTES + 1, u16::MAX),
            (4, start, 1),
        ] {
            assert_eq!(parsed(kind, addr, count), None, "{kind} {addr:#x} {count}");
        }
    }
}
