//! virtio-blk: a disk in a file or a block device of the host.
//!
//! Contract: a request is decoded once out of a checked chain into a [`Request`] whose ranges lie on the disk; data
//! moves between file and guest memory without a copy of our own. What goes wrong with the data is the request's status
//! byte; only a chain without a header or without a status byte is a [`GuestFault`]. A write is on the host's page
//! cache when it is acknowledged, and on the medium after a flush; for a driver that did not accept FLUSH, at once.
//! Limits: ranges of one discard at most [`MAX_RANGES`], of one write-zeroes the same, each at most
//! [`MAX_RANGE_SECTORS`]. A turn begins no further request once it has moved [`TURN_BYTES`], so that a reset waits for few.
//! Spec: virtio 1.2, 5.2. The size of the disk is that of the file at start, in whole sectors; its blocks are as large as the
//! block device's, or a sector.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, ioctl_blksszget};
use rustix::io::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::counters::{Counter, Counters};
use crate::memory::Mem;
use crate::virtio::slice::At;
use crate::virtio::{Chain, ConfigSpace, Device, DeviceError, GuestFault, Io};

const VIRTIO_ID_BLOCK: u32 = 2;
const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// Length of a disk's identity.
pub const SERIAL_BYTES: usize = 20;
const QUEUE_SIZES: [u16; 1] = [256];
/// Data buffers of one request: the queue less header and status.
const SEGMENTS: u32 = 254;

/// The most ranges of one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 32;
/// The most sectors of one such range: 64 MiB.
pub const MAX_RANGE_SECTORS: u32 = 128 << 10;
/// `struct virtio_blk_discard_write_zeroes`, flag `unmap`.
const RANGE_UNMAP: u32 = 1;
/// How much is moved in one turn; a request that has begun is finished.
const TURN_BYTES: u64 = 64 << 20;
/// What a flush counts for in that, since it waits for the medium.
const FLUSH_BYTES: u64 = 4 << 20;
/// How much zero is written at a time where the file system has no better way.
const ZEROS_BYTES: usize = 64 << 10;

/// A range of bytes on the disk, checked against its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u64,
    bytes: u64,
}

/// What the driver wants.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Read(Range),
    Write(Range),
    Flush,
    Identity,
    Discard(Vec<Range>),
    WriteZeroes { ranges: Vec<Range>, unmap: bool },
}

impl Request {
    /// How much work it is, as bytes that are moved.
    fn work(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write(range) => range.bytes,
            Self::Flush => FLUSH_BYTES,
            Self::Identity => 0,
            Self::Discard(ranges) | Self::WriteZeroes { ranges, .. } => {
                ranges.iter().map(|range| range.bytes).sum()
            }
        }
    }
}

/// Why a request is answered with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// Not on the disk, not whole sectors, not writable, or the host failed.
    Failed,
    /// No such request, or a flag that we do not have.
    Unsupported,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
struct Shape {
    sectors: u64,
    read_only: bool,
}

impl Shape {
    /// The range of `sectors` sectors at `sector`, if the disk has it.
    fn range(self, sector: u64, sectors: u64) -> Result<Range, Refusal> {
        let end = sector.checked_add(sectors).ok_or(Refusal::Failed)?;
        if end > self.sectors {
            return Err(Refusal::Failed);
        }
        // The size in bytes is an i64: it came from the file's length.
        Ok(Range {
            start: sector * SECTOR_BYTES,
            bytes: sectors * SECTOR_BYTES,
        })
    }

    /// The range that `len` bytes of data cover from `sector` on.
    fn data(self, sector: u64, len: usize) -> Result<Range, Refusal> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Refusal::Failed);
        }
        self.range(sector, len / SECTOR_BYTES)
    }

    /// Decodes a chain that has a header of 16 bytes and a status byte.
    fn parse(self, chain: &Chain) -> Result<Result<Request, Refusal>, GuestFault> {
        let kind = u32::from_le_bytes(chain.read_array(0)?);
        let sector = u64::from_le_bytes(chain.read_array(8)?);
        let from_driver = chain.readable_len().saturating_sub(HEADER_BYTES);
        let to_driver = chain.writable_len().saturating_sub(1);
        if self.read_only
            && matches!(
                kind,
                VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
            )
        {
            return Ok(Err(Refusal::Failed));
        }
        Ok(match kind {
            VIRTIO_BLK_T_IN => self.data(sector, to_driver).map(Request::Read),
            VIRTIO_BLK_T_OUT => self.data(sector, from_driver).map(Request::Write),
            VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID if to_driver >= SERIAL_BYTES => Ok(Request::Identity),
            VIRTIO_BLK_T_GET_ID => Err(Refusal::Failed),
            VIRTIO_BLK_T_DISCARD => match self.ranges(chain, from_driver)? {
                Ok((_, true)) => Err(Refusal::Unsupported),
                parsed => parsed.map(|(ranges, _)| Request::Discard(ranges)),
            },
            VIRTIO_BLK_T_WRITE_ZEROES => self
                .ranges(chain, from_driver)?
                .map(|(ranges, unmap)| Request::WriteZeroes { ranges, unmap }),
            _ => Err(Refusal::Unsupported),
        })
    }

    /// The ranges of a discard or write-zeroes request, and whether all of them may be unmapped.
    fn ranges(
        self,
        chain: &Chain,
        len: usize,
    ) -> Result<Result<(Vec<Range>, bool), Refusal>, GuestFault> {
        let count = len / RANGE_BYTES;
        if !len.is_multiple_of(RANGE_BYTES) || count == 0 || count > MAX_RANGES as usize {
            return Ok(Err(Refusal::Failed));
        }
        let mut ranges = Vec::with_capacity(count);
        let mut unmap = true;
        for index in 0..count {
            let at = HEADER_BYTES + index * RANGE_BYTES;
            let sector = u64::from_le_bytes(chain.read_array(at)?);
            let sectors = u32::from_le_bytes(chain.read_array(at + 8)?);
            let flags = u32::from_le_bytes(chain.read_array(at + 12)?);
            if flags & !RANGE_UNMAP != 0 {
                return Ok(Err(Refusal::Unsupported));
            }
            unmap &= flags & RANGE_UNMAP != 0;
            if sectors > MAX_RANGE_SECTORS {
                return Ok(Err(Refusal::Failed));
            }
            match self.range(sector, u64::from(sectors)) {
                Ok(range) => ranges.push(range),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        Ok(Ok((ranges, unmap)))
    }
}

/// The disk: a file and what the driver may do with it.
#[derive(Debug)]
struct Disk {
    file: File,
    shape: Shape,
    serial: [u8; SERIAL_BYTES],
    /// Whether the driver flushes; otherwise each write is flushed for it.
    flushes: bool,
}

impl Disk {
    /// Serves one chain, and adds how much work it was; returns the number of bytes written into it.
    fn serve(&self, chain: &Chain, work: &mut u64) -> Result<u32, GuestFault> {
        let to_driver = chain.writable_len();
        let status_at = to_driver
            .checked_sub(1)
            .ok_or(GuestFault::Short { need: 1, got: 0 })?;
        let done = self.shape.parse(chain)?.and_then(|request| {
            let synchronous = matches!(request, Request::Write(_)) && !self.flushes;
            *work += request.work() + if synchronous { FLUSH_BYTES } else { 0 };
            self.execute(&request, chain)
        });
        let status = match done {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Refusal::Failed) => VIRTIO_BLK_S_IOERR,
            Err(Refusal::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        // The three statuses are 0, 1 and 2.
        chain.write(status_at, &status.to_le_bytes()[..1])?;
        // What is counted starts at the first byte: after a failed read, nothing before the status is sure.
        let sure = if done.is_ok() || status_at == 0 {
            to_driver
        } else {
            0
        };
        Ok(u32::try_from(sure).unwrap_or(0))
    }

    fn execute(&self, request: &Request, chain: &Chain) -> Result<(), Refusal> {
        let done = match request {
            Request::Read(range) => transfer(*range, |done, left, at| {
                chain.read_from(done, left, self.file.as_fd(), at)
            }),
            Request::Write(range) => transfer(*range, |done, left, at| {
                chain.write_to(HEADER_BYTES + done, left, self.file.as_fd(), at)
            })
            .and_then(|()| {
                if self.flushes {
                    Ok(())
                } else {
                    self.file.sync_data()
                }
            }),
            Request::Flush => self.file.sync_data(),
            Request::Identity => {
                return chain.write(0, &self.serial).map_err(|_| Refusal::Failed);
            }
            Request::Discard(ranges) => ranges.iter().try_for_each(|range| self.discard(*range)),
            Request::WriteZeroes { ranges, unmap } => ranges
                .iter()
                .try_for_each(|range| self.write_zeroes(*range, *unmap)),
        };
        done.map_err(|_| Refusal::Failed)
    }

    /// A hint: a file system that cannot punch holes keeps the data.
    fn discard(&self, range: Range) -> io::Result<()> {
        match self.allocate(
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            range,
        ) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            done => Ok(done?),
        }
    }

    fn write_zeroes(&self, range: Range, unmap: bool) -> io::Result<()> {
        let way = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match self.allocate(way | FallocateFlags::KEEP_SIZE, range) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = vec![0; ZEROS_BYTES];
                transfer(range, |_, left, at| match at {
                    At::Offset(offset) => Ok(rustix::io::pwrite(
                        &self.file,
                        &zeros[..left.min(ZEROS_BYTES)],
                        offset,
                    )?),
                    At::Stream => Err(io::ErrorKind::InvalidInput.into()),
                })
            }
            done => Ok(done?),
        }
    }

    fn allocate(&self, way: FallocateFlags, range: Range) -> Result<(), Errno> {
        if range.bytes == 0 {
            return Ok(()); // fallocate refuses empty ranges
        }
        rustix::io::retry_on_intr(|| fallocate(&self.file, way, range.start, range.bytes))
    }
}

/// Repeats `step(bytes done, bytes left, where)` until the range is through.
fn transfer(
    range: Range,
    mut step: impl FnMut(usize, usize, At) -> io::Result<usize>,
) -> io::Result<()> {
    // A range of data is as long as a chain, below 4 GiB; others are below 64 MiB.
    let len = usize::try_from(range.bytes).unwrap_or(usize::MAX);
    let mut done = 0;
    while done < len {
        match step(done, len - done, At::Offset(range.start + done as u64)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A disk device.
pub struct Block {
    name: String,
    config: ConfigSpace,
    features: u64,
    disk: Disk,
    chain: Chain,
    requests: Counter,
}

impl Block {
    /// The disk in `file`, which is open for reading, and for writing unless `read_only`. `serial` is cut to
    /// [`SERIAL_BYTES`].
    ///
    /// # Errors
    /// The file has no size: a pipe, a socket.
    pub fn new(
        name: &str,
        mut file: File,
        read_only: bool,
        serial: &str,
        mem: &Mem,
        counters: &Counters,
    ) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_BYTES;
        let mut id = [0; SERIAL_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let mut features =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        let shape = Shape { sectors, read_only };
        // A regular file has none.
        let block_bytes = ioctl_blksszget(&file).unwrap_or(512);
        Ok(Self {
            name: name.into(),
            config: ConfigSpace::read_only(config_space(sectors, block_bytes)),
            features,
            disk: Disk {
                file,
                shape,
                serial: id,
                flushes: false,
            },
            chain: Chain::new(mem),
            requests: counters.register(format!("{name}.requests")),
        })
    }
}

/// `struct virtio_blk_config`, 60 bytes; fields of features that are not offered are zero.
fn config_space(sectors: u64, block_bytes: u32) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &sectors.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &block_bytes.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
    put(44, &8u32.to_le_bytes()); // discard_sector_alignment: 4 KiB
    put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    bytes
}

impl Device for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn activate(&mut self, io: &mut Io) -> Result<(), DeviceError> {
        self.disk.flushes = io.features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        Ok(())
    }

    fn process(&mut self, index: usize, io: &mut Io) -> Result<(), DeviceError> {
        let Some(queue) = io.queues.get_mut(index) else {
            return Ok(());
        };
        let mut work = 0;
        while work < TURN_BYTES {
            if !queue.pop(&mut self.chain)? {
                return Ok(());
            }
            self.requests.add(1);
            let written = self.disk.serve(&self.chain, &mut work)?;
            queue.push(self.chain.head(), written)?;
        }
        queue.end_turn();
        Ok(())
    }

    fn reset(&mut self, _: &mut Io) {
        self.disk.flushes = false;
    }
}

/// A request to a disk of 64 KiB, as an image (`crate::fuzzing`); the first byte of memory also says whether the disk
/// is read-only.
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz(bytes: &[u8]) {
    use crate::fuzzing::{BUFFERS, Image, memory_file};
    let mut image = Image::new(bytes);
    let Ok(Some(chain)) = image.driver.pop() else {
        return;
    };
    let read_only = image.driver.get(BUFFERS + 4, 1) == [1];
    let shape = Shape {
        sectors: 128,
        read_only,
    };
    let disk = Disk {
        file: memory_file(64 << 10),
        shape,
        serial: [b'x'; 20],
        flushes: true,
    };
    if let Ok(written) = disk.serve(&chain, &mut 0) {
        assert!(written as usize <= chain.writable_len());
    }
    assert_eq!(
        disk.file.metadata().map_or(0, |about| about.len()),
        64 << 10
    );
}

#[cfg(test)]
mod tests;
