//! FUSE, as far as a tree of small files that nobody may change needs it: requests parsed, replies written.
//!
//! Contract: a request that is cut short is `None`; names are what the host's kernel passes on, without their NUL.
//! Not here: the device and the frame of a message (`fuse.rs`).
//! Spec: linux/fuse.h (protocol 7.31).

use rustix::io::Errno;

use super::tree::{Kind, Node};
use crate::fuse::Call;

/// A request and the number that its reply must bear.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) unique: u64,
    pub(super) ask: Ask,
}

/// What is asked for; a number is a file's.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Init,
    Lookup {
        directory: u64,
        name: String,
    },
    Attributes(u64),
    OpenDirectory(u64),
    List(Range),
    Open(u64),
    Read(Range),
    Follow(u64),
    /// The file is closed for good.
    Release,
    /// Nothing that is answered.
    Forget,
    Refused(Errno),
}

/// A part of a file, in bytes, or of a directory, in entries from the first and bytes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) node: u64,
    pub(super) from: u64,
    pub(super) bytes: u32,
}

pub(super) fn parse(bytes: &[u8]) -> Option<Request> {
    let call = Call::parse(bytes)?;
    let node = call.node;
    let range = || {
        Some(Range {
            node,
            from: call.number(8)?,
            bytes: call.small(16)?,
        })
    };
    let ask = match call.opcode {
        1 => {
            let name = call.body.split(|byte| *byte == 0).next()?;
            match String::from_utf8(name.to_vec()) {
                Ok(name) => Ask::Lookup {
                    directory: node,
                    name,
                },
                Err(_) => Ask::Refused(Errno::NOENT),
            }
        }
        // An interrupt is of no use: what is asked has a deadline.
        2 | 36 | 42 => Ask::Forget,
        3 => Ask::Attributes(node),
        5 => Ask::Follow(node),
        14 => Ask::Open(node),
        15 => Ask::Read(range()?),
        18 | 29 => Ask::Release,
        26 => Ask::Init,
        27 => Ask::OpenDirectory(node),
        28 => Ask::List(range()?),
        _ => Ask::Refused(Errno::NOSYS),
    };
    Some(Request {
        unique: call.unique,
        ask,
    })
}

/// `struct fuse_attr`.
fn about(node: Node, (user, group): (u32, u32)) -> [u8; 88] {
    let mut attr = [0; 88];
    attr[..8].copy_from_slice(&node.number().to_le_bytes());
    let links = if node.kind() == Kind::Directory { 2 } else { 1 };
    for (at, value) in [
        (60, node.kind().mode()),
        (64, links),
        (68, user),
        (72, group),
        (80, 4096_u32),
    ] {
        attr[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    attr
}

/// `struct fuse_attr_out`, true for this moment.
pub(super) fn attributes(node: Node, owner: (u32, u32)) -> Vec<u8> {
    [[0; 16].as_slice(), &about(node, owner)].concat()
}

/// `struct fuse_entry_out`, true for this moment.
pub(super) fn entry(node: Node, owner: (u32, u32)) -> Vec<u8> {
    let number = node.number().to_le_bytes();
    [number.as_slice(), &[0; 32], &about(node, owner)].concat()
}

/// As many of a directory's entries, from a number of them on, as have room (`struct fuse_dirent`).
pub(super) fn list(entries: &[(String, Node)], range: Range) -> Vec<u8> {
    let from = usize::try_from(range.from).unwrap_or(usize::MAX);
    let room = usize::try_from(range.bytes).unwrap_or(usize::MAX);
    let mut listed = Vec::new();
    for ((name, node), next) in entries.iter().zip(1_u64..).skip(from) {
        let mut one = node.number().to_le_bytes().to_vec();
        one.extend(next.to_le_bytes());
        // Names are a few bytes long.
        one.extend(u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
        one.extend((node.kind().mode() >> 12).to_le_bytes());
        one.extend(name.as_bytes());
        one.resize(one.len().next_multiple_of(8), 0);
        if listed.len() + one.len() > room {
            break;
        }
        listed.extend(one);
    }
    listed
}

/// A part of a text.
pub(super) fn part(text: &str, range: Range) -> &[u8] {
    let from = usize::try_from(range.from).unwrap_or(usize::MAX);
    let bytes = usize::try_from(range.bytes).unwrap_or(usize::MAX);
    let rest = text.as_bytes().get(from..).unwrap_or_default();
    rest.get(..bytes).unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::super::tree::Part;
    use super::*;
    use crate::fuse::tests::request;

    #[test]
    fn requests_are_what_the_kernel_asks() {
        let ask = |opcode, body: &[u8]| parse(&request(opcode, 5, 9, body)).map(|one| one.ask);
        assert_eq!(
            ask(1, b"stat\0"),
            Some(Ask::Lookup {
                directory: 9,
                name: "stat".into()
            })
        );
        assert_eq!(ask(1, b"\xff\0"), Some(Ask::Refused(Errno::NOENT)));
        let mut body = vec![0; 8];
        body.extend(3_u64.to_le_bytes());
        body.extend(100_u32.to_le_bytes());
        let range = Range {
            node: 9,
            from: 3,
            bytes: 100,
        };
        assert_eq!(ask(15, &body), Some(Ask::Read(range)));
        assert_eq!(ask(28, &body[..19]), None);
        assert_eq!(ask(16, &[]), Some(Ask::Refused(Errno::NOSYS)));
    }

    #[test]
    fn replies_have_the_kernels_sizes() {
        assert_eq!(attributes(Node::Root, (0, 0)).len(), 104);
        let entry = entry(Node::Process(1, Part::Directory), (7, 8));
        assert_eq!((entry.len(), entry[0]), (128, 16));
        assert_eq!((entry[108], entry[112]), (7, 8));
    }

    #[test]
    fn a_directory_is_listed_piece_by_piece() {
        let entries = [
            ("1".to_owned(), Node::Root),
            ("stat".to_owned(), Node::System(0)),
        ];
        let listed = |from, bytes| {
            list(
                &entries,
                Range {
                    node: 1,
                    from,
                    bytes,
                },
            )
        };
        assert_eq!(listed(0, 4096).len(), 64);
        assert_eq!((listed(0, 63).len(), listed(0, 31).len()), (32, 0));
        assert_eq!(listed(1, 4096)[24..28], *b"stat");
        assert!(listed(u64::MAX, 4096).is_empty());
    }

    #[test]
    fn a_text_ends_where_it_ends() {
        let part = |from, bytes| {
            part(
                "abc",
                Range {
                    node: 1,
                    from,
                    bytes,
                },
            )
        };
        assert_eq!(
            [part(0, 2), part(1, 9), part(3, 1), part(u64::MAX, 1)],
            [b"ab".as_slice(), b"bc", b"", b""]
        );
    }
}
