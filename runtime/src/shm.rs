//! `/dev/shm` that a container engine made on the host for one container: a tmpfs of the guest's takes its place.
//!
//! podman mounts an empty tmpfs on the host for each container and binds it to `/dev/shm`. Shared memory that had to
//! travel through the share would be kept twice and written back for nobody: no other kernel looks at it. The size that
//! the engine chose holds in the guest.
//!
//! Contract: only an empty tmpfs that is mounted for the purpose is replaced. The host's own `/dev/shm` and directories
//! inside of a file system stay shared live: whoever names those means them.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use oci_spec::runtime::{Mount, Spec};

const DESTINATION: &str = "/dev/shm";

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS: i64 = 0x0102_1994;

/// Replaces the bind mount at `/dev/shm`, if it is one to be replaced.
pub fn localize(spec: &mut Spec) {
    replace(spec, private_tmpfs_bytes);
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
