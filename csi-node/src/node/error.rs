//! Why a volume is not where it was asked for, and what the caller is to make of it.

use crate::device::DeviceError;
use crate::host::HostError;
use crate::objects::ObjectError;
use crate::record::RecordError;
use crate::sessions::SessionError;
use lamina_client::runtime::OpenError;
use tonic::Status;

/// Why a call failed. What was done before stays noted, so that the same call again goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// NOT_FOUND.
    #[error("there is no such volume")]
    NoVolume,
    /// NOT_FOUND.
    #[error("the volume is not here")]
    NotHere,
    /// NOT_FOUND.
    #[error("the volume is not at that path")]
    NotThere,
    /// UNAVAILABLE: the operator will get there.
    #[error("no map of the volume lists this session yet: is the operator running?")]
    NotAdmitted,
    /// FAILED_PRECONDITION: a new attachment is needed.
    #[error("the session of this attachment has ended: delete the pod, so that the volume is attached anew")]
    Ended,
    /// UNAVAILABLE: storage servers are away, or being settled.
    #[error("the volume's storage servers do not serve it yet")]
    NotServing,
    /// UNAVAILABLE: this session's unanswered writes are lost, and another takes its place (R10).
    #[error(
        "this attachment was in use before the node or its device holder went down: its session cannot be used again \
         and is being replaced"
    )]
    SessionUsed,
    /// UNAVAILABLE, or FAILED_PRECONDITION: a new attachment is needed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// ALREADY_EXISTS.
    #[error("the volume is staged or published in another way")]
    OtherUse,
    /// FAILED_PRECONDITION.
    #[error("the volume is published at another path already and its access mode allows only one")]
    SecondTarget,
    /// FAILED_PRECONDITION.
    #[error(
        "the raw block volume is published on this node to another consumer that may write while this one may only \
         read, or the other way round: they share one device, so let both write or both only read"
    )]
    MixedUse,
    /// FAILED_PRECONDITION.
    #[error("the volume is still published here")]
    StillPublished,
    /// FAILED_PRECONDITION.
    #[error("the volume is not staged at that path")]
    NotStaged,
    /// FAILED_PRECONDITION.
    #[error("the volume holds {found}, not {wanted}")]
    OtherFilesystem {
        /// What is there.
        found: String,
        /// What was asked for.
        wanted: &'static str,
    },
    /// FAILED_PRECONDITION: the data is damaged or gone; never formatted again.
    #[error("status.filesystem says that there is a filesystem, but there is no signature of it: it is not made again")]
    SignatureLost,
    /// FAILED_PRECONDITION.
    #[error(
        "the volume was written (page at byte {address}) but shows no filesystem: it is not formatted over that. If it \
         was used as a raw block device, use it so again; if its data is to go, delete the volume and make a new one; \
         if a filesystem was here, keep it and look for what damaged it"
    )]
    NotBlank {
        /// Of a page that was written, bytes.
        address: u64,
    },
    /// INTERNAL.
    #[error("the storage servers do not say whether the volume was ever written: {0}")]
    Unknown(lamina_client::block::BlockError),
    /// FAILED_PRECONDITION.
    #[error("the volume has no filesystem and is attached read-only")]
    NothingToRead,
    /// UNAVAILABLE.
    #[error("the volume does not show its new size yet")]
    NotGrown,
    /// ABORTED: the process takes over its devices.
    #[error("the volume is being taken over from the process before")]
    BeingTakenOver,
    /// UNAVAILABLE.
    #[error("the program is shutting down")]
    ShuttingDown,
    /// INTERNAL.
    #[error("writes of the volume could not be made durable: {0}")]
    Flush(#[from] lamina_client::block::BlockError),
    /// UNAVAILABLE or NOT_FOUND.
    #[error(transparent)]
    Objects(#[from] ObjectError),
    /// INTERNAL.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// INTERNAL, ABORTED or FAILED_PRECONDITION.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// INTERNAL or FAILED_PRECONDITION.
    #[error(transparent)]
    Host(#[from] HostError),
    /// INTERNAL.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        use NodeError as E;
        let text = error.to_string();
        match error {
            E::NoVolume | E::NotHere | E::NotThere | E::Objects(ObjectError::Gone(_)) => Self::not_found(text),
            E::OtherUse => Self::already_exists(text),
            E::SessionUsed | E::NotAdmitted | E::NotServing | E::NotGrown | E::ShuttingDown | E::Objects(_) => {
                Self::unavailable(text)
            }
            E::Device(DeviceError::Holder(_)) => Self::unavailable(text),
            E::BeingTakenOver | E::Device(DeviceError::Busy) => Self::aborted(text),
            E::Session(SessionError::NotYet(_) | SessionError::NobodyLeads) => Self::unavailable(text),
            E::Session(SessionError::Refused(_))
            | E::Ended
            | E::SecondTarget
            | E::MixedUse
            | E::StillPublished
            | E::NotStaged
            | E::OtherFilesystem { .. }
            | E::SignatureLost
            | E::NotBlank { .. }
            | E::NothingToRead
            | E::Device(DeviceError::NotYet(_))
            | E::Host(HostError::NeedsRepair { .. } | HostError::Missing { .. }) => Self::failed_precondition(text),
            E::Flush(_) | E::Unknown(_) | E::Record(_) | E::Device(_) | E::Host(_) | E::Open(_) => Self::internal(text),
        }
    }
}
