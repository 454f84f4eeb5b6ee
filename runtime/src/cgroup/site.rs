//! Where a sandbox's cgroup is going to be, and the making of it.
//!
//! Contract: a site is known before anything is made, so that it can be written down for whoever has to clean up after a
//! process that is killed while it makes the cgroup. What a failing step has made is removed.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;

use super::{
    CgroupError, HostCgroup, ROOT, Terms, Version,
    files::{controllers, hand_down, is_v2},
    limits::{self, Limit},
    place, properties,
    scope::Scope,
    systemd, v1, way_back,
};
use crate::{sizing::VmSize, state::ContainerId};

/// Where a sandbox's cgroup is going to be, and on which terms it is made.
#[derive(Debug)]
pub struct Site {
    spot: Spot,
    terms: Terms,
    /// Whether the specification names the place.
    is_asked: bool,
}

/// What is written down of a cgroup, by which it is removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Note {
    /// As [`Site::path`]; `None`: there is no cgroup.
    pub path: Option<PathBuf>,
    /// As [`Site::unit`].
    pub unit: Option<String>,
    /// It may not be there yet, and what is there may be another's.
    pub intended: bool,
}

#[derive(Debug)]
enum Spot {
    /// Below the root of cgroup v2.
    Below(PathBuf),
    /// In every hierarchy of cgroup v1; `None`: none is mounted.
    Everywhere(Option<v1::Tree>),
    /// Where systemd makes it, and on a host with cgroup v1 where it does not.
    Scope(Scope, Option<v1::Tree>),
}

impl Site {
    /// That of a container.
    pub fn of(spec: &Spec, id: &ContainerId, terms: Terms) -> Result<Self, CgroupError> {
        let asked = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().as_deref())
            .filter(|path| !path.as_os_str().is_empty());
        let spot = match (terms.systemd, is_v2()) {
            (true, is_v2) => {
                let scope = Scope::of(asked, id)?;
                let tree = (!is_v2).then(|| v1::Tree::below_root(&scope.path));
                Spot::Scope(scope, tree.transpose()?)
            }
            (false, true) => Spot::Below(place::of(asked, id)?),
            (false, false) => Spot::Everywhere(v1::Tree::of(asked, id)?),
        };
        Ok(Self {
            spot,
            terms,
            is_asked: asked.is_some(),
        })
    }

    /// The cgroup's directory; with cgroup v1 that in the hierarchy for memory. `None`: there can be none.
    pub fn path(&self) -> Option<PathBuf> {
        match &self.spot {
            Spot::Below(path) => Some(Path::new(ROOT).join(path)),
            Spot::Everywhere(tree) => tree.as_ref().map(v1::Tree::main),
            Spot::Scope(scope, None) => Some(Path::new(ROOT).join(&scope.path)),
            Spot::Scope(_, Some(tree)) => Some(tree.main()),
        }
    }

    /// systemd's name for it, if systemd makes it.
    pub fn unit(&self) -> Option<&str> {
        match &self.spot {
            Spot::Scope(scope, _) => Some(&scope.unit),
            _ => None,
        }
    }

    /// Makes the cgroup and limits it to the container's limits plus the cost of its virtual machine. What `keep` is
    /// given, before and after, is for whoever has to clean up after this process.
    /// `None`: there is none, which the caller's terms allow.
    pub fn make<E: From<CgroupError>>(
        self,
        spec: &Spec,
        size: VmSize,
        mut keep: impl FnMut(Note) -> Result<(), E>,
    ) -> Result<Option<HostCgroup>, E> {
        let note = Note {
            path: self.path(),
            unit: self.unit().map(str::to_owned),
            intended: true,
        };
        keep(note.clone())?;
        let made = self.make_at_once(spec, size);
        keep(match made {
            Ok(Some(_)) => Note {
                intended: false,
                ..note
            },
            _ => Note::default(),
        })?;
        Ok(made?)
    }

    fn make_at_once(self, spec: &Spec, size: VmSize) -> Result<Option<HostCgroup>, CgroupError> {
        let limits = limits::of(spec, size);
        let made = match self.spot {
            Spot::Scope(scope, tree) => return make_scope(spec, &scope, tree, &limits).map(Some),
            Spot::Below(relative) => make_below(Path::new(ROOT), &relative, &controllers(&limits)),
            Spot::Everywhere(tree) => make_everywhere(tree),
        };
        let may_go_without = !self.is_asked && self.terms.rootless.applies();
        let cgroup = match made {
            Err(error) if may_go_without && error.is_permission() => {
                return go_without(spec, error).map(|()| None);
            }
            made => made?,
        };
        cgroup.limit(&limits)?;
        Ok(Some(cgroup))
    }
}

impl Note {
    /// Removes the cgroup, with whatever is left in it. Already gone: fine.
    pub fn clear(self) -> Result<(), CgroupError> {
        let Some(path) = self.path else {
            return Ok(());
        };
        let cgroup = HostCgroup::at(path, self.unit);
        if self.intended {
            return cgroup.remove_unless_used();
        }
        cgroup.remove()
    }
}

/// Nothing of it is made.
fn unmade(path: PathBuf) -> HostCgroup {
    HostCgroup {
        path,
        first: None,
        unit: None,
        made: Vec::new(),
        way_back: Vec::new(),
    }
}

/// In every hierarchy of cgroup v1.
fn make_everywhere(tree: Option<v1::Tree>) -> Result<HostCgroup, CgroupError> {
    let tree = tree.ok_or_else(v1::none_mounted)?;
    let mut cgroup = unmade(tree.main());
    tree.make(&mut cgroup.made)?;
    if !cgroup.made.contains(&cgroup.path) && tree.is_populated()? {
        return Err(CgroupError::Populated {
            path: cgroup.path.clone(),
        });
    }
    cgroup.first = Some(tree);
    Ok(cgroup)
}

/// Has systemd make a scope, with this process in it.
fn make_scope(
    spec: &Spec,
    scope: &Scope,
    tree: Option<v1::Tree>,
    limits: &[Limit],
) -> Result<HostCgroup, CgroupError> {
    let version = match tree {
        Some(_) => Version::First,
        None => Version::Second,
    };
    let mut properties = properties::of_scope(scope, std::process::id(), limits, version);
    let annotations = spec.annotations().iter().flatten();
    let named = annotations.map(|(key, value)| (key.as_str(), value.as_str()));
    properties.extend(properties::of_annotations(named)?);
    let way_back = way_back();
    systemd::start(&scope.unit, &properties)?;
    let mut cgroup = unmade(Path::new(ROOT).join(&scope.path));
    (cgroup.unit, cgroup.way_back) = (Some(scope.unit.clone()), way_back);
    if let Some(tree) = tree {
        cgroup.path = tree.main();
        tree.make(&mut cgroup.made)?;
        tree.join()?;
        cgroup.first = Some(tree);
    }
    cgroup.limit(limits)?;
    Ok(cgroup)
}

fn make_below(
    root: &Path,
    relative: &Path,
    controllers: &[&str],
) -> Result<HostCgroup, CgroupError> {
    let mut cgroup = unmade(root.to_owned());
    for part in relative.components() {
        // Handing down is best effort: a controller that a limit needs and that is not there fails with the limit.
        hand_down(&cgroup.path, controllers);
        cgroup.path.push(part);
        match fs::DirBuilder::new().mode(0o755).create(&cgroup.path) {
            Ok(()) => cgroup.made.push(cgroup.path.clone()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(cgroup.failed("make", source)),
        }
    }
    let existed = cgroup.made.last() != Some(&cgroup.path);
    if existed && cgroup.is_populated()? {
        return Err(CgroupError::Populated {
            path: cgroup.path.clone(),
        });
    }
    Ok(cgroup)
}

/// As runc: whoever may do without a cgroup does, unless he asked for what only a cgroup gives.
fn go_without(spec: &Spec, error: CgroupError) -> Result<(), CgroupError> {
    if limits::are_asked(spec) {
        return Err(CgroupError::Unpermitted(Box::new(error)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn making_and_dropping_leaves_what_was_there_before() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("slice")).unwrap();
        let cgroup = make_below(root.path(), Path::new("slice/pod/c1"), &[]).unwrap();
        assert_eq!(cgroup.path(), root.path().join("slice/pod/c1"));
        assert!(cgroup.path().is_dir());
        drop(cgroup);
        assert!(root.path().join("slice").is_dir() && !root.path().join("slice/pod").exists());
        let kept = make_below(root.path(), Path::new("slice/pod"), &[])
            .unwrap()
            .keep();
        assert!(kept.is_dir());
    }

    #[test]
    fn a_populated_cgroup_is_not_taken_over_and_not_removed() {
        let root = tempfile::tempdir().unwrap();
        let taken = root.path().join("c1");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let error = make_below(root.path(), Path::new("c1"), &[]).unwrap_err();
        assert!(matches!(error, CgroupError::Populated { .. }));
        assert!(taken.exists());
        fs::write(taken.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
        make_below(root.path(), Path::new("c1"), &[]).unwrap();
    }

    #[test]
    fn who_asks_for_limits_cannot_do_without_a_cgroup() {
        let denied = || CgroupError::Io {
            step: "make",
            path: "/sys/fs/cgroup/c1".into(),
            source: rustix::io::Errno::ROFS.into(),
        };
        assert!(denied().is_permission());
        let asking = |resources: &str| {
            let spec = format!(r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#);
            go_without(&serde_json::from_str(&spec).unwrap(), denied())
        };
        asking(r#"{"devices":[{"allow":false}],"pids":{"limit":0}}"#).unwrap();
        let error = asking(r#"{"pids":{"limit":5}}"#).unwrap_err();
        assert!(error.to_string().starts_with("rootless needs no limits"));
    }

    #[test]
    fn a_limit_that_cannot_be_written_is_named() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = make_below(root.path(), Path::new("c1"), &[]).unwrap();
        let limit = limits::Limit {
            file: "memory.max",
            value: "5".into(),
            first_version: Vec::new(),
        };
        let error = cgroup.limit(&[limit]).unwrap_err();
        let wanted = format!(
            "write \"5\" to {}",
            cgroup.path().join("memory.max").display()
        );
        assert_eq!(error.to_string(), wanted);
        assert!(!error.is_permission());
    }
}
