//! After a restart: devices that the holder kept are taken over, what is left of others is noted as lost.
//!
//! Order (PROTOCOL.md H20): the driver comes first, so that all members have refused the older incarnation before the
//! device is taken; the process that had it is ended by the holder if it still lives; then the kernel gives back what
//! nobody answered. Until then the kernel's users wait and see no error.

use super::{Entry, Node, NodeError, Open, blocking};
use crate::device::Device;
use crate::opener::OpenVolume;
use crate::record::{Kind, Record, Standing};
use lamina_csi_api::in_flight::{Entered, InFlight};
use lamina_csi_api::name::VolumeHandle;
use lamina_protocol::wire::Start;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Between two attempts where no event tells that another one is worth it: the holder or all servers are away.
const AGAIN: Duration = Duration::from_secs(1);

impl Node {
    /// Find what was here before, and take over what can be. Calls for a volume are refused (by its place in `calls`)
    /// until it is settled; the set is empty when all are.
    ///
    /// # Errors
    /// [`NodeError::Record`] if there is no telling what was here.
    pub async fn recover(self: &Arc<Self>, calls: &InFlight) -> Result<JoinSet<()>, NodeError> {
        let records = self.parts.records.clone();
        let mut recoveries = JoinSet::new();
        for (volume, record) in blocking(move || records.all()).await? {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(%volume, %error, "a volume cannot be recovered");
                    continue;
                }
            };
            self.lock().insert(volume, Entry { record: record.clone(), open: None });
            let Ok(place) = calls.enter(volume) else {
                tracing::error!(%volume, "more volumes were here than a node can have: this one is left alone");
                continue;
            };
            if record.standing == Standing::Attached {
                recoveries.spawn(self.clone().take_over_at_last(volume, record, place));
            } else {
                recoveries.spawn(self.clone().forget_if_over(volume, record, place));
            }
        }
        Ok(recoveries)
    }

    async fn take_over_at_last(self: Arc<Self>, volume: VolumeHandle, record: Record, place: Entered) {
        loop {
            match self.take_over(volume, &record).await {
                Ok(true) => return tracing::info!(%volume, "device taken over"),
                Ok(false) => {
                    tracing::warn!(%volume, "its device is gone: the next stage has its session replaced");
                    return self.forget_if_over(volume, record, place).await;
                }
                Err(NodeError::Ended) => {
                    self.let_go(volume).await;
                    return self.forget_if_over(volume, record, place).await;
                }
                Err(error) => tracing::warn!(%volume, %error, "device not taken over yet"),
            }
            // sleep: the holder or the servers are away, and nothing tells when they are back
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The record of a session that no map lists and no attachment names any more says nothing that matters.
    async fn forget_if_over(self: Arc<Self>, volume: VolumeHandle, record: Record, _place: Entered) {
        let over = match self.parts.objects.find(volume).await {
            Ok(None) => true,
            // Of an attachment that stands, the record says what its next session is not.
            Ok(Some(seen)) if seen.attachment(record.session()).is_some() => false,
            Ok(Some(seen)) => seen.map.is_some_and(|map| map.sessions.iter().all(|s| s.id.0 != record.session())),
            Err(_) => false,
        };
        if over {
            let records = self.parts.records.clone();
            if let Err(error) = blocking(move || records.remove(volume)).await {
                return tracing::warn!(%volume, %error, "the record of a session that is over stays");
            }
            self.lock().remove(&volume);
        }
    }

    /// False: there is nothing to take over.
    async fn take_over(self: &Arc<Self>, volume: VolumeHandle, record: &Record) -> Result<bool, NodeError> {
        let host = self.host();
        let held = blocking(move || host.held()).await?;
        if !held.contains(&volume.to_string()) {
            return Ok(false);
        }
        let followed = self.parts.objects.follow(volume);
        let (leash, driver) = self.open_driver(volume, record.session(), Start::Resume, &followed).await?;
        let Some(device) = self.resume_device(volume, driver.clone()).await? else { return Ok(false) };
        if record.kind == Kind::Block && record.targets.iter().any(|target| target.read_only) && !driver.read_only() {
            let device = device.clone();
            blocking(move || device.set_read_only(true)).await?;
        }
        driver.replayed();
        self.cut_off_when_ended(volume, driver.status(), &device);
        let open = Open { _leash: leash, driver, device: Some(device), _followed: Arc::new(followed) };
        self.lock().insert(volume, Entry { record: record.clone(), open: Some(open) });
        Ok(true)
    }

    /// `None`: it is no longer alive.
    async fn resume_device(
        &self,
        volume: VolumeHandle,
        driver: Arc<dyn OpenVolume>,
    ) -> Result<Option<Arc<dyn Device>>, NodeError> {
        use crate::device::DeviceError::{CannotResume, Gone};
        let (host, spec) = (self.host(), self.spec(volume, driver));
        match blocking(move || host.resume(spec)).await {
            Ok(device) => Ok(Some(device.into())),
            Err(NodeError::Device(error @ (Gone | CannotResume))) => {
                tracing::error!(%volume, %error, "the device cannot be taken over");
                self.clear(volume).await?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The session ended while nobody served the device: its users get I/O errors.
    async fn let_go(&self, volume: VolumeHandle) {
        tracing::error!(%volume, "the session ended while its device was waiting: its users get I/O errors");
        if let Err(error) = self.clear(volume).await {
            tracing::error!(%volume, %error, "the device could not be removed");
        }
    }
}
