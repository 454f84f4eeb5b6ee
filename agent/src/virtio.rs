//! virtio-mmio devices by number: drivers bound and unbound, and what a driver made of a device.
//!
//! A device that was of no kind when the kernel booted has no driver: the kernel looked at it once and left it alone.
//! Writing its name to the driver's `bind` makes the kernel look again; the device's own driver has taken it up when that
//! returns.

use std::path::PathBuf;
use std::{fs, io};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

fn name(device: u32) -> String {
    format!("virtio-mmio.{device}")
}

/// Has the kernel look at a device, unless it has taken it up already.
pub(crate) fn bind(device: u32) -> io::Result<()> {
    if directory(device)?.is_some() {
        return Ok(());
    }
    fs::write(format!("{DRIVER}/bind"), name(device))
}

/// Takes the driver away, and what it made with it. Without a driver there is nothing to do.
pub(crate) fn unbind(device: u32) -> io::Result<()> {
    match fs::write(format!("{DRIVER}/unbind"), name(device)) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// The directory of the first thing of that class (`net`, `block`) that the driver made of a device.
pub(crate) fn made(device: u32, class: &str) -> io::Result<PathBuf> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let directory = directory(device)?.ok_or_else(missing)?;
    child(directory.join(class), |_| true)?.ok_or_else(missing)
}

/// The directory of the virtio device that the driver made of the platform's.
fn directory(device: u32) -> io::Result<Option<PathBuf>> {
    child(PathBuf::from(DEVICES).join(name(device)), |name| {
        name.strip_prefix("virtio")
            .is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    })
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
