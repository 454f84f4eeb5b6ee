//! The hooks that run in the guest: `startContainer` and `createContainer`. Those of the host are in `host.rs`.

use std::fs;

use caisson_tests::{Bundle, Case};
use serde_json::{Value, json};

/// A hook that leaves what it is told on standard input in a file.
fn telling(program: &str, file: &str) -> Value {
    json!([{"path": program, "args": ["sh", "-c", format!("read -r state; echo \"$WORD $state\" > {file}")], "env": ["WORD=spoken"]}])
}

#[track_caller]
fn was_told(bundle: &Bundle, file: &str, status: &str) {
    let text = fs::read_to_string(bundle.rootfs(file)).expect("the hook did not run");
    let state = text
        .strip_prefix("spoken ")
        .expect("the hook's environment");
    let state: Value = serde_json::from_str(state).expect("the state is JSON");
    assert_eq!(state["status"], status, "{state}");
    assert_eq!(state["bundle"], json!(bundle.dir()), "{state}");
}

#[test]
fn a_start_container_hook_runs_in_the_container_and_is_told_the_state() {
    let case = Case::begin();
    let hook = telling("/bin/sh", "/told");
    let bundle = case
        .bundle()
        .script("echo program")
        .edit(|spec| spec["hooks"] = json!({"startContainer": hook}));
    let outcome = case.run(&bundle);
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "program\n"),
        "{outcome:?}"
    );
    was_told(&bundle, "told", "created");
    let failing =
        json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo in its own words >&2; exit 3"]}]);
    let bundle = bundle.edit(|spec| spec["hooks"]["startContainer"] = failing);
    case.run(&bundle).is_refusal("in its own words");
    case.nothing_is_left();
}

#[test]
fn a_create_container_hook_runs_in_the_guest_by_a_path_of_the_guest() {
    let Some(case) = Case::begin_with_vm("a path of the host's, with runc") else {
        return;
    };
    let guests_view = "/run/caisson/share/run/rootfs";
    let hook = telling(
        &format!("{guests_view}/bin/sh"),
        &format!("{guests_view}/told"),
    );
    let bundle = case
        .bundle()
        .edit(|spec| spec["hooks"] = json!({"createContainer": hook}));
    let outcome = case.run(&bundle);
    assert_eq!(outcome.status, 0, "{outcome:?}");
    was_told(&bundle, "told", "creating");
    let bundle = bundle
        .edit(|spec| spec["hooks"]["createContainer"][0]["path"] = json!("/usr/bin/of-the-host"));
    case.run(&bundle).is_refusal("/usr/bin/of-the-host");
    case.nothing_is_left();
}
