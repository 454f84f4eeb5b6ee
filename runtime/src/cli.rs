//! The command line as data: argv becomes these types and nothing else happens here.
//!
//! Contract: names, spellings and defaults are runc's, so that a caller changes one word. Options may stand before or
//! after a container's ID, except in `exec`, where everything after the ID belongs to the command.
//! Not here: what the commands do (`commands/`), how a refused command line is reported (`error.rs`).

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::rootless::Rootless;

/// A whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "caisson",
    about = "Runs OCI containers, each in its own small virtual machine, with runc's command line.",
    disable_version_flag = true,
    disable_help_subcommand = false
)]
pub struct Cli {
    /// Options that stand before the command.
    #[command(flatten)]
    pub global: Global,
    /// What to do. `None`: show the help, as runc does.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options that every command understands.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// enable debug logging
    #[arg(long)]
    pub debug: bool,
    /// set the log file to write caisson logs to (default is '/dev/stderr')
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// set the log format ('text' (default), or 'json')
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: String,
    /// root directory for storage of container state (this should be located in tmpfs) (default: "/run/caisson")
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// enable systemd cgroup support, expects cgroupsPath to be of form "slice:prefix:name"
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// ignore cgroup permission errors ('true', 'false', or 'auto')
    #[arg(long, value_name = "WHEN", default_value = "auto", ignore_case = true)]
    pub rootless: Rootless,
    /// print the version
    #[arg(long, short = 'v')]
    pub version: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// create a container
    Create(Create),
    /// deletes any resources held by the container, often used with detached containers
    Delete(Delete),
    /// execute new process inside the container
    Exec(Box<Exec>),
    /// sends the specified signal (default: SIGTERM) to the container's init process
    Kill(Kill),
    /// lists containers started by caisson with the given root
    List(List),
    /// create and run a container
    Run(Run),
    /// create a new specification file
    Spec(SpecArgs),
    /// executes the user defined process in a created container
    Start(Start),
    /// output the state of a container
    State(StateArgs),
    /// suspends all processes inside the container
    Pause(OneContainer),
    /// resumes all processes that have been previously paused
    Resume(OneContainer),
    /// displays the processes running inside a container
    Ps(Ps),
    /// displays container events such as OOM notifications, cpu, memory and IO usage statistics
    Events(Events),
    /// prints what all containers use, as Prometheus reads it
    Metrics(Metrics),
    /// shows what the start of a container spent its time on
    Trace(TraceArgs),
    /// update container resource constraints
    Update(Box<Update>),
    /// checkpoint a running container (not supported yet)
    Checkpoint(Anything),
    /// restore a container from a previous checkpoint (not supported yet)
    Restore(Anything),
    /// show the enabled features
    Features,
    /// say in plain words whether this host can run caisson, and what to do about what is missing
    Check,
}

/// What `create` and `run` have in common.
#[derive(Debug, Clone, Args)]
pub struct Launch {
    /// path to the root of the bundle directory, defaults to the current directory
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's
    /// pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the process that stands for the
    /// container on this host
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// specify the file to write the process id to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// accepted for compatibility: the root of a container is set up inside its virtual machine
    #[arg(long)]
    pub no_pivot: bool,
    /// do not create a new session keyring for the container
    #[arg(long)]
    pub no_new_keyring: bool,
    /// pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// the name of the container instance, unique on this host
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `create`.
#[derive(Debug, Clone, Args)]
pub struct Create {
    /// Everything.
    #[command(flatten)]
    pub launch: Launch,
}

/// `run`.
#[derive(Debug, Clone, Args)]
pub struct Run {
    /// detach from the container's process
    #[arg(long, short)]
    pub detach: bool,
    /// do not delete the container after it exits
    #[arg(long)]
    pub keep: bool,
    /// accepted for compatibility: processes of a container are reaped inside its virtual machine
    #[arg(long)]
    pub no_subreaper: bool,
    /// As for `create`.
    #[command(flatten)]
    pub launch: Launch,
}

/// `start`.
#[derive(Debug, Clone, Args)]
pub struct Start {
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `state`.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `kill`.
#[derive(Debug, Clone, Args)]
pub struct Kill {
    /// send the specified signal to all processes inside the container
    #[arg(long, short)]
    pub all: bool,
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
    /// a signal's name or number
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
}

/// `delete`.
#[derive(Debug, Clone, Args)]
pub struct Delete {
    /// forcibly deletes the container if it is still running (uses SIGKILL)
    #[arg(long, short)]
    pub force: bool,
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `pause` and `resume`.
#[derive(Debug, Clone, Args)]
pub struct OneContainer {
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// A command that refuses whatever it is given.
#[derive(Debug, Clone, Args)]
pub struct Anything {
    /// ignored
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<String>,
}

/// `ps`.
#[derive(Debug, Clone, Args)]
pub struct Ps {
    /// select one of: table (the processes in the virtual machine) or json (the pids on the host that stand for them)
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub format: String,
    /// the container, then options of ps(1)
    #[arg(
        value_name = "container-id> [ps options",
        required = true,
        trailing_var_arg = true
    )]
    id_and_options: Vec<String>,
}

impl Ps {
    /// The container.
    pub fn id(&self) -> &str {
        self.id_and_options.first().map_or("", String::as_str)
    }

    /// Options for ps(1).
    pub fn options(&self) -> &[String] {
        self.id_and_options.get(1..).unwrap_or_default()
    }
}

/// `events`.
#[derive(Debug, Clone, Args)]
pub struct Events {
    /// set the stats collection interval
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    pub interval: Duration,
    /// display the container's stats then exit
    #[arg(long)]
    pub stats: bool,
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `update`.
#[derive(Debug, Clone, Args)]
pub struct Update {
    /// path to the file containing the resources to update or '-' to read from the standard input; all other options
    /// are ignored then
    #[arg(long, short, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Specifies per cgroup weight, range is from 10 to 1000
    #[arg(long, value_name = "WEIGHT", default_value_t = 0)]
    pub blkio_weight: u16,
    /// CPU CFS period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_period: Option<String>,
    /// CPU CFS hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_quota: Option<String>,
    /// CPU CFS burst limit (in usecs). CPU time that may be saved up for use beyond the quota in a period
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_burst: Option<String>,
    /// CPU shares (relative weight vs. other containers)
    #[arg(long, value_name = "SHARES", allow_hyphen_values = true)]
    pub cpu_share: Option<String>,
    /// CPU realtime period to be used for hardcapping (in usecs). 0 to use system default
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_rt_period: Option<String>,
    /// CPU realtime hardcap limit (in usecs). Allowed cpu time in a given period
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_rt_runtime: Option<String>,
    /// whether the container runs only where no other wants the CPU (SCHED_IDLE): 0 or 1
    #[arg(long, value_name = "0|1", allow_hyphen_values = true)]
    pub cpu_idle: Option<String>,
    /// CPU(s) of the host to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory node(s) of the host to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Memory limit (in bytes)
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// Memory reservation or soft_limit (in bytes)
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_reservation: Option<String>,
    /// Total memory usage (memory + swap); set '-1' to enable unlimited swap
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// accepted for compatibility
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, hide = true)]
    pub kernel_memory: Option<String>,
    /// accepted for compatibility
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, hide = true)]
    pub kernel_memory_tcp: Option<String>,
    /// Maximum number of pids allowed in the container
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        default_value_t = 0
    )]
    pub pids_limit: i64,
    /// The string of Intel RDT/CAT L3 cache schema (refused: a virtual machine has none)
    #[arg(long, value_name = "SCHEMA")]
    pub l3_cache_schema: Option<String>,
    /// The string of Intel RDT/MBA memory bandwidth schema (refused: a virtual machine has none)
    #[arg(long, value_name = "SCHEMA")]
    pub mem_bw_schema: Option<String>,
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
}

/// `exec`.
#[derive(Debug, Clone, Args)]
pub struct Exec {
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's
    /// pseudoterminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// current working directory in the container
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// set environment variables
    #[arg(long, short, value_name = "KEY=VALUE")]
    pub env: Vec<String>,
    /// allocate a pseudo-TTY
    #[arg(long, short)]
    pub tty: bool,
    /// UID (format: <uid>[:<gid>])
    #[arg(long, short, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// additional gids
    #[arg(long, short = 'g', value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// path to the process.json
    #[arg(long, short, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// detach from the container's process
    #[arg(long, short)]
    pub detach: bool,
    /// path to an AF_UNIX socket which will receive a file descriptor referencing the process that stands for the
    /// container on this host
    #[arg(long, value_name = "SOCKET")]
    pub pidfd_socket: Option<PathBuf>,
    /// specify the file to write the process id to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// set the asm process label for the process commonly used with selinux
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// set the apparmor profile for the process
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// set the no new privileges value for the process
    #[arg(long)]
    pub no_new_privs: bool,
    /// add a capability to the bounding set for the process
    #[arg(long, short, value_name = "CAP")]
    pub cap: Vec<String>,
    /// pass N additional file descriptors to the container (stdio + $LISTEN_FDS + N in total)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// run the process in an (existing) sub-cgroup(s). Format is [<controller>:]<cgroup>
    #[arg(long, value_name = "CGROUP")]
    pub cgroup: Vec<String>,
    /// allow exec in a paused container
    #[arg(long)]
    pub ignore_paused: bool,
    /// the container, then the command and its arguments
    #[arg(
        value_name = "container-id> [command",
        required = true,
        trailing_var_arg = true
    )]
    id_and_command: Vec<String>,
}

impl Exec {
    /// The container.
    pub fn id(&self) -> &str {
        self.id_and_command.first().map_or("", String::as_str)
    }

    /// The program and its arguments; empty if `--process` gives them.
    pub fn command(&self) -> &[String] {
        self.id_and_command.get(1..).unwrap_or_default()
    }
}

/// `list`.
#[derive(Debug, Clone, Args)]
pub struct List {
    /// select one of: table or json
    #[arg(long, short, default_value = "table")]
    pub format: String,
    /// display only container IDs
    #[arg(long, short)]
    pub quiet: bool,
    /// all of this host's sandboxes too, containerd's among them, with state root and pod
    #[arg(long)]
    pub all: bool,
}

/// `trace`.
#[derive(Debug, Clone, Args)]
pub struct TraceArgs {
    /// the container
    #[arg(value_name = "container-id")]
    pub id: String,
    /// select one of: table or chrome (trace events as JSON)
    #[arg(long, short, default_value = "table")]
    pub format: String,
}

/// `metrics`.
#[derive(Debug, Clone, Args)]
pub struct Metrics {
    /// all of this host's sandboxes, containerd's among them
    #[arg(long)]
    pub all: bool,
    /// serve them by HTTP on a Unix socket at this path, counted anew for each request
    #[arg(long, value_name = "SOCKET")]
    pub listen: Option<PathBuf>,
}

/// `spec`.
#[derive(Debug, Clone, Args)]
pub struct SpecArgs {
    /// path to the root of the bundle directory
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// generate a configuration for a rootless container
    #[arg(long)]
    pub rootless: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(words.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_after_the_id_of_exec_belongs_to_the_command() {
        let cli = parse("caisson exec -t --env A=B c1 ls -l --env").unwrap();
        let Some(Command::Exec(exec)) = cli.command else {
            panic!("not exec")
        };
        assert!(exec.tty);
        assert_eq!(exec.env, ["A=B"]);
        assert_eq!(exec.id(), "c1");
        assert_eq!(exec.command(), ["ls", "-l", "--env"]);
        let cli = parse("caisson exec c1 -t sh").unwrap();
        let Some(Command::Exec(exec)) = cli.command else {
            panic!("not exec")
        };
        assert!(!exec.tty);
        assert_eq!(exec.command(), ["-t", "sh"]);
    }

    #[test]
    fn unknown_options_of_exec_are_refused() {
        assert!(parse("caisson exec --nope c1 ls").is_err());
        assert!(parse("caisson exec").is_err());
    }

    #[test]
    fn other_commands_take_options_after_the_id() {
        let cli = parse("caisson --root /r --log-format json delete c1 --force").unwrap();
        assert_eq!(cli.global.root, Some(PathBuf::from("/r")));
        let Some(Command::Delete(delete)) = cli.command else {
            panic!("not delete")
        };
        assert!(delete.force && delete.id == "c1");
    }

    #[test]
    fn containerd_and_conmon_call_it_like_this() {
        for line in [
            "caisson --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p \
             --console-socket /s --no-pivot --no-new-keyring --preserve-fds 2 c1",
            "caisson --root=/r create -b /b c1",
            "caisson exec --pid-file /p --process /j --detach --tty --console-socket /s c1",
            "caisson kill --all c1 9",
            "caisson run -d --keep --no-subreaper -b /b c1",
            "caisson --rootless=true list -q -f json",
            "caisson --rootless=TRUE list",
            "caisson --rootless=0 list",
            "caisson --rootless= list",
            "caisson state c1",
            "caisson pause c1",
            "caisson ps -f json c1",
            "caisson ps --format table c1 -o pid,args",
            "caisson events --stats c1",
            "caisson events --interval 100ms c1",
            "caisson update --resources - c1",
            "caisson update --memory-swap -1 c1",
            "caisson checkpoint --image-path /i --leave-running c1",
            "caisson restore -b /b --image-path /i c1",
        ] {
            parse(line).unwrap();
        }
    }
}
