//! What operations do to files, and what they leave open.

use super::*;

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
