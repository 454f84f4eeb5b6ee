//! The command line that containerd gives a shim, in the syntax of Go's `flag` package.
//!
//! Contract: `-name value`, `-name=value` and two dashes mean the same; flags end at the first other word, which is the
//! action. Unknown flags are refused, as Go does.

use std::{ffi::OsString, path::PathBuf};

/// What containerd wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Args {
    /// containerd's namespace.
    pub(super) namespace: String,
    /// The container or sandbox.
    pub(super) id: String,
    /// containerd's gRPC socket.
    pub(super) address: String,
    /// containerd's program, for events; this shim speaks ttrpc instead.
    pub(super) publish_binary: String,
    /// The bundle, for `delete`; else the working directory.
    pub(super) bundle: PathBuf,
    /// The socket to serve on; chosen by `start` here.
    pub(super) socket: String,
    /// Say more in the log.
    pub(super) debug: bool,
    /// Print the version and end.
    pub(super) version: bool,
    /// Describe the runtime and end.
    pub(super) info: bool,
    /// `start`, `delete`, or nothing for the server.
    pub(super) action: String,
}

/// A command line that means nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ArgsError {
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    #[error("invalid boolean value {value:?} for -{flag}")]
    NotBoolean { flag: String, value: String },
    #[error("{0:?} is not UTF-8")]
    NotText(OsString),
}

impl Args {
    /// Reads the words after the program's name.
    pub(super) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut args = Self::default();
        let mut words = words
            .into_iter()
            .map(|word| word.into_string().map_err(ArgsError::NotText));
        while let Some(word) = words.next().transpose()? {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                args.action = word;
                break;
            };
            let (flag, value) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            if let Some(switch) = args.switch(flag) {
                *switch = boolean(flag, value)?;
                continue;
            }
            let value = match value {
                Some(value) => Some(value),
                None => words.next().transpose()?,
            };
            args.set(flag, value)?;
        }
        Ok(args)
    }

    fn switch(&mut self, flag: &str) -> Option<&mut bool> {
        match flag {
            "debug" => Some(&mut self.debug),
            "v" => Some(&mut self.version),
            "info" => Some(&mut self.info),
            _ => None,
        }
    }

    fn set(&mut self, flag: &str, value: Option<String>) -> Result<(), ArgsError> {
        let text = match flag {
            "namespace" => &mut self.namespace,
            "id" => &mut self.id,
            "address" => &mut self.address,
            "publish-binary" => &mut self.publish_binary,
            "socket" => &mut self.socket,
            "bundle" => {
                self.bundle = value.ok_or_else(|| ArgsError::NoValue(flag.into()))?.into();
                return Ok(());
            }
            _ => return Err(ArgsError::Unknown(flag.to_owned())),
        };
        *text = value.ok_or_else(|| ArgsError::NoValue(flag.to_owned()))?;
        Ok(())
    }
}

fn boolean(flag: &str, value: Option<String>) -> Result<bool, ArgsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgsError::NotBoolean {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_containerd_gives_is_understood() {
        let args = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc -debug start",
        );
        let args = args.unwrap();
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.address, "/run/c.sock");
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert_eq!(args.id, "abc");
        assert!(args.debug && !args.info && !args.version);
        assert_eq!(args.action, "start");
    }

    #[test]
    fn every_form_of_a_flag_means_the_same() {
        for line in ["-id a -bundle /b delete", "--id=a -bundle=/b delete"] {
            let args = parse(line).unwrap();
            assert_eq!((args.id.as_str(), args.action.as_str()), ("a", "delete"));
            assert_eq!(args.bundle, PathBuf::from("/b"));
        }
        assert!(parse("-info").unwrap().info);
        assert!(!parse("-debug=false").unwrap().debug);
    }

    #[test]
    fn nonsense_is_refused_in_gos_words() {
        assert_eq!(
            parse("-x y").unwrap_err().to_string(),
            "flag provided but not defined: -x"
        );
        assert_eq!(
            parse("-id").unwrap_err().to_string(),
            "flag needs an argument: -id"
        );
        assert!(parse("-debug=maybe").is_err());
    }
}
