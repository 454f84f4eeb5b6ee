//! The seam between the virtio-fs device and the server of files: a chain in, the length of a reply out.
//!
//! Contract: [`FsServer`] is all that the device knows. A server of our own can take virtiofsd's place behind it.
//! - [`FsServer::forget`]: a chain of the high-priority queue, which carries messages without a reply;
//! - [`FsServer::request`]: a chain of a request queue, which has room for a reply.
//!
//! Everything that the guest can cause is a [`GuestFault`] or an error reply: a chain without room for a reply header
//! (virtiofsd would panic on some requests), a chain larger than [`MAX_BYTES`], a message that cannot be decoded.
//! Errors of the host's file system are replies, never faults.
//! Threads: `start` on a thread that `thread::enter` prepared; the rest on any such thread, any number at once.
//! Spec: virtio 1.2, 5.11; the FUSE protocol is 7.38 of `include/uapi/linux/fuse.h`.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use caisson_vmm_spec::OwnTrees;
use virtio_queue::DescriptorChain;
use virtiofsd::Error;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use virtiofsd::server::Server;

use super::guard::Guard;
use super::view::View;
use super::wire::{Forget, REPLY_HEADER_BYTES};
use crate::memory::Mem;
use crate::virtio::{Chain, GuestFault};

/// The most bytes of a request, and of a reply: a page-aligned megabyte of data, and the headers around it.
pub(super) const MAX_BYTES: usize = (1 << 20) + (64 << 10);

/// Descriptors of the process that files of the guest may not take.
const RESERVED_DESCRIPTORS: u64 = 256;

/// Serves one directory to one guest.
pub(super) struct FsServer {
    guard: Guard,
    server: Server<Guard>,
    mem: Mem,
    view: View,
    /// With the memory that came later; made anew when there is more of it.
    grown: Mutex<Option<Arc<View>>>,
}

impl FsServer {
    /// Serves the calling thread's working directory out of `mem`. `descriptors` is the process's limit;
    /// `own` are trees that the guest may believe.
    ///
    /// # Errors
    /// The directory or `/proc` cannot be opened.
    pub(super) fn start(mem: &Mem, descriptors: u64, own: Option<OwnTrees>) -> io::Result<Self> {
        let view = View::of(mem).ok_or(io::ErrorKind::InvalidInput)?;
        let config = Config {
            root_dir: ".".into(),
            // The guard sets the times of each reply, and when pages may be kept (coherence.rs).
            cache_policy: CachePolicy::Auto,
            writeback: false,
            announce_submounts: true,
            inode_file_handles: handles_mode()?,
            readdirplus: true,
            killpriv_v2: true,
            xattr: true,
            posix_acl: NegotiationMode::Auto,
            clean_noatime: false,
            guest_fd_limit: descriptors.saturating_sub(RESERVED_DESCRIPTORS),
            ..Config::default()
        };
        let guard = Guard::new(PassthroughFs::new(config)?, own);
        Ok(Self {
            server: Server::new(guard.clone()),
            guard,
            mem: mem.clone(),
            view,
            grown: Mutex::default(),
        })
    }

    /// Takes a message that has no reply.
    ///
    /// # Errors
    /// [`GuestFault`]: not such a message, or a malformed one.
    pub(super) fn forget(&self, chain: &Chain) -> Result<(), GuestFault> {
        Forget::parse(chain)?.each(|context, node, count| self.guard.forget(context, node, count))
    }

    /// Serves a request; returns the number of bytes of the reply.
    ///
    /// # Errors
    /// [`GuestFault`]: see the file header.
    pub(super) fn request(&self, chain: DescriptorChain<Mem>) -> Result<u32, GuestFault> {
        let outside = |_| GuestFault::Chain("a buffer is not in guest memory");
        let grown = self.grown(&chain)?;
        let memory = grown.as_deref().unwrap_or(&self.view).memory();
        let reader = Reader::new(memory, chain.clone()).map_err(outside)?;
        let writer = Writer::new(memory, chain).map_err(outside)?;
        // These lengths belong to the slices that reader and writer keep: the guest cannot change them any more.
        let (request, reply) = (reader.available_bytes(), writer.available_bytes());
        if reply < REPLY_HEADER_BYTES {
            return Err(GuestFault::Short {
                need: REPLY_HEADER_BYTES,
                got: reply,
            });
        }
        if request > MAX_BYTES || reply > MAX_BYTES {
            return Err(GuestFault::Chain(
                "a virtio-fs request or reply above its limit",
            ));
        }
        self.guard.begin();
        let written = self
            .server
            .handle_message::<()>(reader, writer, None)
            .map_err(fault)?;
        // At most MAX_BYTES, which was checked above; a server that says more is not believed.
        Ok(u32::try_from(written.min(reply)).unwrap_or(0))
    }

    /// The view for a guest that has got memory since it booted, once the chain has been looked at: all of its buffers are
    /// plugged. A guest that changes the chain after that look reaches memory that was its own until now, and no other.
    fn grown(&self, chain: &DescriptorChain<Mem>) -> Result<Option<Arc<View>>, GuestFault> {
        let reach = self.mem.room().reach();
        if reach == 0 {
            return Ok(None);
        }
        let outside = GuestFault::Chain("a buffer is not in guest memory");
        // A u32 fits into a usize on x86-64.
        if !chain
            .clone()
            .all(|buffer| self.mem.holds(buffer.addr(), buffer.len() as usize))
        {
            return Err(outside);
        }
        let mut grown = self.grown.lock().unwrap_or_else(PoisonError::into_inner);
        if grown.as_ref().is_none_or(|view| view.reach() < reach) {
            *grown = View::of(&self.mem).map(Arc::new);
        }
        grown.clone().map(Some).ok_or(outside)
    }

    /// Forgets everything that the guest opened and looked up.
    pub(super) fn reset(&self) {
        self.server.destroy();
    }
}

/// File systems whose handles can go stale while the file exists: they find a file only while the kernel or the remote
/// server still remembers it.
const FORGETFUL: [&str; 9] = [
    "fuse", "fuseblk", "virtiofs", "nfs", "nfs4", "9p", "ceph", "cifs", "smb3",
];

/// File handles in place of a descriptor per known file, where that can work: virtiofsd finds a mount by its path in
/// mountinfo, which it takes as it stands there, with white space and backslashes escaped, and opens its handles long
/// after it made them.
fn handles_mode() -> io::Result<InodeFileHandlesMode> {
    let share = std::env::current_dir()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let usable = share.to_str().is_some_and(|path| {
        !path.contains([' ', '\t', '\n', '\\', '#']) && !has_forgetful_mount(&mounts, path)
    });
    Ok(if usable {
        InodeFileHandlesMode::Prefer
    } else {
        InodeFileHandlesMode::Never
    })
}

/// Whether a file system whose handles do not last is mounted at or below `share` (proc(5), `/proc/pid/mountinfo`).
fn has_forgetful_mount(mountinfo: &str, share: &str) -> bool {
    mountinfo.lines().any(|line| {
        let point = line.split(' ').nth(4).unwrap_or_default();
        let kind = line
            .split_once(" - ")
            .and_then(|(_, rest)| rest.split(' ').next());
        let kind = kind.unwrap_or_default();
        std::path::Path::new(point).starts_with(share)
            && (FORGETFUL.contains(&kind) || kind.starts_with("fuse."))
    })
}

fn fault(error: Error) -> GuestFault {
    GuestFault::Protocol(match error {
        Error::DecodeMessage(_) => "a FUSE request that is too short",
        Error::EncodeMessage(_) | Error::FlushMessage(_) => {
            "a FUSE request without room for its reply"
        }
        Error::MissingParameter | Error::MissingExtension => {
            "a FUSE request without a part it needs"
        }
        Error::InvalidCString(_) | Error::InvalidCString2(_) => {
            "a FUSE request with a broken string"
        }
        Error::InvalidHeaderLength => "a FUSE request shorter than it says",
        Error::InvalidXattrSize(_) => "a FUSE request with a broken attribute length",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_not_used_on_file_systems_that_forget_them() {
        let line = |point: &str, kind: &str| {
            format!("36 35 98:0 / {point} rw,noatime master:1 - {kind} source rw\n")
        };
        let share = "/run/caisson/c1/share";
        let rootfs = "/run/caisson/c1/share/c1/rootfs";
        for kind in ["fuse.sshfs", "virtiofs", "nfs4"] {
            assert!(has_forgetful_mount(&line(rootfs, kind), share), "{kind}");
        }
        for kind in ["ext4", "tmpfs", "overlay", "fusectl"] {
            assert!(!has_forgetful_mount(&line(rootfs, kind), share), "{kind}");
        }
        assert!(!has_forgetful_mount(&line("/home", "fuse.sshfs"), share));
        assert!(!has_forgetful_mount(
            &line("/run/caisson/c1/share2", "nfs"),
            share
        ));
    }
}
