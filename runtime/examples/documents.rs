//! Writes what `make install` installs beside the program, from the same definitions that parse its command line:
//! manual pages (`man/caisson.8`, `man/caisson-create.8`, ...) and the completions of bash, zsh and fish.
//!
//! `documents DIRECTORY`

use std::{env, error::Error, fs, path::PathBuf};

use caisson::cli::Cli;
use clap::CommandFactory;
use clap_complete::{
    Generator,
    shells::{Bash, Fish, Zsh},
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next(), arguments.next()) else {
        return Err("usage: documents DIRECTORY".into());
    };
    let directory = PathBuf::from(directory);
    let pages = directory.join("man");
    let completions = directory.join("completions");
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    write_pages(&pages)?;
    completion(Bash, &completions, "caisson")?;
    completion(Zsh, &completions, "_caisson")?;
    completion(Fish, &completions, "caisson.fish")
}

/// A page for the program and one for each command.
fn write_pages(directory: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let mut all = Cli::command().disable_help_subcommand(true);
    all.build();
    let page = |command: &clap::Command, name: &str| -> Result<(), Box<dyn Error>> {
        let mut text = Vec::new();
        clap_mangen::Man::new(command.clone())
            .section("8")
            .render(&mut text)?;
        Ok(fs::write(directory.join(format!("{name}.8")), text)?)
    };
    let shown = all.get_subcommands().filter(|one| !one.is_hide_set());
    for command in shown {
        page(command, &format!("caisson-{}", command.get_name()))?;
    }
    page(&all, "caisson")
}

fn completion(
    shell: impl Generator,
    directory: &std::path::Path,
    file: &str,
) -> Result<(), Box<dyn Error>> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "caisson", &mut text);
    Ok(fs::write(directory.join(file), text)?)
}
