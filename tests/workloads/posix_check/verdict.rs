//! What a check says: nothing, or what was expected and what came instead.
//!
//! A plain `?` on a system call says "this must succeed" and names the line of the check if it does not; `fails` and
//! `equal` are for everything whose outcome is the point of the check.

use std::fmt::{Debug, Display};
use std::panic::Location;

use rustix::io::Errno;

/// The outcome of a check.
pub(crate) type Verdict = Result<(), Fail>;

/// Why a check failed, in one line.
#[derive(Debug)]
pub(crate) struct Fail(pub(crate) String);

impl From<Errno> for Fail {
    #[track_caller]
    fn from(errno: Errno) -> Self {
        let at = Location::caller();
        Self(format!(
            "{}:{}: expected success got {}",
            at.file(),
            at.line(),
            name(errno)
        ))
    }
}

impl From<std::io::Error> for Fail {
    #[track_caller]
    fn from(error: std::io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(errno) => Self::from(errno),
            None => Self(format!("{}: {error}", Location::caller())),
        }
    }
}

/// The call must succeed; what it gives is dropped.
#[track_caller]
pub(crate) fn succeeds<T>(got: Result<T, Errno>) -> Verdict {
    match got {
        Ok(_) => Ok(()),
        Err(errno) => Err(Fail::from(errno)),
    }
}

/// The call must fail with `expected`.
pub(crate) fn fails<T>(what: &str, got: Result<T, Errno>, expected: Errno) -> Verdict {
    fails_with_one_of(what, got, &[expected])
}

/// The call must fail with one of these: where POSIX or Linux leave a choice.
pub(crate) fn fails_with_one_of<T>(
    what: &str,
    got: Result<T, Errno>,
    expected: &[Errno],
) -> Verdict {
    let names = || {
        expected
            .iter()
            .map(|errno| name(*errno))
            .collect::<Vec<_>>()
            .join(" or ")
    };
    match got {
        Ok(_) => Err(Fail(format!("{what}: expected {} got success", names()))),
        Err(errno) if expected.contains(&errno) => Ok(()),
        Err(errno) => Err(Fail(format!(
            "{what}: expected {} got {}",
            names(),
            name(errno)
        ))),
    }
}

/// The value must be `expected`.
pub(crate) fn equal<T: PartialEq + Debug>(what: impl Display, got: T, expected: T) -> Verdict {
    if got == expected {
        Ok(())
    } else {
        Err(Fail(format!("{what}: expected {expected:?} got {got:?}")))
    }
}

/// The file mode must be `expected`: `equal` in octal.
pub(crate) fn equal_bits(what: &str, got: u32, expected: u32) -> Verdict {
    if got == expected {
        Ok(())
    } else {
        Err(Fail(format!("{what}: expected {expected:#o} got {got:#o}")))
    }
}

/// The sentence must be true.
pub(crate) fn holds(what: &str, truth: bool) -> Verdict {
    equal(what, truth, true)
}

/// The symbolic name of an error.
pub(crate) fn name(errno: Errno) -> String {
    NAMES.iter().find(|(known, _)| *known == errno).map_or_else(
        || format!("error {} ({errno})", errno.raw_os_error()),
        |(_, name)| (*name).to_owned(),
    )
}

/// The errors that file systems give.
const NAMES: &[(Errno, &str)] = &[
    (Errno::ACCESS, "EACCES"),
    (Errno::ADDRINUSE, "EADDRINUSE"),
    (Errno::AGAIN, "EAGAIN"),
    (Errno::BADF, "EBADF"),
    (Errno::BUSY, "EBUSY"),
    (Errno::CONNREFUSED, "ECONNREFUSED"),
    (Errno::DEADLK, "EDEADLK"),
    (Errno::EXIST, "EEXIST"),
    (Errno::FAULT, "EFAULT"),
    (Errno::FBIG, "EFBIG"),
    (Errno::INTR, "EINTR"),
    (Errno::INVAL, "EINVAL"),
    (Errno::IO, "EIO"),
    (Errno::ISDIR, "EISDIR"),
    (Errno::LOOP, "ELOOP"),
    (Errno::MFILE, "EMFILE"),
    (Errno::MLINK, "EMLINK"),
    (Errno::NAMETOOLONG, "ENAMETOOLONG"),
    (Errno::NFILE, "ENFILE"),
    (Errno::NODATA, "ENODATA"),
    (Errno::NODEV, "ENODEV"),
    (Errno::NOENT, "ENOENT"),
    (Errno::NOEXEC, "ENOEXEC"),
    (Errno::NOLCK, "ENOLCK"),
    (Errno::NOMEM, "ENOMEM"),
    (Errno::NOSPC, "ENOSPC"),
    (Errno::NOSYS, "ENOSYS"),
    (Errno::NOTDIR, "ENOTDIR"),
    (Errno::NOTEMPTY, "ENOTEMPTY"),
    (Errno::NOTSUP, "EOPNOTSUPP"),
    (Errno::NXIO, "ENXIO"),
    (Errno::OVERFLOW, "EOVERFLOW"),
    (Errno::PERM, "EPERM"),
    (Errno::PIPE, "EPIPE"),
    (Errno::RANGE, "ERANGE"),
    (Errno::ROFS, "EROFS"),
    (Errno::SPIPE, "ESPIPE"),
    (Errno::STALE, "ESTALE"),
    (Errno::TOOBIG, "E2BIG"),
    (Errno::TXTBSY, "ETXTBSY"),
    (Errno::XDEV, "EXDEV"),
];
