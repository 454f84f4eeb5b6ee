//! QEMU's microvm with a shared root file system: QEMU, Debian's virtiofsd, the bundle's own files.
//!
//! Both as they come, without options that make them faster or slower (extended attributes, which caisson has, are off in
//! virtiofsd without a word). The container's program is started by a script as
//! PID 1, and speaks through the serial line.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::subject::{MACHINE, Place, WORDS};

/// The socket between QEMU and the server.
const SOCKET: &str = "virtiofsd.socket";

/// What the script says of a program that failed, before its status.
pub(crate) const FAILED: &str = "failed: status";

/// Starts the server of the bundle's root file system.
pub(crate) fn serve(place: &Place, bundle: &Path) -> io::Result<Child> {
    let rootfs = bundle.join("rootfs");
    let script = rootfs.join("init");
    let program = place.arguments()?;
    let words: Vec<String> = program.iter().map(|word| format!("'{word}'")).collect();
    let text = format!(
        "#!/bin/sh\nexport HOME=/root\nmount -t proc proc /proc\nmount -t devtmpfs dev /dev\n{} || echo {FAILED} $?\nexec reboot -f\n",
        words.join(" ")
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let socket = place.dir.join(SOCKET);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Listening before either starts, so that nobody has to try again.
    let listener = UnixListener::bind(&socket)?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let mut command = Command::new("/usr/lib/qemu/virtiofsd");
    command.arg(format!(
        "--fd={}",
        std::os::fd::AsRawFd::as_raw_fd(&listener)
    ));
    command
        .arg("-o")
        .arg(format!("source={}", rootfs.display()));
    // It complains when QEMU ends, as it has to.
    command.args(["-o", "xattr"]).stderr(Stdio::null()).spawn()
}

/// QEMU's arguments.
pub(crate) fn arguments(place: &Place) -> Vec<String> {
    let arguments = format!(
        "-accel kvm -cpu host -M {MACHINE},isa-serial=on,memory-backend=memory -m 256 -smp 1 -nodefaults -no-user-config \
         -display none -no-reboot -serial stdio -global virtio-mmio.force-legacy=false -object memory-backend-memfd,id=memory,size=256M,share=on \
         -chardev socket,id=share,path={} -device vhost-user-fs-device,chardev=share,tag=share -kernel {}",
        place.dir.join(SOCKET).display(),
        place.dir.join("vmlinux").display(),
    );
    let words = format!(
        "{WORDS} console=ttyS0 8250.nr_uarts=1 rootfstype=virtiofs root=share rw init=/init"
    );
    let list = arguments.split_whitespace().map(str::to_owned);
    list.chain(["-append".to_owned(), words]).collect()
}
