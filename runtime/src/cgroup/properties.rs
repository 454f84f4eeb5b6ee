//! Limits and annotations as properties of a systemd unit: pure functions.
//!
//! Contract: what systemd has no property for, or what it could not say exactly, is left out: the cgroup's file is
//! written in any case. On a host with cgroup v1 systemd's words are those of cgroup v1, as in runc: an older systemd
//! knows no others.
//! Spec: org.freedesktop.systemd1(5), systemd.resource-control(5); runc 1.1, libcontainer/cgroups/systemd.

use zbus::Variant;

use super::{CgroupError, Version, limits::Limit, scope::Scope};

/// A property's name and value.
pub(super) type Property = (String, Variant<'static>);

/// Annotations with this prefix set properties, as in runc.
const ANNOTATION: &str = "org.systemd.property.";

/// No limit.
const INFINITE: u64 = u64::MAX;

const SECOND_US: u64 = 1_000_000;
/// systemd counts whole percents of a CPU.
const PERCENT_US: u64 = SECOND_US / 100;

/// A highest CPU number that no host has.
const MAX_CPUS: usize = 8192;

/// What a new scope is like, with the process `pid` in it.
pub(super) fn of_scope(
    scope: &Scope,
    pid: u32,
    limits: &[Limit],
    version: Version,
) -> Vec<Property> {
    let mut all = vec![
        property("Description", format!("caisson container {}", scope.name)),
        property("Slice", scope.slice.clone()),
        property("Delegate", true),
        property("PIDs", vec![pid]),
        property("DefaultDependencies", false),
    ];
    let disks = match version {
        Version::First => "BlockIO",
        Version::Second => "IO",
    };
    let counted = ["Memory", "CPU", disks, "Tasks"];
    all.extend(counted.map(|what| property(&format!("{what}Accounting"), true)));
    all.extend(of_limits(limits, version));
    all
}

/// Limits.
pub(super) fn of_limits(limits: &[Limit], version: Version) -> Vec<Property> {
    let of_limit = match version {
        Version::First => of_first,
        Version::Second => of_second,
    };
    limits.iter().flat_map(of_limit).collect()
}

/// With cgroup v1 systemd leaves cpusets alone.
fn of_first(Limit { first_version, .. }: &Limit) -> Vec<Property> {
    let value = |file: &str| {
        let mut values = first_version.iter();
        values.find_map(|(name, value)| (*name == file).then_some(value.as_str()))
    };
    let numbers = [
        ("memory.limit_in_bytes", "MemoryLimit"),
        ("cpu.shares", "CPUShares"),
        ("blkio.weight", "BlockIOWeight"),
    ];
    let numbers = numbers
        .into_iter()
        .filter_map(|(file, name)| Some(property(name, bounded(value(file)?)?)));
    let quota = value("cpu.cfs_quota_us").and_then(|quota| match value("cpu.cfs_period_us") {
        Some(period) => bandwidth(&format!("{quota} {period}")),
        None => bandwidth(quota),
    });
    numbers.chain(quota.into_iter().flatten()).collect()
}

fn of_second(Limit { file, value, .. }: &Limit) -> Vec<Property> {
    let number = |name: &str| {
        let value = value.strip_prefix("default ").unwrap_or(value);
        bounded(value).map_or_else(Vec::new, |value| vec![property(name, value)])
    };
    let set = |name: &str| bits(value).map_or_else(Vec::new, |value| vec![property(name, value)]);
    match *file {
        "memory.max" => number("MemoryMax"),
        "cpu.weight" => number("CPUWeight"),
        "io.weight" => number("IOWeight"),
        "cpuset.cpus" => set("AllowedCPUs"),
        "cpuset.mems" => set("AllowedMemoryNodes"),
        "cpu.max" => bandwidth(value).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// `cpu.max` as two properties: time in each second, rounded up to whole percents as runc does, and the period.
fn bandwidth(value: &str) -> Option<Vec<Property>> {
    let mut words = value.split_whitespace();
    let quota = bounded(words.next()?)?;
    let period = match words.next() {
        Some(period) => Some(period.parse::<u64>().ok().filter(|&period| period > 0)?),
        None => None,
    };
    let each_second = match (quota, period) {
        (INFINITE, _) => INFINITE,
        (quota, period) => {
            let exact = quota.checked_mul(SECOND_US)? / period.unwrap_or(100_000);
            exact.div_ceil(PERCENT_US) * PERCENT_US
        }
    };
    let mut all = vec![property("CPUQuotaPerSecUSec", each_second)];
    all.extend(period.map(|period| property("CPUQuotaPeriodUSec", period)));
    Some(all)
}

/// A number, or none, which is `max` or -1.
fn bounded(text: &str) -> Option<u64> {
    match text {
        "max" | "-1" => Some(INFINITE),
        number => number.parse().ok(),
    }
}

/// A list of ranges as systemd has it: bit n for number n, the lowest first.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for range in list
        .split(',')
        .map(str::trim)
        .filter(|range| !range.is_empty())
    {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX_CPUS {
            return None;
        }
        if bytes.len() <= last / 8 {
            bytes.resize(last / 8 + 1, 0);
        }
        for number in first..=last {
            bytes[number / 8] |= 1 << (number % 8);
        }
    }
    (!bytes.is_empty()).then_some(bytes)
}

/// The properties that annotations name.
pub(super) fn of_annotations<'a>(
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Vec<Property>, CgroupError> {
    let named = annotations.filter_map(|(key, value)| Some((key.strip_prefix(ANNOTATION)?, value)));
    let parsed = named.map(|(name, text)| {
        let refused = || CgroupError::Annotation {
            name: name.to_owned(),
            value: text.to_owned(),
        };
        let plain = name.len() > 2 && name.bytes().all(|byte| byte.is_ascii_alphabetic());
        let value = parse(text).filter(|_| plain).ok_or_else(refused)?;
        // As runc: seconds mean what systemd calls by another name and counts in microseconds.
        match name.strip_suffix("Sec") {
            Some(stem) if !name.ends_with("USec") => microseconds(&value)
                .map(|value| property(&format!("{stem}USec"), value))
                .ok_or_else(refused),
            _ => Ok((name.to_owned(), value)),
        }
    });
    parsed.collect()
}

fn microseconds(seconds: &Variant<'_>) -> Option<u64> {
    let seconds = match seconds {
        Variant::I32(seconds) => u64::try_from(*seconds).ok()?,
        Variant::U32(seconds) => u64::from(*seconds),
        Variant::I64(seconds) => u64::try_from(*seconds).ok()?,
        Variant::U64(seconds) => *seconds,
        _ => return None,
    };
    seconds.checked_mul(SECOND_US)
}

/// A value in GVariant's text form, as far as properties of units use it: truth, numbers with or without their type,
/// texts, and lists of texts.
fn parse(text: &str) -> Option<Variant<'static>> {
    let text = text.trim();
    if let Some(list) = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        let items: Option<Vec<String>> = list.split(',').map(|item| quoted(item.trim())).collect();
        return items.map(Variant::new);
    }
    if let Some(text) = quoted(text) {
        return Some(Variant::new(text));
    }
    match text.split_once(' ') {
        None if text == "true" => Some(Variant::new(true)),
        None if text == "false" => Some(Variant::new(false)),
        None | Some(("int32", _)) => number::<i32>(text),
        Some(("uint32", number_)) => number_.trim().parse::<u32>().ok().map(Variant::new),
        Some(("int64", number_)) => number_.trim().parse::<i64>().ok().map(Variant::new),
        Some(("uint64", number_)) => number_.trim().parse::<u64>().ok().map(Variant::new),
        Some(_) => None,
    }
}

fn number<N: std::str::FromStr + Into<Variant<'static>>>(text: &str) -> Option<Variant<'static>> {
    let digits = text.strip_prefix("int32 ").unwrap_or(text);
    digits.trim().parse::<N>().ok().map(Into::into)
}

/// A text in quotes of either kind, without escapes.
fn quoted(text: &str) -> Option<String> {
    ['\'', '"'].into_iter().find_map(|quote| {
        let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
        (!inner.contains([quote, '\\'])).then(|| inner.to_owned())
    })
}

fn property(name: &str, value: impl Into<Variant<'static>>) -> Property {
    (name.to_owned(), value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(file: &'static str, value: &str) -> Vec<Property> {
        let limit = Limit {
            file,
            value: value.to_owned(),
            first_version: Vec::new(),
        };
        of_limits(&[limit], Version::Second)
    }

    #[test]
    fn with_cgroup_v1_they_are_told_in_its_terms() {
        let told = |files: &[(&'static str, &str)]| {
            let files = files.iter().map(|&(file, value)| (file, value.to_owned()));
            let limit = Limit {
                file: "cpu.max",
                value: String::new(),
                first_version: files.collect(),
            };
            of_limits(&[limit], Version::First)
        };
        for (file, value, name, wanted) in [
            ("memory.limit_in_bytes", "1048576", "MemoryLimit", 1 << 20),
            ("memory.limit_in_bytes", "-1", "MemoryLimit", u64::MAX),
            ("cpu.shares", "512", "CPUShares", 512),
            ("blkio.weight", "500", "BlockIOWeight", 500),
            ("cpu.cfs_quota_us", "-1", "CPUQuotaPerSecUSec", u64::MAX),
        ] {
            assert_eq!(told(&[(file, value)]), [property(name, wanted)]);
        }
        assert_eq!(
            told(&[
                ("cpu.cfs_period_us", "50000"),
                ("cpu.cfs_quota_us", "55000")
            ]),
            [
                property("CPUQuotaPerSecUSec", 1_100_000_u64),
                property("CPUQuotaPeriodUSec", 50_000_u64)
            ]
        );
        assert!(told(&[("cpuset.cpus", "0")]).is_empty());
    }

    #[test]
    fn limits_are_told_in_systemds_terms() {
        for (file, value, name, wanted) in [
            ("memory.max", "1048576", "MemoryMax", 1 << 20),
            ("memory.max", "max", "MemoryMax", u64::MAX),
            ("cpu.weight", "39", "CPUWeight", 39),
            ("io.weight", "default 100", "IOWeight", 100),
        ] {
            assert_eq!(limited(file, value), [property(name, wanted)]);
        }
        for (file, value) in [
            ("io.max", "8:0 rbps=5"),
            ("memory.max", "much"),
            ("cpuset.cpus", "9-1"),
        ] {
            assert!(limited(file, value).is_empty(), "{file} {value}");
        }
    }

    #[test]
    fn a_quota_is_rounded_up_to_whole_percents() {
        let quota = |value| limited("cpu.max", value);
        let wanted = |each_second: u64, period: u64| {
            [
                property("CPUQuotaPerSecUSec", each_second),
                property("CPUQuotaPeriodUSec", period),
            ]
        };
        assert_eq!(quota("55000 50000"), wanted(1_100_000, 50_000));
        assert_eq!(quota("33333 100000"), wanted(340_000, 100_000));
        assert_eq!(quota("max 100000"), wanted(u64::MAX, 100_000));
        assert_eq!(quota("max"), [property("CPUQuotaPerSecUSec", u64::MAX)]);
    }

    #[test]
    fn lists_of_cpus_become_bits() {
        assert_eq!(bits("0-2,8\n"), Some(vec![0b111, 1]));
        assert_eq!(bits("15"), Some(vec![0, 0x80]));
        for nonsense in ["", "x", "3-1", "0-99999999"] {
            assert_eq!(bits(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn annotations_set_properties() {
        let of = |name: &str, text: &str| {
            let key = format!("org.systemd.property.{name}");
            of_annotations([(key.as_str(), text), ("other", "x")].into_iter())
        };
        assert_eq!(
            of("CollectMode", "'inactive-or-failed'").unwrap(),
            [property("CollectMode", "inactive-or-failed")]
        );
        assert_eq!(
            of("TimeoutStopUSec", "uint64 5000000").unwrap(),
            [property("TimeoutStopUSec", 5_000_000_u64)]
        );
        assert_eq!(
            of("TimeoutStopSec", "5").unwrap(),
            [property("TimeoutStopUSec", 5_000_000_u64)]
        );
        assert_eq!(
            of("After", "['a.service', \"b.service\"]").unwrap(),
            [property(
                "After",
                vec!["a.service".to_owned(), "b.service".to_owned()]
            )]
        );
        assert_eq!(
            of("Delegate", "true").unwrap(),
            [property("Delegate", true)]
        );
        for (name, text) in [
            ("X1y", "true"),
            ("Name", "byte 1"),
            ("Name", "'a\\'b'"),
            ("Name", "five"),
            ("StopSec", "'a'"),
        ] {
            assert!(
                matches!(of(name, text), Err(CgroupError::Annotation { .. })),
                "{name} {text}"
            );
        }
    }
}
