//! podman of an ordinary user: `tester` of the lab's image, number 1000, of the group `kvm`, with 65536 subordinate users
//! and groups from 200000 on.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use caisson_tests::installed::install;
use caisson_tests::{Call, Outcome, call, case};
use rustix::process::{Pid, Signal, kill_process};

use crate::engine::{self, Engine, IMAGE, LIMIT};

const USER: u32 = 1000;
const OTHERS: u32 = 200_000;

/// An address of the host's that containers reach.
const HOST: &str = "192.0.2.1";

/// The user, with a home of his own and the image.
struct User<'a> {
    engine: &'a Engine,
    home: PathBuf,
}

impl<'a> User<'a> {
    fn of(engine: &'a Engine) -> Self {
        // As udev has it.
        let all = fs::Permissions::from_mode(0o666);
        fs::set_permissions("/dev/fuse", all).expect("mode of /dev/fuse");
        let home = engine.dir().join("home");
        let settings = home.join(".config/containers");
        fs::create_dir_all(&settings).expect("directory");
        let (name, path) = (case::runtime(), runtime(&home));
        let settings_of_engine = format!(
            "[containers]\nlog_driver = \"k8s-file\"\n[engine]\nruntime = \"{name}\"\nevents_logger = \"file\"\n\
             cgroup_manager = \"cgroupfs\"\n[engine.runtimes]\n{name} = [\"{path}\"]\n"
        );
        fs::write(settings.join("containers.conf"), settings_of_engine).expect("containers.conf");
        fs::write(
            settings.join("storage.conf"),
            "[storage]\ndriver = \"overlay\"\n",
        )
        .expect("storage.conf");
        fs::create_dir(home.join("run")).expect("directory");
        let archive = engine::busybox(&home);
        let own = Call::new("chown", &home.join("chown"));
        own.args(["-R", "1000:1000"]).args([&home]).succeed();
        let mode = fs::Permissions::from_mode(0o700);
        fs::set_permissions(home.join("run"), mode).expect("mode");
        let user = Self { engine, home };
        let import = user.call(["import", "-c", "ENV PATH=/bin"]);
        import.args([archive.as_path()]).args([IMAGE]).succeed();
        user
    }

    fn call<const N: usize>(&self, args: [&str; N]) -> Call {
        let podman = self.engine.program("setpriv");
        podman
            .args(["--reuid=1000", "--regid=1000", "--init-groups"])
            .args(["--inh-caps=-all", "podman"])
            .args(args)
            .env("HOME", &self.home)
            .env("XDG_RUNTIME_DIR", self.home.join("run"))
            .dir(&self.home)
    }

    #[track_caller]
    fn ok<const N: usize>(&self, args: [&str; N]) -> String {
        self.call(args).succeed().text().trim_end().to_owned()
    }

    fn exec(&self, name: &str, script: &str) -> Outcome {
        self.call(["exec", name, "sh", "-c", script]).finish()
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        // What keeps his namespaces between his commands.
        let file = fs::read_to_string(self.home.join("run/libpod/tmp/pause.pid"));
        let pid = file.ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.and_then(Pid::from_raw)
            && kill_process(pid, Signal::KILL).is_ok()
        {
            call::wait_for_exit(pid, LIMIT);
        }
    }
}

/// The runtime's program for him; caisson's is given its configuration.
fn runtime(home: &Path) -> String {
    if case::runtime() != "caisson" {
        return engine::runtime_path();
    }
    let config = home.join("config.toml");
    fs::write(&config, install(&case::configuration(), home)).expect("configuration");
    let script = format!(
        "#!/bin/sh\nCAISSON_CONFIG={config:?} exec {:?} \"$@\"\n",
        home.join("caisson")
    );
    let program = home.join("runtime");
    fs::write(&program, script).expect("program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("mode");
    program.display().to_string()
}

/// The host's interface with [`HOST`].
struct Interface;

impl Interface {
    fn add(engine: &Engine) -> Self {
        let ip = |args: &[&str]| engine.program("ip").args(args).succeed();
        ip(&["link", "add", "reached", "type", "dummy"]);
        let added = Self;
        ip(&["addr", "add", HOST, "dev", "reached"]);
        ip(&["link", "set", "reached", "up"]);
        added
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let mut ip = std::process::Command::new("ip");
        let _ = ip.args(["link", "del", "reached"]).status();
    }
}

#[test]
fn an_ordinary_users_container_reaches_the_network() {
    let engine = Engine::podman();
    let user = User::of(&engine);
    let _interface = Interface::add(&engine);
    let listener = TcpListener::bind((HOST, 0)).expect("listen");
    let port = listener.local_addr().expect("address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.write_all(b"from the host\n").expect("write");
        let mut said = String::new();
        stream.read_to_string(&mut said).expect("read");
        said
    });
    let script = format!(
        "id -u; ip -o -4 addr show tap0 | awk '{{print $4}}'; ip route | sed -n 's/ *$//; /^default/p'; \
         grep -c ^nameserver.10.0.2.3 /etc/resolv.conf; echo from the guest | nc {HOST} {port}"
    );
    let seen = user.ok(["run", "--rm", IMAGE, "sh", "-c", &script]);
    assert_eq!(
        seen,
        "0\n10.0.2.100/24\ndefault via 10.0.2.2 dev tap0\n1\nfrom the host"
    );
    assert_eq!(server.join().expect("the server"), "from the guest\n");
}

#[test]
fn an_ordinary_users_container_lives_its_life() {
    let engine = Engine::podman();
    let user = User::of(&engine);
    let volume = user.home.join("volume");
    fs::create_dir(&volume).expect("directory");
    chown(&volume, Some(USER), Some(USER)).expect("chown");
    let volume_at = format!("{}:/v", volume.display());
    let script = "trap 'echo stopping; exit 3' TERM; mkfifo /p; echo ready; while :; do sleep 1000 & wait $!; done";
    let run = ["run", "-d", "--network=none", "--name=one"];
    user.call(run)
        .args(["-v", &volume_at, IMAGE, "sh", "-c", script])
        .succeed();
    // The trap is there when the pipe is.
    let outcome = user.exec(
        "one",
        "until test -p /p; do :; done; id -u; echo x > /v/file; chown 33:33 /v/file; touch /v/own; exit 5",
    );
    assert_eq!((outcome.status, outcome.text()), (5, "0\n"), "{outcome:?}");
    let owner = |name: &str| fs::metadata(volume.join(name)).expect("metadata").uid();
    assert_eq!((owner("file"), owner("own")), (OTHERS + 32, USER));
    let top = user.ok(["top", "one", "pid", "user", "comm"]);
    let top: Vec<&str> = top.split_whitespace().collect();
    assert_eq!(top[..6], ["PID", "USER", "COMMAND", "1", "root", "sh"]);
    user.ok(["stop", "-t", "120", "one"]);
    assert_eq!(user.ok(["wait", "one"]), "3");
    assert_eq!(user.ok(["logs", "one"]), "ready\nstopping");
    user.ok(["rm", "one"]);
}
