//! The main thread once the guest runs: the owner's requests, the boot deadline, the end.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use caisson_vmm_spec::{Cause, Event, MEMORY_DEVICE, MiB, Request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::bays::{Emptied, NewDisk};
use super::{Machine, one_line};
use crate::control::{Control, ControlError, Heard};
use crate::devices::mem::VIRTIO_ID_MEM;
use crate::ending::End;
use crate::log;
use crate::virtio::line::Reason;

const NO_FILE: &str = "no file came with the request";

/// What is answered to a request to plug something in.
fn plugged(slot: u8, done: Result<(), String>) -> Event {
    match done {
        Ok(()) => Event::Plugged { slot },
        Err(message) => Event::Refused { slot, message },
    }
}

fn stopped(message: &str) -> End {
    End {
        cause: Cause::PowerOff,
        message: message.to_owned(),
    }
}

impl Machine {
    /// Serves the owner until the VM ends.
    pub(super) fn serve(&mut self, control: &Control) -> End {
        let mut deadline = self.boot_deadline.map(|limit| Instant::now() + limit);
        loop {
            if self.link.has_booted() {
                deadline = None;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return self.boot_timed_out();
            }
            if let Err(errno) = self.wait(control, left) {
                return End {
                    cause: Cause::HostError,
                    message: format!("poll: {errno}"),
                };
            }
            if let Some(end) = self.ending.reported() {
                return end;
            }
            if let Some(end) = self.hear(control) {
                return end;
            }
        }
    }

    /// Returns when the owner spoke, the VM ended, or `left` is over.
    fn wait(&self, control: &Control, left: Option<Duration>) -> Result<(), rustix::io::Errno> {
        let mut fds = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&*self.ending, PollFlags::IN),
        ];
        // A deadline is milliseconds in a u64: longer ones than a timespec holds are no deadline.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn boot_timed_out(&self) -> End {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let last = tail
            .lines()
            .pop()
            .unwrap_or_else(|| "its console is silent".to_owned());
        let limit = self.boot_deadline.unwrap_or_default();
        let message = format!("the agent did not connect within {limit:?} of boot: {last}");
        End {
            cause: Cause::BootTimeout,
            message,
        }
    }

    fn hear(&mut self, control: &Control) -> Option<End> {
        match control.receive() {
            Ok(Heard::Nothing) => None,
            Ok(Heard::Closed) => Some(stopped("the owner is gone")),
            Ok(Heard::Request(Request::Stop, _)) => Some(stopped("stopped by its owner")),
            Ok(Heard::Request(request, fds)) => {
                self.obey(request, fds);
                None
            }
            Err(error @ ControlError::Receive(_)) => Some(End {
                cause: Cause::HostError,
                message: one_line(&error),
            }),
            Err(error) => {
                log::line(format_args!("{}", one_line(&error)));
                None
            }
        }
    }

    fn obey(&mut self, request: Request, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        let answer = match request {
            Request::Connect { port } => {
                // Without a socket there is nothing to connect.
                if let Some(socket) = fds.next() {
                    self.dials.push(port, UnixStream::from(socket));
                }
                return;
            }
            Request::Plug { slot, mac } => {
                let done = fds.next().ok_or_else(|| NO_FILE.to_owned());
                plugged(
                    slot,
                    done.and_then(|tap| self.bays.plug(slot, tap, fds.next(), mac)),
                )
            }
            Request::PlugDisk {
                slot,
                read_only,
                serial,
            } => {
                let disk = fds.next().map(|file| NewDisk {
                    file: file.into(),
                    read_only,
                    serial,
                });
                let done = disk.ok_or_else(|| NO_FILE.to_owned());
                plugged(slot, done.and_then(|disk| self.bays.plug_disk(slot, disk)))
            }
            Request::Unplug { slot } => match self.bays.empty(slot) {
                Emptied::Now => Event::Unplugged { slot },
                Emptied::Soon => return,
            },
            Request::Memory { extra } => self.ask_for_memory(extra),
            Request::Vcpus { count } => match self.add_vcpus(count) {
                Ok(count) => Event::Vcpus { count },
                Err(message) => Event::Failed { message },
            },
            Request::Pause => {
                self.vcpus.pause();
                Event::Paused
            }
            Request::Resume => {
                self.vcpus.resume();
                Event::Resumed
            }
            Request::Counters => Event::Counters {
                values: self.counters.values(),
            },
            Request::Stop => return,
        };
        self.link.answer(&answer);
    }

    fn ask_for_memory(&self, extra: MiB) -> Event {
        let Some(device) = self.bus.devices().get(MEMORY_DEVICE as usize) else {
            let message = "there is no memory device".to_owned();
            return Event::Failed { message };
        };
        let asked = self.growth.ask(extra.bytes());
        let asked = asked
            .map_err(|error| one_line(&error))
            .and_then(|()| self.bays.memory_changed());
        match asked {
            Err(message) => Event::Failed { message },
            Ok(()) => {
                if !device.is(VIRTIO_ID_MEM) {
                    device.replace(VIRTIO_ID_MEM);
                }
                device.link().line.raise(Reason::Config);
                Event::Asked
            }
        }
    }

    /// How many there are then.
    fn add_vcpus(&mut self, count: u8) -> Result<u8, String> {
        if count > self.most_vcpus {
            return Err(format!("there may be {} vCPUs at most", self.most_vcpus));
        }
        let ids = self.vcpus.count()..count;
        if !ids.is_empty() {
            let new = self.vm.vcpus(ids, self.most_vcpus, self.entry);
            for vcpu in new.map_err(|error| one_line(&error))? {
                let added = self.vcpus.add(vcpu);
                added.map_err(|error| format!("start a vCPU's thread: {error}"))?;
            }
        }
        Ok(self.vcpus.count())
    }
}
