//! Looking at devices, formatting and opening them: blocking work, on threads of its own.

use super::DeviceState;
use crate::args::DeviceSpec;
use crate::store::{self, DeviceError, FormatOptions, Found, Identity, OpenOptions, Recovered};
use lamina_protocol::ids::{ClusterId, DeviceId, ServerId};
use lamina_protocol::storage_server::medium::Opened;
use std::io::ErrorKind;
use std::path::PathBuf;

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
            // A process that was killed lets go of it in a moment.
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
        match store::probe(path) {
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
    prepare(spec, options.identity)?;
    let (recovered, opened) = store::open(&spec.path, options)?;
    Ok((Box::new(recovered), opened))
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
