//! rtnetlink messages as bytes: how [`Network::requests`](crate::Network) is written by the host and read by the agent.
//!
//! Contract: what is built here is well-formed (lengths right, everything aligned to 4 bytes); what is read may be
//! anything: a length that is not true ends the iteration. Numbers are in the machine's order.
//! Not here: sockets; what attributes mean.
//! Spec: netlink(7), rtnetlink(7).

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Bytes of `struct nlattr`.
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Flags in an attribute's type (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
const TYPE_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

const fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// A message being written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder(Vec<u8>);

impl Builder {
    /// A message of this type, with these flags, whose fixed part is `body`.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(body);
        bytes.resize(aligned(bytes.len()), 0);
        Self(bytes)
    }

    /// Attributes without a message around them, to be put inside another's.
    pub fn part() -> Self {
        Self(Vec::new())
    }

    /// The attributes alone, of a [`Builder::part`].
    pub fn into_part(self) -> Vec<u8> {
        self.0
    }

    /// One more attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, |bytes| bytes.extend(value));
        self
    }

    /// An attribute that is a string with its final zero byte.
    #[must_use]
    pub fn text(mut self, kind: u16, value: &str) -> Self {
        self.put(kind, |bytes| {
            bytes.extend(value.as_bytes());
            bytes.push(0);
        });
        self
    }

    /// An attribute that holds the attributes that `inside` adds.
    #[must_use]
    pub fn nested(mut self, kind: u16, inside: impl FnOnce(Self) -> Self) -> Self {
        self.put(kind | NESTED, |bytes| {
            let part = inside(Self::part()).0;
            bytes.extend(part);
        });
        self
    }

    fn put(&mut self, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
        let bytes = &mut self.0;
        let start = bytes.len();
        bytes.extend([0; 2]);
        bytes.extend(kind.to_ne_bytes());
        value(bytes);
        // Attributes come from the kernel or are written here: far below 64 KiB.
        let len = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
        bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        bytes.resize(aligned(bytes.len()), 0);
    }

    /// The whole message.
    pub fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// A message that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Its type.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// Its sequence number.
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
    /// All of it, header included.
    pub whole: &'a [u8],
}

/// The messages in a datagram, or in a request's list.
pub fn messages(bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_at(rest, 0)?).ok()?;
        let whole = rest.get(..len)?;
        let message = Message {
            kind: u16_at(whole, 4)?,
            flags: u16_at(whole, 6)?,
            sequence: u32_at(whole, 8)?,
            body: whole.get(HEADER_BYTES..)?,
            whole,
        };
        rest = rest.get(aligned(len)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in the part of a message behind its fixed part, or in a nested attribute.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_HEADER_BYTES..len)?;
        rest = rest.get(aligned(len)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this kind.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// The number at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*bytes))
}

/// The number at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let message = Builder::new(16, 5, &[1, 2, 3, 4])
            .text(3, "eth0")
            .nested(18, |inside| inside.attribute(1, &[9]).attribute(2, &[]))
            .finish();
        let mut twice = message.clone();
        twice.extend(&message);
        let read: Vec<_> = messages(&twice).collect();
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[1].kind, read[1].flags, read[1].whole),
            (16, 5, &message[..])
        );
        let (fixed, rest) = read[0].body.split_at(4);
        assert_eq!(fixed, [1, 2, 3, 4]);
        assert_eq!(attribute(rest, 3), Some(&b"eth0\0"[..]));
        let nested = attribute(rest, 18).unwrap();
        assert_eq!(
            attributes(nested).collect::<Vec<_>>(),
            [(1, &[9][..]), (2, &[][..])]
        );
    }

    #[test]
    fn untrue_lengths_end_the_reading() {
        for bytes in [&[][..], &[200, 0, 0, 0, 1, 1], &[0; 64], &[3, 0, 0, 0]] {
            assert_eq!(messages(bytes).count(), 0, "{bytes:?}");
        }
        for bytes in [&[9, 0, 1, 0][..], &[0; 8], &[3, 0, 1, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
