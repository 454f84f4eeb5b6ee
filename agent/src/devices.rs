//! Device rules of a container as a BPF program for its cgroup (`BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! Contract: for each kind of access that a process asks for (read, write, mknod), the last rule that names the device
//! and that access decides, and what no rule decides is denied: the rules' meaning in the OCI specification ("Device
//! whitelist", config-linux.md) and in cgroup v1. The program visits the rules from the last to the first, so that the
//! first verdict it meets is the one that holds.
//! Pure: no system call here (`sys.rs` loads the program).
//!
//! The kernel passes `struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }`, with the kind of device in
//! the low half of `access_type` and the accesses asked for in the high half.

use crate::plan::PlanError;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

const BLOCK: u8 = 1;
const CHAR: u8 = 2;

/// One rule. `None` stands for every device type or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    allow: bool,
    kind: Option<u8>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u8,
}

const fn allow(kind: u8, major: Option<u32>, minor: Option<u32>, access: u8) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// What every container may use whatever its rules say; runc appends the same (libcontainer/specconv, AllowedDevices).
const ALWAYS: [Rule; 11] = [
    allow(CHAR, None, None, MKNOD),
    allow(BLOCK, None, None, MKNOD),
    allow(CHAR, Some(1), Some(3), ALL),    // null
    allow(CHAR, Some(1), Some(8), ALL),    // random
    allow(CHAR, Some(1), Some(7), ALL),    // full
    allow(CHAR, Some(5), Some(0), ALL),    // tty
    allow(CHAR, Some(1), Some(5), ALL),    // zero
    allow(CHAR, Some(1), Some(9), ALL),    // urandom
    allow(CHAR, Some(136), None, ALL),     // pts/*
    allow(CHAR, Some(5), Some(2), ALL),    // ptmx
    allow(CHAR, Some(10), Some(200), ALL), // net/tun
];

impl Rule {
    fn parse(rule: &LinuxDeviceCgroup) -> Result<Self, PlanError> {
        let refuse = || PlanError::DeviceRule {
            rule: rule.to_string(),
        };
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            Some(LinuxDeviceType::P) => return Err(refuse()),
        };
        let number = |n: Option<i64>| match n {
            None | Some(-1) => Ok(None),
            Some(n) => u32::try_from(n).map(Some).map_err(|_| refuse()),
        };
        // A wildcard type stands for every device and every access, whatever else the rule says (as in cgroup v1).
        if kind.is_none() {
            return Ok(Self {
                allow: rule.allow(),
                kind,
                major: None,
                minor: None,
                access: ALL,
            });
        }
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return Err(refuse()),
            };
        }
        let (major, minor) = (number(rule.major())?, number(rule.minor())?);
        Ok(Self {
            allow: rule.allow(),
            kind,
            major,
            minor,
            access,
        })
    }
}

/// The program for a container's rules; `None` if they end up allowing everything.
pub(crate) fn compile(rules: &[LinuxDeviceCgroup]) -> Result<Option<Vec<u64>>, PlanError> {
    let mut parsed = Vec::with_capacity(rules.len() + ALWAYS.len());
    for rule in rules {
        parsed.push(Rule::parse(rule)?);
    }
    parsed.extend(ALWAYS);
    // Rules before the last one for every device cannot decide anything.
    let every = |r: &Rule| r.kind.is_none();
    let start = parsed.iter().rposition(every).unwrap_or(0);
    if parsed[start..].iter().all(|r| r.allow) && every(&parsed[start]) {
        return Ok(None);
    }
    Ok(Some(assemble(&parsed[start..])))
}

// Registers: r1 the context, r2 the accesses not yet decided, r3 the type, r4 major, r5 minor, r0 the answer.
const LOAD_WORD: u8 = 0x61; // dst = *(u32 *)(src + off)
const MOVE: u8 = 0xb7; // dst = imm
const MOVE_REGISTER: u8 = 0xbf;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT: u8 = 0x55; // if dst != imm
const JUMP: u8 = 0x05;
const JUMP_IF_BITS: u8 = 0x45; // if dst & imm
const EXIT: u8 = 0x95;

/// One instruction in its memory layout: opcode, registers, offset, immediate.
const fn instruction(code: u8, dst: u8, src: u8, offset: u16, immediate: u32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset as u64) << 16
        | (immediate as u64) << 32
}

fn assemble(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(AND, 3, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 2, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let access = u32::from(rule.access);
        let verdict: &[u64] = if rule.allow {
            &[
                instruction(AND, 2, 0, 0, !access),
                instruction(JUMP_IF_NOT, 2, 0, 2, 0),
                instruction(MOVE, 0, 0, 0, 1),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        } else {
            &[
                instruction(JUMP_IF_BITS, 2, 0, 1, access),
                instruction(JUMP, 0, 0, 2, 0),
                instruction(MOVE, 0, 0, 0, 0),
                instruction(EXIT, 0, 0, 0, 0),
            ]
        };
        let tests = [
            rule.kind.map(|k| (3, u32::from(k))),
            rule.major.map(|n| (4, n)),
            rule.minor.map(|n| (5, n)),
        ];
        let tests: Vec<(u8, u32)> = tests.into_iter().flatten().collect();
        let mut skip = u16::try_from(tests.len() + verdict.len()).unwrap_or(u16::MAX);
        for (register, value) in tests {
            skip -= 1;
            program.push(instruction(JUMP_IF_NOT, register, 0, skip, value));
        }
        program.extend(verdict);
    }
    program.extend([instruction(MOVE, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would; `None` if it leaves the instructions that `assemble` uses.
    fn run(program: &[u64], kind: u8, access: u8, major: u32, minor: u32) -> Option<u64> {
        let context = [
            u64::from(kind) | u64::from(access) << 16,
            major.into(),
            minor.into(),
        ];
        let mut r = [0u64; 6];
        let mut at = 0usize;
        loop {
            let i = *program.get(at)?;
            let byte = |n: u32| u8::try_from(i >> n & 0xff).unwrap();
            let (dst, src) = (usize::from(byte(8) & 15), usize::from(byte(8) >> 4));
            let offset = usize::try_from(i >> 16 & 0xffff).unwrap();
            let immediate = i >> 32;
            let extended = immediate
                | if immediate >> 31 == 1 {
                    0xffff_ffff << 32
                } else {
                    0
                };
            at += 1;
            match byte(0) {
                LOAD_WORD => r[dst] = context[offset / 4],
                MOVE => r[dst] = extended,
                MOVE_REGISTER => r[dst] = r[src],
                AND => r[dst] &= extended,
                SHIFT_RIGHT => r[dst] >>= immediate,
                JUMP_IF_NOT => at += if r[dst] == extended { 0 } else { offset },
                JUMP_IF_BITS => at += if r[dst] & extended == 0 { 0 } else { offset },
                JUMP => at += offset,
                EXIT => return Some(r[0]),
                _ => return None,
            }
        }
    }

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    fn allowed(json: &str, kind: u8, access: u8, major: u32, minor: u32) -> bool {
        let program = compile(&rules(json)).unwrap().unwrap();
        run(&program, kind, access, major, minor).unwrap() == 1
    }

    #[test]
    fn without_rules_only_the_defaults_are_allowed() {
        assert!(allowed("[]", CHAR, READ | WRITE, 1, 3));
        assert!(allowed("[]", CHAR, READ | WRITE, 136, 77));
        assert!(allowed("[]", BLOCK, MKNOD, 8, 0));
        assert!(!allowed("[]", BLOCK, READ, 8, 0));
        assert!(!allowed("[]", CHAR, READ, 1, 1));
        assert!(!allowed("[]", CHAR, MKNOD | READ, 1, 1));
    }

    #[test]
    fn the_last_rule_for_an_access_decides() {
        let json = r#"[{"allow":true,"type":"b","major":8,"access":"rw"},
                       {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#;
        assert!(allowed(json, BLOCK, READ | WRITE, 8, 0));
        assert!(allowed(json, BLOCK, READ, 8, 1));
        assert!(!allowed(json, BLOCK, READ | WRITE, 8, 1));
    }

    #[test]
    fn accesses_allowed_one_by_one_are_allowed_together() {
        let json = r#"[{"allow":true,"type":"c","major":9,"minor":9,"access":"r"},
                       {"allow":true,"type":"c","major":9,"minor":9,"access":"w"}]"#;
        assert!(allowed(json, CHAR, READ | WRITE, 9, 9));
        assert!(!allowed(json, BLOCK, READ | WRITE, 9, 9));
    }

    #[test]
    fn a_rule_for_every_device_forgets_what_came_before() {
        let json = r#"[{"allow":true,"type":"c","major":9,"minor":9,"access":"rwm"},
                       {"allow":false,"access":"rwm"}]"#;
        assert!(!allowed(json, CHAR, READ, 9, 9));
        let open = rules(r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"a"}]"#);
        assert_eq!(compile(&open).unwrap(), None);
    }

    #[test]
    fn everything_but_one_device_can_be_allowed() {
        let json = r#"[{"allow":true,"type":"a"},
                       {"allow":false,"type":"b","major":7,"minor":0,"access":"rw"}]"#;
        assert!(allowed(json, BLOCK, READ | WRITE, 7, 1));
        assert!(!allowed(json, BLOCK, READ, 7, 0));
        assert!(allowed(json, BLOCK, MKNOD, 7, 0));
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        for json in [
            r#"[{"allow":true,"type":"p","access":"r"}]"#,
            r#"[{"allow":true,"type":"c","major":1,"minor":1,"access":"rx"}]"#,
            r#"[{"allow":true,"type":"c","major":-2,"minor":1,"access":"r"}]"#,
        ] {
            assert!(compile(&rules(json)).is_err(), "{json}");
        }
    }
}
