//! A mistake of QEMU's emulated SVM that makes nested guests hang, taken out of the running process.
//!
//! `VMRUN` with an external interrupt to inject delivers it, and leaves its vector as the processor's pending exception
//! (`helper_vmrun`, case `SVM_EVTINJ_TYPE_INTR` in `target/i386/tcg/sysemu/svm_helper.c`; 7.2 has it, and so had the
//! development tree that was looked at). If the emulator's loop is left before the next VM exit (always at the end of an
//! `icount` budget, with several processors whenever one of them is wanted), it finds the vector and delivers it once more,
//! into an interrupt handler that has interrupts disabled: a deadlock or an oops, now and then.
//!
//! Contract: the one store of that vector becomes a no-op, if the program has the expected bytes exactly once; Debian's
//! does. Any other program is left as it is, which is said in the owner's log. Called once, before a nested guest runs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// Two stores, one after the other: the injected error code, and (from [`STORE`] on) the vector.
const PATTERN: [u8; 13] = [
    0x44, 0x89, 0xab, 0x80, 0x33, 0, 0, 0x89, 0xb3, 0x54, 0xef, 0xff, 0xff,
];

/// Where the vector's store begins in the pattern; it is the rest of it.
const STORE: usize = 7;

/// A no-op of its length.
const NO_OP: [u8; PATTERN.len() - STORE] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];

/// The program of QEMU, as it is called in a process's mappings.
const PROGRAM: &str = "/qemu-system-x86_64";

/// Mends the process `pid`.
///
/// # Errors
/// It is none that this knows how to mend, or its memory may not be written.
pub(crate) fn mend(pid: u32) -> io::Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let text = maps.lines().find_map(Text::parse);
    let text = text.ok_or_else(|| io::Error::other("no QEMU in its mappings"))?;
    let mut code = vec![0; text.length];
    File::open(text.program)?.read_exact_at(&mut code, text.offset)?;
    let at = only(&code).ok_or_else(|| io::Error::other("a QEMU of another build"))?;
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(&NO_OP, text.address + at)
}

/// The executable mapping of QEMU's program.
#[derive(Debug, PartialEq, Eq)]
struct Text<'a> {
    address: u64,
    length: usize,
    offset: u64,
    program: &'a str,
}

impl<'a> Text<'a> {
    /// A line of proc(5)'s `/proc/pid/maps`, if it is that.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let executable = words.next()? == "r-xp";
        let offset = words.next()?;
        let program = words.nth(2)?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let address = number(start)?;
        (executable && program.ends_with(PROGRAM)).then_some(Self {
            address,
            length: usize::try_from(number(end)?.checked_sub(address)?).ok()?,
            offset: number(offset)?,
            program,
        })
    }
}

/// Where the store is, if the pattern is there once.
fn only(code: &[u8]) -> Option<u64> {
    let mut found = (0..code.len()).filter(|at| code[*at..].starts_with(&PATTERN));
    let (first, second) = (found.next()?, found.next());
    let at = u64::try_from(first + STORE).ok()?;
    second.is_none().then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_text_is_found_among_the_mappings() {
        let line =
            "55d5f040a000-55d5f099e000 r-xp 0040a000 fe:00 1234   /usr/bin/qemu-system-x86_64";
        let text = Text::parse(line).unwrap();
        assert_eq!((text.address, text.length), (0x55d5_f040_a000, 0x59_4000));
        assert_eq!(
            (text.offset, text.program),
            (0x40_a000, "/usr/bin/qemu-system-x86_64")
        );
        assert_eq!(Text::parse(&line.replace("r-xp", "r--p")), None);
        assert_eq!(Text::parse(&line.replace("/qemu", "/kemu")), None);
        assert_eq!(
            Text::parse("55d5f040a000-55d5f099e000 rw-p 0 00:00 0"),
            None
        );
    }

    #[test]
    fn a_program_without_the_bytes_or_with_two_of_them_is_left_alone() {
        let once = [&[0x90; 5][..], &PATTERN, &[0x90; 3]].concat();
        assert_eq!(only(&once), Some(12));
        assert_eq!(only(&once[1..12]), None);
        assert_eq!(only(&[&once[..], &once].concat()), None);
    }
}
