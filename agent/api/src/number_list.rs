//! Lists of processors and of memory nodes, as `config.json` writes them: `0-3,7`.
//!
//! Contract: pure. White space around a part and empty parts are allowed, as in runc; what names nothing at all is refused.

use std::collections::BTreeSet;

/// The numbers that a set of the kernel's ABI has room for, as in runc: 0 to 1023.
pub const LIMIT: u32 = 1024;

/// A list that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Not a number, or not a range of them.
    #[error("invalid range: {0}")]
    Range(String),
    /// Beyond [`LIMIT`].
    #[error("values larger than {} are not supported", LIMIT - 1)]
    TooLarge,
    /// Nothing but commas.
    #[error("no numbers found in {0:?}")]
    Empty(String),
}

/// The numbers of a list, in their order.
///
/// # Errors
/// [`ListError`].
pub fn parse(text: &str) -> Result<Vec<u32>, ListError> {
    let mut all = BTreeSet::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let bad = || ListError::Range(part.to_owned());
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain
                .then(|| digits.parse::<u32>().unwrap_or(u32::MAX))
                .ok_or_else(bad)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first.max(last) >= LIMIT {
            return Err(ListError::TooLarge);
        }
        if first > last {
            return Err(bad());
        }
        all.extend(first..=last);
    }
    if all.is_empty() {
        return Err(ListError::Empty(text.to_owned()));
    }
    Ok(all.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges_in_any_order_are_a_list() {
        assert_eq!(parse("7, 0-2,,1").unwrap(), [0, 1, 2, 7]);
        assert_eq!(parse("1023").unwrap(), [1023]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for bad in ["x", "3-1", "-1", "1-", "1-2-3", "+1"] {
            assert_eq!(parse(bad), Err(ListError::Range(bad.to_owned())), "{bad}");
        }
        for large in ["1024", "0-99999999999999"] {
            assert_eq!(parse(large), Err(ListError::TooLarge), "{large}");
        }
        for empty in ["", " , "] {
            assert_eq!(parse(empty), Err(ListError::Empty(empty.to_owned())));
        }
    }
}
