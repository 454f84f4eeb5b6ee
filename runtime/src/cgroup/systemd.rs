//! Cgroups that systemd makes: a transient scope for each sandbox, asked for over D-Bus.
//!
//! Contract: a scope is there, with the calling process in it, when [`start`] returns, and gone when [`stop`] does.
//! Each call connects anew, on a thread with an event loop of its own: it may be made with and without one running.
//! systemd is told the limits that it has properties for, so that it does not undo them; the files of the cgroup, which
//! is delegated, are written as well (`cgroup.rs`), because only then a refusal is heard.
//! Not here: what else happens to a cgroup, names (`scope.rs`), values (`properties.rs`).
//! Spec: org.freedesktop.systemd1(5); runc 1.1, libcontainer/cgroups/systemd/v2.go.

use std::{future::Future, io, path::Path, thread, time::Duration};

use futures_util::StreamExt;
use serde::Serialize;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath, Variant, zvariant::DynamicType};

use super::properties::Property;

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// How long systemd may take for a job, as in runc.
const PATIENCE: Duration = Duration::from_secs(30);

/// A job replaces others that are in its way.
const MODE: &str = "replace";

/// Why systemd does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// Another init system.
    #[error("systemd not running on this host, cannot use systemd cgroups manager")]
    NotRunning,
    /// It cannot be asked.
    #[error("{step} {unit:?}: {words}")]
    Bus {
        /// What was tried.
        step: &'static str,
        /// With which unit.
        unit: String,
        /// Why not: these errors tell their causes themselves.
        words: Box<zbus::Error>,
    },
    /// It tried.
    #[error("error creating systemd unit `{unit}`: got `{result}`")]
    Result {
        /// The unit.
        unit: String,
        /// What systemd says.
        result: String,
    },
    /// It does not answer.
    #[error("Timeout waiting for systemd and {unit}")]
    Silent {
        /// The unit.
        unit: String,
    },
    /// No thread for the question.
    #[error("start a thread for systemd")]
    Thread(#[source] io::Error),
}

/// Whether systemd is this host's init.
pub(super) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes a scope and moves this process into it.
pub(super) fn start(unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
    asked(unit, async {
        let bus = Bus::connect(unit).await?;
        let result = match bus.start(properties).await {
            Err(error) if is_named(&error, "UnitExists") => {
                // What a failed unit has left; one that is alive stays, and is an error.
                let _ = bus.reset_failed().await;
                bus.start(properties).await
            }
            other => other,
        };
        let result = result.map_err(bus.failed("unable to start unit"))?;
        if result != "done" {
            let _ = bus.reset_failed().await;
            let unit = unit.to_owned();
            return Err(SystemdError::Result { unit, result });
        }
        Ok(())
    })
}

/// Ends a scope, with whatever is left in it. One that is gone is fine.
pub(super) fn stop(unit: &str) -> Result<(), SystemdError> {
    asked(unit, async {
        let bus = Bus::connect(unit).await?;
        match bus.job("StopUnit", &(unit, MODE)).await {
            Ok(_) => {}
            Err(error) if is_named(&error, "NoSuchUnit") => {}
            Err(error) => return Err(bus.failed("unable to stop unit")(error)),
        }
        // As runc: whatever it ended with, its name is free again. Mostly there is nothing left to forget.
        let _ = bus.reset_failed().await;
        Ok(())
    })
}

/// Changes limits of a scope until it ends.
pub(super) fn change(unit: &str, properties: &[Property]) -> Result<(), SystemdError> {
    if properties.is_empty() {
        return Ok(());
    }
    asked(unit, async {
        let bus = Bus::connect(unit).await?;
        let only_at_run_time = true;
        bus.call("SetUnitProperties", &(unit, only_at_run_time, properties))
            .await
            .map(drop)
            .map_err(bus.failed("unable to set the properties of unit"))
    })
}

/// Waits for a conversation, within limits.
fn asked<T: Send>(
    unit: &str,
    conversation: impl Future<Output = Result<T, SystemdError>> + Send,
) -> Result<T, SystemdError> {
    if !is_running() {
        return Err(SystemdError::NotRunning);
    }
    let silent = || SystemdError::Silent {
        unit: unit.to_owned(),
    };
    let talk = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(SystemdError::Thread)?
            .block_on(async { tokio::time::timeout(PATIENCE, conversation).await })
            .unwrap_or_else(|_| Err(silent()))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("systemd".to_owned());
        let talking = thread.spawn_scoped(scope, talk);
        let talking = talking.map_err(SystemdError::Thread)?;
        // A panic ends the process.
        talking.join().unwrap_or_else(|_| Err(silent()))
    })
}

/// A connection to the system's bus, and the unit that it is about.
struct Bus<'a> {
    connection: Connection,
    unit: &'a str,
}

impl<'a> Bus<'a> {
    async fn connect(unit: &'a str) -> Result<Self, SystemdError> {
        match Connection::system().await {
            Ok(connection) => Ok(Self { connection, unit }),
            Err(error) => Err(SystemdError::Bus {
                step: "unable to reach systemd for unit",
                unit: unit.to_owned(),
                words: Box::new(error),
            }),
        }
    }

    async fn start(&self, properties: &[Property]) -> zbus::Result<String> {
        let no_others: [(&str, Vec<(&str, Variant<'_>)>); 0] = [];
        let body = (self.unit, MODE, properties, no_others.as_slice());
        self.job("StartTransientUnit", &body).await
    }

    async fn reset_failed(&self) -> zbus::Result<()> {
        let answer = self.call("ResetFailedUnit", &(self.unit,)).await;
        answer.map(drop)
    }

    async fn call<B: Serialize + DynamicType>(
        &self,
        method: &str,
        body: &B,
    ) -> zbus::Result<zbus::Message> {
        self.connection
            .call_method(Some(NAME), PATH, Some(MANAGER), method, body)
            .await
    }

    /// Orders a job and waits for its end; systemd tells whoever ordered one.
    async fn job<B: Serialize + DynamicType>(
        &self,
        method: &str,
        body: &B,
    ) -> zbus::Result<String> {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(NAME)
            .interface(MANAGER)
            .member("JobRemoved")
            .build()?;
        let mut ends = MessageStream::for_match_rule(rule, &self.connection, None).await?;
        let job: OwnedObjectPath = self.call(method, body).await?.body().deserialize()?;
        while let Some(end) = ends.next().await {
            let end = end?;
            let body = end.body();
            let (_, ended, _, result): (u32, OwnedObjectPath, &str, &str) = body.deserialize()?;
            if ended == job {
                return Ok(result.to_owned());
            }
        }
        Err(zbus::Error::InputOutput(
            io::Error::from(io::ErrorKind::UnexpectedEof).into(),
        ))
    }

    fn failed(&self, step: &'static str) -> impl Fn(zbus::Error) -> SystemdError {
        let unit = self.unit.to_owned();
        move |error| SystemdError::Bus {
            step,
            unit: unit.clone(),
            words: Box::new(error),
        }
    }
}

/// Whether systemd answered with this error.
fn is_named(error: &zbus::Error, short: &str) -> bool {
    let zbus::Error::MethodError(name, ..) = error else {
        return false;
    };
    name.strip_prefix(NAME)
        .is_some_and(|rest| rest.strip_prefix('.') == Some(short))
}
