//! What a container's own annotations may change of the host's configuration: `io.caisson.KEY`, for the keys that the
//! host's file lists.
//!
//! Contract: an annotation of ours that is not listed is refused, never passed over: whoever wrote it counts on it. A
//! value is bound by the same rules as in the file. Annotations of others are not looked at. Pure.

use std::collections::HashMap;

use serde::Deserialize;
use toml::{Table, Value};

use super::Config;

/// What our annotations begin with.
const PREFIX: &str = "io.caisson.";

/// The keys that no annotation may change, listed or not: they are about the host.
const FIXED: &[&str] = &[
    "vmm",
    "passt",
    "user_network",
    "allow_vm_section",
    "allowed_annotations",
];

/// Why a container's annotations are refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// The host's file does not list it.
    #[error(
        "annotation {PREFIX}{0} is not allowed here: the host's configuration does not list it in \
         allowed_annotations"
    )]
    NotAllowed(String),
    /// Its value is not of the key's type.
    #[error("annotation {PREFIX}{key}: {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// Its value is out of its bounds.
    #[error("annotation {PREFIX}{key} must be {bounds}")]
    Bounds {
        /// The key.
        key: &'static str,
        /// What it may be.
        bounds: &'static str,
    },
}

impl Config {
    /// This configuration as a container with these annotations gets it.
    pub fn with_annotations(
        self,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<Self, AnnotationError> {
        let mut ours: Vec<_> = annotations
            .into_iter()
            .flatten()
            .filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value)))
            .collect();
        // Of several that are refused the first by name is reported: the same one each time.
        ours.sort_unstable();
        let mut config = self;
        for (key, value) in ours {
            config = config.with(key, value)?;
        }
        config
            .check()
            .map_err(|(key, bounds)| AnnotationError::Bounds { key, bounds })?;
        Ok(config)
    }

    fn with(self, key: &str, value: &str) -> Result<Self, AnnotationError> {
        let refused = |problem: String| AnnotationError::Value {
            key: key.to_owned(),
            problem,
        };
        if !self
            .allowed_annotations
            .iter()
            .any(|allowed| allowed == key)
        {
            return Err(AnnotationError::NotAllowed(key.to_owned()));
        }
        let mut table = Table::try_from(&self).map_err(|error| refused(error.to_string()))?;
        let value = match table.get(key) {
            Some(Value::String(_)) => Value::String(value.to_owned()),
            _ => literal(value).map_err(refused)?,
        };
        table.insert(key.to_owned(), value);
        Self::deserialize(table).map_err(|error| refused(error.message().to_owned()))
    }
}

/// Whether the host's file may list a key.
pub(super) fn may_be_listed(key: &str) -> bool {
    let table = Table::try_from(Config::default()).unwrap_or_default();
    table.contains_key(key) && !FIXED.contains(&key)
}

/// A value as TOML spells it.
fn literal(text: &str) -> Result<Value, String> {
    let value = toml::from_str::<Table>(&format!("value = {text}\n"));
    let mut table = value.map_err(|error| error.message().to_owned())?;
    match (table.remove("value"), table.is_empty()) {
        (Some(value), true) => Ok(value),
        _ => Err(format!("{text:?} is not one value")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use caisson_vmm_spec::MiB;

    use super::*;

    const FILE: &str = "allowed_annotations = [\"default_vcpus\", \"default_memory_mib\", \"kernel_params\", \
                        \"debug_console\"]";

    fn with(annotations: &[(&str, &str)]) -> Result<Config, String> {
        let annotations = annotations
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let config = Config::parse(FILE, Path::new("/c.toml")).unwrap();
        config
            .with_annotations(Some(&annotations))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn listed_annotations_change_the_configuration() {
        let config = with(&[
            ("io.caisson.default_vcpus", "3"),
            ("io.caisson.default_memory_mib", "512"),
            ("io.caisson.kernel_params", "quiet x=\"1\""),
            ("io.caisson.debug_console", "true"),
            ("io.kubernetes.cri.sandbox-id", "7"),
        ])
        .unwrap();
        assert_eq!(
            (config.default_vcpus, config.default_memory_mib),
            (3, MiB(512))
        );
        assert_eq!(config.kernel_params, "quiet x=\"1\"");
        assert!(config.debug_console);
        assert_eq!(
            with(&[]).unwrap(),
            Config::parse(FILE, Path::new("/c")).unwrap()
        );
    }

    #[test]
    fn others_are_refused() {
        for name in ["kernel", "vmm", "nonsense", ""] {
            let error = with(&[(&format!("io.caisson.{name}"), "/x")]).unwrap_err();
            let wanted = format!("annotation io.caisson.{name} is not allowed here");
            assert!(error.starts_with(&wanted), "{error}");
        }
    }

    #[test]
    fn values_are_held_to_the_rules_of_the_file() {
        for (key, value, wanted) in [
            (
                "default_vcpus",
                "99",
                "annotation io.caisson.default_vcpus must be 1 to 32",
            ),
            (
                "default_vcpus",
                "two",
                "annotation io.caisson.default_vcpus: ",
            ),
            (
                "default_vcpus",
                "1\nvmm = \"/x\"",
                "annotation io.caisson.default_vcpus: ",
            ),
            (
                "debug_console",
                "1",
                "annotation io.caisson.debug_console: invalid type",
            ),
        ] {
            let error = with(&[(&format!("io.caisson.{key}"), value)]).unwrap_err();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn what_is_about_the_host_cannot_be_listed() {
        assert!(may_be_listed("kernel") && may_be_listed("huge_pages"));
        for key in ["vmm", "allow_vm_section", "allowed_annotations", "nonsense"] {
            assert!(!may_be_listed(key), "{key}");
        }
    }
}
