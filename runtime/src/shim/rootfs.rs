//! A container's root file system, mounted as containerd's snapshotter says.
//!
//! Contract: mounted in the server's own mount namespace, so that it goes with the server; dropping a [`Rootfs`]
//! unmounts it. Options are those of mount(8); what is not a flag is the file system's.
//! Not here: making it visible to the guest (`share.rs`), what is mounted in the container (the agent).

use std::{
    ffi::CString,
    fs, io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use containerd_shim_protos::types::mount::Mount;
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, UnmountFlags},
};

/// The kernel takes one page of options, of which the last byte ends the text.
const MAX_OPTIONS_BYTES: usize = 4095;

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootfsError {
    #[error("mount {kind} {source_path:?} at {target} with {options:?}", target = target.display())]
    Mount {
        kind: String,
        source_path: String,
        target: PathBuf,
        options: String,
        source: io::Error,
    },
    #[error("rootfs mount option {0:?} is not supported")]
    Option(String),
    #[error("rootfs mount options are {0} bytes: the kernel takes {MAX_OPTIONS_BYTES}")]
    TooLong(usize),
    #[error("open the layer {path}", path = path.display())]
    Layer { path: PathBuf, source: io::Error },
    #[error("make the directory {path}", path = path.display())]
    Directory { path: PathBuf, source: io::Error },
}

/// A mounted root file system.
#[derive(Debug)]
pub(super) struct Rootfs {
    path: PathBuf,
    mounts: usize,
}

/// Options by their kind.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    flags: MountFlags,
    recursive: bool,
    data: Vec<String>,
}

impl Rootfs {
    /// Mounts all of `mounts` at `path`, one upon the other. None: the directory is the root file system as it is.
    pub(super) fn mount(mounts: &[Mount], path: &Path) -> Result<Self, RootfsError> {
        let mut rootfs = Self {
            path: path.to_owned(),
            mounts: 0,
        };
        if !mounts.is_empty() {
            fs::create_dir_all(path).map_err(|source| RootfsError::Directory {
                path: path.to_owned(),
                source,
            })?;
        }
        for mount in mounts {
            mount_one(mount, path)?;
            rootfs.mounts += 1;
        }
        Ok(rootfs)
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        for _ in 0..self.mounts {
            // The end of the mount namespace does the same.
            let _ =
                rustix::mount::unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

fn mount_one(mount: &Mount, path: &Path) -> Result<(), RootfsError> {
    let target = match mount.target.as_str() {
        "" => path.to_owned(),
        below => path.join(below.trim_start_matches('/')),
    };
    let options = parse(&mount.options)?;
    let mut layers = Vec::new();
    let mut data = options.data.join(",");
    if data.len() > MAX_OPTIONS_BYTES && mount.type_ == "overlay" {
        data = shortened(&options.data, &mut layers)?;
    }
    if data.len() > MAX_OPTIONS_BYTES {
        return Err(RootfsError::TooLong(data.len()));
    }
    let failed = |source: io::Error| RootfsError::Mount {
        kind: mount.type_.clone(),
        source_path: mount.source.clone(),
        target: target.clone(),
        options: mount.options.join(","),
        source,
    };
    let done = if options.flags.contains(MountFlags::BIND) || mount.type_ == "bind" {
        bind(&mount.source, &target, &options)
    } else {
        CString::new(data)
            .map_err(io::Error::from)
            .and_then(|data| {
                let kind = mount.type_.as_str();
                let data = (!data.is_empty()).then_some(data.as_c_str());
                Ok(rustix::mount::mount(
                    &*mount.source,
                    &target,
                    kind,
                    options.flags,
                    data,
                )?)
            })
    };
    done.map_err(failed)
}

/// A bind mount takes its flags only when it is mounted once more.
fn bind(source: &str, target: &Path, options: &Options) -> io::Result<()> {
    if options.recursive {
        rustix::mount::mount_bind_recursive(source, target)?;
    } else {
        rustix::mount::mount_bind(source, target)?;
    }
    let flags = options.flags.difference(MountFlags::BIND);
    if !flags.is_empty() {
        rustix::mount::mount_remount(target, flags | MountFlags::BIND, c"")?;
    }
    Ok(())
}

/// Names the lower layers of an overlay by open descriptors, whose paths are short: hundreds of them fit.
fn shortened(
    options: &[String],
    layers: &mut Vec<std::os::fd::OwnedFd>,
) -> Result<String, RootfsError> {
    let mut short = Vec::new();
    for option in options {
        let Some(lower) = option.strip_prefix("lowerdir=") else {
            short.push(option.clone());
            continue;
        };
        let mut names = Vec::new();
        for layer in lower.split(':') {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(layer, flags, Mode::empty());
            let opened = opened.map_err(|errno| RootfsError::Layer {
                path: layer.into(),
                source: errno.into(),
            })?;
            names.push(format!("/proc/self/fd/{}", opened.as_raw_fd()));
            layers.push(opened);
        }
        short.push(format!("lowerdir={}", names.join(":")));
    }
    Ok(short.join(","))
}

/// Sorts options into flags and the file system's own.
fn parse(options: &[String]) -> Result<Options, RootfsError> {
    let mut parsed = Options {
        flags: MountFlags::empty(),
        recursive: false,
        data: Vec::new(),
    };
    for option in options {
        match (option.as_str(), flag(option)) {
            ("rbind", _) => {
                parsed.flags |= MountFlags::BIND;
                parsed.recursive = true;
            }
            (_, Some((flag, true))) => parsed.flags |= flag,
            (_, Some((flag, false))) => parsed.flags = parsed.flags.difference(flag),
            ("loop", _) => return Err(RootfsError::Option(option.clone())),
            ("defaults" | "", _) => {}
            _ => parsed.data.push(option.clone()),
        }
    }
    Ok(parsed)
}

/// A flag's name means to set or to clear it.
fn flag(name: &str) -> Option<(MountFlags, bool)> {
    Some(match name {
        "bind" => (MountFlags::BIND, true),
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        _ => return None,
    })
}

/// The size of the file system at a path, in bytes.
pub(super) fn size_of(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let stat = rustix::fs::statfs(path.as_c_str()).ok()?;
    u64::try_from(stat.f_bsize)
        .ok()?
        .checked_mul(stat.f_blocks)
        .filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &str) -> Options {
        let words: Vec<String> = words.split(',').map(str::to_owned).collect();
        parse(&words).unwrap()
    }

    #[test]
    fn flags_and_the_file_systems_own_options_are_told_apart() {
        let parsed = options("ro,rbind,nosuid,suid,lowerdir=/a:/b,index=off");
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::BIND);
        assert!(parsed.recursive);
        assert_eq!(parsed.data, ["lowerdir=/a:/b", "index=off"]);
        assert!(options("ro,rw").flags.is_empty());
    }

    #[test]
    fn what_this_cannot_mount_is_refused_by_name() {
        let error = parse(&["loop".to_owned()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "rootfs mount option \"loop\" is not supported"
        );
    }

    #[test]
    fn many_layers_fit_into_the_kernels_page() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("x".repeat(60));
        fs::create_dir(&layer).unwrap();
        let lower = vec![layer.to_str().unwrap(); 100].join(":");
        let long = [format!("lowerdir={lower}"), "upperdir=/u".to_owned()];
        let mut layers = Vec::new();
        let short = shortened(&long, &mut layers).unwrap();
        assert_eq!(layers.len(), 100);
        assert!(
            short.len() < MAX_OPTIONS_BYTES && short.ends_with(",upperdir=/u"),
            "{short}"
        );
    }

    #[test]
    fn no_mounts_leave_the_directory_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        drop(Rootfs::mount(&[], dir.path()).unwrap());
        assert!(dir.path().exists());
    }
}
