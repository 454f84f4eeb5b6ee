//! What is measured: the programs that run the bundle, and the place where they do.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use caisson_tests::ruler::now;
use serde_json::{Value, json};

use crate::virtiofs;

/// The machine that QEMU is asked for: as little as it can be.
pub(crate) const MACHINE: &str = "microvm,x-option-roms=off,pic=off,pit=off,rtc=off,acpi=off";

/// What QEMU's guests have on the kernel's command line.
pub(crate) const WORDS: &str = "panic=-1 reboot=t quiet noxsave";

/// A program that can run the bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// `true` itself, as a floor.
    Bare,
    /// crun.
    Crun,
    /// runc.
    Runc,
    /// caisson.
    Caisson,
    /// QEMU's microvm with caisson's guest kernel, the program in an initramfs of its own, no shared files.
    Microvm,
    /// The same with the bundle's root file system as its root, shared by QEMU's virtiofsd.
    MicrovmShare,
}

/// Environment variable with more lines for caisson's configuration.
const CONFIGURATION: &str = "BENCH_CONFIG";

/// How long the root file system has been as it is when the first subject starts.
const QUIET: Duration = Duration::from_secs(3);

/// One run: readings of the monotonic clock in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Just before `fork`.
    pub(crate) start: u64,
    /// When the first byte of output arrived; the end, if there was none.
    pub(crate) output: u64,
    /// When the program had been waited for.
    pub(crate) end: u64,
}

impl Run {
    /// The whole of it.
    pub(crate) fn nanos(self) -> u64 {
        self.end - self.start
    }
}

/// Directories and files that the subjects need.
#[derive(Debug)]
pub(crate) struct Place {
    /// Scratch directory.
    pub(crate) dir: PathBuf,
}

impl Subject {
    /// All of them, cheapest first.
    pub(crate) fn all() -> [Self; 6] {
        [
            Self::Bare,
            Self::Crun,
            Self::Runc,
            Self::Caisson,
            Self::Microvm,
            Self::MicrovmShare,
        ]
    }

    /// Name in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bare => "`true` without a container",
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Caisson => "caisson",
            Self::Microvm => "QEMU microvm, same kernel, program in the initramfs",
            Self::MicrovmShare => "QEMU microvm and virtiofsd",
        }
    }

    /// The program, without arguments.
    pub(crate) fn program(self, place: &Place) -> Command {
        let mut command = match self {
            Self::Bare => Command::new("/bin/busybox"),
            Self::Crun => Command::new("crun"),
            Self::Runc => Command::new("runc"),
            Self::Caisson => Command::new(place.dir.join("caisson")),
            Self::Microvm => Command::new("/usr/bin/qemu-system-x86_64-microvm"),
            // Debian's smaller program has no shared files.
            Self::MicrovmShare => Command::new("/usr/bin/qemu-system-x86_64"),
        };
        command.env("CAISSON_CONFIG", place.dir.join("config.toml"));
        command
    }

    /// The command that runs `bundle`, and the server that it needs.
    fn command(self, place: &Place, bundle: &Path) -> io::Result<(Command, Option<Child>)> {
        let mut command = self.program(place);
        let mut server = None;
        match self {
            Self::Bare => {
                command.arg("true");
            }
            Self::Microvm => {
                command.args(place.microvm()?);
            }
            Self::MicrovmShare => {
                server = Some(virtiofs::serve(place, bundle)?);
                command.args(virtiofs::arguments(place));
            }
            _ => {
                command.args(["run", "-b"]).arg(bundle).arg("bench");
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        Ok((command, server))
    }

    /// What a program costs from first to last, in nanoseconds; see [`lines`](Self::lines).
    pub(crate) fn whole(self, place: &Place, args: &[&str]) -> io::Result<u64> {
        let start = now();
        self.lines(place, args)?;
        Ok(now() - start)
    }

    /// Each line that a program prints, and when it arrived. It may write to its root file system and give files away.
    pub(crate) fn lines(self, place: &Place, args: &[&str]) -> io::Result<Vec<(String, u64)>> {
        let bundle = place.bundle(args)?;
        place.edit(|spec| {
            spec["root"]["readonly"] = json!(false);
            for set in ["bounding", "effective", "permitted"] {
                let names = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"];
                spec["process"]["capabilities"][set] = json!(names);
            }
        })?;
        let (mut command, server) = self.command(place, &bundle)?;
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let lines = BufReader::new(stdout).lines();
        // A terminal in between ends its lines with a carriage return.
        let lines = lines.map(|line| line.map(|line| (line.trim_end().to_owned(), now())));
        let mut lines: Vec<(String, u64)> = lines.collect::<io::Result<_>>()?;
        // The kernel's own last words.
        lines.retain(|(line, _)| !line.starts_with("reboot: "));
        let status = child.wait()?;
        end(server)?;
        let failed = lines
            .iter()
            .any(|(line, _)| line.starts_with(virtiofs::FAILED));
        if status.success() && !failed {
            Ok(lines)
        } else {
            let name = self.name();
            Err(io::Error::other(format!(
                "{name}: {args:?}: {status} {lines:?}"
            )))
        }
    }

    /// Runs the bundle's `true`, or `args` instead, and takes the time.
    pub(crate) fn run(self, place: &Place, args: &[&str]) -> io::Result<Run> {
        let bundle = place.bundle(if args.is_empty() { &["true"] } else { args })?;
        let (mut command, server) = self.command(place, &bundle)?;
        let start = now();
        let mut child = command.spawn()?;
        let mut byte = [0];
        let mut stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let some = stdout.read(&mut byte)? > 0;
        let output = now();
        io::copy(&mut stdout, &mut io::sink())?;
        let status = child.wait()?;
        let ended = now();
        end(server)?;
        if !status.success() {
            return Err(io::Error::other(format!("{}: {status}", self.name())));
        }
        Ok(Run {
            start,
            output: if some { output } else { ended },
            end: ended,
        })
    }
}

/// Ends a server whose only client has ended.
fn end(server: Option<Child>) -> io::Result<()> {
    if let Some(mut server) = server {
        server.kill()?;
        server.wait()?;
    }
    Ok(())
}

impl Place {
    /// Makes the bundle's root file system and caisson's configuration.
    pub(crate) fn prepare() -> io::Result<Self> {
        let dir = PathBuf::from("/scratch/bench");
        let bin = dir.join("bundle/rootfs/bin");
        fs::create_dir_all(&bin)?;
        for name in ["proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(dir.join("bundle/rootfs").join(name))?;
        }
        fs::copy("/bin/busybox", bin.join("busybox"))?;
        for applet in [
            "true", "echo", "sleep", "sh", "free", "mount", "reboot", "du",
        ] {
            let _ = std::os::unix::fs::symlink("busybox", bin.join(applet));
        }
        // Installed, as it were: on a local disk. The repository is on a file server outside of the lab, whose waits would
        // be counted.
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap_or(Path::new("/"));
        for file in ["vmlinux", "initramfs.cpio"] {
            fs::copy(repository.join("target/guest").join(file), dir.join(file))?;
        }
        for program in ["caisson", "caisson-vmm"] {
            let found = program_on_path(program)?;
            fs::copy(found, dir.join(program))?;
        }
        let place = Self { dir };
        place.configure(&std::env::var(CONFIGURATION).unwrap_or_default())?;
        // Nobody unpacks an image and starts it in the same second. caisson's guest asks again for what the host has
        // changed in the last two: a third more of a start's exits.
        std::thread::sleep(QUIET);
        Ok(place)
    }

    /// Writes caisson's configuration, with more lines at its end.
    pub(crate) fn configure(&self, more: &str) -> io::Result<()> {
        // The lab's emulated processor contradicts itself about XSAVE when it is nested.
        let text = format!(
            "kernel = {:?}\ninitramfs = {:?}\nvmm = {:?}\nkernel_params = \"noxsave\"\n{more}",
            self.dir.join("vmlinux"),
            self.dir.join("initramfs.cpio"),
            self.dir.join("caisson-vmm"),
        );
        fs::write(self.dir.join("config.toml"), text)
    }

    /// The bundle, with these arguments.
    pub(crate) fn bundle(&self, args: &[&str]) -> io::Result<PathBuf> {
        let bundle = self.dir.join("bundle");
        let file = bundle.join("config.json");
        if !file.exists() {
            let status = Command::new("runc")
                .args(["spec", "-b"])
                .arg(&bundle)
                .status()?;
            if !status.success() {
                return Err(io::Error::other("runc spec failed"));
            }
        }
        self.edit(|spec| {
            spec["process"]["terminal"] = json!(false);
            spec["process"]["args"] = json!(args);
        })?;
        Ok(bundle)
    }

    /// What the bundle's process consists of.
    pub(crate) fn arguments(&self) -> io::Result<Vec<String>> {
        let spec = fs::read(self.dir.join("bundle/config.json"))?;
        let spec: Value = serde_json::from_slice(&spec)?;
        Ok(serde_json::from_value(spec["process"]["args"].clone())?)
    }

    /// Changes the bundle's `config.json`.
    pub(crate) fn edit(&self, change: impl FnOnce(&mut Value)) -> io::Result<()> {
        let file = self.dir.join("bundle/config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file)?)?;
        change(&mut spec);
        fs::write(file, spec.to_string())
    }

    /// Arguments of QEMU's microvm: the guest kernel, and an initramfs whose PID 1 is `busybox true` plus a reset.
    fn microvm(&self) -> io::Result<Vec<String>> {
        let archive = self.dir.join("microvm.cpio");
        if !archive.exists() {
            let script = "set -e; rm -rf m; mkdir -p m/bin m/dev; cp bundle/rootfs/bin/busybox m/bin/; \
                printf '#!/bin/busybox sh\\n/bin/busybox true\\n/bin/busybox reboot -f\\n' > m/init; chmod +x m/init; \
                cd m; find . | busybox cpio -o -H newc > ../microvm.cpio";
            let status = Command::new("sh")
                .args(["-c", script])
                .current_dir(&self.dir)
                .status()?;
            if !status.success() {
                return Err(io::Error::other("no initramfs for the microvm"));
            }
        }
        Ok(self.microvm_of(&archive))
    }

    /// Arguments of QEMU's microvm: the guest kernel, and this initramfs.
    pub(crate) fn microvm_of(&self, archive: &Path) -> Vec<String> {
        let kernel = self.dir.join("vmlinux").display().to_string();
        let arguments = format!(
            "-accel kvm -cpu host -M {MACHINE},isa-serial=off -m 256 -smp 1 -nodefaults -no-user-config -display none \
             -no-reboot -kernel {kernel} -initrd {}",
            archive.display()
        );
        let mut list: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        list.extend(["-append".to_owned(), format!("{WORDS} rdinit=/init")]);
        list
    }

    /// Address of the guest kernel's PVH entry: the ELF note of type 18 by "Xen" (PVH boot protocol).
    pub(crate) fn kernel_entry(&self) -> io::Result<u64> {
        let image = fs::read(self.dir.join("vmlinux"))?;
        // A note is its name's length, its value's length, its type, its name, its value.
        let note = |size: u32| {
            let mut bytes = [4u32, size, 18].map(u32::to_le_bytes).concat();
            bytes.extend_from_slice(b"Xen\0");
            bytes
        };
        let find = |needle: &[u8]| image.windows(needle.len()).position(|w| w == needle);
        let at = find(&note(4))
            .or_else(|| find(&note(8)))
            .map(|at| at + note(4).len());
        let bytes = at
            .and_then(|at| image.get(at..))
            .and_then(|rest| rest.first_chunk::<4>());
        bytes
            .map(|bytes| u64::from(u32::from_le_bytes(*bytes)))
            .ok_or_else(|| io::Error::other("the guest kernel has no PVH note"))
    }
}

/// The program of this name that a shell would start.
pub(crate) fn program_on_path(program: &str) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.exists())
        .ok_or_else(|| io::Error::other(format!("no {program} on PATH")))
}
