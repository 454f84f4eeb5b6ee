//! The kernel's instructions, and how a program is put together from them.
//!
//! Contract: jumps go forward, to a mark; a mark that is missing is a program that the kernel refuses.
//! Spec: the kernel's Documentation/bpf/standardization/instruction-set.rst.

// Registers: r0 answers, r1 to r5 arguments, r6 to r9 are kept, r10 the frame's end.
pub(super) const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + off)
pub(super) const LOAD_HALF: u8 = 0x69; // dst = *(u16 *)(src + off)
pub(super) const LOAD_BYTE: u8 = 0x71; // dst = *(u8 *)(src + off)
pub(super) const STORE_WORD: u8 = 0x62; // *(u32 *)(dst + off) = imm
pub(super) const MOVE: u8 = 0xb7; // dst = imm
pub(super) const MOVE_REGISTER: u8 = 0xbf;
pub(super) const ADD: u8 = 0x07;
pub(super) const AND: u8 = 0x57;
pub(super) const JUMP_IF_NOT: u8 = 0x55; // if dst != imm
pub(super) const JUMP_IF: u8 = 0x15; // if dst == imm
pub(super) const JUMP: u8 = 0x05;
pub(super) const LOAD_WIDE: u8 = 0x18; // two instructions
pub(super) const CALL: u8 = 0x85;
pub(super) const EXIT: u8 = 0x95;

/// In the source register of [`LOAD_WIDE`]: the number is a map's descriptor.
const IS_MAP: u8 = 1;

/// A line of a program.
#[derive(Debug, Clone, Copy)]
pub(super) enum Line {
    /// An instruction.
    Do(u64),
    /// A jump, whose offset is not known yet.
    To(u64, &'static str),
    /// What jumps lead to.
    Mark(&'static str),
}

/// One instruction in its memory layout: opcode, registers, offset, immediate.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, src << 4 | dst, low, high, a, b, c, d])
}

/// `dst = *(src + offset)`, as wide as `code` says.
pub(super) fn load(code: u8, dst: u8, src: u8, offset: i16) -> Line {
    Line::Do(instruction(code, dst, src, offset, 0))
}

/// `*(u32 *)(dst + offset) = value`
pub(super) fn store_word(dst: u8, offset: i16, value: i32) -> Line {
    Line::Do(instruction(STORE_WORD, dst, 0, offset, value))
}

/// An operation with a constant.
pub(super) fn with(code: u8, dst: u8, value: i32) -> Line {
    Line::Do(instruction(code, dst, 0, 0, value))
}

/// `dst = src`
pub(super) fn copy(dst: u8, src: u8) -> Line {
    Line::Do(instruction(MOVE_REGISTER, dst, src, 0, 0))
}

/// A jump on a condition.
pub(super) fn jump_when(code: u8, dst: u8, value: i32, to: &'static str) -> Line {
    Line::To(instruction(code, dst, 0, 0, value), to)
}

/// A jump.
pub(super) fn jump(to: &'static str) -> Line {
    Line::To(instruction(JUMP, 0, 0, 0, 0), to)
}

/// A helper's call.
pub(super) fn call(helper: i32) -> Line {
    with(CALL, 0, helper)
}

/// The end, with `r0` for the answer.
pub(super) fn exit() -> Line {
    with(EXIT, 0, 0)
}

/// `dst` = a map
pub(super) fn load_map(dst: u8, map: i32) -> [Line; 2] {
    [
        Line::Do(instruction(LOAD_WIDE, dst, IS_MAP, 0, map)),
        Line::Do(0),
    ]
}

/// The program that these lines are.
pub(super) fn assemble(lines: &[Line]) -> Vec<u64> {
    let is_mark = |line: &&Line| matches!(line, Line::Mark(_));
    let instructions = lines.iter().enumerate().filter(|(_, line)| !is_mark(line));
    let resolved = instructions.map(|(at, line)| match *line {
        Line::Do(instruction) => instruction,
        Line::Mark(_) => 0,
        Line::To(instruction, to) => {
            let between = lines.iter().skip(at + 1);
            let skipped = between
                .take_while(|line| !matches!(line, Line::Mark(mark) if *mark == to))
                .filter(|line| !is_mark(line))
                .count();
            instruction | u64::from(u16::try_from(skipped).unwrap_or(u16::MAX)) << 16
        }
    });
    resolved.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_counts_the_instructions_up_to_its_mark() {
        let program = assemble(&[
            jump_when(JUMP_IF, 3, -2, "end"),
            with(MOVE, 0, 1),
            Line::Mark("other"),
            with(MOVE, 0, 2),
            Line::Mark("end"),
            exit(),
        ]);
        assert_eq!(program.len(), 4);
        assert_eq!(
            program[0].to_le_bytes(),
            [JUMP_IF, 3, 2, 0, 0xfe, 0xff, 0xff, 0xff]
        );
        assert_eq!(program[1].to_le_bytes(), [MOVE, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn a_jump_to_nowhere_leaves_the_program() {
        let program = assemble(&[jump("nowhere"), exit()]);
        assert_eq!(program[0].to_le_bytes()[2], 1);
    }
}
