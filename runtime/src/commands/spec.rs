//! `spec`: writes a first `config.json`, the one that `runc spec` writes, for a person to edit.
//!
//! As runc's, it has a cgroup namespace where the host has cgroup v2.
//! Only the hostname differs.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::ExitCode,
};

use crate::{cgroup, cli::SpecArgs, error::CommandError};

/// runc 1.1.5's output, with our name.
const DEFAULT: &str = include_str!("config.json");

pub(super) fn spec(args: &SpecArgs) -> Result<ExitCode, CommandError> {
    let path = args
        .bundle
        .as_deref()
        .unwrap_or(Path::new(""))
        .join("config.json");
    let text = text(args.rootless, cgroup::is_v2());
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o666)
        .open(&path);
    match file.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(CommandError::SpecExists),
        Err(source) => Err(CommandError::Write {
            what: path.display().to_string(),
            source,
        }),
    }
}

fn text(for_rootless: bool, is_v2: bool) -> String {
    let text = match is_v2 {
        true => with_namespace(DEFAULT, "cgroup"),
        false => DEFAULT.to_owned(),
    };
    match for_rootless {
        true => rootless(&text),
        false => text,
    }
}

/// One more namespace, at the end of the list.
fn with_namespace(text: &str, kind: &str) -> String {
    let end = "\n\t\t\t}\n\t\t],\n\t\t\"maskedPaths\"";
    let longer = format!("\n\t\t\t}},\n\t\t\t{{\n\t\t\t\t\"type\": \"{kind}\"{end}");
    text.replace(end, &longer)
}

/// What else differs then: who shares the host's network may neither mount a sysfs nor name groups.
const REPLACED: &[(&str, &str)] = &[
    ("\"mode=0620\",\n\t\t\t\t\"gid=5\"", "\"mode=0620\""),
    ("\n\t\t\t{\n\t\t\t\t\"type\": \"network\"\n\t\t\t},", ""),
    (
        "\"type\": \"sysfs\",\n\t\t\t\"source\": \"sysfs\",\n\t\t\t\"options\": [\n",
        "\"type\": \"none\",\n\t\t\t\"source\": \"/sys\",\n\t\t\t\"options\": [\n\t\t\t\t\"rbind\",\n",
    ),
];

/// The default for a caller without root's rights: one user, mapped to root in the container, no groups, no limits.
fn rootless(default: &str) -> String {
    let user = rustix::process::geteuid().as_raw();
    let group = rustix::process::getegid().as_raw();
    let map = |name: &str, id: u32| {
        format!(
            "\t\t\"{name}\": [\n\t\t\t{{\n\t\t\t\t\"containerID\": 0,\n\t\t\t\t\"hostID\": {id},\n\t\t\t\t\"size\": 1\n\t\t\t}}\n\t\t],\n"
        )
    };
    let resources = default
        .find("\t\t\"resources\"")
        .zip(default.find("\t\t\"namespaces\""));
    let (before, after) = resources.unwrap_or_default();
    let text = [
        default.get(..before).unwrap_or_default(),
        &map("uidMappings", user),
        &map("gidMappings", group),
        default.get(after..).unwrap_or_default(),
    ]
    .concat();
    let text = REPLACED
        .iter()
        .fold(text, |text, (from, to)| text.replace(from, to));
    with_namespace(&text, "user")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::Value;

    use super::*;
    use crate::{bundle::Bundle, config::Config};

    fn written(rootless: bool) -> (tempfile::TempDir, SpecArgs) {
        let dir = tempfile::tempdir().unwrap();
        let args = SpecArgs {
            bundle: Some(dir.path().into()),
            rootless,
        };
        spec(&args).unwrap();
        (dir, args)
    }

    fn kinds(text: &str) -> Vec<String> {
        let value: Value = serde_json::from_str(text).unwrap();
        let all = value["linux"]["namespaces"].as_array().unwrap();
        let kinds = all.iter().map(|n| n["type"].as_str().unwrap().to_owned());
        kinds.collect()
    }

    #[test]
    fn a_host_with_the_first_cgroups_gets_no_cgroup_namespace() {
        let older = ["pid", "network", "ipc", "uts", "mount"];
        assert_eq!(kinds(&text(false, false)), older);
        assert_eq!(
            kinds(&text(false, true)),
            [&older[..], &["cgroup"]].concat()
        );
        let of_user = ["pid", "ipc", "uts", "mount", "user"];
        assert_eq!(kinds(&text(true, false)), of_user);
    }

    #[test]
    fn an_existing_file_is_left_alone_in_runcs_words() {
        let (dir, args) = written(false);
        fs::write(dir.path().join("config.json"), "mine").unwrap();
        let error = spec(&args).unwrap_err();
        assert_eq!(
            error.to_string(),
            "File config.json exists. Remove it first"
        );
        assert_eq!(
            fs::read_to_string(dir.path().join("config.json")).unwrap(),
            "mine"
        );
    }

    #[test]
    fn what_is_written_can_be_run() {
        for rootless in [false, true] {
            let (dir, _) = written(rootless);
            fs::create_dir(dir.path().join("rootfs")).unwrap();
            let bundle = Bundle::load_undecided(dir.path(), &Config::default()).unwrap();
            bundle.check_alone(rootless).unwrap();
            assert_eq!(
                bundle.spec.process().as_ref().unwrap().terminal(),
                Some(true)
            );
        }
    }

    #[test]
    fn rootless_maps_the_caller_and_limits_nothing() {
        let value: Value = serde_json::from_str(&text(true, true)).unwrap();
        let linux = &value["linux"];
        assert_eq!(linux["uidMappings"][0]["containerID"], 0);
        assert_eq!(linux["gidMappings"][0]["size"], 1);
        assert_eq!(linux["resources"], Value::Null);
        let wanted = ["pid", "ipc", "uts", "mount", "cgroup", "user"];
        assert_eq!(kinds(&text(true, true)), wanted);
        let mounts = value["mounts"].as_array().unwrap();
        let sys = mounts
            .iter()
            .find(|it| it["destination"] == "/sys")
            .unwrap();
        assert_eq!(
            (&sys["type"], &sys["source"]),
            (&"none".into(), &"/sys".into())
        );
        assert_eq!(sys["options"][0], "rbind");
        assert!(!value.to_string().contains("gid=5"));
    }
}
