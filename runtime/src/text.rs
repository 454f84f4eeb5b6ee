//! Text from the other side of the border, made fit for a terminal and a log file.

/// The text as one printable line of at most `max_bytes` bytes: line ends become spaces, other control characters
/// their escapes.
pub fn one_line(text: &str, max_bytes: usize) -> String {
    let mut line = String::new();
    for character in text.trim_end().chars() {
        let before = line.len();
        match character {
            '\n' | '\r' | '\t' => line.push(' '),
            control if control.is_control() => line.extend(control.escape_default()),
            // Characters that turn the direction of text around could disguise what a line says.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                line.extend(character.escape_default());
            }
            plain => line.push(plain),
        }
        if line.len() > max_bytes {
            line.truncate(before);
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn control_characters_cannot_reach_a_terminal() {
        assert_eq!(
            one_line("a\nb\tc\x1b[31m\u{202e}\n", 100),
            "a b c\\u{1b}[31m\\u{202e}"
        );
    }

    #[test]
    fn a_line_is_cut_between_characters() {
        assert_eq!(one_line("aäöü", 4), "aä");
        assert_eq!(one_line("abc", 0), "");
    }
}
