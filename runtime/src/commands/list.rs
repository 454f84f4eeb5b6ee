//! `list`: all containers of a root directory, as runc's table, as JSON or as bare names; with `--all` also those that
//! live elsewhere on this host (`census.rs`), with their state root and pod.

use std::{fs, path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{Context, print, state::Shown};
use crate::{
    census,
    cli::List,
    error::{self, CommandError},
    state::{State, StateDir, StateError},
};

/// Column widths are at least this (Go's `tabwriter.NewWriter(os.Stdout, 12, 1, 3, ' ', 0)`, as runc calls it).
const LEAST_WIDTH: usize = 12;
/// Spaces after the longest cell of a column.
const PADDING: usize = 3;

const TITLES: [&str; 6] = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];

pub(super) fn list(args: &List, context: &Context) -> Result<ExitCode, CommandError> {
    if args.all {
        return list_all(args, context);
    }
    if args.quiet {
        let ids = StateDir::ids(&context.root)?;
        return print(&ids.iter().map(|id| format!("{id}\n")).collect::<String>());
    }
    let containers = containers(context)?;
    match args.format.as_str() {
        "table" => print(&table(&containers)),
        "json" => print(&json(&containers)?),
        _ => Err(CommandError::Usage("invalid format option".into())),
    }
}

/// A container anywhere on this host.
#[derive(Debug, Serialize)]
struct Anywhere {
    #[serde(flatten)]
    state: State,
    root: PathBuf,
    /// The container that brought the virtual machine.
    pod: String,
}

const ALL_TITLES: [&str; 7] = ["ID", "PID", "STATUS", "POD", "ROOT", "BUNDLE", "CREATED"];

fn list_all(args: &List, context: &Context) -> Result<ExitCode, CommandError> {
    let all = everywhere(context)?;
    if args.quiet {
        return print(
            &all.iter()
                .map(|it| format!("{}\n", it.state.id))
                .collect::<String>(),
        );
    }
    match args.format.as_str() {
        "table" => print(&columns(ALL_TITLES, all.iter().map(Anywhere::cells))),
        "json" => print(&(serde_json::to_string(&all).map_err(CommandError::Json)? + "\n")),
        _ => Err(CommandError::Usage("invalid format option".into())),
    }
}

/// Those that live, and those of this root that have stopped; in the order of root and id.
fn everywhere(context: &Context) -> Result<Vec<Anywhere>, CommandError> {
    let mut all = Vec::new();
    for holder in census::holders() {
        match holder.ask(false) {
            Ok(household) => all.extend(household.residents.into_iter().map(|resident| Anywhere {
                state: resident.state,
                root: holder.root.clone(),
                pod: resident.pod,
            })),
            // It ends just now, or begins, or cannot be asked by this caller.
            Err(error) => {
                let words = error::message(&error);
                context
                    .log
                    .debug(&format!("ask process {}: {words}", holder.pid));
            }
        }
    }
    for (state, _) in containers(context)? {
        let is_it = |known: &Anywhere| known.state.id == state.id && known.root == context.root;
        if !all.iter().any(is_it) {
            all.push(Anywhere {
                pod: state.id.to_string(),
                root: context.root.clone(),
                state,
            });
        }
    }
    all.sort_by(|a, b| (&a.root, &a.state.id).cmp(&(&b.root, &b.state.id)));
    Ok(all)
}

impl Anywhere {
    fn cells(&self) -> [String; 7] {
        [
            self.state.id.to_string(),
            self.state.pid.to_string(),
            self.state.status.to_string(),
            self.pod.clone(),
            self.root.display().to_string(),
            self.state.bundle.display().to_string(),
            self.state.created.clone(),
        ]
    }
}

/// Every container with the name of its owner. One that cannot be read is a line in the log, not the end.
fn containers(context: &Context) -> Result<Vec<(State, String)>, CommandError> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let mut all = Vec::new();
    for id in StateDir::ids(&context.root)? {
        let seen = StateDir::open(&context.root, &id)
            .and_then(|dir| Ok((dir.state()?, user(&passwd, dir.owner()?))));
        match seen {
            Ok(container) => all.push(container),
            // Deleted while we looked.
            Err(StateError::NotFound) => {}
            Err(error) => {
                context
                    .log
                    .warning(&format!("load container {id}: {}", error::message(&error)));
            }
        }
    }
    Ok(all)
}

fn json(containers: &[(State, String)]) -> Result<String, CommandError> {
    // runc prints a nil slice for an empty list.
    if containers.is_empty() {
        return Ok("null\n".into());
    }
    let shown: Vec<_> = containers
        .iter()
        .map(|(state, owner)| Shown::new(state, owner))
        .collect();
    Ok(serde_json::to_string(&shown).map_err(CommandError::Json)? + "\n")
}

fn table(containers: &[(State, String)]) -> String {
    let rows = containers.iter().map(|(state, owner)| {
        [
            state.id.to_string(),
            state.pid.to_string(),
            state.status.to_string(),
            state.bundle.display().to_string(),
            state.created.clone(),
            owner.clone(),
        ]
    });
    columns(TITLES, rows)
}

/// Rows below their titles, as runc aligns them.
fn columns<const N: usize>(titles: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(titles.map(str::to_owned))
        .chain(rows)
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = LEAST_WIDTH.max(cell.chars().count() + PADDING).max(*width);
        }
    }
    let mut out = String::new();
    for row in &rows {
        // The last cell is not padded, as in runc.
        let padded = widths.iter().zip(row).take(N - 1);
        let line: String = padded
            .map(|(width, cell)| format!("{cell:<width$}"))
            .collect();
        out.push_str(&format!(
            "{line}{}\n",
            row.last().map_or("", String::as_str)
        ));
    }
    out
}

/// A user's name, looked up in the text of a passwd file, or `#uid`.
fn user(passwd: &str, uid: u32) -> String {
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, number) = (fields.next()?, fields.next()?, fields.next()?);
        (number.parse() == Ok(uid)).then_some(name)
    });
    name.map_or_else(|| format!("#{uid}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{ContainerId, Status};

    fn container(id: &str, pid: u32, bundle: &str) -> (State, String) {
        let state = State {
            oci_version: "1.0.2-dev".into(),
            id: ContainerId::parse(id).unwrap(),
            pid,
            status: Status::Created,
            bundle: bundle.into(),
            rootfs: format!("{bundle}/rootfs").into(),
            created: "2026-11-21T12:30:37.397827925Z".into(),
            annotations: None,
            cgroup: None,
            systemd_unit: None,
            cgroup_intended: false,
        };
        (state, "root".into())
    }

    #[test]
    fn an_empty_list_is_runcs_to_the_byte() {
        assert_eq!(
            table(&[]),
            "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n"
        );
        assert_eq!(json(&[]).unwrap(), "null\n");
    }

    #[test]
    fn a_table_is_runcs_to_the_byte() {
        assert_eq!(
            table(&[container("c1", 29222, "/tmp/rc/b")]),
            "ID          PID         STATUS      BUNDLE      CREATED                          OWNER\n\
             c1          29222       created     /tmp/rc/b   2026-11-21T12:30:37.397827925Z   root\n"
        );
    }

    #[test]
    fn everything_on_the_host_is_told_with_root_and_pod() {
        let (state, _) = container("c1", 7, "/b");
        let all = [Anywhere {
            state,
            root: "/run/containerd/tasks".into(),
            pod: "sandbox".into(),
        }];
        let text = columns(ALL_TITLES, all.iter().map(Anywhere::cells));
        let lines: Vec<Vec<_>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0], ALL_TITLES);
        assert_eq!(
            lines[1][..6],
            [
                "c1",
                "7",
                "created",
                "sandbox",
                "/run/containerd/tasks",
                "/b"
            ]
        );
        let json = serde_json::to_value(&all).unwrap();
        assert_eq!(
            (&json[0]["id"], &json[0]["pod"]),
            (&"c1".into(), &"sandbox".into())
        );
    }

    #[test]
    fn long_cells_widen_their_column() {
        let text = table(&[
            container("a-name-of-some-length", 1, "/b"),
            container("b", 2, "/b"),
        ]);
        let starts: Vec<_> = text
            .lines()
            .map(|line| line.find(['P', '1', '2']))
            .collect();
        assert_eq!(starts, [Some(24); 3]);
    }

    #[test]
    fn json_is_one_line_with_the_owner() {
        let text = json(&[container("c1", 29222, "/tmp/rc/b")]).unwrap();
        let runc = r#"[{"ociVersion":"1.0.2-dev","id":"c1","pid":29222,"status":"created","bundle":"/tmp/rc/b","rootfs":"/tmp/rc/b/rootfs","created":"2026-11-21T12:30:37.397827925Z","owner":"root"}]"#;
        assert_eq!(
            text,
            runc.replace("1.0.2-dev", crate::bundle::OCI_VERSION) + "\n"
        );
    }

    #[test]
    fn owners_without_a_name_are_numbers() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\na:x:1000:1000::/:/bin/sh\n";
        assert_eq!(user(passwd, 0), "root");
        assert_eq!(user(passwd, 1000), "a");
        assert_eq!(user(passwd, 1001), "#1001");
    }
}
