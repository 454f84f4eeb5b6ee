//! virtio-mmio devices by number: which interface a device is, and drivers bound and unbound.
//!
//! A device that was of no kind when the kernel booted has no driver: the kernel looked at it once and left it alone.
//! Writing its name to the driver's `bind` makes the kernel look again.

use super::NetworkError;
use std::path::PathBuf;
use std::{fs, io};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

fn name(device: u32) -> String {
    format!("virtio-mmio.{device}")
}

fn failed(device: u32, step: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Device {
        device,
        step,
        source,
    }
}

/// The number of the device's interface in this namespace; its driver is bound first if it has none.
pub(super) fn interface_of(device: u32) -> Result<u32, NetworkError> {
    if virtio(device)?.is_none() {
        fs::write(format!("{DRIVER}/bind"), name(device))
            .map_err(failed(device, "bind the driver"))?;
    }
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let found = virtio(device)?
        .ok_or_else(missing)
        .and_then(|virtio| child(virtio.join("net"), |_| true)?.ok_or_else(missing));
    let interface = found.map_err(failed(device, "find the interface"))?;
    let index = fs::read_to_string(interface.join("ifindex"))
        .and_then(|text| text.trim().parse().map_err(io::Error::other));
    index.map_err(failed(device, "read the interface's number"))
}

/// Takes the driver away, and the interface with it, in whatever namespace it is. Without a driver there is nothing to do.
pub(super) fn unbind(device: u32) -> Result<(), NetworkError> {
    match fs::write(format!("{DRIVER}/unbind"), name(device)) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.map_err(failed(device, "unbind the driver")),
    }
}

/// The directory of the virtio device that the driver made of the platform's.
fn virtio(device: u32) -> Result<Option<PathBuf>, NetworkError> {
    let dir = PathBuf::from(DEVICES).join(name(device));
    child(dir, |name| {
        name.strip_prefix("virtio")
            .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    })
    .map_err(failed(device, "look at it"))
}

fn child(dir: PathBuf, wanted: impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
