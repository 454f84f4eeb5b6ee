//! Owners of a mount's files, translated for that mount alone: what `mounts[].uidMappings`, `gidMappings`, `idmap` and
//! `ridmap` ask for.
//!
//! The translation is made on the host, on the mount that is shared (`share.rs`), by the kernel that has the file system:
//! it also holds for what is mounted below, and the guest sees its result. (In the guest, Linux 6.12 could do it for the
//! share itself only: a mount of the host's below the share is a file system of its own there, with `SB_I_NOIDMAP` set.)
//!
//! Contract: pure. As runc 1.2: both kinds of mappings or none, bind mounts only; without mappings those of the
//! container's user namespace.
//! Spec: OCI config.md, "Mounts"; mount_setattr(2), `MOUNT_ATTR_IDMAP`.

use caisson_agent_api::id_map;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

/// A translation of owners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapping {
    /// Lines for a `/proc/PID/uid_map`: owner on the file system, owner on the mount, how many.
    pub users: String,
    /// The same for groups.
    pub groups: String,
    /// Also for what is mounted below.
    pub recursive: bool,
}

/// What cannot be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdMappingError {
    /// runc's words.
    #[error("id-mapped mounts are only supported for bind-mounts")]
    NotBind,
    /// runc's words.
    #[error("id-mapped mounts must have both uid and gid mappings specified")]
    Incomplete,
}

/// The words that ask for it, with whether they mean the whole tree.
const OPTIONS: [(&str, bool); 2] = [("idmap", false), ("ridmap", true)];

/// What a mount asks for.
pub fn of(mount: &Mount, spec: &Spec) -> Result<Option<IdMapping>, IdMappingError> {
    let options = mount.options().iter().flatten();
    let asked = options
        .filter_map(|option| Some(OPTIONS.iter().find(|(name, _)| name == option)?.1))
        .next_back();
    let (users, groups) = (given(mount.uid_mappings()), given(mount.gid_mappings()));
    if asked.is_none() && users.is_none() && groups.is_none() {
        return Ok(None);
    }
    if !crate::guest_spec::is_bind(mount) {
        return Err(IdMappingError::NotBind);
    }
    let (users, groups) = match (users, groups) {
        (None, None) => of_user_namespace(spec),
        given => given,
    };
    Ok(Some(IdMapping {
        users: users.ok_or(IdMappingError::Incomplete)?,
        groups: groups.ok_or(IdMappingError::Incomplete)?,
        recursive: asked.unwrap_or(false),
    }))
}

/// Takes what [`of`] reads out of a mount.
pub fn remove(mount: &mut Mount) {
    mount.set_uid_mappings(None).set_gid_mappings(None);
    if let Some(options) = mount.options_mut() {
        options.retain(|option| OPTIONS.iter().all(|(name, _)| name != option));
    }
}

fn of_user_namespace(spec: &Spec) -> (Option<String>, Option<String>) {
    let Some(linux) = spec.linux() else {
        return (None, None);
    };
    let mut namespaces = linux.namespaces().iter().flatten();
    if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return (None, None);
    }
    (given(linux.uid_mappings()), given(linux.gid_mappings()))
}

fn given(mappings: &Option<Vec<LinuxIdMapping>>) -> Option<String> {
    let mappings = mappings.as_ref().filter(|all| !all.is_empty())?;
    let triple = |map: &LinuxIdMapping| (map.container_id(), map.host_id(), map.size());
    Some(id_map::lines(mappings.iter().map(triple)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn asked(mount: Value, linux: Value) -> Result<Option<IdMapping>, IdMappingError> {
        let spec = json!({"ociVersion": "1.0.2", "mounts": [mount], "linux": linux});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        of(&spec.mounts().as_ref().unwrap()[0], &spec)
    }

    fn bind(options: &[&str], extra: Value) -> Value {
        let mut mount =
            json!({"destination": "/d", "type": "bind", "source": "/s", "options": options});
        let extra = extra.as_object().unwrap().clone();
        mount.as_object_mut().unwrap().extend(extra);
        mount
    }

    fn map(first: u32) -> Value {
        json!([{"containerID": 0, "hostID": first, "size": 10}])
    }

    #[test]
    fn mappings_are_used_with_or_without_the_option() {
        let both = json!({"uidMappings": map(100), "gidMappings": map(200)});
        let wanted = |recursive| IdMapping {
            users: "0 100 10\n".to_owned(),
            groups: "0 200 10\n".to_owned(),
            recursive,
        };
        for (options, recursive) in [
            (&["rbind"][..], false),
            (&["rbind", "idmap"], false),
            (&["rbind", "ridmap"], true),
        ] {
            let got = asked(bind(options, both.clone()), json!({})).unwrap();
            assert_eq!(got, Some(wanted(recursive)), "{options:?}");
        }
    }

    #[test]
    fn the_option_alone_means_the_containers_user_namespace() {
        let linux =
            json!({"uidMappings": map(5), "gidMappings": map(6), "namespaces": [{"type": "user"}]});
        let got = asked(bind(&["bind", "idmap"], json!({})), linux)
            .unwrap()
            .unwrap();
        assert_eq!(
            (got.users.as_str(), got.groups.as_str()),
            ("0 5 10\n", "0 6 10\n")
        );
        let alone = asked(bind(&["bind", "idmap"], json!({})), json!({}));
        assert_eq!(alone, Err(IdMappingError::Incomplete));
    }

    #[test]
    fn half_a_mapping_and_other_mounts_than_binds_are_refused() {
        let half = asked(bind(&["bind"], json!({"uidMappings": map(1)})), json!({}));
        assert_eq!(half, Err(IdMappingError::Incomplete));
        let tmpfs =
            json!({"destination": "/t", "type": "tmpfs", "source": "t", "options": ["idmap"]});
        assert_eq!(asked(tmpfs, json!({})), Err(IdMappingError::NotBind));
        assert_eq!(asked(bind(&["bind"], json!({})), json!({})), Ok(None));
    }

    #[test]
    fn nothing_of_it_is_left_for_the_guest() {
        let mount = bind(
            &["ro", "ridmap", "bind"],
            json!({"uidMappings": map(1), "gidMappings": map(1)}),
        );
        let mut mount: Mount = serde_json::from_value(mount).unwrap();
        remove(&mut mount);
        let left = serde_json::to_value(&mount).unwrap();
        assert_eq!(left["options"], json!(["ro", "bind"]));
        assert!(left.get("uidMappings").is_none() && left.get("gidMappings").is_none());
    }
}
