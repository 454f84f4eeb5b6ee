//! What a listener's file answers: the requests of the host's supervisor against the notifications of the guest.
//!
//! ```text
//!  guest --told--> Queued --received by the supervisor--> Delivered --answered by it--> Answering --guest's word--> (gone)
//! ```
//!
//! Contract: pure; what happens goes in, what is to be done comes out ([`Effect`]), in order. The answers to RECV, SEND
//! and ID_VALID are those of the kernel's own listener.
//! A guest can neither fill the host (at most `MOST_WAITING` notifications that are not being answered and twice as many in
//! all, a question for each of them and for each request that waits) nor keep a supervisor waiting that serves others too: a question that it has not answered in
//! [`PATIENCE`], or that comes while it is behind with such a one, is answered as if the guest had not objected.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use caisson_agent_api::supervision::{MOST_WAITING, Notification, Response, ToGuest, ToHost};
use rustix::io::Errno;

use super::wire::{self, Kind, Ready, Request};

/// How long a supervisor waits for the guest. A guest that is paused does not answer, and need not.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Write this to the host's kernel.
    Write(Vec<u8>),
    /// Say this to the guest.
    Say(ToGuest),
    /// Nobody has the file any more.
    Close,
}

/// What a guest must not do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Nonsense;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued,
    Delivered,
    Answering,
}

/// Something that the guest has been asked.
#[derive(Debug)]
struct Question {
    id: u64,
    responds: bool,
    /// The request that waits for the answer, and until when.
    asker: Option<(u64, Instant)>,
}

/// One listener.
#[derive(Debug, Default)]
pub(super) struct Session {
    phases: HashMap<u64, Phase>,
    queue: VecDeque<Notification>,
    /// Requests for a notification.
    receivers: VecDeque<u64>,
    /// What the guest has not answered, oldest first.
    questions: VecDeque<Question>,
    /// Whom to tell when more is ready, and of what.
    poller: Option<(u64, u32)>,
    is_open: bool,
    over: bool,
    effects: Vec<Effect>,
}

impl Session {
    /// What is to be done now.
    pub(super) fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// When somebody has waited for too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let mut askers = self.questions.iter().filter_map(|question| question.asker);
        askers.next().map(|(_, deadline)| deadline)
    }

    fn write(&mut self, unique: u64, result: Result<&[u8], Errno>) {
        self.effects
            .push(Effect::Write(wire::reply(unique, result)));
    }

    fn wake(&mut self) {
        if let Some((handle, wanted)) = self.poller
            && self.ready().is_wanted(wanted)
        {
            self.effects.push(Effect::Write(wire::wake(handle)));
        }
    }

    /// The host's kernel asks.
    pub(super) fn requested(&mut self, Request { unique, kind }: Request, now: Instant) {
        match kind {
            Kind::Init => self.write(unique, Ok(&wire::init())),
            Kind::Attributes => self.write(unique, Ok(&wire::attributes())),
            // Like the kernel's, the file cannot be opened by another way than its descriptor.
            Kind::Open if self.is_open => self.write(unique, Err(Errno::NXIO)),
            Kind::Open => {
                self.is_open = true;
                self.write(unique, Ok(&wire::open()));
            }
            Kind::Release => {
                self.write(unique, Ok(&[]));
                self.effects.push(Effect::Close);
            }
            Kind::Receive => {
                self.receivers.push_back(unique);
                self.deliver();
            }
            Kind::Respond(response) => self.respond(unique, response, now),
            Kind::IsValid(id) => self.is_valid(unique, id, now),
            Kind::Poll { handle, wanted } => {
                if let Some(wanted) = wanted {
                    let before = self.poller.map_or(0, |(_, wanted)| wanted);
                    self.poller = Some((handle, before | wanted));
                }
                let ready = self.ready();
                self.write(unique, Ok(&wire::polled(ready)));
            }
            Kind::Interrupt(waiting) => {
                // Who waits for the guest waits for a short time only.
                if let Some(at) = self.receivers.iter().position(|one| *one == waiting) {
                    self.receivers.remove(at);
                    self.write(waiting, Err(Errno::INTR));
                }
            }
            Kind::Forget => {}
            Kind::Refused(errno) => self.write(unique, Err(errno)),
        }
    }

    fn ready(&self) -> Ready {
        Ready {
            readable: !self.queue.is_empty(),
            writable: self.phases.values().any(|phase| *phase == Phase::Delivered),
            over: self.over,
        }
    }

    /// Notifications to those who wait for them.
    fn deliver(&mut self) {
        let mut delivered = false;
        while !self.receivers.is_empty()
            && let Some(notification) = self.queue.pop_front()
            && let Some(unique) = self.receivers.pop_front()
        {
            delivered = true;
            self.phases.insert(notification.id(), Phase::Delivered);
            let body = wire::done(notification.bytes());
            self.write(unique, Ok(&body));
        }
        if delivered {
            self.wake();
        }
        while self.over
            && let Some(unique) = self.receivers.pop_front()
        {
            self.write(unique, Err(Errno::NOENT));
        }
    }

    fn respond(&mut self, unique: u64, response: Response, now: Instant) {
        let id = response.id();
        match self.phases.get(&id) {
            None => self.write(unique, Err(Errno::NOENT)),
            Some(Phase::Queued | Phase::Answering) => self.write(unique, Err(Errno::INPROGRESS)),
            Some(Phase::Delivered) => {
                self.phases.insert(id, Phase::Answering);
                self.effects.push(Effect::Say(ToGuest::Respond(response)));
                self.ask(unique, id, true, now);
            }
        }
    }

    fn is_valid(&mut self, unique: u64, id: u64, now: Instant) {
        match self.phases.get(&id) {
            Some(Phase::Delivered) if self.is_behind() => {
                self.write(unique, Ok(&wire::done(&[])));
            }
            Some(Phase::Delivered) => {
                self.effects.push(Effect::Say(ToGuest::IsValid(id)));
                self.ask(unique, id, false, now);
            }
            _ => self.write(unique, Err(Errno::NOENT)),
        }
    }

    /// Whether the guest still owes an answer that was given up.
    fn is_behind(&self) -> bool {
        let oldest = self.questions.front();
        oldest.is_some_and(|question| question.asker.is_none())
    }

    fn ask(&mut self, unique: u64, id: u64, responds: bool, now: Instant) {
        let waits = !self.is_behind();
        self.questions.push_back(Question {
            id,
            responds,
            asker: waits.then_some((unique, now + PATIENCE)),
        });
        if !waits {
            self.write(unique, Ok(&wire::done(&[])));
        }
    }

    /// Time has passed.
    pub(super) fn waited(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        let given_up = self.questions.iter_mut().map(|one| one.asker.take());
        let given_up: Vec<_> = given_up.flatten().collect();
        for (unique, _) in given_up {
            self.write(unique, Ok(&wire::done(&[])));
        }
    }

    /// The guest says something.
    pub(super) fn told(&mut self, said: ToHost) -> Result<(), Nonsense> {
        match said {
            ToHost::Notified(notification) => {
                let id = notification.id();
                if self.is_full() || self.phases.contains_key(&id) {
                    return Err(Nonsense);
                }
                self.phases.insert(id, Phase::Queued);
                self.queue.push_back(notification);
                match self.receivers.is_empty() {
                    true => self.wake(),
                    false => self.deliver(),
                }
            }
            ToHost::Answered(errno) => self.answered(errno)?,
            ToHost::Gone(id) => {
                // An answer that is under way will hear the same.
                if self.phases.get(&id) != Some(&Phase::Answering) {
                    self.phases.remove(&id);
                    self.queue.retain(|notification| notification.id() != id);
                }
            }
        }
        Ok(())
    }

    /// Whether the guest may have no more notifications. Those that are being answered it need not count any more: it may
    /// have found that their processes are gone. But it must get to the answers before there are as many of those again.
    fn is_full(&self) -> bool {
        let all = self.phases.len();
        let open = || {
            let phases = self.phases.values();
            phases.filter(|phase| **phase != Phase::Answering).count()
        };
        all >= 2 * MOST_WAITING || (all >= MOST_WAITING && open() >= MOST_WAITING)
    }

    fn answered(&mut self, errno: u32) -> Result<(), Nonsense> {
        let question = self.questions.pop_front().ok_or(Nonsense)?;
        if question.responds || errno != 0 {
            self.phases.remove(&question.id);
        }
        if let Some((unique, _)) = question.asker {
            match errno {
                0 => self.write(unique, Ok(&wire::done(&[]))),
                // The one thing that can be wrong with what has been checked here: its process has gone.
                _ => self.write(unique, Err(Errno::NOENT)),
            }
        }
        Ok(())
    }

    /// The guest has hung up: nothing waits there any more.
    pub(super) fn hung_up(&mut self) {
        self.over = true;
        self.queue.clear();
        self.phases.clear();
        for question in std::mem::take(&mut self.questions) {
            if let Some((unique, _)) = question.asker {
                self.write(unique, Err(Errno::NOENT));
            }
        }
        self.deliver();
        self.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(id: u64) -> ToHost {
        let mut bytes = [0; Notification::BYTES];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        ToHost::Notified(Notification::new(bytes))
    }

    fn response(id: u64) -> Response {
        let mut bytes = [0; Response::BYTES];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        Response::parse(bytes).unwrap()
    }

    /// What a request is answered at once, as (number, error); and whether anything else happens.
    fn asked(session: &mut Session, unique: u64, kind: Kind, now: Instant) -> Vec<(u64, i32)> {
        session.requested(Request { unique, kind }, now);
        answers(session)
    }

    fn answers(session: &mut Session) -> Vec<(u64, i32)> {
        let written = session
            .effects()
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Write(bytes) => Some(bytes),
                _ => None,
            });
        let answer = |bytes: Vec<u8>| {
            let error = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
            (u64::from_le_bytes(bytes[8..16].try_into().unwrap()), error)
        };
        written.map(answer).collect()
    }

    const NOENT: i32 = -libc::ENOENT;
    const INPROGRESS: i32 = -libc::EINPROGRESS;
    const WOKEN: (u64, i32) = (0, 1);

    #[test]
    fn who_waits_gets_the_next_notification_and_who_is_interrupted_none() {
        let (mut session, now) = (Session::default(), Instant::now());
        assert_eq!(asked(&mut session, 1, Kind::Receive, now), []);
        assert_eq!(asked(&mut session, 2, Kind::Receive, now), []);
        let interrupted = asked(&mut session, 9, Kind::Interrupt(1), now);
        assert_eq!(interrupted, [(1, -libc::EINTR)]);
        session.told(notification(7)).unwrap();
        assert_eq!(answers(&mut session), [(2, 0)]);
        session.told(notification(8)).unwrap();
        assert_eq!(answers(&mut session), []);
        assert_eq!(asked(&mut session, 3, Kind::Receive, now), [(3, 0)]);
    }

    #[test]
    fn a_notification_is_answered_once_and_by_who_has_it() {
        let (mut session, now) = (Session::default(), Instant::now());
        let respond = |id| Kind::Respond(response(id));
        assert_eq!(asked(&mut session, 1, respond(7), now), [(1, NOENT)]);
        session.told(notification(7)).unwrap();
        assert_eq!(asked(&mut session, 2, respond(7), now), [(2, INPROGRESS)]);
        assert_eq!(asked(&mut session, 3, Kind::IsValid(7), now), [(3, NOENT)]);
        assert_eq!(asked(&mut session, 4, Kind::Receive, now), [(4, 0)]);
        session.requested(
            Request {
                unique: 5,
                kind: respond(7),
            },
            now,
        );
        let said = Effect::Say(ToGuest::Respond(response(7)));
        assert_eq!(session.effects(), [said]);
        assert_eq!(asked(&mut session, 6, respond(7), now), [(6, INPROGRESS)]);
        session.told(ToHost::Answered(0)).unwrap();
        assert_eq!(answers(&mut session), [(5, 0)]);
        assert_eq!(asked(&mut session, 8, respond(7), now), [(8, NOENT)]);
    }

    #[test]
    fn a_process_that_has_gone_is_no_longer_valid() {
        let (mut session, now) = (Session::default(), Instant::now());
        session.told(notification(7)).unwrap();
        asked(&mut session, 1, Kind::Receive, now);
        for errno in [0, 2] {
            assert_eq!(asked(&mut session, 2, Kind::IsValid(7), now), []);
            session.told(ToHost::Answered(errno)).unwrap();
            let error = -i32::try_from(errno).unwrap();
            assert_eq!(answers(&mut session), [(2, error)]);
        }
        assert_eq!(asked(&mut session, 3, Kind::IsValid(7), now), [(3, NOENT)]);
        session.told(notification(8)).unwrap();
        session.told(ToHost::Gone(8)).unwrap();
        assert_eq!(asked(&mut session, 4, Kind::Receive, now), []);
    }

    #[test]
    fn what_is_ready_is_what_the_kernel_would_say_and_who_polls_is_woken() {
        let (mut session, now) = (Session::default(), Instant::now());
        let poll = |wanted| Kind::Poll { handle: 3, wanted };
        asked(&mut session, 1, poll(None), now);
        session.told(notification(7)).unwrap();
        assert_eq!(answers(&mut session), []);
        asked(&mut session, 2, poll(Some(1)), now);
        session.told(notification(8)).unwrap();
        assert_eq!(answers(&mut session), [WOKEN]);
        let ready = |session: &Session| {
            let Ready {
                readable,
                writable,
                over,
            } = session.ready();
            [readable, writable, over]
        };
        assert_eq!(ready(&session), [true, false, false]);
        asked(&mut session, 3, Kind::Receive, now);
        assert_eq!(ready(&session), [true, true, false]);
        asked(&mut session, 4, Kind::Receive, now);
        assert_eq!(ready(&session), [false, true, false]);
        asked(&mut session, 5, Kind::Receive, now);
        session.told(notification(9)).unwrap();
        assert_eq!(answers(&mut session), [(5, 0)]);
        session.hung_up();
        assert_eq!(answers(&mut session), [WOKEN]);
        assert_eq!(ready(&session), [false, false, true]);
    }

    #[test]
    fn with_the_guest_everything_ends() {
        let (mut session, now) = (Session::default(), Instant::now());
        session.told(notification(7)).unwrap();
        asked(&mut session, 1, Kind::Receive, now);
        asked(&mut session, 2, Kind::Receive, now);
        asked(&mut session, 3, Kind::IsValid(7), now);
        session.hung_up();
        assert_eq!(answers(&mut session), [(3, NOENT), (2, NOENT)]);
        assert_eq!(asked(&mut session, 4, Kind::Receive, now), [(4, NOENT)]);
        asked(&mut session, 5, Kind::Open, now);
        session.requested(
            Request {
                unique: 6,
                kind: Kind::Release,
            },
            now,
        );
        assert_eq!(session.effects().pop(), Some(Effect::Close));
    }

    #[test]
    fn a_guest_that_does_not_answer_keeps_nobody_waiting() {
        let (mut session, now) = (Session::default(), Instant::now());
        for id in [7, 8] {
            session.told(notification(id)).unwrap();
            asked(&mut session, id, Kind::Receive, now);
        }
        assert_eq!(session.deadline(), None);
        assert_eq!(asked(&mut session, 1, Kind::IsValid(7), now), []);
        let late = session.deadline().unwrap();
        session.waited(now);
        assert_eq!(answers(&mut session), []);
        session.waited(late);
        assert_eq!(answers(&mut session), [(1, 0)]);
        // It is not asked in vain again, but gets its answers.
        assert_eq!(asked(&mut session, 2, Kind::IsValid(7), late), [(2, 0)]);
        let kind = Kind::Respond(response(7));
        session.requested(Request { unique: 3, kind }, late);
        let effects = session.effects();
        assert!(matches!(effects[..], [Effect::Say(_), Effect::Write(_)]));
        assert_eq!(session.deadline(), None);
        session.told(ToHost::Answered(0)).unwrap();
        session.told(ToHost::Answered(0)).unwrap();
        assert_eq!(answers(&mut session), []);
        assert_eq!(asked(&mut session, 4, Kind::IsValid(8), late), []);
    }

    #[test]
    fn whatever_is_said_a_request_is_answered_once_and_the_guest_fills_nothing() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let (mut session, mut now) = (Session::default(), Instant::now());
        let mut open = std::collections::HashSet::new();
        for unique in 1..20_000 {
            let id = random(2000);
            let _ = match random(4) {
                0 => session.told(ToHost::Answered(u32::try_from(random(3)).unwrap())),
                1 => session.told(ToHost::Gone(id)),
                _ => session.told(notification(id)),
            };
            let kind = match random(5) {
                0 => Kind::Receive,
                1 => Kind::IsValid(id),
                2 => Kind::Interrupt(unique - random(9)),
                3 => Kind::Poll {
                    handle: 1,
                    wanted: Some(u32::MAX),
                },
                _ => Kind::Respond(response(id)),
            };
            if !matches!(kind, Kind::Interrupt(_)) {
                open.insert(unique);
            }
            session.requested(Request { unique, kind }, now);
            now += Duration::from_millis(random(20));
            session.waited(now);
            for answer in answers(&mut session) {
                assert!(answer == WOKEN || open.remove(&answer.0), "{answer:?}");
            }
            assert!(session.phases.len() <= 2 * MOST_WAITING);
            assert!(session.queue.len() <= session.phases.len());
            assert!(session.questions.len() <= 2 * MOST_WAITING + open.len());
        }
        session.hung_up();
        for answer in answers(&mut session) {
            assert!(answer == WOKEN || open.remove(&answer.0), "{answer:?}");
        }
        assert_eq!(open.len(), 0);
    }

    #[test]
    fn nonsense_of_the_guests_is_found() {
        let mut session = Session::default();
        assert_eq!(session.told(ToHost::Answered(0)), Err(Nonsense));
        session.told(notification(0)).unwrap();
        assert_eq!(session.told(notification(0)), Err(Nonsense));
        for id in 1..u64::try_from(MOST_WAITING).unwrap() {
            session.told(notification(id)).unwrap();
        }
        assert_eq!(session.told(notification(u64::MAX)), Err(Nonsense));
        session.told(ToHost::Gone(1)).unwrap();
        session.told(ToHost::Gone(1)).unwrap();
        session.told(notification(u64::MAX)).unwrap();
    }

    #[test]
    fn a_guest_that_is_full_may_replace_what_is_being_answered_to_it() {
        let (mut session, now) = (Session::default(), Instant::now());
        let most = u64::try_from(MOST_WAITING).unwrap();
        for id in 0..most {
            session.told(notification(id)).unwrap();
        }
        asked(&mut session, 1, Kind::Receive, now);
        let respond = |id| Kind::Respond(response(id));
        assert_eq!(asked(&mut session, 2, respond(0), now), []);
        // While the answer is on its way the guest finds that its process is gone, and takes the next one.
        session.told(ToHost::Gone(0)).unwrap();
        session.told(notification(most)).unwrap();
        assert_eq!(session.told(notification(most + 1)), Err(Nonsense));
        session.told(ToHost::Answered(2)).unwrap();
        assert_eq!(answers(&mut session), [(2, NOENT)]);
        assert_eq!(session.told(notification(most + 1)), Err(Nonsense));
        // One that never gets to the answers fills nothing.
        for id in 1..=most {
            asked(&mut session, 3, Kind::Receive, now);
            asked(&mut session, 4, respond(id), now);
        }
        for id in most + 1..=2 * most {
            session.told(notification(id)).unwrap();
        }
        assert_eq!(session.told(notification(u64::MAX)), Err(Nonsense));
    }
}
