//! The fuzz target of the whole FUSE server: a session of messages over a small directory of its own.

use super::{FsServer, thread};
use crate::devices::driver::Driver;
use crate::fuzzing::directory;

/// The most messages of one session.
const MESSAGES: usize = 64;

/// A session: messages of two bytes of length (12 bits), two bytes of room for the reply, and the message. The top bit
/// of the length sends it over the high-priority queue. The session starts with an INIT of its own.
///
/// # Panics
/// If the server did.
#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
pub fn fuzz(bytes: &[u8]) {
    let bytes = bytes.to_vec();
    let thread_id = std::thread::current().id();
    let name = format!("caisson-fuzz-{}-{thread_id:?}", std::process::id());
    let share = std::env::temp_dir().join(name);
    std::fs::create_dir_all(share.join("dir")).unwrap();
    std::fs::write(share.join("file"), [7; 5000]).unwrap();
    let root = directory(&share).unwrap();
    let serving = std::thread::spawn(move || {
        thread::enter(&root).unwrap();
        serve(&bytes);
    });
    let served = serving.join();
    std::fs::remove_dir_all(&share).unwrap();
    assert!(served.is_ok(), "the server panicked");
}

#[allow(clippy::unwrap_used, reason = "for tests: a failure is a failed test")]
fn serve(mut bytes: &[u8]) {
    let mut driver = Driver::new();
    let server = FsServer::start(&driver.mem, 1024, None).unwrap();
    driver.offer(&[&init()], &[16, 64]);
    server
        .request(driver.queue.pop_raw().unwrap().unwrap())
        .unwrap();
    for _ in 0..MESSAGES {
        let Some(([l0, l1, r0, r1], rest)) = bytes.split_first_chunk() else {
            return;
        };
        let len = usize::from(u16::from_le_bytes([*l0, l1 & 0x0f])).min(rest.len());
        let (message, next) = rest.split_at(len);
        bytes = next;
        driver.rewind();
        if l1 & 0x80 != 0 {
            driver.offer(&[message], &[]);
            let _ = server.forget(&driver.pop().unwrap().unwrap());
            continue;
        }
        let room = u32::from(u16::from_le_bytes([*r0, *r1]));
        let (head, body) = message.split_at(len.min(40));
        driver.offer(&[head, body], &[room.min(16), room.saturating_sub(16)]);
        let chain = driver.queue.pop_raw().unwrap().unwrap();
        if let Ok(written) = server.request(chain) {
            assert!(written <= room);
        }
    }
}

/// FUSE_INIT, version 7.38, with every flag.
fn init() -> [u8; 104] {
    let mut message = [0; 104];
    (message[0], message[4], message[40], message[44]) = (104, 26, 7, 38);
    message[52..60].fill(0xff);
    message
}
