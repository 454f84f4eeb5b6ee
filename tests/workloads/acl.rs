//! POSIX ACLs in the form in which they travel in extended attributes (`linux/posix_acl_xattr.h`, version 2).
//!
//! Entries must be sorted as the kernel wants them: owner, users by id, owning group, groups by id, mask, others.
//! The caller passes them in that order; nothing is checked here, because some callers want to be refused.

/// The attribute that holds the access ACL.
pub(crate) const ACCESS: &str = "system.posix_acl_access";
/// The attribute that holds the default ACL of a directory.
pub(crate) const DEFAULT: &str = "system.posix_acl_default";

/// One entry: who, and which of read 4, write 2 and execute 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Owner(u16),
    User(u32, u16),
    OwningGroup(u16),
    Group(u32, u16),
    Mask(u16),
    Others(u16),
}

/// The id of entries that name nobody.
const NOBODY: u32 = u32::MAX;

/// The attribute's value.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for entry in entries {
        let (tag, permissions, id): (u16, u16, u32) = match *entry {
            Entry::Owner(permissions) => (0x01, permissions, NOBODY),
            Entry::User(id, permissions) => (0x02, permissions, id),
            Entry::OwningGroup(permissions) => (0x04, permissions, NOBODY),
            Entry::Group(id, permissions) => (0x08, permissions, id),
            Entry::Mask(permissions) => (0x10, permissions, NOBODY),
            Entry::Others(permissions) => (0x20, permissions, NOBODY),
        };
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::{Entry, encode};

    #[test]
    fn an_entry_is_eight_bytes_after_the_version() {
        let value = encode(&[Entry::Owner(6), Entry::User(258, 4)]);
        assert_eq!(value[..4], [2, 0, 0, 0]);
        assert_eq!(value[4..12], [1, 0, 6, 0, 255, 255, 255, 255]);
        assert_eq!(value[12..], [2, 0, 4, 0, 2, 1, 0, 0]);
    }
}
