//! Debian packages of an image: which they are, in which versions, and their files.
//!
//! apt resolves the packages of a flavour against an empty system and downloads what it finds; nothing is installed on
//! this machine. The packages come from the archives that this machine's apt knows, or, where a flavour names another
//! suite of Debian, from that one, with lists of its own below the cache; the kernel always from this machine's.
//! The resolved list is remembered for as long as apt's lists stay the same. They are fetched where there are none and
//! where apt cannot do with them, so an image of a suite that moves stays what it is until its packages are gone.
//! Not here: what is asked for (`flavour.rs`), the image (`image.rs`).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::flavour::Flavour;
use crate::image::{hash, output, run};

/// The key that all suites of Debian are signed with (package debian-archive-keyring).
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What apt knows of one flavour's packages.
pub(crate) struct Archive<'c> {
    cache: &'c Path,
    flavour: Flavour,
}

impl<'c> Archive<'c> {
    /// The archive of a flavour, whose files are in the lab's cache.
    pub(crate) fn open(cache: &'c Path, flavour: Flavour) -> io::Result<Self> {
        let archive = Self { cache, flavour };
        let mut directories = vec![
            cache.join("packages/partial"),
            cache.join("nothing/partial"),
        ];
        if let Some(suite) = flavour.suite() {
            directories.push(archive.lists().join("partial"));
            let line = format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror()?);
            fs::write(archive.sources(suite), line)?;
        }
        for directory in directories {
            fs::create_dir_all(directory)?;
        }
        File::create(archive.status())?;
        Ok(archive)
    }

    /// One line for each package, the kernel's first: address, file name, size, checksum.
    pub(crate) fn packages(&self, recipe: &str) -> io::Result<String> {
        if let Some(known) = self.remembered(recipe)? {
            return Ok(known);
        }
        let resolved = match self.resolve() {
            Ok(resolved) => resolved,
            Err(_) => {
                self.update()?;
                self.resolve()?
            }
        };
        fs::write(self.memory(recipe)?, &resolved)?;
        Ok(resolved)
    }

    /// Downloads what the cache lacks of the packages.
    pub(crate) fn download(&self) -> io::Result<()> {
        run(self.install("packages").arg("--download-only"))?;
        // apt itself looks whether it is there already.
        let kernel = kernel_package(self.flavour.kernel())?;
        run(Command::new("apt-get")
            .args(["download", "-qq", &kernel])
            .current_dir(self.files()))
    }

    /// Where downloaded packages are.
    pub(crate) fn files(&self) -> PathBuf {
        self.cache.join("packages")
    }

    /// Fetches the newest lists.
    pub(crate) fn update(&self) -> io::Result<()> {
        eprintln!("lab: apt-get update");
        run(Command::new("apt-get").arg("update"))?;
        match self.flavour.suite() {
            Some(_) => run(self.apt().args(["-qq", "update"])),
            None => Ok(()),
        }
    }

    fn remembered(&self, recipe: &str) -> io::Result<Option<String>> {
        Ok(fs::read_to_string(self.memory(recipe)?).ok())
    }

    /// The file that remembers what is resolved from the lists as they are.
    fn memory(&self, recipe: &str) -> io::Result<PathBuf> {
        let mut state = format!("{recipe}{}", self.flavour.name());
        let own = self.flavour.suite().map(|_| self.lists());
        for lists in [Some(PathBuf::from("/var/lib/apt/lists")), own]
            .into_iter()
            .flatten()
        {
            for entry in fs::read_dir(lists)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                let name = entry.file_name();
                state += &format!("{name:?} {} {}\n", metadata.size(), metadata.mtime());
            }
        }
        Ok(self.cache.join(format!("packages-{}", hash(&state)?)))
    }

    fn resolve(&self) -> io::Result<String> {
        let closure = output(self.install("nothing").arg("--print-uris"))?;
        let kernel = kernel_package(self.flavour.kernel())?;
        let kernel =
            output(Command::new("apt-get").args(["download", "-qq", "--print-uris", &kernel]))?;
        Ok(format!("{kernel}{closure}"))
    }

    /// `apt-get install` of all packages as if nothing were installed; it must be told not to install.
    /// What is already in the directory `archives` is neither listed nor downloaded.
    fn install(&self, archives: &str) -> Command {
        let mut apt = self.apt();
        apt.args(["install", "-y", "-qq", "--no-install-recommends"])
            .arg("-o")
            .arg(setting("Dir::Cache::archives", &self.cache.join(archives)))
            .args(self.flavour.packages());
        apt
    }

    /// apt with the flavour's lists, on an empty system.
    fn apt(&self) -> Command {
        let mut settings = vec![setting("Dir::State::status", &self.status())];
        if let Some(suite) = self.flavour.suite() {
            settings.push(setting("Dir::Etc::sourcelist", &self.sources(suite)));
            settings.push(setting("Dir::Etc::sourceparts", Path::new("/dev/null")));
            settings.push(setting("Dir::State::lists", &self.lists()));
            // apt's caches of parsed lists are of this machine's.
            settings.push("Dir::Cache::pkgcache=".to_owned());
            settings.push("Dir::Cache::srcpkgcache=".to_owned());
            settings.push("Acquire::Languages=none".to_owned());
        }
        let mut apt = Command::new("apt-get");
        apt.args(settings.iter().flat_map(|setting| ["-o", setting]));
        apt
    }

    fn status(&self) -> PathBuf {
        self.cache.join("empty-status")
    }

    fn sources(&self, suite: &str) -> PathBuf {
        self.cache.join(format!("{suite}.list"))
    }

    fn lists(&self) -> PathBuf {
        self.cache.join(format!("lists-{}", self.flavour.name()))
    }
}

fn setting(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Where this machine's apt fetches Debian's own packages from.
fn mirror() -> io::Result<String> {
    let targets = [
        "indextargets",
        "--format",
        "$(SITE)",
        "Created-By: Packages",
    ];
    let sites = output(Command::new("apt-get").args(targets).arg("Origin: Debian"))?;
    let site = sites.lines().find(|site| !site.ends_with("security"));
    site.map(str::to_owned)
        .ok_or_else(|| io::Error::other("apt knows no archive of Debian"))
}

/// The newest kernel's package that apt can download: Debian's signed one, else the unsigned one.
fn kernel_package(meta: &str) -> io::Result<String> {
    let depends = output(Command::new("apt-cache").args(["depends", meta]))?;
    let name = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| io::Error::other(format!("apt knows no {meta}")))?;
    let unsigned = format!("{name}-unsigned");
    let offered = output(Command::new("apt-cache").args(["madison", name]))?;
    Ok(if offered.is_empty() {
        unsigned
    } else {
        name.to_owned()
    })
}
