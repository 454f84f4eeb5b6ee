//! The host's side: hooks, the cgroup that `config.json` names, `check`, and misuse of the command line.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use caisson_tests::cgroup::{self, Parent};
use caisson_tests::{Bundle, Case, Loop, Outcome, case::runtime};
use serde_json::{Value, json};

/// A hook that appends its list's name, what it is told on stdin and where it runs to a file, as one line of JSON.
fn recording(list: &str, file: &Path) -> Value {
    let script = format!(
        "printf '{{\"list\":\"%s\",\"word\":\"%s\",\"dir\":\"%s\",\"state\":%s}}\\n' {list} \"$WORD\" \"$(pwd -P)\" \"$(cat)\" >> {}",
        file.display()
    );
    let env = ["WORD=spoken", "PATH=/usr/bin:/bin"];
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": env})
}

fn failing(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script]})
}

fn hooks(bundle: Bundle, hooks: Value) -> Bundle {
    bundle.edit(move |spec| spec["hooks"] = hooks)
}

#[test]
fn hooks_run_in_order_and_are_told_the_state() {
    let case = Case::begin();
    let file = case.dir().join("hooks");
    let lists = ["prestart", "createRuntime", "poststart", "poststop"];
    let all: serde_json::Map<_, _> = lists
        .iter()
        .map(|&list| (list.to_owned(), json!([recording(list, &file)])))
        .collect();
    let bundle = hooks(case.bundle().args(["true"]), all.into());
    let outcome = case.run(&bundle);
    assert_eq!(outcome.status, 0, "{outcome:?}");
    let text = fs::read_to_string(&file).expect("no hook ran");
    let told: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect();
    let order: Vec<_> = told
        .iter()
        .filter_map(|line| line["list"].as_str())
        .collect();
    assert_eq!(order, lists);
    for line in &told {
        assert_eq!(line["word"], "spoken", "{line}");
        assert_eq!(line["state"]["bundle"], json!(bundle.dir()), "{line}");
        assert!(line["state"]["ociVersion"].is_string(), "{line}");
    }
    assert_eq!(told[0]["state"]["status"], "creating");
    assert_eq!(told[1]["state"]["status"], "creating");
    assert!(told[1]["state"]["pid"].as_u64() > Some(0), "{}", told[1]);
    assert_eq!(told[1]["dir"], json!(bundle.dir()));
    assert_eq!(told[3]["state"]["status"], "stopped");
    case.nothing_is_left();
}

#[test]
fn a_hook_that_fails_ends_the_container_with_its_words() {
    let case = Case::begin();
    for list in ["prestart", "createRuntime", "poststart"] {
        let hook = failing("echo in its own words >&2; exit 3");
        let bundle = hooks(
            case.bundle_in(list).args(["sleep", "1000"]),
            json!({list: [hook]}),
        );
        case.run(&bundle).is_refusal("in its own words");
        case.nothing_is_left();
    }
}

#[test]
fn a_hook_past_its_timeout_is_killed() {
    let case = Case::begin();
    let hook = json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1});
    let bundle = hooks(
        case.bundle().args(["true"]),
        json!({"createRuntime": [hook]}),
    );
    case.run(&bundle).is_refusal("ran past specified timeout");
    case.nothing_is_left();
}

#[test]
fn a_poststop_hook_that_fails_is_reported_and_changes_nothing() {
    let case = Case::begin();
    let bundle = hooks(
        case.bundle().script("exit 42"),
        json!({"poststop": [failing("echo too late >&2; exit 1")]}),
    );
    let outcome = case.run(&bundle);
    assert_eq!(outcome.status, 42, "{outcome:?}");
    assert!(outcome.stderr.contains("too late"), "{outcome:?}");
    case.nothing_is_left();
}

#[test]
fn a_container_lives_in_the_cgroup_that_config_json_names_within_its_limits() {
    let case = Case::begin();
    let parent = Parent::make();
    let limit: u64 = 128 << 20;
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["linux"]["cgroupsPath"] = json!(parent.child("one"));
        spec["linux"]["resources"]["memory"] = json!({"limit": limit});
        spec["linux"]["resources"]["cpu"] =
            json!({"quota": 150_000, "period": 100_000, "shares": 512, "cpus": "0", "mems": "0"});
    });
    case.start(&bundle, "one");
    let one = parent.child("one");
    let procs = cgroup::read(&one, "cgroup.procs");
    let pid = case.pid("one").as_raw_pid().to_string();
    assert!(
        procs.lines().any(|line| line == pid),
        "{pid} is not in {procs:?}"
    );
    let memory = cgroup::memory_limit(&one);
    assert!((limit..=limit + (256 << 20)).contains(&memory), "{memory}");
    let (quota, period) = cgroup::bandwidth(&one);
    assert!((150_000..=200_000).contains(&quota), "{quota}");
    assert_eq!(period, 100_000);
    assert_eq!(cgroup::read(&one, "cpuset.cpus"), "0");
    assert_eq!(cgroup::read(&one, "cpuset.mems"), "0");
    if cgroup::is_v1() {
        assert_eq!(cgroup::read(&one, "cpu.shares"), "512");
    } else {
        assert_ne!(cgroup::read(&one, "cpu.weight"), "100");
    }
    case.delete("one");
    assert!(!cgroup::dirs(&one).iter().any(|dir| dir.exists()));
}

#[test]
fn limits_of_block_devices_hold_for_the_sandbox() {
    if cgroup::is_v1() {
        println!("skipped: unit tests know the files of cgroup v1");
        return;
    }
    let case = Case::begin();
    let parent = Parent::make();
    let disk = Loop::attach(&case, "disk");
    let (major, minor) = disk.number();
    let throttled = |rate: u32| json!([{"major": major, "minor": minor, "rate": rate}]);
    let bundle = case.bundle().args(["sleep", "1000"]).edit(|spec| {
        spec["linux"]["cgroupsPath"] = json!(parent.child("one"));
        spec["linux"]["resources"]["blockIO"] = json!({
            "throttleReadBpsDevice": throttled(1 << 20), "throttleWriteIOPSDevice": throttled(50)});
    });
    case.start(&bundle, "one");
    let one = parent.child("one");
    let device = format!("{major}:{minor}");
    let wanted = format!("{device} rbps=1048576 wbps=max riops=max wiops=50");
    assert_eq!(cgroup::read(&one, "io.max"), wanted);
    case.delete("one");
}

#[test]
fn every_process_of_the_sandbox_is_in_its_cgroup() {
    let Some(case) = Case::begin_with_vm("runc's container is one process") else {
        return;
    };
    let parent = Parent::make();
    let bundle = case
        .bundle()
        .args(["sleep", "1000"])
        .edit(|spec| spec["linux"]["cgroupsPath"] = json!(parent.child("one")));
    case.start(&bundle, "one");
    for dir in cgroup::dirs(&parent.child("one")) {
        let procs = fs::read_to_string(dir.join("cgroup.procs")).expect("cgroup");
        // KVM's own thread for the machine, which cgroup v1 lists, has no command line.
        let is_program = |pid: &&str| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        let programs = procs.lines().filter(is_program).count();
        let dir = dir.display();
        assert_eq!(programs, 2, "monitor and VMM in {dir}: {procs:?}");
    }
    case.delete("one");
}

/// `run` where the host's cgroups cannot be written.
fn run_without_rights(case: &Case, bundle: &Bundle, rootless: &str) -> Outcome {
    let script = "mount -o remount,bind,ro /sys/fs/cgroup && exec \"$@\"";
    case.program("unshare")
        .args(["--mount", "sh", "-c", script, "sh", &runtime(), "--root"])
        .args([case.root()])
        .args(["--rootless", rootless, "run", "-b"])
        .args([bundle.dir()])
        .args(["one"])
        .finish()
}

#[test]
fn who_may_not_make_cgroups_goes_without_if_nothing_asks_for_one() {
    if cgroup::is_v1() {
        return println!("skipped: the one mount of cgroup v2 is made read-only here");
    }
    let case = Case::begin();
    let plain = case.bundle().script("echo ran");
    let outcome = run_without_rights(&case, &plain, "true");
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "ran\n"),
        "{outcome:?}"
    );
    for whole in ["false", "auto"] {
        run_without_rights(&case, &plain, whole).is_refusal("read-only file system");
    }
    let limited = case
        .bundle_in("limited")
        .edit(|spec| spec["linux"]["resources"]["pids"] = json!({"limit": 100}));
    run_without_rights(&case, &limited, "true")
        .is_refusal("rootless needs no limits + no cgrouppath");
    let placed = case
        .bundle_in("placed")
        .edit(|spec| spec["linux"]["cgroupsPath"] = json!("/somewhere/one"));
    run_without_rights(&case, &placed, "true").is_refusal("read-only file system");
    case.nothing_is_left();
}

#[test]
fn systemds_cgroups_need_systemd() {
    if Path::new("/run/systemd/system").exists() {
        return println!("skipped: this host has it");
    }
    let case = Case::begin();
    case.call(["--systemd-cgroup", "run", "-b"])
        .args([case.bundle().dir()])
        .args(["one"])
        .finish()
        .is_refusal("systemd not running on this host");
    case.nothing_is_left();
}

#[test]
fn spec_writes_what_runcs_does_but_for_the_hostname() {
    let Some(case) = Case::begin_with_vm("it is the yardstick") else {
        return;
    };
    let written = |program: &str, dir: &str| {
        let dir = case.dir().join(dir);
        fs::create_dir(&dir).expect("directory");
        case.program(program).args(["spec"]).dir(&dir).succeed();
        fs::read_to_string(dir.join("config.json")).expect("config.json")
    };
    let wanted = written("runc", "theirs").replace("\"runc\"", "\"caisson\"");
    assert_eq!(written("caisson", "ours"), wanted);
}

#[test]
fn a_cgroup_with_somebody_elses_processes_is_left_alone() {
    let Some(case) = Case::begin_with_vm("runc 1.1 joins them") else {
        return;
    };
    let parent = Parent::make();
    let taken = cgroup::dirs(&parent.child("taken"));
    // Nobody can go into a cpuset without processors.
    let taken = taken
        .iter()
        .filter(|dir| !dir.starts_with("/sys/fs/cgroup/cpuset"));
    let taken: Vec<_> = taken.collect();
    for dir in &taken {
        fs::create_dir(dir).expect("a cgroup");
    }
    let doors = taken
        .iter()
        .map(|dir| format!("echo 0 > {}/cgroup.procs; ", dir.display()));
    let script = format!("{}echo inside; exec cat", doors.collect::<String>());
    let other = case.program("sh").args(["-c", &script]);
    let mut other = other.stdin(Stdio::piped()).stdout(Stdio::piped()).start();
    assert_eq!(other.line(), "inside");
    let bundle = case
        .bundle()
        .args(["true"])
        .edit(|spec| spec["linux"]["cgroupsPath"] = json!(parent.child("taken")));
    case.run(&bundle).is_refusal("not empty");
    assert!(taken.iter().all(|dir| dir.exists()));
    drop(other.take_stdin());
    other.finish();
    for dir in taken {
        fs::remove_dir(dir).expect("an empty cgroup");
    }
}

#[test]
fn check_tells_a_host_that_can_from_one_that_cannot() {
    let Some(case) = Case::begin_with_vm("runc has no such command") else {
        return;
    };
    let outcome = case.call(["check"]).succeed();
    let text = outcome.text();
    for word in ["/dev/kvm", "API version 12", "cgroups", "can run caisson"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let script = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let outcome = case
        .program("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .args([caisson_tests::case::runtime()])
        .args(["check"])
        .finish();
    assert_eq!(outcome.status, 1, "{outcome:?}");
    assert!(
        outcome.text().contains("MISSING /dev/kvm"),
        "{}",
        outcome.text()
    );
    assert!(
        outcome.text().contains("cannot run caisson"),
        "{}",
        outcome.text()
    );
}

#[test]
fn misuse_of_the_command_line_is_told_as_runc_tells_it() {
    let case = Case::begin();
    for (args, status, words) in [
        (
            ["nosuchcommand", "", ""],
            3,
            "No help topic for 'nosuchcommand'",
        ),
        (["state", "", ""], 1, "requires exactly 1 argument(s)"),
        (["state", "one", "two"], 1, "requires exactly 1 argument(s)"),
        (["kill", "", ""], 1, "requires a minimum of 1 argument(s)"),
        (
            ["state", "--nosuchflag", "one"],
            1,
            "flag provided but not defined: -nosuchflag",
        ),
        (["list", "-f", "xml"], 1, "invalid format option"),
    ] {
        let args: Vec<_> = args.into_iter().filter(|arg| !arg.is_empty()).collect();
        let outcome = case.call([]).args(&args).finish();
        outcome.is_refusal(words);
        assert_eq!(outcome.status, status, "{args:?}");
    }
    case.nothing_is_left();
}
