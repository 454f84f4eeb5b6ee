//! What the shim says about itself without serving anything: `-v` and `-info`.

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::{
    features,
    version::{COMMIT, VERSION},
};

/// The runtime's name for containerd, from which containerd derives the program's.
pub(super) const RUNTIME: &str = "io.containerd.caisson.v2";

/// How containerd's typeurl names the type of Go that has the OCI features document: the value is its JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// For people, laid out as containerd's own shims do it.
pub(super) fn version() -> Vec<u8> {
    format!("containerd-shim-caisson-v2:\n  Version:  {VERSION}\n  Revision: {COMMIT}\n")
        .into_bytes()
}

/// For containerd 2.x: a `RuntimeInfo`. `options` is the `Any` that containerd was configured with, or nothing.
pub(super) fn info(options: &[u8]) -> Vec<u8> {
    let options = Any::parse_from_bytes(options)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: Some(RuntimeVersion {
            version: VERSION.to_owned(),
            revision: COMMIT.to_owned(),
            ..Default::default()
        })
        .into(),
        options: options.into(),
        features: Some(Any {
            type_url: FEATURES.to_owned(),
            value: features::document().to_string().into_bytes(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    // A message of texts always encodes.
    info.write_to_bytes().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_names_itself_with_and_without_options() {
        let plain = RuntimeInfo::parse_from_bytes(&info(b"")).unwrap();
        assert_eq!(plain.name, "io.containerd.caisson.v2");
        assert_eq!(plain.version.version, VERSION);
        assert!(plain.options.is_none());
        assert_eq!(plain.features.type_url, FEATURES);
        let told: serde_json::Value = serde_json::from_slice(&plain.features.value).unwrap();
        assert_eq!(told, features::document());
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            ..Default::default()
        };
        let told = RuntimeInfo::parse_from_bytes(&info(&any.write_to_bytes().unwrap())).unwrap();
        assert_eq!(told.options.type_url, any.type_url);
    }
}
