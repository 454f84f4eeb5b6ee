//! The process around `caisson_vmm`.
fn main() {}
