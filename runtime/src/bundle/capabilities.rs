//! Capability names that nobody knows, which are left out with a warning, as runc does: a newer engine may name newer ones.
//!
//! Contract: text that parses is parsed once, and costs nothing more. Text that does not is read again without the
//! capabilities that are unknown, if there are any; else the first error stands.
//! Spec: OCI config.md, `process.capabilities`; runc, libcontainer/capabilities.

use std::collections::BTreeSet;

use oci_spec::runtime::Capability;
use serde_json::Value;

/// Parses a `config.json` or a `process` object; answers the names of unknown capabilities too.
pub(crate) fn forgive<T>(
    text: &[u8],
    parse: impl Fn(&[u8]) -> Result<T, serde_json::Error>,
) -> Result<(T, BTreeSet<String>), serde_json::Error> {
    let error = match parse(text) {
        Ok(parsed) => return Ok((parsed, BTreeSet::new())),
        Err(error) => error,
    };
    match without_unknown(text) {
        Some((text, unknown)) => Ok((parse(text.to_string().as_bytes())?, unknown)),
        None => Err(error),
    }
}

/// The document without unknown capabilities, and their names, if it has any.
fn without_unknown(text: &[u8]) -> Option<(Value, BTreeSet<String>)> {
    let mut value = serde_json::from_slice::<Value>(text).ok()?;
    let mut unknown = BTreeSet::new();
    for place in ["/process/capabilities", "/capabilities"] {
        let sets = value.pointer_mut(place).and_then(Value::as_object_mut);
        let sets = sets.into_iter().flat_map(serde_json::Map::values_mut);
        for set in sets.filter_map(Value::as_array_mut) {
            set.retain(|name| {
                let name = name.as_str().filter(|name| !is_known(name));
                unknown.extend(name.map(str::to_owned));
                name.is_none()
            });
        }
    }
    (!unknown.is_empty()).then_some((value, unknown))
}

/// What people are told, in runc's words.
pub(crate) fn warning(unknown: &BTreeSet<String>) -> Option<String> {
    let names: Vec<&str> = unknown.iter().map(String::as_str).collect();
    let names = names.join(" ");
    (!unknown.is_empty())
        .then(|| format!("ignoring unknown or unavailable capabilities: [{names}]"))
}

fn is_known(name: &str) -> bool {
    serde_json::from_value::<Capability>(name.into()).is_ok()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Process, Spec};

    use super::*;

    fn parsed(text: &str) -> Result<(Spec, BTreeSet<String>), serde_json::Error> {
        forgive(text.as_bytes(), |text| serde_json::from_slice(text))
    }

    #[test]
    fn unknown_names_are_taken_out_of_every_set() {
        let text = r#"{"ociVersion":"1.0.2","process":{"cwd":"/","user":{},
            "capabilities":{"bounding":["CAP_NEWER","CAP_KILL"],"ambient":["CAP_NEWER"]}}}"#;
        let (spec, unknown) = parsed(text).unwrap();
        let sets = spec.process().as_ref().unwrap().capabilities().as_ref();
        assert_eq!(sets.unwrap().bounding().as_ref().unwrap().len(), 1);
        assert!(sets.unwrap().ambient().as_ref().unwrap().is_empty());
        assert_eq!(
            warning(&unknown).unwrap(),
            "ignoring unknown or unavailable capabilities: [CAP_NEWER]"
        );
    }

    #[test]
    fn a_process_object_by_itself_is_treated_alike() {
        let text = br#"{"cwd":"/","user":{},"capabilities":{"bounding":["CAP_X"]}}"#;
        let parse = |text: &[u8]| serde_json::from_slice::<Process>(text);
        assert_eq!(forgive(text, parse).unwrap().1.len(), 1);
    }

    #[test]
    fn other_errors_stand_and_nothing_unknown_is_nothing_to_tell() {
        for text in [r#"{"ociVersion":5}"#, r#"{"process":{"capabilities":"#, ""] {
            assert!(parsed(text).is_err(), "{text}");
        }
        let (_, unknown) = parsed(r#"{"ociVersion":"1.0.2"}"#).unwrap();
        assert_eq!(warning(&unknown), None);
    }
}
