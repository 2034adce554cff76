//! The filesystem of a volume: made once, never over anything (PROTOCOL.md §2.9, Blank).
//!
//! ```text
//! status.filesystem   on the device                         done
//! unset               the wanted filesystem                 mounted; noted as Formatted
//! unset               another signature                     refused
//! unset               none, and some block was written      refused
//! unset               none, and no block was ever written   Formatting -> mkfs -> flush -> Formatted
//! Formatting          none, or the filesystem begun         mkfs -> flush -> Formatted
//! Formatting          another signature                     refused: no mkfs of ours left that
//! Formatted           the wanted filesystem                 mounted
//! Formatted           anything else, nothing included       refused, never formatted
//! ```
//! `Formatting` is noted before mkfs and `Formatted` before the first mount, both only over what was read and only while
//! the committed map lists the session that notes it. A session that is out never comes back and a volume with a
//! filesystem has one session at a time, so nobody wrote between the storage servers' word that nothing was written and
//! the note; and whoever hands the device out otherwise takes the note away first. So whatever lies under `Formatting`
//! comes from a mkfs that was cut short.

use super::{Node, NodeError, Open, blocking};
use crate::opener::flush;
use lamina_crds::id::Id;
use lamina_crds::volume::{Filesystem as Noted, FilesystemState};
use lamina_csi_api::capability::Filesystem;
use lamina_csi_api::name::VolumeHandle;
use std::path::{Path, PathBuf};

impl Node {
    /// Make sure that the device has the filesystem, and that it may be mounted.
    pub(super) async fn ensure_filesystem(
        &self,
        volume: VolumeHandle,
        session: u128,
        wanted: Filesystem,
        open: &Open,
        device: &Path,
    ) -> Result<(), NodeError> {
        let noted = self.parts.objects.find(volume).await?.ok_or(NodeError::NoVolume)?.filesystem;
        let found = self.signature(device).await?;
        let formatting = noted.as_ref().is_some_and(|noted| noted.state == FilesystemState::Formatting);
        let read_only = open.driver.read_only();
        let is_there = found.as_deref() == Some(wanted.as_str());
        match &noted {
            Some(noted) if !formatting => {
                if noted.kind != wanted.as_str() {
                    return Err(other(&noted.kind, wanted));
                }
                match found {
                    Some(_) if is_there => {}
                    Some(found) => return Err(other(&found, wanted)),
                    None => return Err(NodeError::SignatureLost),
                }
            }
            _ if read_only && is_there && !formatting => {}
            _ if read_only => return Err(NodeError::NothingToRead),
            None if is_there => self.note(volume, None, wanted, session, FilesystemState::Formatted).await?,
            _ => self.format(volume, session, wanted, open, device, noted.as_ref(), found).await?,
        }
        if read_only {
            return Ok(());
        }
        let (host, device) = (self.host(), device.to_owned());
        blocking(move || host.check(&device, wanted)).await
    }

    #[allow(clippy::too_many_arguments)]
    async fn format(
        &self,
        volume: VolumeHandle,
        session: u128,
        wanted: Filesystem,
        open: &Open,
        device: &Path,
        noted: Option<&Noted>,
        found: Option<String>,
    ) -> Result<(), NodeError> {
        if noted.is_none() {
            if let Some(found) = found {
                return Err(other(&found, wanted));
            }
            self.must_be_blank(open).await?;
        } else if let Some(found) = found.filter(|found| {
            let begun = noted.is_some_and(|noted| noted.kind == *found);
            !begun && found != wanted.as_str()
        }) {
            return Err(other(&found, wanted));
        }
        self.note(volume, noted, wanted, session, FilesystemState::Formatting).await?;
        tracing::info!(%volume, filesystem = %wanted, "making the filesystem");
        let (host, path): (_, PathBuf) = (self.host(), device.to_owned());
        blocking(move || host.format(&path, wanted)).await?;
        flush(&*open.driver).await?;
        let begun = entry(wanted, session, FilesystemState::Formatting);
        self.note(volume, Some(&begun), wanted, session, FilesystemState::Formatted).await
    }

    /// Every group must say that no block was ever written; without an answer nothing is known.
    async fn must_be_blank(&self, open: &Open) -> Result<(), NodeError> {
        let asked = tokio::time::timeout(self.parts.patience.serving, open.driver.written()).await;
        match asked.map_err(|_| NodeError::NotServing)?.map_err(NodeError::Unknown)? {
            None => Ok(()),
            Some(address) => Err(NodeError::NotBlank { address }),
        }
    }

    async fn note(
        &self,
        volume: VolumeHandle,
        was: Option<&Noted>,
        wanted: Filesystem,
        session: u128,
        state: FilesystemState,
    ) -> Result<(), NodeError> {
        let now = entry(wanted, session, state);
        Ok(self.parts.objects.note_filesystem(volume, was, Some(&now)).await?)
    }

    /// A volume that is used as a raw device is no longer one that only a cut-off mkfs has written.
    pub(super) async fn forget_formatting(&self, volume: VolumeHandle) -> Result<(), NodeError> {
        let noted = self.parts.objects.find(volume).await?.ok_or(NodeError::NoVolume)?.filesystem;
        match noted {
            Some(noted) if noted.state == FilesystemState::Formatting => {
                Ok(self.parts.objects.note_filesystem(volume, Some(&noted), None).await?)
            }
            _ => Ok(()),
        }
    }

    async fn signature(&self, device: &Path) -> Result<Option<String>, NodeError> {
        let (host, device) = (self.host(), device.to_owned());
        blocking(move || host.signature(&device)).await
    }
}

fn entry(wanted: Filesystem, session: u128, state: FilesystemState) -> Noted {
    Noted { kind: wanted.as_str().to_owned(), state, session: Some(Id::of(session)) }
}

fn other(found: &str, wanted: Filesystem) -> NodeError {
    NodeError::OtherFilesystem { found: found.to_owned(), wanted: wanted.as_str() }
}
