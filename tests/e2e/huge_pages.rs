//! Huge pages: those of a container's limit are there, in its own hugetlbfs and in what takes the place of the host's.

use std::path::Path;

use caisson_tests::{Bundle, Case, HugePages, case};
use serde_json::json;

use crate::members::{join, start_holder};

/// A container with a limit, a hugetlbfs of its own at `/own` and one of the host's at `/bound`.
fn limited(bundle: Bundle, mib: u64, bound: &Path) -> Bundle {
    bundle.edit(|spec| {
        let limits = json!([{"pageSize": "2MB", "limit": mib << 20}]);
        spec["linux"]["resources"]["hugepageLimits"] = limits;
        let mounts = spec["mounts"].as_array_mut().expect("mounts");
        mounts.push(json!({"destination": "/own", "type": "hugetlbfs", "source": "nodev", "options": ["pagesize=2M"]}));
        mounts.push(json!({"destination": "/bound", "type": "bind", "source": bound, "options": ["rbind"]}));
    })
}

#[test]
fn a_container_has_the_huge_pages_of_its_limit_and_no_more() {
    let case = Case::begin();
    let pages = HugePages::mount(&case.dir().join("pages"), 16);
    let script = "fallocate -l 6m /own/a; fallocate -l 2m /bound/b; wc -c < /bound/b; \
        fallocate -l 2m /own/c 2>/dev/null || echo over; rm /own/c /own/a; fallocate -l 2m /own/c && echo again; \
        stat -c %a /bound; grep Hugepagesize /proc/meminfo; rm /bound/b";
    let outcome = case.run(&limited(case.bundle(), 8, pages.dir()).script(script));
    let lines: Vec<&str> = outcome.text().lines().collect();
    let expected = ["2097152", "over", "again", "777"];
    assert_eq!(lines[..4], expected, "{outcome:?}");
    assert!(lines[4].ends_with(" 2048 kB"), "{outcome:?}");
    drop(pages);
    case.nothing_is_left();
}

#[test]
fn a_machine_grows_by_the_huge_pages_of_a_member_or_refuses_them() {
    let case = Case::begin();
    case.configure("max_memory_mib = 512");
    start_holder(&case);
    let pages = HugePages::mount(&case.dir().join("pages"), 96);
    let member = |name: &str, mib| {
        let bundle = join(case.bundle_in(name), case.pid("holder"));
        limited(bundle, mib, pages.dir())
    };
    // More than half of what the machine has.
    let script = "fallocate -l 160m /bound/x && echo there; exec sleep 1000";
    case.start(&member("one", 160).script(script), "one");
    let seen = "until [ \"$(stat -c %s /bound/x)\" = 167772160 ]; do sleep 1; done; \
        fallocate -l 8m /own/y && fallocate -l 2m /own/z 2>/dev/null || echo over; rm /own/y /own/z";
    let outcome = case.run(&member("two", 8).script(seen));
    assert_eq!(
        (outcome.status, outcome.text()),
        (0, "over\n"),
        "{outcome:?}"
    );
    if case::runtime() == "caisson" {
        case.run(&member("three", 512).script("true"))
            .is_refusal("reserve huge pages: the virtual machine would need");
        let total = "grep HugePages_Total /proc/meminfo | tr -s ' '";
        assert_eq!(case.exec("one", total).text(), "HugePages_Total: 80\n");
    }
    case.exec("one", "rm /bound/x");
    case.call(["kill", "one", "KILL"]).succeed();
    case.wait("one");
    case.delete("one");
    case.delete("holder");
    drop(pages);
    case.nothing_is_left();
}
