//! `--systemd-cgroup` with a real systemd: sandboxes as transient scopes.
//!
//! The same tests run on `runc` (`RUNTIME=runc`), where they prove themselves. They need the lab
//! (`lab up --image systemd`; with cgroup v1 `--image legacy-systemd --cgroup v1`).

#![allow(clippy::panic, reason = "a failed expectation is how a test fails")]

mod kills;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use caisson_tests::{
    Bundle, Call, Case,
    case::{configuration, runtime},
    cgroup,
};
use rustix::process::{Signal, kill_process};
use serde_json::json;

/// Where units are without a word about it.
const SLICE: &str = "/system.slice";

/// The hierarchies of cgroup v1 in which systemd itself makes a slice, and removes it when no unit of it needs it.
const SYSTEMDS: [&str; 6] = [
    "cpu,cpuacct",
    "memory",
    "pids",
    "blkio",
    "devices",
    "systemd",
];

/// A case on a host that has had a transient unit before: systemd keeps the directory for them, and runtimes leave the
/// parents of a cgroup in hierarchies that systemd does not use.
fn begin() -> Case {
    make_directories();
    Case::begin()
}

fn make_directories() {
    fs::create_dir_all("/run/systemd/transient").expect("directory");
    for dir in cgroup::dirs(SLICE) {
        let hierarchy = dir.parent().and_then(Path::file_name).expect("a hierarchy");
        if !SYSTEMDS.iter().any(|known| hierarchy == *known) {
            fs::create_dir_all(dir).expect("a cgroup");
        }
    }
}

/// A property by its name with the host's version of cgroups.
fn named(first: &'static str, second: &'static str) -> &'static str {
    if cgroup::is_v1() { first } else { second }
}

/// A time as systemd prints it, in milliseconds.
fn milliseconds(text: &str) -> u64 {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1.0),
        None => (text.trim_end_matches('s'), 1_000.0),
    };
    let number: f64 = number
        .parse()
        .unwrap_or_else(|_| panic!("no time: {text:?}"));
    format!("{:.0}", number * unit)
        .parse()
        .expect("a whole number")
}

/// A property of a unit, as systemd prints it.
fn show(case: &Case, unit: &str, property: &str) -> String {
    let outcome = case
        .program("systemctl")
        .args(["show", "--value", "--property", property, unit])
        .succeed();
    outcome.text().trim().to_owned()
}

#[track_caller]
fn is_gone(case: &Case, unit: &str) {
    assert_eq!(show(case, unit, "LoadState"), "not-found");
    assert_eq!(show(case, unit, "ActiveState"), "inactive");
}

/// A bundle that sleeps, with a unit named after the test.
fn sleeper(case: &Case, path: &str) -> Bundle {
    let bundle = case.bundle().args(["sleep", "1000"]);
    bundle.edit(|spec| spec["linux"]["cgroupsPath"] = json!(path))
}

fn create_call(case: &Case, bundle: &Bundle) -> Call {
    case.call(["--systemd-cgroup", "create", "-b"])
        .args([bundle.dir()])
        .args(["--pid-file".as_ref(), case.pid_file("one").as_os_str()])
        .args(["one"])
}

fn start(case: &Case, bundle: &Bundle) {
    create_call(case, bundle).succeed();
    case.call(["start", "one"]).succeed();
}

fn run(case: &Case, bundle: &Bundle) -> caisson_tests::Outcome {
    case.call(["--systemd-cgroup", "run", "-b"])
        .args([bundle.dir()])
        .args(["one"])
        .finish()
}

#[track_caller]
fn holds(path: &str, case: &Case) {
    let procs = cgroup::read(path, "cgroup.procs");
    let pid = case.pid("one").as_raw_nonzero().to_string();
    assert!(
        procs.lines().any(|line| line == pid),
        "{pid} is not in {procs:?}"
    );
}

fn number(text: &str) -> u64 {
    let text = text.trim();
    text.parse()
        .unwrap_or_else(|_| panic!("no number: {text:?}"))
}

#[test]
fn a_sandbox_is_a_scope_of_its_slice_within_its_limits() {
    let case = begin();
    let limit = 128 << 20;
    let bundle = sleeper(&case, "caissontest-e2e.slice:e2e:one").edit(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": limit});
        spec["linux"]["resources"]["cpu"] =
            json!({"quota": 150_000, "period": 100_000, "shares": 512, "cpus": "0"});
        spec["annotations"] = json!({"org.systemd.property.TimeoutStopSec": "uint64 7"});
    });
    start(&case, &bundle);
    let unit = "e2e-one.scope";
    let path = "/caissontest.slice/caissontest-e2e.slice/e2e-one.scope";
    for (property, wanted) in [
        ("ControlGroup", path),
        ("Slice", "caissontest-e2e.slice"),
        ("Delegate", "yes"),
        ("Transient", "yes"),
        ("ActiveState", "active"),
        ("TimeoutStopUSec", "7s"),
        ("MemoryAccounting", "yes"),
    ] {
        assert_eq!(show(&case, unit, property), wanted, "{property}");
    }
    holds(path, &case);
    if !cgroup::is_v1() {
        assert_eq!(show(&case, unit, "AllowedCPUs"), "0");
    }
    assert_eq!(cgroup::read(path, "cpuset.cpus"), "0");
    let memory = number(&show(&case, unit, named("MemoryLimit", "MemoryMax")));
    assert!((limit..=limit + (256 << 20)).contains(&memory), "{memory}");
    assert_eq!(cgroup::memory_limit(path), memory);
    let each_second = milliseconds(&show(&case, unit, "CPUQuotaPerSecUSec"));
    assert!((1_500..=1_600).contains(&each_second), "{each_second} ms");
    assert!((150_000..=160_000).contains(&cgroup::bandwidth(path).0));
    let weight = number(&show(&case, unit, named("CPUShares", "CPUWeight")));
    assert!(
        weight < 100 || (cgroup::is_v1() && weight == 512),
        "{weight}"
    );
    case.delete("one");
    is_gone(&case, unit);
    assert!(!cgroup::dirs(path).iter().any(|dir| dir.exists()));
    case.program("systemctl")
        .args(["stop", "caissontest.slice"])
        .succeed();
    for slice in [
        "/caissontest.slice/caissontest-e2e.slice",
        "/caissontest.slice",
    ] {
        // Those that systemd does not use.
        let left = cgroup::dirs(slice).into_iter().filter(|dir| dir.exists());
        left.for_each(|dir| fs::remove_dir(dir).expect("an empty cgroup"));
    }
}

#[test]
fn without_a_path_the_scope_has_the_runtimes_name_and_the_containers() {
    let case = begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    start(&case, &bundle);
    let unit = format!("{}-one.scope", runtime());
    assert_eq!(show(&case, &unit, "ActiveState"), "active");
    holds(&format!("{SLICE}/{unit}"), &case);
    case.delete("one");
    is_gone(&case, &unit);
    case.nothing_is_left();
}

#[test]
fn a_scope_is_gone_with_its_container_and_its_name_free_again() {
    let case = begin();
    for status in [0, 7] {
        let name = format!("bundle-{status}");
        let bundle = case
            .bundle_in(&name)
            .script(&format!("exit {status}"))
            .edit(|spec| spec["linux"]["cgroupsPath"] = json!(":e2e:again"));
        assert_eq!(run(&case, &bundle).status, status);
        is_gone(&case, "e2e-again.scope");
    }
    case.nothing_is_left();
}

#[test]
fn a_container_that_does_not_start_leaves_no_scope() {
    let case = begin();
    let bundle = sleeper(&case, ":e2e:failing").args(["/no/such/program"]);
    run(&case, &bundle).is_refusal("no such file");
    is_gone(&case, "e2e-failing.scope");
    let mut other = case.bundle_in("other").args(["true"]);
    other = other.edit(|spec| {
        spec["linux"]["cgroupsPath"] = json!(":e2e:failing");
        spec["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]});
    });
    assert_ne!(run(&case, &other).status, 0);
    is_gone(&case, "e2e-failing.scope");
    case.nothing_is_left();
}

#[test]
fn changed_limits_are_systemds_too() {
    let case = begin();
    let bundle = sleeper(&case, ":e2e:changing").edit(|spec| {
        spec["linux"]["resources"]["cpu"] = json!({"quota": 90_000, "period": 100_000});
    });
    start(&case, &bundle);
    let unit = "e2e-changing.scope";
    let path = format!("{SLICE}/{unit}");
    case.call([
        "update",
        "--cpu-quota",
        "50000",
        "--cpu-share",
        "256",
        "one",
    ])
    .succeed();
    let each_second = milliseconds(&show(&case, unit, "CPUQuotaPerSecUSec"));
    assert!((500..=600).contains(&each_second), "{each_second} ms");
    // What systemd did not know of it would undo.
    case.program("systemctl").args(["daemon-reload"]).succeed();
    assert!((50_000..=60_000).contains(&cgroup::bandwidth(&path).0));
    let weight = number(&show(&case, unit, named("CPUShares", "CPUWeight")));
    assert!(
        weight < 20 || (cgroup::is_v1() && weight == 256),
        "{weight}"
    );
    case.delete("one");
    is_gone(&case, unit);
}

#[test]
fn a_killed_sandbox_leaves_no_scope() {
    let case = begin();
    let unit = "e2e-killed.scope";
    let bundle = sleeper(&case, ":e2e:killed");
    for started in [false, true] {
        create_call(&case, &bundle).succeed();
        if started {
            case.call(["start", "one"]).succeed();
        }
        kill_process(case.pid("one"), Signal::KILL).expect("kill");
        case.wait("one");
        assert_eq!(case.status("one"), "stopped");
        case.delete("one");
        is_gone(&case, unit);
        case.nothing_is_left();
    }
}

#[test]
fn a_scope_that_is_there_already_is_left_alone() {
    let Some(case) = Case::begin_with_vm("runc 1.1 joins it") else {
        return;
    };
    let other = case
        .program("systemd-run")
        .args(["--scope", "--unit", "e2e-taken.scope", "sleep", "1000"])
        .start();
    while show(&case, "e2e-taken.scope", "ActiveState") != "active" {
        assert!(!other.ends_within(std::time::Duration::from_millis(200)));
    }
    let bundle = sleeper(&case, ":e2e:taken");
    create_call(&case, &bundle)
        .finish()
        .is_refusal("e2e-taken.scope");
    assert_eq!(show(&case, "e2e-taken.scope", "ActiveState"), "active");
    case.program("systemctl")
        .args(["kill", "--signal=KILL", "e2e-taken.scope"])
        .succeed();
    other.finish();
}

#[test]
fn root_of_a_user_namespace_owns_its_cgroup_but_not_its_limits() {
    if cgroup::is_v1() {
        return println!(
            "skipped: runc's container has the host's hierarchies, ours one of its own"
        );
    }
    let case = begin();
    let script = "cd /sys/fs/cgroup; stat -c %u . cgroup.procs cgroup.subtree_control memory.max; \
                  mkdir part && echo $$ > part/cgroup.procs && cat /proc/self/cgroup";
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let bundle = case.bundle().script(script).edit(|spec| {
        spec["linux"]["uidMappings"] = mappings.clone();
        spec["linux"]["gidMappings"] = mappings;
        let namespaces = spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.extend(["user", "cgroup"].map(|kind| json!({"type": kind})));
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    });
    let own = case.program("chown").args(["-R", "100000:100000"]);
    own.args([bundle.rootfs("")]).succeed();
    let outcome = run(&case, &bundle);
    assert_eq!(outcome.text(), "0\n0\n0\n65534\n0::/part\n", "{outcome:?}");
}

/// podman with the runtime under test and a store of its own; where systemd is PID 1 it leaves cgroups to it.
fn podman() -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|dir| dir.join(runtime()))
        .find(|file| file.exists());
    let mut podman = Command::new("podman");
    podman
        .args(["--root=/scratch/podman", "--storage-driver=vfs"])
        .args(["--events-backend=file", "--runtime"])
        .arg(program.expect("the runtime"));
    podman
}

/// A root file system with busybox.
fn podmans_system() -> &'static str {
    const PATH: &str = "/scratch/podman-system";
    let bin = Path::new(PATH).join("bin");
    fs::create_dir_all(&bin).expect("rootfs");
    fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox-static");
    for applet in ["sh", "echo", "sleep"] {
        let _ = symlink("busybox", bin.join(applet));
    }
    PATH
}

#[track_caller]
fn said(mut command: Command) -> String {
    let output = command.output().expect("podman");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {words}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().to_owned()
}

#[test]
fn podmans_containers_are_scopes_without_a_word_about_cgroups() {
    if !Path::new("/usr/bin/podman").exists() {
        return println!("skipped: this image of the lab has no podman");
    }
    fs::create_dir_all("/etc/caisson").expect("directory");
    fs::write("/etc/caisson/config.toml", configuration()).expect("config.toml");
    let with = |arguments: &[&str]| {
        let mut podman = podman();
        podman.args(arguments);
        podman
    };
    let manager = said(with(&["info", "--format", "{{.Host.CgroupManager}}"]));
    assert_eq!(manager, "systemd");
    let options = ["--network=none", "--rootfs", podmans_system()];
    let run = |more: &[&str], command: &[&str]| {
        with(&[&["run"], more, options.as_slice(), command].concat())
    };
    // The first container leaves podman's own directories and systemd's slice for machines.
    let status = run(&["--rm"], &["sh", "-c", "exit 7"]).status();
    assert_eq!(status.expect("podman").code(), Some(7));
    let case = begin();
    let limited = ["-d", "--name=one", "--memory=64m", "--pids-limit=100"];
    let id = said(run(&limited, &["sleep", "1000"]));
    let unit = format!("libpod-{id}.scope");
    assert_eq!(show(&case, &unit, "Slice"), "machine.slice");
    let memory = number(&show(&case, &unit, "MemoryMax"));
    assert!((64 << 20..=320 << 20).contains(&memory), "{memory}");
    let pid = said(with(&["inspect", "--format", "{{.State.Pid}}", "one"]));
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its cgroup");
    assert!(group.contains(&unit), "{group}");
    assert_eq!(said(with(&["exec", "one", "echo", "in"])), "in");
    said(with(&["rm", "--force", "--time=0", "one"]));
    is_gone(&case, &unit);
}

#[test]
fn paths_that_mean_nothing_to_systemd_are_refused() {
    let case = begin();
    let mut bundle = case.bundle();
    for (path, words) in [
        ("/a/b", "expected cgroupsPath to be of format"),
        ("a:b", "expected cgroupsPath to be of format"),
        ("nonsense:e2e:one", "invalid slice name"),
        ("a--b.slice:e2e:one", "invalid slice name"),
    ] {
        bundle = bundle.edit(|spec| spec["linux"]["cgroupsPath"] = json!(path));
        create_call(&case, &bundle).finish().is_refusal(words);
    }
    case.nothing_is_left();
}
