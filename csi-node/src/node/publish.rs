//! Publishing: the staged filesystem or device, shown at a consumer's own path.

use super::{Node, NodeError, StageWish, blocking};
use crate::record::{Kind, Target};
use lamina_csi_api::name::VolumeHandle;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a NodePublishVolume asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishWish {
    /// Where it is staged and how, to stage it again if that is gone.
    pub staged: StageWish,
    /// Where to show it.
    pub target: PathBuf,
    /// The consumer may only read.
    pub read_only: bool,
    /// No other consumer may have it at the same time.
    pub alone: bool,
}

impl Node {
    /// Publish a staged volume. Done already: nothing happens.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn publish(self: &Arc<Self>, wish: &PublishWish) -> Result<(), NodeError> {
        let volume = wish.staged.volume;
        let known = self.entry(volume).ok_or(NodeError::NotHere)?;
        if known.record.kind != wish.staged.kind {
            return Err(NodeError::OtherUse);
        }
        let elsewhere = known.record.targets.iter().any(|target| target.path != wish.target);
        if wish.alone && elsewhere && known.open.is_some() {
            return Err(NodeError::SecondTarget);
        }
        if known.record.staged.as_ref().is_some_and(|path| *path != wish.staged.path) {
            return Err(NodeError::NotStaged);
        }
        // What the kubelet believes staged may be gone: a reboot, a lost device. Staged already: nothing happens.
        self.stage(&wish.staged).await?;
        let mut entry = self.entry(volume).ok_or(NodeError::NotHere)?;
        let open = entry.open.clone().ok_or(NodeError::NotHere)?;
        let device = open.device.as_ref().ok_or(NodeError::NotHere)?.path().to_owned();
        let read_only = wish.read_only || open.driver.read_only();
        let raw = wish.staged.kind == Kind::Block;
        // The kernel has one device for all consumers of a raw volume: it takes writes or it does not.
        let differs = raw && entry.record.targets.iter().any(|target| target.read_only != read_only);
        match entry.record.target(&wish.target) {
            Some(target) if target.read_only != read_only => return Err(NodeError::OtherUse),
            Some(_) if self.mounted(&wish.target).await? => return Ok(()),
            Some(_) => {}
            None if differs => return Err(NodeError::MixedUse),
            None => {
                entry.record.targets.push(Target { path: wish.target.clone(), read_only });
                self.keep(volume, entry.clone()).await?;
            }
        }
        if raw && !open.driver.read_only() {
            let device = open.device.clone().ok_or(NodeError::NotHere)?;
            blocking(move || device.set_read_only(read_only)).await?;
        }
        let source = if raw { device } else { wish.staged.path.clone() };
        let (host, target) = (self.host(), wish.target.clone());
        blocking(move || host.bind(&source, &target, read_only)).await
    }

    /// Undo publishing. Never published: nothing happens, and what others mounted there stays.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn unpublish(&self, volume: VolumeHandle, path: &Path) -> Result<(), NodeError> {
        let entry = self.entry(volume).filter(|entry| entry.record.target(path).is_some());
        let (host, target, known) = (self.host(), path.to_owned(), entry.is_some());
        let ended = entry.as_ref().and_then(|entry| entry.open.as_ref()).is_none_or(|open| {
            let status = open.driver.status();
            let status = status.borrow();
            status.ended
        });
        blocking(move || {
            if known {
                host.unmount(&target, ended)?;
                return host.remove(&target);
            }
            // Not ours. An empty place that the kubelet made may go, nothing else.
            match host.mount_at(&target)? {
                Some(_) => Ok(()),
                None => host.remove(&target).or(Ok(())),
            }
        })
        .await?;
        if let Some(mut entry) = entry {
            entry.record.targets.retain(|target| target.path != path);
            self.keep(volume, entry).await?;
        }
        Ok(())
    }
}
