//! The kernel's command line: what the machine must say about itself, then the owner's words.

use crate::bus::{DEVICE_BYTES, device_base};

/// The kernel's own limit (`COMMAND_LINE_SIZE` on x86), with the final zero byte.
pub const MAX_BYTES: usize = 2048;

/// Words of every machine, each with its reason.
const ALWAYS: &[(&str, &str)] = &[
    (
        "panic=-1",
        "a panic resets at once, and the VMM reads its message off the console",
    ),
    (
        "reboot=k",
        "reset through the keyboard controller, the one way this machine has",
    ),
    (
        "tsc=reliable",
        "kvm-clock vouches for it: no watchdog timer",
    ),
    (
        "rcupdate.rcu_expedited=1",
        "grace periods while booting cost no waiting",
    ),
    (
        "noreplace-smp",
        "with one vCPU the kernel would patch the lock prefix out of 8,000 places, a page table switch each, and back with the \
         second",
    ),
];

/// Words without a debug console: only what is critical reaches the port (an oops raises the level itself), because a
/// byte costs two exits and every boot has an error to tell: that it has no console.
const QUIET: &str = "loglevel=3 earlyprintk=serial,0x3f8,keep";
/// Words with one.
const CONSOLE: &str = "console=ttyS0 8250.nr_uarts=1";

/// The command line for devices with these interrupts, in slots of their order. `cpus`: how many of the processors are to
/// run at boot, if not all.
pub fn build(interrupts: &[u8], cpus: Option<u8>, console: bool, extra: &str) -> String {
    let mut words: Vec<String> = ALWAYS
        .iter()
        .map(|(word, _reason)| (*word).to_owned())
        .collect();
    words.push(if console { CONSOLE } else { QUIET }.to_owned());
    words.extend(cpus.map(|cpus| format!("maxcpus={cpus}")));
    for (slot, interrupt) in interrupts.iter().enumerate() {
        let (size, base) = (DEVICE_BYTES >> 10, device_base(slot));
        words.push(format!("virtio_mmio.device={size}K@{base:#x}:{interrupt}"));
    }
    if !extra.is_empty() {
        words.push(extra.to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_in_order_and_the_owners_words_come_last() {
        let line = build(&[5, 6], None, false, "noxsave");
        assert!(line.contains(
            "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 noxsave"
        ));
        assert!(
            line.ends_with(" noxsave") && line.contains("earlyprintk") && !line.contains("ttyS0")
        );
        assert!(build(&[], None, true, "").ends_with("console=ttyS0 8250.nr_uarts=1"));
        assert!(build(&[], Some(2), true, "").ends_with(" maxcpus=2"));
    }
}
