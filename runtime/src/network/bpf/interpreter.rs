//! Runs programs as the kernel would, with helpers that a test plays.
//!
//! Contract: memory is what the test lays out and the frame; an access outside of it is a failed test.

#![allow(clippy::panic, reason = "a program that goes astray is a failed test")]

use super::instructions::{
    ADD, AND, CALL, EXIT, JUMP, JUMP_IF, JUMP_IF_NOT, LOAD_BYTE, LOAD_HALF, LOAD_WIDE, LOAD_WORD,
    MOVE, MOVE_REGISTER, STORE_WORD,
};

/// Where the context is.
pub(super) const CONTEXT: u64 = 0x1_0000;
/// Where the frame ends.
const FRAME_END: u64 = 0x2_0000;
const FRAME_BYTES: u64 = 512;

/// Stretches of memory by their addresses.
#[derive(Debug)]
pub(super) struct Memory(Vec<(u64, Vec<u8>)>);

impl Memory {
    /// A context, and other stretches.
    pub(super) fn new(context: Vec<u8>, others: Vec<(u64, Vec<u8>)>) -> Self {
        let frame = (FRAME_END - FRAME_BYTES, vec![0xa5; 512]);
        let mut stretches = vec![(CONTEXT, context), frame];
        stretches.extend(others);
        Self(stretches)
    }

    /// So many bytes.
    pub(super) fn at(&mut self, address: u64, bytes: usize) -> &mut [u8] {
        let found = self.0.iter_mut().find_map(|(start, stretch)| {
            let from = usize::try_from(address.checked_sub(*start)?).ok()?;
            stretch.get_mut(from..from + bytes)
        });
        found.unwrap_or_else(|| panic!("{bytes} bytes at {address:#x}"))
    }
}

/// Runs a program to its end: `r0`, or `None` if a helper ended it.
pub(super) fn run(
    program: &[u64],
    memory: &mut Memory,
    mut helper: impl FnMut(i32, [u64; 5], &mut Memory) -> Option<u64>,
) -> Option<u64> {
    let mut r = [0_u64; 11];
    (r[1], r[10]) = (CONTEXT, FRAME_END);
    let mut at = 0;
    loop {
        let [code, registers, low, high, immediate @ ..] = program[at].to_le_bytes();
        let (dst, src) = (usize::from(registers & 15), usize::from(registers >> 4));
        let offset = i16::from_le_bytes([low, high]);
        let immediate = i32::from_le_bytes(immediate);
        let wide = i64::from(immediate).cast_unsigned();
        let place = |base: u64| base.wrapping_add_signed(i64::from(offset));
        let mut read = |bytes: usize| {
            let mut value = [0; 8];
            value[..bytes].copy_from_slice(memory.at(place(r[src]), bytes));
            u64::from_le_bytes(value)
        };
        at += 1;
        match code {
            LOAD_WORD => r[dst] = read(4),
            LOAD_HALF => r[dst] = read(2),
            LOAD_BYTE => r[dst] = read(1),
            STORE_WORD => memory
                .at(place(r[dst]), 4)
                .copy_from_slice(&immediate.to_le_bytes()),
            MOVE => r[dst] = wide,
            MOVE_REGISTER => r[dst] = r[src],
            ADD => r[dst] = r[dst].wrapping_add(wide),
            AND => r[dst] &= wide,
            JUMP_IF_NOT if r[dst] != wide => at += usize::try_from(offset).unwrap(),
            JUMP_IF if r[dst] == wide => at += usize::try_from(offset).unwrap(),
            JUMP_IF_NOT | JUMP_IF => {}
            JUMP => at += usize::try_from(offset).unwrap(),
            LOAD_WIDE => {
                r[dst] = wide;
                at += 1;
            }
            CALL => r[0] = helper(immediate, [r[1], r[2], r[3], r[4], r[5]], memory)?,
            EXIT => return Some(r[0]),
            other => panic!("instruction {other:#x}"),
        }
    }
}
