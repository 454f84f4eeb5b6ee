//! Huge pages (hugetlbpage) of a container: how many its guest sets aside, and the host's file systems of them that become
//! the guest's.
//!
//! A limit of `linux.resources.hugepageLimits` is a claim: the node of a cluster has set pages aside for it before the
//! container comes, and the guest has none of its own. A kubelet mounts a hugetlbfs for a volume and binds it; its pages
//! are the host kernel's, which cannot be the guest's, so a hugetlbfs of the guest's takes its place, of pages as large.
//!
//! Contract: who has no `hugepageLimits` pays nothing. Only a directory without files is replaced: one that others of the
//! host use stays shared as it is. Containers of a sandbox that name the same directory share what replaces it.
//! Not here: the limits themselves and the reservation (the agent), the machine's size (`sizing.rs`).

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use caisson_agent_api::{self as api, HUGE_PAGES_MOUNT, huge_pages_name};
use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::guest_spec::HostFiles;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS: i64 = 0x9584_58f6;

/// Limits from here on are "no limit", in whatever way it was written.
const NO_LIMIT: i64 = 1 << 60;

/// What a container is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    claims: Vec<Claim>,
    volumes: Vec<Volume>,
}

/// Pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    page_bytes: u64,
    count: u64,
}

/// A directory on a hugetlbfs of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Volume {
    device: u64,
    inode: u64,
    page_bytes: u64,
    /// Of the file system; 0: as much as there is.
    size_bytes: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// How many bytes of huge pages a container claims.
pub fn bytes(spec: &Spec) -> u64 {
    resources(spec).map_or(0, bytes_of)
}

/// The same by its limits.
pub fn bytes_of(resources: &LinuxResources) -> u64 {
    let bytes = |claim: Claim| claim.page_bytes.saturating_mul(claim.count);
    claims(resources).map(bytes).fold(0, u64::saturating_add)
}

impl HugePages {
    /// Takes the bind mounts that are to be replaced out of what the host provides, and has the guest bind its own.
    pub fn take(guest: &mut Spec, files: &mut HostFiles) -> Self {
        Self::found(guest, files, |path| on_hugetlbfs(path).ok().flatten())
    }

    fn found(
        guest: &mut Spec,
        files: &mut HostFiles,
        find: impl Fn(&Path) -> Option<Volume>,
    ) -> Self {
        let limits = resources(guest).and_then(|all| all.hugepage_limits().as_ref());
        if limits.is_none_or(Vec::is_empty) {
            return Self::default();
        }
        let claims = resources(guest).map(|all| claims(all).collect());
        let mut volumes = Vec::new();
        files.binds.retain(|bind| {
            let mounts = guest.mounts_mut().as_mut();
            let Some(mount) = mounts.and_then(|all| all.get_mut(bind.index)) else {
                return true;
            };
            let Some(volume) = find(&bind.source) else {
                return true;
            };
            mount.set_source(Some(volume.in_guest()));
            volumes.push(volume);
            false
        });
        Self {
            claims: claims.unwrap_or_default(),
            volumes,
        }
    }

    /// In the agent's words.
    pub(crate) fn asked(self) -> Option<api::HugePages> {
        if self == Self::default() {
            return None;
        }
        let claim = |claim: Claim| api::HugePageClaim {
            page_bytes: claim.page_bytes,
            count: claim.count,
            ..Default::default()
        };
        let volume = |volume: Volume| api::HugePageVolume {
            device: volume.device,
            inode: volume.inode,
            page_bytes: volume.page_bytes,
            size_bytes: volume.size_bytes,
            mode: volume.mode,
            uid: volume.uid,
            gid: volume.gid,
            ..Default::default()
        };
        Some(api::HugePages {
            claims: self.claims.into_iter().map(claim).collect(),
            volumes: self.volumes.into_iter().map(volume).collect(),
            ..Default::default()
        })
    }
}

impl Volume {
    fn in_guest(&self) -> PathBuf {
        Path::new(HUGE_PAGES_MOUNT).join(huge_pages_name(self.device, self.inode))
    }
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

fn claims(resources: &LinuxResources) -> impl Iterator<Item = Claim> {
    let limits = resources.hugepage_limits().iter().flatten();
    limits.filter_map(|limit| {
        let bytes = Some(limit.limit()).filter(|bytes| (1..NO_LIMIT).contains(bytes))?;
        let page_bytes = page_bytes(limit.page_size())?;
        // The kernel's counter rounds down, too.
        let count = u64::try_from(bytes).ok()? / page_bytes;
        (count > 0).then_some(Claim { page_bytes, count })
    })
}

/// A size as the names of the cgroup's files have it: `2MB`, in powers of 1024.
fn page_bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "KB" => 10,
        "MB" => 20,
        "GB" => 30,
        _ => return None,
    };
    let number: u64 = digits.parse().ok().filter(|number| *number > 0)?;
    number.checked_mul(1 << shift)
}

/// The directory at `path`, if it is on a hugetlbfs and holds no files.
fn on_hugetlbfs(path: &Path) -> io::Result<Option<Volume>> {
    let stat = rustix::fs::statfs(path)?;
    if stat.f_type != HUGETLBFS {
        return Ok(None);
    }
    let meta = fs::metadata(path)?;
    if !meta.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(path)? {
        if !entry?.file_type()?.is_dir() {
            return Ok(None);
        }
    }
    let page_bytes = u64::try_from(stat.f_bsize).unwrap_or(0);
    // Without a size the kernel says 0, or what -1 looks like.
    let pages = i64::try_from(stat.f_blocks).unwrap_or(0);
    Ok(Some(Volume {
        device: meta.dev(),
        inode: meta.ino(),
        page_bytes,
        size_bytes: page_bytes.saturating_mul(u64::try_from(pages).unwrap_or(0)),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(limits: serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/data", "type": "bind", "source": "/d", "options": ["bind"]},
                {"destination": "/huge", "type": "bind", "source": "/h", "options": ["rbind", "ro"]},
            ],
            "linux": {"resources": {"hugepageLimits": limits}},
        }))
        .unwrap()
    }

    #[test]
    fn a_limit_claims_whole_pages_unless_it_is_none() {
        let all = |limits| {
            let spec = spec(limits);
            let all: Vec<_> = claims(resources(&spec).unwrap())
                .map(|claim| (claim.page_bytes, claim.count))
                .collect();
            (all, bytes(&spec))
        };
        let limit = |size: &str, limit: i64| json!({"pageSize": size, "limit": limit});
        assert_eq!(
            all(json!([
                limit("2MB", (9 << 20) - 1),
                limit("1GB", 0),
                limit("64KB", 1 << 20)
            ])),
            (vec![(2 << 20, 4), (64 << 10, 16)], 9 << 20)
        );
        let none = [-1, 0, 1, i64::MAX, i64::MAX & !0xfff].map(|none| limit("2MB", none));
        assert_eq!(all(json!(none)), (vec![], 0));
        for odd in [
            "",
            "MB",
            "2",
            "2MiB",
            "-2MB",
            "0MB",
            "99999999999999999999MB",
            "2é",
        ] {
            assert_eq!(all(json!([limit(odd, 1 << 30)])).0, [], "{odd}");
        }
    }

    #[test]
    fn a_volume_of_huge_pages_is_the_guests() {
        let volume = Volume {
            device: 44,
            inode: 7,
            page_bytes: 2 << 20,
            size_bytes: 0,
            mode: 0o777,
            uid: 0,
            gid: 0,
        };
        let find = |path: &Path| (path == Path::new("/h")).then_some(volume);
        let take = |limits| {
            let (mut guest, mut files) =
                crate::guest_spec::split("c", Path::new("/b"), spec(limits));
            let found = HugePages::found(&mut guest, &mut files, find);
            let source = guest.mounts().as_ref().unwrap()[1].source().clone();
            (found, source.unwrap(), files.binds.len())
        };
        // The kubelet names all of its host's sizes, also for a container that only looks at another one's pages.
        let (found, source, binds) = take(json!([{"pageSize": "2MB", "limit": 0}]));
        assert_eq!((found.volumes, found.claims), (vec![volume], vec![]));
        assert_eq!(source, Path::new(HUGE_PAGES_MOUNT).join("44-7"));
        assert_eq!(binds, 1);
        let (found, _, binds) = take(json!([]));
        assert_eq!((found, binds), (HugePages::default(), 2));
    }

    #[test]
    fn other_directories_stay_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(on_hugetlbfs(dir.path()).unwrap(), None);
        assert!(on_hugetlbfs(&dir.path().join("missing")).is_err());
    }
}
