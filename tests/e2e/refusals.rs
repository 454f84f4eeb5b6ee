//! Everything that must be refused: one clear line, a non-zero status, and a host that looks as before.

use std::fs;
use std::path::Path;

use caisson_tests::{Bundle, Case, Outcome};
use serde_json::json;

/// `run` of a bundle is refused with a word of the reason, and leaves nothing.
#[track_caller]
fn run_is_refused(case: &Case, bundle: &Bundle, reason: &str) {
    case.run(bundle).is_refusal(reason);
    case.nothing_is_left();
}

#[test]
fn a_bundle_without_config_json() {
    let case = Case::begin();
    let bundle = case.bundle();
    fs::remove_file(bundle.dir().join("config.json")).expect("remove");
    run_is_refused(&case, &bundle, "config.json");
}

#[test]
fn a_bundle_that_does_not_exist() {
    let case = Case::begin();
    case.call(["run", "-b", "/no/such/bundle", "one"])
        .finish()
        .is_refusal("/no/such/bundle");
    case.nothing_is_left();
}

#[test]
fn broken_json() {
    let case = Case::begin();
    let bundle = case.bundle();
    for text in ["{\"ociVersion\": \"1.0.2\",", "", "[]", "{}"] {
        fs::write(bundle.dir().join("config.json"), text).expect("write");
        let outcome = case.run(&bundle);
        outcome.is_refusal("");
        case.nothing_is_left();
    }
}

#[test]
fn an_unknown_oci_version() {
    let Some(case) = Case::begin_with_vm("runc 1.1.5 does not look at ociVersion") else {
        return;
    };
    for version in ["9.0.0", "nonsense", ""] {
        let bundle = case
            .bundle_in(&format!("v{version}"))
            .edit(|spec| spec["ociVersion"] = json!(version));
        run_is_refused(&case, &bundle, "ociVersion");
    }
}

#[test]
fn a_root_file_system_that_is_missing_or_a_file() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .edit(|spec| spec["root"]["path"] = json!("nowhere"));
    run_is_refused(&case, &bundle, "nowhere");
    fs::write(bundle.dir().join("plain"), "").expect("write");
    let bundle = bundle.edit(|spec| spec["root"]["path"] = json!("plain"));
    case.run(&bundle).is_refusal("not a directory");
    case.nothing_is_left();
}

#[test]
fn no_arguments_and_a_relative_program_that_is_not_found() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .edit(|spec| spec["process"]["args"] = json!([]));
    run_is_refused(&case, &bundle, "args");
    run_is_refused(
        &case,
        &bundle.args(["relative/program"]),
        "relative/program",
    );
}

#[test]
fn a_working_directory_that_is_relative() {
    let case = Case::begin();
    let bundle = case
        .bundle()
        .edit(|spec| spec["process"]["cwd"] = json!("etc"));
    run_is_refused(&case, &bundle, "cwd");
}

#[test]
fn container_names_that_are_no_names() {
    let case = Case::begin();
    let bundle = case.bundle();
    for id in ["a/b", "..", ".", "", "/", "a b", "ä", &"x".repeat(1025)] {
        for verb in ["create", "run"] {
            let outcome = case
                .call([verb, "-b"])
                .args([bundle.dir()])
                .args([id])
                .finish();
            if !id.is_empty() {
                outcome.is_refusal("");
            }
            assert_ne!(outcome.status, 0, "{verb} {id:?}");
        }
        assert_ne!(case.call(["state", id]).finish().status, 0);
        assert_ne!(case.call(["delete", id]).finish().status, 0);
        case.nothing_is_left();
    }
}

#[test]
fn a_name_in_use() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.create(&bundle, "one");
    let other = case.bundle_in("other");
    case.call(["create", "-b"])
        .args([other.dir()])
        .args(["one"])
        .finish()
        .is_refusal("exist");
    assert_eq!(case.status("one"), "created");
    case.call(["start", "one"]).succeed();
    assert_eq!(case.exec("one", "echo alive").text(), "alive\n");
    case.delete("one");
}

#[test]
fn start_twice_kill_of_a_stopped_and_delete_of_a_running_container() {
    let case = Case::begin();
    let bundle = case.bundle().args(["sleep", "1000"]);
    case.start(&bundle, "one");
    case.call(["start", "one"])
        .finish()
        .is_refusal("cannot start");
    case.call(["delete", "one"])
        .finish()
        .is_refusal("not stopped");
    assert_eq!(case.exec("one", "echo alive").text(), "alive\n");
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    case.call(["kill", "one", "TERM"]).finish().is_refusal("");
    case.call(["start", "one"])
        .finish()
        .is_refusal("cannot start");
    case.call(["exec", "one", "true"])
        .finish()
        .is_refusal("stopped");
    case.call(["delete", "one"]).succeed();
    for verb in ["start", "kill", "delete", "state"] {
        case.call([verb, "one"])
            .finish()
            .is_refusal("does not exist");
    }
}

#[test]
fn unknown_words_on_the_command_line() {
    let case = Case::begin();
    assert_ne!(case.call(["nosuchcommand"]).finish().status, 0);
    assert_ne!(case.call(["state"]).finish().status, 0);
    assert_ne!(case.call(["run", "--nosuchflag", "one"]).finish().status, 0);
    case.nothing_is_left();
}

#[test]
fn a_memory_limit_below_what_a_machine_needs() {
    let Some(case) = Case::begin_with_vm("runc has no machine to boot") else {
        return;
    };
    let bundle = case.bundle().edit(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 1 << 20});
    });
    run_is_refused(&case, &bundle, "memory");
}

/// A boot file of the configuration that does not exist is refused by its path, and one that is something else with a
/// word of what it is not.
#[track_caller]
fn boot_file_is_refused(case: &Case, key: &str, content: &[u8]) {
    let bundle = case.bundle();
    let wrong = case.dir().join("wrong");
    fs::write(&wrong, content).expect("write");
    for (path, reason) in [(Path::new("/no/such/file"), "/no/such/file"), (&wrong, key)] {
        let config = case.configured(key, &format!("{path:?}"));
        let call = case.run_call(&bundle, "one");
        call.env("CAISSON_CONFIG", config)
            .finish()
            .is_refusal(reason);
        case.nothing_is_left();
    }
}

#[test]
fn a_guest_kernel_that_is_missing_or_none() {
    let Some(case) = Case::begin_with_vm("runc has no guest kernel") else {
        return;
    };
    boot_file_is_refused(&case, "kernel", b"certainly not an ELF image");
}

#[test]
fn an_initramfs_that_is_missing_or_corrupt() {
    let Some(case) = Case::begin_with_vm("runc has no initramfs") else {
        return;
    };
    boot_file_is_refused(&case, "initramfs", &[0xa5; 1 << 20]);
}

/// `run` in a mount namespace of its own, after a script has changed it.
fn run_after(case: &Case, script: &str, root: &Path, bundle: &Bundle) -> Outcome {
    let script = format!("{script} && exec \"$@\"");
    let call = case
        .program("unshare")
        .args(["-m", "sh", "-c", &script, "sh"]);
    let call = call.args([caisson_tests::case::runtime()]);
    let call = call.args(["--root".as_ref(), root.as_os_str()]);
    call.args(["run", "-b"])
        .args([bundle.dir()])
        .args(["one"])
        .finish()
}

#[test]
fn a_host_without_kvm_or_without_the_right_to_it() {
    let Some(case) = Case::begin_with_vm("runc needs no KVM") else {
        return;
    };
    let bundle = case.bundle();
    // No node, another device, a node that must not be opened.
    let nodes = "null zero full random urandom tty net";
    let missing = format!(
        "mount -t tmpfs none /mnt && for n in {nodes}; do cp -a /dev/$n /mnt; done && \
         mount --move /mnt /dev"
    );
    let forbidden = "mount -t tmpfs -o nodev none /mnt && cp -a /dev/kvm /mnt && \
                     mount --bind /mnt/kvm /dev/kvm";
    for (change, reason) in [
        (missing.as_str(), "no such file"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm"),
        (forbidden, "permission denied"),
    ] {
        let outcome = run_after(&case, change, &case.root(), &bundle);
        outcome.is_refusal("/dev/kvm");
        outcome.is_refusal(reason);
        case.nothing_is_left();
    }
}

#[test]
fn a_full_disk_for_the_state() {
    let case = Case::begin();
    let disk = case.dir().join("disk");
    fs::create_dir(&disk).expect("mkdir");
    // Room for nothing: the directory's own inode is the last.
    let full = format!(
        "mount -t tmpfs -o size=4k,nr_inodes=3 none {0} && (head -c 4096 /dev/zero > {0}/full || true)",
        disk.display()
    );
    run_after(&case, &full, &disk, &case.bundle()).is_refusal("no space left");
    case.nothing_is_left();
}

#[test]
fn host_networking() {
    let Some(case) = Case::begin_with_vm("runc shares the host's network when asked to") else {
        return;
    };
    let bundle = case.bundle().edit(|spec| {
        let namespaces = spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("namespaces");
        namespaces.retain(|namespace| namespace["type"] != "network");
    });
    run_is_refused(&case, &bundle, "network");
    let bundle = bundle.edit(|spec| {
        let namespaces = spec["linux"]["namespaces"]
            .as_array_mut()
            .expect("namespaces");
        namespaces.push(json!({"type": "network", "path": "/proc/1/ns/net"}));
    });
    run_is_refused(&case, &bundle, "network");
}

#[test]
fn a_vm_section_that_the_host_does_not_allow() {
    let Some(case) = Case::begin_with_vm("runc ignores the vm section") else {
        return;
    };
    let bundle = case
        .bundle()
        .edit(|spec| spec["vm"] = json!({"kernel": {"path": "/etc/passwd"}}));
    run_is_refused(&case, &bundle, "vm");
}
