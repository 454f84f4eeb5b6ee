//! The device as its driver and its owner see it.

use vm_memory::{Bytes, GuestAddress};

use super::session::{ROOM_BYTES, Session};
use super::wire::{RESPONSE_BYTES, request};
use crate::devices::driver::Driver;
use crate::memory::{BLOCK_BYTES, CHUNK_BYTES};
use crate::virtio::slice::GuestSlice;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Kind and state of the response to a request about blocks.
fn answer(session: &Session, kind: u16, block: u64, count: u16) -> (u8, u8) {
    let mut driver = Driver::new();
    let addr = session.mem.room().start() + block * BLOCK_BYTES;
    let places = driver.offer(&[&request(kind, addr, count)], &[10]);
    let chain = driver.pop().unwrap().unwrap();
    assert_eq!(session.serve(&chain), Ok(10));
    let bytes = driver.get(places[1], RESPONSE_BYTES);
    (bytes[0], bytes[8])
}

fn told(session: &Session) -> Vec<u64> {
    session.told.lock().unwrap().clone()
}

#[test]
fn the_guest_follows_and_the_owner_hears_of_it_once() {
    let session = Session::new();
    assert_eq!(answer(&session, PLUG, 0, 1).0, 3, "nothing is mapped yet");
    session.growth.ask(70 * BLOCK_BYTES).unwrap();
    assert_eq!(answer(&session, STATE, 0, 70), (0, 1));
    assert_eq!(
        answer(&session, PLUG, 0, 71).0,
        1,
        "more than was asked for"
    );
    assert_eq!(answer(&session, PLUG, 0, 69), (0, 0));
    assert!(told(&session).is_empty());
    assert_eq!(answer(&session, STATE, 0, 70), (0, 2));
    assert_eq!(answer(&session, PLUG, 68, 2).0, 3, "one of them is plugged");
    assert_eq!(answer(&session, PLUG, 69, 1).0, 0);
    assert_eq!(
        (told(&session), session.given.chunks()),
        (vec![70 * BLOCK_BYTES], vec![0, 1])
    );
    assert_eq!(answer(&session, UNPLUG, 69, 1).0, 0);
    assert_eq!(answer(&session, PLUG, 69, 1).0, 0);
    assert_eq!(told(&session).len(), 1, "nobody asked again");
    session.check(70 * BLOCK_BYTES);
}

#[test]
fn unplugged_memory_is_nobodys() {
    let session = Session::new();
    session.growth.ask(2 * CHUNK_BYTES).unwrap();
    assert_eq!(answer(&session, PLUG, 0, 128).0, 0);
    let last = GuestAddress(session.mem.room().start() + CHUNK_BYTES);
    session.mem.write_obj(7u32, last).unwrap();
    let both = GuestAddress(last.0 - 8);
    assert!(GuestSlice::resolve(&session.mem, both, 16).is_some());
    session.growth.ask(CHUNK_BYTES).unwrap();
    assert_eq!(answer(&session, UNPLUG, 64, 64).0, 0);
    assert_eq!(told(&session), [2 * CHUNK_BYTES, CHUNK_BYTES]);
    assert_eq!(session.given.chunks(), [0]);
    assert!(session.mem.read_obj::<u32>(last).is_err());
    assert!(GuestSlice::resolve(&session.mem, both, 16).is_none());
    assert_eq!(answer(&session, UNPLUG, 64, 1).0, 3, "it is not plugged");
    assert_eq!(answer(&session, PLUG, 64, 1).0, 1, "not asked for any more");
    session.growth.ask(2 * CHUNK_BYTES).unwrap();
    assert_eq!(answer(&session, PLUG, 64, 1).0, 0);
    assert_eq!(session.mem.read_obj::<u32>(last).unwrap(), 0, "a new page");
    assert_eq!(answer(&session, UNPLUG_ALL, 0, 0).0, 0);
    assert!(session.given.chunks().is_empty());
    session.check(0);
}

#[test]
fn an_object_at_the_end_of_what_is_mapped_does_not_crash() {
    let session = Session::new();
    session.growth.ask(CHUNK_BYTES).unwrap();
    assert_eq!(answer(&session, PLUG, 0, 64).0, 0);
    let end = session.mem.room().start() + CHUNK_BYTES;
    // Begins in plugged memory, ends behind it.
    let _ = session.mem.read_obj::<u128>(GuestAddress(end - 8));
    assert!(session.mem.read_obj::<u128>(GuestAddress(end)).is_err());
}

#[test]
fn more_than_the_host_gives_is_busy_and_changes_nothing() {
    let session = Session::new();
    session.growth.ask(ROOM_BYTES).unwrap();
    assert_eq!(answer(&session, PLUG, 0, 256).0, 2);
    session.check(0);
    assert_eq!(answer(&session, PLUG, 0, 192).0, 0);
    assert!(session.growth.ask(ROOM_BYTES + 1).is_err());
}

#[test]
fn a_request_of_another_size_is_a_fault() {
    let session = Session::new();
    for (readable, writable) in [(23, 10), (24, 9), (24, 0), (0, 10)] {
        let mut driver = Driver::new();
        driver.offer(&[&[0; 24][..readable]], &[writable]);
        let chain = driver.pop().unwrap().unwrap();
        let fault = session.serve(&chain).is_err();
        assert!(fault, "{readable} {writable}");
    }
}
