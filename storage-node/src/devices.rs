//! The devices that this server may use: what was found at each path, opening, opening anew under another boot id, growth.
//!
//! ```text
//! spec ─► Opening ─► Ready ──(R3: an operation failed)──► Failed ──back-off──► Opening
//!            ├─► Refused (foreign, another server's or cluster's, damaged)  ─► looked at again every minute
//!            ├─► Missing                                                    ─► looked at again every 5 s
//!            └─► Failed (busy, an error of the kernel)                      ─► back-off, 1 s to 1 min
//! Ready, a block device ─► its size is looked at every minute, and when the list is applied: it may have grown
//! ```
//! Invariants: each opening has a boot id of its own; a device is formatted only if it is blank, or a person said
//! `format` and it is not this cluster's; an id of a server is minted only when every device could be looked at and none
//! carries one; a device that is no longer listed is served on while a copy lies there, also by the next process, if it
//! is told so.

use crate::args::DeviceSpec;
use crate::serve::Listed;
use crate::server::Server;
use crate::store::{DeviceError, Identity, OpenOptions, Recovered};
use lamina_protocol::ids::{BootId, ClusterId, DeviceId, ServerId};
use lamina_protocol::storage_server::medium::Opened;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

mod opening;

pub(crate) use opening::{Failure, id};

/// Openings that may wait to be taken: more than a server has devices.
const OUTCOMES: usize = 128;
/// First pause after a failure; doubled at each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after failures, and the pause after a refusal.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// A path with nothing there is looked at again after this time.
const MISSING_PAUSE: Duration = Duration::from_secs(5);

/// How a device is, as it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceState {
    /// Being opened.
    Opening,
    /// Serves.
    Ready,
    /// Not used: foreign, of another server or cluster, too small, damaged.
    Refused,
    /// Nothing is at the path.
    Missing,
    /// An operation failed, or it is busy; opened anew after a pause.
    Failed,
    /// Not listed any more, though copies lie there.
    Unlisted,
}

/// A device as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceView {
    /// Its path.
    pub path: PathBuf,
    /// How it is.
    pub state: DeviceState,
    /// Why, in plain words.
    pub reason: Option<String>,
    /// Its id, once it was opened.
    pub id: Option<DeviceId>,
    /// The present opening.
    pub boot: Option<BootId>,
    /// Openings that ended with an error.
    pub failures: u64,
}

/// All devices.
pub(crate) struct Slots {
    cluster: ClusterId,
    /// From the object or the command line; then from the first device that carries one, or minted.
    server: Option<ServerId>,
    slots: Vec<Slot>,
    outcomes: mpsc::Sender<Outcome>,
    /// What openings came to.
    pub(crate) opened: mpsc::Receiver<Outcome>,
}

struct Slot {
    spec: DeviceSpec,
    listed: bool,
    view: DeviceView,
    /// Failures in a row.
    in_a_row: u32,
    /// When to look again; none while it is being opened, or open and as large as listed. A device without a listed size
    /// is looked at as long as it is open: it may grow any time.
    again: Option<Instant>,
    /// An earlier process said that copies lie there; forgotten once it is open and they are counted.
    said_to_hold: bool,
}

/// What a blocking piece of work came to.
pub(crate) enum Outcome {
    /// The devices were looked at: the server's id, or why it cannot be told yet.
    Identity(Result<ServerId, String>),
    /// One was opened or not.
    Opened {
        /// Which.
        path: PathBuf,
        /// With what.
        result: Result<(Box<Recovered>, Opened), Failure>,
    },
    /// A file was extended for a device in use.
    Grown {
        /// Which.
        path: PathBuf,
        /// Whether.
        result: Result<(), DeviceError>,
    },
}

impl Slots {
    /// No devices yet.
    pub(crate) fn new(cluster: ClusterId, server: Option<ServerId>) -> Self {
        let (outcomes, opened) = mpsc::channel(OUTCOMES);
        Self { cluster, server, slots: Vec::new(), outcomes, opened }
    }

    /// Each device as it is shown.
    pub(crate) fn views(&self) -> Vec<DeviceView> {
        self.slots.iter().map(|slot| slot.view.clone()).collect()
    }

    /// The devices that people list now.
    pub(crate) fn list(&mut self, listed: Listed, server: &Rc<Server>) {
        self.server = self.server.or(listed.server);
        let (specs, unlisted) = (listed.devices, listed.unlisted);
        for slot in &mut self.slots {
            slot.listed = specs.iter().any(|spec| spec.path == slot.spec.path);
        }
        for spec in specs {
            match self.slots.iter_mut().find(|slot| slot.spec.path == spec.path) {
                None => self.slots.push(Slot::new(spec)),
                Some(slot) if slot.spec != spec => {
                    let grows = spec.size > slot.spec.size && slot.view.boot.is_some();
                    slot.spec = spec;
                    if grows {
                        grow(slot.spec.clone(), self.outcomes.clone());
                    } else if slot.again.is_some() {
                        slot.again = Some(Instant::now());
                    }
                }
                Some(slot) if slot.spec.size.is_none() && slot.view.boot.is_some() => slot.again = Some(Instant::now()),
                Some(_) => {}
            }
        }
        for spec in unlisted {
            if !self.slots.iter().any(|slot| slot.spec.path == spec.path) {
                self.slots.push(Slot { listed: false, said_to_hold: true, ..Slot::new(spec) });
            }
        }
        self.drop_unlisted(server);
        self.begin();
    }

    /// Closes what is no longer listed once no copy lies there.
    pub(crate) fn drop_unlisted(&mut self, server: &Rc<Server>) {
        if self.slots.iter().all(|slot| slot.listed && slot.view.state != DeviceState::Unlisted) {
            return;
        }
        let copies = server.copies();
        self.slots.retain_mut(|slot| {
            let used = slot.said_to_hold || slot.view.id.is_some_and(|id| copies.iter().any(|c| c.device == id));
            match (slot.listed, used, slot.view.boot) {
                (true, _, boot) => {
                    if boot.is_some() && slot.view.state == DeviceState::Unlisted {
                        slot.show(DeviceState::Ready, None);
                    }
                    true
                }
                (false, true, boot) => {
                    slot.unlisted(boot.is_some());
                    true
                }
                (false, false, Some(boot)) => {
                    tracing::info!(device = %slot.spec.path.display(), "no longer listed and empty: closed");
                    server.close_device(boot);
                    false
                }
                // One that is being opened is forgotten when that is over.
                (false, false, None) => slot.again.is_none(),
            }
        });
    }

    /// When something is to be looked at again.
    pub(crate) fn again(&self) -> Option<Instant> {
        self.slots.iter().filter_map(|slot| slot.again).min()
    }

    /// Begins what is due.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        if !self.slots.iter().any(|slot| slot.again.is_some_and(|at| at <= now)) {
            return;
        }
        let Some(id) = self.server else { return self.find_identity() };
        for slot in self.slots.iter_mut().filter(|slot| slot.again.is_some_and(|at| at <= now)) {
            slot.again = None;
            if slot.view.boot.is_some() {
                slot.again = slot.spec.size.is_none().then(|| now + MAX_PAUSE);
                grow(slot.spec.clone(), self.outcomes.clone());
                continue;
            }
            slot.show(DeviceState::Opening, None);
            let boot = BootId(opening::id());
            let options = OpenOptions {
                identity: Identity { cluster: self.cluster, server: id },
                boot,
                atomic4k: slot.spec.atomic4k,
            };
            let (spec, outcomes) = (slot.spec.clone(), self.outcomes.clone());
            tokio::task::spawn_blocking(move || {
                let result = opening::open(&spec, &options);
                // The server is stopping if nobody takes it.
                let _ = outcomes.blocking_send(Outcome::Opened { path: spec.path, result });
            });
        }
    }

    /// Looks at all devices to tell whose this server is.
    fn find_identity(&mut self) {
        for slot in &mut self.slots {
            slot.again = None;
        }
        let paths: Vec<PathBuf> = self.slots.iter().map(|slot| slot.spec.path.clone()).collect();
        let (cluster, outcomes) = (self.cluster, self.outcomes.clone());
        tokio::task::spawn_blocking(move || {
            let found = opening::find_identity(&paths, cluster);
            let _ = outcomes.blocking_send(Outcome::Identity(found));
        });
    }

    /// Takes what a piece of work came to.
    pub(crate) fn took(&mut self, outcome: Outcome, server: &Rc<Server>) {
        match outcome {
            // Asked for twice: by the first answer the devices are being opened, or open.
            Outcome::Identity(_) if self.server.is_some() => {}
            Outcome::Identity(Ok(id)) => {
                self.server = Some(id);
                self.slots.iter_mut().for_each(|slot| slot.again = Some(Instant::now()));
            }
            Outcome::Identity(Err(reason)) => {
                for slot in &mut self.slots {
                    slot.failed(DeviceState::Failed, reason.clone());
                }
            }
            Outcome::Opened { path, result } => self.opened_one(&path, result, server),
            Outcome::Grown { path, result } => {
                if let Some(slot) = self.slot(&path) {
                    slot.grown(result, server);
                }
            }
        }
        self.begin();
    }

    fn opened_one(&mut self, path: &Path, result: Result<(Box<Recovered>, Opened), Failure>, server: &Rc<Server>) {
        let outcomes = self.outcomes.clone();
        let Some(slot) = self.slot(path) else { return };
        match result {
            Ok((recovered, opened)) => {
                let (id, boot, copies) = (opened.device, opened.boot, opened.copies.len());
                match server.device_opened(*recovered, opened) {
                    Ok(()) => slot.serves(id, boot, copies, outcomes),
                    Err(error) => {
                        let failure = Failure::from(error);
                        slot.failed(failure.state, failure.reason);
                    }
                }
            }
            Err(failure) => slot.failed(failure.state, failure.reason),
        }
        self.drop_unlisted(server);
    }

    /// The machine closed this opening (R3): the device is opened anew after a pause.
    pub(crate) fn closed(&mut self, boot: BootId) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.view.boot == Some(boot)) {
            slot.view.boot = None;
            slot.failed(DeviceState::Failed, "an operation failed; the log names it".into());
        }
    }

    fn slot(&mut self, path: &Path) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.spec.path == path)
    }
}

/// Lets the file of an open device be as large as listed; one without a listed size is as large as it is.
fn grow(spec: DeviceSpec, outcomes: mpsc::Sender<Outcome>) {
    if spec.size.is_none() {
        // If there is no room for the word, it is looked at again a minute later.
        let _ = outcomes.try_send(Outcome::Grown { path: spec.path, result: Ok(()) });
        return;
    }
    tokio::task::spawn_blocking(move || {
        let result = opening::grow(&spec);
        let _ = outcomes.blocking_send(Outcome::Grown { path: spec.path, result });
    });
}

impl Slot {
    fn new(spec: DeviceSpec) -> Self {
        let view = DeviceView {
            path: spec.path.clone(),
            state: DeviceState::Opening,
            reason: None,
            id: None,
            boot: None,
            failures: 0,
        };
        Self { spec, listed: true, view, in_a_row: 0, again: Some(Instant::now()), said_to_hold: false }
    }

    fn serves(&mut self, id: DeviceId, boot: BootId, copies: usize, outcomes: mpsc::Sender<Outcome>) {
        tracing::info!(device = %self.spec.path.display(), %id, %boot, copies, "device opened");
        self.view.id = Some(id);
        self.view.boot = Some(boot);
        self.in_a_row = 0;
        self.said_to_hold = false;
        self.show(DeviceState::Ready, None);
        grow(self.spec.clone(), outcomes);
    }

    fn show(&mut self, state: DeviceState, reason: Option<String>) {
        self.view.state = state;
        self.view.reason = reason;
    }

    /// People took it off the list, but copies lie there.
    fn unlisted(&mut self, is_open: bool) {
        const REASON: &str = "no longer listed, but copies lie on it: it is used on until they have moved away";
        if is_open && self.view.state != DeviceState::Unlisted {
            tracing::warn!(device = %self.spec.path.display(), "{REASON}");
            self.show(DeviceState::Unlisted, Some(REASON.into()));
        }
    }

    /// One whose file cannot grow is used as it is.
    fn grown(&mut self, result: Result<(), DeviceError>, server: &Rc<Server>) {
        let Some(boot) = self.view.boot else { return };
        let Err(why) = result else {
            if self.view.state == DeviceState::Ready {
                self.show(DeviceState::Ready, None);
            }
            self.again = self.spec.size.is_none().then(|| Instant::now() + MAX_PAUSE);
            return server.grow(boot);
        };
        let reason = format!("used as it is, smaller than listed: {why}");
        if self.view.reason.as_ref() != Some(&reason) {
            tracing::error!(device = %self.spec.path.display(), "{reason}");
        }
        self.show(self.view.state, Some(reason));
        self.again = Some(Instant::now() + MAX_PAUSE);
    }

    fn failed(&mut self, state: DeviceState, reason: String) {
        let pause = match state {
            DeviceState::Missing => MISSING_PAUSE,
            DeviceState::Refused => MAX_PAUSE,
            _ => MAX_PAUSE.min(FIRST_PAUSE * 2u32.saturating_pow(self.in_a_row.min(16))),
        };
        self.in_a_row += 1;
        self.view.failures += u64::from(state == DeviceState::Failed);
        // The same again is not worth a line.
        if self.in_a_row == 1 || self.view.reason.as_ref() != Some(&reason) {
            tracing::error!(device = %self.spec.path.display(), ?state, "device is not used: {reason}");
        }
        self.show(state, Some(reason));
        self.again = Some(Instant::now() + pause);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::events::Inbox;
    use crate::metrics::Metrics;

    /// Devices that are added one after the other before anybody knows whose the server is: they are looked at twice.
    #[tokio::test]
    async fn a_second_word_about_the_servers_id_opens_no_device_again() {
        let cluster = ClusterId(1);
        let server = Server::new(cluster, Rc::new(Inbox::default()), Metrics::new());
        let mut slots = Slots::new(cluster, None);
        let path = PathBuf::from("/dev/null/nothing");
        let spec = DeviceSpec { path, atomic4k: None, format: false, size: None };
        slots.list(Listed { server: None, devices: vec![spec], unlisted: vec![] }, &server);
        slots.took(Outcome::Identity(Ok(ServerId(5))), &server);
        assert_eq!(slots.again(), None, "it is being opened");
        for second in [Ok(ServerId(6)), Err("a device is busy".to_owned())] {
            slots.took(Outcome::Identity(second), &server);
            assert_eq!((slots.server, slots.again()), (Some(ServerId(5)), None));
            assert_eq!((slots.views()[0].state, slots.views()[0].failures), (DeviceState::Opening, 0));
        }
    }
}
