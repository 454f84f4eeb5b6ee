//! What POSIX and Linux promise about a file system, as small checks in the manner of `pjdfstest`.
//!
//! A check gets an empty directory of its own and a process of its own, and panics with what it saw.
//! Each prints one line, `ok NAME` or `FAIL NAME`; `probe` fails if one failed. Not checked, because one virtual machine per share cannot have it:
//! leases (`F_SETLEASE`) and locks against processes of the host.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use caisson_tests::tree::access_list;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Gid, Mode, OFlags, RenameFlags,
    ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, copy_file_range, fallocate,
    flock, getxattr, inotify, link, listxattr, mkdir, mknodat, open, openat2, removexattr, rename,
    renameat_with, rmdir, setxattr, statfs, unlink, utimensat,
};
use rustix::io::Errno;

/// A name and what must hold.
pub(crate) type Check = (&'static str, fn(&Path));

/// Checks for the superuser.
pub(crate) const AS_ROOT: &[Check] = &[
    (
        "exclusive creation refuses an existing file",
        exclusive_creation,
    ),
    ("creation applies the mode", creation_mode),
    ("truncation on open empties", truncation_on_open),
    ("appending writes go to the end", appending),
    ("paths through a file are refused", path_through_file),
    ("names have 255 bytes and no more", name_length),
    ("paths have 4095 bytes and no more", path_length),
    ("O_DIRECTORY refuses files and O_NOFOLLOW links", open_kinds),
    (
        "directories cannot be opened for writing",
        directory_for_writing,
    ),
    ("an unlinked open file lives on", unlinked_file),
    ("unlink refuses a directory and rmdir a file", wrong_removal),
    ("rmdir refuses a full directory", full_directory),
    ("mkdir refuses an existing name", existing_directory),
    (
        "a set-group-id directory hands its group down",
        group_inheritance,
    ),
    ("hard links share everything", hard_links),
    (
        "hard links to directories and over files are refused",
        refused_links,
    ),
    ("a hard link to a symbolic link is one", link_to_symlink),
    ("rename replaces a file at once", rename_over_file),
    (
        "rename refuses mixed kinds and full directories",
        refused_renames,
    ),
    ("rename into itself is refused", rename_into_itself),
    ("RENAME_NOREPLACE and RENAME_EXCHANGE", rename_flags),
    ("an open file survives its renaming", renamed_open_file),
    (
        "symbolic links keep their text and loops are found",
        symbolic_links,
    ),
    ("all twelve mode bits are kept", mode_bits),
    (
        "chown changes owner and group and clears set-id bits",
        changed_owner,
    ),
    ("writing by root keeps data and size", plain_writing),
    ("truncate grows with zeros and shrinks", truncating),
    ("sparse files have holes", sparse_files),
    (
        "fallocate reserves, keeps size and punches holes",
        allocation,
    ),
    ("times are kept to the nanosecond and can be omitted", times),
    (
        "writing, changing and creating move the right times",
        moved_times,
    ),
    (
        "extended attributes are set, listed, replaced and removed",
        attributes,
    ),
    ("extended attributes hold 3000 bytes", long_attribute),
    (
        "access-control lists change the mode and are inherited",
        access_lists,
    ),
    (
        "a directory of 3000 entries is listed completely once",
        listing,
    ),
    ("a listing survives deletions", listing_while_deleting),
    ("listed kinds are the entries' kinds", listed_kinds),
    (
        "positioned reads and writes leave the offset alone",
        positioned,
    ),
    (
        "data written through one descriptor is read through another",
        coherent,
    ),
    ("copy_file_range copies", copied_range),
    ("locks conflict between descriptors", locks),
    ("inotify sees changes", watching),
    ("a FIFO connects two threads", fifo),
    ("a Unix socket can be bound and reached", socket),
    ("device nodes are made with their numbers", devices),
    ("statfs has room and names", file_system),
    (
        "synchronisation works on files and directories",
        synchronisation,
    ),
    ("O_TMPFILE works or says EOPNOTSUPP", unnamed_file),
    ("resolution cannot leave a directory", beneath),
    ("removing a directory tree frees it", removed_tree),
];

/// Checks for a user without privileges; the directory is the user's own and `../roots` holds root's files.
pub(crate) const AS_USER: &[Check] = &[
    ("root's secret file cannot be read", secret_file),
    (
        "root's directory cannot be searched or written",
        closed_directory,
    ),
    (
        "others' files cannot be changed or given away",
        others_files,
    ),
    ("the sticky bit protects", sticky_bit),
    ("an access-control list lets this user in", listed_user),
    (
        "writing and giving to a group clear set-id bits",
        cleared_bits,
    ),
    ("read-only files refuse their owner's writes", own_read_only),
];

/// Runs the checks below `dir`, each in a process of its own.
pub(crate) fn check(dir: &Path, checks: &[Check]) -> io::Result<()> {
    rustix::process::umask(Mode::empty());
    let mut failed = 0;
    for (index, (name, _)) in checks.iter().enumerate() {
        let own = dir.join(format!("check-{index}"));
        fs::create_dir(&own)?;
        if Command::new("/proc/self/exe")
            .args(["check", name])
            .arg(own)
            .status()?
            .success()
        {
            println!("ok {name}");
        } else {
            println!("FAIL {name}");
            failed += 1;
        }
    }
    if failed == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("{failed} checks failed")))
    }
}

/// Runs one check in this process.
pub(crate) fn check_one(name: &str, dir: &Path) -> io::Result<()> {
    let mut all = AS_ROOT.iter().chain(AS_USER);
    let (_, check) = all
        .find(|(known, _)| *known == name)
        .ok_or_else(|| io::Error::other(format!("no check {name}")))?;
    check(dir);
    Ok(())
}

/// Fails unless the operation was refused with this error.
#[track_caller]
fn refused<T>(result: rustix::io::Result<T>, expected: Errno) {
    match result {
        Ok(_) => panic!("worked instead of {expected}"),
        Err(error) => assert_eq!(error, expected),
    }
}

#[track_caller]
fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("write");
}

#[track_caller]
fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("stat").mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

fn truncate(path: &Path, length: u64) -> rustix::io::Result<()> {
    rustix::fs::ftruncate(open(path, OFlags::WRONLY, Mode::empty())?, length)
}

fn exclusive_creation(dir: &Path) {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    open(dir.join("a"), flags, Mode::RUSR).expect("create");
    refused(open(dir.join("a"), flags, Mode::RUSR), Errno::EXIST);
    symlink("nowhere", dir.join("link")).expect("symlink");
    refused(open(dir.join("link"), flags, Mode::RUSR), Errno::EXIST);
}

fn creation_mode(dir: &Path) {
    for mode in [0o000, 0o640, 0o4755, 0o777] {
        let path = dir.join(format!("{mode:o}"));
        open(
            &path,
            OFlags::CREATE | OFlags::WRONLY,
            Mode::from_bits_retain(mode),
        )
        .expect("create");
        assert_eq!(mode_of(&path), mode);
    }
    mkdir(dir.join("d"), Mode::from_bits_retain(0o1751)).expect("mkdir");
    assert_eq!(mode_of(&dir.join("d")), 0o1751);
}

fn truncation_on_open(dir: &Path) {
    write(&dir.join("a"), "content");
    File::create(dir.join("a")).expect("open");
    assert_eq!(fs::metadata(dir.join("a")).expect("stat").len(), 0);
}

fn appending(dir: &Path) {
    let open = || {
        File::options()
            .append(true)
            .create(true)
            .open(dir.join("a"))
            .expect("open")
    };
    let (mut one, mut two) = (open(), open());
    one.write_all(b"1")
        .and_then(|()| two.write_all(b"2"))
        .expect("write");
    one.seek(SeekFrom::Start(0)).expect("seek");
    one.write_all(b"3").expect("write");
    assert_eq!(fs::read(dir.join("a")).expect("read"), b"123");
}

fn path_through_file(dir: &Path) {
    write(&dir.join("file"), "");
    refused(
        open(dir.join("file/x"), OFlags::RDONLY, Mode::empty()),
        Errno::NOTDIR,
    );
    refused(
        open(dir.join("none/x"), OFlags::RDONLY, Mode::empty()),
        Errno::NOENT,
    );
    refused(mkdir(dir.join("file/x"), Mode::RWXU), Errno::NOTDIR);
}

fn name_length(dir: &Path) {
    write(&dir.join("n".repeat(255)), "");
    refused(
        mkdir(dir.join("n".repeat(256)), Mode::RWXU),
        Errno::NAMETOOLONG,
    );
    refused(
        rename(dir.join("n".repeat(255)), dir.join("m".repeat(256))),
        Errno::NAMETOOLONG,
    );
    unlink(dir.join("n".repeat(255))).expect("unlink");
}

fn path_length(dir: &Path) {
    let base = dir.as_os_str().len();
    let deep = |length: usize| dir.join("./".repeat((length - base - 1) / 2 + 1));
    refused(
        open(deep(4200), OFlags::RDONLY, Mode::empty()),
        Errno::NAMETOOLONG,
    );
    open(deep(4000), OFlags::RDONLY, Mode::empty()).expect("open");
}

fn open_kinds(dir: &Path) {
    write(&dir.join("file"), "");
    symlink("file", dir.join("link")).expect("symlink");
    let opened = |name: &str, flags| open(dir.join(name), flags, Mode::empty());
    refused(opened("file", OFlags::DIRECTORY), Errno::NOTDIR);
    refused(opened("link", OFlags::NOFOLLOW), Errno::LOOP);
    opened("link", OFlags::NOFOLLOW | OFlags::PATH).expect("O_PATH opens the link");
}

fn directory_for_writing(dir: &Path) {
    refused(open(dir, OFlags::WRONLY, Mode::empty()), Errno::ISDIR);
    refused(open(dir, OFlags::RDWR, Mode::empty()), Errno::ISDIR);
    let read = File::open(dir).expect("open").read(&mut [0; 10]);
    assert_eq!(
        read.map_err(|e| e.raw_os_error()),
        Err(Some(Errno::ISDIR.raw_os_error()))
    );
}

fn unlinked_file(dir: &Path) {
    let path = dir.join("a");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("open");
    file.write_all(b"before").expect("write");
    unlink(&path).expect("unlink");
    file.write_all(b" after").expect("write");
    assert_eq!(file.metadata().expect("stat").nlink(), 0);
    file.set_permissions(fs::Permissions::from_mode(0o600))
        .expect("chmod");
    file.set_len(9).expect("truncate");
    let mut text = String::new();
    file.rewind()
        .and_then(|()| file.read_to_string(&mut text))
        .expect("read");
    assert_eq!(text, "before af");
    assert!(!path.exists());
}

fn wrong_removal(dir: &Path) {
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    write(&dir.join("f"), "");
    refused(unlink(dir.join("d")), Errno::ISDIR);
    refused(rmdir(dir.join("f")), Errno::NOTDIR);
    refused(rmdir(dir.join("d/.")), Errno::INVAL);
    refused(rmdir(dir.join("d/..")), Errno::NOTEMPTY);
    refused(unlink(dir.join("none")), Errno::NOENT);
    unlink(dir.join("f"))
        .and_then(|()| rmdir(dir.join("d")))
        .expect("remove");
}

fn full_directory(dir: &Path) {
    fs::create_dir_all(dir.join("d/e")).expect("mkdir");
    refused(rmdir(dir.join("d")), Errno::NOTEMPTY);
    rmdir(dir.join("d/e"))
        .and_then(|()| rmdir(dir.join("d")))
        .expect("rmdir");
}

fn existing_directory(dir: &Path) {
    write(&dir.join("f"), "");
    symlink("nowhere", dir.join("l")).expect("symlink");
    for name in ["f", "l", "."] {
        refused(mkdir(dir.join(name), Mode::RWXU), Errno::EXIST);
    }
}

fn group_inheritance(dir: &Path) {
    std::os::unix::fs::chown(dir, Some(0), Some(777)).expect("chown");
    chmod(dir, 0o2775);
    write(&dir.join("f"), "");
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    assert_eq!(fs::metadata(dir.join("f")).expect("stat").gid(), 777);
    assert_eq!(fs::metadata(dir.join("d")).expect("stat").gid(), 777);
    assert_eq!(mode_of(&dir.join("d")), 0o2700);
}

fn hard_links(dir: &Path) {
    write(&dir.join("a"), "one");
    link(dir.join("a"), dir.join("b")).expect("link");
    let stat = |name: &str| fs::metadata(dir.join(name)).expect("stat");
    assert_eq!((stat("a").ino(), stat("a").nlink()), (stat("b").ino(), 2));
    write(&dir.join("b"), "two");
    assert_eq!(fs::read_to_string(dir.join("a")).expect("read"), "two");
    chmod(&dir.join("a"), 0o123);
    assert_eq!(mode_of(&dir.join("b")), 0o123);
    unlink(dir.join("a")).expect("unlink");
    assert_eq!(stat("b").nlink(), 1);
}

fn refused_links(dir: &Path) {
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    write(&dir.join("a"), "");
    write(&dir.join("b"), "");
    refused(link(dir.join("d"), dir.join("e")), Errno::PERM);
    refused(link(dir.join("a"), dir.join("b")), Errno::EXIST);
    refused(link(dir.join("none"), dir.join("x")), Errno::NOENT);
}

fn link_to_symlink(dir: &Path) {
    symlink("text", dir.join("l")).expect("symlink");
    link(dir.join("l"), dir.join("m")).expect("link");
    assert_eq!(
        fs::read_link(dir.join("m")).expect("readlink"),
        Path::new("text")
    );
    assert_eq!(
        fs::symlink_metadata(dir.join("m")).expect("stat").nlink(),
        2
    );
}

fn rename_over_file(dir: &Path) {
    write(&dir.join("a"), "new");
    write(&dir.join("b"), "old");
    let old = File::open(dir.join("b")).expect("open");
    rename(dir.join("a"), dir.join("b")).expect("rename");
    assert_eq!(fs::read_to_string(dir.join("b")).expect("read"), "new");
    assert_eq!(io::read_to_string(old).expect("read"), "old");
    assert!(!dir.join("a").exists());
    fs::create_dir_all(dir.join("c/full")).expect("mkdir");
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    rename(dir.join("c"), dir.join("d")).expect("over an empty directory");
    assert!(dir.join("d/full").is_dir());
}

fn refused_renames(dir: &Path) {
    fs::create_dir_all(dir.join("d/full")).expect("mkdir");
    mkdir(dir.join("e"), Mode::RWXU).expect("mkdir");
    write(&dir.join("f"), "");
    refused(rename(dir.join("e"), dir.join("d")), Errno::NOTEMPTY);
    refused(rename(dir.join("f"), dir.join("e")), Errno::ISDIR);
    refused(rename(dir.join("e"), dir.join("f")), Errno::NOTDIR);
    refused(rename(dir.join("none"), dir.join("x")), Errno::NOENT);
}

fn rename_into_itself(dir: &Path) {
    fs::create_dir_all(dir.join("d/e")).expect("mkdir");
    refused(rename(dir.join("d"), dir.join("d/e/f")), Errno::INVAL);
    write(&dir.join("a"), "");
    link(dir.join("a"), dir.join("b")).expect("link");
    rename(dir.join("a"), dir.join("b")).expect("two names of one file: nothing happens");
    assert!(dir.join("a").exists() && dir.join("b").exists());
}

fn rename_flags(dir: &Path) {
    write(&dir.join("a"), "a");
    write(&dir.join("b"), "b");
    let (a, b) = (dir.join("a"), dir.join("b"));
    refused(
        renameat_with(CWD, &a, CWD, &b, RenameFlags::NOREPLACE),
        Errno::EXIST,
    );
    renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).expect("exchange");
    assert_eq!(fs::read_to_string(&a).expect("read"), "b");
    renameat_with(CWD, &a, CWD, dir.join("c"), RenameFlags::NOREPLACE).expect("to a free name");
}

fn renamed_open_file(dir: &Path) {
    let mut file = File::create(dir.join("a")).expect("create");
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    rename(dir.join("a"), dir.join("d/b")).expect("rename");
    file.write_all(b"late").expect("write");
    assert_eq!(fs::read_to_string(dir.join("d/b")).expect("read"), "late");
    rename(dir.join("d"), dir.join("e")).expect("rename the directory");
    file.write_all(b"r").expect("write");
    assert_eq!(fs::read_to_string(dir.join("e/b")).expect("read"), "later");
}

fn symbolic_links(dir: &Path) {
    let text = "x/".repeat(2000);
    symlink(&text, dir.join("long")).expect("symlink");
    assert_eq!(
        fs::read_link(dir.join("long"))
            .expect("readlink")
            .as_os_str(),
        text.as_str()
    );
    assert_eq!(
        fs::symlink_metadata(dir.join("long")).expect("stat").len(),
        4000
    );
    symlink("b", dir.join("a"))
        .and_then(|()| symlink("a", dir.join("b")))
        .expect("symlink");
    refused(
        open(dir.join("a"), OFlags::RDONLY, Mode::empty()),
        Errno::LOOP,
    );
    symlink("created", dir.join("c")).expect("symlink");
    write(&dir.join("c"), "through");
    assert_eq!(
        fs::read_to_string(dir.join("created")).expect("read"),
        "through"
    );
}

fn mode_bits(dir: &Path) {
    write(&dir.join("f"), "");
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    for mode in [0o7777, 0o4000, 0o2010, 0o1000, 0o000, 0o644] {
        for name in ["f", "d"] {
            chmod(&dir.join(name), mode);
            assert_eq!(mode_of(&dir.join(name)), mode, "{name}");
        }
    }
}

fn changed_owner(dir: &Path) {
    write(&dir.join("f"), "");
    chmod(&dir.join("f"), 0o6755);
    let chown = |uid, gid| {
        rustix::fs::chown(
            dir.join("f"),
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
        )
    };
    chown(1234, 4321).expect("chown");
    let stat = fs::metadata(dir.join("f")).expect("stat");
    assert_eq!(
        (stat.uid(), stat.gid(), stat.mode() & 0o7777),
        (1234, 4321, 0o755)
    );
    symlink("f", dir.join("l")).expect("symlink");
    std::os::unix::fs::lchown(dir.join("l"), Some(9), Some(8)).expect("lchown");
    let link = fs::symlink_metadata(dir.join("l")).expect("stat");
    assert_eq!((link.uid(), link.gid()), (9, 8));
    assert_eq!(fs::metadata(dir.join("f")).expect("stat").uid(), 1234);
}

fn plain_writing(dir: &Path) {
    let data: Vec<u8> = (0..3_000_000_u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    fs::write(dir.join("f"), &data).expect("write");
    assert!(
        fs::read(dir.join("f")).expect("read") == data,
        "other data came back"
    );
}

fn truncating(dir: &Path) {
    write(&dir.join("f"), "12345678");
    truncate(&dir.join("f"), 3).expect("shrink");
    truncate(&dir.join("f"), 6).expect("grow");
    assert_eq!(fs::read(dir.join("f")).expect("read"), b"123\0\0\0");
    refused(truncate(&dir.join("none"), 1), Errno::NOENT);
    refused(truncate(dir, 1), Errno::ISDIR);
}

fn sparse_files(dir: &Path) {
    let file = File::create(dir.join("f")).expect("create");
    file.write_at(b"end", 100 << 20).expect("write");
    let stat = file.metadata().expect("stat");
    assert_eq!(stat.len(), (100 << 20) + 3);
    assert!(stat.blocks() < 1000, "{} blocks", stat.blocks());
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).expect("SEEK_DATA");
    assert!(data > 0 && data <= 100 << 20, "{data}");
    assert_eq!(
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).expect("SEEK_HOLE"),
        0
    );
}

fn allocation(dir: &Path) {
    let path = dir.join("f");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .expect("open");
    fallocate(&file, FallocateFlags::empty(), 0, 100_000).expect("fallocate");
    assert_eq!(file.metadata().expect("stat").len(), 100_000);
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1 << 20).expect("keep size");
    assert_eq!(file.metadata().expect("stat").len(), 100_000);
    file.write_all_at(&[1; 16384], 0).expect("write");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 4096, 4096).expect("punch");
    let mut bytes = [9; 4098];
    file.read_exact_at(&mut bytes, 4095).expect("read");
    assert_eq!((bytes[0], bytes[1], bytes[4096], bytes[4097]), (1, 0, 0, 1));
}

fn times(dir: &Path) {
    let path = dir.join("f");
    write(&path, "");
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let set = |last_access, last_modification| {
        let times = Timestamps {
            last_access,
            last_modification,
        };
        utimensat(CWD, &path, &times, AtFlags::empty()).expect("utimensat");
    };
    set(time(1, 1), time(2_000_000_000, 999_999_999));
    let stat = || fs::metadata(&path).expect("stat");
    assert_eq!((stat().atime(), stat().atime_nsec()), (1, 1));
    assert_eq!(
        (stat().mtime(), stat().mtime_nsec()),
        (2_000_000_000, 999_999_999)
    );
    set(time(0, UTIME_OMIT), time(5, 0));
    assert_eq!((stat().atime(), stat().mtime()), (1, 5));
}

fn moved_times(dir: &Path) {
    let path = dir.join("f");
    write(&path, "");
    let old = Timespec {
        tv_sec: 1000,
        tv_nsec: 0,
    };
    let old = Timestamps {
        last_access: old,
        last_modification: old,
    };
    let stat = |path: &Path| fs::metadata(path).expect("stat");
    let reset = |path: &Path| utimensat(CWD, path, &old, AtFlags::empty()).expect("utimensat");
    reset(&path);
    let changed = stat(&path).ctime();
    assert!(changed > 1000, "the change time cannot be set");
    chmod(&path, 0o600);
    assert_eq!(stat(&path).mtime(), 1000, "chmod is no modification");
    write(&path, "more");
    assert!(stat(&path).mtime() > 1000, "writing is");
    for change in [0, 1, 2] {
        reset(dir);
        match change {
            0 => write(&dir.join("g"), ""),
            1 => rename(dir.join("g"), dir.join("h")).expect("rename"),
            _ => unlink(dir.join("h")).expect("unlink"),
        }
        assert!(stat(dir).mtime() > 1000, "change {change} of the directory");
    }
}

fn attributes(dir: &Path) {
    let path = dir.join("f");
    write(&path, "");
    let set = |name: &str, value: &str, flags| setxattr(&path, name, value.as_bytes(), flags);
    let read = |name: &str| {
        let mut value = [0; 100];
        getxattr(&path, name, &mut value).map(|length| value[..length].to_vec())
    };
    refused(read("user.a"), Errno::NODATA);
    refused(set("user.a", "1", XattrFlags::REPLACE), Errno::NODATA);
    set("user.a", "1", XattrFlags::CREATE).expect("set");
    refused(set("user.a", "2", XattrFlags::CREATE), Errno::EXIST);
    set("user.a", "22", XattrFlags::REPLACE).expect("replace");
    set("user.empty", "", XattrFlags::empty()).expect("set");
    assert_eq!(
        (read("user.a"), read("user.empty")),
        (Ok(b"22".to_vec()), Ok(Vec::new()))
    );
    let mut names = [0; 100];
    let length = listxattr(&path, &mut names).expect("list");
    let mut names: Vec<&[u8]> = names[..length]
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .collect();
    names.sort_unstable();
    assert_eq!(names, [b"user.a".as_slice(), b"user.empty"]);
    refused(getxattr(&path, "user.a", &mut [0; 1]), Errno::RANGE);
    removexattr(&path, "user.a").expect("remove");
    refused(removexattr(&path, "user.a"), Errno::NODATA);
}

fn long_attribute(dir: &Path) {
    let value = vec![7; 3000];
    setxattr(dir, "user.long", &value, XattrFlags::empty()).expect("set");
    let mut read = vec![0; 4096];
    assert_eq!(getxattr(dir, "user.long", &mut read), Ok(3000));
    assert!(read[..3000] == value, "other bytes came back");
}

fn access_lists(dir: &Path) {
    let path = dir.join("f");
    write(&path, "");
    chmod(&path, 0o600);
    setxattr(
        &path,
        "system.posix_acl_access",
        &access_list(0),
        XattrFlags::empty(),
    )
    .expect("set");
    assert_eq!(mode_of(&path), 0o774, "the mask is the group's bits");
    chmod(&path, 0o700);
    let mut list = [0; 100];
    let length = getxattr(&path, "system.posix_acl_access", &mut list).expect("get");
    assert_eq!(length, access_list(0).len());
    assert_eq!(list[4 + 4 * 8 + 2], 0, "chmod changed the mask");
    setxattr(
        dir,
        "system.posix_acl_default",
        &access_list(0),
        XattrFlags::empty(),
    )
    .expect("set");
    open(
        dir.join("g"),
        OFlags::CREATE | OFlags::WRONLY,
        Mode::from_bits_retain(0o666),
    )
    .expect("create");
    assert_eq!(mode_of(&dir.join("g")), 0o664, "inherited");
    mkdir(dir.join("d"), Mode::from_bits_retain(0o777)).expect("mkdir");
    getxattr(dir.join("d"), "system.posix_acl_default", &mut list).expect("handed down");
}

fn listing(dir: &Path) {
    let mut expected: Vec<String> = (0..3000).map(|n| format!("entry-{n}")).collect();
    expected.iter().for_each(|name| write(&dir.join(name), ""));
    let mut listed: Vec<String> = fs::read_dir(dir)
        .expect("list")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("name")
        })
        .collect();
    expected.sort();
    listed.sort();
    assert!(listed == expected, "{} entries listed", listed.len());
}

fn listing_while_deleting(dir: &Path) {
    (0..500).for_each(|n| write(&dir.join(n.to_string()), ""));
    let mut seen = 0;
    for entry in fs::read_dir(dir).expect("list") {
        unlink(entry.expect("entry").path()).expect("unlink");
        seen += 1;
    }
    assert_eq!(seen, 500);
    assert_eq!(fs::read_dir(dir).expect("list").count(), 0);
}

fn listed_kinds(dir: &Path) {
    write(&dir.join("file"), "");
    mkdir(dir.join("dir"), Mode::RWXU).expect("mkdir");
    symlink("x", dir.join("link")).expect("symlink");
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RWXU, 0).expect("mknod");
    for entry in fs::read_dir(dir).expect("list").flatten() {
        let listed = entry.file_type().expect("kind");
        assert_eq!(
            listed,
            fs::symlink_metadata(entry.path())
                .expect("stat")
                .file_type()
        );
    }
    let stat = fs::metadata(dir).expect("stat");
    let parent = fs::metadata(dir.join("dir/..")).expect("stat");
    assert_eq!((stat.ino(), stat.nlink()), (parent.ino(), 3));
}

fn positioned(dir: &Path) {
    let path = dir.join("f");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .expect("open");
    file.write_all(b"0123456789").expect("write");
    file.write_all_at(b"ab", 3).expect("pwrite");
    let mut two = [0; 2];
    file.read_exact_at(&mut two, 4).expect("pread");
    assert_eq!((&two, file.stream_position().expect("offset")), (b"b5", 10));
    assert_eq!(file.read_at(&mut two, 1000).expect("past the end"), 0);
}

fn coherent(dir: &Path) {
    let write = File::create(dir.join("f")).expect("create");
    let read = File::open(dir.join("f")).expect("open");
    for round in 0..100_u8 {
        write
            .write_all_at(&[round; 5000], u64::from(round) * 100)
            .expect("write");
        let mut bytes = [0; 5000];
        read.read_exact_at(&mut bytes, u64::from(round) * 100)
            .expect("read");
        assert_eq!(bytes, [round; 5000]);
    }
}

fn copied_range(dir: &Path) {
    fs::write(dir.join("a"), vec![5; 100_000]).expect("write");
    let (from, to) = (
        File::open(dir.join("a")).expect("open"),
        File::create(dir.join("b")).expect("create"),
    );
    let mut copied = 0;
    while copied < 100_000 {
        let more =
            copy_file_range(&from, None, &to, None, 100_000 - copied).expect("copy_file_range");
        assert!(more > 0, "stopped at {copied}");
        copied += more;
    }
    assert!(
        fs::read(dir.join("b")).expect("read") == vec![5; 100_000],
        "other bytes arrived"
    );
}

fn locks(dir: &Path) {
    let (one, two) = (
        File::create(dir.join("f")).expect("create"),
        File::open(dir.join("f")).expect("open"),
    );
    flock(&one, FlockOperation::LockExclusive).expect("flock");
    refused(
        flock(&two, FlockOperation::NonBlockingLockShared),
        Errno::WOULDBLOCK,
    );
    flock(&one, FlockOperation::Unlock).expect("unlock");
    flock(&two, FlockOperation::NonBlockingLockShared).expect("flock");
}

fn watching(dir: &Path) {
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).expect("inotify");
    inotify::add_watch(&watch, dir, inotify::WatchFlags::CREATE).expect("watch");
    write(&dir.join("f"), "");
    let mut events = [0; 256];
    assert!(File::from(watch).read(&mut events).expect("an event") > 0);
}

fn fifo(dir: &Path) {
    let path = dir.join("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("mkfifo");
    let writer = path.clone();
    let writer = std::thread::spawn(move || fs::write(writer, "through"));
    assert_eq!(fs::read_to_string(&path).expect("read"), "through");
    writer.join().expect("join").expect("write");
}

fn socket(dir: &Path) {
    // Addresses have 108 bytes: go there first.
    std::env::set_current_dir(dir).expect("chdir");
    let listener = UnixListener::bind("socket").expect("bind");
    let mut client = UnixStream::connect("socket").expect("connect");
    client.write_all(b"x").expect("write");
    let mut byte = [0];
    listener
        .accept()
        .expect("accept")
        .0
        .read_exact(&mut byte)
        .expect("read");
    assert_eq!(&byte, b"x");
    std::env::set_current_dir("/").expect("chdir");
}

fn devices(dir: &Path) {
    let number = rustix::fs::makedev(240, 17);
    mknodat(
        CWD,
        dir.join("c"),
        FileType::CharacterDevice,
        Mode::RUSR,
        number,
    )
    .expect("mknod");
    assert_eq!(
        fs::symlink_metadata(dir.join("c")).expect("stat").rdev(),
        number
    );
}

fn file_system(dir: &Path) {
    let numbers = statfs(dir).expect("statfs");
    assert!(numbers.f_blocks > 0 && numbers.f_bfree > 0 && numbers.f_files > 0);
    assert_eq!(numbers.f_namelen, 255);
}

fn synchronisation(dir: &Path) {
    let mut file = File::options()
        .write(true)
        .create(true)
        .custom_flags(OFlags::SYNC.bits().cast_signed())
        .open(dir.join("f"))
        .expect("open");
    file.write_all(b"x")
        .and_then(|()| file.sync_data())
        .and_then(|()| file.sync_all())
        .expect("sync");
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .expect("sync the directory");
}

fn unnamed_file(dir: &Path) {
    match open(dir, OFlags::TMPFILE | OFlags::RDWR, Mode::RWXU) {
        Ok(file) => File::from(file).write_all(b"x").expect("write"),
        Err(error) => assert_eq!(error, Errno::OPNOTSUPP),
    }
}

fn beneath(dir: &Path) {
    mkdir(dir.join("d"), Mode::RWXU).expect("mkdir");
    symlink("/etc", dir.join("d/out")).expect("symlink");
    let root = open(dir.join("d"), OFlags::PATH, Mode::empty()).expect("open");
    for path in ["..", "out/passwd", "/etc"] {
        refused(
            openat2(
                &root,
                path,
                OFlags::RDONLY,
                Mode::empty(),
                ResolveFlags::BENEATH,
            ),
            Errno::XDEV,
        );
    }
}

fn removed_tree(dir: &Path) {
    for outer in 0..10 {
        fs::create_dir_all(dir.join(format!("t/{outer}/deep/deeper"))).expect("mkdir");
        write(&dir.join(format!("t/{outer}/deep/file")), "x");
    }
    fs::remove_dir_all(dir.join("t")).expect("remove");
    assert_eq!(fs::read_dir(dir).expect("list").count(), 0);
}

fn secret_file(dir: &Path) {
    let roots = dir.join("../../roots");
    refused(
        open(roots.join("secret"), OFlags::RDONLY, Mode::empty()),
        Errno::ACCESS,
    );
    refused(
        open(roots.join("readable"), OFlags::WRONLY, Mode::empty()),
        Errno::ACCESS,
    );
    assert_eq!(
        fs::read_to_string(roots.join("readable")).expect("read"),
        "public"
    );
}

fn closed_directory(dir: &Path) {
    let roots = dir.join("../../roots");
    refused(
        open(roots.join("closed/file"), OFlags::RDONLY, Mode::empty()),
        Errno::ACCESS,
    );
    refused(
        open(roots.join("closed"), OFlags::RDONLY, Mode::empty()),
        Errno::ACCESS,
    );
    refused(mkdir(roots.join("mine"), Mode::RWXU), Errno::ACCESS);
    refused(unlink(roots.join("readable")), Errno::ACCESS);
}

fn others_files(dir: &Path) {
    let roots = dir.join("../../roots");
    refused(
        rustix::fs::chmod(roots.join("readable"), Mode::RWXU),
        Errno::PERM,
    );
    refused(
        rustix::fs::chown(roots.join("readable"), Some(Uid::from_raw(1000)), None),
        Errno::PERM,
    );
    write(&dir.join("mine"), "");
    refused(
        rustix::fs::chown(dir.join("mine"), Some(Uid::ROOT), None),
        Errno::PERM,
    );
    refused(
        setxattr(roots.join("readable"), "user.a", b"1", XattrFlags::empty()),
        Errno::ACCESS,
    );
}

fn sticky_bit(dir: &Path) {
    let sticky = dir.join("../../roots/sticky");
    refused(unlink(sticky.join("roots")), Errno::PERM);
    write(&sticky.join("users"), "");
    unlink(sticky.join("users")).expect("unlink");
}

fn listed_user(dir: &Path) {
    let listed = dir.join("../../roots/listed");
    assert_eq!(
        fs::read_to_string(listed).expect("the list names this user"),
        "listed"
    );
}

fn cleared_bits(dir: &Path) {
    let path = dir.join("f");
    write(&path, "");
    chmod(&path, 0o6777);
    File::options()
        .write(true)
        .open(&path)
        .expect("open")
        .write_all(b"x")
        .expect("write");
    assert_eq!(
        mode_of(&path),
        0o777,
        "a write by somebody without privileges"
    );
    chmod(&path, 0o6777);
    truncate(&path, 0).expect("truncate");
    assert_eq!(mode_of(&path), 0o777, "a truncation");
}

fn own_read_only(dir: &Path) {
    write(&dir.join("f"), "");
    chmod(&dir.join("f"), 0o444);
    refused(
        open(dir.join("f"), OFlags::WRONLY, Mode::empty()),
        Errno::ACCESS,
    );
    chmod(&dir.join("f"), 0o200);
    refused(
        open(dir.join("f"), OFlags::RDONLY, Mode::empty()),
        Errno::ACCESS,
    );
}
