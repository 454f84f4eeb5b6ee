//! How a shim is started by containerd 1.6 to 2.3, played by a driver.

use std::io::Write;
use std::process::{Command, Stdio};

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::{Bundle, Case};
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ShutdownRequest,
    StartRequest, StartResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::json;

use crate::driver::{Driver, Form, begin, program};

const FORMS: [Form; 3] = [Form::Address, Form::Json, Form::Message];

/// Debian's shim for runc knows containerd 1.6 alone, which itself drives it in the other tests.
pub(crate) fn skipped() -> bool {
    let is_runc = runtime() == "runc";
    if is_runc {
        println!("skipped on runc: its shim in Debian is of containerd 1.6");
    }
    is_runc
}

/// A bundle that says a word and ends with 7.
fn bundle(case: &Case, cgroup: &str) -> Bundle {
    let bundle = case.bundle().script("echo said; exit 7");
    bundle.edit(|spec| spec["linux"]["cgroupsPath"] = json!(cgroup))
}

pub(crate) fn options(systemd_cgroup: bool) -> Any {
    let options = Options {
        systemd_cgroup,
        ..Default::default()
    };
    Any {
        type_url: "containerd.runc.v1.Options".to_owned(),
        value: options.write_to_bytes().expect("options"),
        ..Default::default()
    }
}

fn create(case: &Case, bundle: &Bundle, driver: &Driver<'_>, options: Any) {
    let request = CreateTaskRequest {
        id: "one".to_owned(),
        bundle: bundle.dir().to_string_lossy().into_owned(),
        stdout: format!("file://{}", case.dir().join("said").display()),
        options: Some(options).into(),
        ..Default::default()
    };
    let _: CreateTaskResponse = driver.task("Create", &request);
    assert_eq!(driver.topic(), "/tasks/create");
}

fn run(driver: &Driver<'_>) -> u32 {
    let (id, exec_id) = ("one".to_owned(), String::new());
    let wanted = StartRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..Default::default()
    };
    let started: StartResponse = driver.task("Start", &wanted);
    assert!(started.pid > 0);
    let wanted = WaitRequest {
        id: id.clone(),
        exec_id,
        ..Default::default()
    };
    let ended: WaitResponse = driver.task("Wait", &wanted);
    delete(driver);
    let topics = [driver.topic(), driver.topic(), driver.topic()];
    assert_eq!(topics, ["/tasks/start", "/tasks/exit", "/tasks/delete"]);
    shut_down(driver);
    ended.exit_status
}

fn delete(driver: &Driver<'_>) {
    let wanted = DeleteRequest {
        id: "one".to_owned(),
        ..Default::default()
    };
    let _: DeleteResponse = driver.task("Delete", &wanted);
}

fn shut_down(driver: &Driver<'_>) {
    let wanted = ShutdownRequest {
        id: "one".to_owned(),
        ..Default::default()
    };
    let _: Empty = driver.task("Shutdown", &wanted);
}

#[test]
fn every_containerd_starts_a_shim_and_runs_a_container_with_it() {
    if skipped() {
        return;
    }
    for form in FORMS {
        let case = begin();
        let bundle = bundle(&case, "/default/one");
        let mut driver = Driver::new(&case, bundle.dir(), "one", form);
        driver.start(Some(&options(false)));
        create(&case, &bundle, &driver, options(false));
        assert_eq!(run(&driver), 7, "{form:?}");
        let said = std::fs::read_to_string(case.dir().join("said"));
        assert_eq!(said.expect("output"), "said\n", "{form:?}");
        drop(driver);
    }
}

#[test]
fn a_pods_containers_are_given_the_address_of_their_pod() {
    if skipped() {
        return;
    }
    for form in FORMS {
        let case = begin();
        let annotated = |id: &str, kind: &str| {
            case.bundle_in(id).edit(|spec| {
                spec["annotations"] = json!({
                    "io.kubernetes.cri.container-type": kind,
                    "io.kubernetes.cri.sandbox-id": "pod",
                });
            })
        };
        let (pod, member) = (
            annotated("pod", "sandbox"),
            annotated("member", "container"),
        );
        let early = Driver::new(&case, member.dir(), "member", form);
        let refused = early.call_start(None);
        assert_ne!(refused.status, 0);
        assert!(
            refused.stderr.contains("sandbox pod is not running"),
            "{}",
            refused.stderr
        );
        drop(early);
        let mut driver = Driver::new(&case, pod.dir(), "pod", form);
        let address = driver.start(None);
        let again = driver.call_start(None);
        assert_ne!(again.status, 0, "a second shim for the same pod");
        let joined = Driver::new(&case, member.dir(), "member", form);
        let outcome = joined.call_start(None);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        assert_eq!(joined.address(&outcome.stdout), address);
        assert_eq!(processes_named(program()).len(), 1);
        shut_down(&driver);
        drop(driver);
        drop(joined);
    }
}

#[test]
fn options_may_ask_for_systemds_cgroups() {
    if skipped() {
        return;
    }
    if !std::path::Path::new("/run/systemd/system").exists() {
        println!("skipped: systemd is not this machine's init");
        return;
    }
    std::fs::create_dir_all("/run/systemd/transient").expect("directory");
    for form in FORMS {
        let case = begin();
        let bundle = bundle(&case, "system.slice:tests:one");
        let mut driver = Driver::new(&case, bundle.dir(), "one", form);
        driver.start(Some(&options(true)));
        create(&case, &bundle, &driver, options(true));
        let scope = std::path::Path::new("/sys/fs/cgroup/system.slice/tests-one.scope");
        assert!(scope.is_dir(), "{form:?}");
        assert_eq!(run(&driver), 7, "{form:?}");
        assert!(!scope.exists(), "{form:?}");
        drop(driver);
    }
}

#[test]
fn the_runtime_describes_itself() {
    if skipped() {
        return;
    }
    let case = begin();
    for flag in ["-info", "--info"] {
        let mut shim = Command::new(program())
            .arg(flag)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the shim");
        let bytes = options(false).write_to_bytes().expect("options");
        let mut stdin = shim.stdin.take().expect("stdin");
        stdin.write_all(&bytes).expect("options");
        drop(stdin);
        let output = shim.wait_with_output().expect("the answer");
        assert!(output.status.success());
        let info = RuntimeInfo::parse_from_bytes(&output.stdout).expect("a message");
        assert_eq!(info.name, "io.containerd.caisson.v2");
        assert!(!info.version.version.is_empty());
        assert_eq!(info.options.type_url, "containerd.runc.v1.Options");
        // What the CRI tells the kubelet of a handler comes from here.
        let (kind, text) = (&info.features.type_url, &info.features.value);
        assert_eq!(
            kind,
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
        );
        let told: serde_json::Value = serde_json::from_slice(text).expect("JSON");
        let shown = case.call(["features"]).succeed();
        let shown: serde_json::Value = serde_json::from_str(shown.text()).expect("JSON");
        assert_eq!(told, shown);
    }
}
