//! The agent: PID 1 of the guest. It turns an OCI specification into a running process.
//!
//! [`guest`] makes the machine ready and dials the host; [`service`] answers the host's calls over that connection;
//! [`plan`] decides what a specification means; [`child`], this binary executed again, carries a plan out and becomes
//! the process; [`reaper`] notices the end. One thread serves all containers of the sandbox; only disks, for which the
//! kernel waits, have their drivers bound on threads of their own.
//!
//! The library exists so that tests can serve the same agent over a Unix socket.

pub mod cgroup;
pub mod child;
mod container;
mod devices;
mod disks;
pub mod guest;
mod huge_pages;
mod inspect;
pub mod kmsg;
mod listening;
mod machine;
mod network;
mod notify;
pub mod plan;
pub mod power;
mod process;
pub mod reaper;
pub mod service;
pub mod socket;
mod stdio;
mod supervision;
mod sys;
mod virtio;
mod volumes;

/// An error and its causes, as one line.
pub(crate) fn error_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = match e.downcast_ref::<std::io::Error>() {
            Some(io) => os_error_text(io),
            None => e.to_string(),
        };
        line.push_str(": ");
        line.push_str(&text);
        cause = e.source();
    }
    line
}

/// The kernel's words alone, in lower case, as Go programs print them.
fn os_error_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => {
            let plain = text
                .strip_suffix(&format!(" (os error {code})"))
                .unwrap_or(&text);
            let mut letters = plain.chars();
            letters.next().map_or_else(String::new, |first| {
                first.to_lowercase().chain(letters).collect()
            })
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_with_its_causes_in_gos_words() {
        #[derive(Debug, thiserror::Error)]
        #[error("mkdir /x")]
        struct Step(#[source] std::io::Error);
        let error = Step(std::io::Error::from_raw_os_error(libc::EROFS));
        assert_eq!(error_line(&error), "mkdir /x: read-only file system");
    }
}
