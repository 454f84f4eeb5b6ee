//! Pods with `hostUsers: false`, as containerd 2.0 and later describe them: the sandbox has a user namespace of its own,
//! which its other containers name by the path of the process that stands for the sandbox on the host.

use std::fs;

use caisson_tests::{Bundle, Case};
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, KillRequest,
    ShutdownRequest, StartRequest, StartResponse, WaitRequest, WaitResponse,
};
use serde_json::{Value, json};

use crate::bootstrap::skipped;
use crate::driver::{Driver, Form, begin};

/// A container of the pod whose user namespace and the others that it shares are new ones or those of a path.
fn bundle(case: &Case, id: &str, kind: &str, path: Option<&str>, script: &str) -> Bundle {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let bundle = case.bundle_in(id).script(script).edit(|spec| {
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": "pod",
        });
        let shared = ["network", "ipc", "uts", "user"].map(|kind| match path {
            Some(path) => json!({"type": kind, "path": path}),
            None => json!({"type": kind}),
        });
        let own = ["pid", "mount", "cgroup"].map(|kind| json!({"type": kind}));
        let all: Vec<Value> = shared.into_iter().chain(own).collect();
        spec["linux"]["namespaces"] = json!(all);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
        spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    });
    let own = case.program("chown").args(["-R", "100000:100000"]);
    own.args([bundle.rootfs("")]).succeed();
    bundle
}

fn start(driver: &Driver<'_>, bundle: &Bundle, id: &str, stdout: String) {
    let request = CreateTaskRequest {
        id: id.to_owned(),
        bundle: bundle.dir().to_string_lossy().into_owned(),
        stdout,
        ..Default::default()
    };
    let _: CreateTaskResponse = driver.task("Create", &request);
    let request = StartRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let _: StartResponse = driver.task("Start", &request);
}

fn end(driver: &Driver<'_>, id: &str) -> u32 {
    let id = id.to_owned();
    let wanted = WaitRequest {
        id: id.clone(),
        ..Default::default()
    };
    let ended: WaitResponse = driver.task("Wait", &wanted);
    let wanted = DeleteRequest {
        id,
        ..Default::default()
    };
    let _: DeleteResponse = driver.task("Delete", &wanted);
    ended.exit_status
}

#[test]
fn the_containers_of_a_pod_share_its_user_namespace() {
    if skipped() {
        return;
    }
    let case = begin();
    let print = "cat /proc/self/uid_map | tr -s ' '; id -u; readlink /proc/self/ns/user; \
                 readlink /proc/self/ns/net; touch /made; stat -c %u /made; hostname";
    let pod_script = format!("{print}; exec sleep 1000");
    let pod = bundle(&case, "pod", "sandbox", None, &pod_script);
    let member = bundle(
        &case,
        "member",
        "container",
        Some("/proc/1/ns/any"),
        &format!("{print}; exit 7"),
    );
    let mut driver = Driver::new(&case, pod.dir(), "pod", Form::Json);
    driver.start(None);
    let said = |id: &str| case.dir().join(format!("said-by-{id}"));
    let stdout = |id: &str| format!("file://{}", said(id).display());
    start(&driver, &pod, "pod", stdout("pod"));
    start(&driver, &member, "member", stdout("member"));
    let status = end(&driver, "member");
    let text = |id: &str| fs::read_to_string(said(id)).expect("output");
    assert_eq!(status, 7, "{}", text("member"));
    assert_eq!(text("member"), text("pod"));
    let lines: Vec<_> = text("pod").lines().map(str::to_owned).collect();
    assert_eq!(
        [lines[0].trim(), &lines[1], &lines[4]],
        ["0 100000 65536", "0", "0"]
    );
    let kill = KillRequest {
        id: "pod".to_owned(),
        signal: 9,
        ..Default::default()
    };
    let _: Empty = driver.task("Kill", &kill);
    assert_eq!(end(&driver, "pod"), 137);
    let over = ShutdownRequest {
        id: "pod".to_owned(),
        ..Default::default()
    };
    let _: Empty = driver.task("Shutdown", &over);
}
