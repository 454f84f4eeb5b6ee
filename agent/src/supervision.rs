//! The listener of a process's seccomp filter: its notifications go to the host, the host's answers to the kernel.
//!
//! Contract: a [`Line`] is the stream to the host before there is a listener; [`Line::attach`] returns when the host's
//! supervisor has the listener, and from then on a task relays until the last process under the filter has ended or the
//! host hangs up. The listener is closed then, and the kernel answers what still waits with ENOSYS.
//! Notifications are taken from the kernel when they come, at most `MOST_WAITING` at a time; the rest wait there.
//! Spec: seccomp_unotify(2). Not here: loading the filter (`child/finish.rs`), the frames (`supervision.rs` of the API).

mod kernel;

use crate::socket::Socket;
use caisson_agent_api::supervision::{MOST_WAITING, Notification, TO_GUEST_BYTES, ToGuest, ToHost};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, ReadHalf, WriteHalf};
use tokio::sync::{self, Notify};

/// A stream to the host for a listener to come.
pub(crate) struct Line(OwnedFd);

impl Line {
    /// Over a connection that has begun.
    pub(crate) const fn new(connecting: OwnedFd) -> Self {
        Self(connecting)
    }

    /// Relays for a listener, once the host says that its supervisor has it.
    pub(crate) async fn attach(self, listener: OwnedFd) -> io::Result<()> {
        let (mut answers, host) = tokio::io::split(Socket::connected(self.0).await?);
        if heard(&mut answers).await? != ToGuest::Go {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let relay = Relay {
            listener: crate::sys::watch(listener, Interest::READABLE)?,
            waiting: Mutex::default(),
            room: Notify::new(),
            host: sync::Mutex::new(host),
        };
        tokio::spawn(async move {
            let ended = tokio::select! {
                ended = relay.notify() => ended,
                ended = relay.answer(answers) => ended,
            };
            // The host's hanging up is an end like any other.
            if let Err(error) = ended
                && error.kind() != io::ErrorKind::UnexpectedEof
                && error.kind() != io::ErrorKind::BrokenPipe
            {
                crate::kmsg::error(&format!("relay seccomp notifications: {error}"));
            }
        });
        Ok(())
    }
}

async fn heard(host: &mut ReadHalf<Socket>) -> io::Result<ToGuest> {
    let mut frame = [0; TO_GUEST_BYTES];
    host.read_exact(&mut frame).await?;
    ToGuest::parse(&frame).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// What there is to tell the host.
enum Next {
    Notified(Notification),
    /// These are not to be answered any more.
    Gone(Vec<u64>),
    /// No more processes are under the filter.
    Over,
    Nothing,
}

struct Relay {
    listener: AsyncFd<OwnedFd>,
    /// Told to the host and not answered. No await while it is locked.
    waiting: Mutex<HashSet<u64>>,
    /// One has been answered.
    room: Notify,
    host: sync::Mutex<WriteHalf<Socket>>,
}

impl Relay {
    fn waiting(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn tell(&self, said: ToHost) -> io::Result<()> {
        self.host.lock().await.write_all(&said.encode()).await
    }

    /// Tells the host what comes.
    async fn notify(&self) -> io::Result<()> {
        loop {
            match self.next()? {
                Next::Notified(notification) => self.tell(ToHost::Notified(notification)).await?,
                Next::Gone(ids) => {
                    for id in ids {
                        self.tell(ToHost::Gone(id)).await?;
                    }
                }
                Next::Over => return Ok(()),
                Next::Nothing => tokio::select! {
                    ready = self.listener.readable() => ready?.clear_ready(),
                    () = self.room.notified() => {}
                },
            }
        }
    }

    /// Asks the kernel; does not block, since nobody else takes notifications.
    fn next(&self) -> io::Result<Next> {
        let fd = self.listener.get_ref();
        loop {
            let mut polled = [PollFd::new(fd, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::default()))?;
            let events = polled[0].revents();
            if events.contains(PollFlags::HUP) {
                return Ok(Next::Over);
            }
            if !events.contains(PollFlags::IN) {
                return Ok(Next::Nothing);
            }
            if self.waiting().len() >= MOST_WAITING {
                let gone = |id: &u64| kernel::is_valid(fd, *id).is_err();
                let gone: Vec<u64> = self.waiting().extract_if(gone).collect();
                return Ok(match gone.is_empty() {
                    true => Next::Nothing,
                    false => Next::Gone(gone),
                });
            }
            match kernel::receive(fd) {
                Ok(notification) => {
                    self.waiting().insert(notification.id());
                    return Ok(Next::Notified(notification));
                }
                // Its process has ended since it was announced.
                Err(Errno::NOENT | Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Does what the host asks.
    async fn answer(&self, mut host: ReadHalf<Socket>) -> io::Result<()> {
        loop {
            let fd = self.listener.get_ref();
            let done = match heard(&mut host).await? {
                ToGuest::Respond(response) => {
                    let done = kernel::respond(fd, &response);
                    self.waiting().remove(&response.id());
                    self.room.notify_one();
                    done
                }
                ToGuest::IsValid(id) => {
                    let valid = kernel::is_valid(fd, id);
                    if valid.is_err() {
                        self.waiting().remove(&id);
                    }
                    valid
                }
                ToGuest::Go => return Err(io::ErrorKind::InvalidData.into()),
            };
            let errno = done.map_or_else(|errno| errno.raw_os_error().unsigned_abs(), |()| 0);
            self.tell(ToHost::Answered(errno)).await?;
        }
    }
}
