//! The files of a container's /proc, as far as they are shown: which there are, and what they say.
//!
//! ```text
//!  /stat /uptime /meminfo               the guest
//!  /PID/stat /PID/status /PID/cmdline   a process
//!  /PID/ns/pid                          a link that names no namespace: it is another kernel's
//! ```
//!
//! Contract: pure functions of a table with the container's own numbers (`process_table/inside.rs`), whose texts are
//! written anew from checked numbers. A process that is not in the table has no files.
//! Spec: proc(5).

use crate::process_table::Table;

/// Bits of a file's number below the process's.
const PART_BITS: u32 = 4;
/// The numbers of the files at the top, after the root's, which is 1 (`FUSE_ROOT_ID`).
const SYSTEM: u64 = 2;
const ROOT: u64 = 1;

/// What the link to a process's PID namespace says.
const NO_NAMESPACE: &str = "pid:[0]";

/// A file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    Root,
    /// One of the files about the guest.
    System(usize),
    Process(u32, Part),
}

/// A file of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Directory,
    /// One of [its files](crate::process_table::Process::files).
    Text(usize),
    Namespaces,
    PidNamespace,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Text,
    Link,
}

impl Kind {
    /// Type and permissions (stat(2)).
    pub(super) const fn mode(self) -> u32 {
        match self {
            Self::Directory => 0o040_555,
            Self::Text => 0o100_444,
            Self::Link => 0o120_777,
        }
    }
}

impl Node {
    /// Its number in the file system.
    pub(super) fn number(self) -> u64 {
        let index = |index: usize| u64::try_from(index).unwrap_or(u64::MAX);
        let part = |part| match part {
            Part::Directory => 0,
            Part::Namespaces => 1,
            Part::PidNamespace => 2,
            Part::Text(at) => 3 + index(at),
        };
        match self {
            Self::Root => ROOT,
            Self::System(at) => SYSTEM + index(at),
            Self::Process(pid, of) => u64::from(pid) << PART_BITS | part(of),
        }
    }

    /// The file of a number, if there can be one.
    pub(super) fn of(number: u64) -> Option<Self> {
        let index = |number: u64| usize::try_from(number).ok();
        match number >> PART_BITS {
            0 if number == ROOT => Some(Self::Root),
            0 => Some(Self::System(index(number.checked_sub(SYSTEM)?)?)),
            pid => {
                let part = match number & ((1 << PART_BITS) - 1) {
                    0 => Part::Directory,
                    1 => Part::Namespaces,
                    2 => Part::PidNamespace,
                    text => Part::Text(index(text - 3)?),
                };
                Some(Self::Process(pid.try_into().ok()?, part))
            }
        }
    }

    pub(super) const fn kind(self) -> Kind {
        match self {
            Self::Root | Self::Process(_, Part::Directory | Part::Namespaces) => Kind::Directory,
            Self::System(_) | Self::Process(_, Part::Text(_)) => Kind::Text,
            Self::Process(_, Part::PidNamespace) => Kind::Link,
        }
    }

    /// Its user and group; none if there is no such file.
    pub(super) fn owner(self, table: &Table) -> Option<(u32, u32)> {
        match self {
            Self::Root => Some((0, 0)),
            Self::System(at) => table.system_files().get(at).map(|_| (0, 0)),
            Self::Process(pid, Part::Text(at)) => {
                let process = table.process(pid)?;
                process.files().get(at).map(|_| process.owner())
            }
            Self::Process(pid, _) => Some(table.process(pid)?.owner()),
        }
    }

    /// What a file says, or where a link leads.
    pub(super) fn content(self, table: &Table) -> Option<String> {
        match self {
            Self::System(at) => Some(table.system_files().get(at)?.1.clone()),
            Self::Process(pid, Part::Text(at)) => {
                Some(table.process(pid)?.files().get(at)?.1.clone())
            }
            Self::Process(pid, Part::PidNamespace) => {
                table.process(pid).map(|_| NO_NAMESPACE.to_owned())
            }
            Self::Root | Self::Process(_, Part::Directory | Part::Namespaces) => None,
        }
    }

    /// The files in a directory, with their names.
    pub(super) fn entries(self, table: &Table) -> Option<Vec<(String, Self)>> {
        let numbered = |names: &[(&str, String)], node: &dyn Fn(usize) -> Self| {
            let named = names.iter().enumerate();
            let all = named.map(|(at, (name, _))| ((*name).to_owned(), node(at)));
            all.collect::<Vec<_>>()
        };
        match self {
            Self::Root => {
                let mut entries = numbered(&table.system_files(), &Self::System);
                let directory = |pid: u32| (pid.to_string(), Self::Process(pid, Part::Directory));
                entries.extend(table.pids().map(directory));
                Some(entries)
            }
            Self::Process(pid, Part::Directory) => {
                let text = |at| Self::Process(pid, Part::Text(at));
                let mut entries = numbered(&table.process(pid)?.files(), &text);
                entries.push(("ns".to_owned(), Self::Process(pid, Part::Namespaces)));
                Some(entries)
            }
            Self::Process(pid, Part::Namespaces) => {
                table.process(pid)?;
                Some(vec![(
                    "pid".to_owned(),
                    Self::Process(pid, Part::PidNamespace),
                )])
            }
            Self::System(_) | Self::Process(_, Part::Text(_) | Part::PidNamespace) => None,
        }
    }

    /// The file of this name in a directory.
    pub(super) fn child(self, table: &Table, name: &str) -> Option<Self> {
        let entries = self.entries(table)?;
        let found = entries.into_iter().find(|(other, _)| other == name);
        found.map(|(_, node)| node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process_table::tests::table;

    /// Every path from here on, with what it says.
    fn walk(table: &Table, node: Node, path: &str) -> Vec<(String, Option<String>)> {
        let entries = node.entries(table).unwrap_or_default();
        let below = entries.into_iter().flat_map(|(name, child)| {
            assert_eq!(node.child(table, &name), Some(child));
            assert_eq!(Node::of(child.number()), Some(child));
            assert!(child.owner(table).is_some());
            walk(table, child, &format!("{path}/{name}"))
        });
        let own = (path.to_owned(), node.content(table));
        std::iter::once(own).chain(below).collect()
    }

    #[test]
    fn a_process_has_its_files() {
        let table = table(&[71]);
        let all = walk(&table, Node::Root, "");
        let paths: Vec<&str> = all.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "",
                "/uptime",
                "/stat",
                "/meminfo",
                "/71",
                "/71/stat",
                "/71/status",
                "/71/cmdline",
                "/71/ns",
                "/71/ns/pid"
            ]
        );
        let says = |path: &str| {
            all.iter()
                .find(|(other, _)| other == path)
                .unwrap()
                .1
                .clone()
        };
        assert!(says("/71/stat").unwrap().starts_with("71 (sl) eep) S "));
        assert_eq!(says("/71/ns/pid").as_deref(), Some("pid:[0]"));
        assert_eq!(
            Node::Process(71, Part::Directory).owner(&table),
            Some((8, 2))
        );
    }

    #[test]
    fn a_process_that_has_ended_has_none() {
        let table = table(&[71]);
        for part in [
            Part::Directory,
            Part::Text(0),
            Part::Namespaces,
            Part::PidNamespace,
        ] {
            let node = Node::Process(72, part);
            assert_eq!(
                (
                    node.owner(&table),
                    node.content(&table),
                    node.entries(&table)
                ),
                (None, None, None)
            );
        }
        assert_eq!(Node::Process(71, Part::Text(3)).owner(&table), None);
        assert_eq!(Node::of(SYSTEM + 3).unwrap().owner(&table), None);
        assert_eq!(Node::of(u64::MAX), None);
    }
}
