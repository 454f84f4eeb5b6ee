//! The text of a user namespace's mappings, as the kernel takes it: user_namespaces(7), `uid_map` and `gid_map`.

use std::fmt::Write;

/// A line for each mapping: the first id inside, the first outside, and how many.
#[must_use]
pub fn lines(mappings: impl IntoIterator<Item = (u32, u32, u32)>) -> String {
    let mut lines = String::new();
    for (inside, outside, count) in mappings {
        // Into a String: cannot fail.
        let _ = writeln!(lines, "{inside} {outside} {count}");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mapping_is_a_line() {
        assert_eq!(
            lines([(0, 1000, 1), (1, 100_000, 65_536)]),
            "0 1000 1\n1 100000 65536\n"
        );
        assert_eq!(lines([]), "");
    }
}
