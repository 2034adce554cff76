//! What the node service asks of the machine: devices, mounts and the filesystems' own programs.
//!
//! A trait, so that the service's decisions are tested without root; [`linux::LinuxHost`] is the machine. Everything
//! here blocks, on a stalled volume for as long as it is stalled, so it is called on blocking threads only.

use crate::device::mounts::Mount;
use crate::device::{Device, DeviceError, DeviceSpec};
use lamina_csi_api::capability::Filesystem;
use std::io;
use std::path::{Path, PathBuf};

pub mod linux;
mod programs;

/// Why the machine did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel refused. The caller reports it and is asked again.
    #[error("cannot {step} {}: {source}", path.display())]
    System {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The image or node lacks a program.
    #[error("program {program} is not there")]
    Missing {
        /// Its name.
        program: &'static str,
    },
    /// A program failed; what it said is for people.
    #[error("{program} failed ({status}): {said}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        said: String,
    },
    /// The filesystem needs a person's decision: nothing was changed.
    #[error("filesystem needs repair by hand, {program} will not do it alone: {said}")]
    NeedsRepair {
        /// Its name.
        program: &'static str,
        /// The end of what it printed.
        said: String,
    },
}

impl HostError {
    pub(crate) fn at<E: Into<io::Error>>(step: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::System { step, path, source: source.into() }
    }
}

/// What a mounted filesystem holds. Bytes and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes for whoever is not root.
    pub bytes_free: u64,
    /// Bytes in use.
    pub bytes_used: u64,
    /// Files that there can be.
    pub files: u64,
    /// Files that can still be made.
    pub files_free: u64,
}

/// The machine.
pub trait Host: Send + Sync {
    /// Make a block device.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn attach(&self, spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError>;
    /// Volumes whose device is held for a successor.
    ///
    /// # Errors
    /// [`DeviceError::Holder`] while the holder cannot be reached.
    fn held(&self) -> Result<Vec<String>, DeviceError>;
    /// Serve a held device. When it returns, what the process before left unanswered has been asked again.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn resume(&self, spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError>;
    /// Remove what is left of a device that nobody serves.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn clear(&self, volume: &str, directory: &Path) -> Result<(), DeviceError>;
    /// What is mounted at a path.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn mount_at(&self, path: &Path) -> Result<Option<Mount>, HostError>;
    /// Mount a filesystem; `path` is made if missing.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn mount(
        &self,
        device: &Path,
        path: &Path,
        filesystem: Filesystem,
        flags: &[String],
        read_only: bool,
    ) -> Result<(), HostError>;
    /// Show a directory or a device at another path, which is made if missing.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn bind(&self, source: &Path, target: &Path, read_only: bool) -> Result<(), HostError>;
    /// Unmount everything at a path; fine if there is nothing. `lazily`: also what is in use or does not answer.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn unmount(&self, path: &Path, lazily: bool) -> Result<(), HostError>;
    /// Remove a path on which nothing is mounted: a file, or an empty directory. Fine if there is nothing.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn remove(&self, path: &Path) -> Result<(), HostError>;
    /// What is on a device, as blkid says it, such as `ext4`; `None` = no signature of anything.
    ///
    /// # Errors
    /// [`HostError`].
    fn signature(&self, device: &Path) -> Result<Option<String>, HostError>;
    /// Make a filesystem, whatever is there.
    ///
    /// # Errors
    /// [`HostError`].
    fn format(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError>;
    /// Before mounting for writing: recover, and grow what grows only unmounted.
    ///
    /// # Errors
    /// [`HostError`], [`HostError::NeedsRepair`] above all.
    fn check(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError>;
    /// Grow a mounted filesystem to its device.
    ///
    /// # Errors
    /// [`HostError`].
    fn grow(&self, device: &Path, mounted: &Path, filesystem: Filesystem) -> Result<(), HostError>;
    /// How full a mounted filesystem is.
    ///
    /// # Errors
    /// [`HostError::System`].
    fn usage(&self, path: &Path) -> Result<Usage, HostError>;
}
