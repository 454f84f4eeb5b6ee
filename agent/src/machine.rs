//! The size of the machine as the guest's kernel uses it: memory that the host offers, CPUs that are online.
//!
//! Contract: memory is taken and given back by the kernel's driver as the host asks its device; this module decides where it
//! goes (what containers use can be given back, so most of it may hold that alone) and binds the driver when there is
//! something to drive. A CPU that the kernel does not know is an error.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(crate) struct MachineError {
    step: String,
    source: io::Error,
}

/// Written before the driver is bound: new memory is used at once, by the kernel itself only as far as its share of all
/// memory asks for that.
const POLICY: [(&str, &str); 2] = [
    (
        "/sys/module/memory_hotplug/parameters/online_policy",
        "auto-movable",
    ),
    ("/sys/devices/system/memory/auto_online_blocks", "online"),
];
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const CPUS: &str = "/sys/devices/system/cpu";

/// Has the kernel use the memory of device `virtio-mmio.<device>`.
pub(crate) fn use_memory(device: u32) -> Result<(), MachineError> {
    let name = format!("virtio-mmio.{device}");
    if Path::new(DRIVER).join(&name).exists() {
        return Ok(());
    }
    for (file, value) in POLICY {
        write(Path::new(file), value)?;
    }
    write(&Path::new(DRIVER).join("bind"), &name)
}

/// Has CPUs 0 to `count - 1` run, and no others.
pub(crate) fn run_on(count: u32) -> Result<(), MachineError> {
    for (number, file) in switches()? {
        let wanted = if number < count { "1" } else { "0" };
        let is = fs::read_to_string(&file).unwrap_or_default();
        if is.trim_end() != wanted {
            write(&file, wanted)?;
        }
    }
    let last = Path::new(CPUS).join(format!("cpu{}", count.saturating_sub(1)));
    if last.exists() {
        Ok(())
    } else {
        Err(MachineError {
            step: format!("bring {count} CPUs online"),
            source: io::ErrorKind::NotFound.into(),
        })
    }
}

/// The CPUs that can be switched: all but the first.
fn switches() -> Result<Vec<(u32, PathBuf)>, MachineError> {
    let failed = |source| MachineError {
        step: format!("list {CPUS}"),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(CPUS).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu"));
        let switch = entry.path().join("online");
        if let Some(number) = number.and_then(|number| number.parse().ok())
            && switch.exists()
        {
            found.push((number, switch));
        }
    }
    found.sort();
    Ok(found)
}

fn write(file: &Path, value: &str) -> Result<(), MachineError> {
    fs::write(file, value).map_err(|source| MachineError {
        step: format!("write {value:?} to {}", file.display()),
        source,
    })
}
