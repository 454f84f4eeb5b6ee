//! Lines on stderr, for people.
//!
//! Contract: writing never blocks and never fails: whoever started the VM may read the other end of the pipe only when the
//! VM has ended, and what does not fit is lost. What the guest causes is written at most [`GUEST_LINES`] times in the life of
//! the process, which is that of the VM.
//! Threads: any.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};

/// How many lines the guest can cause.
pub const GUEST_LINES: u32 = 16;
static GUEST_LINES_LEFT: AtomicU32 = AtomicU32::new(GUEST_LINES);

/// Makes stderr one that never blocks, if it is a pipe.
///
/// # Errors
/// It is closed.
pub fn prepare() -> io::Result<()> {
    never_block(io::stderr())
}

fn never_block(output: impl AsFd) -> io::Result<()> {
    let mode = fstat(&output)?.st_mode;
    if FileType::from_raw_mode(mode) == FileType::Fifo {
        let flags = fcntl_getfl(&output)?;
        fcntl_setfl(&output, flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// Writes a line.
pub fn line(text: fmt::Arguments<'_>) {
    write(io::stderr(), text);
}

/// Writes a line that the guest caused, if it has not caused too many.
pub fn guest_caused(text: fmt::Arguments<'_>) {
    if take(&GUEST_LINES_LEFT) {
        line(text);
    }
}

fn write(mut output: impl Write, text: fmt::Arguments<'_>) {
    // In one piece: other threads write as well.
    let _ = output.write_all(format!("caisson-vmm: {text}\n").as_bytes());
}

fn take(left: &AtomicU32) -> bool {
    let less = |left: u32| left.checked_sub(1);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        .is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_guest_causes_so_many_lines_and_no_more() {
        let left = AtomicU32::new(2);
        assert_eq!([(); 4].map(|()| take(&left)), [true, true, false, false]);
    }

    #[test]
    fn a_pipe_that_nobody_reads_blocks_nobody() {
        let (mut reader, writer) = io::pipe().unwrap();
        never_block(&writer).unwrap();
        for _ in 0..100 {
            write(&writer, format_args!("{}", "x".repeat(4000)));
        }
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("caisson-vmm: xxx"));
        assert!(text.len() < 100 * 4000);
    }
}
