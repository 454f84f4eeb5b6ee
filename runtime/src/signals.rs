//! Signal names and numbers, as `kill` accepts them.
//!
//! Contract: as runc: a decimal number is taken as it is, a name with or without `SIG` in any case; real-time signals
//! have no names. Numbers are those of x86-64 Linux, on host and guest alike.

/// Name without `SIG`, number.
const NAMES: &[(&str, i32)] = &[
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", 15),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
];

/// A signal that cannot be meant.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignalError {
    /// runc's words.
    #[error("unknown signal \"{0}\"")]
    Unknown(String),
    /// A number the kernel would refuse; runc's words.
    #[error("unable to signal init: invalid argument")]
    Invalid,
}

/// The number of a signal given by name or number. 0 asks only whether there is a process, as kill(2) does.
pub fn parse(text: &str) -> Result<i32, SignalError> {
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) {
            Ok(number)
        } else {
            Err(SignalError::Invalid)
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, number)| number)
        .ok_or_else(|| SignalError::Unknown(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_mean_the_same() {
        for text in ["SIGTERM", "sigterm", "TERM", "term", "15"] {
            assert_eq!(parse(text), Ok(15), "{text}");
        }
        assert_eq!(parse("SIGKILL"), Ok(9));
        assert_eq!(parse("winch"), Ok(28));
        assert_eq!(parse("64"), Ok(64));
        assert_eq!(parse("0"), Ok(0));
    }

    #[test]
    fn other_words_are_refused_in_runcs_words() {
        for text in ["FOO", "SIG", "", "SIGRTMIN+1", "SIGSIGTERM", "15x"] {
            assert_eq!(
                parse(text).unwrap_err().to_string(),
                format!("unknown signal \"{text}\"")
            );
        }
        for text in ["99", "65", "-1"] {
            assert_eq!(parse(text), Err(SignalError::Invalid), "{text}");
        }
    }

    #[test]
    fn the_table_is_sorted_and_holds_no_name_twice() {
        assert!(NAMES.is_sorted_by(|a, b| a.0 < b.0));
    }
}
