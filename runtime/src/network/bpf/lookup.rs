//! A program of the kernel's socket lookup: TCP connections to a network namespace's loopback addresses go to two sockets.
//!
//! Contract: program, map and link live as long as the [`Lookup`], and no longer than its process. Other programs of the
//! namespace, other addresses and other protocols are not affected.
//! Spec: the kernel's Documentation/bpf/prog_sk_lookup.rst; Linux 5.9 and later.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use super::{
    LINK_CREATE, MAP_CREATE, Purpose, descriptor,
    instructions::{
        ADD, AND, JUMP_IF, JUMP_IF_NOT, LOAD_WORD, Line, MOVE, assemble, call, copy, exit, jump,
        jump_when, load, load_map, store_word, with,
    },
    number, put,
};

const MAP_TYPE_SOCKMAP: u32 = 15;
const SK_LOOKUP: u32 = 36;
const SOCKET_LOOKUP: Purpose = Purpose {
    kind: 30,
    attach: SK_LOOKUP,
};

/// Keys of the map.
const V4: u32 = 0;
const V6: u32 = 1;

/// An attached program.
#[derive(Debug)]
pub(in crate::network) struct Lookup {
    /// It holds the program, which holds the map; a socket leaves the map when it is closed.
    _link: OwnedFd,
}

impl Lookup {
    /// Attaches one to a network namespace.
    pub(in crate::network) fn attach(
        namespace: BorrowedFd<'_>,
        v4: BorrowedFd<'_>,
        v6: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        let word_bytes = size_of::<u32>().try_into().unwrap_or(0);
        let map = descriptor(
            MAP_CREATE,
            &[MAP_TYPE_SOCKMAP, word_bytes, word_bytes, V6 + 1],
        )?;
        for (key, socket) in [(V4, Some(v4)), (V6, v6)] {
            if let Some(socket) = socket {
                put(&map, key, socket)?;
            }
        }
        let program = super::load(SOCKET_LOOKUP, &instructions(map.as_raw_fd()))?;
        let link = [
            number(program.as_raw_fd()),
            number(namespace.as_raw_fd()),
            SK_LOOKUP,
        ];
        Ok(Self {
            _link: descriptor(LINK_CREATE, &link)?,
        })
    }
}

/// Helpers.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// The answer: go on, with the socket that was assigned, if one was.
const PASS: i32 = 1;

// `struct bpf_sk_lookup`: offsets of its fields; addresses are in network order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

const TCP: i32 = 6;
/// `AF_INET6`
const INET6: i32 = 10;

fn instructions(map: i32) -> Vec<u64> {
    // The last word of ::1, as this machine reads it.
    let one = 1_i32.to_be();
    let loopback_net = i32::from_ne_bytes([127, 0, 0, 0]);
    let first_byte = i32::from_ne_bytes([255, 0, 0, 0]);
    let [map_low, map_high] = load_map(1, map);
    assemble(&[
        copy(6, 1),
        load(LOAD_WORD, 2, 6, PROTOCOL),
        jump_when(JUMP_IF_NOT, 2, TCP, "pass"),
        load(LOAD_WORD, 2, 6, FAMILY),
        jump_when(JUMP_IF, 2, INET6, "IPv6"),
        load(LOAD_WORD, 2, 6, LOCAL_IP4),
        with(AND, 2, first_byte),
        jump_when(JUMP_IF_NOT, 2, loopback_net, "pass"),
        store_word(10, -4, V4.cast_signed()),
        jump("look up"),
        Line::Mark("IPv6"),
        load(LOAD_WORD, 2, 6, LOCAL_IP6),
        jump_when(JUMP_IF_NOT, 2, 0, "pass"),
        load(LOAD_WORD, 2, 6, LOCAL_IP6 + 4),
        jump_when(JUMP_IF_NOT, 2, 0, "pass"),
        load(LOAD_WORD, 2, 6, LOCAL_IP6 + 8),
        jump_when(JUMP_IF_NOT, 2, 0, "pass"),
        load(LOAD_WORD, 2, 6, LOCAL_IP6 + 12),
        jump_when(JUMP_IF_NOT, 2, one, "pass"),
        store_word(10, -4, V6.cast_signed()),
        // The socket of the family, and a reference to it.
        Line::Mark("look up"),
        map_low,
        map_high,
        copy(2, 10),
        with(ADD, 2, -4),
        call(MAP_LOOKUP_ELEM),
        jump_when(JUMP_IF, 0, 0, "pass"),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        with(MOVE, 3, 0),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        Line::Mark("pass"),
        with(MOVE, 0, PASS),
        exit(),
    ])
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{
        super::interpreter::{self, Memory},
        *,
    };

    /// Runs the program as the kernel would, as far as the map: the key that it looks up, or `None` if it passes.
    fn run(protocol: i32, local: &str) -> Option<u32> {
        let mut context = vec![0_u8; 64];
        let family: i32 = match local.parse().unwrap() {
            IpAddr::V4(address) => {
                context[40..44].copy_from_slice(&address.octets());
                2
            }
            IpAddr::V6(address) => {
                context[44..60].copy_from_slice(&address.octets());
                INET6
            }
        };
        context[8..12].copy_from_slice(&family.to_ne_bytes());
        context[12..16].copy_from_slice(&protocol.to_ne_bytes());
        let mut key = None;
        let mut memory = Memory::new(context, Vec::new());
        let ended = interpreter::run(&instructions(3), &mut memory, |helper, args, memory| {
            assert_eq!((helper, args[0]), (MAP_LOOKUP_ELEM, 3));
            let bytes = memory.at(args[1], 4).try_into().unwrap();
            key = Some(u32::from_ne_bytes(bytes));
            None
        });
        let passed = u64::try_from(PASS).ok();
        assert_eq!(ended, if key.is_some() { None } else { passed });
        key
    }

    #[test]
    fn tcp_to_loopback_addresses_finds_the_socket_of_its_family() {
        assert_eq!(run(TCP, "127.0.0.1"), Some(V4));
        assert_eq!(run(TCP, "127.255.0.9"), Some(V4));
        assert_eq!(run(TCP, "::1"), Some(V6));
    }

    #[test]
    fn everything_else_passes() {
        for address in [
            "10.0.0.127",
            "128.0.0.1",
            "::",
            "::2",
            "1::1",
            "0:0:1::1",
            "0:0:0:0:1::1",
        ] {
            assert_eq!(run(TCP, address), None, "{address}");
        }
        for address in ["127.0.0.1", "::1"] {
            assert_eq!(run(17, address), None, "UDP to {address}");
        }
    }
}
