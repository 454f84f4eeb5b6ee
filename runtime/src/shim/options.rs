//! What containerd's configuration of a runtime says to this one: the `options` of a handler, in either of their types.
//!
//! Contract: pure but for the configuration file that may be named, which is not read here. `SystemdCgroup` means what it
//! means to runc; containerd hands it over as runc's options or, for a runtime that it does not know, as the section's own
//! text (from 1.7 on; 1.6 drops it, and only a path in systemd's form tells: [`cgroup::is_unit_path`]). In that text an
//! unknown key is refused. `ConfigPath` names this handler's own `config.toml`.
//! Spec: containerd, core/runtime/v2/runc/options/oci.proto and api/types/runtimeoptions/v1/api.proto.

use std::path::{Path, PathBuf};

use containerd_shim_protos::{
    protobuf::{self, CodedInputStream, Message, well_known_types::any::Any},
    shim::oci,
};
use serde::Deserialize;

use crate::cgroup;

/// What is configured.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    systemd_cgroup: bool,
    /// The file to read in place of the host's.
    pub(super) config: Option<PathBuf>,
}

/// Options that mean nothing here.
#[derive(Debug, thiserror::Error)]
pub(super) enum OptionsError {
    #[error("the runtime options are not of their type {kind}")]
    Message {
        kind: String,
        source: protobuf::Error,
    },
    #[error("the runtime options of containerd's configuration")]
    Text(#[source] toml::de::Error),
}

/// The section `options` as containerd passes it on.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
struct Section {
    systemd_cgroup: bool,
    /// For containerd itself.
    #[serde(rename = "TypeUrl")]
    _type_url: String,
    /// Empty: otherwise there would be no text.
    #[serde(rename = "ConfigPath")]
    _config_path: String,
}

impl Options {
    /// Reads them; other types say nothing to this runtime.
    pub(super) fn of(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any else {
            return Ok(Self::default());
        };
        let malformed = |source| OptionsError::Message {
            kind: any.type_url.clone(),
            source,
        };
        if any.type_url.ends_with("containerd.runc.v1.Options") {
            let options = oci::Options::parse_from_bytes(&any.value).map_err(malformed)?;
            return Ok(Self {
                systemd_cgroup: options.systemd_cgroup,
                config: None,
            });
        }
        if any.type_url.ends_with("runtimeoptions.v1.Options") {
            let (path, text) = generic(&any.value).map_err(malformed)?;
            let section: Section = toml::from_str(&text).map_err(OptionsError::Text)?;
            return Ok(Self {
                systemd_cgroup: section.systemd_cgroup,
                config: Some(path)
                    .filter(|path| !path.is_empty())
                    .map(PathBuf::from),
            });
        }
        Ok(Self::default())
    }

    /// Whether systemd is to make the cgroup of a container whose `cgroupsPath` is `asked`.
    pub(super) fn wants_systemd(&self, asked: Option<&Path>) -> bool {
        self.systemd_cgroup || asked.is_some_and(cgroup::is_unit_path)
    }
}

/// The path and the text of a `runtimeoptions.v1.Options`.
fn generic(bytes: &[u8]) -> protobuf::Result<(String, String)> {
    /// Field numbers with their wire type: length-delimited.
    const CONFIG_PATH: u32 = (2 << 3) | 2;
    const CONFIG_BODY: u32 = (3 << 3) | 2;
    let (mut path, mut text) = (String::new(), String::new());
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        match tag {
            CONFIG_PATH => path = input.read_string()?,
            CONFIG_BODY => text = input.read_string()?,
            other => protobuf::rt::skip_field_for_tag(other, &mut input)?,
        }
    }
    Ok((path, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: kind.to_owned(),
            value,
            ..Default::default()
        }
    }

    /// A `runtimeoptions.v1.Options`, as Go writes it.
    fn section(path: &str, text: &str) -> Any {
        let mut bytes = vec![10, 1, b't'];
        for (tag, field) in [(18, path), (26, text)] {
            if !field.is_empty() {
                bytes.extend([tag, u8::try_from(field.len()).unwrap()]);
                bytes.extend(field.as_bytes());
            }
        }
        any("runtimeoptions.v1.Options", bytes)
    }

    fn wants(options: Option<&Any>, path: Option<&str>) -> bool {
        let options = Options::of(options).unwrap();
        options.wants_systemd(path.map(Path::new))
    }

    #[test]
    fn systemds_cgroups_are_wanted_in_every_form_that_containerd_has() {
        let runc = oci::Options {
            systemd_cgroup: true,
            ..Default::default()
        };
        let runc = any("containerd.runc.v1.Options", runc.write_to_bytes().unwrap());
        assert!(wants(Some(&runc), Some("/a/b")));
        let text = section("", "SystemdCgroup = true\nTypeUrl = \"x\"\n");
        assert!(wants(Some(&text), None));
        assert!(wants(None, Some("kubepods-x.slice:cri-containerd:abc")));
        assert!(!wants(None, None));
        assert!(!wants(Some(&section("", "")), Some("/k8s.io/abc")));
        assert!(!wants(Some(&any("windows.Options", vec![255])), None));
    }

    #[test]
    fn a_handler_may_have_its_own_configuration() {
        let options = Options::of(Some(&section("/etc/caisson/big.toml", ""))).unwrap();
        assert_eq!(options.config, Some("/etc/caisson/big.toml".into()));
    }

    #[test]
    fn unknown_and_broken_options_are_refused() {
        let unknown = Options::of(Some(&section("", "BinaryName = \"x\"\n"))).unwrap_err();
        assert!(crate::error::message(&unknown).contains("BinaryName"));
        for kind in ["containerd.runc.v1.Options", "runtimeoptions.v1.Options"] {
            assert!(Options::of(Some(&any(kind, vec![18, 200]))).is_err());
        }
    }
}
