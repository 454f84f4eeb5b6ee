//! A volume that changes as the kubelet changes config maps, secrets, projected volumes and the downward API.
//!
//! Contract: [`Published::write`] takes the steps of the kubelet's writer in its order (Kubernetes,
//! pkg/volume/util/atomic_writer.go, as of 1.28): a new directory with the files, the link `..data` by a rename, links
//! for keys that are new, those of keys that are gone, the old directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// The volume's directory on the host.
pub struct Published {
    dir: PathBuf,
    version: u32,
    keys: BTreeSet<String>,
}

impl Published {
    /// Makes the directory; it has no version yet.
    pub fn make(dir: &Path) -> Self {
        fs::create_dir(dir).expect("directory");
        Self {
            dir: dir.to_owned(),
            version: 0,
            keys: BTreeSet::new(),
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Publishes these keys and values in place of those that there are.
    pub fn write(&mut self, files: &[(&str, &str)]) {
        self.write_with(files.iter().map(|(key, _)| (*key).to_owned()), |data| {
            for (key, value) in files {
                fs::write(data.join(key), value).expect("file");
            }
        });
    }

    /// Publishes these keys; `fill` makes their files in the new directory.
    pub fn write_with(&mut self, keys: impl Iterator<Item = String>, fill: impl FnOnce(&Path)) {
        let keys: BTreeSet<_> = keys.collect();
        let old = self.dir.join(format!("..{}", self.version));
        self.version += 1;
        let name = format!("..{}", self.version);
        let data = self.dir.join(&name);
        fs::create_dir(&data).expect("directory");
        fill(&data);
        let new_link = self.dir.join("..data_tmp");
        symlink(&name, &new_link).expect("link");
        fs::rename(&new_link, self.dir.join("..data")).expect("rename");
        for key in keys.difference(&self.keys) {
            symlink(format!("..data/{key}"), self.dir.join(key)).expect("link");
        }
        for key in self.keys.difference(&keys) {
            fs::remove_file(self.dir.join(key)).expect("unlink");
        }
        if self.version > 1 {
            fs::remove_dir_all(old).expect("remove");
        }
        self.keys = keys;
    }
}
