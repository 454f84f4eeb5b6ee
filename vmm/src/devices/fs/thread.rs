//! What a thread must be before it may serve files: its own working directory, umask and capabilities.
//!
//! Contract: [`enter`] is called once by each file-serving thread, before anything else. Afterwards
//! - the thread shares neither working directory nor umask with the process. virtiofsd changes both while it serves
//!   (`fchdir` for extended attributes of special files, the caller's umask for default ACLs);
//! - its working directory is the share, so that the root of the file system is `.` and nothing is opened by path;
//! - changing its effective ids does not take its capabilities away. virtiofsd creates files under the ids of the
//!   guest's process; whether that process may, the guest's kernel has decided, as a container's kernel does under
//!   runc. Judging again on the host would refuse what the guest allows: CAP_DAC_OVERRIDE, group membership, ACLs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, fchdir, getrlimit, setrlimit, umask};
use rustix::thread::{CapabilitiesSecureBits, UnshareFlags, set_capabilities_secure_bits};

/// Makes the calling thread one that serves the directory `root`.
///
/// # Errors
/// The system's. A thread without CAP_SETPCAP is not one: it keeps what capabilities the kernel leaves it.
pub(super) fn enter(root: &OwnedFd) -> io::Result<()> {
    unshare_fs()?;
    fchdir(root.as_fd())?;
    umask(Mode::empty());
    // Refused only to a process that is not privileged, which has nothing to keep.
    let _ = set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP);
    Ok(())
}

fn unshare_fs() -> io::Result<()> {
    #[allow(unsafe_code, reason = "unshare is unsafe for CLONE_FILES only")]
    // SAFETY: FS shares no descriptor table; no other thread relies on this one's working directory.
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::FS)?;
    }
    Ok(())
}

/// As many descriptors as a kernel allows a process by default (`fs.nr_open`); a privileged process gets them whatever
/// its limit was.
const MOST_DESCRIPTORS: u64 = 1 << 20;

/// Lets the process have as many descriptors as the host allows, and returns that number.
pub(super) fn raise_descriptor_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < MOST_DESCRIPTORS) {
        let most = Rlimit {
            current: Some(MOST_DESCRIPTORS),
            maximum: Some(MOST_DESCRIPTORS),
        };
        let hard = Rlimit {
            current: maximum,
            maximum,
        };
        // Up to the hard limit is always allowed; beyond it, with CAP_SYS_RESOURCE.
        let _ = setrlimit(Resource::Nofile, most).or_else(|_| setrlimit(Resource::Nofile, hard));
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_descriptors_is_at_least_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        let limit = raise_descriptor_limit();
        assert!(
            limit >= hard.unwrap_or(MOST_DESCRIPTORS).min(MOST_DESCRIPTORS),
            "{limit}"
        );
        assert_eq!(
            getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            limit
        );
    }

    #[test]
    fn a_serving_thread_changes_nothing_for_the_others() {
        let before = std::env::current_dir().unwrap();
        let root: OwnedFd = std::fs::File::open("/").unwrap().into();
        let inside = std::thread::spawn(move || {
            enter(&root).unwrap();
            (std::env::current_dir().unwrap(), umask(Mode::empty()))
        });
        let (inside, mask) = inside.join().unwrap();
        assert_eq!((inside.to_str(), mask), (Some("/"), Mode::empty()));
        assert_eq!(std::env::current_dir().unwrap(), before);
    }
}
