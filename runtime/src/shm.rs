//! `/dev/shm` that a container engine made on the host for one container: a tmpfs of the guest's takes its place.
//!
//! podman mounts an empty tmpfs on the host for each container and binds it to `/dev/shm`. Shared memory that had to
//! travel through the share would be kept twice and written back for nobody: no other kernel looks at it. The size that
//! the engine chose holds in the guest.
//!
//! The first container of a sandbox has it as memory of the sandbox's ([`share`]), and those that join its IPC namespace
//! have the same; any other has its own ([`localize`]).
//!
//! Contract: only an empty tmpfs that is mounted for the purpose is replaced. The host's own `/dev/shm` and directories
//! inside of a file system stay shared live: whoever names those means them.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use caisson_agent_api::SHM_MOUNT;
use oci_spec::runtime::{Mount, Spec};

use crate::guest_spec::HostFiles;

const DESTINATION: &str = "/dev/shm";

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS: i64 = 0x0102_1994;

/// Replaces the bind mount at `/dev/shm`, if it is one to be replaced.
pub fn localize(spec: &mut Spec) {
    replace(spec, private_tmpfs_bytes);
}

/// Takes the bind mount at `/dev/shm`, if it is one to be replaced, out of what the host provides, and has the guest mount
/// the memory that the sandbox's containers share there. Answers how large that is to be.
pub fn share(guest: &mut Spec, files: &mut HostFiles) -> Option<u64> {
    share_memory(guest, files, private_tmpfs_bytes)
}

fn share_memory(
    guest: &mut Spec,
    files: &mut HostFiles,
    size_bytes: impl Fn(&Path) -> Option<u64>,
) -> Option<u64> {
    let mounts = guest.mounts_mut().as_mut()?;
    let at_shm = |mount: &Mount| mount.destination() == Path::new(DESTINATION);
    let index = mounts.iter().position(at_shm)?;
    let replaced = files.binds.iter().position(|bind| bind.index == index)?;
    let bytes = size_bytes(&files.binds.get(replaced)?.source)?;
    files.binds.remove(replaced);
    mounts.get_mut(index)?.set_source(Some(SHM_MOUNT.into()));
    Some(bytes)
}

fn replace(spec: &mut Spec, size_bytes: impl Fn(&Path) -> Option<u64>) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.destination() != Path::new(DESTINATION) || !crate::guest_spec::is_bind(mount) {
            continue;
        }
        let size = mount
            .source()
            .as_deref()
            .filter(|source| source.is_absolute())
            .and_then(&size_bytes);
        if let Some(bytes) = size {
            make_tmpfs(mount, bytes);
        }
    }
}

/// The options that hold for every kind of mount are kept.
fn make_tmpfs(mount: &mut Mount, bytes: u64) {
    const KEPT: [&str; 6] = ["ro", "rw", "nosuid", "nodev", "noexec", "relatime"];
    let mut options: Vec<String> = mount
        .options()
        .iter()
        .flatten()
        .filter(|option| KEPT.contains(&option.as_str()))
        .cloned()
        .collect();
    options.extend(["mode=1777".to_owned(), format!("size={bytes}")]);
    mount
        .set_typ(Some("tmpfs".to_owned()))
        .set_source(Some("shm".into()))
        .set_options(Some(options));
}

/// The size of an empty tmpfs that is mounted at `path`, unless it is the host's own `/dev/shm`.
fn private_tmpfs_bytes(path: &Path) -> Option<u64> {
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    let own = device(path)?;
    let is_mount_point = device(path.parent()?)? != own;
    let is_hosts = device(Path::new(DESTINATION)) == Some(own);
    if !is_mount_point || is_hosts || fs::read_dir(path).ok()?.next().is_some() {
        return None;
    }
    let stat = rustix::fs::statfs(path).ok()?;
    let block = u64::try_from(stat.f_bsize).ok()?;
    (stat.f_type == TMPFS && stat.f_blocks > 0).then(|| stat.f_blocks.saturating_mul(block))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn replaced(mount: Value, size: Option<u64>) -> Value {
        let mut spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [mount]})).unwrap();
        replace(&mut spec, |_| size);
        serde_json::to_value(&spec.mounts().as_ref().unwrap()[0]).unwrap()
    }

    #[test]
    fn an_engines_shm_becomes_a_tmpfs_of_the_same_size() {
        let mount = json!({"destination": "/dev/shm", "type": "bind", "source": "/var/ctr/shm",
            "options": ["bind", "rprivate", "nosuid", "noexec", "nodev"]});
        assert_eq!(
            replaced(mount, Some(65_536_000)),
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536000"]})
        );
    }

    #[test]
    fn memory_that_is_shared_in_the_guest_is_not_the_hosts_to_provide() {
        let spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/data", "type": "bind", "source": "/d", "options": ["bind"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/var/ctr/shm", "options": ["bind", "nosuid"]},
        ]}))
        .unwrap();
        let (guest, files) = crate::guest_spec::split("c", Path::new("/b"), spec);
        let share = |size| {
            let (mut guest, mut files) = (guest.clone(), files.clone());
            let bytes = share_memory(&mut guest, &mut files, |_| size);
            let source = guest.mounts().as_ref().unwrap()[1].source().clone();
            (bytes, source.unwrap(), files.binds.len())
        };
        assert_eq!(share(Some(4096)), (Some(4096), SHM_MOUNT.into(), 1));
        // A directory of the user's own stays shared live with the host.
        assert_eq!(share(None).0, None);
        assert_eq!(share(None).2, 2);
    }

    #[test]
    fn everything_else_stays_as_it_is() {
        let bind = |destination: &str| json!({"destination": destination, "type": "bind", "source": "/s", "options": ["bind"]});
        assert_eq!(replaced(bind("/data"), Some(1)), bind("/data"));
        assert_eq!(replaced(bind("/dev/shm"), None), bind("/dev/shm"));
        let tmpfs = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1k"]});
        assert_eq!(replaced(tmpfs.clone(), Some(1)), tmpfs);
    }

    #[test]
    fn a_directory_inside_a_file_system_is_not_private() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("shm");
        fs::create_dir(&inside).unwrap();
        assert_eq!(private_tmpfs_bytes(&inside), None);
        assert_eq!(private_tmpfs_bytes(Path::new("/nonexistent/shm")), None);
        assert_eq!(private_tmpfs_bytes(Path::new("/dev/shm")), None);
    }
}
