//! The top level of a volume, and the way from one to the next: pure functions.
//!
//! Contract: [`steps`] goes the way that the kubelet's own writer goes (Kubernetes, pkg/volume/util/atomic_writer.go), so
//! that who watches sees the same events in the same order: directories that are new, `..data` by a rename, links that
//! are new, links that are gone, directories that are gone.
//! Not here: carrying it out (`volumes.rs`).

use caisson_agent_api::Volume as Listing;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;

/// The link to the directory with the files.
const DATA: &str = "..data";

/// The name of a link until it takes the place of another.
pub(super) const NEW_LINK: &str = "..data_tmp";

/// What a volume's directory holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct TopLevel {
    pub(super) directories: BTreeSet<OsString>,
    /// Their targets by their names.
    pub(super) links: BTreeMap<OsString, OsString>,
}

/// One change. Names are names of entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// A directory appears, with the files that it has in the share.
    Attach(OsString),
    /// It goes.
    Detach(OsString),
    /// A link appears.
    Link { name: OsString, target: OsString },
    /// A link takes the place of whatever link has its name, by a rename.
    Switch { name: OsString, target: OsString },
    /// A link goes.
    Unlink(OsString),
}

/// The name of an entry that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("volume: {0:?} is not the name of an entry")]
pub(crate) struct BadName(OsString);

fn name(bytes: &[u8]) -> Result<OsString, BadName> {
    let name = OsString::from_vec(bytes.to_vec());
    let is_none = matches!(bytes, b"" | b"." | b"..") || name == NEW_LINK;
    if is_none || bytes.contains(&b'/') || bytes.contains(&0) {
        Err(BadName(name))
    } else {
        Ok(name)
    }
}

impl TopLevel {
    /// What the host lists. A name that is there twice is a link.
    pub(super) fn of(listing: &Listing) -> Result<Self, BadName> {
        let mut top = Self::default();
        for directory in &listing.directories {
            top.directories.insert(name(directory)?);
        }
        for link in &listing.links {
            let name = name(&link.name)?;
            top.directories.remove(&name);
            let target = OsString::from_vec(link.target.clone());
            top.links.insert(name, target);
        }
        Ok(top)
    }

    /// One step has been taken.
    pub(super) fn advance(&mut self, step: Step) {
        match step {
            Step::Attach(name) => drop(self.directories.insert(name)),
            Step::Detach(name) => drop(self.directories.remove(&name)),
            Step::Link { name, target } | Step::Switch { name, target } => {
                self.links.insert(name, target);
            }
            Step::Unlink(name) => drop(self.links.remove(&name)),
        }
    }
}

/// The way from what there is to what is wanted.
pub(super) fn steps(now: &TopLevel, wanted: &TopLevel) -> Vec<Step> {
    let mut steps = Vec::new();
    for name in wanted.directories.difference(&now.directories) {
        if now.links.contains_key(name) {
            steps.push(Step::Unlink(name.clone()));
        }
        steps.push(Step::Attach(name.clone()));
    }
    let data = OsStr::new(DATA);
    let first = wanted.links.get_key_value(data);
    let others = wanted.links.iter().filter(|(name, _)| *name != data);
    for (name, target) in first.into_iter().chain(others) {
        if now.links.get(name) == Some(target) {
            continue;
        }
        if now.directories.contains(name) {
            steps.push(Step::Detach(name.clone()));
        }
        let (replaces, name, target) = (
            name == data || now.links.contains_key(name),
            name.clone(),
            target.clone(),
        );
        steps.push(if replaces {
            Step::Switch { name, target }
        } else {
            Step::Link { name, target }
        });
    }
    let is_gone =
        |name: &&OsString| !wanted.links.contains_key(*name) && !wanted.directories.contains(*name);
    let unlinked = now.links.keys().filter(is_gone).cloned();
    steps.extend(unlinked.map(Step::Unlink));
    let detached = now.directories.iter().filter(is_gone).cloned();
    steps.extend(detached.map(Step::Detach));
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use caisson_agent_api::Link;

    fn listing(directories: &[&str], links: &[(&str, &str)]) -> Listing {
        Listing {
            directories: directories
                .iter()
                .map(|name| name.as_bytes().into())
                .collect(),
            links: links
                .iter()
                .map(|(name, target)| Link {
                    name: name.as_bytes().into(),
                    target: target.as_bytes().into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    fn top(directories: &[&str], links: &[(&str, &str)]) -> TopLevel {
        TopLevel::of(&listing(directories, links)).unwrap()
    }

    fn link(name: &str, target: &str) -> Step {
        let (name, target) = (name.into(), target.into());
        Step::Link { name, target }
    }

    fn switch(name: &str, target: &str) -> Step {
        let (name, target) = (name.into(), target.into());
        Step::Switch { name, target }
    }

    #[test]
    fn an_update_goes_the_kubelets_way() {
        let now = top(
            &["..1"],
            &[("..data", "..1"), ("a", "..data/a"), ("old", "..data/old")],
        );
        let wanted = top(
            &["..2"],
            &[("..data", "..2"), ("a", "..data/a"), ("new", "..data/new")],
        );
        assert_eq!(
            steps(&now, &wanted),
            [
                Step::Attach("..2".into()),
                switch("..data", "..2"),
                link("new", "..data/new"),
                Step::Unlink("old".into()),
                Step::Detach("..1".into()),
            ]
        );
        assert!(steps(&wanted, &wanted).is_empty());
    }

    #[test]
    fn a_link_that_points_elsewhere_is_never_missing() {
        let now = top(&[], &[("a", "1"), ("b", "1")]);
        let wanted = top(&[], &[("a", "2"), ("b", "1")]);
        assert_eq!(steps(&now, &wanted), [switch("a", "2")]);
    }

    #[test]
    fn an_entry_may_become_one_of_the_other_kind() {
        let now = top(&["x"], &[("y", "1")]);
        let wanted = top(&["y"], &[("x", "1")]);
        let expected = [
            Step::Unlink("y".into()),
            Step::Attach("y".into()),
            Step::Detach("x".into()),
            link("x", "1"),
        ];
        let mut reached = now.clone();
        for step in steps(&now, &wanted) {
            reached.advance(step);
        }
        assert_eq!(steps(&now, &wanted), expected);
        assert_eq!(reached, wanted);
    }

    #[test]
    fn names_lead_nowhere_else() {
        for bad in ["", ".", "..", "a/b", "/", "a\0", "..data_tmp"] {
            assert!(TopLevel::of(&listing(&[bad], &[])).is_err(), "{bad:?}");
            assert!(
                TopLevel::of(&listing(&[], &[(bad, "x")])).is_err(),
                "{bad:?}"
            );
        }
    }
}
