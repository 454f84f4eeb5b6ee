//! Turns facts about a host into plain words: what is fine, what is missing, and what to do about it.

use std::{fmt, io::ErrorKind};

use super::probe::{Cgroup, Host, User};

/// The API version that KVM has had since Linux 2.6.22.
const KVM_API: i32 = 12;

/// The oldest kernel with everything the runtime uses: cgroup.kill of 5.14 is the newest part.
const OLDEST_KERNEL: (u32, u32) = (5, 14);

/// Controllers that limits of containers need.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "io", "memory"];

/// One line of the report.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    grade: Grade,
    what: &'static str,
    seen: String,
    /// What to do; empty if nothing is to be done.
    advice: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Fine,
    Note,
    Missing,
}

impl Finding {
    fn new(grade: Grade, what: &'static str, seen: impl Into<String>, advice: &str) -> Self {
        Self {
            grade,
            what,
            seen: seen.into(),
            advice: advice.to_owned(),
        }
    }

    /// Whether caisson cannot run without it.
    pub(super) fn is_missing(&self) -> bool {
        self.grade == Grade::Missing
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grade = match self.grade {
            Grade::Fine => "ok",
            Grade::Note => "note",
            Grade::Missing => "MISSING",
        };
        writeln!(f, "{grade:<8}{:<18}{}", self.what, self.seen)?;
        if self.advice.is_empty() {
            Ok(())
        } else {
            writeln!(f, "{:26}-> {}", "", self.advice)
        }
    }
}

/// The report, in the order in which a person would mend things.
pub(super) fn judge(host: &Host) -> Vec<Finding> {
    let mut findings = vec![virtualization(host), kvm(host), kernel(host), cgroup(host)];
    findings.extend([files(host), tun(host), user_namespaces(host)]);
    findings.extend(host.user.iter().flat_map(user));
    findings.extend([mitigations(host), smt(host), ksm(host), swap(host)]);
    findings
}

fn virtualization(host: &Host) -> Finding {
    let what = "virtualization";
    let has = |flag| host.cpu_flags.iter().any(|known| known == flag);
    let advice = "turn on VT-x or AMD-V in the firmware; in a virtual machine, ask for nested virtualization";
    match (has("vmx"), has("svm")) {
        (true, _) => Finding::new(Grade::Fine, what, "Intel VT-x (vmx)", ""),
        (_, true) => Finding::new(Grade::Fine, what, "AMD-V (svm)", ""),
        // KVM may work all the same, on a kernel that brings its own back end.
        _ if host.kvm.is_ok() => Finding::new(
            Grade::Note,
            what,
            "neither vmx nor svm, yet there is a KVM device",
            advice,
        ),
        _ => Finding::new(
            Grade::Missing,
            what,
            "the CPU shows neither vmx nor svm",
            advice,
        ),
    }
}

fn kvm(host: &Host) -> Finding {
    let what = "/dev/kvm";
    match host.kvm {
        Ok(KVM_API) => Finding::new(Grade::Fine, what, format!("API version {KVM_API}"), ""),
        Ok(other) => {
            let seen = format!("API version {other}, not {KVM_API}");
            Finding::new(
                Grade::Missing,
                what,
                seen,
                "use a kernel with KVM as of Linux 2.6.22 or later",
            )
        }
        Err(ErrorKind::NotFound) => Finding::new(
            Grade::Missing,
            what,
            "there is none",
            "modprobe kvm_intel (or kvm_amd)",
        ),
        Err(ErrorKind::PermissionDenied) => {
            let owner = host.user.as_ref().map_or("root", |user| &user.kvm_owner);
            let seen = format!("belongs to {owner}: may not be opened");
            let advice = "run as root, or add yourself to its group (usermod -aG) and log in anew";
            Finding::new(Grade::Missing, what, seen, advice)
        }
        Err(kind) => {
            let seen = format!("cannot be opened: {kind}");
            Finding::new(
                Grade::Missing,
                what,
                seen,
                "see the kernel's log for why KVM is off",
            )
        }
    }
}

fn kernel(host: &Host) -> Finding {
    let mut numbers = host
        .kernel
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let seen = format!("Linux {}", host.kernel);
    if version >= OLDEST_KERNEL {
        return Finding::new(Grade::Fine, "kernel", seen, "");
    }
    let (major, minor) = OLDEST_KERNEL;
    let advice = format!("use Linux {major}.{minor} or later");
    Finding::new(Grade::Missing, "kernel", seen, &advice)
}

fn cgroup(host: &Host) -> Finding {
    let advice = "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup";
    match &host.cgroup {
        Cgroup::V2 { controllers } => {
            let lacks = |name: &&str| !controllers.split_whitespace().any(|known| known == *name);
            let missing: Vec<_> = CONTROLLERS.into_iter().filter(lacks).collect();
            if missing.is_empty() {
                return Finding::new(Grade::Fine, "cgroups", "version 2", "");
            }
            let missing = missing.join(", ");
            Finding::new(
                Grade::Note,
                "cgroups",
                format!("version 2 without {missing}"),
                "limits of that kind are refused; look for cgroup_disable= on the kernel's command line",
            )
        }
        Cgroup::V1 => Finding::new(Grade::Fine, "cgroups", "version 1", ""),
        Cgroup::None => Finding::new(Grade::Missing, "cgroups", "none on /sys/fs/cgroup", advice),
    }
}

fn files(host: &Host) -> Finding {
    let what = "installed files";
    let advice = "install caisson, or name them in /etc/caisson/config.toml";
    match &host.config {
        Err(error) => Finding::new(
            Grade::Missing,
            what,
            error.clone(),
            "mend the configuration file",
        ),
        Ok(missing) if missing.is_empty() => {
            Finding::new(Grade::Fine, what, "kernel, initramfs and VMM are there", "")
        }
        Ok(missing) => {
            let list: Vec<_> = missing
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            let seen = format!("not found: {}", list.join(", "));
            Finding::new(Grade::Missing, what, seen, advice)
        }
    }
}

fn tun(host: &Host) -> Finding {
    let what = "/dev/net/tun";
    match host.tun {
        Ok(()) => Finding::new(Grade::Fine, what, "can be opened", ""),
        Err(kind) => Finding::new(
            Grade::Note,
            what,
            format!("cannot be opened: {kind}"),
            "modprobe tun; without it containers have loopback only",
        ),
    }
}

fn user_namespaces(host: &Host) -> Finding {
    let what = "user namespaces";
    match host.user_namespaces {
        Some(most) if most > 0 => Finding::new(Grade::Fine, what, format!("up to {most}"), ""),
        _ => Finding::new(
            Grade::Note,
            what,
            "off",
            "sysctl user.max_user_namespaces=10000: the virtual machine monitor is confined better with them",
        ),
    }
}

/// What an ordinary user's containers need beyond that.
fn user(user: &User) -> [Finding; 3] {
    let what = "other users";
    let others = match (user.maps_others, user.others) {
        (true, [users, groups]) if users > 0 && groups > 0 => Finding::new(
            Grade::Fine,
            what,
            format!("{users} users and {groups} groups may be mapped"),
            "",
        ),
        (false, _) => Finding::new(
            Grade::Note,
            what,
            "newuidmap and newgidmap are not there",
            "install uidmap; without it a container has you as its root and nobody else",
        ),
        _ => Finding::new(
            Grade::Note,
            what,
            "/etc/subuid or /etc/subgid has none for you",
            "usermod --add-subuids 200000-265535 --add-subgids 200000-265535 YOU",
        ),
    };
    let what = "network";
    let (passt, is_there) = &user.passt;
    let network = match is_there {
        true => Finding::new(Grade::Fine, what, format!("by {}", passt.display()), ""),
        false => Finding::new(
            Grade::Note,
            what,
            format!("{} is not there", passt.display()),
            "install passt; without it only containers with a network namespace (loopback) can run",
        ),
    };
    let what = "state";
    let state = match user.has_runtime_dir {
        true => Finding::new(Grade::Fine, what, "in XDG_RUNTIME_DIR", ""),
        false => Finding::new(
            Grade::Note,
            what,
            "XDG_RUNTIME_DIR is not set",
            "log in by way of systemd (PAM), or give --root",
        ),
    };
    [others, network, state]
}

fn mitigations(host: &Host) -> Finding {
    let what = "CPU mitigations";
    let open: Vec<_> = host
        .vulnerabilities
        .iter()
        .filter(|(_, state)| state.contains("Vulnerable") || state.contains("vulnerable"))
        .map(|(name, _)| name.as_str())
        .collect();
    match (host.vulnerabilities.len(), open.as_slice()) {
        (0, _) => Finding::new(Grade::Note, what, "the kernel does not report them", ""),
        (_, []) => Finding::new(Grade::Fine, what, "on, or the CPU is not affected", ""),
        (_, open) => Finding::new(
            Grade::Note,
            what,
            format!("open: {}", open.join(", ")),
            "a guest may read the host's memory: update microcode and kernel, do not boot with mitigations=off",
        ),
    }
}

fn smt(host: &Host) -> Finding {
    match host.smt {
        Some(true) => Finding::new(
            Grade::Note,
            "SMT",
            "on: two guests may share a core",
            "for tenants who must not spy on each other: nosmt, or core scheduling",
        ),
        Some(false) => Finding::new(Grade::Fine, "SMT", "off", ""),
        None => Finding::new(Grade::Note, "SMT", "the kernel does not report it", ""),
    }
}

fn ksm(host: &Host) -> Finding {
    match host.ksm {
        Some(true) => Finding::new(
            Grade::Note,
            "KSM",
            "on: equal pages of different guests are shared, which a guest can measure",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
        Some(false) => Finding::new(Grade::Fine, "KSM", "off", ""),
        None => Finding::new(Grade::Fine, "KSM", "not in this kernel", ""),
    }
}

fn swap(host: &Host) -> Finding {
    if host.swap_bytes == 0 {
        return Finding::new(Grade::Fine, "swap", "none", "");
    }
    let seen = format!(
        "{} MiB: guest memory may be written to disk",
        host.swap_bytes >> 20
    );
    Finding::new(Grade::Note, "swap", seen, "swapoff -a, or encrypt it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Host {
        Host {
            kvm: Ok(12),
            cpu_flags: vec!["fpu".into(), "svm".into()],
            kernel: "6.12.115+deb12-cloud-amd64".into(),
            cgroup: Cgroup::V2 {
                controllers: "cpuset cpu io memory pids".into(),
            },
            tun: Ok(()),
            user_namespaces: Some(15_000),
            vulnerabilities: vec![
                ("mds".into(), "Not affected".into()),
                ("spectre_v2".into(), "Mitigation: Retpolines".into()),
            ],
            smt: Some(false),
            ksm: Some(false),
            swap_bytes: 0,
            user: None,
            config: Ok(Vec::new()),
        }
    }

    #[test]
    fn a_user_hears_what_works_for_him() {
        let user = |maps_others, others, passt, has_runtime_dir| Host {
            user: Some(User {
                maps_others,
                others,
                passt: ("/usr/bin/passt".into(), passt),
                kvm_owner: "group kvm".into(),
                has_runtime_dir,
            }),
            ..good()
        };
        assert_eq!(complaints(&user(true, [65_536; 2], true, true)), [""; 0]);
        for (host, words) in [
            (user(false, [1; 2], true, true), "install uidmap"),
            (user(true, [0, 1], true, true), "/etc/subuid or /etc/subgid"),
            (user(true, [1; 2], false, true), "install passt"),
            (
                user(true, [1; 2], true, false),
                "XDG_RUNTIME_DIR is not set",
            ),
        ] {
            let complaints = complaints(&host);
            assert!(
                complaints.len() == 1 && complaints[0].contains(words),
                "{complaints:?}"
            );
        }
        let denied = Host {
            kvm: Err(ErrorKind::PermissionDenied),
            ..user(true, [1; 2], true, true)
        };
        assert!(complaints(&denied)[0].contains("belongs to group kvm"));
    }

    /// The lines that are not fine.
    fn complaints(host: &Host) -> Vec<String> {
        let findings = judge(host);
        findings
            .iter()
            .filter(|f| f.grade != Grade::Fine)
            .map(Finding::to_string)
            .collect()
    }

    #[test]
    fn a_good_host_has_nothing_to_mend() {
        assert_eq!(complaints(&good()), [""; 0]);
    }

    #[test]
    fn what_a_host_cannot_do_without_is_missing_and_has_advice() {
        let hosts = [
            Host {
                kvm: Err(ErrorKind::NotFound),
                ..good()
            },
            Host {
                kvm: Err(ErrorKind::PermissionDenied),
                ..good()
            },
            Host {
                kvm: Ok(11),
                ..good()
            },
            Host {
                kernel: "5.10.0-30-amd64".into(),
                ..good()
            },
            Host {
                kernel: "strange".into(),
                ..good()
            },
            Host {
                cgroup: Cgroup::None,
                ..good()
            },
            Host {
                config: Ok(vec!["/usr/lib/caisson/vmlinux".into()]),
                ..good()
            },
            Host {
                config: Err("configuration file /c, line 3: x".into()),
                ..good()
            },
        ];
        for host in hosts {
            let missing: Vec<_> = judge(&host)
                .into_iter()
                .filter(Finding::is_missing)
                .collect();
            assert_eq!(missing.len(), 1, "{missing:?}");
            assert!(!missing[0].advice.is_empty());
            assert!(missing[0].to_string().starts_with("MISSING "));
        }
    }

    #[test]
    fn no_virtualization_is_missing_only_without_a_kvm_device() {
        let host = Host {
            cpu_flags: vec!["fpu".into()],
            ..good()
        };
        assert!(!judge(&host).iter().any(Finding::is_missing));
        assert_eq!(complaints(&host).len(), 1);
        let host = Host {
            kvm: Err(ErrorKind::NotFound),
            ..host
        };
        assert_eq!(judge(&host).iter().filter(|f| f.is_missing()).count(), 2);
    }

    #[test]
    fn weaknesses_are_notes_and_do_not_fail_the_host() {
        let vulnerable = vec![(
            "mds".into(),
            "Vulnerable: no microcode; SMT vulnerable".into(),
        )];
        let host = Host {
            cgroup: Cgroup::V2 {
                controllers: "cpuset cpu io pids".into(),
            },
            tun: Err(ErrorKind::NotFound),
            user_namespaces: Some(0),
            vulnerabilities: vulnerable,
            smt: Some(true),
            ksm: Some(true),
            swap_bytes: 1 << 30,
            ..good()
        };
        assert!(!judge(&host).iter().any(Finding::is_missing));
        let text = complaints(&host).concat();
        for word in [
            "without memory",
            "modprobe tun",
            "max_user_namespaces",
            "open: mds",
            "nosmt",
            "ksm/run",
            "1024 MiB",
        ] {
            assert!(text.contains(word), "{word} in {text}");
        }
    }
}
