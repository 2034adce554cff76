//! Staging: the device, and its filesystem mounted once for all consumers on the node.

use super::{Entry, Node, NodeError, blocking};
use crate::record::Kind;
use lamina_csi_api::name::VolumeHandle;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a NodeStageVolume asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageWish {
    /// Which volume.
    pub volume: VolumeHandle,
    /// Under which session.
    pub session: u128,
    /// The generation of a map that admits it.
    pub generation: u64,
    /// Where.
    pub path: PathBuf,
    /// As what.
    pub kind: Kind,
    /// For mount(2); never logged.
    pub flags: Vec<String>,
}

impl Node {
    /// Stage a volume. Done already: nothing happens. Begun: it goes on from there.
    ///
    /// # Errors
    /// [`NodeError`].
    pub async fn stage(self: &Arc<Self>, wish: &StageWish) -> Result<(), NodeError> {
        let mut entry = self.attached(wish).await?;
        let open = entry.open.clone().ok_or(NodeError::NotHere)?;
        let device = open.device.as_ref().ok_or(NodeError::NotHere)?.path().to_owned();
        if entry.record.kind != wish.kind || entry.record.staged.as_ref().is_some_and(|path| *path != wish.path) {
            return Err(NodeError::OtherUse);
        }
        match wish.kind.filesystem() {
            None => self.forget_formatting(wish.volume).await?,
            Some(_) if self.shows(&wish.path, &device).await? => {}
            Some(filesystem) => {
                self.ensure_filesystem(wish.volume, entry.record.session(), filesystem, &open, &device).await?;
                // Noted before it is mounted, so that a successor unmounts it.
                entry.record.staged = Some(wish.path.clone());
                self.keep(wish.volume, entry.clone()).await?;
                let (host, path, flags) = (self.host(), wish.path.clone(), wish.flags.clone());
                let read_only = open.driver.read_only();
                let on = device.clone();
                blocking(move || host.mount(&on, &path, filesystem, &flags, read_only)).await?;
                self.grow_mounted(&wish.path, &device, wish.kind, read_only).await;
            }
        }
        if entry.record.staged.is_none() {
            entry.record.staged = Some(wish.path.clone());
            self.keep(wish.volume, entry).await?;
        }
        Ok(())
    }

    /// A device of the wish's session. What is left of an earlier session is cut off: the kubelet asks for a new one
    /// only when the attachment before is over.
    async fn attached(self: &Arc<Self>, wish: &StageWish) -> Result<Entry, NodeError> {
        if let Some(entry) = self.entry(wish.volume) {
            let ended = entry.open.as_ref().is_some_and(|open| open.driver.status().borrow().ended);
            let same = entry.record.is_of(wish.session);
            match (&entry.open, same) {
                // Consumers are told by their I/O errors; another session comes when they are gone.
                (Some(_), true) if ended && !entry.record.targets.is_empty() => return Err(NodeError::Ended),
                (Some(_), true) if !ended => return Ok(entry),
                (Some(_), _) => self.abandon(wish.volume, entry).await?,
                (None, _) => self.unmount_all(&entry, true).await?,
            }
        }
        self.attach(wish.volume, wish.session, wish.generation, wish.kind).await
    }

    /// Give up a volume whose session is over, whoever still uses it.
    async fn abandon(&self, volume: VolumeHandle, mut entry: Entry) -> Result<(), NodeError> {
        tracing::warn!(%volume, "an earlier session was never taken away: its users get I/O errors");
        if let Some(device) = entry.open.as_ref().and_then(|open| open.device.clone()) {
            blocking(move || device.force_detach()).await?;
        }
        self.unmount_all(&entry, true).await?;
        entry.open = None;
        self.lock().insert(volume, entry);
        Ok(())
    }

    /// Undo staging. Never staged: nothing happens.
    ///
    /// # Errors
    /// [`NodeError`]; the same call again goes on from there.
    pub async fn unstage(&self, volume: VolumeHandle) -> Result<(), NodeError> {
        let Some(mut entry) = self.entry(volume) else { return Ok(()) };
        for target in entry.record.targets.clone() {
            if self.mounted(&target.path).await? {
                return Err(NodeError::StillPublished);
            }
        }
        entry.record.targets.clear();
        let lazily = entry.open.as_ref().is_none_or(|open| open.driver.status().borrow().ended);
        if let Some(path) = entry.record.staged.clone().filter(|_| entry.record.kind != Kind::Block) {
            let host = self.host();
            blocking(move || host.unmount(&path, lazily)).await?;
        }
        entry.record.staged = None;
        self.keep(volume, entry.clone()).await?;
        self.detach(volume, entry).await
    }

    /// Unmount what the record lists.
    pub(super) async fn unmount_all(&self, entry: &Entry, lazily: bool) -> Result<(), NodeError> {
        let staged = entry.record.staged.iter().filter(|_| entry.record.kind != Kind::Block);
        let paths: Vec<PathBuf> =
            entry.record.targets.iter().map(|target| &target.path).chain(staged).cloned().collect();
        let host = self.host();
        blocking(move || paths.iter().try_for_each(|path| host.unmount(path, lazily))).await
    }

    pub(super) async fn mounted(&self, path: &Path) -> Result<bool, NodeError> {
        let (host, path) = (self.host(), path.to_owned());
        Ok(blocking(move || host.mount_at(&path)).await?.is_some())
    }

    /// Whether the device's filesystem is mounted there.
    pub(super) async fn shows(&self, path: &Path, device: &Path) -> Result<bool, NodeError> {
        let (host, path, device) = (self.host(), path.to_owned(), device.to_owned());
        let mount = blocking(move || host.mount_at(&path)).await?;
        match mount {
            None => Ok(false),
            Some(mount) if Path::new(&mount.source) == device => Ok(true),
            // Somebody else's: it is not touched.
            Some(_) => Err(NodeError::OtherUse),
        }
    }

    /// xfs grows only when it is mounted. One that does not grow now is usable all the same.
    async fn grow_mounted(&self, path: &Path, device: &Path, kind: Kind, read_only: bool) {
        if kind != Kind::Xfs || read_only {
            return;
        }
        let (host, path, device) = (self.host(), path.to_owned(), device.to_owned());
        let grown = blocking(move || host.grow(&device, &path, lamina_csi_api::capability::Filesystem::Xfs)).await;
        if let Err(error) = grown {
            tracing::warn!(%error, "the filesystem does not grow to its device");
        }
    }
}
