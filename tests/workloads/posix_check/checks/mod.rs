//! All checks, in groups; a check's full name is `GROUP::NAME`.

mod acl;
mod data;
mod directory;
mod execute;
mod handle;
mod link;
mod lock;
mod map;
mod name;
mod open;
mod owner;
mod permission;
mod range;
mod rename;
mod rename_flag;
mod socket;
mod time;
mod together;
mod watch;
mod xattr;

use crate::runner::Check;

/// The table of a group: the checks by their own names.
macro_rules! checks {
    ($($name:ident),* $(,)?) => {
        /// The checks of this group.
        pub(crate) const CHECKS: &[(&str, crate::runner::Check)] = &[$((stringify!($name), $name)),*];
    };
}
use checks;

/// The groups, in the order in which they run.
pub(crate) const GROUPS: &[(&str, &[(&str, Check)])] = &[
    ("open", open::CHECKS),
    ("name", name::CHECKS),
    ("link", link::CHECKS),
    ("rename", rename::CHECKS),
    ("rename_flag", rename_flag::CHECKS),
    ("directory", directory::CHECKS),
    ("permission", permission::CHECKS),
    ("owner", owner::CHECKS),
    ("acl", acl::CHECKS),
    ("xattr", xattr::CHECKS),
    ("data", data::CHECKS),
    ("range", range::CHECKS),
    ("time", time::CHECKS),
    ("handle", handle::CHECKS),
    ("map", map::CHECKS),
    ("execute", execute::CHECKS),
    ("lock", lock::CHECKS),
    ("watch", watch::CHECKS),
    ("socket", socket::CHECKS),
    ("together", together::CHECKS),
];
