//! The kernel's log as the agent's only log: what is written there reaches the VMM's console.
//!
//! Contract: one line a message; a log that cannot be written is ignored.

use std::fs::OpenOptions;
use std::io::Write;

/// Logs an error (kernel level 3).
pub fn error(message: &str) {
    write(3, message);
}

/// Logs what ends the guest (kernel level 0).
pub fn emergency(message: &str) {
    write(0, message);
}

fn write(level: u8, message: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let line = message.replace('\n', "; ");
        // One write is one record; the kernel takes at most a thousand bytes of it.
        let _ = log.write_all(format!("<{level}>caisson-agent: {line}\n").as_bytes());
    }
}
