//! The server driven as a guest drives it: FUSE messages in guest memory, replies out of it. No root, no KVM.

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
    let root: OwnedFd = fs::File::open(&share).unwrap().into();
    let serving = std::thread::spawn(move || {
        thread::enter(&root).unwrap();
        let driver = Driver::new();
        let server = FsServer::start(&driver.mem, thread::raise_descriptor_limit()).unwrap();
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

#[test]
fn a_file_of_the_host_is_found_read_written_and_closed() {
    guest(|guest| {
        guest.init();
        let (node, entry) = guest.lookup(ROOT, b"inside.txt").unwrap();
        assert_eq!(u64_at(&entry, 48), 20, "size");
        let (handle, options) = guest.open(node, libc::O_RDWR);
        assert_eq!(options & NOFLUSH, 0, "a writer is flushed");
        assert_eq!(guest.open(node, libc::O_RDONLY).1 & NOFLUSH, NOFLUSH);
        let (error, data) = guest.read(node, handle, 6, 4096);
        assert_eq!((error, data.as_slice()), (0, b"from the host\n".as_slice()));
        assert_eq!(guest.write(node, handle, 20, b"and from the guest\n"), 0);
        let text = fs::read_to_string(guest.share.join("inside.txt")).unwrap();
        assert_eq!(text, "hello from the host\nand from the guest\n");
        assert_eq!(guest.open_files(), 2);
        guest.server.reset();
        assert_eq!(
            guest.open_files(),
            0,
            "a reset closes what the guest opened"
        );
        assert_eq!(guest.read(node, handle, 0, 1).0, -libc::EBADF);
    });
}

#[test]
fn what_the_host_changes_is_seen_by_the_next_request() {
    guest(|guest| {
        guest.init();
        let (_, entry) = guest.lookup(ROOT, b"inside.txt").unwrap();
        assert_eq!(
            &entry[16..40],
            &[0; 24],
            "names and attributes of files are not cached"
        );
        let path = guest.share.join("inside.txt");
        fs::write(&path, "changed").unwrap();
        let (node, entry) = guest.lookup(ROOT, b"inside.txt").unwrap();
        assert_eq!(u64_at(&entry, 48), 7);
        let (_, options) = guest.open(node, libc::O_RDONLY);
        assert_eq!(
            options & 2,
            0,
            "a file that just changed is not kept in the guest's cache"
        );
        fs::write(guest.share.join("new"), "new").unwrap();
        fs::rename(guest.share.join("new"), &path).unwrap();
        assert_ne!(
            guest.lookup(ROOT, b"inside.txt").unwrap().0,
            node,
            "another file, another node"
        );
        fs::remove_file(&path).unwrap();
        assert_eq!(guest.lookup(ROOT, b"inside.txt").unwrap_err(), libc::ENOENT);
        fs::create_dir(guest.share.join("dir")).unwrap();
        let (_, entry) = guest.lookup(ROOT, b"dir").unwrap();
        assert_eq!(
            &entry[16..40],
            &[0; 24],
            "a directory that just changed is not cached"
        );
    });
}

#[test]
fn what_is_quiet_is_believed_for_a_tick() {
    // The package's own sources: older than two seconds, or they could not have been compiled.
    guest_of(env!("CARGO_MANIFEST_DIR").into(), |guest| {
        guest.init();
        let times = |entry: &[u8]| (u32_at(entry, 32), u32_at(entry, 36));
        let (_, file) = guest.lookup(ROOT, b"Cargo.toml").unwrap();
        assert_eq!(times(&file), (0, 1), "a name is asked for each time");
        let (_, dir) = guest.lookup(ROOT, b"src").unwrap();
        assert_eq!(times(&dir), (1, 1));
        let (_, reply) = guest.call(OPENDIR, ROOT, &[&[0; 8]]);
        let handle = u64_at(&reply, 0);
        let body = [longs(&[handle, 0]), words(&[4096, 0]), vec![0; 16]].concat();
        let (_, list) = guest.call(READDIRPLUS, ROOT, &[&body]);
        let mut at = 0;
        while at < list.len() {
            let known = u64_at(&list, at) != 0; // not `.` and `..`
            assert_eq!(times(&list[at..]), if known { (1, 1) } else { (0, 0) });
            let name = u32_at(&list, at + ENTRY_BYTES + 16) as usize;
            at += ENTRY_BYTES + (24 + name).next_multiple_of(8);
        }
        let (_, file) = guest.lookup(ROOT, b"Cargo.toml").unwrap();
        assert_eq!(times(&file), (0, 1), "after a listing as well");
    });
}

#[test]
fn pages_of_a_quiet_file_are_kept_from_its_second_open() {
    guest_of(env!("CARGO_MANIFEST_DIR").into(), |guest| {
        guest.init();
        let (node, _) = guest.lookup(ROOT, b"Cargo.toml").unwrap();
        let kept = [(); 3].map(|()| guest.open(node, libc::O_RDONLY).1 & 2 != 0);
        assert_eq!(kept, [false, true, true]);
    });
}

#[test]
fn a_name_cannot_leave_the_share() {
    guest(|guest| {
        guest.init();
        let (node, _) = guest.lookup(ROOT, b"inside.txt").unwrap();
        let names: [&[u8]; 7] = [
            b"..",
            b".",
            b"",
            b"../outside.txt",
            b"../new",
            b"/etc/passwd",
            b"a/b",
        ];
        for name in names {
            let mode = words(&[libc::S_IFREG | 0o644, 0, 0, 0]);
            let root = ROOT.to_le_bytes();
            let exchange = [longs(&[ROOT]), words(&[libc::RENAME_EXCHANGE, 0])].concat();
            let attempts: [(u32, Vec<&[u8]>); 11] = [
                (LOOKUP, vec![name, b"\0"]),
                (MKDIR, vec![&mode[..8], name, b"\0"]),
                (MKNOD, vec![&mode, name, b"\0"]),
                (CREATE, vec![&[0; 16], name, b"\0"]),
                (SYMLINK, vec![name, b"\0target\0"]),
                (UNLINK, vec![name, b"\0"]),
                (RMDIR, vec![name, b"\0"]),
                (RENAME, vec![&root, name, b"\0stolen\0"]),
                (RENAME, vec![&root, b"inside.txt\0", name, b"\0"]),
                (RENAME2, vec![&exchange, b"inside.txt\0", name, b"\0"]),
                (LINK, vec![&[2, 0, 0, 0, 0, 0, 0, 0], name, b"\0"]),
            ];
            for (opcode, body) in attempts {
                let (error, _) = guest.call(opcode, ROOT, &body);
                assert_eq!(error, -libc::EINVAL, "opcode {opcode}, name {name:?}");
            }
        }
        assert_eq!(node, 2, "the node that LINK named");
        assert_eq!(fs::read_dir(&guest.share).unwrap().count(), 1);
    });
}

#[test]
fn a_symbolic_link_is_a_link_and_nothing_to_follow() {
    guest(|guest| {
        guest.init();
        std::os::unix::fs::symlink("../outside.txt", guest.share.join("link")).unwrap();
        std::os::unix::fs::symlink("..", guest.share.join("up")).unwrap();
        let (link, entry) = guest.lookup(ROOT, b"link").unwrap();
        assert_eq!(u32_at(&entry, 40 + 60) & libc::S_IFMT, libc::S_IFLNK);
        assert_ne!(
            guest.call(OPEN, link, &[&[0; 8]]).0,
            0,
            "opened what a link points to"
        );
        let (up, _) = guest.lookup(ROOT, b"up").unwrap();
        assert_eq!(guest.lookup(up, b"outside.txt").unwrap_err(), libc::ENOTDIR);
    });
}

#[test]
fn hostile_requests_are_faults_or_error_replies() {
    guest(|guest| {
        assert_eq!(
            guest.call(GETATTR, ROOT, &[&[0; 16]]).0,
            -libc::EBADF,
            "before INIT"
        );
        let (error, _) = guest.call(INIT, 0, &[&words(&[7, 38, 0, 0])]);
        assert_eq!(error, -libc::EPROTO, "a client without submounts");
        guest.init();
        let (node, _) = guest.lookup(ROOT, b"inside.txt").unwrap();
        let (handle, _) = guest.open(node, libc::O_RDWR);
        let read = [longs(&[handle, 0]), words(&[0, 0]), vec![0; 16]].concat();
        for opcode in [READ, READDIR, READDIRPLUS] {
            for room in [vec![], vec![15], vec![7, 8]] {
                let fault = guest
                    .raw(&message(opcode, node, &[&read]), &room)
                    .unwrap_err();
                assert!(
                    matches!(fault, GuestFault::Short { need: 16, .. }),
                    "{fault}"
                );
            }
            guest.raw(&message(opcode, node, &[&read]), &[16]).unwrap();
        }
        for offset in [1 << 63, u64::MAX, i64::MAX as u64] {
            assert_eq!(guest.read(node, handle, offset, 4096).0, -libc::EINVAL);
            assert_eq!(guest.write(node, handle, offset, b"x"), -libc::EINVAL);
        }
        assert_eq!(guest.read(node, handle + 1, 0, 1).0, -libc::EBADF);
        assert_eq!(guest.read(node + 1, handle, 0, 1).0, -libc::EBADF);
        assert_eq!(guest.call(9999, ROOT, &[]).0, -libc::ENOSYS);
        let mut huge = message(LOOKUP, ROOT, &[b"x\0"]);
        huge[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(guest.raw(&huge, &[16, 4096]).unwrap().0, -libc::ENOMEM);
        for len in [0u32, 39, 40, 41, 43, 1 << 20] {
            let mut wrong = message(LOOKUP, ROOT, &[b"x\0"]);
            wrong[..4].copy_from_slice(&len.to_le_bytes());
            assert!(
                guest.raw(&wrong, &[16, 4096]).is_err(),
                "a header that says {len} bytes"
            );
        }
        assert!(guest.raw(&[], &[4096]).is_err() && guest.raw(&[0; 39], &[4096]).is_err());
        let fault = guest
            .raw(&message(LOOKUP, ROOT, &[b"x\0"]), &[2 << 20])
            .unwrap_err();
        assert!(matches!(fault, GuestFault::Chain(_)), "{fault}");
    });
}

#[test]
fn a_buffer_outside_of_memory_is_a_fault() {
    guest(|guest| {
        guest.init();
        for (addr, len) in [
            (u64::MAX - 8, 16),
            (crate::devices::driver::MEMORY_BYTES - 8, 40),
        ] {
            guest.driver.rewind();
            guest.driver.offer_raw(&[(addr, len, 0, 0)]);
            let chain = guest.driver.queue.pop_raw().unwrap().unwrap();
            assert!(guest.server.request(chain).is_err());
        }
    });
}

#[test]
fn forgets_are_taken_from_the_chain_once_and_never_beyond_it() {
    guest(|guest| {
        guest.init();
        let (node, _) = guest.lookup(ROOT, b"inside.txt").unwrap();
        let mut forget = |message: &[u8]| {
            guest.driver.rewind();
            guest.driver.offer(&[message], &[]);
            let chain = guest.driver.pop().unwrap().unwrap();
            guest.server.forget(&chain)
        };
        let batch = |count: u32| message(BATCH_FORGET, 0, &[&words(&[count, 0]), &longs(&[7, 1])]);
        forget(&batch(1)).unwrap();
        for bad in [batch(2), batch(1 << 16), batch(u32::MAX)] {
            assert!(
                forget(&bad).is_err(),
                "a batch that is longer than its chain"
            );
        }
        assert!(
            forget(&message(FORGET, node, &[])).is_err(),
            "without a count"
        );
        assert!(
            forget(&message(GETATTR, node, &[&[0; 16]])).is_err(),
            "needs a reply"
        );
        forget(&message(36, 0, &[&[0; 8]])).unwrap();
        forget(&message(FORGET, node, &[&u64::MAX.to_le_bytes()])).unwrap();
        assert_eq!(
            guest.call(GETATTR, node, &[&[0; 16]]).0,
            -libc::EBADF,
            "forgotten"
        );
    });
}

#[test]
fn rename_flags_sparse_files_and_attributes_work() {
    guest(|guest| {
        guest.init();
        fs::write(guest.share.join("other"), "other").unwrap();
        let rename = |flags: u32| [longs(&[ROOT]), words(&[flags, 0])].concat();
        let names: &[u8] = b"inside.txt\0other\0";
        let taken = guest
            .call(RENAME2, ROOT, &[&rename(libc::RENAME_NOREPLACE), names])
            .0;
        assert_eq!(taken, -libc::EEXIST);
        assert_eq!(
            guest
                .call(RENAME2, ROOT, &[&rename(libc::RENAME_EXCHANGE), names])
                .0,
            0
        );
        assert_eq!(fs::read(guest.share.join("inside.txt")).unwrap(), b"other");

        let (node, _) = guest.lookup(ROOT, b"other").unwrap();
        let (handle, _) = guest.open(node, libc::O_RDWR);
        let keep = longs(&[handle, 1 << 20, 4096]);
        assert_eq!(guest.call(FALLOCATE, node, &[&keep, &[0; 8]]).0, 0);
        assert_eq!(
            fs::metadata(guest.share.join("other")).unwrap().len(),
            (1 << 20) + 4096
        );
        let seek = [
            longs(&[handle, 0]),
            words(&[libc::SEEK_HOLE.cast_unsigned(), 0]),
        ]
        .concat();
        let (error, reply) = guest.call(LSEEK, node, &[&seek]);
        assert_eq!(error, 0);
        assert!(u64_at(&reply, 0) <= 1 << 20);

        let set = words(&[5, 0, 0, 0]);
        if guest
            .call(SETXATTR, node, &[&set, b"user.caisson\0value"])
            .0
            == 0
        {
            let (error, value) = guest.call(GETXATTR, node, &[&words(&[64, 0]), b"user.caisson\0"]);
            assert_eq!((error, value.as_slice()), (0, b"value".as_slice()));
        } else {
            println!("the file system of the test's directory has no user attributes");
        }
    });
}

#[test]
fn a_hundred_thousand_files_are_open_at_once() {
    guest(|guest| {
        guest.init();
        let (node, _) = guest.lookup(ROOT, b"inside.txt").unwrap();
        // A host that allows less is the limit.
        let host = thread::raise_descriptor_limit().saturating_sub(1024);
        let count = usize::try_from(host).unwrap().min(100_000);
        let handles: Vec<u64> = (0..count)
            .map(|_| guest.open(node, libc::O_RDONLY).0)
            .collect();
        for handle in [handles[0], handles[count / 2], handles[count - 1]] {
            let (error, data) = guest.read(node, handle, 0, 8192);
            assert_eq!((error, data.len()), (0, 20));
        }
        guest.server.reset();
        assert_eq!(guest.open_files(), 0);
    });
}

#[test]
fn a_removed_file_lives_until_the_guest_forgets_it() {
    guest(|guest| {
        guest.init();
        fs::create_dir(guest.share.join("dir")).unwrap();
        fs::write(guest.share.join("new"), "new").unwrap();
        fs::write(guest.share.join("twice"), "twice").unwrap();
        fs::hard_link(guest.share.join("twice"), guest.share.join("again")).unwrap();
        let names: [&[u8]; 3] = [b"inside.txt", b"dir", b"twice"];
        let [file, dir, twice] = names.map(|name| guest.lookup(ROOT, name).unwrap().0);
        let over = [longs(&[ROOT]), b"new\0inside.txt\0".to_vec()].concat();
        assert_eq!(guest.call(RENAME, ROOT, &[&over]).0, 0);
        assert_eq!(guest.call(RMDIR, ROOT, &[b"dir\0"]).0, 0);
        assert_eq!(guest.call(UNLINK, ROOT, &[b"twice\0"]).0, 0);
        assert_eq!(
            guest.open_files(),
            2,
            "one for each that lost its last name"
        );
        let (handle, _) = guest.open(file, libc::O_RDONLY);
        let (error, data) = guest.read(file, handle, 0, 8192);
        assert_eq!((error, data.len()), (0, 20));
        assert_eq!(guest.call(GETATTR, dir, &[&[0; 16]]).0, 0);
        assert_eq!(guest.lookup(dir, b"x").unwrap_err(), libc::ENOENT);
        for node in [file, dir, twice] {
            guest.driver.rewind();
            guest
                .driver
                .offer(&[&message(FORGET, node, &[&longs(&[1])])], &[]);
            let chain = guest.driver.pop().unwrap().unwrap();
            guest.server.forget(&chain).unwrap();
            assert_eq!(guest.call(GETATTR, node, &[&[0; 16]]).0, -libc::EBADF);
        }
        assert_eq!(guest.open_files(), 1, "the one that the guest has open");
    });
}

#[test]
fn a_refused_removal_keeps_nothing_open() {
    guest(|guest| {
        guest.init();
        fs::create_dir(guest.share.join("dir")).unwrap();
        fs::write(guest.share.join("dir/file"), "").unwrap();
        assert_eq!(guest.call(RMDIR, ROOT, &[b"dir\0"]).0, -libc::ENOTEMPTY);
        assert_eq!(guest.call(UNLINK, ROOT, &[b"dir\0"]).0, -libc::EISDIR);
        assert_eq!(guest.call(UNLINK, ROOT, &[b"none\0"]).0, -libc::ENOENT);
        let over = [longs(&[ROOT]), b"inside.txt\0dir\0".to_vec()].concat();
        assert_eq!(guest.call(RENAME, ROOT, &[&over]).0, -libc::EISDIR);
        assert_eq!(guest.open_files(), 0);
        assert_eq!(
            guest.call(GETATTR, 2, &[&[0; 16]]).0,
            -libc::EBADF,
            "and nothing known"
        );
    });
}

#[test]
fn what_the_server_lacks_says_so_as_the_kernel_expects() {
    guest(|guest| {
        guest.init();
        assert_eq!(
            guest.call(TMPFILE, ROOT, &[&[0; 16], b"x\0"]).0,
            -libc::ENOSYS
        );
        assert_eq!(guest.call(SETLK, ROOT, &[&[0; 48]]).0, -libc::ENOSYS);
    });
}

#[test]
fn every_kind_of_file_is_made_with_its_mode() {
    guest(|guest| {
        guest.init();
        let mknod = |mode: u32| words(&[mode, 0, 0o022, 0]);
        assert_eq!(
            guest
                .call(MKNOD, ROOT, &[&mknod(libc::S_IFIFO | 0o640), b"fifo\0"])
                .0,
            0
        );
        assert_eq!(
            guest
                .call(MKNOD, ROOT, &[&mknod(libc::S_IFSOCK | 0o777), b"sock\0"])
                .0,
            0
        );
        assert_eq!(
            guest
                .call(MKDIR, ROOT, &[&words(&[0o1777, 0o022]), b"dir\0"])
                .0,
            0
        );
        let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_DIRECT).cast_unsigned();
        let create = words(&[flags, libc::S_IFREG | 0o4755, 0o022, 0]);
        let (error, reply) = guest.call(CREATE, ROOT, &[&create, b"file\0"]);
        assert_eq!(error, 0);
        let (node, handle) = (u64_at(&reply, 0), u64_at(&reply, ENTRY_BYTES));
        assert_eq!(
            guest.write(node, handle, 0, b"unaligned"),
            0,
            "O_DIRECT stays in the guest"
        );
        let about = |name: &str| fs::symlink_metadata(Path::new(&guest.share).join(name)).unwrap();
        assert!(about("fifo").file_type().is_fifo() && about("sock").file_type().is_socket());
        let modes = ["fifo", "sock", "dir", "file"].map(|name| about(name).mode() & 0o7777);
        assert_eq!(modes, [0o640, 0o755, 0o1755, 0o4755]);
        for name in [b"fifo".as_slice(), b"sock"] {
            let (special, _) = guest.lookup(ROOT, name).unwrap();
            assert_ne!(
                guest.call(OPEN, special, &[&[0; 8]]).0,
                0,
                "the server opened {name:?}"
            );
        }
    });
}

#[test]
fn a_directory_is_listed_with_and_without_entries() {
    guest(|guest| {
        guest.init();
        for index in 0..100 {
            fs::write(guest.share.join(format!("file-{index:03}")), "").unwrap();
        }
        let (error, reply) = guest.call(OPENDIR, ROOT, &[&[0; 8]]);
        assert_eq!(error, 0);
        let handle = u64_at(&reply, 0);
        for opcode in [READDIR, READDIRPLUS] {
            let (mut seen, mut offset) = (0, 0);
            loop {
                let body = [longs(&[handle, offset]), words(&[4096, 0]), vec![0; 16]].concat();
                let (error, list) = guest.call(opcode, ROOT, &[&body]);
                assert_eq!(error, 0);
                if list.is_empty() {
                    break;
                }
                let entry = if opcode == READDIR { 0 } else { ENTRY_BYTES };
                let mut at = 0;
                while at < list.len() {
                    let dirent = &list[at + entry..];
                    offset = u64_at(dirent, 8);
                    at += entry + (24 + u32_at(dirent, 16) as usize).next_multiple_of(8);
                    seen += 1;
                }
            }
            assert_eq!(seen, 103, "100 files, inside.txt, . and ..");
        }
    });
}
