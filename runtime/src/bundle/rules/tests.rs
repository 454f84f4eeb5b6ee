//! What a specification may say, and in which words it is refused.

use serde_json::{Value, json};

use super::*;
use crate::bundle::vm;

fn good() -> Value {
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {"user": {}, "args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}]},
    })
}

/// What the rules say after the value at a JSON pointer was replaced, or removed if it is null.
fn verdict(pointer: &str, value: Value, config: &Config) -> Result<(), String> {
    let mut spec = good();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = spec.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    match value {
        Value::Null => drop(parent.remove(key)),
        value => drop(parent.insert(key.to_owned(), value)),
    }
    let (spec, vm) = vm::parse(spec.to_string().as_bytes()).map_err(|e| e.to_string())?;
    check(&spec, vm.as_ref(), config, Place::Alone).map_err(|error| error.to_string())
}

#[test]
fn a_member_of_a_pod_may_name_the_namespaces_that_a_pod_shares() {
    let with = |kind: &str, place| {
        let mut spec = good();
        spec["linux"]["namespaces"] =
            json!([{"type": "network", "path": "/n"}, {"type": kind, "path": "/x"}]);
        let (spec, vm) = vm::parse(spec.to_string().as_bytes()).unwrap();
        check(&spec, vm.as_ref(), &Config::default(), place).is_ok()
    };
    let shared = ["ipc", "uts", "pid", "user"].map(|kind| (kind, true));
    for (kind, shared) in shared.into_iter().chain([("mount", false)]) {
        assert_eq!(with(kind, Place::Member), shared, "{kind}");
        assert!(!with(kind, Place::Alone), "{kind}");
    }
}

fn refusal(pointer: &str, value: Value) -> String {
    verdict(pointer, value, &Config::default()).unwrap_err()
}

#[test]
fn a_plain_specification_passes() {
    verdict("/hostname", json!("h"), &Config::default()).unwrap();
}

#[test]
fn versions_up_to_ours_are_known() {
    for version in ["1.0.0", "1.0.2-dev", "1.1.0+dev", "1.2.1", "1.3.0"] {
        verdict("/ociVersion", json!(version), &Config::default()).unwrap();
    }
    for version in ["1.4.0", "1.900.0"] {
        let text = refusal("/ociVersion", json!(version));
        assert!(
            text.contains(version) && text.contains("not supported"),
            "{text}"
        );
    }
    for version in [
        "2.0.0", "0.9.0", "x", "1.0", "1", "1.0.0.0", "1.x.0", "1..0", "-1.0.0",
    ] {
        let text = refusal("/ociVersion", json!(version));
        assert!(
            text.contains(&format!("{version:?} is not a version")),
            "{text}"
        );
    }
    assert_eq!(
        refusal("/ociVersion", Value::Null),
        "ociVersion must be set"
    );
    assert_eq!(refusal("/ociVersion", json!("")), "ociVersion must be set");
}

#[test]
fn a_process_is_needed_in_runcs_words() {
    for (pointer, value, wanted) in [
        (
            "/process",
            Value::Null,
            "process property must not be empty",
        ),
        ("/process/args", Value::Null, "args must not be empty"),
        ("/process/args", json!([]), "args must not be empty"),
        ("/process/cwd", json!("rel"), "Cwd must be an absolute path"),
        ("/process/cwd", json!(""), "Cwd property must not be empty"),
    ] {
        assert_eq!(refusal(pointer, value), wanted);
    }
}

#[test]
fn host_networking_is_refused_and_says_what_to_do() {
    for namespaces in [json!([{"type": "pid"}]), json!([]), Value::Null] {
        let mut spec = good();
        spec["linux"]["namespaces"] = namespaces.clone();
        let (spec, _) = vm::parse(spec.to_string().as_bytes()).unwrap();
        assert!(linux(&spec, Place::Connected).is_ok() && !has_network(&spec));
        let text = refusal("/linux/namespaces", namespaces);
        assert!(
            text.contains("host networking") && text.contains("give {\"type\""),
            "{text}"
        );
    }
}

#[test]
fn only_the_network_namespace_may_have_a_path() {
    let with = |kind: &str| json!([{"type": "network", "path": "/run/netns/x"}, {"type": kind, "path": "/proc/1/ns/x"}]);
    for kind in ["pid", "ipc", "uts", "mount", "user", "cgroup", "time"] {
        let text = refusal("/linux/namespaces", with(kind));
        assert!(
            text.contains(&format!("path for the {kind} namespace")),
            "{text}"
        );
    }
    let network = json!([{"type": "network", "path": "/run/netns/x"}, {"type": "pid", "path": ""}]);
    verdict("/linux/namespaces", network, &Config::default()).unwrap();
}

#[test]
fn a_namespace_given_twice_is_refused() {
    let twice = json!([{"type": "network"}, {"type": "pid"}, {"type": "pid"}]);
    assert_eq!(
        refusal("/linux/namespaces", twice),
        "malformed spec file: duplicated ns \"pid\""
    );
}

#[test]
fn what_only_a_host_has_is_refused_by_name() {
    for (field, value) in [
        ("linux.intelRdt", json!({"closID": "x"})),
        ("linux.netDevices", json!({"eth0": {}})),
    ] {
        let text = refusal(&format!("/{}", field.replace('.', "/")), value);
        assert!(
            text.starts_with(&format!("{field} is not supported: ")),
            "{text}"
        );
    }
    for (field, value) in [
        ("network", json!({"classID": 7})),
        ("rdma", json!({"mlx5_0": {"hcaHandles": 3}})),
    ] {
        let text = refusal("/linux/resources", json!({field: value}));
        assert!(
            text.starts_with(&format!("linux.resources.{field} is not")),
            "{text}"
        );
    }
    let empty = json!({"network": {}, "rdma": {}});
    verdict("/linux/resources", empty, &Config::default()).unwrap();
}

#[test]
fn a_memory_policy_is_for_who_brings_the_memory() {
    let policy = json!({"mode": "MPOL_BIND", "nodes": "0"});
    verdict("/linux/memoryPolicy", policy.clone(), &Config::default()).unwrap();
    let mut spec = good();
    spec["linux"]["memoryPolicy"] = policy;
    let error = joining(&serde_json::from_value(spec).unwrap()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("linux.memoryPolicy is not supported: ")
    );
    joining(&serde_json::from_value(good()).unwrap()).unwrap();
    let text = refusal(
        "/linux/memoryPolicy",
        json!({"mode": "MPOL_BIND", "nodes": "5-3"}),
    );
    assert_eq!(text, "linux.memoryPolicy: invalid range: 5-3");
}

#[test]
fn an_id_mapping_without_one_to_use_is_refused_in_runcs_words() {
    let mount = json!([{"destination": "/d", "type": "bind", "source": "/s", "options": ["bind", "idmap"]}]);
    let text = refusal("/mounts", mount);
    assert_eq!(
        text,
        "mounts[0]: id-mapped mounts must have both uid and gid mappings specified"
    );
}

#[test]
fn hooks_need_absolute_paths_and_sensible_timeouts() {
    let text = refusal(
        "/hooks",
        json!({"poststop": [{"path": "/x"}, {"path": "x"}]}),
    );
    assert_eq!(text, "hooks.poststop[1].path must be an absolute path");
    let text = refusal(
        "/hooks",
        json!({"createRuntime": [{"path": "/x", "timeout": 0}]}),
    );
    assert_eq!(
        text,
        "hooks.createRuntime[0].timeout must be greater than 0"
    );
}

#[test]
fn the_vm_section_needs_the_hosts_permission() {
    let section = json!({"hwConfig": {"vcpus": 2}});
    assert!(refusal("/vm", section.clone()).contains("allow_vm_section"));
    let permitted = Config {
        allow_vm_section: true,
        ..Config::default()
    };
    verdict("/vm", section, &permitted).unwrap();
    verdict(
        "/vm",
        json!({"kernel": {"path": "/k", "parameters": ["quiet"]}}),
        &permitted,
    )
    .unwrap();
    for (section, wanted) in [
        (
            json!({"hypervisor": {"path": "/h"}}),
            "vm.hypervisor is not supported",
        ),
        (
            json!({"image": {"path": "/i", "format": "raw"}}),
            "vm.image is not supported",
        ),
        (
            json!({"kernel": {"path": "k"}}),
            "vm.kernel.path must be an absolute path",
        ),
        (
            json!({"kernel": {"path": "/k", "initrd": "i"}}),
            "vm.kernel.initrd must be",
        ),
        (
            json!({"hwConfig": {"irqs": [1]}}),
            "vm.hwConfig.irqs is not supported",
        ),
        (
            json!({"hwConfig": {"dtdevs": ["/soc"]}}),
            "vm.hwConfig.dtdevs is not supported",
        ),
    ] {
        let text = verdict("/vm", section, &permitted).unwrap_err();
        assert!(text.starts_with(wanted), "{text}");
    }
}

#[test]
fn terminals_follow_runcs_table() {
    let allowed = |terminal, detach, console_socket| {
        super::terminal(
            terminal,
            Caller {
                detach,
                console_socket,
            },
        )
        .is_ok()
    };
    let table: Vec<_> = [false, true]
        .into_iter()
        .flat_map(|t| {
            [
                (t, false, false),
                (t, false, true),
                (t, true, false),
                (t, true, true),
            ]
        })
        .map(|(terminal, detach, socket)| allowed(terminal, detach, socket))
        .collect();
    assert_eq!(table, [true, false, true, false, true, false, false, true]);
}

#[test]
fn what_has_no_effect_is_told_and_what_is_off_is_not() {
    let warned = |pointer: &str, value: Value| {
        let mut spec = good();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec["linux"]["resources"] = json!({"memory": {}, "cpu": {}, "blockIO": {}});
        spec.pointer_mut(parent).unwrap()[key] = value;
        let (spec, _) = vm::parse(spec.to_string().as_bytes()).unwrap();
        warnings(&spec)
    };
    let resources = "/linux/resources";
    for (pointer, value, off) in [
        (
            format!("{resources}/memory/swappiness"),
            json!(5),
            Value::Null,
        ),
        (format!("{resources}/memory/kernel"), json!(5), json!(-1)),
        (
            format!("{resources}/memory/disableOOMKiller"),
            json!(true),
            json!(false),
        ),
        (
            format!("{resources}/cpu/realtimeRuntime"),
            json!(5),
            json!(0),
        ),
        (
            format!("{resources}/blockIO/leafWeight"),
            json!(500),
            json!(0),
        ),
        (
            "/process/apparmorProfile".to_owned(),
            json!("docker-default"),
            json!("unconfined"),
        ),
        ("/process/selinuxLabel".to_owned(), json!("x"), json!("")),
        ("/linux/mountLabel".to_owned(), json!("x"), json!("")),
    ] {
        let told = warned(&pointer, value);
        let field = pointer.trim_start_matches('/').replace('/', ".");
        assert_eq!(told.len(), 1, "{pointer}");
        assert!(told[0].starts_with(&field), "{}", told[0]);
        assert!(warned(&pointer, off).is_empty(), "{pointer}");
    }
}

#[test]
fn labels_are_reported_as_not_applied() {
    let mut spec = good();
    spec["process"]["selinuxLabel"] = json!("system_u:x");
    let spec: Spec = serde_json::from_value(spec).unwrap();
    assert_eq!(
        warnings(&spec),
        ["process.selinuxLabel is not applied: the guest kernel has no SELinux"]
    );
}
