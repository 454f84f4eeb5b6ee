//! The MP table: how the guest learns of its processors, its IOAPIC and the wiring of its interrupts without ACPI.
//!
//! Pure: bytes from a number of processors and the interrupts in use. Layout: floating pointer (16 bytes), then the configuration table.
//! Spec: Intel MultiProcessor Specification 1.4, sections 4.1 to 4.3. Processor n has APIC id n; interrupt n
//! (edge-triggered, called ISA) is wired to pin n of the one IOAPIC. Interrupts that nothing uses are left out: each would
//! cost the guest eight accesses to the IOAPIC, each an exit.

/// Where the table lies: the last KiB of conventional memory, which the kernel searches.
pub const ADDR: u64 = 0x9_fc00;
/// Room for it.
pub const MAX_BYTES: usize = 0x400;

const IOAPIC_ADDR: u32 = 0xfec0_0000;
const LAPIC_ADDR: u32 = 0xfee0_0000;
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const SPEC_REVISION: u8 = 4;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// Floating pointer and table for `cpus` processors and these interrupts, to be placed at [`ADDR`].
pub fn build(cpus: u8, interrupts: &[u8]) -> Vec<u8> {
    let (entries, count) = entries(cpus, interrupts);
    let mut table = Vec::with_capacity(MAX_BYTES);
    table.extend(b"PCMP");
    // At most 32 processors: the table is below 1 KiB.
    let length = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    table.extend(length.to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"CAISSON MICROVM     ");
    table.extend([0; 6]); // no OEM table
    table.extend(count.to_le_bytes());
    table.extend(LAPIC_ADDR.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);

    let mut all = Vec::with_capacity(16 + table.len());
    all.extend(b"_MP_");
    all.extend((0x9_fc10u32).to_le_bytes());
    all.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    all[10] = checksum(&all);
    all.extend(table);
    all
}

fn entries(cpus: u8, interrupts: &[u8]) -> (Vec<u8>, u16) {
    let mut bytes = Vec::new();
    let ioapic_id = cpus; // the first id that no processor has
    for id in 0..cpus {
        let flags = if id == 0 {
            ENABLED | BOOTSTRAP
        } else {
            ENABLED
        };
        bytes.extend([PROCESSOR, id, LAPIC_VERSION, flags]);
        bytes.extend([0; 16]); // signature and features: CPUID tells
    }
    bytes.extend([BUS, 0]);
    bytes.extend(b"ISA   ");
    bytes.extend([IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED]);
    bytes.extend(IOAPIC_ADDR.to_le_bytes());
    for pin in interrupts {
        bytes.extend([INTERRUPT, INT, 0, 0, 0, *pin, ioapic_id, *pin]);
    }
    bytes.extend([LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    bytes.extend([LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_LAPICS, 1]);
    // At most 24 interrupts.
    let interrupts = u16::try_from(interrupts.len()).unwrap_or(u16::MAX);
    (bytes, u16::from(cpus) + 1 + 1 + interrupts + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_lengths_and_counts_agree() {
        let interrupts: Vec<u8> = (0..24).collect();
        for cpus in 1..=32 {
            let bytes = build(cpus, &interrupts[..usize::from(cpus % 25)]);
            assert!(bytes.len() <= MAX_BYTES, "{cpus} processors");
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(
                u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap())),
                ADDR + 16
            );
            assert_eq!((checksum(pointer), checksum(table)), (0, 0));
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let mut walked = (44, 0u16);
            while walked.0 < table.len() {
                walked.0 += if table[walked.0] == PROCESSOR { 20 } else { 8 };
                walked.1 += 1;
            }
            assert_eq!(
                walked,
                (table.len(), u16::from_le_bytes([table[34], table[35]]))
            );
        }
    }
}
