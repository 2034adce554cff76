//! From a session to a block device, and back.
//!
//! A session is opened `Fresh` once. After that it is resumed: with a device that the holder kept, or, where the record
//! proves that no request of the kernel is unanswered, with nothing to give back. Where neither is so, or the session has
//! ended, writes that the kernel was never answered may lie on some copies only: the leader replaces the session, and the
//! attachment goes on with the new one (PROTOCOL.md R10). The VolumeAttachment still names the session that it was
//! published with; object and record say which is in its place now.

use super::{Entry, Node, NodeError, Open, blocking};
use crate::device::{Device, DeviceSpec};
use crate::objects::Followed;
use crate::opener::{OpenVolume, Wish, flush};
use crate::record::{Kind, Record, Standing};
use lamina_client::block::BlockTarget;
use lamina_client::runtime::Status;
use lamina_control_api::leader::Replaced;
use lamina_csi_api::name::VolumeHandle;
use lamina_protocol::ids::{SessionId, VolumeId};
use lamina_protocol::map::VolumeMap;
use lamina_protocol::wire::Start;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::watch;

/// Under which session a volume is to be opened.
#[derive(Clone, Copy)]
struct Claim {
    session: u128,
    /// The one that the attachment was made with.
    published: u128,
    kind: Kind,
    /// Nothing was opened under it before, as far as can be known without a record of it.
    unused: bool,
}

/// A driver that serves, without a device yet.
struct Opened {
    record: Record,
    leash: Arc<Leash>,
    driver: Arc<dyn OpenVolume>,
}

impl Node {
    /// Serve the volume as a device under the session of the attachment that was published with this one; the entry that
    /// stands then.
    pub(super) async fn attach(
        self: &Arc<Self>,
        volume: VolumeHandle,
        published: u128,
        generation: u64,
        kind: Kind,
    ) -> Result<Entry, NodeError> {
        let seen = self.parts.objects.find(volume).await?.ok_or(NodeError::NoVolume)?;
        let followed = self.parts.objects.follow(volume);
        let attachment = seen.attachment(published);
        // Without a wish of that name the map decides.
        let session = attachment.map_or(published, |attachment| attachment.session);
        let known = self.entry(volume).map(|entry| entry.record.session());
        // Minted because this node asked, and noted here before anything is opened under it: so nothing was.
        let unused = attachment.is_some_and(|a| known.is_some_and(|known| a.replaced.contains(&known)));
        let claim = Claim { session, published, kind, unused: unused || session == published };
        let opened = match self.open_session(volume, claim, generation, &followed).await {
            Err(why @ (NodeError::SessionUsed | NodeError::Ended)) => {
                tracing::info!(%volume, session = %SessionId(session), %why, "asks the leader for another session");
                let Replaced { session, generation } = self.parts.sessions.replace(volume, session).await?;
                let claim = Claim { session: session.0, published, kind, unused: true };
                self.open_session(volume, claim, generation.0, &followed).await?
            }
            opened => opened?,
        };
        self.attach_device(volume, opened, followed).await
    }

    /// A driver that serves under this session, noted before it is opened.
    async fn open_session(
        &self,
        volume: VolumeHandle,
        claim: Claim,
        generation: u64,
        followed: &Followed,
    ) -> Result<Opened, NodeError> {
        let map = self.admitted(followed, claim.session, generation).await?;
        let start = self.start(volume, claim, &map)?;
        self.clear(volume).await?;
        let mut record = Record::opening(claim.session, claim.published, claim.kind);
        self.keep(volume, Entry { record: record.clone(), open: None }).await?;
        let opened = self.open_driver(volume, claim.session, start, followed).await;
        if matches!(opened, Err(NodeError::SessionUsed)) {
            // The note must not let a later stage resume what it did not begin.
            record.standing = Standing::Attached;
            self.keep(volume, Entry { record: record.clone(), open: None }).await?;
        }
        let (leash, driver) = opened?;
        if start == Start::Resume {
            // Nothing is unanswered: nothing comes again.
            driver.replayed();
        }
        record.standing = Standing::Attached;
        self.keep(volume, Entry { record: record.clone(), open: None }).await?;
        Ok(Opened { record, leash, driver })
    }

    async fn attach_device(
        self: &Arc<Self>,
        volume: VolumeHandle,
        opened: Opened,
        followed: Followed,
    ) -> Result<Entry, NodeError> {
        let Opened { record, leash, driver } = opened;
        let mut entry = Entry { record, open: None };
        let spec = self.spec(volume, driver.clone());
        let host = self.host();
        match blocking(move || host.attach(spec)).await {
            Ok(device) => {
                let device: Arc<dyn Device> = device.into();
                self.cut_off_when_ended(volume, driver.status(), &device);
                let open = Open { _leash: leash, driver, device: Some(device), _followed: Arc::new(followed) };
                entry.open = Some(open);
                self.lock().insert(volume, entry.clone());
                Ok(entry)
            }
            Err(error) => {
                // Everything was undone: what the kernel asked meanwhile was answered.
                if settled(&*driver).await.is_ok() {
                    entry.record.standing = Standing::Closed;
                    self.keep(volume, entry).await?;
                }
                Err(error)
            }
        }
    }

    /// Fresh for a session of which nothing was ever opened, Resume where nothing of it is unanswered.
    fn start(&self, volume: VolumeHandle, claim: Claim, map: &VolumeMap) -> Result<Start, NodeError> {
        let record = self.entry(volume).map(|entry| entry.record).filter(|record| record.session() == claim.session);
        match record.map(|record| record.standing) {
            Some(Standing::Opening | Standing::Closed) => Ok(Start::Resume),
            Some(Standing::Attached) => Err(NodeError::SessionUsed),
            None => {
                let listed = map.session(SessionId(claim.session));
                let used = !claim.unused || listed.is_some_and(|listed| listed.incarnation.0 > 0);
                if used { Err(NodeError::SessionUsed) } else { Ok(Start::Fresh) }
            }
        }
    }

    /// The map that admits the session.
    async fn admitted(&self, followed: &Followed, session: u128, generation: u64) -> Result<VolumeMap, NodeError> {
        let mut maps = followed.maps.clone();
        let reached = |map: &Option<VolumeMap>| map.as_ref().is_some_and(|map| map.generation.0 >= generation);
        let waited = tokio::time::timeout(self.parts.patience.map, maps.wait_for(reached)).await;
        let map = match waited {
            Ok(Ok(map)) => map.clone(),
            _ => None,
        };
        let map = map.ok_or(NodeError::NotAdmitted)?;
        if map.sessions.iter().any(|listed| listed.id.0 == session) { Ok(map) } else { Err(NodeError::Ended) }
    }

    /// A driver that serves. One that is to begin a session, and finds that another process has begun it, gives way: that
    /// one's writes are not known here ([`NodeError::SessionUsed`]).
    pub(super) async fn open_driver(
        &self,
        volume: VolumeHandle,
        session: u128,
        start: Start,
        followed: &Followed,
    ) -> Result<(Arc<Leash>, Arc<dyn OpenVolume>), NodeError> {
        let (leash, on_superseded) = Leash::new(self.parts.exit.clone());
        if start == Start::Resume {
            leash.tighten();
        }
        let wish = Wish {
            volume: VolumeId(volume.id()),
            session: SessionId(session),
            start,
            maps: followed.maps.clone(),
            on_superseded,
        };
        let driver = self.parts.opener.open(wish)?;
        let mut status = driver.status();
        let settled = status.wait_for(|status| status.serving || status.ended || status.superseded);
        match tokio::time::timeout(self.parts.patience.serving, settled).await {
            Ok(Ok(status)) if status.ended => Err(NodeError::Ended),
            Ok(Ok(status)) if status.superseded => Err(NodeError::SessionUsed),
            Ok(Ok(_)) => {
                leash.tighten();
                if driver.status().borrow().superseded {
                    (self.parts.exit)();
                }
                Ok((leash, driver.clone()))
            }
            _ => Err(NodeError::NotServing),
        }
    }

    pub(super) fn spec(&self, volume: VolumeHandle, driver: Arc<dyn OpenVolume>) -> DeviceSpec {
        let target: Arc<dyn BlockTarget> = driver;
        DeviceSpec {
            volume: volume.to_string(),
            directory: self.parts.records.device_directory(volume),
            target,
            on_superseded: self.parts.exit.clone(),
        }
    }

    /// Remove what is left of a device that nobody serves any more.
    pub(super) async fn clear(&self, volume: VolumeHandle) -> Result<(), NodeError> {
        let (host, directory) = (self.host(), self.parts.records.device_directory(volume));
        blocking(move || host.clear(&volume.to_string(), &directory)).await
    }

    /// When the session ends for good, users that hang are freed with I/O errors.
    pub(super) fn cut_off_when_ended(
        &self,
        volume: VolumeHandle,
        mut status: watch::Receiver<Status>,
        device: &Arc<dyn Device>,
    ) {
        let device = Arc::downgrade(device);
        tokio::spawn(async move {
            // The driver is gone: so is the device.
            let Ok(_) = status.wait_for(|status| status.ended).await else { return };
            let Some(device) = device.upgrade() else { return };
            tracing::error!(%volume, "the session has ended: its users get I/O errors");
            let cut = tokio::task::spawn_blocking(move || device.force_detach()).await;
            if let Ok(Err(error)) = cut {
                tracing::error!(%volume, %error, "the device could not be cut off");
            }
        });
    }

    /// Take the device away, with everything that it was asked answered and durable.
    pub(super) async fn detach(&self, volume: VolumeHandle, mut entry: Entry) -> Result<(), NodeError> {
        let Some(open) = entry.open.clone() else {
            self.clear(volume).await?;
            return Ok(());
        };
        let ended = open.driver.status().borrow().ended;
        if let Some(device) = open.device.clone() {
            blocking(move || if ended { device.force_detach() } else { device.detach() }).await?;
        }
        if !ended {
            settled(&*open.driver).await?;
        }
        // What an ended session was asked may lie on some copies only: it is never resumed.
        entry.record.standing = if ended { Standing::Attached } else { Standing::Closed };
        entry.open = None;
        self.keep(volume, entry).await
    }
}

/// Ties the process to a driver: while this is tight and lives, the process ends when that driver is superseded. A driver
/// that was given up here may find that the next one of this very process has taken its place, and one that never served
/// that its session was used before: no reason to end.
pub(super) struct Leash(Arc<AtomicBool>);

impl Leash {
    fn new(exit: Arc<dyn Fn() + Send + Sync>) -> (Arc<Self>, Arc<dyn Fn() + Send + Sync>) {
        let holds = Arc::new(AtomicBool::new(false));
        let seen = holds.clone();
        let on_superseded = move || {
            if seen.load(Ordering::Acquire) {
                exit();
            }
        };
        (Arc::new(Self(holds)), Arc::new(on_superseded))
    }

    /// From now on.
    fn tighten(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Flushes twice: the second one tells the servers that the first covered everything (`confirmed`), so that the end of
/// the session finds nothing to settle.
async fn settled(driver: &dyn OpenVolume) -> Result<(), NodeError> {
    flush(driver).await?;
    Ok(flush(driver).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn only_a_driver_that_still_counts_ends_the_process() {
        let exits = Arc::new(AtomicUsize::new(0));
        let counted = exits.clone();
        let (leash, on_superseded) = Leash::new(Arc::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        on_superseded();
        assert_eq!(exits.load(Ordering::Relaxed), 0, "it has not served yet");
        leash.tighten();
        on_superseded();
        assert_eq!(exits.load(Ordering::Relaxed), 1);
        drop(leash);
        on_superseded();
        assert_eq!(exits.load(Ordering::Relaxed), 1);
    }
}
