//! The disk against a driver in this file, on ordinary files.

use std::io::{Read, Write};

use super::*;
use crate::devices::driver::Driver;

const DISK_BYTES: usize = 1 << 20;

struct Bench {
    driver: Driver,
    disk: Disk,
}

fn bench(read_only: bool) -> Bench {
    let mut file = tempfile::tempfile().unwrap();
    let pattern: Vec<u8> = (0..=250)
        .cycle()
        .take(DISK_BYTES / 512)
        .flat_map(|byte| [byte; 512])
        .collect();
    file.write_all(&pattern).unwrap();
    let sectors = DISK_BYTES as u64 / SECTOR_BYTES;
    let shape = Shape { sectors, read_only };
    let disk = Disk {
        file,
        shape,
        serial: *b"a disk of caisson\0\0\0",
        flushes: true,
    };
    Bench {
        driver: Driver::new(),
        disk,
    }
}

impl Bench {
    fn call(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[&[u8]],
        room: &[u32],
    ) -> Result<(u8, Vec<u8>, u32), GuestFault> {
        self.driver.rewind();
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut readable = vec![header.as_slice()];
        readable.extend(data);
        let mut writable = room.to_vec();
        writable.push(1);
        let at = self.driver.offer(&readable, &writable);
        let chain = self.driver.pop()?.unwrap();
        let written = self.disk.serve(&chain, &mut 0)?;
        let mut out = Vec::new();
        for (at, len) in at[readable.len()..].iter().zip(room) {
            out.extend(self.driver.get(*at, *len as usize));
        }
        Ok((self.driver.get(*at.last().unwrap(), 1)[0], out, written))
    }

    fn contents(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.disk.file.seek(SeekFrom::Start(0)).unwrap();
        self.disk.file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn sectors_are_read_and_written_over_several_segments() {
    let mut bench = bench(false);
    let (status, data, written) = bench
        .call(VIRTIO_BLK_T_IN, 3, &[], &[100, 412, 1024])
        .unwrap();
    assert_eq!((status, written), (0, 1537));
    assert_eq!((data[0], data[511], data[512], data[1535]), (3, 3, 4, 5));
    let (status, ..) = bench
        .call(VIRTIO_BLK_T_OUT, 7, &[&[0xaa; 200], &[0xbb; 312]], &[])
        .unwrap();
    assert_eq!(status, 0);
    let disk = bench.contents();
    assert_eq!(
        (disk[7 * 512 - 1], disk[7 * 512], disk[7 * 512 + 200]),
        (6, 0xaa, 0xbb)
    );
    assert_eq!((disk[8 * 512], disk.len()), (8, DISK_BYTES));
    assert_eq!(bench.call(VIRTIO_BLK_T_FLUSH, 0, &[], &[]).unwrap().0, 0);
    let (status, id, _) = bench.call(VIRTIO_BLK_T_GET_ID, 0, &[], &[20]).unwrap();
    assert_eq!((status, &id[..17]), (0, b"a disk of caisson".as_slice()));
}

#[test]
fn what_is_not_on_the_disk_is_an_error_and_changes_nothing() {
    let mut bench = bench(false);
    let before = bench.contents();
    let last = DISK_BYTES as u64 / 512;
    for sector in [last, last - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        let (status, _, written) = bench.call(VIRTIO_BLK_T_IN, sector, &[], &[1024]).unwrap();
        assert_eq!((status, written), (1, 0), "read at {sector}");
        let (status, ..) = bench
            .call(VIRTIO_BLK_T_OUT, sector, &[&[1; 1024]], &[])
            .unwrap();
        assert_eq!(status, 1, "write at {sector}");
    }
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_OUT, 0, &[&[1; 511]], &[])
            .unwrap()
            .0,
        1
    );
    assert_eq!(bench.call(VIRTIO_BLK_T_IN, 0, &[], &[513]).unwrap().0, 1);
    assert_eq!(bench.call(99, 0, &[], &[]).unwrap().0, 2);
    assert_eq!(bench.call(VIRTIO_BLK_T_GET_ID, 0, &[], &[19]).unwrap().0, 1);
    assert!(bench.contents() == before);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut bench = bench(true);
    let before = bench.contents();
    let range = [&[0; 8][..], &1u32.to_le_bytes(), &[0; 4]].concat();
    for (kind, data) in [
        (VIRTIO_BLK_T_OUT, [1; 512].as_slice()),
        (VIRTIO_BLK_T_DISCARD, &range),
        (VIRTIO_BLK_T_WRITE_ZEROES, &range),
    ] {
        assert_eq!(bench.call(kind, 0, &[data], &[]).unwrap().0, 1);
    }
    assert!(bench.contents() == before);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn discard_and_write_zeroes_take_several_ranges() {
    let mut bench = bench(false);
    let ranges = [range(8, 8, 0), range(100, 3, 0)].concat();
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[&ranges], &[])
            .unwrap()
            .0,
        0
    );
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[&range(200, 8, 1)], &[])
            .unwrap()
            .0,
        0
    );
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_DISCARD, 0, &[&range(300, 8, 0)], &[])
            .unwrap()
            .0,
        0
    );
    let disk = bench.contents();
    let zero = |first: usize, count: usize| {
        disk[first * 512..(first + count) * 512]
            .iter()
            .all(|byte| *byte == 0)
    };
    assert!(zero(8, 8) && zero(100, 3) && zero(200, 8));
    assert!(!zero(7, 1) && !zero(16, 1) && !zero(103, 1) && disk.len() == DISK_BYTES);
}

#[test]
fn broken_ranges_are_errors() {
    let mut bench = bench(false);
    let cases = [
        (range(0, MAX_RANGE_SECTORS + 1, 0), 1),
        (range(u64::MAX, 1, 0), 1),
        (range(DISK_BYTES as u64 / 512, 1, 0), 1),
        (range(0, 1, 2), 2),
        (vec![0; 15], 1),
        (vec![], 1),
        (vec![0; 16 * 33], 1),
    ];
    for (ranges, expected) in cases {
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            let (status, ..) = bench.call(kind, 0, &[&ranges], &[]).unwrap();
            assert_eq!(status, expected, "{ranges:?}");
        }
    }
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_DISCARD, 0, &[&range(0, 1, 1)], &[])
            .unwrap()
            .0,
        2
    );
    assert_eq!(
        bench
            .call(VIRTIO_BLK_T_DISCARD, 0, &[&range(0, 0, 0)], &[])
            .unwrap()
            .0,
        0
    );
}

#[test]
fn a_chain_without_header_or_status_is_a_fault() {
    let mut bench = bench(false);
    for (readable, writable) in [(15, 1), (0, 1), (16, 0)] {
        bench.driver.rewind();
        let bytes = vec![0; readable];
        let readable: Vec<&[u8]> = if bytes.is_empty() {
            vec![]
        } else {
            vec![&bytes]
        };
        bench.driver.offer(&readable, &vec![1; writable]);
        let chain = bench.driver.pop().unwrap().unwrap();
        assert!(bench.disk.serve(&chain, &mut 0).is_err());
    }
}

#[test]
fn a_file_that_shrank_is_an_error() {
    let mut bench = bench(false);
    bench.disk.file.set_len(512).unwrap();
    assert_eq!(bench.call(VIRTIO_BLK_T_IN, 0, &[], &[1024]).unwrap().0, 1);
}

#[test]
fn what_a_request_costs_the_host_is_counted() {
    let ranges = [(0, 64 << 10), (1 << 20, 512)];
    let ranges = ranges.map(|(start, bytes)| Range { start, bytes });
    for (request, work) in [
        (Request::Read(ranges[0]), 64 << 10),
        (Request::Write(ranges[1]), 512),
        (Request::Discard(ranges.to_vec()), (64 << 10) + 512),
        (Request::Flush, FLUSH_BYTES),
        (Request::Identity, 0),
    ] {
        assert_eq!(request.work(), work, "{request:?}");
    }
}
