//! `trace`: every step of a container's start with its time, as a picture in the terminal or as Chrome's trace events.
//!
//! The time in which a created container waited for `start` is told and not drawn.
//! Spec: Chrome's "Trace Event Format": complete events (`ph` = `X`), times in microseconds.

use std::{path::PathBuf, process::ExitCode};

use serde_json::{Value, json};

use super::{Context, print};
use crate::{
    census,
    cli::TraceArgs,
    error::CommandError,
    state::{ContainerId, StateDir, StateError},
    trace::{Trace, Who},
};

/// How wide the picture is, in characters.
const WIDTH: u64 = 48;

pub(super) fn trace(args: &TraceArgs, context: &Context) -> Result<ExitCode, CommandError> {
    let id = ContainerId::parse(&args.id)?;
    let dir = directory(&id, context)?;
    let trace = Trace::read(&dir).map_err(|source| StateError::Io {
        step: "read the trace in",
        path: dir,
        source,
    })?;
    match args.format.as_str() {
        "table" => print(&picture(&trace)),
        "chrome" => print(&(chrome(&trace).to_string() + "\n")),
        _ => Err(CommandError::Usage("invalid format option".into())),
    }
}

/// Where the container's files are: in this state root, else with whoever on this host holds a container of that name.
fn directory(id: &ContainerId, context: &Context) -> Result<PathBuf, CommandError> {
    match StateDir::open(&context.root, id) {
        Ok(dir) => return Ok(dir.path().to_owned()),
        Err(StateError::NotFound) => {}
        Err(error) => return Err(error.into()),
    }
    for holder in census::holders() {
        let residents = holder.ask(false).map(|household| household.residents);
        let lives_there = |residents: Vec<census::Resident>| {
            residents.iter().any(|resident| resident.state.id == *id)
        };
        if residents.is_ok_and(lives_there) {
            return Ok(holder.root.join(id.as_str()));
        }
    }
    Err(StateError::NotFound.into())
}

const fn name(who: Who) -> &'static str {
    match who {
        Who::Waiting => "-",
        Who::Command => "command",
        Who::Holder => "runtime",
        Who::Machine => "machine",
    }
}

fn picture(trace: &Trace) -> String {
    let waited = |who| who == Who::Waiting;
    let total: u64 = trace
        .steps()
        .filter(|(mark, ..)| !waited(mark.who))
        .map(|(.., took)| took)
        .sum();
    let place = |at: u64| at.saturating_mul(WIDTH) / total.max(1);
    let mut out = format!("{:>10} {:>10}  {:8} STEP\n", "BEGAN ms", "TOOK ms", "WHO");
    let mut drawn = 0;
    for (mark, began, took) in trace.steps() {
        let bar = if waited(mark.who) {
            String::new()
        } else {
            let (left, right) = (place(drawn), place(drawn + took));
            drawn += took;
            let cells = (0..WIDTH).map(|cell| match cell {
                cell if cell >= left && (cell < right || cell == left) => '#',
                _ => ' ',
            });
            cells.collect()
        };
        out.push_str(&format!(
            "{:>10} {:>10}  {:8} {:36} |{bar:48}|\n",
            milliseconds(began),
            milliseconds(took),
            name(mark.who),
            printable(&mark.what),
        ));
    }
    out.push_str(&format!(
        "{:>10} {:>10}  together\n",
        "",
        milliseconds(total)
    ));
    out
}

/// With three decimals.
fn milliseconds(nanoseconds: u64) -> String {
    let micros = nanoseconds / 1000;
    format!("{}.{:03}", micros / 1000, micros % 1000)
}

/// Whatever wrote the file: one line, as wide as its column.
fn printable(text: &str) -> String {
    crate::text::one_line(text, 36)
}

fn chrome(trace: &Trace) -> Value {
    let lanes = [Who::Command, Who::Holder, Who::Machine, Who::Waiting];
    let lane = |who| lanes.iter().position(|&other| other == who).unwrap_or(0) + 1;
    let names = lanes.map(|who| {
        json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane(who), "args": {"name": name(who)}})
    });
    let micros =
        |nanoseconds: u64| json!(std::time::Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6);
    let steps = trace.steps().map(|(mark, began, took)| {
        json!({
            "name": mark.what, "cat": name(mark.who), "ph": "X", "pid": 1, "tid": lane(mark.who),
            "ts": micros(began), "dur": micros(took),
        })
    });
    json!({"displayTimeUnit": "ms", "traceEvents": names.into_iter().chain(steps).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Mark;

    fn trace() -> Trace {
        let mark = |who, what: &'static str, at_ms: u64| Mark {
            who,
            what: what.into(),
            at_ns: at_ms * 1_000_000,
        };
        Trace(vec![
            mark(Who::Command, "begin", 5),
            mark(Who::Holder, "check", 6),
            mark(Who::Machine, "boot", 9),
            mark(Who::Waiting, "wait for start", 1009),
            mark(Who::Machine, "start", 1010),
        ])
    }

    #[test]
    fn the_picture_has_a_line_for_each_step_and_leaves_the_wait_out() {
        let picture = picture(&trace());
        let lines: Vec<_> = picture.lines().collect();
        assert_eq!(lines.len(), 6);
        assert!(
            lines[1]
                .trim_start()
                .starts_with("0.000      1.000  runtime"),
            "{picture}"
        );
        let bar = |line: &str| line.matches('#').count();
        assert_eq!(
            [1, 2, 3, 4].map(|n| bar(lines[n])),
            [9, 29, 0, 10],
            "{picture}"
        );
        assert!(lines[5].contains("5.000"), "{picture}");
    }

    #[test]
    fn chrome_gets_complete_events_in_microseconds() {
        let value = chrome(&trace());
        let events = value["traceEvents"].as_array().unwrap();
        let boot = events.iter().find(|event| event["name"] == "boot").unwrap();
        assert_eq!(
            (&boot["ph"], &boot["cat"]),
            (&json!("X"), &json!("machine"))
        );
        assert_eq!(boot["ts"].as_f64().unwrap().round(), 1000.0);
        assert_eq!(boot["dur"].as_f64().unwrap().round(), 3000.0);
        assert_eq!(events.iter().filter(|event| event["ph"] == "M").count(), 4);
    }
}
