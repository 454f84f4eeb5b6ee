//! Boots a kernel and an initramfs in the VMM and prints what it says: a small owner of a sandbox, for trying things
//! out and for measuring. Needs `/dev/kvm`.
//!
//! `boot VMM KERNEL INITRAMFS [vcpus=N] [mem=MIB] [share=TAG:DIR] [net=TAP] [disk=FILE] [console] [huge=0] [deadline=MS] [words=...] [counters=1] [pause]`
//!
//! Connections of the guest to port 1 are printed; to port 2, echoed; to port 3, swallowed and counted; from port 4, a
//! GiB of a known pattern is sent to the guest; other ports are refused. `counters` are printed at the end.

use std::error::Error;
use std::fs::File;
use std::io::{self, IoSliceMut, PipeWriter, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode};
use std::time::Instant;

use caisson_vmm_spec::{
    DiskSpec, Event, Fd, MemorySpec, MiB, NetworkKind, NetworkSpec, Request, SPEC_FD, ShareSpec,
    VmSpec,
};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const GIB: u64 = 1 << 30;

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, kernel, initramfs, options @ ..] = arguments.as_slice() else {
        return Err("boot VMM KERNEL INITRAMFS [options]".into());
    };
    let option = |name: &str| options.iter().find_map(|o| o.strip_prefix(name));
    let mut files = Files::new()?;
    let none = SocketFlags::empty();
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, none, None)?;
    fcntl_setfd(&ours, FdFlags::CLOEXEC)?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let mut spec = VmSpec {
        kvm: files.add(kvm.into())?,
        control: files.add(theirs)?,
        kernel: files.add(File::open(kernel)?.into())?,
        initramfs: files.add(File::open(initramfs)?.into())?,
        cmdline: option("words=").unwrap_or_default().to_owned(),
        vcpus: option("vcpus=").map_or(Ok(1), str::parse)?,
        most_vcpus: option("most_vcpus=").map_or(Ok(0), str::parse)?,
        memory: MemorySpec {
            size: MiB(option("mem=").map_or(Ok(256), str::parse)?),
            most: MiB(option("most=").map_or(Ok(0), str::parse)?),
            huge_pages: option("huge=") != Some("0"),
            policy: None,
        },
        boot_deadline_ms: option("deadline=").map_or(Ok(0), str::parse)?,
        shares: Vec::new(),
        networks: Vec::new(),
        vhost_net: false,
        spare_networks: option("spare=").map_or(Ok(0), str::parse)?,
        disks: Vec::new(),
        console: None,
    };
    if options.iter().any(|option| option == "console") {
        spec.console = Some(files.add(rustix::io::dup(io::stderr())?)?);
    }
    if let Some((tag, dir)) = option("share=").and_then(|share| share.split_once(':')) {
        let root = files.add(File::open(dir)?.into())?;
        spec.shares.push(ShareSpec {
            tag: tag.to_owned(),
            root,
            own: None,
        });
    }
    if let Some(name) = option("net=") {
        spec.networks.push(NetworkSpec {
            tap: files.add(tap(name)?)?,
            mac: [2, 0, 0, 0, 0, 1],
            kind: NetworkKind::Tap,
            vhost: None,
        });
    }
    if let Some(path) = option("disk=") {
        let file = File::options().read(true).write(true).open(path)?;
        spec.disks.push(DiskSpec {
            file: files.add(file.into())?,
            read_only: false,
            serial: "boot-disk".into(),
        });
    }
    let start = Instant::now();
    let mut child = files.spawn(vmm, &spec)?;
    while let Some((event, socket)) = receive(&ours)? {
        match (event, socket) {
            (Event::Accepted { port, .. }, Some(socket)) => {
                println!("{:?} accepted port {port}", start.elapsed());
                if options.iter().any(|option| option == "pause") {
                    send(
                        &ours,
                        &serde_json::to_vec(&Request::Pause)?,
                        SendFlags::empty(),
                    )?;
                }
                if option("counters=") == Some("1") {
                    let ask = serde_json::to_vec(&Request::Counters)?;
                    send(&ours, &ask, SendFlags::empty())?;
                }
                std::thread::spawn(move || serve(port, UnixStream::from(socket)));
            }
            (event @ Event::Ended { .. }, _) => {
                println!("{:?} {event:?}", start.elapsed());
                break;
            }
            (event @ Event::Paused, _) => {
                println!("{:?} {event:?}", start.elapsed());
                send(
                    &ours,
                    &serde_json::to_vec(&Request::Resume)?,
                    SendFlags::empty(),
                )?;
            }
            (event, _) => println!("{:?} {event:?}", start.elapsed()),
        }
    }
    let status = child.wait()?;
    println!("{:?} {status}", start.elapsed());
    Ok(ExitCode::from(
        u8::try_from(status.code().unwrap_or(255)).unwrap_or(255),
    ))
}

/// Descriptors that the child inherits under the numbers that they have here.
struct Files {
    inherited: Vec<OwnedFd>,
    spec: PipeWriter,
}

impl Files {
    /// To be called before anything else is opened: it takes the spec's number for itself.
    #[allow(unsafe_code, reason = "the spec's descriptor is known by number only")]
    fn new() -> Result<Self> {
        let (reader, spec) = io::pipe()?;
        let mut inherited = vec![OwnedFd::from(reader)];
        if inherited[0].as_raw_fd() != SPEC_FD {
            // SAFETY: dup2 closes what is at SPEC_FD: nothing of this program, which has opened only the pipe.
            let number = unsafe { libc::dup2(inherited[0].as_raw_fd(), SPEC_FD) };
            if number < 0 {
                return Err(io::Error::last_os_error().into());
            }
            // SAFETY: dup2 returned it, and nothing else owns it.
            inherited[0] = unsafe { OwnedFd::from_raw_fd(number) };
        }
        fcntl_setfd(&inherited[0], FdFlags::empty())?;
        Ok(Self { inherited, spec })
    }

    fn add(&mut self, fd: OwnedFd) -> Result<Fd> {
        fcntl_setfd(&fd, FdFlags::empty())?;
        let number = Fd(fd.as_raw_fd());
        self.inherited.push(fd);
        Ok(number)
    }

    fn spawn(mut self, vmm: &str, spec: &VmSpec) -> Result<Child> {
        self.spec.write_all(&serde_json::to_vec(spec)?)?;
        Ok(Command::new(vmm).spawn()?)
    }
}

/// Attaches to the tap of that name.
#[allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
fn tap(name: &str) -> Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // `struct ifreq`: 16 bytes of name, 2 of flags, the rest of the union.
    let mut request = [0u8; 40];
    request[..name.len().min(15)].copy_from_slice(&name.as_bytes()[..name.len().min(15)]);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request[16..18].copy_from_slice(&flags.to_le_bytes()[..2]);
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq` of 40 bytes, which `request` is.
    let returned = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    if returned < 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(file.into())
}

fn receive(socket: &OwnedFd) -> Result<Option<(Event, Option<OwnedFd>)>> {
    let mut bytes = vec![0; caisson_vmm_spec::MAX_PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let vectors = &mut [IoSliceMut::new(&mut bytes)];
    let got = recvmsg(socket, vectors, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if got == 0 {
        return Ok(None);
    }
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(Some((serde_json::from_slice(&bytes[..got])?, fd)))
}

/// The byte at `offset` of the stream that port 4 sends and port 3 expects.
fn pattern(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 20).to_le_bytes()[0]
}

fn serve(port: u32, mut socket: UnixStream) {
    let served = match port {
        1 => print(&mut socket),
        2 => echo(&mut socket),
        3 => swallow(&mut socket),
        4 => pour(&mut socket),
        _ => Ok(()),
    };
    if let Err(error) = served {
        println!("port {port}: {error}");
    }
}

fn print(socket: &mut UnixStream) -> io::Result<()> {
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    text.lines().for_each(|line| println!("guest: {line}"));
    Ok(())
}

fn echo(socket: &mut UnixStream) -> io::Result<()> {
    let copied = io::copy(&mut socket.try_clone()?, socket)?;
    println!("echoed {copied} bytes");
    socket.shutdown(Shutdown::Write)
}

fn swallow(socket: &mut UnixStream) -> io::Result<()> {
    let (start, mut buffer, mut offset, mut wrong) = (Instant::now(), vec![0; 1 << 16], 0, 0u64);
    loop {
        let got = socket.read(&mut buffer)?;
        if got == 0 {
            break;
        }
        for byte in &buffer[..got] {
            wrong += u64::from(*byte != pattern(offset));
            offset += 1;
        }
    }
    println!(
        "swallowed {offset} bytes, {wrong} wrong, in {:?}",
        start.elapsed()
    );
    socket.write_all(&offset.to_le_bytes())
}

fn pour(socket: &mut UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    for block in (0..GIB).step_by(1 << 16) {
        for (offset, byte) in (block..).zip(&mut buffer) {
            *byte = pattern(offset);
        }
        socket.write_all(&buffer)?;
    }
    socket.shutdown(Shutdown::Write)
}
