//! The container's file system tree: root, mounts, devices, masks.

use super::{Host, base, sh, with};
use caisson_agent_api::SHARE_MOUNT;
use serde_json::{Value, json};

impl Host {
    pub(super) async fn files(&self) {
        self.expect("devices", sh("ls -l /dev | awk '{print $1,$NF}' | sort"), "crw-rw-rw- full\ncrw-rw-rw- null\ncrw-rw-rw- random\ncrw-rw-rw- tty\ncrw-rw-rw- urandom\ncrw-rw-rw- zero\ndrwxr-xr-x pts\ndrwxrwxrwt mqueue\ndrwxrwxrwt shm\nlrwxrwxrwx /proc/self/fd\nlrwxrwxrwx /proc/self/fd/0\nlrwxrwxrwx /proc/self/fd/1\nlrwxrwxrwx /proc/self/fd/2\nlrwxrwxrwx pts/ptmx\ntotal 0").await;
        self.expect(
            "read-only root",
            with(
                sh("touch /x 2>&1; touch /dev/x && echo dev"),
                json!({"root": {"readonly": true}}),
            ),
            "touch: /x: Read-only file system\ndev",
        )
        .await;
        self.expect("masked and read-only paths", with(sh("wc -c < /etc/passwd; ls /home | wc -l; touch /root/x 2>&1; echo 1 2>/dev/null > /proc/sys/kernel/domainname || echo ro"), json!({"linux": {"maskedPaths": ["/etc/passwd", "/home", "/none"], "readonlyPaths": ["/root", "/proc/sys", "/none"]}})), "0\n0\ntouch: /root/x: Read-only file system\nro").await;
        let mounts = base()["mounts"].as_array().unwrap().clone();
        let plus = |extra: Value| {
            let mut all = mounts.clone();
            all.extend(extra.as_array().unwrap().iter().cloned());
            json!({"mounts": all})
        };
        let source = format!("{SHARE_MOUNT}/volume");
        let _ = std::fs::create_dir_all(&source);
        std::fs::write(format!("{source}/f"), "data").unwrap();
        self.expect("bind mounts", with(sh("cat /vol/deep/f; echo; touch /vol/deep/g 2>&1; cat /single; echo; grep -E ' /vol/deep ' /proc/self/mountinfo | cut -d' ' -f6"), plus(json!([
            {"destination": "/vol/deep", "type": "none", "source": source, "options": ["rbind", "ro", "nosuid", "nodev"]},
            {"destination": "/single", "type": "bind", "source": format!("{source}/f"), "options": ["bind"]}]))),
            "data\ntouch: /vol/deep/g: Read-only file system\ndata\nro,nosuid,nodev,relatime").await;
        self.expect("links in the image stay inside", with(sh("cat /out/f"), plus(json!([
            {"destination": "/escape/out", "type": "bind", "source": source, "options": ["bind"]}]))), "data").await;
        self.expect("tmpfs with copy", with(sh("stat -c '%a %u' /tree/file; cat /tree/sub/file; readlink /tree/link; df -T /tree | tail -1 | awk '{print $2}'"), plus(json!([
            {"destination": "/tree", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m", "nodev"]}]))), "640 7\nsub\nfile\ntmpfs").await;
        self.expect("tmpfs options", with(sh("stat -c %a /run1; grep ' /run1 ' /proc/self/mountinfo | grep -o 'size=[0-9k]*'; touch /run1/x 2>&1"), plus(json!([
            {"destination": "/run1", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "size=64k", "mode=700"]}]))), "700\nsize=64k\ntouch: /run1/x: Read-only file system").await;
        self.expect("propagation", with(sh("grep -E ' / / | /vol ' /proc/self/mountinfo | grep -o 'shared' | wc -l"), with(plus(json!([
            {"destination": "/vol", "type": "bind", "source": source, "options": ["bind", "rshared"]}])), json!({"linux": {"rootfsPropagation": "shared"}}))), "1").await;
        self.expect("recursive read-only", with(sh("touch /vol/x 2>&1"), plus(json!([
            {"destination": "/vol", "type": "bind", "source": source, "options": ["rbind", "rro"]}]))), "touch: /vol/x: Read-only file system").await;
        self.refuse("missing source", plus(json!([{"destination": "/v", "type": "bind", "source": "/nope", "options": ["bind"]}])), "no such file or directory").await;
        self.refuse(
            "mount inside proc",
            plus(json!([{"destination": "/proc/sys", "type": "tmpfs", "source": "tmpfs"}])),
            "inside /proc",
        )
        .await;
        self.expect("cgroup mount", with(sh("cat /proc/self/cgroup; mkdir /sys/fs/cgroup/x 2>/dev/null || echo ro; ls /sys/fs/cgroup/cgroup.procs"), json!({"linux": {"namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"},{"type":"network"}]}})), "0::/\nro\n/sys/fs/cgroup/cgroup.procs").await;
        self.expect("further devices", with(sh("stat -c '%t:%T %a %u:%g' /dev/fuse /dev/pipe"), json!({"linux": {"devices": [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2},
            {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0}]}})), "a:e5 666 1:2\n0:0 666 0:0").await;
        self.expect(
            "loopback",
            sh("ip addr show lo | grep -o 'inet 127.0.0.1/8'"),
            "inet 127.0.0.1/8",
        )
        .await;
        self.expect("sysctls", with(sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced"), json!({"linux": {"sysctl": {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1"}}})), "1\n1").await;
        self.expect(
            "domainname",
            with(
                sh("cat /proc/sys/kernel/domainname"),
                json!({"domainname": "dom"}),
            ),
            "dom",
        )
        .await;
        let hook =
            json!([{"path": "/bin/hook", "args": ["hook", "arg"], "env": ["X=1", "PATH=/bin"]}]);
        self.expect(
            "startContainer hook",
            with(
                sh("cat /tmp/hook; rm /tmp/hook"),
                json!({"hooks": {"startContainer": hook}}),
            ),
            "arg 1 created /bundle",
        )
        .await;
        self.refuse(
            "failing hook",
            with(
                sh("true"),
                json!({"hooks": {"startContainer": [{"path": "/bin/false"}]}}),
            ),
            "error running hook #0: exit status 1",
        )
        .await;
        self.refuse("hook timeout", with(sh("true"), json!({"hooks": {"startContainer": [{"path": "/bin/sleep", "args": ["sleep", "9"], "timeout": 1}]}})), "ran past specified timeout").await;
        self.expect("user namespace", with(sh("id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && ls -ld /proc/1 | awk '{print $3}'; stat -c %u /dev/null"), json!({"linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"user"},{"type":"cgroup"}],
            "uidMappings": [{"containerID":0,"hostID":0,"size":1000}], "gidMappings": [{"containerID":0,"hostID":0,"size":1000}]}})), "0\n 0 0 1000\nroot\n0").await;
        self.expect("time namespace", with(sh("cut -d. -f1 /proc/uptime | awk '{print ($1 > 86400)}'"), json!({"linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"time"}],
            "timeOffsets": {"boottime": {"secs": 100_000}}}})), "1").await;
    }
}
