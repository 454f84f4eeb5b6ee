//! From create to delete: states, signals, ends.

use super::{Host, Open, context, say, sh, text, with};
use serde_json::json;
use std::time::Duration;
use tokio::io::AsyncReadExt;

impl Host {
    pub(super) async fn life(&self) {
        let streams = self.streams(false);
        let pid = self.create("l", &with(sh("trap 'echo term; exit 7' TERM; echo up; while :; do sleep 0.1; done"), json!({"process": {"noNewPrivileges": true, "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": [], "ambient": []}},
            "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}}})), &streams).await;
        self.check("created", pid.is_ok(), &pid);
        let Open {
            stdin,
            mut stdout,
            stderr,
        } = streams.open().await;
        let again = self.create("l", &sh("true"), &self.streams(false)).await;
        self.check(
            "an id in use is refused",
            again
                .as_ref()
                .is_err_and(|e| e.contains("container with id exists")),
            &again,
        );
        let e = self.delete("l").await;
        self.check("a created container is not deleted", e.is_err(), &e);
        let e = self.start("l").await;
        self.check("started", e.is_ok(), &e);
        let mut line = [0; 3];
        stdout.read_exact(&mut line).await.unwrap();
        let e = self.start("l").await;
        self.check(
            "start twice is refused",
            e.as_ref()
                .is_err_and(|e| e.contains("cannot start a container that is running")),
            &e,
        );
        let confined = json!({"noNewPrivileges": true, "args": ["/bin/sh", "-c", "echo $$; hostname; mkdir /tmp/d 2>&1; grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status | cut -f2; cat /proc/self/cgroup; ls -l /proc/self/ns /proc/1/ns | awk '/ns:|->/{print $NF}' | sort | uniq -c | awk '{print $1}' | sort -u"],
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": [], "ambient": []}});
        let out = self.exec("l", "e1", &confined, b"").await;
        let lines: Vec<&str> = out.stdout.lines().collect();
        self.check(
            "exec is confined",
            lines.get(1) == Some(&"box")
                && lines.get(2).is_some_and(|l| l.contains("not implemented"))
                && lines.get(3..6) == Some(&["0000000000000020", "1", "2"]),
            &out,
        );
        self.check(
            "exec is in the cgroup",
            lines.get(6) == Some(&"0::/caisson-l"),
            &out,
        );
        self.check(
            "exec shares all namespaces",
            lines.get(7..) == Some(&["1", "2", "4"]),
            &out,
        );
        let out = self
            .exec("l", "e2", &json!({"args": ["cat"]}), b"through")
            .await;
        self.check(
            "exec with input",
            out.stdout == "through" && out.code == 0,
            &out,
        );
        let out = self.exec("l", "e3", &json!({"args": ["nope"]}), b"").await;
        self.check(
            "exec of nothing",
            out.error
                .ends_with(r#"exec: "nope": executable file not found in $PATH"#)
                && out.error.starts_with("exec"),
            &out,
        );
        let process = json!({"args": ["/bin/sh", "-c", "sleep 60 & echo started; exit 3"]});
        let out = self.exec("l", "e4", &process, b"");
        // The background child keeps the stream open: the count tells the host when it has everything.
        let counted = tokio::time::timeout(Duration::from_secs(3), out).await;
        self.check(
            "a background child holds the stream",
            counted.is_err(),
            &counted,
        );
        let end = self.wait("l", "e4").await;
        self.check(
            "its end and count are told",
            end.exit_status == 3 && end.stdout_bytes == 8,
            &end,
        );
        let named = Self::named("l");
        let listed = self
            .agent
            .list_processes(context(), &named)
            .await
            .map(|l| l.pids);
        self.check(
            "processes are listed",
            listed
                .as_ref()
                .is_ok_and(|l| l.contains(pid.as_ref().unwrap()) && l.len() >= 2),
            &listed,
        );
        let paused = self
            .agent
            .pause_container(context(), &named)
            .await
            .map(drop)
            .map_err(text);
        self.check("paused", paused.is_ok(), &paused);
        let out = self.exec("l", "e5", &json!({"args": ["true"]}), b"").await;
        self.check(
            "no exec in a paused container",
            out.error.contains("cannot exec in a paused container"),
            &out,
        );
        let resumed = self
            .agent
            .resume_container(context(), &named)
            .await
            .map(drop)
            .map_err(text);
        self.check("resumed", resumed.is_ok(), &resumed);
        let e = self.kill("l", "", 15, false).await;
        self.check("signalled", e.is_ok(), &e);
        let end = self.wait("l", "").await;
        self.check(
            "the trap ran",
            end.exit_status == 7 && end.stdout_bytes == 8,
            &end,
        );
        let e = self.kill("l", "", 15, false).await;
        self.check(
            "no signal for the dead",
            e.as_ref()
                .is_err_and(|e| e.contains("process already finished")),
            &e,
        );
        let out = self.exec("l", "e6", &json!({"args": ["true"]}), b"").await;
        self.check(
            "no exec in a stopped container",
            out.error.contains("cannot exec in a stopped container"),
            &out,
        );
        drop((stdin, stdout, stderr));
        let e = self.delete("l").await;
        self.check("deleted", e.is_ok(), &e);
        let e = self.delete("l").await;
        self.check("deleting again is fine", e.is_ok(), &e);
        let streams = self.streams(false);
        let _ = self.create("k", &sh("sleep 100"), &streams).await;
        say("created k");
        let open = streams.open().await;
        let e = self.kill("k", "", 9, false).await;
        say("killed k");
        let end = self.wait("k", "").await;
        self.check(
            "a created container can be killed",
            e.is_ok() && end.exit_status == 137,
            &(e, end),
        );
        let e = self.start("k").await;
        self.check(
            "and not be started then",
            e.as_ref().is_err_and(|e| e.contains("stopped")),
            &e,
        );
        drop(open);
        let e = self.delete("k").await;
        self.check("and be deleted", e.is_ok(), &e);
        self.namespaced().await;
        self.preserved().await;
        for round in 0..5 {
            let out = self.run(&sh("echo x"), b"").await;
            if out.stdout != "x" {
                self.check(&format!("round {round}"), false, &out);
            }
        }
        self.check("5 rounds", true, &());
        self.many().await;
    }
}
