//! A program of the kernel's socket lookup: TCP connections to a network namespace's loopback addresses go to two sockets.
//!
//! Contract: program, map and link live as long as the [`Lookup`], and no longer than its process. Other programs of the
//! namespace, other addresses and other protocols are not affected.
//! It is so small that it is written in the kernel's instructions, loaded by bpf(2): libraries for that are far larger.
//! Spec: the kernel's Documentation/bpf/prog_sk_lookup.rst and linux/bpf.h; Linux 5.9 and later.

#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

// Commands.
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const SK_LOOKUP: u32 = 36;

/// `union bpf_attr` as far as any command here goes, in words of 32 bits; the kernel wants the rest to be zeros.
const ATTRIBUTE_WORDS: usize = 18;
type Attributes = [u32; ATTRIBUTE_WORDS];

/// Keys of the map.
const V4: u32 = 0;
const V6: u32 = 1;

/// An attached program.
#[derive(Debug)]
pub(super) struct Lookup {
    /// It holds the program, which holds the map; a socket leaves the map when it is closed.
    _link: OwnedFd,
}

impl Lookup {
    /// Attaches one to a network namespace.
    pub(super) fn attach(
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
        let program = load(&instructions(number(map.as_raw_fd())))?;
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

/// Descriptors are not negative.
const fn number(fd: i32) -> u32 {
    fd.cast_unsigned()
}

/// A pointer as the two words that it has in an attribute.
fn words<T>(pointer: *const T) -> [u32; 2] {
    let address = pointer.expose_provenance() as u64;
    // Each half has 32 bits.
    let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).unwrap_or(0);
    [half(address), half(address >> 32)]
}

fn put(map: &OwnedFd, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = number(socket.as_raw_fd());
    let ([key_low, key_high], [low, high]) = (words(&raw const key), words(&raw const value));
    let attributes = [
        number(map.as_raw_fd()),
        0,
        key_low,
        key_high,
        low,
        high,
        0,
        0,
    ];
    call(MAP_UPDATE_ELEM, &attributes).map(drop)
}

fn load(program: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let [low, high] = words(program.as_ptr());
    let [license_low, license_high] = words(license.as_ptr());
    let count = u32::try_from(program.len()).unwrap_or(u32::MAX);
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[..6].copy_from_slice(&[
        PROG_TYPE_SK_LOOKUP,
        count,
        low,
        high,
        license_low,
        license_high,
    ]);
    // expected_attach_type
    attributes[17] = SK_LOOKUP;
    descriptor(PROG_LOAD, &attributes)
}

/// A command that makes something.
fn descriptor(command: i32, attributes: &[u32]) -> io::Result<OwnedFd> {
    let fd = call(command, attributes)?;
    // SAFETY: the commands that come here answer with a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn call(command: i32, given: &[u32]) -> io::Result<i32> {
    let mut attributes: Attributes = [0; ATTRIBUTE_WORDS];
    attributes[..given.len()].copy_from_slice(given);
    let size = size_of::<Attributes>();
    // SAFETY: the attributes are initialised, of the size that is given, and outlive the call, as does what their pointers
    // lead to: a key, a value, a program and its license, which the kernel only reads, by the lengths given with them.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(done).map_err(io::Error::other)
}

// Registers: r0 answers, r1 to r5 arguments, r6 the context, r7 the socket, r10 the frame's end.
const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + off)
const STORE_WORD: u8 = 0x62; // *(u32 *)(dst + off) = imm
const MOVE: u8 = 0xb7; // dst = imm
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const JUMP_IF_NOT: u8 = 0x55; // if dst != imm
const JUMP_IF: u8 = 0x15; // if dst == imm
const JUMP: u8 = 0x05;
const LOAD_WIDE: u8 = 0x18; // two instructions
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// In the source register of [`LOAD_WIDE`]: the number is a map's descriptor.
const IS_MAP: u8 = 1;
/// Helpers.
const MAP_LOOKUP_ELEM: u32 = 1;
const SK_RELEASE: u32 = 86;
const SK_ASSIGN: u32 = 124;
/// The answer: go on, with the socket that was assigned, if one was.
const PASS: u32 = 1;

// `struct bpf_sk_lookup`: offsets of its fields; addresses are in network order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

const TCP: u32 = 6;
/// `AF_INET6`
const INET6: u32 = 10;

/// One instruction in its memory layout: opcode, registers, offset, immediate.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: u32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, src << 4 | dst, low, high, a, b, c, d])
}

fn instructions(map: u32) -> Vec<u64> {
    // The last word of ::1, as this machine reads it.
    let one = 1_u32.to_be();
    let loopback_net = u32::from_ne_bytes([127, 0, 0, 0]);
    let first_byte = u32::from_ne_bytes([255, 0, 0, 0]);
    // Offsets of jumps count instructions from the next one; those forward end at `PASS` below.
    vec![
        instruction(MOVE_REGISTER, 6, 1, 0, 0),
        instruction(LOAD_WORD, 2, 6, PROTOCOL, 0),
        instruction(JUMP_IF_NOT, 2, 0, 29, TCP),
        instruction(LOAD_WORD, 2, 6, FAMILY, 0),
        instruction(JUMP_IF, 2, 0, 5, INET6),
        // 5: IPv4
        instruction(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        instruction(AND, 2, 0, 0, first_byte),
        instruction(JUMP_IF_NOT, 2, 0, 24, loopback_net),
        instruction(STORE_WORD, 10, 0, -4, V4),
        instruction(JUMP, 0, 0, 9, 0),
        // 10: IPv6
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6, 0),
        instruction(JUMP_IF_NOT, 2, 0, 20, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 4, 0),
        instruction(JUMP_IF_NOT, 2, 0, 18, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 8, 0),
        instruction(JUMP_IF_NOT, 2, 0, 16, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 12, 0),
        instruction(JUMP_IF_NOT, 2, 0, 14, one),
        instruction(STORE_WORD, 10, 0, -4, V6),
        // 19: the socket of the family, and a reference to it
        instruction(LOAD_WIDE, 1, IS_MAP, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE_REGISTER, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, (-4_i32).cast_unsigned()),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(JUMP_IF, 0, 0, 7, 0),
        instruction(MOVE_REGISTER, 7, 0, 0, 0),
        instruction(MOVE_REGISTER, 1, 6, 0, 0),
        instruction(MOVE_REGISTER, 2, 7, 0, 0),
        instruction(MOVE, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOVE_REGISTER, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        instruction(MOVE, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// Runs the program as the kernel would, as far as the map: the key that it looks up, or `None` if it passes.
    fn run(protocol: u32, local: &str) -> Option<u32> {
        let mut context = [0_u8; 64];
        let family: u32 = match local.parse().unwrap() {
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
        let program = instructions(3);
        let (mut r, mut key, mut at) = ([0_u32; 11], None, 0);
        loop {
            let [code, registers, low, high, immediate @ ..] = program[at].to_le_bytes();
            let (dst, src) = (usize::from(registers & 15), usize::from(registers >> 4));
            let offset = usize::try_from(i16::from_le_bytes([low, high]));
            let immediate = u32::from_le_bytes(immediate);
            at += 1;
            match code {
                LOAD_WORD => {
                    let word = context[offset.unwrap()..].first_chunk().unwrap();
                    r[dst] = u32::from_ne_bytes(*word);
                }
                STORE_WORD => key = Some(immediate),
                MOVE => r[dst] = immediate,
                MOVE_REGISTER => r[dst] = r[src],
                ADD => {}
                AND => r[dst] &= immediate,
                JUMP_IF_NOT if r[dst] != immediate => at += offset.unwrap(),
                JUMP_IF if r[dst] == immediate => at += offset.unwrap(),
                JUMP_IF_NOT | JUMP_IF => {}
                JUMP => at += offset.unwrap(),
                LOAD_WIDE => at += 1,
                CALL => return (immediate == MAP_LOOKUP_ELEM).then_some(key).flatten(),
                EXIT => {
                    assert_eq!((r[0], key), (PASS, None));
                    return None;
                }
                other => panic!("instruction {other:#x}"),
            }
        }
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
