//! What every process gets: streams, statuses, environment, identity.

use super::{Host, sh, with};
use serde_json::json;

impl Host {
    pub(super) async fn basics(&self) {
        self.expect("hello", sh("echo hello"), "hello").await;
        let out = self.run(&sh("echo err >&2; exit 42"), b"").await;
        self.check(
            "exit code and stderr",
            out.code == 42 && out.stderr == "err",
            &out,
        );
        let out = self.run(&sh("kill -9 $$"), b"").await;
        self.check("init cannot kill itself with KILL", out.code == 0, &out);
        let out = self
            .run(&sh("wc -c; echo done"), &vec![b'x'; 1 << 20])
            .await;
        self.check("stdin and its end", out.stdout == "1048576\ndone", &out);
        let out = self.run(&sh("cat"), &vec![b'y'; 64 << 20]).await;
        self.check(
            "64 MiB each way",
            out.stdout.len() == 64 << 20 && out.error.is_empty(),
            &(out.code, out.error, out.counts),
        );
        self.expect("pids", sh("echo $$; ls /proc | grep -c '^[0-9]'"), "1\n3")
            .await;
        self.expect("hostname", sh("hostname"), "box").await;
        self.expect(
            "stdout can be opened again",
            sh("echo a > /dev/stdout; echo b > /proc/self/fd/1"),
            "a\nb",
        )
        .await;
        self.expect("environment", with(json!({"process": {"args": ["/bin/env"], "env": ["PATH=/bin", "B=2", "A=1", "B=3"]}}), json!({})), "PATH=/bin\nB=3\nA=1\nHOME=/root").await;
        self.refuse(
            "not in path",
            json!({"process": {"args": ["foo"]}}),
            r#"exec: "foo": executable file not found in $PATH"#,
        )
        .await;
        self.refuse(
            "no such file",
            json!({"process": {"args": ["/x"]}}),
            r#"exec: "/x": stat /x: no such file or directory"#,
        )
        .await;
        self.refuse(
            "not executable",
            json!({"process": {"args": ["/etc/passwd"]}}),
            r#"exec: "/etc/passwd": permission denied"#,
        )
        .await;
        self.refuse(
            "bad format",
            json!({"process": {"args": ["/bin/garbage"]}}),
            "exec /bin/garbage: exec format error",
        )
        .await;
        self.expect(
            "cwd is made",
            with(sh("pwd"), json!({"process": {"cwd": "/made/for/me"}})),
            "/made/for/me",
        )
        .await;
        self.expect(
            "signals are default",
            sh("grep -E 'SigBlk|SigIgn' /proc/self/status | cut -f2"),
            "0000000000000000\n0000000000000000",
        )
        .await;
        self.expect("descriptors", sh("ls /proc/self/fd"), "0\n1\n2\n3")
            .await;
    }
}
