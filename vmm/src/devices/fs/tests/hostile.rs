//! Names that would leave the share, and messages that no kernel sends.

use super::*;

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
