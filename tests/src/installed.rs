//! caisson where everybody may read it: the repository may be in a place of root's own.

use std::fs;
use std::path::Path;

/// Copies the runtime, the VMM and the guest's files, as a configuration names them, into a directory; the configuration
/// that names the copies.
pub fn install(configuration: &str, dir: &Path) -> String {
    let install = |from: &Path| {
        let to = dir.join(from.file_name().expect("a name"));
        fs::copy(from, &to).expect("copy");
        to
    };
    let lines = configuration
        .lines()
        .map(|line| match line.split_once(" = ") {
            Some((key @ ("kernel" | "initramfs" | "vmm"), path)) => {
                let from: String = serde_json::from_str(path).expect("a path");
                let from = Path::new(&from);
                if key == "vmm" {
                    install(&from.with_file_name("caisson"));
                }
                format!("{key} = {:?}\n", install(from))
            }
            _ => format!("{line}\n"),
        });
    lines.collect()
}
