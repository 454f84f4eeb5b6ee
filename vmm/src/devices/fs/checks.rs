//! What a request may say before virtiofsd's file system sees it, and what is said back: pure functions of the request.
//!
//! Contract: see `guard.rs`, which applies them.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, Extensions};
use virtiofsd::passthrough::credentials::{ScopedCaps, drop_effective_cap};
use virtiofsd::soft_idmap::Id;

/// Refuses everything that is not one plain path component.
pub(super) fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Refuses a range that leaves the file offsets there are.
pub(super) fn file_range(offset: u64, size: u32) -> io::Result<()> {
    match i64::try_from(offset)
        .ok()
        .and_then(|start| start.checked_add(i64::from(size)))
    {
        Some(_) => Ok(()),
        None => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// The longest list of attribute names (`XATTR_LIST_MAX`).
pub(super) const LIST_BYTES: u32 = 64 << 10;

/// A list of attribute names less those that only a privileged process may see; the server's thread is one.
pub(super) fn without_trusted(names: &[u8]) -> Vec<u8> {
    let names = names.split_inclusive(|byte| *byte == 0);
    names
        .filter(|name| !name.starts_with(b"trusted."))
        .flatten()
        .copied()
        .collect()
}

/// Takes CAP_FSETID away while the guard lives, if the caller is not root: the host's kernel then clears set-id bits of
/// what is written. The guest's kernel says with each WRITE and truncation whether to do so, but not with FALLOCATE and
/// COPY_FILE_RANGE.
pub(super) fn as_the_caller(ctx: Context) -> io::Result<Option<ScopedCaps>> {
    if ctx.uid.is_root() {
        Ok(None)
    } else {
        drop_effective_cap("FSETID")
    }
}

/// Supplementary groups matter only with another user or group id; virtiofsd would keep them past a request of root's.
pub(super) fn without_stray_groups(ctx: Context, mut extensions: Extensions) -> Extensions {
    if ctx.uid.is_root() && ctx.gid.is_root() {
        extensions.sup_gids.clear();
    }
    extensions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_component_is_a_name() {
        for good in [c"a", c"...", c"..a", c".a", c"a b", c"\xff", c"-"] {
            assert!(component(good).is_ok(), "{good:?}");
        }
        for bad in [
            c"", c".", c"..", c"/", c"a/b", c"../a", c"/a", c"a/", c"./.",
        ] {
            assert!(component(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn trusted_attributes_are_hidden() {
        let all = b"user.a\0trusted.overlay.opaque\0security.x\0trusted.\0user.trusted.\0";
        assert_eq!(without_trusted(all), b"user.a\0security.x\0user.trusted.\0");
        assert_eq!(without_trusted(b""), b"");
    }

    #[test]
    fn a_range_past_the_largest_file_offset_is_refused() {
        let end = i64::MAX.cast_unsigned();
        assert!(file_range(0, u32::MAX).is_ok() && file_range(end, 0).is_ok());
        for (offset, size) in [(end, 1), (end + 1, 0), (u64::MAX, 1), (end - 10, 11)] {
            assert!(file_range(offset, size).is_err(), "{offset} {size}");
        }
    }
}
