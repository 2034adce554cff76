//! What drivers ask of this process: answered while it leads, else they are sent to the one that does.
//!
//! Invariant: a report never waits; a full queue is said to be full.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lamina_control_api::leader::{Leader, Refusal};
use lamina_protocol::control::DriverReport;
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::Input;
use lamina_protocol::map::VolumeMap;
use tokio::sync::{mpsc, watch};

/// The door; may be cloned.
#[derive(Clone, Debug, Default)]
pub struct Front(Arc<Mutex<Inside>>);

#[derive(Debug, Default)]
struct Inside {
    inputs: Option<mpsc::Sender<Input>>,
    maps: BTreeMap<VolumeId, watch::Sender<Option<VolumeMap>>>,
    leader: Option<String>,
}

impl Front {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This process leads from now on; reports go in there.
    pub fn open(&self, inputs: mpsc::Sender<Input>) {
        self.inside().inputs = Some(inputs);
    }

    /// It does not lead any more: whoever watches maps is cut off and looks for the leader.
    pub fn close(&self) {
        let mut inside = self.inside();
        inside.inputs = None;
        inside.maps.clear();
    }

    /// Where the leader is.
    pub fn set_leader(&self, address: Option<String>) {
        self.inside().leader = address;
    }

    /// A volume with its committed map. Watchers never see an older one after a newer one.
    pub fn publish(&self, volume: VolumeId, map: Option<&VolumeMap>) {
        let mut inside = self.inside();
        let sender = inside.maps.entry(volume).or_insert_with(|| watch::Sender::new(None));
        sender.send_if_modified(|shown| {
            let newer = map.is_some_and(|map| shown.as_ref().is_none_or(|s| s.generation < map.generation));
            if newer {
                *shown = map.cloned();
            }
            newer
        });
    }

    /// The volume is gone.
    pub fn withdraw(&self, volume: VolumeId) {
        self.inside().maps.remove(&volume);
    }
}

impl Leader for Front {
    fn report(&self, report: DriverReport) -> Result<(), Refusal> {
        let inside = self.inside();
        let Some(inputs) = &inside.inputs else { return Err(Refusal::NotLeader { leader: inside.leader.clone() }) };
        inputs.try_send(Input::Report(report)).map_err(|_| Refusal::Busy)
    }

    fn maps(&self, volume: VolumeId) -> Result<watch::Receiver<Option<VolumeMap>>, Refusal> {
        let inside = self.inside();
        if inside.inputs.is_none() {
            return Err(Refusal::NotLeader { leader: inside.leader.clone() });
        }
        inside.maps.get(&volume).map(watch::Sender::subscribe).ok_or(Refusal::NoVolume)
    }
}
