//! Questions about a volume, and its growth.

use super::{Entry, Node, NodeError, blocking};
use crate::host::Usage;
use lamina_client::runtime::Status;
use lamina_csi_api::name::VolumeHandle;
use std::path::Path;

/// How a volume is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Something is wrong.
    pub abnormal: bool,
    /// What.
    pub message: String,
}

impl Health {
    fn of(entry: &Entry) -> Self {
        let status = entry.open.as_ref().map(|open| *open.driver.status().borrow());
        let bad = |message: &str| Self { abnormal: true, message: message.to_owned() };
        match status {
            None => bad("nobody serves the volume here: its device was lost"),
            Some(Status { ended: true, .. }) => bad("the session has ended: every request fails"),
            Some(Status { serving: false, generation, .. }) => Self {
                abnormal: true,
                message: format!("requests wait: storage servers do not serve the map of generation {generation} yet"),
            },
            Some(Status { generation, .. }) => {
                Self { abnormal: false, message: format!("served under generation {generation}") }
            }
        }
    }
}

impl Node {
    /// How full and how healthy a volume is, seen at one of its paths.
    ///
    /// # Errors
    /// [`NodeError::NotHere`], [`NodeError::NotThere`], [`NodeError::Host`].
    pub async fn stats(&self, volume: VolumeHandle, path: &Path) -> Result<(Usage, bool, Health), NodeError> {
        let entry = self.at(volume, path)?;
        let health = Health::of(&entry);
        let is_filesystem = entry.record.kind.filesystem().is_some();
        let size = entry.open.as_ref().map_or(0, |open| open.driver.size());
        let whole = Usage { bytes: size, bytes_used: size, ..Usage::default() };
        // A filesystem whose volume waits would make the question wait too.
        if !is_filesystem || health.abnormal {
            return Ok((whole, is_filesystem, health));
        }
        if !self.mounted(path).await? {
            return Err(NodeError::NotThere);
        }
        let (host, path) = (self.host(), path.to_owned());
        let usage = blocking(move || host.usage(&path)).await?;
        Ok((usage, is_filesystem, health))
    }

    /// Grow device and filesystem to what the volume has by now, at least `required` bytes; its size.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn expand(&self, volume: VolumeHandle, path: &Path, required: u64) -> Result<u64, NodeError> {
        let entry = self.at(volume, path)?;
        let open = entry.open.ok_or(NodeError::NotServing)?;
        let device = open.device.ok_or(NodeError::NotServing)?;
        let mut status = open.driver.status();
        let grown = status.wait_for(|status| status.size >= required);
        match tokio::time::timeout(self.parts.patience.growth, grown).await {
            Ok(Ok(_)) => {}
            _ => return Err(NodeError::NotGrown),
        }
        let on = device.path().to_owned();
        let size = blocking(move || device.grow()).await?;
        if let (Some(filesystem), Some(mounted), false) =
            (entry.record.kind.filesystem(), entry.record.staged, open.driver.read_only())
        {
            let host = self.host();
            blocking(move || host.grow(&on, &mounted, filesystem)).await?;
        }
        Ok(size)
    }

    /// The volume, if it is at this path.
    fn at(&self, volume: VolumeHandle, path: &Path) -> Result<Entry, NodeError> {
        let entry = self.entry(volume).ok_or(NodeError::NotHere)?;
        let here = entry.record.staged.as_deref() == Some(path) || entry.record.target(path).is_some();
        if here { Ok(entry) } else { Err(NodeError::NotThere) }
    }
}
