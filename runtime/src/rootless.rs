//! Who is expected to lack root's rights on the host, by runc's rules.
//!
//! Contract: looks at this process alone, and only when asked: nobody pays for it who needs no answer.
//! Not here: what is forgiven then (`cgroup.rs`), where state is kept then (`commands/mod.rs`).

use std::{env, fs};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// When to do without the rights of root on host cgroups. Spellings are those of Go's `strconv.ParseBool`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Rootless {
    /// If the caller is not root, or root of a user namespace only.
    #[value(alias = "")]
    Auto,
    /// Always.
    #[value(aliases = ["1", "t"])]
    True,
    /// Never.
    #[value(aliases = ["0", "f"])]
    False,
}

impl Rootless {
    /// Whether this process may do without.
    pub fn applies(self) -> bool {
        match self {
            Self::True => true,
            Self::False => false,
            Self::Auto => !is_root() || in_user_namespace(),
        }
    }
}

/// Whether state is kept below `XDG_RUNTIME_DIR`: the real root never does, nor one who calls himself `root`.
pub fn keeps_state_of_its_own() -> bool {
    !is_root() || in_user_namespace() && env::var_os("USER").is_none_or(|user| user != "root")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process is in another user namespace than the first.
pub fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_less_than_all(&map))
}

/// The first user namespace maps every user to itself.
fn maps_less_than_all(uid_map: &str) -> bool {
    let mut words = uid_map.split_whitespace();
    let whole = [Some("0"), Some("0"), Some("4294967295"), None];
    whole.into_iter().any(|word| words.next() != word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_user_namespace_maps_everybody_to_himself() {
        assert!(!maps_less_than_all("         0          0 4294967295\n"));
        for map in [
            "         0       1000          1\n",
            "0 100000 65536\n",
            "0 0 4294967294\n",
            "0 0 4294967295\n1 1 1\n",
            "",
        ] {
            assert!(maps_less_than_all(map), "{map:?}");
        }
    }

    #[test]
    fn what_is_said_counts_more_than_who_says_it() {
        assert!(Rootless::True.applies() && !Rootless::False.applies());
    }
}
