//! Guest kernels that go wrong on purpose: tiny ELF images with a PVH entry, a few machine instructions each.
//!
//! They start in 32-bit protected mode with flat segments and interrupts off, as the PVH boot protocol says, and speak
//! by writing to the first serial port. Spec: Xen's x86 HVM direct boot ABI; System V ABI, chapters 4 and 5.

use std::fs;
use std::path::Path;

/// What a kernel does once it has said its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Faults without a table of handlers: the processor gives up (a triple fault).
    TripleFault,
    /// Does nothing, for ever.
    Silence,
}

/// Where the image is loaded, and its first instruction.
const BASE: u32 = 0x10_0000;
/// Where the note and the code lie in the file: behind the file header and two program headers.
const NOTE: u32 = 64 + 2 * 56;
const NOTE_BYTES: u32 = 20;
const CODE: u32 = NOTE + NOTE_BYTES;

/// Writes a kernel that prints a line on its console, and then ends as it is told to.
pub fn write(path: &Path, line: &str, ending: Ending) {
    let mut image = elf();
    image.extend(code(line, ending));
    let length = u64::try_from(image.len()).expect("length");
    for field in [FILE_SIZE, MEMORY_SIZE] {
        image[field..field + 8].copy_from_slice(&length.to_le_bytes());
    }
    fs::write(path, image).expect("kernel");
}

/// Offsets of the fields of the loadable program header that depend on the code.
const FILE_SIZE: usize = 64 + 32;
const MEMORY_SIZE: usize = 64 + 40;

/// Headers and note: one loadable segment that is the whole file.
fn elf() -> Vec<u8> {
    let half = |n: u16| n.to_le_bytes().to_vec();
    let word = |n: u32| n.to_le_bytes().to_vec();
    let long = |n: u64| n.to_le_bytes().to_vec();
    let entry = u64::from(BASE + CODE);
    let header = [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(),
        // Executable, x86-64, version 1, entry, program headers, no section headers, flags.
        half(2),
        half(62),
        word(1),
        long(entry),
        long(64),
        long(0),
        word(0),
        // Sizes: this header, a program header; two of these; no sections.
        half(64),
        half(56),
        half(2),
        half(64),
        half(0),
        half(0),
    ];
    let segment = |kind: u32, offset: u32, size: u32| {
        let address = u64::from(BASE + offset);
        [
            word(kind),
            word(7),
            long(offset.into()),
            long(address),
            long(address),
            long(size.into()),
            long(size.into()),
            long(4),
        ]
        .concat()
    };
    let (load, note) = (1, 4);
    // Lengths of name and value, XEN_ELFNOTE_PHYS32_ENTRY, name, value.
    let entry_note = [
        word(4),
        word(4),
        word(18),
        b"Xen\0".to_vec(),
        word(BASE + CODE),
    ];
    [
        header.concat(),
        segment(load, 0, 0),
        segment(note, NOTE, NOTE_BYTES),
        entry_note.concat(),
    ]
    .concat()
}

fn code(line: &str, ending: Ending) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in line.bytes().chain(*b"\n") {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
    match ending {
        // push 0; push 0; lidt [esp]; ud2, where esp points to memory that is there
        Ending::TripleFault => code.extend([
            0xbc, 0x00, 0x00, 0x09, 0x00, 0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0x0f,
            0x0b,
        ]),
        // cli; again: hlt; jmp again
        Ending::Silence => code.extend([0xfa, 0xf4, 0xeb, 0xfd]),
    }
    code
}
