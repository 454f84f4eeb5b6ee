//! vsock packets on the wire: the only code that reads and writes their headers.
//!
//! Contract: `Header::parse` makes a header only from a packet of this guest to the host, of type stream and with a
//! known operation; everything else has a reason. A header says nothing about the payload that really came: the caller
//! compares [`Header::len`] with the chain.
//! Spec: virtio 1.2, 5.10.6 (device operation).

use caisson_vmm_spec::GUEST_CID;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// The sender of a SHUTDOWN will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of a SHUTDOWN will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

const TYPE_STREAM: u16 = 1;

/// What a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Agrees to one.
    Response,
    /// Ends or refuses one.
    Reset,
    /// Closes directions of one.
    Shutdown,
    /// Carries payload.
    Data,
    /// Says how much the sender can take.
    CreditUpdate,
    /// Asks for a `CreditUpdate`.
    CreditRequest,
}

/// Operations and their numbers.
const OPS: [(u16, Op); 7] = [
    (1, Op::Request),
    (2, Op::Response),
    (3, Op::Reset),
    (4, Op::Shutdown),
    (5, Op::Data),
    (6, Op::CreditUpdate),
    (7, Op::CreditRequest),
];

impl Op {
    pub(super) fn from_wire(number: u16) -> Option<Self> {
        OPS.iter()
            .find(|(wire, _)| *wire == number)
            .map(|(_, op)| *op)
    }

    fn to_wire(self) -> u16 {
        OPS.iter()
            .find(|(_, op)| *op == self)
            .map_or(0, |(wire, _)| *wire)
    }
}

/// Which connection, seen from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
}

/// A header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The connection.
    pub key: Key,
    /// What the packet does.
    pub op: Op,
    /// Payload bytes that the sender announces.
    pub len: u32,
    /// `SHUTDOWN_*` for [`Op::Shutdown`].
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender took out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// Why a packet is not for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// From or to somebody else: dropped.
    Address,
    /// Another socket type or an unknown operation: answered by a reset.
    Kind(Key),
}

fn u16_at<const AT: usize>(raw: &[u8; HEADER_BYTES]) -> u16 {
    const { assert!(AT + 2 <= HEADER_BYTES) };
    u16::from_le_bytes([raw[AT], raw[AT + 1]])
}

fn u32_at<const AT: usize>(raw: &[u8; HEADER_BYTES]) -> u32 {
    const { assert!(AT + 4 <= HEADER_BYTES) };
    u32::from_le_bytes([raw[AT], raw[AT + 1], raw[AT + 2], raw[AT + 3]])
}

fn u64_at<const AT: usize>(raw: &[u8; HEADER_BYTES]) -> u64 {
    const { assert!(AT + 8 <= HEADER_BYTES) };
    let (low, high) = ([raw[AT], raw[AT + 1], raw[AT + 2], raw[AT + 3]], AT + 4);
    let high = [raw[high], raw[high + 1], raw[high + 2], raw[high + 3]];
    u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32
}

impl Header {
    /// Reads the header of a packet that the guest sent.
    ///
    /// # Errors
    /// [`Refused`] says what to do with the packet.
    pub fn parse(raw: &[u8; HEADER_BYTES]) -> Result<Self, Refused> {
        if u64_at::<0>(raw) != GUEST_CID || u64_at::<8>(raw) != HOST_CID {
            return Err(Refused::Address);
        }
        let key = Key {
            guest: u32_at::<16>(raw),
            host: u32_at::<20>(raw),
        };
        let op = Op::from_wire(u16_at::<30>(raw)).filter(|_| u16_at::<28>(raw) == TYPE_STREAM);
        Ok(Self {
            key,
            op: op.ok_or(Refused::Kind(key))?,
            len: u32_at::<24>(raw),
            flags: u32_at::<32>(raw),
            buf_alloc: u32_at::<36>(raw),
            fwd_cnt: u32_at::<40>(raw),
        })
    }

    /// A packet without payload, flags or credit from the host.
    pub fn bare(key: Key, op: Op) -> Self {
        Self {
            key,
            op,
            len: 0,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The header as the guest reads it.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [0; HEADER_BYTES];
        raw[0..8].copy_from_slice(&HOST_CID.to_le_bytes());
        raw[8..16].copy_from_slice(&GUEST_CID.to_le_bytes());
        raw[16..20].copy_from_slice(&self.key.host.to_le_bytes());
        raw[20..24].copy_from_slice(&self.key.guest.to_le_bytes());
        raw[24..28].copy_from_slice(&self.len.to_le_bytes());
        raw[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        raw[30..32].copy_from_slice(&self.op.to_wire().to_le_bytes());
        raw[32..36].copy_from_slice(&self.flags.to_le_bytes());
        raw[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        raw[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        raw
    }
}

/// A packet as a guest would send it; for tests.
#[cfg(test)]
pub(super) fn from_guest(header: &Header) -> [u8; HEADER_BYTES] {
    let mut raw = header.encode();
    raw[0..8].copy_from_slice(&GUEST_CID.to_le_bytes());
    raw[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
    raw[16..20].copy_from_slice(&header.key.guest.to_le_bytes());
    raw[20..24].copy_from_slice(&header.key.host.to_le_bytes());
    raw
}

/// A packet as a guest reads it; for tests.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
pub(super) fn to_guest(raw: &[u8; HEADER_BYTES]) -> Header {
    let mut turned = *raw;
    turned[0..8].copy_from_slice(&raw[8..16]);
    turned[8..16].copy_from_slice(&raw[0..8]);
    turned[16..20].copy_from_slice(&raw[20..24]);
    turned[20..24].copy_from_slice(&raw[16..20]);
    Header::parse(&turned).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        key: Key {
            guest: 0x0403_0201,
            host: 1024,
        },
        op: Op::Shutdown,
        len: 3,
        flags: 2,
        buf_alloc: 0x1_0000,
        fwd_cnt: 0xffff_fff0,
    };

    #[test]
    fn a_header_is_read_as_the_guest_wrote_it() {
        assert_eq!(Header::parse(&from_guest(&HEADER)), Ok(HEADER));
        let raw = HEADER.encode();
        assert_eq!(
            (u32_at::<16>(&raw), u32_at::<20>(&raw)),
            (1024, 0x0403_0201)
        );
        assert_eq!(
            (u64_at::<0>(&raw), u64_at::<8>(&raw)),
            (HOST_CID, GUEST_CID)
        );
    }

    #[test]
    fn strangers_and_unknown_kinds_are_refused() {
        for at in [0, 7, 8, 15] {
            let mut raw = from_guest(&HEADER);
            raw[at] ^= 0x80;
            assert_eq!(Header::parse(&raw), Err(Refused::Address));
        }
        for (at, value) in [(28, 2), (28, 0), (30, 0), (30, 8), (31, 1)] {
            let mut raw = from_guest(&HEADER);
            raw[at] = value;
            assert_eq!(Header::parse(&raw), Err(Refused::Kind(HEADER.key)));
        }
    }

    #[test]
    fn any_bytes_parse_or_are_refused() {
        let mut raw = [0u8; HEADER_BYTES];
        for seed in 0..=255u8 {
            for (byte, index) in raw.iter_mut().zip(0u8..) {
                *byte = seed
                    .wrapping_mul(31)
                    .wrapping_add(index.wrapping_mul(seed | 1));
            }
            let _ = Header::parse(&raw);
        }
    }
}
