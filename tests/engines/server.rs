//! A real server: nginx from Debian packages, its image built here, its data in a volume.

use std::fs;

use crate::engine::{Engine, Kind};
use crate::http::Server;

/// Where the root file system's archive is, which `tests/engines/rootfs` makes.
const ROOTFS: &str = "CAISSON_TEST_SERVER_ROOTFS";

const PORT: u16 = 8082;

/// Requests of each client, over one connection, and clients.
const REQUESTS: usize = 500;
const CLIENTS: usize = 4;

const CONFIGURATION: &str = "\
daemon off; user root; worker_processes 1; pid /run/nginx.pid;
error_log /dev/stdout notice;
events { worker_connections 256; }
http {
  access_log off; keepalive_requests 100000; client_body_temp_path /data/tmp;
  server { listen 80; root /data/www; dav_methods PUT; create_full_put_path on; }
}
";

const STEPS: &str = "\
FROM scratch
ADD rootfs.tar /
COPY nginx.conf /etc/nginx/nginx.conf
RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo root:x:0:0::/:/bin/sh > /etc/passwd; echo root:x:0: > /etc/group\"]
RUN [\"/usr/sbin/nginx\", \"-V\"]
CMD [\"/usr/sbin/nginx\"]
";

pub(crate) fn a_server_is_built_loaded_and_keeps_its_data(engine: &Engine) {
    build(engine);
    engine.ok(["volume", "create", "site"]);
    let port = format!("{PORT}:80");
    let run = engine.networked_call(["-d", "--name", "server", "-p", &port, "-v", "site:/data"]);
    run.args(["server"]).succeed();
    engine.wait_for("server", "start worker processes");
    let server = Server::at(PORT);
    let page = "page ".repeat(800);
    let (status, said) = server.connect().ask("PUT", "/kept/page", &page);
    assert_eq!(status, 201, "{said}");
    load(server, &page);
    // As a person would: stopped in good order, started again, and there is what it had stored.
    engine.ok(["stop", "-t", "60", "server"]);
    assert_eq!(engine.ok(["wait", "server"]), "0");
    engine.ok(["start", "server"]);
    engine.wait_for_times("server", "start worker processes", 2);
    assert_eq!(server.get("/kept/page"), page);
    engine.remove("server");
    engine.ok(["volume", "rm", "site"]);
    engine.ok(["rmi", "server"]);
}

/// All clients at once; every answer is the whole page.
fn load(server: Server, page: &str) {
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut connection = server.connect();
                for _ in 0..REQUESTS {
                    let (status, body) = connection.ask("GET", "/kept/page", "");
                    assert!(status == 200 && body == page, "{status}: {body}");
                }
            });
        }
    });
    // And connections that come and go.
    for _ in 0..50 {
        assert_eq!(server.get("/kept/page"), page);
    }
}

fn build(engine: &Engine) {
    let rootfs = std::env::var(ROOTFS).expect("CAISSON_TEST_SERVER_ROOTFS names the archive");
    let dir = engine.dir().join("build");
    fs::create_dir(&dir).expect("directory");
    fs::copy(rootfs, dir.join("rootfs.tar")).expect("copy the root file system");
    fs::write(dir.join("nginx.conf"), CONFIGURATION).expect("write");
    fs::write(dir.join("Dockerfile"), STEPS).expect("write");
    let dir = dir.display().to_string();
    match engine.kind() {
        Kind::Podman => engine.ok(["build", "--network=none", "-t", "server", &dir]),
        Kind::Docker => engine.ok(["build", "--network=none", "-q", "-t", "server", &dir]),
    };
}
