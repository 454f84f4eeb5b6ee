//! What a seccomp profile must say to notify, in runc's words (libcontainer/seccomp).
//!
//! Not here: everything else in a profile, which the guest's agent compiles.

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction::ScmpActNotify};

/// The rule that is broken, if one is.
pub(super) fn check(profile: &LinuxSeccomp) -> Result<(), &'static str> {
    // A process must be able to tell of its listener before anybody can answer.
    if profile.default_action() == ScmpActNotify {
        return Err("SCMP_ACT_NOTIFY cannot be used as default action");
    }
    let rules = profile.syscalls().iter().flatten();
    let mut notifying = rules
        .filter(|rule| rule.action() == ScmpActNotify)
        .peekable();
    if notifying.peek().is_none() {
        return Ok(());
    }
    if notifying.any(|rule| rule.names().iter().any(|name| name == "write")) {
        return Err("SCMP_ACT_NOTIFY cannot be used for the write syscall");
    }
    match profile.listener_path() {
        Some(path) if !path.as_os_str().is_empty() => Ok(()),
        _ => Err("seccomp listenerPath is not set"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    fn check(profile: Value) -> Result<(), &'static str> {
        super::check(&serde_json::from_value(profile).unwrap())
    }

    fn notifying(names: &[&str]) -> Value {
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ERRNO"},
            {"names": names, "action": "SCMP_ACT_NOTIFY"}]})
    }

    #[test]
    fn what_notifies_needs_a_supervisor_and_must_let_write_through() {
        let mut profile = notifying(&["mkdir", "read"]);
        assert_eq!(
            check(profile.clone()),
            Err("seccomp listenerPath is not set")
        );
        profile["listenerPath"] = json!("/run/s");
        assert_eq!(check(profile), Ok(()));
        assert!(
            check(notifying(&["mkdir", "write"]))
                .unwrap_err()
                .contains("write")
        );
        let default = json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/run/s"});
        assert!(check(default).unwrap_err().contains("default action"));
    }

    #[test]
    fn a_supervisor_of_what_does_not_notify_is_passed_over() {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/nowhere"});
        assert_eq!(check(profile), Ok(()));
    }
}
