//! The lab's disk images: Debian packages, unpacked without their maintainer scripts, in an ext4 file.
//!
//! There is one image for each [`Flavour`], which says what is in it; all boot the same kernel.
//! Nothing is installed on this machine except the few tools of [`TOOLS`] that are missing. The image is cached under
//! the hash of its inputs: this recipe, and the names, versions and checksums of all packages.
//! Not here: where packages come from (`archive.rs`).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::archive::Archive;
use crate::flavour::Flavour;

/// What the image is made by; another recipe makes another image.
const RECIPE: &str = concat!(include_str!("image.rs"), include_str!("flavour.rs"));

/// Modules that are loaded at boot; all others of the kernel are there to be loaded on demand.
const MODULES: &[&str] = &[
    "virtio_pci",
    "irqbypass",
    "kvm",
    "kvm-amd",
    "fuse",
    "virtiofs",
    "overlay",
    "tun",
    "veth",
    "bridge",
    "loop",
    "virtio_console",
];

/// Programs this needs and the packages that have them.
const TOOLS: &[(&str, &str)] = &[
    ("/usr/bin/qemu-system-x86_64", "qemu-system-x86"),
    ("/usr/lib/qemu/virtiofsd", "qemu-system-common"),
    ("/sbin/mke2fs", "e2fsprogs"),
    ("/sbin/depmod", "kmod"),
    ("/usr/bin/xz", "xz-utils"),
];

/// Size of the empty disk at `/scratch`, in GiB; the file is sparse.
const SCRATCH_GIB: u32 = 24;

/// The files a lab boots from.
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) scratch: PathBuf,
}

/// The image, built if it is not in the cache.
pub(crate) fn image(flavour: Flavour) -> io::Result<Image> {
    install_tools()?;
    let cache = cache_directory()?;
    let archive = Archive::open(&cache, flavour)?;
    let mut packages = archive.packages(RECIPE)?;
    let mut dir = directory(&cache, &packages)?;
    if !dir.exists() {
        eprintln!("lab: downloading {} packages", packages.lines().count());
        if archive.download().is_err() {
            // The archive has newer ones by now.
            archive.update()?;
            packages = archive.packages(RECIPE)?;
            dir = directory(&cache, &packages)?;
            archive.download()?;
        }
        let work = cache.join(format!("work-{}", std::process::id()));
        let built = build(&work, &archive.files(), &packages, flavour);
        let built = built.and_then(|()| fs::rename(work.join("out"), &dir));
        fs::remove_dir_all(&work)?;
        // Another lab may have built the same image meanwhile.
        if !dir.exists() {
            built?;
        }
    }
    Ok(Image {
        kernel: dir.join("vmlinuz"),
        root: dir.join("root.ext4"),
        scratch: dir.join("scratch.ext4"),
    })
}

/// Where the image of these packages is.
fn directory(cache: &Path, packages: &str) -> io::Result<PathBuf> {
    let hash = hash(&format!("{RECIPE}{packages}"))?;
    Ok(cache.join(format!("image-{hash}")))
}

fn cache_directory() -> io::Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let base = var("CAISSON_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("caisson")))
        .or_else(|| Some(var("HOME")?.join(".cache/caisson")))
        .ok_or_else(|| io::Error::other("no HOME to cache the lab's image in"))?;
    let dir = base.join("lab");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn install_tools() -> io::Result<()> {
    let missing = TOOLS
        .iter()
        .filter(|(program, _)| !Path::new(program).exists());
    let packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("lab: installing {}", packages.join(" "));
    let install = ["install", "-y", "--no-install-recommends"];
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(install)
        .args(&packages))
}

/// Makes the image's files in `work/out`.
fn build(work: &Path, archives: &Path, packages: &str, flavour: Flavour) -> io::Result<()> {
    let (root, out) = (work.join("root"), work.join("out"));
    fs::create_dir_all(&out)?;
    let names: Vec<&str> = packages
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    let Some((kernel, closure)) = names.split_first() else {
        return Err(io::Error::other("apt resolved no packages"));
    };

    for dir in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(dir))?;
        symlink(format!("usr/{dir}"), root.join(dir))?;
    }
    for (index, name) in closure.iter().enumerate() {
        if index % 20 == 0 {
            eprintln!("lab: unpacking package {} of {}", index + 1, names.len());
        }
        unpack(&archives.join(name), &root, flavour)?;
    }
    unpack(&archives.join(kernel), &root, flavour)?;
    configure(&root, flavour)?;
    install_kernel(&root, &out.join("vmlinuz"))?;
    eprintln!("lab: writing the disk image");
    let room = "4G";
    make_ext4(
        &out.join("root.ext4"),
        room,
        &["-d".as_ref(), root.as_os_str()],
    )?;
    make_ext4(&out.join("scratch.ext4"), &format!("{SCRATCH_GIB}G"), &[])
}

fn unpack(package: &Path, root: &Path, flavour: Flavour) -> io::Result<()> {
    let mut data = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut tar = Command::new("tar");
    tar.args(["-xf", "-", "--keep-directory-symlink"])
        .arg("-C")
        .arg(root);
    tar.args(
        flavour
            .excluded()
            .map(|pattern| format!("--exclude={pattern}")),
    );
    run(tar.stdin(data.stdout.take().map_or_else(Stdio::null, Stdio::from)))?;
    let status = data.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(failed("dpkg-deb", &status.to_string()))
    }
}

/// Does what maintainer scripts would have done, as far as the lab needs it.
fn configure(root: &Path, flavour: Flavour) -> io::Result<()> {
    for dir in [
        "proc", "sys", "dev", "run", "tmp", "root", "mnt", "scratch", "var/tmp", "var/log", "etc",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    for sticky in ["tmp", "var/tmp"] {
        fs::set_permissions(root.join(sticky), fs::Permissions::from_mode(0o1777))?;
    }
    for (path, mode, content) in flavour.files() {
        if let Some(dir) = root.join(path).parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(root.join(path), content)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode))?;
    }
    let _ = symlink("/proc/self/mounts", root.join("etc/mtab"));
    let _ = symlink("bash", root.join("usr/bin/sh"));
    let _ = symlink("gawk", root.join("usr/bin/awk"));
    for (name, target) in flavour.links() {
        symlink(target, root.join("usr").join(name))?;
    }
    if flavour.has_systemd() {
        // The address of the system's bus is there.
        let run = root.join("var/run");
        fs::remove_dir_all(&run)?;
        symlink("/run", run)?;
    }
    let busybox = root.join("usr/bin/busybox");
    for applet in output(Command::new(&busybox).arg("--list"))?.lines() {
        let present = ["bin", "sbin"]
            .iter()
            .any(|dir| root.join("usr").join(dir).join(applet).exists());
        if !present {
            symlink("busybox", root.join("usr/bin").join(applet))?;
        }
    }
    Ok(())
}

/// Takes the kernel out of `/boot`; decompresses the modules of the boot and lists them in load order.
fn install_kernel(root: &Path, vmlinuz: &Path) -> io::Result<()> {
    let modules = root.join("usr/lib/modules");
    let version = fs::read_dir(&modules)?
        .next()
        .ok_or_else(|| io::Error::other("no kernel modules"))??;
    let version = version.file_name().to_string_lossy().into_owned();
    fs::copy(
        root.join("boot").join(format!("vmlinuz-{version}")),
        vmlinuz,
    )?;
    fs::remove_dir_all(root.join("boot"))?;

    let depmod = || {
        run(Command::new("/sbin/depmod")
            .arg("-b")
            .arg(root)
            .arg(&version))
    };
    let closure = |module: &&str| {
        let mut modprobe = Command::new("/sbin/modprobe");
        modprobe
            .arg("-d")
            .arg(root)
            .args(["-S", &version, "--show-depends", module]);
        output(&mut modprobe)
    };
    depmod()?;
    let listing: String = MODULES.iter().map(closure).collect::<io::Result<_>>()?;
    let mut load = String::new();
    for file in listing
        .lines()
        .filter_map(|line| line.strip_prefix("insmod "))
    {
        let file = file.trim();
        let plain = file.trim_end_matches(".xz");
        if plain != file && Path::new(file).exists() {
            run(Command::new("xz").args(["--decompress", file]))?;
        }
        let inside = plain
            .strip_prefix(&*root.to_string_lossy())
            .unwrap_or(plain);
        if !load.lines().any(|line| line == inside) {
            load += &format!("{inside}\n");
        }
    }
    depmod()?;
    fs::write(modules.join("lab.load"), load)
}

fn make_ext4(file: &Path, size: &str, more: &[&std::ffi::OsStr]) -> io::Result<()> {
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-E",
        "lazy_itable_init=1,root_owner=0:0",
    ]);
    run(mke2fs.args(more).arg(file).arg(size))
}

/// Runs a command that has to succeed.
pub(crate) fn run(command: &mut Command) -> io::Result<()> {
    let status = command.stdout(io::stderr()).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(failed(&name(command), &status.to_string()))
    }
}

/// What a command prints that has to succeed.
pub(crate) fn output(command: &mut Command) -> io::Result<String> {
    let output = command.stderr(Stdio::piped()).output()?;
    if output.status.success() {
        String::from_utf8(output.stdout).map_err(io::Error::other)
    } else {
        Err(failed(
            &name(command),
            String::from_utf8_lossy(&output.stderr).trim(),
        ))
    }
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn failed(program: &str, why: &str) -> io::Error {
    io::Error::other(format!("{program}: {why}"))
}

/// The first 16 digits of the text's SHA-256.
pub(crate) fn hash(text: &str) -> io::Result<String> {
    let mut sum = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = sum.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let output = sum.wait_with_output()?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .chars()
        .take(16)
        .collect())
}
