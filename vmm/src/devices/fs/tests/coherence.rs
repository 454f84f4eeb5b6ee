//! What the guest may believe, and for how long.

use super::*;

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
fn what_the_guest_itself_made_is_believed_for_a_tick() {
    guest(|guest| {
        guest.init();
        let times = |entry: &[u8]| (u32_at(entry, 32), u32_at(entry, 36));
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let create = words(&[flags, libc::S_IFREG | 0o644, 0o022, 0]);
        let (error, made) = guest.call(CREATE, ROOT, &[&create, b"file\0"]);
        assert_eq!((error, times(&made)), (0, (0, 1)));
        let (node, handle) = (u64_at(&made, 0), u64_at(&made, ENTRY_BYTES));
        assert_eq!(guest.write(node, handle, 0, b"of the guest"), 0);
        let (_, entry) = guest.lookup(ROOT, b"file").unwrap();
        assert_eq!((u64_at(&entry, 48), times(&entry)), (12, (0, 1)));
        let (_, dir) = guest.call(GETATTR, ROOT, &[&[0; 16]]);
        assert_eq!(u32_at(&dir, 8), 1, "its directory, too");
        // The clock of change times has moved on when this file's is another.
        let path = guest.share.join("file");
        let changed = |path: &Path| fs::metadata(path).unwrap().ctime_nsec();
        let before = changed(&path);
        while changed(&path) == before {
            fs::write(&path, "of the host").unwrap();
        }
        let (_, entry) = guest.lookup(ROOT, b"file").unwrap();
        assert_eq!((u64_at(&entry, 48), times(&entry)), (11, (0, 0)));
        // Nor what the guest changes next, because the host may again.
        assert_eq!(guest.write(node, handle, 0, b"of the guest"), 0);
        let (_, entry) = guest.lookup(ROOT, b"file").unwrap();
        assert_eq!((u64_at(&entry, 48), times(&entry)), (12, (0, 0)));
    });
}

#[test]
fn a_tree_of_the_guests_own_is_believed_and_nothing_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let own = OwnTrees {
        name: "rootfs".into(),
        believed_ms: 1500,
    };
    for place in [
        "c1/rootfs/etc",
        "c1/rootfs/rootfs",
        "c1/mounts/rootfs",
        "rootfs",
    ] {
        fs::create_dir_all(dir.path().join(place)).unwrap();
        fs::write(dir.path().join(place).join("file"), "").unwrap();
    }
    guest_with(dir.path().to_owned(), Some(own), |guest| {
        guest.init();
        // Seconds and nanoseconds that the name and the attributes last.
        let times = |entry: &[u8]| {
            let name = (u64_at(entry, 16), u32_at(entry, 32));
            (name, (u64_at(entry, 24), u32_at(entry, 36)))
        };
        let path = |guest: &mut Guest, names: &[&[u8]]| {
            let found = |node, name: &&[u8]| guest.lookup(node, name).unwrap().0;
            let dir = names[..names.len() - 1].iter().fold(ROOT, found);
            (
                dir,
                times(&guest.lookup(dir, names[names.len() - 1]).unwrap().1),
            )
        };
        let while_ = (1, 500_000_000);
        let believed = (while_, while_);
        let asked = ((0, 0), (0, 0));
        assert_eq!(path(guest, &[b"c1", b"rootfs", b"etc"]).1, believed);
        assert_eq!(
            path(guest, &[b"c1", b"rootfs", b"etc", b"file"]).1,
            believed
        );
        assert_eq!(
            path(guest, &[b"c1", b"rootfs", b"rootfs", b"file"]).1,
            believed
        );
        assert_eq!(path(guest, &[b"c1"]).1, asked);
        assert_eq!(
            path(guest, &[b"c1", b"mounts", b"rootfs", b"file"]).1,
            asked
        );
        assert_eq!(path(guest, &[b"rootfs", b"file"]).1, asked);
        let (strange, _) = path(guest, &[b"rootfs", b"file"]);
        let (etc, _) = path(guest, &[b"c1", b"rootfs", b"etc", b"file"]);
        let (node, absent) = guest.lookup(etc, b"absent").unwrap();
        assert_eq!((node, times(&absent).0), (0, while_));
        assert_eq!(guest.lookup(strange, b"absent").unwrap_err(), libc::ENOENT);
        let create = words(&[0o102, libc::S_IFREG | 0o644, 0o022, 0]);
        let (_, made) = guest.call(CREATE, etc, &[&create, b"absent\0"]);
        assert_eq!(times(&made), believed, "what it makes there as well");
        // Forgotten, until it is looked up again.
        guest.call(FORGET, etc, &[&longs(&[1])]);
        let (_, entry) = guest.lookup(etc, b"file").unwrap();
        assert_eq!(times(&entry), asked);
        assert_eq!(
            path(guest, &[b"c1", b"rootfs", b"etc", b"file"]).1,
            believed
        );
    });
}
