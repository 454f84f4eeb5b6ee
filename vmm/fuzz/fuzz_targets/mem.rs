//! libFuzzer on `caisson_vmm::fuzzing`, target `mem`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| caisson_vmm::fuzzing::run("mem", bytes));
