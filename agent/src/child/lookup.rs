//! Finding the program to execute, with the words that runc (Go's `exec.LookPath`) uses when it is not there.
//!
//! Other software recognises these texts: podman and docker turn them into exit codes 126 and 127.

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;
use std::ffi::CString;

/// Why there is no such program.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("exec: {name:?}: executable file not found in $PATH")]
    NotInPath { name: String },
    #[error("exec: {name:?}: stat {name}: {reason}")]
    Stat { name: String, reason: &'static str },
    #[error("exec: {name:?}: permission denied")]
    Permission { name: String },
    #[error("exec: {name:?}: cannot run executable found relative to current directory")]
    Relative { name: String },
}

enum Found {
    Program,
    Not(Errno),
    NoPermission,
}

fn look(path: &str) -> Found {
    match stat(path) {
        Err(e) => Found::Not(e),
        Ok(s) => {
            let directory = FileType::from_raw_mode(s.st_mode) == FileType::Directory;
            let executable = s.st_mode & 0o111 != 0
                && accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) != Err(Errno::ACCESS);
            if directory || !executable {
                Found::NoPermission
            } else {
                Found::Program
            }
        }
    }
}

/// The path of the program called `name`, by the PATH of its own environment.
pub(super) fn program(name: &str, env: &[CString]) -> Result<CString, LookupError> {
    let path = env
        .iter()
        .find_map(|v| v.to_str().ok()?.strip_prefix("PATH="))
        .unwrap_or("");
    let found = search(name, path, look)?;
    CString::new(found).map_err(|_| LookupError::NotInPath {
        name: name.to_owned(),
    })
}

fn search(name: &str, path: &str, look: impl Fn(&str) -> Found) -> Result<String, LookupError> {
    let name_owned = || name.to_owned();
    if name.contains('/') {
        return match look(name) {
            Found::Program => Ok(name_owned()),
            Found::NoPermission => Err(LookupError::Permission { name: name_owned() }),
            Found::Not(e) => Err(LookupError::Stat {
                name: name_owned(),
                reason: words(e),
            }),
        };
    }
    for directory in path.split(':') {
        // Unix shell semantics: an empty element means the current directory.
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = format!("{}/{name}", directory.trim_end_matches('/'));
        if !path.is_empty() && matches!(look(&candidate), Found::Program) {
            if !candidate.starts_with('/') {
                return Err(LookupError::Relative { name: name_owned() });
            }
            return Ok(candidate);
        }
    }
    Err(LookupError::NotInPath { name: name_owned() })
}

/// The kernel's error as Go words it.
const fn words(e: Errno) -> &'static str {
    match e {
        Errno::NOENT => "no such file or directory",
        Errno::NOTDIR => "not a directory",
        Errno::ACCESS => "permission denied",
        Errno::LOOP => "too many levels of symbolic links",
        Errno::NAMETOOLONG => "file name too long",
        _ => "input/output error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, path: &str) -> Result<String, String> {
        search(name, path, |p| match p {
            "/bin/sh" | "./here" | "/x/sh" => Found::Program,
            "/etc" | "/bin/data" => Found::NoPermission,
            _ => Found::Not(Errno::NOENT),
        })
        .map_err(|e| e.to_string())
    }

    #[test]
    fn names_are_searched_in_order_and_paths_are_taken_as_they_are() {
        assert_eq!(run("sh", "/none:/bin/:/x").unwrap(), "/bin/sh");
        assert_eq!(run("/bin/sh", "").unwrap(), "/bin/sh");
    }

    #[test]
    fn the_words_are_runcs() {
        assert_eq!(
            run("foo", "/bin").unwrap_err(),
            r#"exec: "foo": executable file not found in $PATH"#
        );
        assert_eq!(
            run("sh", "").unwrap_err(),
            r#"exec: "sh": executable file not found in $PATH"#
        );
        assert_eq!(
            run("/no", "/bin").unwrap_err(),
            r#"exec: "/no": stat /no: no such file or directory"#
        );
        assert_eq!(
            run("/etc", "/bin").unwrap_err(),
            r#"exec: "/etc": permission denied"#
        );
        assert_eq!(
            run("data", "/bin").unwrap_err(),
            r#"exec: "data": executable file not found in $PATH"#
        );
        assert!(run("here", "").is_err());
        assert!(
            run("here", "/bin:")
                .unwrap_err()
                .contains("relative to current directory")
        );
    }
}
