//! A program of tc(8)'s for what comes in at an interface: answers to questions about names that somebody asks from the
//! container's network namespace on the host stay on the host; everything else goes on, into the guest.
//!
//! Docker's resolver asks the servers of the outside through sockets in that namespace, whose packets would otherwise arrive
//! in the guest, where nobody waits for them.
//!
//! ```text
//!  UDP or TCP from port 53, whole, no options before its ports:
//!      a socket of the namespace is connected to that address and port    -> the host's stack
//!  an ARP reply, a neighbour advertisement (the host's stack needs neighbours) -> the host's stack, and a copy to the tap
//!  all else                                                               -> the next filter, which leads into the guest
//! ```
//!
//! Contract: a packet stays only if a socket was connected to its sender, so whoever sends reaches no socket that did not
//! ask it first. The guest's own packets do not pass here: they come out of the tap. If one is sent back in by the network,
//! it is what any neighbour on that network could send, to this container's resolver, whose answers are the guest's alone.
//! The copies are not counted against a limit of packets; they are against one of bytes.
//! Not here: fragments, IPv6's extension headers and ICMP's errors: they go into the guest as without the program.
//! Spec: linux/bpf.h; Linux 5.2 and later.

use std::{io, os::fd::OwnedFd};

use caisson_agent_api::RESOLVER_PORT;

use super::{
    Purpose,
    instructions::{
        ADD, AND, JUMP_IF, JUMP_IF_NOT, LOAD_BYTE, LOAD_HALF, LOAD_WORD, Line, MOVE, assemble,
        call, copy, exit, jump, jump_when, load, with,
    },
};

const CLASSIFIER: Purpose = Purpose { kind: 3, attach: 0 };

// Helpers.
const CLONE_REDIRECT: i32 = 13;
const SKB_LOAD_BYTES: i32 = 26;
const SK_LOOKUP_UDP: i32 = 85;
const SK_RELEASE: i32 = 86;
const SKC_LOOKUP_TCP: i32 = 99;
/// `BPF_F_CURRENT_NETNS`
const THIS_NAMESPACE: i32 = -1;

// Answers: on into the host's stack, on to the next filter.
const OK: i32 = 0;
const NEXT: i32 = -1;

/// In `struct __sk_buff`: the Ethernet type, in network order.
const TYPE: i16 = 16;
/// In `struct bpf_sock`: the port it is connected to, or 0.
const PEER_PORT: i16 = 48;

const ETHERNET_BYTES: i32 = 14;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

// Where the headers are, in the frame, with the ports behind the addresses: what is copied then holds, in one piece, a
// `struct bpf_sock_tuple`.
const ARP_AT: i16 = -8;
const ARP_BYTES: i32 = 8;
const V4_AT: i16 = -24;
const V4_BYTES: i32 = 24;
const V4_TUPLE: i16 = 12;
const V4_TUPLE_BYTES: i32 = 12;
const V6_AT: i16 = -44;
const V6_BYTES: i32 = 44;
const V6_TUPLE: i16 = 8;
const V6_TUPLE_BYTES: i32 = 36;

/// Version 4, a header of five words.
const PLAIN_V4: i32 = 0x45;
/// More fragments follow, or some came before.
const FRAGMENT: u16 = 0x3fff;
const UDP: i32 = 17;
const TCP: i32 = 6;
const ICMPV6: i32 = 58;
const ADVERTISEMENT: i32 = 136;
/// ARP's operation.
const REPLY: u16 = 2;

/// The program for an interface whose packets go to the tap with this number, otherwise.
pub(in crate::network) fn answers(tap: u32) -> io::Result<OwnedFd> {
    super::load(CLASSIFIER, &instructions(tap))
}

/// A number of 16 bits as it is read from a packet.
fn wire(value: u16) -> i32 {
    value.to_be().into()
}

/// Copies what follows the Ethernet header into the frame; what is too short is not for us.
fn copied(at: i16, bytes: i32) -> [Line; 7] {
    [
        copy(1, 6),
        with(MOVE, 2, ETHERNET_BYTES),
        copy(3, 10),
        with(ADD, 3, at.into()),
        with(MOVE, 4, bytes),
        call(SKB_LOAD_BYTES),
        jump_when(JUMP_IF_NOT, 0, 0, "guest"),
    ]
}

/// `r7` the protocol, `r3` the port it comes from, `r9` and `r8` the addresses and ports and their length.
fn headers() -> Vec<Line> {
    let mut lines = vec![Line::Mark("IPv4")];
    lines.extend(copied(V4_AT, V4_BYTES));
    lines.extend([
        load(LOAD_BYTE, 2, 10, V4_AT),
        jump_when(JUMP_IF_NOT, 2, PLAIN_V4, "guest"),
        load(LOAD_HALF, 2, 10, V4_AT + 6),
        with(AND, 2, wire(FRAGMENT)),
        jump_when(JUMP_IF_NOT, 2, 0, "guest"),
        load(LOAD_BYTE, 7, 10, V4_AT + 9),
        load(LOAD_HALF, 3, 10, V4_AT + 20),
        copy(9, 10),
        with(ADD, 9, (V4_AT + V4_TUPLE).into()),
        with(MOVE, 8, V4_TUPLE_BYTES),
        jump("ports"),
        Line::Mark("IPv6"),
    ]);
    lines.extend(copied(V6_AT, V6_BYTES));
    lines.extend([
        load(LOAD_BYTE, 7, 10, V6_AT + 6),
        // An ICMP message's type, if it is one.
        load(LOAD_BYTE, 3, 10, V6_AT + 40),
        jump_when(JUMP_IF_NOT, 7, ICMPV6, "IPv6 ports"),
        jump_when(JUMP_IF, 3, ADVERTISEMENT, "both"),
        jump("guest"),
        Line::Mark("IPv6 ports"),
        load(LOAD_HALF, 3, 10, V6_AT + 40),
        copy(9, 10),
        with(ADD, 9, (V6_AT + V6_TUPLE).into()),
        with(MOVE, 8, V6_TUPLE_BYTES),
        Line::Mark("ports"),
    ]);
    lines
}

/// `r7` the port that the socket is connected to which the packet is for. Each kind of socket is read by an instruction of
/// its own: the kernel wants it so.
fn looked_up() -> [Line; 17] {
    [
        copy(1, 6),
        copy(2, 9),
        copy(3, 8),
        with(MOVE, 4, THIS_NAMESPACE),
        with(MOVE, 5, 0),
        jump_when(JUMP_IF_NOT, 7, UDP, "TCP"),
        call(SK_LOOKUP_UDP),
        jump_when(JUMP_IF, 0, 0, "guest"),
        load(LOAD_WORD, 7, 0, PEER_PORT),
        jump("release"),
        Line::Mark("TCP"),
        jump_when(JUMP_IF_NOT, 7, TCP, "guest"),
        call(SKC_LOOKUP_TCP),
        jump_when(JUMP_IF, 0, 0, "guest"),
        load(LOAD_WORD, 7, 0, PEER_PORT),
        Line::Mark("release"),
        copy(1, 0),
    ]
}

fn instructions(tap: u32) -> Vec<u64> {
    let mut lines = vec![
        copy(6, 1),
        load(LOAD_WORD, 2, 6, TYPE),
        jump_when(JUMP_IF, 2, wire(IPV4), "IPv4"),
        jump_when(JUMP_IF, 2, wire(IPV6), "IPv6"),
        jump_when(JUMP_IF_NOT, 2, wire(ARP), "guest"),
    ];
    lines.extend(copied(ARP_AT, ARP_BYTES));
    lines.extend([
        load(LOAD_HALF, 2, 10, ARP_AT + 6),
        jump_when(JUMP_IF, 2, wire(REPLY), "both"),
        jump("guest"),
    ]);
    lines.extend(headers());
    lines.push(jump_when(JUMP_IF_NOT, 3, wire(RESOLVER_PORT), "guest"));
    lines.extend(looked_up());
    lines.extend([
        call(SK_RELEASE),
        jump_when(JUMP_IF, 7, 0, "guest"),
        with(MOVE, 0, OK),
        exit(),
        Line::Mark("both"),
        copy(1, 6),
        with(MOVE, 2, tap.cast_signed()),
        with(MOVE, 3, 0),
        call(CLONE_REDIRECT),
        with(MOVE, 0, OK),
        exit(),
        Line::Mark("guest"),
        with(MOVE, 0, NEXT),
        exit(),
    ]);
    assemble(&lines)
}

#[cfg(test)]
mod tests {
    use super::{
        super::interpreter::{self, CONTEXT, Memory},
        *,
    };

    const TAP: u32 = 9;
    const SOCKET: u64 = 0x3_0000;
    const CLIENT: u16 = 40_000;

    /// What becomes of a packet.
    #[derive(Debug, PartialEq, Eq)]
    enum Fate {
        Guest,
        Host,
        Both,
    }

    /// A socket of the namespace: its protocol's helper, the packet's addresses and ports as it expects them, and the port
    /// that it is connected to.
    struct Known {
        helper: i32,
        tuple: Vec<u8>,
        peer_port: u16,
    }

    fn tuple(addresses: &[u8], from: u16, to: u16) -> Vec<u8> {
        [addresses, &from.to_be_bytes(), &to.to_be_bytes()].concat()
    }

    fn run(kind: u16, after_ethernet: &[u8], known: Option<&Known>) -> Fate {
        let mut context = vec![0; 64];
        context[16..18].copy_from_slice(&kind.to_be_bytes());
        let mut socket = vec![0; 80];
        let port = known.map_or(0, |known| known.peer_port);
        socket[48..50].copy_from_slice(&port.to_be_bytes());
        let mut memory = Memory::new(context, vec![(SOCKET, socket)]);
        let (mut held, mut cloned) = (0, false);
        let answer = interpreter::run(&instructions(TAP), &mut memory, |helper, args, memory| {
            let bytes = |number: u64| usize::try_from(number).unwrap();
            Some(match helper {
                SKB_LOAD_BYTES => {
                    assert_eq!(args[..2], [CONTEXT, 14]);
                    match after_ethernet.get(..bytes(args[3])) {
                        Some(data) => {
                            memory.at(args[2], data.len()).copy_from_slice(data);
                            0
                        }
                        None => u64::MAX,
                    }
                }
                SK_LOOKUP_UDP | SKC_LOOKUP_TCP => {
                    assert_eq!((args[0], args[3], args[4]), (CONTEXT, u64::MAX, 0));
                    let asked = memory.at(args[1], bytes(args[2])).to_vec();
                    let found = known.is_some_and(|it| it.helper == helper && it.tuple == asked);
                    held += u32::from(found);
                    if found { SOCKET } else { 0 }
                }
                SK_RELEASE => {
                    assert_eq!(args[0], SOCKET);
                    held -= 1;
                    0
                }
                CLONE_REDIRECT => {
                    assert_eq!(args[..3], [CONTEXT, TAP.into(), 0]);
                    cloned = true;
                    0
                }
                other => panic!("helper {other}"),
            })
        });
        assert_eq!(held, 0, "a reference to a socket was kept");
        match (answer, cloned) {
            (Some(0), false) => Fate::Host,
            (Some(0), true) => Fate::Both,
            (Some(u64::MAX), false) => Fate::Guest,
            other => panic!("{other:?}"),
        }
    }

    const V4_ADDRESSES: [u8; 8] = [10, 0, 0, 53, 172, 18, 0, 2];

    fn v4(protocol: i32, from: u16) -> Vec<u8> {
        let mut packet = vec![0; 12];
        packet[0] = 0x45;
        // Do not fragment.
        packet[6] = 0x40;
        packet[9] = protocol.try_into().unwrap();
        packet.extend(tuple(&V4_ADDRESSES, from, CLIENT));
        packet
    }

    fn asker(helper: i32, addresses: &[u8], from: u16, peer_port: u16) -> Known {
        Known {
            helper,
            tuple: tuple(addresses, from, CLIENT),
            peer_port,
        }
    }

    #[test]
    fn an_answer_to_a_connected_socket_stays_on_the_host() {
        let udp = asker(SK_LOOKUP_UDP, &V4_ADDRESSES, 53, 53);
        let tcp = asker(SKC_LOOKUP_TCP, &V4_ADDRESSES, 53, 53);
        assert_eq!(run(IPV4, &v4(UDP, 53), Some(&udp)), Fate::Host);
        assert_eq!(run(IPV4, &v4(TCP, 53), Some(&tcp)), Fate::Host);
        for (protocol, helper) in [(UDP, SK_LOOKUP_UDP), (TCP, SKC_LOOKUP_TCP)] {
            let addresses: Vec<u8> = (0..32).collect();
            let mut packet = vec![0; 8];
            packet[6] = protocol.try_into().unwrap();
            packet.extend(tuple(&addresses, 53, CLIENT));
            let known = asker(helper, &addresses, 53, 53);
            assert_eq!(run(IPV6, &packet, Some(&known)), Fate::Host);
            assert_eq!(run(IPV6, &packet, None), Fate::Guest);
        }
    }

    #[test]
    fn what_nobody_asked_for_goes_into_the_guest() {
        let asked = asker(SK_LOOKUP_UDP, &V4_ADDRESSES, 53, 53);
        let other = asker(SK_LOOKUP_UDP, &V4_ADDRESSES, 80, 80);
        let unconnected = asker(SK_LOOKUP_UDP, &V4_ADDRESSES, 53, 0);
        let listening = asker(SKC_LOOKUP_TCP, &V4_ADDRESSES, 53, 0);
        assert_eq!(run(IPV4, &v4(UDP, 53), None), Fate::Guest);
        assert_eq!(run(IPV4, &v4(TCP, 53), Some(&asked)), Fate::Guest);
        assert_eq!(run(IPV4, &v4(UDP, 80), Some(&other)), Fate::Guest);
        assert_eq!(run(IPV4, &v4(1, 53), Some(&asked)), Fate::Guest);
        assert_eq!(run(IPV4, &v4(UDP, 53), Some(&unconnected)), Fate::Guest);
        assert_eq!(run(IPV4, &v4(TCP, 53), Some(&listening)), Fate::Guest);
        assert_eq!(run(0x88cc, &v4(UDP, 53), Some(&asked)), Fate::Guest);
    }

    #[test]
    fn what_is_short_in_pieces_or_has_options_goes_into_the_guest() {
        let asked = asker(SK_LOOKUP_UDP, &V4_ADDRESSES, 53, 53);
        let whole = v4(UDP, 53);
        assert_eq!(run(IPV4, &whole[..23], Some(&asked)), Fate::Guest);
        for (at, value) in [(0, 0x46), (6, 0x20), (6, 0x01), (7, 0x01)] {
            let mut packet = whole.clone();
            packet[at] = value;
            assert_eq!(run(IPV4, &packet, Some(&asked)), Fate::Guest);
        }
    }

    #[test]
    fn both_learn_of_neighbours() {
        let arp = |operation| [0, 1, 8, 0, 6, 4, 0, operation];
        assert_eq!(run(ARP, &arp(2), None), Fate::Both);
        assert_eq!(run(ARP, &arp(1), None), Fate::Guest);
        assert_eq!(run(ARP, &arp(2)[..7], None), Fate::Guest);
        let mut icmp = vec![0; 44];
        icmp[6] = 58;
        for (kind, fate) in [(135, Fate::Guest), (136, Fate::Both)] {
            icmp[40] = kind;
            assert_eq!(run(IPV6, &icmp, None), fate);
        }
    }
}
