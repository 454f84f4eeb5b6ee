//! Where messages go: runc's log file and standard error, in runc's shapes.
//!
//! Contract: without `--log`, a message is one line on standard error: for a terminal `ERRO[0000] text`, else
//! `time="..." level=error msg="text"` (or JSON with `--log-format json`). With `--log FILE` that line is appended to
//! the file, and errors appear on standard error as bare text. A line is written with one `write`.
//! podman, conmon and containerd read the JSON shape.
//! Not here: what is said. Times are UTC.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// The log of one command.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: Format,
    debug: bool,
    /// Which container, in which sandbox.
    about: Option<[String; 2]>,
}

/// Shape of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// logrus's text, or its short form for terminals.
    Text,
    /// One JSON object a line.
    Json,
}

/// How grave a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Only with `--debug`.
    Debug,
    /// Something was not done as asked, but the command goes on.
    Warning,
    /// The command failed.
    Error,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// runc's words.
    #[error("invalid log-format: {0}")]
    Format(String),
    /// The file cannot be opened.
    #[error("open the log file {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Log {
    /// Messages on standard error, as text: for what happens before the command line is understood.
    pub const fn plain() -> Self {
        Self {
            file: None,
            format: Format::Text,
            debug: false,
            about: None,
        }
    }

    /// Opens the log that the global options ask for.
    pub fn open(file: Option<&Path>, format: &str, debug: bool) -> Result<Self, LogError> {
        let format = match format {
            "text" => Format::Text,
            "json" => Format::Json,
            other => return Err(LogError::Format(other.to_owned())),
        };
        let file = file
            .map(|path| {
                OpenOptions::new()
                    .append(true)
                    .create(true)
                    .mode(0o644)
                    .open(path)
                    .map_err(|source| LogError::Open {
                        path: path.into(),
                        source,
                    })
            })
            .transpose()?;
        Ok(Self {
            file,
            format,
            debug,
            about: None,
        })
    }

    /// The log of one container's life, whose lines name it and its sandbox: many of them may share a file.
    pub fn about(self, container: &str, sandbox: &str) -> Self {
        Self {
            about: Some([container.to_owned(), sandbox.to_owned()]),
            ..self
        }
    }

    /// The command failed.
    pub fn error(&self, text: &str) {
        self.write(Level::Error, text);
        if self.file.is_some() {
            to_stderr(&format!("{text}\n"));
        }
    }

    /// Something was not done as asked, but the command goes on.
    pub fn warning(&self, text: &str) {
        self.write(Level::Warning, text);
    }

    /// For whoever looks for a fault.
    pub fn debug(&self, text: &str) {
        if self.debug {
            self.write(Level::Debug, text);
        }
    }

    /// Whether [`Log::debug`] says anything.
    pub const fn is_debug(&self) -> bool {
        self.debug
    }

    fn write(&self, level: Level, text: &str) {
        let now = SystemTime::now();
        let about = self
            .about
            .as_ref()
            .map(|[container, sandbox]| [("container", container.as_str()), ("sandbox", sandbox)]);
        let about = about.as_ref().map_or(&[][..], |fields| fields);
        match &self.file {
            // A log that cannot be written must not change what the command does.
            Some(file) => {
                let mut file: &File = file;
                drop(file.write_all(line(self.format, level, text, now, about).as_bytes()));
            }
            None if self.format == Format::Text && io::stderr().is_terminal() => {
                to_stderr(&terminal_line(level, text));
            }
            None => to_stderr(&line(self.format, level, text, now, about)),
        }
    }
}

fn to_stderr(line: &str) {
    // Nobody is left to tell when standard error is closed.
    drop(io::stderr().write_all(line.as_bytes()));
}

/// One line of a log, with its end. `fields` say what it is about, by names in their order; values are ids.
pub(crate) fn line(
    format: Format,
    level: Level,
    text: &str,
    now: SystemTime,
    fields: &[(&str, &str)],
) -> String {
    let level = match level {
        Level::Debug => "debug",
        Level::Warning => "warning",
        Level::Error => "error",
    };
    let time = humantime::format_rfc3339_seconds(now);
    let text = quoted(text);
    let mut about = String::new();
    for (name, value) in fields {
        // Writing to a String cannot fail.
        let _ = match format {
            Format::Json => write!(about, ",\"{name}\":{}", quoted(value)),
            Format::Text => write!(about, " {name}={value}"),
        };
    }
    match format {
        Format::Json => {
            format!("{{\"level\":\"{level}\",\"msg\":{text},\"time\":\"{time}\"{about}}}\n")
        }
        Format::Text => format!("time=\"{time}\" level={level} msg={text}{about}\n"),
    }
}

fn terminal_line(level: Level, text: &str) -> String {
    let (colour, name) = match level {
        Level::Debug => (37, "DEBU"),
        Level::Warning => (33, "WARN"),
        Level::Error => (31, "ERRO"),
    };
    format!("\u{1b}[{colour}m{name}\u{1b}[0m[0000] {text:<44} \n")
}

/// A JSON string; logrus quotes its text form alike, as far as printable text goes.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            // Writing to a String cannot fail.
            c if c.is_control() => drop(write!(out, "\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    fn then() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_264_135)
    }

    #[test]
    fn json_lines_are_as_runc_writes_them() {
        assert_eq!(
            line(
                Format::Json,
                Level::Error,
                "runc create failed: x",
                then(),
                &[]
            ),
            "{\"level\":\"error\",\"msg\":\"runc create failed: x\",\"time\":\"2026-11-21T12:28:55Z\"}\n"
        );
    }

    #[test]
    fn text_lines_are_as_runc_writes_them() {
        assert_eq!(
            line(
                Format::Text,
                Level::Error,
                "exec: \"/nope\": x",
                then(),
                &[]
            ),
            "time=\"2026-11-21T12:28:55Z\" level=error msg=\"exec: \\\"/nope\\\": x\"\n"
        );
    }

    #[test]
    fn a_line_says_what_it_is_about_in_either_form() {
        let about = [("container", "c1"), ("sandbox", "s1")];
        let text = line(Format::Text, Level::Warning, "x", then(), &about);
        assert!(
            text.ends_with("msg=\"x\" container=c1 sandbox=s1\n"),
            "{text}"
        );
        let json = line(Format::Json, Level::Warning, "x", then(), &about);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (&json["container"], &json["sandbox"]),
            (&"c1".into(), &"s1".into())
        );
    }

    #[test]
    fn terminals_get_the_short_form() {
        assert_eq!(
            terminal_line(Level::Error, "container does not exist"),
            "\u{1b}[31mERRO\u{1b}[0m[0000] container does not exist                     \n"
        );
    }

    #[test]
    fn json_stays_json_whatever_the_text_is() {
        let nasty = "a\"b\\c\nd\te\u{1}\u{7f}\u{85}é\u{1f980}";
        let value: serde_json::Value = serde_json::from_str(&quoted(nasty)).unwrap();
        assert_eq!(value, nasty);
    }

    #[test]
    fn a_log_file_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for _ in 0..2 {
            Log::open(Some(&path), "json", false).unwrap().warning("w");
        }
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(
            text.lines()
                .all(|line| line.contains("\"level\":\"warning\""))
        );
    }

    #[test]
    fn a_containers_log_names_it_and_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::open(Some(&path), "json", false).unwrap();
        log.about("c1", "s1").error("e");
        let text = fs::read_to_string(&path).unwrap();
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&line["container"], &line["sandbox"], &line["msg"]),
            (&"c1".into(), &"s1".into(), &"e".into())
        );
    }

    #[test]
    fn unknown_formats_are_refused_in_runcs_words() {
        let error = Log::open(None, "xml", false).unwrap_err();
        assert_eq!(error.to_string(), "invalid log-format: xml");
    }
}
