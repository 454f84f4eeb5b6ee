//! What `--version` prints, in runc's layout.

use crate::bundle::OCI_VERSION;

/// The package's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit that was built, where the build said so (`CAISSON_COMMIT`).
pub const COMMIT: &str = match option_env!("CAISSON_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Four lines: name and version, commit, specification, compiler.
pub fn text() -> String {
    let rust = env!("CARGO_PKG_RUST_VERSION");
    format!("caisson version {VERSION}\ncommit: {COMMIT}\nspec: {OCI_VERSION}\nrust: {rust}\n")
}
