//! Notifications of a seccomp filter, on their way from a listener in the guest to its supervisor on the host, and back.
//!
//! Contract: a stream of its own for each listener, that the agent dials before the filter is loaded. The host begins, with
//! [`ToGuest::Go`], once the supervisor has the listener; until then the process waits. Then each [`ToHost::Notified`] is
//! a system call that waits; what the host asks is answered by [`ToHost::Answered`], in the order of the questions.
//! Either end closes the stream when it is done: the listener is closed with it. Frames have a fixed size and are parsed
//! whole; what is no frame ends the stream. At most [`MOST_WAITING`] notifications are neither answered nor gone.
//! Spec: seccomp_unotify(2); the structures are the kernel's, in their memory layout.

/// The most notifications that the guest may have told and the host not answered.
pub const MOST_WAITING: usize = 1024;

/// Bytes of a [`ToHost`].
pub const TO_HOST_BYTES: usize = 8 + Notification::BYTES;

/// Bytes of a [`ToGuest`].
pub const TO_GUEST_BYTES: usize = 8 + Response::BYTES;

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`: the system call is carried out.
const CONTINUE: u32 = 1;

/// A `struct seccomp_notif`, of a process that the supervisor does not see: its `pid` is 0, and there are no flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification([u8; Self::BYTES]);

impl Notification {
    /// Its size.
    pub const BYTES: usize = 80;

    /// Takes one that the kernel or the guest has written. Of what it says about the system call everything is possible.
    pub fn new(mut bytes: [u8; Self::BYTES]) -> Self {
        for byte in bytes.iter_mut().skip(8).take(8) {
            *byte = 0;
        }
        Self(bytes)
    }

    /// By which it is answered.
    pub fn id(&self) -> u64 {
        number(&self.0, 0)
    }

    /// As a supervisor reads it.
    pub const fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

/// A `struct seccomp_notif_resp` that the kernel takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response([u8; Self::BYTES]);

impl Response {
    /// Its size.
    pub const BYTES: usize = 24;

    /// None if it has flags that are unknown, or values beside [`CONTINUE`].
    pub fn parse(bytes: [u8; Self::BYTES]) -> Option<Self> {
        let values = bytes.iter().skip(8).take(12).any(|byte| *byte != 0);
        match small(&bytes, 20) {
            0 => Some(Self(bytes)),
            CONTINUE if !values => Some(Self(bytes)),
            _ => None,
        }
    }

    /// The notification that is answered.
    pub fn id(&self) -> u64 {
        number(&self.0, 0)
    }

    /// As the kernel reads it.
    pub const fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

/// What the agent says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToHost {
    /// A system call waits.
    Notified(Notification),
    /// What the kernel says to the oldest question that is open: an error number, or 0.
    Answered(u32),
    /// A notification that need not be answered any more: its process has ended or been interrupted.
    Gone(u64),
}

impl ToHost {
    /// The frame.
    pub fn encode(&self) -> [u8; TO_HOST_BYTES] {
        let mut frame = [0; TO_HOST_BYTES];
        let (kind, value) = match self {
            Self::Notified(_) => (1, 0),
            Self::Answered(errno) => (2, *errno),
            Self::Gone(_) => (3, 0),
        };
        put(&mut frame, 0, &u32::to_le_bytes(kind));
        put(&mut frame, 4, &value.to_le_bytes());
        match self {
            Self::Notified(notification) => put(&mut frame, 8, &notification.0),
            Self::Gone(id) => put(&mut frame, 8, &id.to_le_bytes()),
            Self::Answered(_) => {}
        }
        frame
    }

    /// What a frame says, if it is one.
    pub fn parse(frame: &[u8; TO_HOST_BYTES]) -> Option<Self> {
        match (small(frame, 0), small(frame, 4)) {
            (1, 0) => Some(Self::Notified(Notification::new(array(frame, 8)))),
            // The largest error number that a system call can have.
            (2, errno @ ..=4095) => Some(Self::Answered(errno)),
            (3, 0) => Some(Self::Gone(number(frame, 8))),
            _ => None,
        }
    }
}

/// What the host says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToGuest {
    /// The supervisor has the listener.
    Go,
    /// Its answer to a notification.
    Respond(Response),
    /// Whether a notification is still to be answered.
    IsValid(u64),
}

impl ToGuest {
    /// The frame.
    pub fn encode(&self) -> [u8; TO_GUEST_BYTES] {
        let mut frame = [0; TO_GUEST_BYTES];
        let kind: u32 = match self {
            Self::Go => 1,
            Self::Respond(_) => 2,
            Self::IsValid(_) => 3,
        };
        put(&mut frame, 0, &kind.to_le_bytes());
        match self {
            Self::Go => {}
            Self::Respond(response) => put(&mut frame, 8, &response.0),
            Self::IsValid(id) => put(&mut frame, 8, &id.to_le_bytes()),
        }
        frame
    }

    /// What a frame says, if it is one.
    pub fn parse(frame: &[u8; TO_GUEST_BYTES]) -> Option<Self> {
        match small(frame, 0) {
            1 => Some(Self::Go),
            2 => Response::parse(array(frame, 8)).map(Self::Respond),
            3 => Some(Self::IsValid(number(frame, 8))),
            _ => None,
        }
    }
}

/// The bytes from `at` on; zeros beyond the end, where the sizes above let nobody read.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    array
}

fn small(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in frame.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(id: u64, value: i64, error: i32, flags: u32) -> [u8; Response::BYTES] {
        let mut bytes = [0; Response::BYTES];
        put(&mut bytes, 0, &id.to_le_bytes());
        put(&mut bytes, 8, &value.to_le_bytes());
        put(&mut bytes, 16, &error.to_le_bytes());
        put(&mut bytes, 20, &flags.to_le_bytes());
        bytes
    }

    #[test]
    fn frames_say_what_they_were_made_of() {
        let notification = Notification::new(std::array::from_fn(|at| u8::try_from(at).unwrap()));
        for said in [
            ToHost::Notified(notification),
            ToHost::Answered(0),
            ToHost::Answered(4095),
            ToHost::Gone(u64::MAX),
        ] {
            assert_eq!(ToHost::parse(&said.encode()), Some(said));
        }
        let denied = Response::parse(response(7, 0, -1, 0)).unwrap();
        for said in [
            ToGuest::Go,
            ToGuest::Respond(denied),
            ToGuest::IsValid(1 << 40),
        ] {
            assert_eq!(ToGuest::parse(&said.encode()), Some(said));
        }
        assert_eq!(denied.id(), 7);
    }

    #[test]
    fn what_is_no_frame_means_nothing() {
        for (kind, value) in [(0, 0), (4, 0), (1, 1), (2, 4096), (3, 9), (u32::MAX, 0)] {
            let mut frame = [0; TO_HOST_BYTES];
            put(&mut frame, 0, &u32::to_le_bytes(kind));
            put(&mut frame, 4, &u32::to_le_bytes(value));
            assert_eq!(ToHost::parse(&frame), None, "{kind} {value}");
        }
        for kind in [0, 4, u32::MAX] {
            let mut frame = [0; TO_GUEST_BYTES];
            put(&mut frame, 0, &u32::to_le_bytes(kind));
            assert_eq!(ToGuest::parse(&frame), None, "{kind}");
        }
    }

    #[test]
    fn a_supervisor_never_sees_a_process_of_the_guests() {
        let notification = Notification::new([0xff; Notification::BYTES]);
        assert_eq!(notification.id(), u64::MAX);
        assert_eq!(notification.bytes()[8..16], [0; 8]);
        assert_eq!(notification.bytes()[16..], [0xff; 64]);
    }

    #[test]
    fn responses_are_those_that_the_kernel_takes() {
        for good in [
            response(1, 5, 0, 0),
            response(1, 0, -1, 0),
            response(1, 0, 0, CONTINUE),
        ] {
            assert!(Response::parse(good).is_some(), "{good:?}");
        }
        for bad in [
            response(1, 0, 0, 2),
            response(1, 1, 0, CONTINUE),
            response(1, 0, -1, CONTINUE),
        ] {
            assert!(Response::parse(bad).is_none(), "{bad:?}");
        }
    }
}
