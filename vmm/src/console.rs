//! What the guest says on its first serial port: kept as the last lines, and written out if a debug console is wired.
//!
//! Contract: at most [`LINES`] lines of [`LINE_BYTES`] printable ASCII bytes are kept, whatever the guest sends. Kernel
//! panics are recognised by the kernel's own words. Without a debug console the port is a bare transmitter, enough for
//! the kernel's `earlyprintk`; with one it is a full 8250.
//! Threads: vCPU threads write, the main thread reads once at the end; one lock.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Lines kept.
pub const LINES: usize = 64;
/// Bytes kept of each line.
pub const LINE_BYTES: usize = 256;
/// First port of the 8250.
pub const PORT: u16 = 0x3f8;
/// Its interrupt.
pub const IRQ: u8 = 4;

const PANIC: &str = "Kernel panic - not syncing: ";
const DATA: u8 = 0;
const LINE_CONTROL: u8 = 3;
const LINE_STATUS: u8 = 5;
const DIVISOR_LATCH: u8 = 1 << 7;
const TRANSMITTER_EMPTY: u8 = 0x60;

/// The last lines of the console.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    lines: VecDeque<String>,
    current: String,
}

impl Tail {
    /// Takes one byte.
    pub fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => {
                let line = std::mem::take(&mut self.current);
                if self.lines.len() == LINES {
                    self.lines.pop_front();
                }
                self.lines.push_back(line);
            }
            b'\r' => {}
            _ if self.current.len() >= LINE_BYTES => {}
            b' '..=b'~' => self.current.push(char::from(byte)),
            b'\t' => self.current.push(' '),
            _ => self.current.push('?'),
        }
    }

    /// The lines, oldest first; an unfinished one is the last.
    pub fn lines(&self) -> Vec<String> {
        let unfinished = (!self.current.is_empty()).then(|| self.current.clone());
        self.lines.iter().cloned().chain(unfinished).collect()
    }

    /// The message of the last kernel panic.
    pub fn panic(&self) -> Option<String> {
        let last = self.lines().into_iter().rev().find_map(|line| {
            line.split_once(PANIC)
                .map(|(_, message)| message.to_owned())
        });
        last.filter(|message| !message.is_empty())
    }
}

/// A tail that threads share.
pub type SharedTail = Arc<Mutex<Tail>>;

/// Where a full 8250 sends its bytes: the tail and the debug console.
struct Tee {
    tail: SharedTail,
    out: File,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.iter().for_each(|byte| tail.push(*byte));
        drop(tail);
        // A debug console that went away is no reason to stop the guest.
        let _ = self.out.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

enum Model {
    Transmitter { tail: SharedTail, line_control: u8 },
    Full(Box<Serial<Interrupt, NoEvents, Tee>>),
}

/// The serial port.
pub struct Console(Model);

impl Console {
    /// A bare transmitter into `tail`.
    pub fn transmitter(tail: SharedTail) -> Self {
        Self(Model::Transmitter {
            tail,
            line_control: 0,
        })
    }

    /// A full 8250 into `tail` and `out`, and the eventfd to wire to [`IRQ`].
    ///
    /// # Errors
    /// No descriptors left.
    pub fn full(tail: SharedTail, out: File) -> io::Result<(Self, EventFd)> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let wire = event.try_clone()?;
        let serial = Serial::new(Interrupt(event), Tee { tail, out });
        Ok((Self(Model::Full(Box::new(serial))), wire))
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        match &mut self.0 {
            Model::Full(serial) => serial.read(offset),
            Model::Transmitter { .. } if offset == LINE_STATUS => TRANSMITTER_EMPTY,
            Model::Transmitter { .. } => 0,
        }
    }

    /// The guest writes register `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        match &mut self.0 {
            // The only errors are a full interrupt eventfd and our own writer's, which has none.
            Model::Full(serial) => drop(serial.write(offset, value)),
            Model::Transmitter { line_control, .. } if offset == LINE_CONTROL => {
                *line_control = value;
            }
            Model::Transmitter { tail, line_control } => {
                if offset == DATA && *line_control & DIVISOR_LATCH == 0 {
                    tail.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(console: &mut Console, text: &str) {
        text.bytes().for_each(|byte| console.write(DATA, byte));
    }

    #[test]
    fn a_panic_is_found_among_the_last_lines() {
        let tail = SharedTail::default();
        let mut console = Console::transmitter(tail.clone());
        say(
            &mut console,
            "[    0.1] Kernel panic - not syncing: No working init found.\r\n---[ end",
        );
        let tail = tail.lock().unwrap();
        assert_eq!(tail.panic().as_deref(), Some("No working init found."));
        assert_eq!(tail.lines()[1], "---[ end");
    }

    #[test]
    fn a_guest_cannot_fill_the_host_or_send_control_bytes() {
        let mut tail = Tail::default();
        (0..1_000_000u32).for_each(|_| tail.push(0x1b));
        (0..1_000).for_each(|_| tail.push(b'\n'));
        assert_eq!(tail.lines().len(), LINES);
        (0..1_000).for_each(|_| tail.push(0xff));
        assert_eq!(tail.lines().last().unwrap(), &"?".repeat(LINE_BYTES));
    }

    #[test]
    fn setting_the_baud_rate_is_not_text() {
        let tail = SharedTail::default();
        let mut console = Console::transmitter(tail.clone());
        console.write(LINE_CONTROL, DIVISOR_LATCH | 3);
        console.write(DATA, b'x');
        console.write(LINE_CONTROL, 3);
        console.write(DATA, b'y');
        assert_eq!(tail.lock().unwrap().lines(), ["y"]);
        assert_eq!(console.read(LINE_STATUS), TRANSMITTER_EMPTY);
    }

    #[test]
    fn a_full_console_writes_to_its_file_too() {
        let (reader, writer) = io::pipe().unwrap();
        let tail = SharedTail::default();
        let writer = File::from(std::os::fd::OwnedFd::from(writer));
        let (mut console, _irq) = Console::full(tail.clone(), writer).unwrap();
        say(&mut console, "hello\n");
        drop(console);
        assert_eq!(io::read_to_string(reader).unwrap(), "hello\n");
        assert_eq!(tail.lock().unwrap().lines(), ["hello"]);
    }
}
