//! virtio-mmio devices by number: drivers bound and unbound, and what a driver made of a device.
//!
//! A device that was of no kind when the kernel booted has no driver: the kernel looked at it once and left it alone.
//! Writing its name to the driver's `bind` makes the kernel look again; the device's own driver has taken it up when that
//! returns.

use std::path::PathBuf;
use std::{fs, io};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";
/// Of a device's status (virtio 1.2, 2.1).
const DRIVER_OK: u32 = 4;

fn name(device: u32) -> String {
    format!("virtio-mmio.{device}")
}

/// Has the kernel look at a device, unless it has taken it up already (`false`). A driver that has not seen that the host
/// took its device out, and put another one in, is taken away first.
pub(crate) fn bind(device: u32) -> io::Result<bool> {
    if let Some(taken_up) = directory(device)? {
        if is_driven(&fs::read_to_string(taken_up.join("status"))?) {
            return Ok(false);
        }
        unbind(device)?;
    }
    fs::write(format!("{DRIVER}/bind"), name(device))?;
    Ok(true)
}

/// Whether the device knows that it has a driver: its status register as the kernel prints it, `0x0000000f`. That of a new
/// device is zero.
fn is_driven(status: &str) -> bool {
    let digits = status.trim_end().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|status| status & DRIVER_OK != 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_device_has_no_driver_whatever_the_kernel_believes() {
        assert!(is_driven("0x0000000f\n") && is_driven("0x0000004f\n"));
        assert!(
            !["0x00000000\n", "0x00000083\n", ""]
                .map(is_driven)
                .contains(&true)
        );
    }
}
