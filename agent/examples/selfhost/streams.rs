//! Streams under strain: readers that go, further descriptors, many at once, terminals.

use super::{Host, base, context, sh, text, with};
use caisson_agent_api::{CreateContainerRequest, ResizeTerminalRequest};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

impl Host {
    /// A reader that goes away is noticed by the writer.
    pub(super) async fn reader_goes_away(&self) {
        let streams = self.streams(false);
        let script = sh("trap '' PIPE; while echo y; do :; done 2>/dev/null; exit 8");
        let created = self.create("r", &script, &streams).await;
        self.check("a flood", created.is_ok(), &created);
        let mut open = streams.open().await;
        let _ = self.start("r").await;
        let mut first = [0; 2];
        let got = open.stdout.read_exact(&mut first).await;
        drop(open.stdout);
        let end = tokio::time::timeout(Duration::from_secs(15), self.wait("r", "")).await;
        let code = end.as_ref().map(|e| e.exit_status);
        self.check(
            "its reader goes away",
            got.is_ok() && &first == b"y\n" && code == Ok(8),
            &(got, code),
        );
        let _ = self.kill("r", "", 9, false).await;
        self.wait("r", "").await;
        let _ = self.delete("r").await;
    }

    /// Descriptors from 3 upwards go both ways.
    pub(super) async fn preserved(&self) {
        let (streams, extra) = (self.streams(false), self.streams(false));
        let request = CreateContainerRequest {
            container_id: "p".to_owned(),
            spec: serde_json::to_vec(&with(
                base(),
                sh("ls /proc/self/fd | tr '\\n' ' '; read line <&3; echo got $line >&4"),
            ))
            .unwrap(),
            stdio: Some(streams.stdio.clone()).into(),
            preserved_ports: vec![extra.stdio.stdin_port, extra.stdio.stdout_port],
            ..Default::default()
        };
        let created = self
            .agent
            .create_container(context(), &request)
            .await
            .map_err(text);
        self.check("preserved descriptors", created.is_ok(), &created);
        let mut open = streams.open().await;
        let mut three = extra.listeners[0].accept().await.unwrap().0;
        let mut four = extra.listeners[1].accept().await.unwrap().0;
        let _ = self.start("p").await;
        three.write_all(b"words\n").await.unwrap();
        let mut got = String::new();
        four.read_to_string(&mut got).await.unwrap();
        let mut seen = String::new();
        open.stdout.read_to_string(&mut seen).await.unwrap();
        self.wait("p", "").await;
        self.check(
            "go both ways",
            got == "got words\n" && seen == "0 1 2 3 4 5 ",
            &(got, seen),
        );
        let _ = self.delete("p").await;
    }

    pub(super) async fn many(&self) {
        let ids: Vec<String> = (0..8).map(|n| format!("m{n}")).collect();
        let mut running = HashMap::new();
        for id in &ids {
            let streams = self.streams(false);
            let e = self.create(id, &sh("echo $$; sleep 1"), &streams).await;
            if e.is_err() {
                self.check("many", false, &e);
            }
            running.insert(id, streams.open().await);
        }
        for id in &ids {
            let _ = self.start(id).await;
        }
        let mut codes = 0;
        for id in &ids {
            codes += self.wait(id, "").await.exit_status;
            let _ = self.delete(id).await;
        }
        self.check("eight containers at once", codes == 0, &codes);
    }

    pub(super) async fn terminal(&self) {
        let tty =
            json!({"process": {"terminal": true, "consoleSize": {"height": 33, "width": 111}}});
        let out = self.run(&with(sh("tty; stty size; test -c /dev/console && echo console; ls -l /proc/self/fd/0 | awk '{print $NF}'"), tty.clone()), b"").await;
        self.check(
            "terminal",
            out.stdout.replace('\r', "") == "/dev/pts/0\n33 111\nconsole\n/dev/pts/0",
            &out,
        );
        let streams = self.streams(true);
        let _ = self
            .create(
                "t",
                &with(
                    sh("trap 'stty size' WINCH; echo up; until read line; do :; done; echo got $line; exit 5"),
                    tty,
                ),
                &streams,
            )
            .await;
        let mut open = streams.open().await;
        let _ = self.start("t").await;
        let mut up = [0; 4];
        open.stdout.read_exact(&mut up).await.unwrap();
        let resize = ResizeTerminalRequest {
            container_id: "t".into(),
            rows: 5,
            columns: 6,
            ..Default::default()
        };
        let resized = self
            .agent
            .resize_terminal(context(), &resize)
            .await
            .map(drop)
            .map_err(text);
        self.check("resized", resized.is_ok(), &resized);
        let exec = self.exec("t", "x", &json!({"terminal": true, "args": ["/bin/sh", "-c", "tty; stty size < /dev/pts/0"]}), b"").await;
        self.check(
            "exec with a terminal",
            exec.stdout.replace('\r', "") == "/dev/pts/1\n5 6",
            &exec,
        );
        open.stdin.write_all(b"words\n").await.unwrap();
        let end = self.wait("t", "").await;
        let mut rest = String::new();
        open.stdout.read_to_string(&mut rest).await.unwrap();
        self.check(
            "a line through the terminal",
            end.exit_status == 5 && rest.contains("got words") && rest.contains("5 6"),
            &(rest, end),
        );
        let _ = self.delete("t").await;
    }
}
