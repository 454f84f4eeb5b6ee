//! Programs of the kernel's for packets and sockets, loaded by bpf(2).
//!
//! | file | is |
//! |---|---|
//! | `instructions.rs` | the kernel's instructions, and how a program is put together (pure) |
//! | `lookup.rs` | TCP connections to the namespace's loopback addresses go to two sockets |
//! | `answers.rs` | what answers the namespace's own questions about names stays on the host |
//! | `interpreter.rs` | runs them in unit tests |
//!
//! Contract: what is made here lives as long as its descriptor, or what it was attached to.
//! The programs are so small that they are written in the kernel's instructions: libraries for that are far larger.
//! Spec: bpf(2), linux/bpf.h.

#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

mod answers;
mod instructions;
#[cfg(test)]
mod interpreter;
mod lookup;

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

pub(super) use self::{answers::answers, lookup::Lookup};

// Commands.
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;

/// `union bpf_attr` as far as any command here goes, in words of 32 bits; the kernel wants the rest to be zeros.
const ATTRIBUTE_WORDS: usize = 18;
type Attributes = [u32; ATTRIBUTE_WORDS];

/// What kind of program, and what it is to be attached to if the kernel wants to know at once.
#[derive(Debug, Clone, Copy)]
struct Purpose {
    kind: u32,
    attach: u32,
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

fn load(purpose: Purpose, program: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let [low, high] = words(program.as_ptr());
    let [license_low, license_high] = words(license.as_ptr());
    let count = u32::try_from(program.len()).unwrap_or(u32::MAX);
    let mut attributes = [0; ATTRIBUTE_WORDS];
    attributes[..6].copy_from_slice(&[purpose.kind, count, low, high, license_low, license_high]);
    // expected_attach_type
    attributes[17] = purpose.attach;
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
