//! Volumes that the host changes as the kubelet does: what the container sees, and what its watches tell it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Stdio;
use std::time::{Duration, Instant};

use caisson_tests::{Case, Published, Running, Tmpfs};

const NOTICES: &str = env!("CARGO_BIN_EXE_notices");

/// The lines up to one that is awaited.
#[track_caller]
fn lines_to(program: &mut Running, last: &str) -> Vec<String> {
    let mut lines = Vec::new();
    while lines.last().is_none_or(|line| line != last) {
        lines.push(program.line());
    }
    lines
}

#[test]
fn watches_in_the_container_tell_of_a_config_map_that_the_host_replaces() {
    let case = Case::begin();
    // In memory, as the kubelet's secrets are.
    let memory = Tmpfs::mount(&case.dir().join("memory"));
    let mut volume = Published::make(&memory.dir().join("config"));
    volume.write(&[("key", "one"), ("old", "x")]);
    fs::set_permissions(volume.dir(), fs::Permissions::from_mode(0o751)).expect("chmod");
    let source = volume.dir().display().to_string();
    let bundle = case
        .bundle()
        .program(NOTICES)
        .mount(&source, "/config", &["rbind", "ro", "rprivate"])
        .args(["notices", "--until", "create end", "/config"]);
    let call = case.run_call(&bundle, "one").stdout(Stdio::piped());
    let mut program = call.start();
    assert_eq!(program.line(), "ready");
    let seen = case.exec(
        "one",
        "cat /config/key /config/old; stat -c %a-%u-%g /config",
    );
    assert_eq!(seen.text(), "onex751-0-0\n");

    volume.write(&[("key", "two"), ("new", "y")]);
    let changed = Instant::now();
    assert_eq!(
        lines_to(&mut program, "delete ..1/"),
        [
            "create ..2/",
            "create ..data_tmp",
            "moved-from ..data_tmp",
            "moved-to ..data",
            "create new",
            "delete old",
            "delete ..1/"
        ]
    );
    let taken = changed.elapsed();
    assert!(taken < Duration::from_secs(1), "{taken:?}");
    let script = "cd /config; cat key new; ls -A; readlink ..data; for name in x ..2/x; do ! touch $name || exit; done";
    let seen = case.exec("one", script);
    assert_eq!(seen.text(), "twoy..2\n..data\nkey\nnew\n..2\n");
    assert_eq!(seen.stderr.matches("Read-only file system").count(), 2);

    // Neither number nor size is limited.
    let keys: Vec<String> = (0..1_500).map(|key| format!("key{key}")).collect();
    volume.write_with(keys.iter().cloned().chain(["big".to_owned()]), |data| {
        for key in &keys {
            fs::write(data.join(key), key).expect("file");
        }
        let big = File::create(data.join("big")).expect("file");
        big.write_all_at(b"end", (100 << 20) - 3).expect("write");
    });
    lines_to(&mut program, "delete ..2/");
    let seen = case.exec(
        "one",
        "cd /config; ls | wc -l; cat key1499; stat -Lc ' %s' big; tail -c 3 big",
    );
    assert_eq!(seen.text(), "1501\nkey1499 104857600\nend");

    // What comes faster than it can be told becomes one change, and the last word is heard.
    for version in 0..20 {
        volume.write(&[("key", &version.to_string())]);
    }
    volume.write(&[("key", "last"), ("end", "")]);
    lines_to(&mut program, "create end");
    assert_eq!(program.finish().status, 0);
}
