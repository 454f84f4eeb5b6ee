//! Huge pages: what containers have claimed of them, and the file systems that stand for the host's.
//!
//! Contract: the kernel's pool of a size is what it was when the first claim came, and the claims of all containers that are
//! there; a claim that it cannot fill changes nothing. A pool that gets smaller keeps the pages that files still hold until
//! they are gone (the kernel's surplus). Filling one may take long (memory is moved), so that happens on a thread of its
//! own, one container at a time.
//! A file system stays for the rest of the sandbox's life, with its files, as a volume of a pod's does.
//! Not here: the limits (`plan/resources.rs`).
//! Spec: kernel Documentation/admin-guide/mm/hugetlbpage.rst.

use std::collections::HashMap;
use std::collections::btree_map::{BTreeMap, Entry};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use caisson_agent_api::{HUGE_PAGES_MOUNT, HugePageClaim, HugePageVolume, huge_pages_name};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Huge pages that cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HugePageError {
    /// Of a size that this kernel, on this processor, does not know.
    #[error("reserve huge pages: the virtual machine has none of {0} KiB")]
    NoSuchSize(u64),
    /// There is no memory for them.
    #[error(
        "reserve {wanted} huge pages of {page_kib} KiB: the virtual machine has memory for {possible}"
    )]
    NoMemory {
        wanted: u64,
        page_kib: u64,
        possible: u64,
    },
    #[error("{step}")]
    Step { step: String, source: io::Error },
}

fn failed(step: impl Into<String>) -> impl FnOnce(io::Error) -> HugePageError {
    let step = step.into();
    move |source| HugePageError::Step { step, source }
}

/// The pages of one size.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Pool {
    /// Those that were there before the first claim.
    before: u64,
    claims: HashMap<String, u64>,
}

impl Pool {
    fn pages(&self) -> u64 {
        let claims = self.claims.values().copied();
        claims.fold(self.before, u64::saturating_add)
    }
}

/// By the size of the pages in KiB.
type Pools = BTreeMap<u64, Pool>;

/// All pools.
#[derive(Default)]
pub(crate) struct HugePages {
    pools: Arc<tokio::sync::Mutex<Pools>>,
}

impl HugePages {
    /// Gives a container what it is to have. What it has claimed goes with [`HugePages::release`], also after an error.
    pub(crate) async fn give(
        &self,
        id: &str,
        wanted: &caisson_agent_api::HugePages,
    ) -> Result<(), HugePageError> {
        if wanted.claims.is_empty() && wanted.volumes.is_empty() {
            return Ok(());
        }
        let (id, claims, volumes) = (id.to_owned(), wanted.claims.clone(), wanted.volumes.clone());
        self.aside(move |pools| {
            for claim in &claims {
                fill(pools, Path::new(POOLS), &id, claim)?;
            }
            volumes.iter().try_for_each(make)
        })
        .await
    }

    /// A container is gone: gives back what it claimed.
    pub(crate) async fn release(&self, id: &str) -> Result<(), HugePageError> {
        let has = |pool: &Pool| pool.claims.contains_key(id);
        if !self.pools.lock().await.values().any(has) {
            return Ok(());
        }
        let id = id.to_owned();
        self.aside(move |pools| empty(pools, Path::new(POOLS), &id))
            .await
    }

    /// Does what may take long on another thread.
    async fn aside(
        &self,
        act: impl FnOnce(&mut Pools) -> Result<(), HugePageError> + Send + 'static,
    ) -> Result<(), HugePageError> {
        let mut pools = Arc::clone(&self.pools).lock_owned().await;
        let done = tokio::task::spawn_blocking(move || act(&mut pools)).await;
        // It panics nowhere, and the runtime ends with the agent.
        done.unwrap_or_else(|error| Err(failed("run a thread")(io::Error::other(error))))
    }
}

/// The directory of a pool's files.
fn directory(root: &Path, page_kib: u64) -> PathBuf {
    root.join(format!("hugepages-{page_kib}kB"))
}

/// Enlarges a pool by a container's claim.
fn fill(
    pools: &mut Pools,
    root: &Path,
    id: &str,
    claim: &HugePageClaim,
) -> Result<(), HugePageError> {
    let page_kib = claim.page_bytes >> 10;
    let dir = directory(root, page_kib);
    let pool = match pools.entry(page_kib) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(_) if !dir.exists() => return Err(HugePageError::NoSuchSize(page_kib)),
        Entry::Vacant(new) => {
            let (before, claims) = (pages(&dir)?, HashMap::new());
            new.insert(Pool { before, claims })
        }
    };
    let others = pool.pages();
    let claimed = pool.claims.entry(id.to_owned()).or_default();
    *claimed = claimed.saturating_add(claim.count);
    let total = pool.pages();
    resize(&dir, total)?;
    let there = pages(&dir)?;
    if there < total {
        return Err(HugePageError::NoMemory {
            wanted: claim.count,
            page_kib,
            possible: there.saturating_sub(others),
        });
    }
    Ok(())
}

/// Takes a container's claims out of all pools.
fn empty(pools: &mut Pools, root: &Path, id: &str) -> Result<(), HugePageError> {
    for (page_kib, pool) in pools {
        if pool.claims.remove(id).is_some() {
            resize(&directory(root, *page_kib), pool.pages())?;
        }
    }
    Ok(())
}

/// How many pages a pool has for good: without those that are only there until they are free.
fn pages(dir: &Path) -> Result<u64, HugePageError> {
    let number = |name: &str| {
        let file = dir.join(name);
        let text = fs::read_to_string(&file).map_err(failed(format!("read {}", file.display())))?;
        Ok::<u64, HugePageError>(text.trim_end().parse().unwrap_or(0))
    };
    Ok(number("nr_hugepages")?.saturating_sub(number("surplus_hugepages")?))
}

fn resize(dir: &Path, count: u64) -> Result<(), HugePageError> {
    let file = dir.join("nr_hugepages");
    let step = format!("write {count} to {}", file.display());
    fs::write(file, count.to_string()).map_err(failed(step))
}

/// Mounts the file system of a volume, unless it is there.
fn make(volume: &HugePageVolume) -> Result<(), HugePageError> {
    let place = Path::new(HUGE_PAGES_MOUNT).join(huge_pages_name(volume.device, volume.inode));
    // Made and mounted together, or neither.
    if place.exists() {
        return Ok(());
    }
    let at = |step: &str| format!("{step} {}", place.display());
    fs::create_dir_all(&place).map_err(failed(at("make the directory")))?;
    let mounted = mount_at(&place, volume).map_err(failed(at("mount a hugetlbfs at")));
    if mounted.is_err() {
        // The error that led here is the one to report.
        let _ = unmount(&place, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&place);
    }
    mounted
}

fn mount_at(place: &Path, volume: &HugePageVolume) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let options = CString::new(options(volume)).map_err(io::Error::other)?;
    mount("nodev", place, "hugetlbfs", flags, Some(options.as_c_str()))?;
    chown(place, Some(volume.uid), Some(volume.gid))?;
    fs::set_permissions(place, fs::Permissions::from_mode(volume.mode))
}

fn options(volume: &HugePageVolume) -> String {
    let size = match volume.size_bytes {
        0 => String::new(),
        bytes => format!(",size={bytes}"),
    };
    format!("pagesize={}K{size}", volume.page_bytes >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that takes whatever it is told.
    fn pool(root: &Path, pages: u64, surplus: u64) {
        let dir = directory(root, 2048);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("nr_hugepages"), format!("{pages}\n")).unwrap();
        fs::write(dir.join("surplus_hugepages"), format!("{surplus}\n")).unwrap();
    }

    fn claim(page_kib: u64, count: u64) -> HugePageClaim {
        HugePageClaim {
            page_bytes: page_kib << 10,
            count,
            ..Default::default()
        }
    }

    fn count(root: &Path) -> u64 {
        let text = fs::read_to_string(directory(root, 2048).join("nr_hugepages")).unwrap();
        text.trim_end().parse().unwrap()
    }

    #[test]
    fn a_pool_is_what_it_was_and_what_containers_claim() {
        let dir = tempfile::tempdir().unwrap();
        let (root, mut pools) = (dir.path(), Pools::new());
        pool(root, 3, 1);
        fill(&mut pools, root, "a", &claim(2048, 32)).unwrap_err();
        // One of the pages was only there until it is free, and the kernel here frees none.
        assert_eq!(count(root), 34);
        pool(root, 34, 0);
        fill(&mut pools, root, "b", &claim(2048, 5)).unwrap();
        assert_eq!(count(root), 39);
        empty(&mut pools, root, "a").unwrap();
        assert_eq!(count(root), 7);
        empty(&mut pools, root, "a").unwrap();
        empty(&mut pools, root, "b").unwrap();
        assert_eq!(count(root), 2);
    }

    #[test]
    fn what_cannot_be_had_is_told_in_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let (root, mut pools) = (dir.path(), Pools::new());
        let error = fill(&mut pools, root, "a", &claim(1 << 20, 1)).unwrap_err();
        assert!(error.to_string().contains("none of 1048576 KiB"), "{error}");
        // Twelve of the pages that the kernel says it has are surplus: it found memory for twenty.
        pool(root, 0, 0);
        fill(&mut pools, root, "a", &claim(2048, 0)).unwrap();
        fs::write(directory(root, 2048).join("surplus_hugepages"), "12").unwrap();
        let error = fill(&mut pools, root, "a", &claim(2048, 32)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "reserve 32 huge pages of 2048 KiB: the virtual machine has memory for 20"
        );
        empty(&mut pools, root, "a").unwrap();
        assert_eq!(count(root), 0);
    }

    #[test]
    fn a_file_system_has_the_pages_and_the_size_of_the_hosts() {
        let mut volume = HugePageVolume {
            page_bytes: 2 << 20,
            ..Default::default()
        };
        assert_eq!(options(&volume), "pagesize=2048K");
        volume.size_bytes = 8 << 20;
        assert_eq!(options(&volume), "pagesize=2048K,size=8388608");
    }
}
