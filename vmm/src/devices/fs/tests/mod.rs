//! The server driven as a guest drives it: FUSE messages in guest memory, replies out of it. No root, no KVM.
//!
//! Here: the guest's half. The tests are in groups: `files.rs`, `coherence.rs`, `hostile.rs`.

mod coherence;
mod files;
mod hostile;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::*;
use crate::devices::driver::Driver;
use crate::virtio::GuestFault;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const SETLK: u32 = 32;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const TMPFILE: u32 = 51;
const ROOT: u64 = 1;
/// What a 6.12 kernel offers, as far as it matters here: DONT_MASK, POSIX_ACL, SUBMOUNTS, KILLPRIV_V2, SETXATTR_EXT.
const CAPABLE: u32 = 1 << 6 | 1 << 20 | 1 << 27 | 1 << 28 | 1 << 29;
const ENTRY_BYTES: usize = 128;
const NOFLUSH: u32 = 1 << 5;

fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let mut bytes = u32::try_from(40 + body.len())
        .unwrap()
        .to_le_bytes()
        .to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

struct Guest {
    driver: Driver,
    server: FsServer,
    share: PathBuf,
}

/// Runs `test` as a guest of a share that has a directory beside it.
fn guest(test: impl FnOnce(&mut Guest) + Send + 'static) {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("inside.txt"), "hello from the host\n").unwrap();
    fs::write(dir.path().join("outside.txt"), "secret").unwrap();
    guest_of(share, test);
    assert_eq!(fs::read(dir.path().join("outside.txt")).unwrap(), b"secret");
    let beside = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(beside, 2, "something was made or removed beside the share");
}

/// Runs `test` as a guest of `share`, on a thread that serves it.
fn guest_of(share: PathBuf, test: impl FnOnce(&mut Guest) + Send + 'static) {
    guest_with(share, None, test);
}

/// The same with trees that the guest may believe.
fn guest_with(
    share: PathBuf,
    own: Option<OwnTrees>,
    test: impl FnOnce(&mut Guest) + Send + 'static,
) {
    let root: OwnedFd = fs::File::open(&share).unwrap().into();
    let serving = std::thread::spawn(move || {
        thread::enter(&root).unwrap();
        let driver = Driver::new();
        let server = FsServer::start(&driver.mem, thread::raise_descriptor_limit(), own).unwrap();
        test(&mut Guest {
            driver,
            server,
            share,
        });
    });
    serving.join().unwrap();
}

impl Guest {
    /// One request with room for `room` bytes of reply.
    fn raw(&mut self, message: &[u8], room: &[u32]) -> Result<(i32, Vec<u8>), GuestFault> {
        self.driver.rewind();
        let (head, body) = message.split_at(40.min(message.len()));
        let addresses = self.driver.offer(&[head, body], room);
        let chain = self.driver.queue.pop_raw().unwrap().unwrap();
        let written = self.server.request(chain)? as usize;
        let mut reply = Vec::new();
        for (at, len) in addresses[2..].iter().zip(room) {
            reply.extend(self.driver.get(*at, *len as usize));
        }
        reply.truncate(written);
        if reply.is_empty() {
            return Ok((0, reply));
        }
        assert_eq!(u32_at(&reply, 0) as usize, written);
        assert_eq!(u64_at(&reply, 8), 77);
        Ok((u32_at(&reply, 4).cast_signed(), reply.split_off(16)))
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> (i32, Vec<u8>) {
        self.raw(&message(opcode, node, body), &[16, 8192]).unwrap()
    }

    fn init(&mut self) {
        let (error, reply) = self.call(INIT, 0, &[&words(&[7, 38, 1 << 17, CAPABLE]), &[0; 48]]);
        assert_eq!((error, u32_at(&reply, 0), u32_at(&reply, 4)), (0, 7, 38));
        assert_eq!(u32_at(&reply, 12) & CAPABLE, CAPABLE);
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<(u64, Vec<u8>), i32> {
        match self.call(LOOKUP, parent, &[name, b"\0"]) {
            (0, entry) => Ok((u64_at(&entry, 0), entry)),
            (error, _) => Err(-error),
        }
    }

    fn open(&mut self, node: u64, flags: i32) -> (u64, u32) {
        let (error, reply) = self.call(OPEN, node, &[&words(&[flags.cast_unsigned(), 0])]);
        assert_eq!(error, 0);
        (u64_at(&reply, 0), u32_at(&reply, 8))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> (i32, Vec<u8>) {
        let body = [longs(&[handle, offset]), words(&[size, 0]), vec![0; 16]].concat();
        self.call(READ, node, &[&body])
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> i32 {
        let size = u32::try_from(data.len()).unwrap();
        let body = [longs(&[handle, offset]), words(&[size, 0]), vec![0; 16]].concat();
        self.call(WRITE, node, &[&body, data]).0
    }

    /// Descriptors of this process that are files below the share.
    fn open_files(&self) -> usize {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        links
            .filter_map(|link| fs::read_link(link.unwrap().path()).ok())
            .filter(|target| target.starts_with(&self.share) && *target != self.share)
            .count()
    }
}
