//! Series with a line for each disk and direction, and for each interface.
//!
//! Contract: a disk is known by its numbers, as the side that counts it knows it: the guest's disks are others than the
//! host's, and what a container reads from the shared directory is no disk's in the guest.

use std::fmt::Write;

use super::{Counted, heading};
use crate::{
    network::Traffic,
    stats::{Blkio, BlkioEntry},
};

/// How many there are.
#[cfg(test)]
pub(super) const SERIES: usize = DISKS.len() + INTERFACES.len();

/// Name, meaning, and the numbers of all disks.
type OfDisks = (&'static str, &'static str, fn(&Blkio) -> &[BlkioEntry]);

const DISKS: [OfDisks; 2] = [
    (
        "caisson_disk_bytes_total",
        "Bytes read and written, by disk",
        |disks| &disks.io_service_bytes_recursive,
    ),
    (
        "caisson_disk_operations_total",
        "Reads and writes, by disk",
        |disks| &disks.io_serviced_recursive,
    ),
];

/// Name, meaning, and the number of an interface.
type OfInterface = (&'static str, &'static str, fn(&Traffic) -> u64);

const INTERFACES: [OfInterface; 6] = [
    (
        "caisson_network_receive_bytes_total",
        "Bytes to the guest",
        |it| it.received.bytes,
    ),
    (
        "caisson_network_receive_packets_total",
        "Packets to the guest",
        |it| it.received.packets,
    ),
    (
        "caisson_network_receive_dropped_total",
        "Packets that the guest did not take",
        |it| it.received.dropped,
    ),
    (
        "caisson_network_transmit_bytes_total",
        "Bytes from the guest",
        |it| it.sent.bytes,
    ),
    (
        "caisson_network_transmit_packets_total",
        "Packets from the guest",
        |it| it.sent.packets,
    ),
    (
        "caisson_network_transmit_dropped_total",
        "Packets from the guest that were not let through",
        |it| it.sent.dropped,
    ),
];

/// All of them.
pub(super) fn write(out: &mut String, counted: &[Counted]) {
    for (name, meaning, numbers) in DISKS {
        heading(out, name, "counter", meaning);
        for container in counted {
            for (side, stats) in container.sides() {
                for entry in numbers(&stats.blkio) {
                    disk(out, name, &container.labels, side, entry);
                }
            }
        }
    }
    for (name, meaning, number) in INTERFACES {
        heading(out, name, "counter", meaning);
        for Counted {
            labels, traffic, ..
        } in counted
        {
            for interface in traffic {
                let value = number(interface);
                let interface = super::escaped(&interface.interface);
                // A String takes everything.
                let _ = writeln!(
                    out,
                    "{name}{{{labels},interface=\"{interface}\",side=\"host\"}} {value}"
                );
            }
        }
    }
}

fn disk(out: &mut String, name: &str, labels: &str, side: &str, entry: &BlkioEntry) {
    let BlkioEntry {
        major,
        minor,
        op,
        value,
    } = entry;
    let operation = super::escaped(&op.to_lowercase());
    let _ = writeln!(
        out,
        "{name}{{{labels},device=\"{major}:{minor}\",operation=\"{operation}\",side=\"{side}\"}} {value}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{network::Passed, state::Status, stats::Stats};

    #[test]
    fn each_disk_and_interface_has_lines_of_its_own() {
        let mut guest = Stats::default();
        guest.blkio.io_service_bytes_recursive = vec![BlkioEntry {
            major: 254,
            minor: 16,
            op: "Read".into(),
            value: 4096,
        }];
        let passed = |bytes| Passed {
            bytes,
            packets: 2,
            dropped: 1,
        };
        let counted = [Counted {
            labels: "container=\"a\"".to_owned(),
            status: Status::Running,
            guest: Some(Box::new(guest)),
            host: None,
            traffic: vec![Traffic {
                interface: "eth0".into(),
                received: passed(100),
                sent: passed(200),
            }],
        }];
        let mut text = String::new();
        write(&mut text, &counted);
        for line in [
            "# TYPE caisson_disk_bytes_total counter",
            "caisson_disk_bytes_total{container=\"a\",device=\"254:16\",operation=\"read\",side=\"guest\"} 4096",
            "caisson_network_receive_bytes_total{container=\"a\",interface=\"eth0\",side=\"host\"} 100",
            "caisson_network_transmit_bytes_total{container=\"a\",interface=\"eth0\",side=\"host\"} 200",
            "caisson_network_transmit_dropped_total{container=\"a\",interface=\"eth0\",side=\"host\"} 1",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in {text}");
        }
    }
}
