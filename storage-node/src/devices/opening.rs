//! Looking at devices, formatting and opening them: blocking work, on threads of its own.

use super::DeviceState;
use crate::args::DeviceSpec;
use crate::store::{self, DeviceError, FormatOptions, Found, Identity, OpenOptions, Recovered};
use lamina_protocol::ids::{ClusterId, DeviceId, ServerId};
use lamina_protocol::storage_server::medium::Opened;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A killed process's ring lets go of a device some moments after the process is gone. So long a device that is busy is
/// tried again before that is said: a server that is restarted at once serves at once.
const LETS_GO: Duration = Duration::from_secs(2);
/// Between two tries meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

/// Why a device is not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// How it is shown.
    pub(crate) state: DeviceState,
    /// In plain words.
    pub(crate) reason: String,
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let state = match &error {
            DeviceError::Io { source, .. } if source.kind() == ErrorKind::NotFound => DeviceState::Missing,
            DeviceError::Busy | DeviceError::Io { .. } => DeviceState::Failed,
            _ => DeviceState::Refused,
        };
        let reason = match state {
            DeviceState::Missing => "there is nothing at this path".into(),
            _ => error.to_string(),
        };
        Self { state, reason }
    }
}

/// A new id. It is never the one that names nothing.
pub(crate) fn id() -> u128 {
    std::iter::repeat_with(rand::random::<u128>).find(|id| *id != 0).expect("the iterator does not end")
}

/// The server whose devices these are; minted if all could be looked at and none is of this cluster.
pub(super) fn find_identity(paths: &[PathBuf], cluster: ClusterId) -> Result<ServerId, String> {
    let mut unseen = None;
    for path in paths {
        match once_let_go(|| store::probe(path)) {
            Ok(Found::Ours { cluster: found, server, .. }) if found == cluster => return Ok(server),
            Ok(_) => {}
            Err(error @ (DeviceError::Busy | DeviceError::Io { .. })) => {
                let failure = Failure::from(error);
                if failure.state != DeviceState::Missing {
                    unseen = Some(failure.reason);
                }
            }
            Err(_) => {}
        }
    }
    unseen.map_or_else(|| Ok(ServerId(id())), Err)
}

/// Formats what is blank and opens it.
pub(super) fn open(spec: &DeviceSpec, options: &OpenOptions) -> Result<(Box<Recovered>, Opened), Failure> {
    let (recovered, opened) = once_let_go(|| {
        prepare(spec, options.identity)?;
        store::open(&spec.path, options)
    })?;
    Ok((Box::new(recovered), opened))
}

/// Tries again while the device is busy, for [`LETS_GO`].
fn once_let_go<T>(attempt: impl Fn() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
    let began = Instant::now();
    loop {
        match attempt() {
            Err(DeviceError::Busy) if began.elapsed() < LETS_GO => {
                // sleep: nothing says when a lock is let go; bounded, on a thread of its own.
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

fn prepare(spec: &DeviceSpec, identity: Identity) -> Result<(), DeviceError> {
    let format = |overwrite, create_bytes| {
        let device = DeviceId(id());
        let options = FormatOptions { identity, device, overwrite, create_bytes, journal_bytes: None };
        tracing::info!(device = %spec.path.display(), id = %device, overwrite, "formatting a device");
        store::format(&spec.path, &options)
    };
    let found = match store::probe(&spec.path) {
        Err(DeviceError::Io { source, .. }) if source.kind() == ErrorKind::NotFound && spec.size.is_some() => {
            return format(false, spec.size);
        }
        found => found?,
    };
    match found {
        Found::Blank => format(false, None),
        // A device of this cluster is never overwritten: it may hold what is missing elsewhere.
        Found::Ours { cluster, .. } if cluster == identity.cluster => Ok(()),
        Found::OtherVersion { .. } | Found::Ours { .. } | Found::Foreign(_) if spec.format => format(true, None),
        // Opening says what is wrong with it.
        Found::OtherVersion { .. } | Found::Ours { .. } | Found::Foreign(_) => Ok(()),
    }
}

/// Extends a file that is smaller than listed. Only once it is open: one that lost its end is refused, for what was there
/// would read as never written.
pub(super) fn grow(spec: &DeviceSpec) -> Result<(), DeviceError> {
    let Some(wanted) = spec.size else { return Ok(()) };
    let is_smaller = std::fs::metadata(&spec.path).is_ok_and(|file| file.is_file() && file.len() < wanted);
    if is_smaller { store::grow_file(&spec.path, wanted) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_protocol::ids::BootId;
    use rustix::fs::FlockOperation;

    /// Opens a new device that another process holds for so long.
    fn opened_while_held(held: Duration) -> Result<(Box<Recovered>, Opened), Failure> {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity { cluster: ClusterId(1), server: ServerId(2) };
        let path = dir.path().join("a.img");
        let spec =
            DeviceSpec { path: path.clone(), atomic4k: None, format: false, size: Some(store::MIN_DEVICE_BYTES) };
        let options = OpenOptions { identity, boot: BootId(3), atomic4k: None };
        drop(open(&spec, &options).unwrap());
        let holder = std::fs::File::open(&path).unwrap();
        rustix::fs::flock(&holder, FlockOperation::NonBlockingLockExclusive).unwrap();
        let letting_go = std::thread::spawn(move || {
            // sleep: what is tested is a device that is held for a while.
            std::thread::sleep(held);
            drop(holder);
        });
        let result = open(&spec, &options);
        letting_go.join().unwrap();
        result
    }

    #[test]
    fn a_device_that_a_killed_process_still_holds_is_waited_for() {
        assert!(opened_while_held(Duration::from_millis(300)).is_ok());
    }

    #[test]
    fn a_device_that_stays_busy_is_said_to_be() {
        let failure = opened_while_held(LETS_GO + Duration::from_secs(2)).map(drop).unwrap_err();
        assert_eq!(failure.state, DeviceState::Failed);
        assert!(failure.reason.contains("busy"), "{}", failure.reason);
    }
}
