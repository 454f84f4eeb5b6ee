//! containerd's configuration file in the version that the installed containerd has: 2 up to containerd 1.7, 3 since 2.0.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use crate::daemon::PAUSE;
use crate::kubelet::by_systemd;

/// The CRI's plugin up to containerd 1.7; since 2.0 it keeps the streams.
const CRI: &str = "io.containerd.grpc.v1.cri";
/// Its other parts since 2.0.
const RUNTIME: &str = "io.containerd.cri.v1.runtime";
const IMAGES: &str = "io.containerd.cri.v1.images";
/// Other people's plugins of the node; since 2.0 their socket is made unless it is disabled.
const NRI: &str = "io.containerd.nri.v1.nri";

/// The version of the installed containerd: major and minor.
pub(crate) fn version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let said = Command::new("containerd").arg("--version").output();
        let said = said.expect("containerd is not installed: use the lab's image `systemd`");
        let said = String::from_utf8_lossy(&said.stdout);
        // containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6
        let version = said.split_whitespace().nth(2).expect("a version");
        let mut parts = version.split('.').map(|part| part.parse().ok());
        let mut next = || parts.next().flatten().expect("a number");
        (next(), next())
    })
}

/// Whether it is of the second generation, whose CRI is three plugins.
fn is_second() -> bool {
    version() >= (2, 0)
}

/// Who makes a pod's sandbox: nothing means containerd itself, with a container that pauses.
pub(crate) fn sandboxer() -> Option<String> {
    std::env::var("CAISSON_TEST_SANDBOXER").ok()
}

/// What every test's containerd is told, with tables of its own in `last`.
pub(crate) fn common(dir: &Path, first: &str, last: &str) -> String {
    let version = if is_second() { 3 } else { 2 };
    let level = std::env::var("CAISSON_TEST_LOG").unwrap_or_else(|_| "debug".to_owned());
    format!(
        "version = {version}\nroot = {:?}\nstate = {:?}\n{first}\
         [grpc]\naddress = {:?}\n[debug]\nlevel = {level:?}\n{last}",
        dir.join("containerd"),
        dir.join("state"),
        dir.join("containerd.sock"),
    )
}

/// Keys that switch the CRI off.
pub(crate) fn without_cri() -> String {
    let plugins = if is_second() {
        vec![CRI, RUNTIME, IMAGES]
    } else {
        vec![CRI]
    };
    format!("disabled_plugins = {plugins:?}\n")
}

/// The tables of the CRI, with both runtimes as handlers.
pub(crate) fn cri(networks: &Path) -> String {
    let streams = "stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n";
    let (plugin, top) = if is_second() {
        let others = format!(
            "[plugins.{IMAGES:?}.pinned_images]\nsandbox = {PAUSE:?}\n[plugins.{NRI:?}]\ndisable = true\n"
        );
        (RUNTIME, format!("[plugins.{CRI:?}]\n{streams}{others}"))
    } else {
        (
            CRI,
            format!("[plugins.{CRI:?}]\nsandbox_image = {PAUSE:?}\n{streams}"),
        )
    };
    format!(
        "{top}[plugins.{plugin:?}.cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = {networks:?}\n{}{}",
        handler(plugin, "runc", None),
        handler(plugin, "caisson", sandboxer()),
    )
}

fn handler(plugin: &str, name: &str, sandboxer: Option<String>) -> String {
    let table = format!("plugins.{plugin:?}.containerd.runtimes.{name}");
    // containerd 2.1 cannot pass on both the options of a runtime that is not its own and the address of a sandbox.
    let more = match sandboxer {
        Some(sandboxer) => format!("sandboxer = {sandboxer:?}\n"),
        None => format!("[{table}.options]\nSystemdCgroup = {}\n", by_systemd()),
    };
    format!(
        "[{table}]\nruntime_type = \"io.containerd.{name}.v2\"\npod_annotations = [\"io.caisson.*\"]\n\
         privileged_without_host_devices = true\n{more}",
    )
}
