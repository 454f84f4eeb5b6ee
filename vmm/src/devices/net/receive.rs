//! Packets from the tap, into the guest's buffers.
//!
//! Contract: a packet is read only when the buffers at hand can hold the largest one there may be, so none is ever cut
//! short (the tap would not say so). With mergeable buffers a packet spans as many chains as it needs; the others stay
//! at hand for the next. A packet's header says how many chains it took.
//! Errors: a first buffer without room for the header is a `GuestFault`. What the tap says, short of "nothing there",
//! is taken as its end.
//! Spec: virtio 1.2, 5.1.6.3 and 5.1.6.4.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::HEADER_BYTES;
use crate::counters::Counter;
use crate::memory::Mem;
use crate::virtio::slice::{At, read_into};
use crate::virtio::{Chain, GuestFault, Queue};

/// The most packets moved per call.
pub(super) const PACKETS_PER_EVENT: u32 = 64;
/// Where the number of chains is in the header.
const NUM_BUFFERS_AT: usize = 10;

/// Why [`Receiver::run`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The tap has no packet.
    TapEmpty,
    /// The guest's buffers cannot hold a packet; its next kick brings some.
    NoBuffers,
    /// Enough for now; the tap still has packets.
    Turn,
    /// The tap has no interface any more.
    TapGone,
}

/// The receiving half of an interface.
pub(super) struct Receiver {
    mem: Mem,
    /// Room for the largest packet, header included.
    room: usize,
    mergeable: bool,
    /// Popped chains that hold no packet yet, and their writable bytes.
    at_hand: VecDeque<Chain>,
    at_hand_bytes: usize,
    /// Chains to be used again.
    spare: Vec<Chain>,
    received: Counter,
}

impl Receiver {
    /// Nothing at hand.
    pub(super) fn new(mem: &Mem, room: usize, mergeable: bool, received: Counter) -> Self {
        Self {
            mem: mem.clone(),
            room,
            mergeable,
            at_hand: VecDeque::new(),
            at_hand_bytes: 0,
            spare: Vec::new(),
            received,
        }
    }

    /// Moves packets. The queue has been asked for a kick when this says [`Stop::NoBuffers`].
    pub(super) fn run(
        &mut self,
        queue: &mut Queue,
        tap: BorrowedFd<'_>,
    ) -> Result<Stop, GuestFault> {
        for _ in 0..PACKETS_PER_EVENT {
            if !self.gather(queue)? {
                return Ok(Stop::NoBuffers);
            }
            match self.read(tap) {
                Ok(len) => self.deliver(queue, len)?,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Stop::TapEmpty),
                    io::ErrorKind::Interrupted => {}
                    _ => return Ok(Stop::TapGone),
                },
            }
        }
        Ok(Stop::Turn)
    }

    /// Takes chains until the largest packet fits. Without mergeable buffers that is one chain, whatever its size.
    pub(super) fn gather(&mut self, queue: &mut Queue) -> Result<bool, GuestFault> {
        while self.at_hand.is_empty() || (self.mergeable && self.at_hand_bytes < self.room) {
            let mut chain = self.spare.pop().unwrap_or_else(|| Chain::new(&self.mem));
            if !queue.pop(&mut chain)? {
                self.spare.push(chain);
                return Ok(false);
            }
            self.at_hand_bytes += chain.writable_len();
            self.at_hand.push_back(chain);
        }
        Ok(true)
    }

    fn read(&self, tap: BorrowedFd<'_>) -> io::Result<usize> {
        let chains = if self.mergeable {
            self.at_hand.len()
        } else {
            1
        };
        let slices = self
            .at_hand
            .iter()
            .take(chains)
            .flat_map(|chain| chain.writable());
        match read_into(tap, At::Stream, slices.copied()) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            read => read,
        }
    }

    /// Puts a frame, behind a header that asks for nothing, into what [`Receiver::gather`] has brought. `false`: it does
    /// not fit, which without mergeable buffers the guest decides.
    pub(super) fn put(&mut self, queue: &mut Queue, frame: &[u8]) -> Result<bool, GuestFault> {
        let chains = if self.mergeable {
            self.at_hand.len()
        } else {
            1
        };
        let len = HEADER_BYTES + frame.len();
        let at_hand = self.at_hand.iter().take(chains);
        if at_hand.clone().map(Chain::writable_len).sum::<usize>() < len {
            return Ok(false);
        }
        let mut slices = at_hand.flat_map(|chain| chain.writable().iter().copied());
        let mut here = slices.next();
        for mut part in [&[0; HEADER_BYTES][..], frame] {
            while let (false, Some(slice)) = (part.is_empty(), here) {
                let copied = slice.copy_from(part);
                part = &part[copied..];
                here = match copied < slice.len() {
                    true => Some(slice.part(copied, slice.len())),
                    false => slices.next(),
                };
            }
        }
        self.deliver(queue, len)?;
        Ok(true)
    }

    /// Returns the chains that `len` bytes fill to the guest.
    fn deliver(&mut self, queue: &mut Queue, len: usize) -> Result<(), GuestFault> {
        let mut left = len;
        let mut used: u16 = 0;
        for chain in &self.at_hand {
            used += 1;
            left = left.saturating_sub(chain.writable_len());
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.at_hand.front() {
            let room = first.writable_len();
            if room < HEADER_BYTES {
                return Err(GuestFault::Short {
                    need: HEADER_BYTES,
                    got: room,
                });
            }
            first.write(NUM_BUFFERS_AT, &used.to_le_bytes())?;
        }
        let mut left = len;
        for chain in self.at_hand.drain(..usize::from(used)) {
            let part = left.min(chain.writable_len());
            left -= part;
            self.at_hand_bytes -= chain.writable_len();
            // A chain is less than 4 GiB.
            queue.push(chain.head(), u32::try_from(part).unwrap_or(u32::MAX))?;
            self.spare.push(chain);
        }
        self.received.add(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::counters::Counters;
    use crate::devices::driver::{Driver, WRITE};

    struct Bench {
        driver: Driver,
        receiver: Receiver,
        tap: UnixDatagram,
        wire: UnixDatagram,
    }

    fn bench(room: usize, mergeable: bool) -> Bench {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let driver = Driver::new();
        let counter = Counters::default().register("received");
        let receiver = Receiver::new(&driver.mem, room, mergeable, counter);
        Bench {
            driver,
            receiver,
            tap,
            wire,
        }
    }

    impl Bench {
        fn run(&mut self) -> Result<Stop, GuestFault> {
            self.receiver.run(&mut self.driver.queue, self.tap.as_fd())
        }

        fn send(&self, packet: &[u8]) {
            self.wire.send(packet).unwrap();
        }
    }

    #[test]
    fn a_packet_fills_as_many_buffers_as_it_needs() {
        let mut bench = bench(3000, true);
        let at: Vec<u64> = (0..4)
            .map(|_| bench.driver.offer(&[], &[1000])[0])
            .collect();
        bench.send(&[5; 2500]);
        bench.send(&[6; 100]);
        assert_eq!(
            bench.run().unwrap(),
            Stop::NoBuffers,
            "one buffer left: not enough for all"
        );
        assert_eq!(bench.driver.used(), (3, 2, 500));
        assert_eq!(
            bench.driver.get(at[0], 13)[10..],
            [3, 0, 5],
            "three buffers"
        );
        assert_eq!(bench.driver.get(at[2], 501)[499..], [5, 0]);
        for _ in 0..2 {
            bench.driver.offer(&[], &[1000]);
        }
        assert_eq!(bench.run().unwrap(), Stop::NoBuffers);
        assert_eq!(
            bench.driver.used(),
            (4, 3, 100),
            "the buffer that was left came next"
        );
        assert_eq!(bench.driver.get(at[3], 12)[10..], [1, 0]);
    }

    #[test]
    fn a_frame_is_put_behind_an_empty_header_across_buffers() {
        let mut bench = bench(1000, true);
        let at = [13, 20, 1000].map(|len| bench.driver.offer(&[], &[len])[0]);
        let frame: Vec<u8> = (1..=30).collect();
        let Bench {
            driver, receiver, ..
        } = &mut bench;
        assert!(receiver.gather(&mut driver.queue).unwrap());
        assert!(receiver.put(&mut driver.queue, &frame).unwrap());
        assert_eq!(driver.get(at[0], 13)[9..], [0, 3, 0, 1]);
        assert_eq!(driver.get(at[1], 20), frame[1..21]);
        assert_eq!(driver.get(at[2], 9), frame[21..]);
    }

    #[test]
    fn a_frame_larger_than_the_only_buffer_is_not_put() {
        let mut bench = bench(100, false);
        bench.driver.offer(&[], &[60]);
        assert!(bench.receiver.gather(&mut bench.driver.queue).unwrap());
        let put = |bench: &mut Bench, len| {
            let frame = vec![1; len];
            bench.receiver.put(&mut bench.driver.queue, &frame).unwrap()
        };
        assert!(!put(&mut bench, 49));
        assert!(put(&mut bench, 48));
        assert_eq!(bench.driver.used().0, 1);
    }

    #[test]
    fn nothing_is_read_without_room_for_the_largest() {
        let mut bench = bench(3000, true);
        bench.send(&[5; 100]);
        bench.driver.offer(&[], &[1000]);
        assert_eq!(bench.run().unwrap(), Stop::NoBuffers);
        assert_eq!(bench.driver.used().0, 0);
        bench.driver.offer(&[], &[2000]);
        assert_eq!(bench.run().unwrap(), Stop::NoBuffers);
        assert_eq!(bench.driver.used(), (1, 0, 100));
    }

    #[test]
    fn without_mergeable_buffers_a_packet_is_one_chain() {
        let mut bench = bench(1530, false);
        let at = bench.driver.offer(&[], &[12, 1600]);
        bench.driver.offer(&[], &[12, 1600]);
        bench.send(&[9; 1512]);
        assert_eq!(bench.run().unwrap(), Stop::TapEmpty);
        assert_eq!(bench.driver.used(), (1, 0, 1512));
        assert_eq!(bench.driver.get(at[0], 12)[9..], [9, 1, 0]);
    }

    #[test]
    fn a_flood_is_taken_in_turns() {
        let mut bench = bench(200, true);
        for _ in 0..100 {
            bench.driver.offer(&[], &[200]);
        }
        let flood = File::open("/dev/zero").unwrap();
        let stop = bench
            .receiver
            .run(&mut bench.driver.queue, flood.as_fd())
            .unwrap();
        assert_eq!((stop, bench.driver.used()), (Stop::Turn, (64, 63, 200)));
    }

    #[test]
    fn a_tap_that_is_gone_ends_the_watch() {
        let mut bench = bench(200, true);
        bench.driver.offer(&[], &[200]);
        let gone = File::open("/dev/null").unwrap();
        let stop = bench
            .receiver
            .run(&mut bench.driver.queue, gone.as_fd())
            .unwrap();
        assert_eq!(stop, Stop::TapGone);
    }

    #[test]
    fn buffers_that_cannot_hold_a_header_are_faults() {
        let mut bench = bench(100, true);
        for _ in 0..20 {
            bench.driver.offer_raw(&[(0x20_0000, 8, WRITE, 0)]);
        }
        bench.send(&[1; 60]);
        assert!(bench.run().is_err());
    }

    #[test]
    fn chains_without_writable_bytes_never_loop() {
        let mut bench = bench(100, true);
        for _ in 0..200 {
            bench.driver.offer(&[&[1, 2, 3]], &[]);
        }
        bench.send(&[1; 60]);
        assert_eq!(bench.run().unwrap(), Stop::NoBuffers);
        assert_eq!(bench.driver.used().0, 0);
    }
}
