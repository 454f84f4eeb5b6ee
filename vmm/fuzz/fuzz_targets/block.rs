//! libFuzzer on `caisson_vmm::fuzzing`, target `block`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| caisson_vmm::fuzzing::run("block", bytes));
