//! Containers of an ordinary user: whose files they make, which users they have, how they reach the world, what is said
//! when something is missing, and that nothing of them is left.
//!
//! The user is `tester` of the lab's image: number 1000, of the group `kvm`, with 65536 subordinate users and groups from
//! 200000 on.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use caisson_tests::case::{processes_named, runtime};
use caisson_tests::{Bundle, Call, Case, call};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::kills::truth_then_nothing;

const USER: u32 = 1000;
const OTHERS: u32 = 200_000;
/// For containers that wait for the network a few times.
const SLOWLY: Duration = Duration::from_secs(180);

/// The user, with a state directory.
pub(crate) struct User<'a>(&'a Case);

impl<'a> User<'a> {
    pub(crate) fn of(case: &'a Case) -> Self {
        fs::create_dir_all(case.root()).expect("state directory");
        chown(case.root(), Some(USER), Some(USER)).expect("chown");
        if runtime() == "caisson" {
            install(case);
        }
        Self(case)
    }

    /// The runtime's program.
    fn runtime(&self) -> String {
        if runtime() == "caisson" {
            self.0.dir().join("caisson").display().to_string()
        } else {
            runtime()
        }
    }

    /// A program as the user runs it, with these groups besides his own.
    fn program_in(&self, groups: &str, program: &str) -> Call {
        self.0
            .program("setpriv")
            .args(["--reuid=1000", "--regid=1000", "--inh-caps=-all"])
            .args([&format!("--groups={groups}"), program])
    }

    pub(crate) fn call<const N: usize>(&self, args: [&str; N]) -> Call {
        self.call_in("104", args)
    }

    fn call_in<const N: usize>(&self, groups: &str, args: [&str; N]) -> Call {
        self.program_in(groups, &self.runtime())
            .args(["--root".as_ref(), self.0.root().as_os_str()])
            .args(args)
    }

    /// A bundle of his, with what `spec --rootless` writes for him.
    pub(crate) fn bundle(&self) -> Bundle {
        let bundle = self.0.bundle();
        fs::remove_file(bundle.dir().join("config.json")).expect("config.json");
        let all = self.0.program("chown").args(["-R", "1000:1000"]);
        all.args([bundle.dir()]).succeed();
        let spec = self.program_in("104", &self.runtime());
        spec.args(["spec", "--rootless", "-b"])
            .args([bundle.dir()])
            .succeed();
        bundle.args(["true"]).edit(|spec| {
            spec["process"]["terminal"] = json!(false);
            spec["root"]["readonly"] = json!(false);
        })
    }

    fn run(&self, bundle: &Bundle) -> Call {
        self.call(["run", "-b"]).args([bundle.dir()]).args(["one"])
    }

    /// `create` and `start`; the monitor.
    fn start(&self, bundle: &Bundle) -> Pid {
        let pid_file = bundle.dir().join("one.pid");
        self.call(["create", "-b"])
            .args([bundle.dir()])
            .args(["--pid-file".as_ref(), pid_file.as_os_str(), "one".as_ref()])
            .succeed();
        self.call(["start", "one"]).succeed();
        let pid = fs::read_to_string(pid_file).expect("pid file");
        Pid::from_raw(pid.trim().parse().expect("a pid")).expect("a pid")
    }
}

/// Puts the programs and the guest's files where the user may read them.
fn install(case: &Case) {
    let config = case.dir().join("config.toml");
    let text = fs::read_to_string(&config).expect("config.toml");
    let installed = caisson_tests::installed::install(&text, case.dir());
    fs::write(config, installed).expect("config.toml");
}

/// The subordinate users and groups follow the container's root.
fn with_others(bundle: Bundle, first: u32) -> Bundle {
    bundle.edit(|spec| {
        for mappings in ["uidMappings", "gidMappings"] {
            let more = json!({"containerID": 1, "hostID": first, "size": 65_536});
            let all = spec["linux"][mappings].as_array_mut();
            all.expect("mappings").push(more);
        }
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"]);
        }
    })
}

fn owner(path: impl AsRef<Path>) -> (u32, u32) {
    let file = fs::metadata(path).expect("metadata");
    (file.uid(), file.gid())
}

#[test]
fn what_the_containers_root_makes_is_the_users() {
    let case = Case::begin();
    let user = User::of(&case);
    let bundle = user.bundle();
    fs::write(bundle.rootfs("of-root"), "").expect("file");
    let bundle = bundle.script(
        "id -u; cat /proc/self/uid_map | tr -s ' '; echo made > /made; stat -c %u:%g /made /of-root /bin",
    );
    let outcome = user.run(&bundle).succeed();
    let wanted = "0\n 0 1000 1\n0:0\n65534:65534\n0:0\n";
    assert_eq!(outcome.text(), wanted);
    assert_eq!(owner(bundle.rootfs("made")), (USER, USER));
    case.nothing_is_left();
}

#[test]
fn subordinate_users_are_mapped_and_their_files_are_theirs() {
    let case = Case::begin();
    let user = User::of(&case);
    let bundle = with_others(user.bundle(), OTHERS)
        .script("touch /zero /five && chown 5:7 /five && stat -c %u:%g /zero /five");
    let outcome = user.run(&bundle).succeed();
    assert_eq!(outcome.text(), "0:0\n5:7\n");
    assert_eq!(owner(bundle.rootfs("zero")), (USER, USER));
    assert_eq!(owner(bundle.rootfs("five")), (OTHERS + 4, OTHERS + 6));
    let as_other = bundle.script("cat /five && ! touch /mine").edit(|spec| {
        spec["process"]["user"] = json!({"uid": 5, "gid": 7});
    });
    user.run(&as_other).succeed();
    case.nothing_is_left();
}

#[test]
fn every_command_works_for_the_user() {
    let case = Case::begin();
    let user = User::of(&case);
    let bundle = user.bundle().args(["sleep", "1000"]);
    user.start(&bundle);
    let state: Value = serde_json::from_slice(&user.call(["state", "one"]).succeed().stdout)
        .expect("state is JSON");
    assert_eq!(state["status"], "running");
    let list = user.call(["list"]).succeed();
    assert!(
        list.text().contains("running") && list.text().contains("tester"),
        "{list:?}"
    );
    let exec = user.call(["exec", "one", "id", "-u"]).succeed();
    assert_eq!(exec.text(), "0\n");
    let ps = user.call(["ps", "one"]).finish();
    if runtime() == "caisson" {
        // runc finds processes by their cgroup, and there is none.
        assert!(ps.text().contains("sleep 1000"), "{ps:?}");
        user.call(["update", "--memory", "67108864", "one"])
            .succeed();
        user.call(["pause", "one"]).succeed();
        user.call(["resume", "one"]).succeed();
    }
    user.call(["kill", "one", "KILL"]).succeed();
    user.call(["delete", "--force", "one"]).succeed();
    case.nothing_is_left();
}

#[test]
fn without_a_user_namespace_there_is_no_container() {
    let case = Case::begin();
    let user = User::of(&case);
    let bundle = user.bundle().edit(|spec| {
        let all = spec["linux"]["namespaces"].as_array_mut();
        all.expect("namespaces").retain(|one| one["type"] != "user");
        spec["linux"]["uidMappings"] = Value::Null;
        spec["linux"]["gidMappings"] = Value::Null;
    });
    let outcome = user.run(&bundle).finish();
    outcome.is_refusal("rootless container requires user namespaces");
    case.nothing_is_left();
}

#[test]
fn what_is_missing_is_said() {
    let Some(case) = Case::begin_with_vm("its words are others, and it needs no KVM") else {
        return;
    };
    let user = User::of(&case);
    // Loopback only, and no word about a network.
    let bundle = user.bundle().edit(|spec| {
        let all = spec["linux"]["namespaces"].as_array_mut();
        all.expect("namespaces").push(json!({"type": "network"}));
    });
    let stranger = user.call_in("1000", ["run", "-b"]).args([bundle.dir()]);
    let stranger = stranger.args(["one"]).finish();
    stranger.is_refusal("it belongs to group kvm, and this user does not");
    let ranged = with_others(bundle, 300_000);
    let refused = user.run(&ranged).finish();
    refused.is_refusal("map users 1000, 300000-365535: newuidmap: ");
    refused.is_refusal("/etc/subuid");
    let script = "PATH=/nonexistent; exec \"$@\"";
    user.program_in("104", "/bin/sh")
        .args(["-c", script, "sh", &user.runtime(), "--root"])
        .args([case.root()])
        .args(["run", "-b"])
        .args([ranged.dir()])
        .args(["one"])
        .finish()
        .is_refusal("run newuidmap (of Debian's package uidmap)");
    case.nothing_is_left();
}

#[test]
fn check_says_what_a_user_can_do() {
    let Some(case) = Case::begin_with_vm("it has no such command") else {
        return;
    };
    let user = User::of(&case);
    let said = user.call(["check"]).finish();
    let text = said.text();
    assert!(
        text.contains("65536 users and 65536 groups may be mapped"),
        "{text}"
    );
    assert!(text.contains("by /usr/bin/passt"), "{text}");
    let stranger = user.call_in("1000", ["check"]).finish();
    assert_ne!(stranger.status, 0);
    assert!(
        stranger.text().contains("belongs to group kvm"),
        "{stranger:?}"
    );
}

/// The world, behind an interface of the host that has the default routes: 10.78.0.1 and fd78::1, where a server greets.
pub(crate) struct World<'a> {
    case: &'a Case,
    server: u32,
}

impl<'a> World<'a> {
    pub(crate) fn new(case: &'a Case) -> Self {
        let file = case.dir().join("world");
        fs::write(&file, "").expect("file");
        let script = format!(
            "unshare --net={file} true
             ip link add lan0 type veth peer name world0 netns {file}
             ip addr add 10.78.0.2/24 dev lan0; ip addr add fd78::2/64 dev lan0 nodad; ip link set lan0 up
             nsenter --net={file} sh -ec 'ip addr add 10.78.0.1/24 dev world0; ip addr add fd78::1/64 dev world0 nodad
               ip link set world0 up; ip link set lo up'
             ip route add default via 10.78.0.1; ip -6 route add default via fd78::1
             nsenter --net={file} setsid socat -U TCP6-LISTEN:7000,fork,reuseaddr SYSTEM:'echo the world' >/dev/null 2>&1 &
             echo $!",
            file = file.display()
        );
        let made = case.program("sh").args(["-ec", &script]).succeed();
        let server = made.text().trim().parse().expect("a pid");
        Self { case, server }
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let script = format!(
            "kill {}; ip link del lan0; umount {}",
            self.server,
            self.case.dir().join("world").display()
        );
        self.case.program("sh").args(["-c", &script]).finish();
    }
}

/// Lets annotations change these keys of the configuration.
fn allowing(case: &Case, keys: &str) -> std::path::PathBuf {
    case.configured("allowed_annotations", keys)
}

/// The client keeps its sending half open: Debian 12's passt forgets a connection whose client closes that first.
#[test]
fn the_container_reaches_what_the_user_reaches() {
    let case = Case::begin();
    let user = User::of(&case);
    let _world = World::new(&case);
    let bundle = user.bundle().script(
        "for address in 10.78.0.1 fd78::1; do sleep 5 | nc -w 20 $address 7000; done; \
         ip -4 -o addr show | tr -s ' ' | cut -d ' ' -f 2,4; ip route | head -n 1 | cut -d ' ' -f 1-3",
    );
    let outcome = user.run(&bundle).limit(SLOWLY).succeed();
    let text = outcome.text();
    assert!(text.starts_with("the world\nthe world\n"), "{text}");
    assert!(text.contains("lan0 10.78.0.2/24\n"), "{text}");
    assert!(text.ends_with("default via 10.78.0.1\n"), "{text}");
    drop(_world);
    case.nothing_is_left();
}

#[test]
fn a_published_port_leads_into_the_container_and_a_taken_one_is_refused() {
    let Some(case) = Case::begin_with_vm("its rootless container has the host's own ports") else {
        return;
    };
    let user = User::of(&case);
    let _world = World::new(&case);
    let config = allowing(&case, "[\"user_network_tcp\"]");
    let bundle = user
        .bundle()
        .script("echo ready; echo served | nc -l -p 80")
        .edit(|spec| {
            spec["annotations"] = json!({"io.caisson.user_network_tcp": "8078:80"});
        });
    let mut running = user
        .run(&bundle)
        .env("CAISSON_CONFIG", &config)
        .stdout(std::process::Stdio::piped())
        .start();
    assert_eq!(running.line(), "ready");
    let two = user.call(["run", "-b"]).args([bundle.dir()]).args(["two"]);
    two.env("CAISSON_CONFIG", &config)
        .finish()
        .is_refusal("passt: ");
    let ask = "i=0; until nc 10.78.0.2 8078 < /dev/null | grep served; do \
               i=$((i + 1)); [ $i -lt 50 ] || exit 1; sleep 0.2; done";
    let file = case.dir().join("world");
    let outside = case
        .program("nsenter")
        .args([format!("--net={}", file.display())]);
    outside.args(["busybox", "sh", "-c", ask]).succeed();
    assert_eq!(running.finish().status, 0);
    drop(_world);
    case.nothing_is_left();
}

#[test]
fn the_hosts_loopback_is_out_of_reach_unless_it_is_asked_for() {
    let Some(case) = Case::begin_with_vm("its rootless container has the host's loopback") else {
        return;
    };
    let user = User::of(&case);
    let _world = World::new(&case);
    let config = allowing(&case, "[\"user_network_host\"]");
    let listener = std::net::TcpListener::bind("127.0.0.1:7078").expect("listen");
    let server = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().expect("accept");
        std::io::Write::write_all(&mut peer, b"loopback\n").expect("write");
    });
    let bundle = user
        .bundle()
        .script("sleep 5 | timeout 20 nc -w 10 10.78.0.1 7078");
    let run = |bundle: &Bundle| user.run(bundle).env("CAISSON_CONFIG", &config).finish();
    let outcome = run(&bundle);
    assert!(
        outcome.status != 0 && outcome.text().is_empty(),
        "{outcome:?}"
    );
    let asking = bundle.edit(|spec| {
        spec["annotations"] = json!({"io.caisson.user_network_host": "true"});
    });
    assert_eq!(run(&asking).text(), "loopback\n");
    server.join().expect("server");
}

#[test]
fn whoever_is_killed_nothing_of_the_users_container_is_left() {
    let Some(case) = Case::begin_with_vm("it has no passt") else {
        return;
    };
    let user = User::of(&case);
    let world = World::new(&case);
    for victim in ["monitor", "caisson-vmm"] {
        let bundle = user.bundle().args(["sleep", "1000"]);
        let monitor = user.start(&bundle);
        let passt = one("passt.avx2").or_else(|| one("passt")).expect("passt");
        let killed = one(victim).unwrap_or(monitor);
        kill_process(killed, Signal::KILL).expect("kill");
        for gone in [passt, monitor] {
            assert!(
                call::wait_for_exit(gone, Duration::from_secs(20)),
                "after {victim}"
            );
        }
        assert_eq!(case.status("one"), "stopped", "after {victim}");
        user.call(["delete", "--force", "one"]).succeed();
        fs::remove_dir_all(bundle.dir()).expect("bundle");
    }
    drop(world);
    truth_then_nothing(&case, "one", "both killed");
}

#[test]
fn a_network_that_is_killed_does_not_take_the_container_along() {
    let Some(case) = Case::begin_with_vm("it has no passt") else {
        return;
    };
    let user = User::of(&case);
    let world = World::new(&case);
    user.start(&user.bundle().args(["sleep", "1000"]));
    let passt = one("passt.avx2").or_else(|| one("passt")).expect("passt");
    kill_process(passt, Signal::KILL).expect("kill");
    let began = Instant::now();
    let exec = user.call([
        "exec",
        "one",
        "/bin/sh",
        "-c",
        "nc -w 2 10.78.0.1 7000 < /dev/null; echo alive",
    ]);
    assert_eq!(
        exec.succeed().text(),
        "alive\n",
        "after {:?}",
        began.elapsed()
    );
    user.call(["delete", "--force", "one"]).succeed();
    drop(world);
    case.nothing_is_left();
}

fn one(name: &str) -> Option<Pid> {
    Pid::from_raw(processes_named(name).first()?.pid)
}
