//! FUSE, as far as this process's own small file systems need it: the device, the frame of a message, a mount that is
//! nowhere yet.
//!
//! Contract: [`Call::parse`] reads one request as read(2) on the device gave it; what is cut short is `None`. Numbers are
//! in the host's byte order, which is little-endian here.
//! A crate would be `fuser`; it answers FUSE_INTERRUPT with ENOSYS, so who waits for a reply would not be reached by
//! signals, and it serves from threads of its own.
//! Not here: what the requests ask for (`supervision/wire.rs`, `procfs/wire.rs`).
//! Spec: linux/fuse.h (protocol 7.31).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{rootless, watched::watch};

/// The largest request: what the kernel asks for at least (`FUSE_MIN_READ_BUFFER`).
const REQUEST_BYTES: usize = 8192;

/// `struct fuse_in_header`.
pub(crate) const HEADER_BYTES: usize = 40;

/// The host gives no file system.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct FuseError {
    step: &'static str,
    source: io::Error,
}

fn at<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> FuseError {
    move |error| FuseError {
        step,
        source: error.into(),
    }
}

/// A request of the host's kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) opcode: u32,
    /// What its reply must bear.
    pub(crate) unique: u64,
    /// The file that it is about.
    pub(crate) node: u64,
    /// What follows the header.
    pub(crate) body: &'a [u8],
}

impl<'a> Call<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        Some(Self {
            opcode: small(bytes, 4)?,
            unique: number(bytes, 8)?,
            node: number(bytes, 16)?,
            body: bytes.get(HEADER_BYTES..)?,
        })
    }

    /// 32 bits of the body.
    pub(crate) fn small(&self, at: usize) -> Option<u32> {
        small(self.body, at)
    }

    /// 64 bits of the body.
    pub(crate) fn number(&self, at: usize) -> Option<u64> {
        number(self.body, at)
    }
}

/// Bytes of a request.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn small(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// The whole reply: an error, or what was asked for.
pub(crate) fn reply(unique: u64, result: Result<&[u8], Errno>) -> Vec<u8> {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), [].as_slice()),
    };
    message(error, unique, body)
}

/// A message to the kernel.
pub(crate) fn message(error: i32, unique: u64, body: &[u8]) -> Vec<u8> {
    // A body is a few structures, or as much as a request asked for: far below 4 GiB.
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_le_bytes().to_vec();
    message.extend(error.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.extend(body);
    message
}

/// `struct fuse_init_out`: the protocol's version, no features, and the smallest writes.
pub(crate) fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for word in [7_u32, 31, 0, 0, 0, 4096, 1] {
        body.extend(word.to_le_bytes());
    }
    body.resize(64, 0);
    body
}

/// `struct fuse_open_out`: no cache, no flush at close.
pub(crate) fn open() -> Vec<u8> {
    let mut body = vec![0; 16];
    body[8] = 1 | 1 << 5;
    body
}

/// What the host's kernel has asked; none once the file system is gone.
pub(crate) async fn requests<T>(
    device: &AsyncFd<OwnedFd>,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Option<Vec<T>> {
    let mut ready = device
        .ready(Interest::READABLE | Interest::ERROR)
        .await
        .ok()?;
    let mut requests = Vec::new();
    let mut bytes = [0; REQUEST_BYTES];
    loop {
        match rustix::io::read(device, &mut bytes) {
            Ok(length) => requests.extend(bytes.get(..length).and_then(&parse)),
            Err(Errno::AGAIN) => {
                ready.clear_ready();
                return Some(requests);
            }
            // The request has been taken back.
            Err(Errno::NOENT | Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Makes a file system whose root has this mode: its device, and its mount, which goes with the last descriptor unless it
/// is moved to a place. Must be called inside a runtime.
pub(crate) fn mount(
    mode: u32,
    attributes: MountAttrFlags,
) -> Result<(AsyncFd<OwnedFd>, OwnedFd), FuseError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device =
        rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(at("open /dev/fuse"))?;
    let context = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(at("ask for a FUSE file system"))?;
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    for (key, value) in [
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", format!("{mode:o}")),
        ("user_id", user.to_string()),
        ("group_id", group.to_string()),
    ] {
        rustix::mount::fsconfig_set_string(&context, key, value)
            .map_err(at("configure the FUSE file system"))?;
    }
    // Whoever has the descriptor may use it, as with the kernel's. In a user namespace that would be those inside it
    // alone; the user outside it is better served without.
    if !rootless::in_user_namespace() {
        rustix::mount::fsconfig_set_flag(&context, "allow_other")
            .map_err(at("configure the FUSE file system"))?;
    }
    rustix::mount::fsconfig_create(&context).map_err(at("make the FUSE file system"))?;
    let attributes = attributes
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(at("mount the FUSE file system"))?;
    let device =
        watch(device, Interest::READABLE | Interest::ERROR).map_err(at("watch the FUSE device"))?;
    Ok((device, mount))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A request as the kernel writes it.
    pub(crate) fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.resize(HEADER_BYTES, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_request_without_its_whole_header_is_none() {
        let whole = request(3, 7, 9, &[]);
        let call = Call::parse(&whole).unwrap();
        assert_eq!((call.opcode, call.unique, call.node), (3, 7, 9));
        assert_eq!((call.small(0), call.number(0)), (None, None));
        for length in 0..whole.len() {
            assert!(Call::parse(&whole[..length]).is_none());
        }
    }

    #[test]
    fn a_refusal_is_a_header_with_the_error() {
        let refused = reply(7, Err(Errno::NOENT));
        assert_eq!(refused[..8], [16, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        assert_eq!((init().len(), open().len()), (64, 16));
    }
}
