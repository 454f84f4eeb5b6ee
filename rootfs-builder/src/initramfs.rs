//! What the initial root holds.
//!
//! Contract: exactly what the agent's `guest::prepare` and a container's root need to be mounted upon; the rest of the
//! guest's file system comes over the share.

use crate::cpio::{Archive, CpioError};

/// Directories, parents first.
const DIRECTORIES: &[&str] = &[
    "dev",
    "proc",
    "sys",
    "run",
    "run/caisson",
    // Each container attaches its root here, in its own mount namespace.
    "run/caisson/root",
    // The sandbox's shared directory (caisson-agent-api, SHARE_MOUNT).
    "run/caisson/share",
    // Memory that the containers of a pod share (caisson-agent-api, SHM_MOUNT).
    "run/caisson/shm",
    // What stands for volumes that change (caisson-agent-api, VOLUMES_MOUNT).
    "run/caisson/volumes",
];

/// The kernel opens /dev/console for PID 1 and complains, byte by byte over the emulated port, when it cannot: there is
/// no console driver by default. The agent writes to the kernel's log only, so its streams may be the null device.
/// The kernel's built-in archive has made a real console there already, and only an entry of another type replaces what
/// is there: hence a file first.
const CONSOLE: (&str, (u32, u32)) = ("dev/console", (1, 3));

/// The archive with this agent.
pub fn build(agent: &[u8]) -> Result<Vec<u8>, CpioError> {
    let mut archive = Archive::default();
    for name in DIRECTORIES {
        archive.directory(name, 0o755)?;
    }
    let (name, device) = CONSOLE;
    archive.file(name, 0o600, &[])?;
    archive.device(name, 0o600, device)?;
    archive.file("init", 0o755, agent)?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        let agent: Vec<u8> = (0..=255).cycle().take(70_001).collect();
        assert_eq!(build(&agent).unwrap(), build(&agent).unwrap());
        assert_ne!(build(&agent).unwrap(), build(&agent[1..]).unwrap());
    }

    #[test]
    fn the_bytes_are_those_of_every_other_day_and_machine() {
        let bytes = build(b"agent").unwrap();
        // FNV-1a: if this changes, so does every initramfs; then it is meant to.
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        assert_eq!((bytes.len(), hash), (1600, 15_972_578_998_560_638_554));
    }

    #[test]
    fn parents_come_before_children() {
        for (place, name) in DIRECTORIES.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(DIRECTORIES[..place].contains(&parent), "{name}");
            }
        }
    }
}
