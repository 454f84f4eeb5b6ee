//! What a process may and may not: capabilities, seccomp, limits, namespaces.

use super::{Host, base, sh, with};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::AsyncReadExt;

impl Host {
    pub(super) async fn rights(&self) {
        let status = |what: &str| {
            sh(&format!(
                "grep -E '^({what})' /proc/self/status | cut -f2 | tr '\\t\\n' '  '"
            ))
        };
        let caps = |all: &[&str]| json!({"process": {"capabilities": {"bounding": all, "effective": all, "permitted": all, "inheritable": [], "ambient": []}}});
        self.expect(
            "capabilities",
            with(status("Cap"), caps(&["CAP_KILL", "CAP_CHOWN"])),
            "0000000000000000 0000000000000021 0000000000000021 0000000000000021 0000000000000000",
        )
        .await;
        let user = json!({"process": {"user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 63}}});
        self.expect(
            "user",
            with(
                sh("id -u; id -g; id -G; umask; echo $HOME; echo again > /dev/stdout"),
                user.clone(),
            ),
            "1000\n1001\n1001 5 6\n0077\n/home/user\nagain",
        )
        .await;
        let ambient = json!({"process": {"capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}}});
        self.expect(
            "ambient capabilities",
            with(with(status("Cap"), user), ambient),
            "0000000000000020 0000000000000020 0000000000000020 0000000000000020 0000000000000020",
        )
        .await;
        let filter = json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}}});
        for nnp in [true, false] {
            let set = json!({"process": {"noNewPrivileges": nnp}});
            self.expect(&format!("seccomp, no_new_privs {nnp}"), with(with(sh("mkdir /tmp/d 2>&1; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | cut -f2"), filter.clone()), set), &format!("mkdir: can't create directory '/tmp/d': Function not implemented\n{}\n2", u8::from(nnp))).await;
        }
        self.expect("rlimits", with(sh("ulimit -n; ulimit -Hn; ulimit -c"), json!({"process": {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]}})), "77\n99\n0").await;
        self.expect("oom score and priorities", with(sh("cat /proc/self/oom_score_adj; cut -d' ' -f19 /proc/self/stat; ionice -p $$"), json!({"process": {"oomScoreAdj": 321, "scheduler": {"policy": "SCHED_BATCH", "nice": 7}, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}}})), "321\n7\nbest-effort: prio 3").await;
        self.expect(
            "personality",
            with(
                sh("uname -m"),
                json!({"linux": {"personality": {"domain": "LINUX32"}}}),
            ),
            "i686",
        )
        .await;
        self.expect("device rules", with(sh("mknod /tmp/kmsg c 1 11; cat /tmp/kmsg 2>&1 | head -c 60; rm /tmp/kmsg; echo; head -c 3 /dev/zero | wc -c"), with(caps(&["CAP_MKNOD"]), json!({"linux": {"resources": {"devices": [{"allow": false, "access": "rwm"}]}}}))), "cat: can't open '/tmp/kmsg': Operation not permitted\n\n3").await;
        self.refuse("unmapped user", with(sh("true"), json!({"process": {"user": {"uid": 5000, "gid": 0}}, "linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"user"},{"type":"uts"},{"type":"ipc"},{"type":"network"}],
            "uidMappings": [{"containerID":0,"hostID":0,"size":1000}], "gidMappings": [{"containerID":0,"hostID":0,"size":1000}]}})), "cannot set uid to unmapped user").await;
    }

    pub(super) async fn cgroups(&self) {
        let out = self.run(&with(sh("x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived"), json!({"linux": {"resources": {"memory": {"limit": 20_000_000, "swap": 20_000_000}}}})), b"").await;
        self.check(
            "out of memory is told apart",
            out.oom && out.code == 137,
            &out,
        );
        let view = json!({"linux": {"namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"},{"type":"network"}],
            "resources": {"pids": {"limit": 12}, "cpu": {"shares": 2048, "quota": 50000, "period": 100_000, "cpus": "0"}, "memory": {"limit": 67_108_864, "reservation": 1_048_576}, "unified": {"memory.high": "50331648"}}}});
        self.expect("limits", with(sh("cd /sys/fs/cgroup; cat pids.max cpu.weight cpu.max cpuset.cpus memory.max memory.low memory.high"), view), "12\n79\n50000 100000\n0\n67108864\n1048576\n50331648").await;
        self.refuse(
            "unknown controller",
            with(
                sh("true"),
                json!({"linux": {"resources": {"unified": {"nothing.max": "1"}}}}),
            ),
            "controller is not available",
        )
        .await;
        let out = self
            .run(
                &with(
                    sh("for i in 1 2 3 4 5 6 7 8; do sleep 5 & done 2>&1; wait"),
                    json!({"linux": {"resources": {"pids": {"limit": 4}}}}),
                ),
                b"",
            )
            .await;
        self.check(
            "pids limit",
            out.code != 0 || out.stdout.contains("fork"),
            &out,
        );
    }

    /// A further process in a container with every kind of namespace, and the end of one without a PID namespace.
    pub(super) async fn namespaced(&self) {
        let mounts: Vec<Value> = base()["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .cloned()
            .map(|mut m| {
                if m["type"] == "cgroup" {
                    m["options"] = json!(["rw", "nosuid", "noexec", "nodev"]);
                }
                m
            })
            .collect();
        let spec = with(
            sh("mkdir /sys/fs/cgroup/mine && echo delegated; while :; do sleep 0.1; done"),
            json!({"mounts": mounts, "linux": {
            "namespaces": [{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"user"},{"type":"cgroup"},{"type":"time"}],
            "timeOffsets": {"boottime": {"secs": 100_000}},
            "uidMappings": [{"containerID":0,"hostID":5000,"size":1000}], "gidMappings": [{"containerID":0,"hostID":5000,"size":1000}]}}),
        );
        let streams = self.streams(false);
        let created = self.create("n", &spec, &streams).await;
        self.check("all namespaces", created.is_ok(), &created);
        if created.is_err() {
            return;
        }
        let mut open = streams.open().await;
        let _ = self.start("n").await;
        let mut line = [0; 10];
        open.stdout.read_exact(&mut line).await.unwrap();
        self.check("the cgroup is delegated", &line == b"delegated\n", &line);
        let process = json!({"args": ["/bin/sh", "-c", "id -u; tr -s ' ' < /proc/self/uid_map; cat /proc/self/cgroup; cut -d. -f1 /proc/uptime | awk '{print ($1 > 86400)}'; ls -l /proc/self/ns /proc/1/ns | awk '/->/{print $NF}' | sort | uniq -c | awk '{print $1}' | sort -u"]});
        let out = self.exec("n", "x", &process, b"").await;
        self.check(
            "exec into all namespaces",
            out.stdout == "0\n 0 5000 1000\n0::/\n1\n2\n4",
            &out,
        );
        let tty = json!({"terminal": true, "user": {"uid": 3, "gid": 4}, "args": ["/bin/sh", "-c", "stat -c %u $(tty); echo x > /dev/tty"]});
        let out = self.exec("n", "t", &tty, b"").await;
        self.check(
            "a terminal of another user",
            out.stdout.replace('\r', "") == "3\nx",
            &out,
        );
        let _ = self.kill("n", "", 9, false).await;
        self.wait("n", "").await;
        let e = self.delete("n").await;
        self.check("its cgroups go", e.is_ok(), &e);
        let spec = with(
            sh("sleep 1000 & echo left"),
            json!({"linux": {"namespaces": [{"type":"mount"},{"type":"uts"},{"type":"ipc"}]}}),
        );
        let out = self.run(&spec, b"");
        let out = tokio::time::timeout(Duration::from_secs(30), out).await;
        self.check(
            "no PID namespace, and all end with init",
            out.as_ref().is_ok_and(|o| o.stdout == "left"),
            &out,
        );
    }
}
