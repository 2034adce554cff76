//! What drivers ask of this process: answered while it leads, else they are sent to the one that does.
//!
//! Invariant: a report never waits; a full queue is said to be full.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lamina_control_api::leader::{Leader, Refusal, Replace, Replaced};
use lamina_protocol::control::DriverReport;
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::Input;
use lamina_protocol::map::VolumeMap;
use tokio::sync::{mpsc, watch};

use crate::replacement::Sessions;

/// The door; may be cloned.
#[derive(Clone, Default)]
pub struct Front(Arc<Mutex<Inside>>);

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("leads", &self.inside().inputs.is_some()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inside {
    inputs: Option<mpsc::Sender<Input>>,
    maps: BTreeMap<VolumeId, watch::Sender<Option<VolumeMap>>>,
    leader: Option<String>,
    /// Where sessions are replaced.
    sessions: Option<Arc<dyn Sessions>>,
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

    /// Sessions are replaced there; before this is called none is.
    pub fn replace_in(&self, sessions: Arc<dyn Sessions>) {
        self.inside().sessions = Some(sessions);
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

    async fn replace_session(&self, asked: Replace) -> Result<Replaced, Refusal> {
        let sessions = {
            let inside = self.inside();
            let leads = inside.inputs.as_ref().and(inside.sessions.clone());
            leads.ok_or_else(|| Refusal::NotLeader { leader: inside.leader.clone() })?
        };
        sessions.replace(&asked).await
    }
}
