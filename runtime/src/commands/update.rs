//! `update`: the command line as a `linux.resources` object, or a file that is one.

use std::{
    fmt::Display,
    fs,
    io::{self, Read},
    path::Path,
    process::ExitCode,
    str::FromStr,
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::{Context, ask};
use crate::{
    cli::Update,
    control::Request,
    error::CommandError,
    state::{ContainerId, StateDir, Status},
};

/// How long the monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The longest file with resources, in bytes: what a packet carries, with some room.
const MAX_BYTES: u64 = 48 << 10;

/// Why the resources are not understood.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The file cannot be read.
    #[error("open {0}")]
    Read(String, #[source] io::Error),
    /// It is not JSON.
    #[error("{0}")]
    Json(String, #[source] serde_json::Error),
    /// runc's words, which are Go's.
    #[error("invalid value for {option}: {why}")]
    Value {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A virtual machine has no such thing; runc's words.
    #[error("{0} is not enabled")]
    Rdt(&'static str),
}

/// Changes a container's limits.
pub(super) fn run(args: &Update, context: &Context) -> Result<ExitCode, CommandError> {
    let dir = StateDir::open(&context.root, &ContainerId::parse(&args.id)?)?;
    let resources = match args.resources.as_deref() {
        Some(path) => from_file(path)?,
        None => from_options(args)?.to_string(),
    };
    if args.kernel_memory.is_some() || args.kernel_memory_tcp.is_some() {
        context
            .log
            .warning("Kernel memory settings are ignored and will be removed");
    }
    if args.l3_cache_schema.is_some() {
        return Err(UpdateError::Rdt("Intel RDT/CAT: l3 cache schema").into());
    }
    if args.mem_bw_schema.is_some() {
        return Err(UpdateError::Rdt("Intel RDT/MBA: memory bandwidth schema").into());
    }
    let otherwise = "container not running";
    if dir.state()?.status == Status::Stopped {
        return Err(CommandError::Refused(otherwise.into()));
    }
    let request = Request::Update { resources };
    ask(&dir, otherwise, PATIENCE, |control| control.order(&request))?;
    Ok(ExitCode::SUCCESS)
}

fn from_file(path: &Path) -> Result<String, UpdateError> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().take(MAX_BYTES).read_to_string(&mut text)
    } else {
        fs::File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text))
    };
    let name = || path.display().to_string();
    read.map_err(|source| UpdateError::Read(name(), source))?;
    // A value that does not parse is told by the command's own line, not by the monitor's.
    let value: Value =
        serde_json::from_str(&text).map_err(|source| UpdateError::Json(name(), source))?;
    Ok(value.to_string())
}

/// The options that are given; zeros change nothing.
fn from_options(args: &Update) -> Result<Value, UpdateError> {
    let mut memory = Map::new();
    for (name, option, text) in [
        ("limit", "memory", &args.memory),
        (
            "reservation",
            "memory-reservation",
            &args.memory_reservation,
        ),
        ("swap", "memory-swap", &args.memory_swap),
    ] {
        if let Some(text) = text {
            memory.insert(name.into(), size(option, text)?.into());
        }
    }
    let mut cpu = Map::new();
    for (name, option, text) in [
        ("period", "cpu-period", &args.cpu_period),
        ("realtimePeriod", "cpu-rt-period", &args.cpu_rt_period),
        ("burst", "cpu-burst", &args.cpu_burst),
        ("shares", "cpu-share", &args.cpu_share),
    ] {
        if let Some(text) = text {
            cpu.insert(
                name.into(),
                number::<u64>(option, "ParseUint", text)?.into(),
            );
        }
    }
    for (name, option, text) in [
        ("quota", "cpu-quota", &args.cpu_quota),
        ("realtimeRuntime", "cpu-rt-runtime", &args.cpu_rt_runtime),
        ("idle", "cpu-idle", &args.cpu_idle),
    ] {
        if let Some(text) = text {
            cpu.insert(name.into(), number::<i64>(option, "ParseInt", text)?.into());
        }
    }
    for (name, list) in [("cpus", &args.cpuset_cpus), ("mems", &args.cpuset_mems)] {
        if let Some(list) = list {
            cpu.insert(name.into(), list.as_str().into());
        }
    }
    Ok(json!({
        "memory": memory,
        "cpu": cpu,
        "blockIO": {"weight": args.blkio_weight},
        "pids": {"limit": args.pids_limit},
    }))
}

/// A number, with Go's words for what is none.
fn number<T: FromStr<Err: Display>>(
    option: &'static str,
    function: &str,
    text: &str,
) -> Result<T, UpdateError> {
    text.parse().map_err(|_| {
        let digits = text.strip_prefix('-').unwrap_or(text);
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let what = if is_number && !(function == "ParseUint" && text.starts_with('-')) {
            "value out of range"
        } else {
            "invalid syntax"
        };
        UpdateError::Value {
            option,
            why: format!("strconv.{function}: parsing \"{text}\": {what}"),
        }
    })
}

/// An amount of memory such as `20m` or `1.5GiB`: powers of 1,024 (Docker's go-units). `-1` is no limit.
fn size(option: &'static str, text: &str) -> Result<i64, UpdateError> {
    if text == "-1" {
        return Ok(-1);
    }
    let invalid = || UpdateError::Value {
        option,
        why: format!("invalid size: '{text}'"),
    };
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let suffix = suffix
        .strip_prefix(' ')
        .unwrap_or(suffix)
        .to_ascii_lowercase();
    let unit = suffix.trim_end_matches('b').trim_end_matches('i');
    let power = match unit {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(invalid()),
    };
    let scale = 1_u64 << (10 * power);
    if !["", "b", "i", "ib"].contains(&suffix.strip_prefix(unit).unwrap_or("x")) {
        return Err(invalid());
    }
    match digits.split_once('.') {
        None => {
            let number: u64 = digits.parse().map_err(|_| invalid())?;
            number.checked_mul(scale)
        }
        Some((whole, part)) if part.len() <= 9 => {
            let whole: u64 = whole.parse().map_err(|_| invalid())?;
            let places = u32::try_from(part.len()).unwrap_or_default();
            let part: u64 = part.parse().map_err(|_| invalid())?;
            let part = u128::from(part) * u128::from(scale) / 10_u128.pow(places);
            let part = u64::try_from(part).unwrap_or_default();
            whole
                .checked_mul(scale)
                .and_then(|whole| whole.checked_add(part))
        }
        Some(_) => None,
    }
    .and_then(|bytes| i64::try_from(bytes).ok())
    .ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn built(words: &str) -> Result<Value, String> {
        let Some(Command::Update(args)) = Cli::parse_from(words.split_whitespace()).command else {
            panic!("not update");
        };
        from_options(&args).map_err(|error| error.to_string())
    }

    #[test]
    fn only_what_is_given_is_changed() {
        assert_eq!(
            built("caisson update c").unwrap(),
            json!({"memory": {}, "cpu": {}, "blockIO": {"weight": 0}, "pids": {"limit": 0}})
        );
        let all = built(
            "caisson update --memory 20m --memory-swap -1 --memory-reservation 1k --cpu-quota -1 --cpu-period 5000 \
             --cpu-burst 100 --cpu-idle 0 --cpu-share 7 --cpuset-cpus 0-1 --cpuset-mems 0 --pids-limit -1 --blkio-weight 10 c",
        );
        assert_eq!(
            all.unwrap(),
            json!({
                "memory": {"limit": 20_971_520, "swap": -1, "reservation": 1024},
                "cpu": {"quota": -1, "period": 5000, "burst": 100, "idle": 0, "shares": 7, "cpus": "0-1", "mems": "0"},
                "blockIO": {"weight": 10},
                "pids": {"limit": -1},
            })
        );
    }

    #[test]
    fn what_is_no_number_is_refused_in_gos_words() {
        let refused = |words: &str| built(&format!("caisson update {words} c")).unwrap_err();
        assert_eq!(
            refused("--cpu-quota abc"),
            "invalid value for cpu-quota: strconv.ParseInt: parsing \"abc\": invalid syntax"
        );
        assert_eq!(
            refused("--cpu-share -1"),
            "invalid value for cpu-share: strconv.ParseUint: parsing \"-1\": invalid syntax"
        );
        assert_eq!(
            refused("--cpu-period 99999999999999999999"),
            "invalid value for cpu-period: strconv.ParseUint: parsing \"99999999999999999999\": value out of range"
        );
        assert_eq!(
            refused("--memory 10zb"),
            "invalid value for memory: invalid size: '10zb'"
        );
    }

    #[test]
    fn amounts_of_memory_are_powers_of_1024() {
        for (text, wanted) in [
            ("1", 1),
            ("2b", 2),
            ("3K", 3 << 10),
            ("3kb", 3 << 10),
            ("4MiB", 4 << 20),
            ("1.5g", 3 << 29),
            ("2 gb", 2 << 30),
            ("-1", -1),
        ] {
            assert_eq!(size("memory", text).unwrap(), wanted, "{text}");
        }
        for text in [
            "",
            "b",
            "-2",
            "1..5",
            "1e3",
            "1kk",
            "1bi",
            "99999999p",
            "9999999999999999999",
        ] {
            assert!(size("memory", text).is_err(), "{text}");
        }
    }
}
