//! What the tree holds: a pure function of the number of entries, the seed and what is left out.
//!
//! The plan lists parents before children and the first name of an inode before its further ones. It has, whatever the
//! seed: a directory with half of all entries, each of the 4096 modes (evenly thinned below 16,384 entries), a name for
//! each byte but NUL and '/', names of 255 bytes, symbolic links of up to 4095, files that are empty, sparse, beyond
//! 4 GiB and of several MiB, hard links across directories, and times from 1901 to 2446, as far as ext4 reaches.
//! Not here: system calls (`make.rs`).

use crate::acl::{self, Entry as Acl};
use crate::random::Random;
use crate::{Omit, Part};

/// One name to create, with all that is said about its inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Relative to the root of the tree.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// The low twelve bits; without meaning for symbolic links.
    pub(crate) mode: u32,
    pub(crate) owner: Option<(u32, u32)>,
    /// Names and values, set in this order.
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
    /// Seconds since 1970 and nanoseconds.
    pub(crate) mtime: (i64, u32),
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// `size` bytes, zero but for the extents.
    Regular {
        size: u64,
        data: Vec<Extent>,
    },
    Symlink(Vec<u8>),
    /// A further name of the inode at this path.
    Link(Vec<u8>),
    Fifo,
    Socket,
    Char(u32, u32),
    Block(u32, u32),
}

/// `len` reproducible bytes at `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) seed: u64,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Owners and groups: the caller's, usual ones, both sides of 2^16, and the largest that is no error.
const IDS: &[u32] = &[
    0,
    1,
    33,
    65,
    1000,
    1001,
    65_533,
    65_534,
    65_536,
    100_000,
    2_000_000_000,
    u32::MAX - 1,
];

/// Seconds at which something wraps, between the first and the last that ext4 can store.
const SECONDS: &[i64] = &[
    -0x8000_0000,
    -1_000_000_000,
    -86_401,
    -1,
    0,
    1,
    951_782_400,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x3_7fff_ffff,
];

/// The plan of a tree of exactly `entries` entries below its root, less what is left out.
pub(crate) fn plan(entries: usize, seed: u64, omit: &Omit) -> Vec<Entry> {
    let mut planner = Planner {
        random: Random::new(seed),
        entries: Vec::new(),
        omit,
    };
    planner.odd_names();
    planner.odd_files();
    planner.inherited_acls();
    planner.modes(entries.div_ceil(4).min(4096));
    planner.crowd(entries / 2);
    planner.forest(entries);
    planner.entries
}

struct Planner<'a> {
    random: Random,
    entries: Vec<Entry>,
    omit: &'a Omit,
}

impl Planner<'_> {
    fn below(&mut self, limit: usize) -> usize {
        // The remainder is below `limit`, which is a usize.
        usize::try_from(self.random.word() % limit as u64).unwrap_or_default()
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    fn id(&mut self) -> u32 {
        let index = self.below(IDS.len() * 2);
        IDS.get(index)
            .copied()
            .unwrap_or_else(|| u32::try_from(index * 977).unwrap_or(0))
    }

    fn mtime(&mut self) -> (i64, u32) {
        let nanoseconds = match self.below(8) {
            0 => 0,
            1 => 1,
            2 => 999_999_999,
            _ => u32::try_from(self.below(1_000_000_000)).unwrap_or_default(),
        };
        let index = self.below(SECONDS.len() * 2);
        let seconds = SECONDS.get(index).copied().unwrap_or_else(|| {
            1_500_000_000 + i64::try_from(self.below(300_000_000)).unwrap_or_default()
        });
        // The last second that ext4 can store has no later nanosecond on every kernel.
        (
            seconds,
            if seconds == 0x3_7fff_ffff {
                0
            } else {
                nanoseconds
            },
        )
    }

    /// Adds an entry with owner, time and some attributes at random.
    fn add(&mut self, path: impl Into<Vec<u8>>, kind: Kind, mode: u32) {
        let wanted = match kind {
            Kind::Char(..) | Kind::Block(..) => !self.omit.has(Part::Devices),
            Kind::Socket => !self.omit.has(Part::Sockets),
            _ => true,
        };
        if !wanted {
            return;
        }
        let owner = (self.id(), self.id());
        let owner = (!self.omit.has(Part::Owners)).then_some(owner);
        let (xattrs, mtime) = (self.xattrs(&kind), self.mtime());
        self.entries.push(Entry {
            path: path.into(),
            kind,
            mode,
            owner,
            xattrs,
            mtime,
        });
    }

    /// Attributes that the kernel allows on this kind of file; at most about 2 KiB, which fits ext4's one block.
    fn xattrs(&mut self, kind: &Kind) -> Vec<(String, Vec<u8>)> {
        let mut xattrs = Vec::new();
        let plain = matches!(kind, Kind::Directory | Kind::Regular { .. });
        if plain && self.one_in(4) {
            let len = [0, 1, 20, 700][self.below(4)];
            xattrs.push(("user.caisson".to_owned(), self.bytes(len)));
            if self.one_in(8) {
                xattrs.push((format!("user.{}", "x".repeat(250)), b"\0\xff".to_vec()));
            }
        }
        if !matches!(kind, Kind::Link(_)) && self.one_in(16) {
            let value = self.bytes(13);
            xattrs.push(("trusted.caisson".to_owned(), value));
        }
        if matches!(kind, Kind::Regular { .. }) && self.one_in(16) {
            xattrs.push((
                "security.capability".to_owned(),
                capability(self.random.word()),
            ));
        }
        if (plain || matches!(kind, Kind::Fifo)) && self.one_in(8) {
            let value = self.acl();
            xattrs.push((acl::ACCESS.to_owned(), value));
        }
        if matches!(kind, Kind::Directory) && self.one_in(4) {
            let value = self.acl();
            xattrs.push((acl::DEFAULT.to_owned(), value));
        }
        xattrs.retain(|(name, _)| !omitted(self.omit, name));
        xattrs
    }

    fn acl(&mut self) -> Vec<u8> {
        let bits = self.random.word();
        let permissions = |shift: u32| u16::try_from(bits >> shift & 7).unwrap_or_default();
        acl::encode(&[
            Acl::Owner(permissions(0)),
            Acl::User(33, permissions(3)),
            Acl::User(1000, permissions(6)),
            Acl::OwningGroup(permissions(9)),
            Acl::Group(65_536, permissions(12)),
            Acl::Mask(permissions(15)),
            Acl::Others(permissions(18)),
        ])
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.random.fill(&mut bytes);
        bytes
    }

    fn regular(&mut self, size: u64) -> Kind {
        let seed = self.random.word();
        let data = if size == 0 {
            Vec::new()
        } else {
            vec![Extent {
                offset: 0,
                len: size,
                seed,
            }]
        };
        Kind::Regular { size, data }
    }

    /// A file whose data lies in whole multiples of 64 KiB, with room between, so that every side sees the same holes.
    fn sparse(&mut self, size: u64, offsets: &[u64]) -> Kind {
        let mut extent = |offset: &u64| Extent {
            offset: *offset,
            len: 64 * KIB,
            seed: self.random.word(),
        };
        Kind::Regular {
            size,
            data: offsets.iter().map(&mut extent).collect(),
        }
    }

    fn small_mode(&mut self) -> u32 {
        u32::try_from(self.below(0o1000)).unwrap_or_default()
    }

    /// Each byte alone and in a name, the longest names, and a path of some 2,000 bytes.
    fn odd_names(&mut self) {
        self.add("names", Kind::Directory, 0o755);
        for byte in (1..=255_u8).filter(|byte| *byte != b'/') {
            let kind = if byte % 3 == 0 {
                Kind::Symlink(vec![byte])
            } else {
                self.regular(1)
            };
            let name = if byte == b'.' {
                b".x".to_vec()
            } else {
                vec![byte]
            };
            self.add([b"names/", &name[..]].concat(), kind, 0o644);
        }
        for byte in [b'a', b' ', b'\n', 0x80, 0xff] {
            let kind = self.regular(10);
            self.add([&b"names/"[..], &[byte; 255]].concat(), kind, 0o600);
        }
        for name in [
            "...", " ", "-rf", "x\\", "con", "é", "e\u{301}", "名前", "CASE", "case",
        ] {
            let kind = self.regular(3);
            self.add(format!("names/odd {name}"), kind, 0o644);
        }
        let mut path = b"names/deep".to_vec();
        self.add(path.clone(), Kind::Directory, 0o755);
        for level in 0..8 {
            path.push(b'/');
            path.extend([b'0' + level; 250]);
            self.add(path.clone(), Kind::Directory, 0o711);
        }
        let kind = self.regular(5);
        self.add([&path[..], b"/leaf"].concat(), kind, 0o644);
    }

    /// Sizes, holes, links and special files that no random choice should miss.
    fn odd_files(&mut self) {
        self.add("files", Kind::Directory, 0o755);
        for size in [0, 1, 4095, 4096, 4097, 65_537, MIB, 3 * MIB + 17, 8 * MIB] {
            let kind = self.regular(size);
            self.add(format!("files/plain-{size}"), kind, 0o644);
        }
        let sparse = [
            ("files/only-a-hole", MIB, &[][..]),
            ("files/hole-then-data", 2 * MIB, &[MIB][..]),
            (
                "files/islands",
                64 * MIB,
                &[0, 4 * MIB, 9 * MIB, 63 * MIB][..],
            ),
            ("files/beyond-4-gib", 5 * GIB, &[GIB, 4 * GIB + MIB][..]),
        ];
        for (path, size, offsets) in sparse {
            let kind = self.sparse(size, offsets);
            self.add(path, kind, 0o640);
        }
        for len in [1, 59, 60, 100, 1023, 4095] {
            self.add(
                format!("files/link-{len}"),
                Kind::Symlink(vec![b'l'; len]),
                0o777,
            );
        }
        for target in [
            "/",
            "..",
            ".",
            "../files/plain-1",
            "missing",
            "link-to-itself",
            "//x//",
            "a\nb\\",
        ] {
            let name = format!(
                "files/link-to-{}",
                crate::escaped(target.as_bytes()).replace('/', "%")
            );
            self.add(name, Kind::Symlink(target.into()), 0o777);
        }
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (255, 256), (4095, 0xf_ffff)] {
            self.add(
                format!("files/char-{major}-{minor}"),
                Kind::Char(major, minor),
                0o620,
            );
            self.add(
                format!("files/block-{major}-{minor}"),
                Kind::Block(major, minor),
                0o660,
            );
        }
        self.add("files/fifo", Kind::Fifo, 0o622);
        self.add("files/socket", Kind::Socket, 0o1777);
        self.add("files/empty", Kind::Directory, 0o3777);
        for count in 0..64 {
            self.add(
                format!("files/name-{count}-of-plain-4097"),
                Kind::Link(b"files/plain-4097".to_vec()),
                0,
            );
        }
        self.add("files/empty/fifo", Kind::Link(b"files/fifo".to_vec()), 0);
        self.add(
            "files/empty/link",
            Kind::Link(b"files/link-1023".to_vec()),
            0,
        );
    }

    /// A directory whose default ACL the file system itself gives to what is made in it: those entries get no mode and
    /// no attributes of their own (`mode` is what `open` and `mkdir` are called with).
    fn inherited_acls(&mut self) {
        if self.omit.has(Part::Acls) {
            return;
        }
        let value = self.acl();
        let mtime = self.mtime();
        let entry = |path: &str, kind: Kind, mode: u32, xattrs: Vec<(String, Vec<u8>)>| Entry {
            path: path.into(),
            kind,
            mode,
            owner: None,
            xattrs,
            mtime,
        };
        let empty = || Kind::Regular {
            size: 0,
            data: Vec::new(),
        };
        let default = vec![(acl::DEFAULT.to_owned(), value)];
        self.entries
            .push(entry("inherited", Kind::Directory, 0o755, default));
        self.entries.push(entry(
            "inherited/directory",
            Kind::Directory,
            0o751,
            Vec::new(),
        ));
        self.entries
            .push(entry("inherited/file", empty(), 0o666, Vec::new()));
        self.entries.push(entry(
            "inherited/directory/file",
            empty(),
            0o604,
            Vec::new(),
        ));
    }

    /// Files and directories of every mode.
    fn modes(&mut self, count: usize) {
        self.add("modes", Kind::Directory, 0o755);
        for index in 0..count {
            let mode = u32::try_from(index * 4096 / count).unwrap_or_default();
            let kind = match index % 5 {
                0 => Kind::Directory,
                1 => Kind::Fifo,
                _ => self.regular(0),
            };
            self.add(format!("modes/{mode:04o}"), kind, mode);
        }
    }

    /// One directory that takes many reads to list.
    fn crowd(&mut self, count: usize) {
        self.add("crowd", Kind::Directory, 0o1777);
        for index in 0..count {
            let path = format!("crowd/{:x}-{index}", self.random.word() >> self.below(64));
            let kind = match self.below(20) {
                0 => Kind::Link(format!("files/plain-{}", [1, 4095, 4096][self.below(3)]).into()),
                1 => Kind::Symlink(path.clone().into()),
                2 => Kind::Directory,
                3 => Kind::Fifo,
                4..8 => self.regular(200),
                _ => self.regular(0),
            };
            let mode = self.small_mode();
            self.add(path, kind, mode);
        }
    }

    /// Directories in directories, with some of everything, up to the wanted number of entries.
    fn forest(&mut self, entries: usize) {
        self.add("forest", Kind::Directory, 0o755);
        let mut directories = vec![b"forest".to_vec()];
        let mut files: Vec<Vec<u8>> = Vec::new();
        while self.entries.len() < entries {
            let parent = directories[self.below(directories.len())].clone();
            let path = [
                &parent[..],
                b"/",
                format!("{}", self.entries.len()).as_bytes(),
            ]
            .concat();
            let choice = self.below(32);
            let kind = match choice {
                0..6 if path.len() < 1000 => Kind::Directory,
                6..9 => Kind::Symlink(path.clone()),
                9..12 if !files.is_empty() => Kind::Link(files[self.below(files.len())].clone()),
                12 => Kind::Fifo,
                13 if !self.omit.has(Part::Sockets) => Kind::Socket,
                14 if !self.omit.has(Part::Devices) => Kind::Char(1, 3),
                15 => self.sparse(MIB, &[128 * KIB, 512 * KIB]),
                16 => self.regular(100 * KIB),
                _ => {
                    let size = self.below(6000) as u64;
                    self.regular(size)
                }
            };
            match kind {
                Kind::Directory => directories.push(path.clone()),
                Kind::Regular { .. } => files.push(path.clone()),
                _ => {}
            }
            let mode = self.small_mode();
            self.add(path, kind, mode);
        }
    }
}

/// `security.capability` of revision 2: effective flag, then permitted and inheritable sets in two halves.
fn capability(random: u64) -> Vec<u8> {
    let permitted = u32::try_from(random & 0x3fff_ffff).unwrap_or_default();
    [0x0200_0001, permitted, 0, 0, 0]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect()
}

/// Whether an attribute belongs to a part that is left out.
pub(crate) fn omitted(omit: &Omit, name: &str) -> bool {
    omit.has(match name {
        acl::ACCESS | acl::DEFAULT => Part::Acls,
        "security.capability" => Part::Capabilities,
        _ if name.starts_with("security.") => Part::Labels,
        _ if name.starts_with("trusted.") => Part::Trusted,
        _ => Part::User,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Kind, plan};
    use crate::{Omit, Part};

    const ALL: Omit = Omit { omit: Vec::new() };

    #[test]
    fn a_plan_is_as_long_as_asked_and_the_same_each_time() {
        let first = plan(20_000, 3, &ALL);
        assert_eq!(first.len(), 20_000);
        assert_eq!(first, plan(20_000, 3, &ALL));
        assert_ne!(first, plan(20_000, 4, &ALL));
    }

    #[test]
    fn parents_and_linked_files_come_first_and_no_path_twice() {
        let mut seen = HashSet::from([Vec::new()]);
        for entry in plan(20_000, 1, &ALL) {
            let slash = entry
                .path
                .iter()
                .rposition(|byte| *byte == b'/')
                .unwrap_or(0);
            assert!(
                seen.contains(&entry.path[..slash]),
                "{}",
                crate::escaped(&entry.path)
            );
            if let Kind::Link(target) = &entry.kind {
                assert!(seen.contains(target));
            }
            assert!(entry.path.len() < 4000);
            assert!(seen.insert(entry.path));
        }
    }

    #[test]
    fn twenty_thousand_entries_have_every_mode_and_a_crowd_of_half() {
        let plan = plan(20_000, 1, &ALL);
        let modes: HashSet<u32> = plan
            .iter()
            .filter(|entry| entry.path.starts_with(b"modes/"))
            .map(|entry| entry.mode)
            .collect();
        assert_eq!(modes.len(), 4096);
        assert_eq!(
            plan.iter()
                .filter(|entry| entry.path.starts_with(b"crowd/"))
                .count(),
            10_000
        );
    }

    #[test]
    fn what_is_left_out_is_nowhere() {
        let omit = Omit {
            omit: vec![Part::Devices, Part::Acls, Part::Owners, Part::Trusted],
        };
        let plan = plan(4000, 1, &omit);
        assert_eq!(plan.len(), 4000);
        assert!(plan.iter().all(|entry| entry.owner.is_none()));
        assert!(
            !plan
                .iter()
                .any(|entry| matches!(entry.kind, Kind::Char(..) | Kind::Block(..)))
        );
        let mut names = plan
            .iter()
            .flat_map(|entry| &entry.xattrs)
            .map(|(name, _)| name);
        assert!(names.all(|name| name.starts_with("user.") || name.starts_with("security.")));
    }
}
