//! The system calls that have no safe form: fork, memory maps, byte-range locks and a few that no crate offers.
//!
//! Contract: everything here is safe to call from a program with one thread, which this one is. Maps are read and
//! written byte by byte through volatile accesses inside their bounds; a fault beyond the end of the file is a SIGBUS
//! that ends the process, which some checks want.

#![allow(
    unsafe_code,
    reason = "fork, mmap, fcntl locks and truncate have no safe form"
)]

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::process::Pid;

/// The error of the call that just failed.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// fork(2): the child's id in the parent, none in the child.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: the process has one thread (no check starts another), so the child may do whatever the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(last_errno()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// alarm(2): SIGALRM after this many seconds, which nobody catches.
pub(crate) fn alarm(seconds: u32) {
    // SAFETY: alarm takes a number and touches no memory of the caller.
    unsafe { libc::alarm(seconds) };
}

/// Ignores a signal, so that its system call fails instead.
pub(crate) fn ignore(signal: i32) {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// truncate(2) with a length that may be negative.
pub(crate) fn truncate(path: &str, length: i64) -> Result<(), Errno> {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), length) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// What a map may do, and with whom it is shared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    SharedRead,
    SharedWrite,
    PrivateWrite,
    SharedExecute,
}

/// A map of a file.
pub(crate) struct Map {
    start: NonNull<u8>,
    len: usize,
}

impl Map {
    /// mmap(2) of `len` bytes from the start of `file`.
    pub(crate) fn new(file: impl AsFd, len: usize, access: Access) -> Result<Self, Errno> {
        let (protection, flags) = match access {
            Access::SharedRead => (libc::PROT_READ, libc::MAP_SHARED),
            Access::SharedWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED),
            Access::PrivateWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE),
            Access::SharedExecute => (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED),
        };
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: the kernel chooses a free address, so no existing memory is replaced.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len }),
            _ => Err(last_errno()),
        }
    }

    /// The byte at `index`.
    pub(crate) fn load(&self, index: usize) -> u8 {
        assert!(index < self.len);
        // SAFETY: `index` is below `len` (checked above), so the address is inside the map.
        let address = unsafe { self.start.add(index) };
        // SAFETY: the address is mapped for reading by every `Access`, until drop.
        unsafe { address.read_volatile() }
    }

    /// Writes the byte at `index`; the map must be writable, or the process ends by SIGSEGV.
    pub(crate) fn store(&self, index: usize, byte: u8) {
        assert!(index < self.len);
        // SAFETY: `index` is below `len` (checked above), so the address is inside the map.
        let address = unsafe { self.start.add(index) };
        // SAFETY: the address is mapped until drop, and no reference to it ever exists.
        unsafe { address.write_volatile(byte) };
    }

    /// Writes `bytes` at `index`.
    pub(crate) fn write(&self, index: usize, bytes: &[u8]) {
        bytes
            .iter()
            .enumerate()
            .for_each(|(offset, byte)| self.store(index + offset, *byte));
    }

    /// `len` bytes at `index`.
    pub(crate) fn read(&self, index: usize, len: usize) -> Vec<u8> {
        (index..index + len).map(|index| self.load(index)).collect()
    }

    /// msync(2), waiting.
    pub(crate) fn sync(&self) -> Result<(), Errno> {
        // SAFETY: the range is this map's own.
        match unsafe { libc::msync(self.start.as_ptr().cast(), self.len, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is this map's own and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Who owns a byte-range lock.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The process: `F_SETLK`.
    Process,
    /// The open file description: `F_OFD_SETLK`.
    OpenFile,
}

/// The kind of a byte-range lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Unlock,
}

/// A byte range; length 0 reaches to the end of all files.
pub(crate) type Range = (i64, i64);

/// A lock that stands in the way.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Conflict {
    pub(crate) kind: Kind,
    pub(crate) range: Range,
    /// The process, or -1 for a lock of an open file description.
    pub(crate) pid: i32,
}

const fn request(kind: Kind, range: Range) -> libc::flock {
    let kind = match kind {
        Kind::Read => libc::F_RDLCK,
        Kind::Write => libc::F_WRLCK,
        Kind::Unlock => libc::F_UNLCK,
    };
    // The constants are 0, 1 and 2 and SEEK_SET is 0.
    #[allow(clippy::cast_possible_truncation, reason = "the kinds are 0, 1 and 2")]
    libc::flock {
        l_type: kind as i16,
        l_whence: 0,
        l_start: range.0,
        l_len: range.1,
        l_pid: 0,
    }
}

/// Sets or clears a byte-range lock; `wait` blocks until it is free.
pub(crate) fn lock(
    file: impl AsFd,
    owner: Owner,
    kind: Kind,
    range: Range,
    wait: bool,
) -> Result<(), Errno> {
    let command = match (owner, wait) {
        (Owner::Process, false) => libc::F_SETLK,
        (Owner::Process, true) => libc::F_SETLKW,
        (Owner::OpenFile, false) => libc::F_OFD_SETLK,
        (Owner::OpenFile, true) => libc::F_OFD_SETLKW,
    };
    let request = request(kind, range);
    // SAFETY: `request` is a complete `struct flock` that outlives the call, which only reads it.
    match unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw const request) } {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}

/// The lock that would keep this one from being set, if any.
pub(crate) fn conflict(
    file: impl AsFd,
    owner: Owner,
    kind: Kind,
    range: Range,
) -> Result<Option<Conflict>, Errno> {
    let command = if owner == Owner::Process {
        libc::F_GETLK
    } else {
        libc::F_OFD_GETLK
    };
    let mut request = request(kind, range);
    // SAFETY: `request` is a complete `struct flock` that outlives the call, which may overwrite it.
    if unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut request) } == -1 {
        return Err(last_errno());
    }
    let kind = match i32::from(request.l_type) {
        libc::F_RDLCK => Kind::Read,
        libc::F_WRLCK => Kind::Write,
        _ => return Ok(None),
    };
    Ok(Some(Conflict {
        kind,
        range: (request.l_start, request.l_len),
        pid: request.l_pid,
    }))
}
