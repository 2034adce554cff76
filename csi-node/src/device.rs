//! The block device that a pod sees, in front of the driver.
//!
//! A [`Device`] turns the kernel's requests into requests to a [`BlockTarget`] and outlives the process that serves it:
//! a successor resumes it and the kernel's users see latency, no error (data-path.md, Attach). Three kinds exist behind
//! the trait; `ublk` and the kernel's NBD client come later and say so.
//!
//! Everything here blocks: callers on an async runtime use a blocking thread. Nothing here decides who may serve:
//! before [`resume`] is called, all members have refused the older incarnation (protocol.md §2).

use crate::holder::{HolderClient, HolderError};
use lamina_client::block::BlockTarget;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub mod fuse_loop;
mod loop_device;
pub mod mounts;

/// How a volume becomes a block device on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceKind {
    /// The best one that works here: today always [`DeviceKind::Fuse`].
    #[default]
    Auto,
    /// A file served over `/dev/fuse`, under a loop device.
    Fuse,
    /// The kernel's NBD client.
    Nbd,
    /// The kernel's userspace block driver.
    Ublk,
}

impl std::str::FromStr for DeviceKind {
    type Err = DeviceError;

    fn from_str(word: &str) -> Result<Self, DeviceError> {
        match word {
            "auto" => Ok(Self::Auto),
            "fuse" => Ok(Self::Fuse),
            "nbd" => Ok(Self::Nbd),
            "ublk" => Ok(Self::Ublk),
            _ => Err(DeviceError::UnknownKind),
        }
    }
}

/// Why a device could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not a kind of device.
    #[error("device kind is one of auto, fuse, nbd, ublk")]
    UnknownKind,
    /// This build cannot do it; choose another kind.
    #[error("device kind {0:?} is not yet supported: use auto or fuse")]
    NotYet(DeviceKind),
    /// The handle must be usable as a file name of at most 255 bytes.
    #[error("volume handle cannot be a file name")]
    BadHandle,
    /// The kernel refused a step; what was done before was undone.
    #[error("{step}: {source}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// The kernel's word for why not.
        source: io::Error,
    },
    /// The kernel made a read-only device of what should be writable, or the other way round.
    #[error("loop device is read-only: {found}, wanted: {wanted}")]
    WrongMode {
        /// What the kernel says.
        found: bool,
        /// What was asked.
        wanted: bool,
    },
    /// Detaching: a file system is mounted from it, or a process has it open; ask again later. Attaching: something is
    /// left of an earlier device: [`resume`] or [`clear`] it.
    #[error("device is in use")]
    Busy,
    /// The kernel cannot give unanswered requests to a successor (Linux before 6.9).
    #[error("this kernel cannot hand a FUSE device to a successor")]
    CannotResume,
    /// The holder has no device of this volume, or the device died: [`clear`] it and attach anew.
    #[error("no living device of this volume is held")]
    Gone,
    /// The holder did not do its part.
    #[error(transparent)]
    Holder(#[from] HolderError),
}

impl DeviceError {
    fn at(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Step { step, source: errno.into() }
    }

    fn at_io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step { step, source }
    }
}

/// What a device is made of.
#[derive(Clone)]
pub struct DeviceSpec {
    /// The volume's handle: names the device towards the holder and the kernel. A file name of at most 255 bytes.
    pub volume: String,
    /// An empty directory of this volume's own, created if missing, where the kinds that need a mount put it. Pods do
    /// not see it.
    pub directory: PathBuf,
    /// What serves the requests. Whole blocks are all it gets.
    pub target: Arc<dyn BlockTarget>,
    /// Called once, on any thread, when the target answers `Superseded`: the kernel gets no answer, and the process is
    /// to exit (protocol R10).
    pub on_superseded: Arc<dyn Fn() + Send + Sync>,
}

/// A block device that this process serves. Dropping it serves on: a device ends by [`Device::detach`] or with its
/// process, and then its successor resumes it.
pub trait Device: Send + Sync {
    /// What this is, never [`DeviceKind::Auto`].
    fn kind(&self) -> DeviceKind;
    /// The block device's node, such as `/dev/loop7`.
    fn path(&self) -> &Path;
    /// Make the kernel see the target's size; gives it back in bytes.
    fn grow(&self) -> Result<u64, DeviceError>;
    /// Refuse every change by its users from now on, or take them again. Holds until this process ends.
    fn set_read_only(&self, read_only: bool) -> Result<(), DeviceError>;
    /// Remove the device. May be repeated after an error, [`DeviceError::Busy`] above all.
    fn detach(&self) -> Result<(), DeviceError>;
    /// Fail everything that is under way with an I/O error, which frees users that hang, and remove the device; also
    /// while the target does not answer.
    fn force_detach(&self) -> Result<(), DeviceError>;
}

/// Make a device. With a holder a successor can resume it; without one it ends with this process.
pub fn attach(
    kind: DeviceKind,
    spec: DeviceSpec,
    holder: Option<&HolderClient>,
) -> Result<Box<dyn Device>, DeviceError> {
    match kind {
        DeviceKind::Auto | DeviceKind::Fuse => Ok(Box::new(fuse_loop::FuseLoop::attach(spec, holder)?)),
        DeviceKind::Nbd | DeviceKind::Ublk => Err(DeviceError::NotYet(kind)),
    }
}

/// Serve on a device whose process has ended, or is ended by this. What the kernel has not been answered comes again;
/// some of it may have taken effect already.
pub fn resume(kind: DeviceKind, spec: DeviceSpec, holder: &HolderClient) -> Result<Box<dyn Device>, DeviceError> {
    match kind {
        DeviceKind::Auto | DeviceKind::Fuse => Ok(Box::new(fuse_loop::FuseLoop::resume(spec, holder)?)),
        DeviceKind::Nbd | DeviceKind::Ublk => Err(DeviceError::NotYet(kind)),
    }
}

/// Remove what is left of a device that nobody serves: after a crash without a holder, or a reboot. Its users get I/O
/// errors, and a process that still serves it is ended. Does nothing where nothing is left.
pub fn clear(volume: &str, directory: &Path, holder: Option<&HolderClient>) -> Result<(), DeviceError> {
    fuse_loop::clear(volume, directory)?;
    if let Some(holder) = holder
        && holder.take(volume)?.is_some()
    {
        holder.release(volume)?;
    }
    Ok(())
}

/// Let this thread allocate memory while the kernel waits for it to write memory back: every thread between a device
/// and the network calls this once. Needs CAP_SYS_RESOURCE; without it a node short of memory can lock up on its own
/// volumes.
pub fn serve_memory_pressure() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!(%error, "no CAP_SYS_RESOURCE: a thread that serves a device cannot be marked as such");
    }
}
