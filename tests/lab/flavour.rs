//! What is in the lab's disk images: packages, and what their maintainer scripts would have made.
//!
//! Tables only; `image.rs` makes images of them.

/// What is in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Flavour {
    /// Runtimes and the tools that tests use.
    Base,
    /// The same with an older kernel, which has all of cgroup v1.
    Legacy,
    /// That, and systemd as the first process, with a system bus.
    LegacySystemd,
    /// And container engines (podman, Docker, buildah), and systemd as the first process, with a system bus.
    Systemd,
    /// The same of Debian 13: containerd 1.7, podman 5.4, Docker 26.
    Trixie,
    /// The same of Debian's unstable suite, which moves: containerd 2, podman 5.8, Docker 28 or newer.
    Sid,
}

impl Flavour {
    /// Its name on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Legacy => "legacy",
            Self::LegacySystemd => "legacy-systemd",
            Self::Systemd => "systemd",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// The suite of Debian that it is of, where that is not this machine's.
    pub(crate) const fn suite(self) -> Option<&'static str> {
        match self {
            Self::Base | Self::Legacy | Self::LegacySystemd | Self::Systemd => None,
            Self::Trixie => Some("trixie"),
            Self::Sid => Some("sid"),
        }
    }

    /// Whether systemd is its first process.
    pub(crate) const fn has_systemd(self) -> bool {
        matches!(
            self,
            Self::LegacySystemd | Self::Systemd | Self::Trixie | Self::Sid
        )
    }

    /// The meta package that depends on the newest kernel of its kind, for clouds.
    pub(crate) const fn kernel(self) -> &'static str {
        match self {
            Self::Legacy | Self::LegacySystemd => "linux-image-cloud-amd64",
            Self::Base | Self::Systemd | Self::Trixie | Self::Sid => "linux-image-6.12-cloud-amd64",
        }
    }

    /// What it consists of, besides what these depend on.
    pub(crate) fn packages(self) -> impl Iterator<Item = &'static &'static str> {
        let more: [&[&str]; 3] = match self {
            Self::Base | Self::Legacy => [QEMU, &[], &[]],
            Self::LegacySystemd => [&[], &[], SYSTEMD],
            Self::Systemd => [QEMU, ENGINES, SYSTEMD],
            Self::Trixie | Self::Sid => [ENGINES, NEWER, SYSTEMD],
        };
        PACKAGES.iter().chain(more.into_iter().flatten())
    }

    /// Links that maintainer scripts would have made, in `/usr`: name, target.
    pub(crate) const fn links(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Base | Self::Legacy | Self::LegacySystemd => &[],
            Self::Systemd | Self::Trixie | Self::Sid => ENGINE_LINKS,
        }
    }

    /// Parts of packages that no test reads.
    pub(crate) fn excluded(self) -> impl Iterator<Item = &'static &'static str> {
        let more: &[&str] = if self.has_systemd() {
            &[]
        } else {
            SYSTEMD_PARTS
        };
        EXCLUDED.iter().chain(more)
    }

    /// Files that maintainer scripts would have made, or that are the lab's own: path, mode, content.
    pub(crate) fn files(self) -> impl Iterator<Item = &'static (&'static str, u32, &'static str)> {
        let more: &[(&str, u32, &str)] = if self.has_systemd() {
            SYSTEMD_FILES
        } else {
            &[]
        };
        FILES.iter().chain(more)
    }
}

/// What every flavour consists of.
const PACKAGES: &[&str] = &[
    "acl",
    "attr",
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "crun",
    "dpkg",
    "e2fsprogs",
    "findutils",
    "gawk",
    "git",
    "grep",
    "iproute2",
    "jq",
    "kmod",
    "libc-bin",
    "mount",
    "nftables",
    "passt",
    "procps",
    "python3",
    "runc",
    "sed",
    "socat",
    "strace",
    "tar",
    "uidmap",
    "util-linux",
    "xz-utils",
];

/// A peer in benchmarks.
const QEMU: &[&str] = &["qemu-system-x86"];

/// What Debian 12 has in the package `docker.io`.
const NEWER: &[&str] = &["docker-cli"];

/// Container engines and what they call.
const ENGINES: &[&str] = &[
    "aardvark-dns",
    "buildah",
    "catatonit",
    "conmon",
    "containerd",
    "containernetworking-plugins",
    "curl",
    "docker-compose",
    "docker.io",
    "fuse-overlayfs",
    "golang-github-containernetworking-plugin-dnsname",
    "iptables",
    "netavark",
    "podman",
    "slirp4netns",
    "tini",
];

/// The init system of most hosts, to which engines leave their cgroups.
const SYSTEMD: &[&str] = &["dbus", "systemd"];

/// Where it is; other images do without.
const SYSTEMD_PARTS: &[&str] = &["./usr/lib/systemd", "./lib/systemd"];

/// What it starts: the bus and the lab's server, and nothing else.
const SYSTEMD_FILES: &[(&str, u32, &str)] = &[
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/bash\nmessagebus:x:100:100::/nonexistent:/usr/sbin/nologin\n\
         tester:x:1000:1000::/home/tester:/bin/bash\n\
         nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    ),
    (
        "etc/group",
        0o644,
        "root:x:0:\ntty:x:5:\nmessagebus:x:100:\nkvm:x:104:tester\ntester:x:1000:\nnogroup:x:65534:\n",
    ),
    (
        "etc/machine-id",
        0o444,
        "0123456789abcdef0123456789abcdef\n",
    ),
    (
        "etc/systemd/system/default.target",
        0o644,
        "[Unit]\nRequires=labd.service\n",
    ),
    (
        "etc/systemd/system/dbus.socket",
        0o644,
        "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    ),
    (
        "etc/systemd/system/dbus.service",
        0o644,
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\nAfter=dbus.socket\n\
         [Service]\nType=notify\n\
         ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --syslog-only\n",
    ),
    (
        "etc/systemd/system/labd.service",
        0o644,
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\n\
         SuccessAction=poweroff-immediate\nFailureAction=poweroff-immediate\n\
         [Service]\nExecStart=/run/labd serve\nDelegate=yes\nTasksMax=infinity\nStandardOutput=tty\n",
    ),
];

/// Debian's default alternatives.
const ENGINE_LINKS: &[(&str, &str)] = &[
    ("sbin/iptables", "iptables-nft"),
    ("sbin/iptables-save", "iptables-nft-save"),
    ("sbin/iptables-restore", "iptables-nft-restore"),
    ("sbin/ip6tables", "ip6tables-nft"),
    ("sbin/ip6tables-save", "ip6tables-nft-save"),
    ("sbin/ip6tables-restore", "ip6tables-nft-restore"),
];

/// Parts of packages that no test reads.
const EXCLUDED: &[&str] = &[
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/share/info",
    "./usr/share/lintian",
    "./usr/share/bash-completion",
    "./usr/share/zsh",
    "./usr/share/iso-codes",
    "./usr/share/xml",
    "./usr/share/perl*",
    "./usr/share/icons",
    "./usr/lib/x86_64-linux-gnu/perl*",
    "./usr/lib/x86_64-linux-gnu/gconv",
    "./usr/lib/x86_64-linux-gnu/gstreamer*",
    "./usr/libexec/qemu-system-i386",
];

/// Files that maintainer scripts would have made: path, mode, content.
const FILES: &[(&str, u32, &str)] = &[
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/bash\ntester:x:1000:1000::/home/tester:/bin/bash\n\
         nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
    ),
    (
        "etc/group",
        0o644,
        "root:x:0:\ntty:x:5:\nkvm:x:104:tester\ntester:x:1000:\nnogroup:x:65534:\n",
    ),
    (
        "etc/subuid",
        0o644,
        "root:100000:65536\ntester:200000:65536\n",
    ),
    (
        "etc/subgid",
        0o644,
        "root:100000:65536\ntester:200000:65536\n",
    ),
    ("etc/hosts", 0o644, "127.0.0.1 localhost lab\n"),
    ("etc/hostname", 0o644, "lab\n"),
    ("etc/resolv.conf", 0o644, ""),
    (
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
];
