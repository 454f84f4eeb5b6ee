//! Many times, and many at once.

use std::time::Duration;

use caisson_tests::Case;

#[test]
fn fifty_lives_in_a_row_leave_nothing() {
    // Three seconds each on an emulated processor that nobody else uses.
    let case = Case::begin_within(Duration::from_secs(900));
    let bundle = case.bundle().args(["true"]);
    for _ in 0..50 {
        case.create(&bundle, "one");
        case.call(["start", "one"]).succeed();
        case.wait("one");
        case.call(["delete", "one"]).succeed();
    }
    case.nothing_is_left();
}

#[test]
fn eight_containers_at_once_leave_nothing() {
    let case = Case::begin();
    let ids: Vec<String> = (0..8).map(|n| format!("box-{n}")).collect();
    let bundles: Vec<_> = ids
        .iter()
        .map(|id| case.bundle_in(id).args(["sleep", "1000"]))
        .collect();
    let creating: Vec<_> = ids
        .iter()
        .zip(&bundles)
        .map(|(id, bundle)| case.create_call(bundle, id).start())
        .collect();
    for call in creating {
        let outcome = call.finish();
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    }
    for id in &ids {
        case.call(["start", id]).succeed();
    }
    let listed = case.call(["list", "-q"]).succeed();
    assert_eq!(listed.text().lines().count(), 8);
    for id in &ids {
        assert_eq!(case.exec(id, "echo $((6 * 7))").text(), "42\n");
    }
    let deleting: Vec<_> = ids
        .iter()
        .map(|id| case.call(["delete", "--force", id]).start())
        .collect();
    for call in deleting {
        assert_eq!(call.finish().status, 0);
    }
    case.nothing_is_left();
}
