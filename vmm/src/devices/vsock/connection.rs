//! One vsock connection: a stream socket of the host on one side, credit and shutdown flags on the other.
//!
//! ```text
//!             guest agrees
//!   Asking  ----------------> Open --- both sides done, or either side resets ---> gone
//!   (owner dialled)           (guest dialled: from the start)
//! ```
//! Guest to host: payload is written to the socket straight from guest memory; what the socket does not take is
//! buffered, at most the credit that was promised ([`Credit::alloc`]), and counted as forwarded only when it is written.
//! Host to guest: payload is read from the socket straight into guest memory, at most the guest's credit.
//! Half-close travels both ways: the guest's SHUTDOWN becomes shutdown(2) once all data is written, the end of the
//! host's stream becomes SHUTDOWN once all data is read.
//! The socket is watched edge-triggered: `readable` remembers the edge until the socket says that it would block.
//! Spec: virtio 1.2, 5.10.6.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::wire::{HEADER_BYTES, Header, Key, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::slice::At;
use crate::virtio::{Chain, GuestFault};

/// What becomes of a connection after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It lives.
    Keep,
    /// It is over, and the guest must be told.
    Reset,
    /// It is over, and the guest knows.
    Drop,
}

/// Counts of one direction, modulo 2^32 (5.10.6.3).
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    /// Size of the receiver's buffer, in bytes.
    pub alloc: u32,
    /// Bytes sent into it so far.
    pub sent: u32,
    /// Bytes taken out of it so far, as far as the sender knows.
    pub forwarded: u32,
}

impl Credit {
    /// Bytes that may be sent now. Impossible counts yield nothing.
    pub fn left(&self) -> u32 {
        self.alloc
            .saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }
}

/// Packets that must be sent as soon as the guest has a buffer for them.
#[derive(Debug, Default)]
struct Owed {
    opening: Option<Op>,
    credit_update: bool,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    socket: UnixStream,
    open: bool,
    owed: Owed,
    /// In the muxer's list of those that have something to send.
    pub queued: bool,
    /// By which the thread's epoll names it; never the same twice in a row for one slot.
    pub token: u32,
    /// Who asked for it; the guest's are counted.
    pub by_guest: bool,

    /// Guest to host, as the guest sees it: `forwarded` is what it was told.
    inward: Credit,
    forwarded: u32,
    buffer: VecDeque<u8>,
    guest_done: bool,
    told_host: bool,
    host_deaf: bool,

    /// Host to guest.
    outward: Credit,
    readable: bool,
    ended: bool,
    hung_up: bool,
    host_done: bool,
    guest_deaf: bool,
    credit_asked: bool,
    told: u32,
}

impl Connection {
    /// The guest asked for it with `header`; the owner has the other end of `socket`.
    pub fn accepted(header: &Header, socket: UnixStream, alloc: u32) -> Self {
        let mut connection = Self::new(header.key, socket, alloc, Op::Response);
        connection.open = true;
        connection.by_guest = true;
        connection.learn(header);
        connection
    }

    /// The owner asks the guest for it.
    pub fn dialled(key: Key, socket: UnixStream, alloc: u32) -> Self {
        Self::new(key, socket, alloc, Op::Request)
    }

    fn new(key: Key, socket: UnixStream, alloc: u32, opening: Op) -> Self {
        Self {
            key,
            socket,
            open: false,
            owed: Owed {
                opening: Some(opening),
                credit_update: false,
            },
            queued: false,
            token: 0,
            by_guest: false,
            inward: Credit {
                alloc,
                ..Credit::default()
            },
            forwarded: 0,
            buffer: VecDeque::new(),
            guest_done: false,
            told_host: false,
            host_deaf: false,
            outward: Credit::default(),
            readable: false,
            ended: false,
            hung_up: false,
            host_done: false,
            guest_deaf: false,
            credit_asked: false,
            told: 0,
        }
    }

    /// Which connection this is.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Bytes it may have to buffer.
    pub fn alloc(&self) -> u32 {
        self.inward.alloc
    }

    fn learn(&mut self, header: &Header) {
        self.outward.alloc = header.buf_alloc;
        self.outward.forwarded = header.fwd_cnt;
        self.credit_asked &= self.outward.left() == 0;
    }

    /// A packet of the guest, whose payload starts after the header in the readable part of `chain`.
    ///
    /// # Errors
    /// [`GuestFault::Short`] if the chain is shorter than the header says.
    pub fn packet(&mut self, header: &Header, chain: &Chain) -> Result<After, GuestFault> {
        self.learn(header);
        Ok(match (self.open, header.op) {
            (false, Op::Response) => {
                self.open = true;
                After::Keep
            }
            (false, Op::Reset) => After::Drop,
            (true, Op::Data) => return self.data(header.len, chain),
            (true, Op::Shutdown) => self.guest_shuts(header.flags),
            (true, Op::CreditUpdate) => After::Keep,
            (true, Op::CreditRequest) => {
                self.owed.credit_update = true;
                After::Keep
            }
            // A guest that closed and lost patience: what it sent before is still delivered.
            (true, Op::Reset) if self.guest_done && !self.buffer.is_empty() => {
                self.guest_deaf = true;
                After::Keep
            }
            (true, Op::Reset) => After::Drop,
            (false, _) | (true, Op::Request | Op::Response) => After::Reset,
        })
    }

    fn data(&mut self, len: u32, chain: &Chain) -> Result<After, GuestFault> {
        let outstanding = self.inward.sent.wrapping_sub(self.forwarded);
        if self.guest_done || len > self.inward.alloc.saturating_sub(outstanding) {
            return Ok(After::Reset); // after its own shutdown, or more than it was promised
        }
        self.inward.sent = self.inward.sent.wrapping_add(len);
        // A u32 fits into a usize on x86-64.
        let (mut at, end) = (HEADER_BYTES, HEADER_BYTES + len as usize);
        if chain.readable_len() < end {
            return Err(GuestFault::Short {
                need: end,
                got: chain.readable_len(),
            });
        }
        while at < end && self.buffer.is_empty() && !self.host_deaf {
            match chain.write_to(at, end - at, self.socket.as_fd(), At::Stream) {
                Ok(written) => at += self.forward(written),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_deaf = true,
            }
        }
        if self.host_deaf {
            self.forward(end - at);
        } else if at < end {
            let mut rest = vec![0; end - at];
            chain.read(at, &mut rest)?;
            self.buffer.extend(rest);
        }
        Ok(After::Keep)
    }

    /// Counts bytes that left the buffer; asks for a credit update once half of it is news to the guest.
    fn forward(&mut self, bytes: usize) -> usize {
        // Never more than `alloc`, a u32.
        self.forwarded = self
            .forwarded
            .wrapping_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.inward.left() < self.inward.alloc / 2 && self.forwarded != self.inward.forwarded {
            self.owed.credit_update = true;
        }
        bytes
    }

    fn guest_shuts(&mut self, flags: u32) -> After {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // Fails only when the owner is gone, and then it writes nothing.
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        self.guest_done |= flags & SHUTDOWN_SEND != 0;
        self.drained()
    }

    /// What follows when there is nothing (more) to write to the host.
    fn drained(&mut self) -> After {
        if !self.guest_done || !self.buffer.is_empty() {
            return After::Keep;
        }
        if self.guest_deaf {
            return After::Reset; // 5.10.6.5: the answer to a full shutdown
        }
        // Once only: it wakes this socket's own watch.
        if !std::mem::replace(&mut self.told_host, true) {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        After::Keep
    }

    /// The socket's readiness changed.
    pub fn event(&mut self, events: u32) -> After {
        let has = |flags: libc::c_int| events & flags.cast_unsigned() != 0;
        self.readable |= has(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR);
        self.ended |= has(libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR);
        if has(libc::EPOLLHUP) {
            self.hung_up = true;
            self.host_done |= self.guest_deaf;
        }
        if !self.open {
            return if self.hung_up {
                After::Reset
            } else {
                After::Keep
            };
        }
        self.flush();
        self.host_deaf |= self.hung_up && !self.guest_done;
        self.drained()
    }

    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let wrote = self.socket.write(self.buffer.as_slices().0);
            match wrote {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forward(written);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.host_deaf = true;
                    let lost = std::mem::take(&mut self.buffer);
                    self.forward(lost.len());
                }
            }
        }
        self.buffer = VecDeque::new(); // gives the memory back
    }

    /// SHUTDOWN flags that the guest has not been told yet.
    fn shutdown_due(&self) -> u32 {
        let send = if self.host_done { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told
    }

    fn wants_to_read(&self) -> bool {
        let room = self.outward.left() > 0 || !self.credit_asked;
        self.open && self.readable && !self.host_done && !self.guest_deaf && room
    }

    /// Whether there is something for the guest.
    pub fn has_work(&self) -> bool {
        self.owed.opening.is_some()
            || self.open
                && (self.owed.credit_update || self.wants_to_read() || self.shutdown_due() != 0)
    }

    /// Writes the next packet into `chain`; the bytes written, or `None` if there is nothing after all.
    ///
    /// # Errors
    /// The outer: the chain is too short. The inner: the connection is over ([`After::Reset`]).
    pub fn emit(&mut self, chain: &Chain) -> Result<Result<Option<usize>, After>, GuestFault> {
        let room = chain.writable_len().saturating_sub(HEADER_BYTES);
        if room == 0 {
            return Err(GuestFault::Short {
                need: HEADER_BYTES + 1,
                got: chain.writable_len(),
            });
        }
        if let Some(opening) = self.owed.opening.take() {
            return self.send(chain, opening, 0, 0).map(Ok);
        }
        if self.wants_to_read() {
            // A u32 fits into a usize on x86-64.
            let limit = room.min(self.outward.left() as usize);
            if limit == 0 {
                self.credit_asked = true;
                return self.send(chain, Op::CreditRequest, 0, 0).map(Ok);
            }
            match chain.read_from(HEADER_BYTES, limit, self.socket.as_fd(), At::Stream) {
                Ok(0) => self.host_done = true,
                Ok(len) => {
                    // A short read has emptied the socket, unless the end of the stream is behind it.
                    self.readable = len == limit || self.ended;
                    return self.send(chain, Op::Data, len, 0).map(Ok);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(Err(After::Reset)),
            }
        }
        self.host_deaf |= self.host_done && self.hung_up && !self.guest_done;
        let shutdown = self.shutdown_due();
        if shutdown != 0 {
            self.told |= shutdown;
            return self.send(chain, Op::Shutdown, 0, self.told).map(Ok);
        }
        if self.owed.credit_update {
            return self.send(chain, Op::CreditUpdate, 0, 0).map(Ok);
        }
        Ok(Ok(None))
    }

    fn send(
        &mut self,
        chain: &Chain,
        op: Op,
        len: usize,
        flags: u32,
    ) -> Result<Option<usize>, GuestFault> {
        // At most the guest's credit, a u32.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.outward.sent = self.outward.sent.wrapping_add(len);
        self.owed.credit_update = false;
        self.inward.forwarded = self.forwarded;
        let (buf_alloc, fwd_cnt) = (self.inward.alloc, self.forwarded);
        let header = Header {
            key: self.key,
            op,
            len,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        chain.write(0, &header.encode())?;
        Ok(Some(HEADER_BYTES + len as usize))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket that never makes the device's thread wait.
///
/// # Errors
/// fcntl's.
pub fn non_blocking(socket: UnixStream) -> io::Result<UnixStream> {
    socket.set_nonblocking(true)?;
    Ok(socket)
}
