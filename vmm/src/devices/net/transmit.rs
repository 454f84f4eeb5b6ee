//! Packets of the guest, out to the tap.
//!
//! Contract: a chain is one packet with its header. What is no packet (too short, too long) and what the tap does not
//! take (full, down, a header that the host's kernel refuses) is dropped, as a wire would.

use std::io;
use std::os::fd::BorrowedFd;

use super::{HEADER_BYTES, LARGEST_BYTES};
use crate::virtio::Chain;
use crate::virtio::slice::At;

/// An Ethernet header: less is no frame.
const SMALLEST_BYTES: usize = 14;

/// Sends the packet in `chain`; `false` if it was dropped.
pub(super) fn send(chain: &Chain, tap: BorrowedFd<'_>) -> bool {
    let len = chain.readable_len();
    if !(HEADER_BYTES + SMALLEST_BYTES..=HEADER_BYTES + LARGEST_BYTES).contains(&len) {
        return false;
    }
    loop {
        match chain.write_to(0, len, tap, At::Stream) {
            Ok(sent) => return sent == len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::devices::driver::Driver;

    fn sent(readable: &[&[u8]]) -> (bool, Vec<u8>) {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        let mut driver = Driver::new();
        driver.offer(readable, &[16]);
        let chain = driver.pop().unwrap().unwrap();
        let sent = send(&chain, tap.as_fd());
        let mut packet = vec![0; 1 << 17];
        let len = wire.recv(&mut packet).unwrap_or(0);
        packet.truncate(len);
        (sent, packet)
    }

    #[test]
    fn a_packet_leaves_whole_with_its_header() {
        let (ok, packet) = sent(&[&[1; 12], &[2; 14], &[3; 1500]]);
        assert!(ok && packet.len() == 1526);
        assert_eq!((packet[11], packet[12], packet[26]), (1, 2, 3));
        assert!(sent(&[&[7; HEADER_BYTES + LARGEST_BYTES]]).0);
    }

    #[test]
    fn what_is_no_packet_is_dropped() {
        for len in [0, 1, 12, 25, HEADER_BYTES + LARGEST_BYTES + 1] {
            let (ok, packet) = sent(&[&vec![0; len]]);
            assert!(!ok && packet.is_empty(), "{len} bytes left");
        }
    }

    #[test]
    fn a_tap_that_takes_nothing_loses_packets_only() {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        drop(wire);
        let mut driver = Driver::new();
        driver.offer(&[&[0; 100]], &[]);
        assert!(!send(&driver.pop().unwrap().unwrap(), tap.as_fd()));
    }
}
