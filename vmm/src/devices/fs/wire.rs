//! FUSE messages of the high-priority queue: the ones without a reply, parsed by ourselves.
//!
//! Contract: FORGET and BATCH_FORGET are parsed out of a checked chain, each byte read once; INTERRUPT is accepted and
//! means nothing (no request waits in the server); everything else on that queue is a fault. A batch is as long as its
//! chain, at most [`MAX_BATCH`] entries.
//! Spec: `struct fuse_in_header`, `fuse_forget_in`, `fuse_batch_forget_in`, `fuse_forget_one`; virtio 1.2, 5.11.6.

use virtiofsd::filesystem::Context;

use crate::virtio::{Chain, GuestFault};

/// Bytes of `struct fuse_out_header`, with which each reply starts.
pub(super) const REPLY_HEADER_BYTES: usize = 16;

const HEADER_BYTES: usize = 40;
const OPCODE_FORGET: u32 = 2;
const OPCODE_INTERRUPT: u32 = 36;
const OPCODE_BATCH_FORGET: u32 = 42;
const BATCH_HEADER_BYTES: usize = 8;
const BATCH_ENTRY_BYTES: usize = 16;

/// The most entries of a batch. The kernel sends as many as fit into a page.
pub(super) const MAX_BATCH: u32 = 1 << 16;

/// A message of the high-priority queue.
pub(super) struct Forget<'a> {
    chain: &'a Chain,
    /// The node of a FORGET.
    node: u64,
    kind: Kind,
}

enum Kind {
    Interrupt,
    One,
    Batch { count: u32 },
}

impl<'a> Forget<'a> {
    /// Decodes the headers.
    ///
    /// # Errors
    /// [`GuestFault`]: too short, too long, or not a message of this queue.
    pub(super) fn parse(chain: &'a Chain) -> Result<Self, GuestFault> {
        let opcode = u32::from_le_bytes(chain.read_array(4)?);
        let node = u64::from_le_bytes(chain.read_array(16)?);
        let kind = match opcode {
            OPCODE_INTERRUPT => Kind::Interrupt,
            OPCODE_FORGET => Kind::One,
            OPCODE_BATCH_FORGET => match u32::from_le_bytes(chain.read_array(HEADER_BYTES)?) {
                count @ ..=MAX_BATCH => Kind::Batch { count },
                _ => return Err(GuestFault::Protocol("a FUSE batch that is too long")),
            },
            _ => {
                return Err(GuestFault::Protocol(
                    "a FUSE request on the high-priority queue",
                ));
            }
        };
        Ok(Self { chain, node, kind })
    }

    /// Calls `forget(context, node, count)` for each entry.
    ///
    /// # Errors
    /// [`GuestFault::Short`] if the chain ends before the message; the entries before that are done.
    pub(super) fn each(&self, mut forget: impl FnMut(Context, u64, u64)) -> Result<(), GuestFault> {
        let context = Context {
            uid: 0.into(),
            gid: 0.into(),
            pid: 0,
        };
        match self.kind {
            Kind::Interrupt => {}
            Kind::One => {
                let count = u64::from_le_bytes(self.chain.read_array(HEADER_BYTES)?);
                forget(context, self.node, count);
            }
            Kind::Batch { count } => {
                for index in 0..count as usize {
                    let at = HEADER_BYTES + BATCH_HEADER_BYTES + index * BATCH_ENTRY_BYTES;
                    let node = u64::from_le_bytes(self.chain.read_array(at)?);
                    forget(
                        context,
                        node,
                        u64::from_le_bytes(self.chain.read_array(at + 8)?),
                    );
                }
            }
        }
        Ok(())
    }
}
