//! Trees of the share that the guest may take for its own: what it was told of their names and attributes, and that a
//! name is absent, it may believe for as long as whoever runs the machine says.
//!
//! Contract: such a tree begins at `*/NAME` of the share, and ends where another directory is mounted in it: volumes are
//! asked for as `coherence.rs` has it, wherever they are. A node belongs to the tree in which the guest found it. What the
//! guest does itself it knows at once; what others do in such a tree it sees when the time has passed, or when it opens the
//! file (its pages), as with virtiofsd's own defaults. Without such trees nothing here costs anything.
//! Bounded: by the nodes that the guest knows, which virtiofsd remembers too; one that it half forgets counts as a
//! stranger's until it is looked up again.
//! Threads: one lock, held for one look.

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use caisson_vmm_spec::OwnTrees;
use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr, ROOT_ID};

use super::guard::Inode;

/// Where a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the share's root: a tree may begin in it.
    Top,
    /// In a tree.
    Tree,
}

/// See the file header.
#[derive(Debug)]
pub(super) struct Own {
    trees: Option<OwnTrees>,
    places: Mutex<HashMap<Inode, Place>>,
}

impl Own {
    /// Nothing has been looked up.
    pub(super) fn new(trees: Option<OwnTrees>) -> Self {
        Self {
            trees: trees.filter(|trees| trees.believed_ms != 0),
            places: Mutex::default(),
        }
    }

    fn places(&self) -> MutexGuard<'_, HashMap<Inode, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest is told of `entry`, which it made or which it found by `name`, in `parent`.
    pub(super) fn see(&self, parent: Inode, name: Option<&CStr>, entry: &Entry) {
        let Some(trees) = &self.trees else {
            return;
        };
        let mut places = self.places();
        let mounted = entry.attr.flags & ATTR_SUBMOUNT != 0;
        let begins = || name.is_some_and(|name| name.to_bytes() == trees.name.as_bytes());
        let place = match places.get(&parent) {
            _ if parent == ROOT_ID => Some(Place::Top),
            Some(Place::Top) if begins() => Some(Place::Tree),
            Some(Place::Tree) if !mounted => Some(Place::Tree),
            _ => None,
        };
        match place {
            Some(place) => places.insert(entry.inode, place),
            None => places.remove(&entry.inode),
        };
    }

    /// How long the guest may believe what it is told of a node at least.
    pub(super) fn believed(&self, node: Inode) -> Duration {
        match &self.trees {
            Some(trees) if self.places().get(&node) == Some(&Place::Tree) => {
                Duration::from_millis(trees.believed_ms.into())
            }
            _ => Duration::ZERO,
        }
    }

    /// The answer for a name that is not in `parent`, if the guest may believe that.
    pub(super) fn absent(&self, parent: Inode) -> Option<Entry> {
        let entry_timeout = self.believed(parent);
        (!entry_timeout.is_zero()).then(|| Entry {
            inode: 0,
            generation: 0,
            attr: Attr::default(),
            attr_timeout: Duration::ZERO,
            entry_timeout,
        })
    }

    /// The guest forgot something of the node.
    pub(super) fn forget(&self, node: Inode) {
        if self.trees.is_some() {
            self.places().remove(&node);
        }
    }

    /// The guest forgot everything.
    pub(super) fn clear(&self) {
        self.places().clear();
    }
}
