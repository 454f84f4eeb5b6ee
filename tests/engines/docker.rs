//! What only Docker has.

use std::fs;
use std::net::Ipv4Addr;

use caisson_tests::{Call, case};

use crate::engine::{Engine, IMAGE};
use crate::names::{LONG, Names, SHORT};

#[test]
fn composed_services_reach_each_other_by_name() {
    let engine = Engine::docker();
    let runtime = case::runtime();
    let services = format!(
        "version: '2.4'
services:
  web:
    image: {IMAGE}
    runtime: {runtime}
    stop_grace_period: 1s
    command: sh -c 'mkdir /w; echo a page > /w/index.html; httpd -p 80 -h /w; echo ready; exec sleep 1000'
  client:
    image: {IMAGE}
    runtime: {runtime}
    stop_grace_period: 1s
    command: sh -c 'echo ready; exec sleep 1000'
"
    );
    let dir = engine.dir().join("project");
    fs::create_dir(&dir).expect("directory");
    fs::write(dir.join("docker-compose.yml"), services).expect("write");
    let compose = |name: &str, args: &[&str]| {
        let call = Call::new("docker-compose", &engine.dir().join(name)).args(["--no-ansi"]);
        let patient = call.env("COMPOSE_HTTP_TIMEOUT", "300");
        patient.args(args).dir(&dir).limit(3 * crate::engine::LIMIT)
    };
    compose("up", &["up", "-d"]).succeed();
    engine.wait_for("project_web_1", "ready");
    engine.wait_for("project_client_1", "ready");
    let page = engine.exec("project_client_1", "wget -qO- http://web/");
    assert_eq!(page.text(), "a page\n", "{page:?}");
    let unknown = engine.exec("project_client_1", "nslookup nobody.invalid");
    assert_ne!(unknown.status, 0, "{unknown:?}");
    let listed = compose("ps", &["ps", "-q"]).succeed();
    assert_eq!(listed.text().lines().count(), 2);
    compose("down", &["down"]).succeed();
}

#[test]
fn a_name_that_only_an_outside_server_knows_is_found_on_a_network_of_dockers() {
    let engine = Engine::docker();
    // The host's own address on that network is, for its containers, as far outside as any.
    let server = Ipv4Addr::new(172, 31, 53, 1);
    let dns = server.to_string();
    engine.ok([
        "network",
        "create",
        "--subnet",
        "172.31.53.0/24",
        "--gateway",
        &dns,
        "outside",
    ]);
    let names = Names::serve(server);
    let script =
        format!("ping -c 1 {SHORT} && ping -c 1 {LONG} && ! ping -c 1 nobody.outside.test");
    let run = engine.networked_call(["--rm", "--network", "outside", "--dns", &dns]);
    let outcome = run.args([IMAGE, "sh", "-c", &script]).succeed();
    for name in [SHORT, LONG] {
        let said = format!("PING {name} ({dns})");
        assert!(outcome.text().contains(&said), "{outcome:?}");
    }
    let heard = names.heard();
    for (protocol, name) in [("UDP", SHORT), ("UDP", LONG), ("TCP", LONG)] {
        let asked = heard.contains(&(protocol, name.to_owned()));
        assert!(asked, "{name} by {protocol}: {heard:?}");
    }
    drop(names);
    engine.ok(["network", "rm", "outside"]);
}

#[test]
fn top_lists_what_stands_for_the_container() {
    let engine = Engine::docker();
    engine.start("top", [], "echo ready; exec sleep 1000");
    let table = engine.ok(["top", "top", "-o", "pid,comm"]);
    let name = if case::runtime() == "caisson" {
        "caisson"
    } else {
        "sleep"
    };
    assert!(
        table.lines().skip(1).any(|line| line.ends_with(name)),
        "{table}"
    );
    engine.remove("top");
}
