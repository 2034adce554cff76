//! What people see, written when it changes: one write under way per object, the newest state next.
//!
//! Invariant: the store always gets the last state, however many came between; a write that failed is repeated after a
//! pause. At most [`MOST_AT_ONCE`] objects are described at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use lamina_protocol::control::CopyProgress;
use lamina_protocol::ids::{CopyId, ServerId, VolumeId};
use lamina_protocol::management::placement::Refusal;
use lamina_protocol::management::{Condition, Orphan, Policy, ServerHealth, ServerView};
use lamina_protocol::map::MemberState;
use lamina_protocol::time::Millis;
use tokio::sync::mpsc;

use super::{Done, Runtime, clock};
use crate::metrics::{MemberLabels, Named};
use crate::store::{Notice, Store};
use crate::summary::{self, Names, PolicyDescription, Rate, ServerDescription, VolumeDescription};

/// Objects described at once; more wait.
const MOST_AT_ONCE: usize = 16;
/// After a description that could not be written.
const AGAIN: Duration = Duration::from_secs(1);
/// Events per second; a burst of a few does not wait.
const NOTICE_EVERY: Duration = Duration::from_millis(50);

/// What is described.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Volume(VolumeId),
    Server(String),
    Policy(String),
}

#[derive(Default)]
struct OfVolume {
    conditions: Vec<Condition>,
    progress: Vec<CopyProgress>,
    /// When the report before the last came.
    reported: Millis,
    rates: BTreeMap<CopyId, Rate>,
    last: Option<VolumeDescription>,
}

#[derive(Default)]
struct OfServer {
    view: Option<ServerView>,
    orphans: Vec<Orphan>,
    last: Option<ServerDescription>,
}

#[derive(Default)]
struct OfPolicy {
    policy: Option<Policy>,
    volumes: u64,
    last: Option<PolicyDescription>,
}

/// What is to be written, and what was.
#[derive(Default)]
pub(super) struct Shown {
    volumes: BTreeMap<VolumeId, OfVolume>,
    servers: BTreeMap<String, OfServer>,
    policies: BTreeMap<String, OfPolicy>,
    due: BTreeSet<Key>,
    under_way: BTreeSet<Key>,
}

impl Shown {
    pub(super) fn volume_moved(&mut self, volume: VolumeId) {
        self.due.insert(Key::Volume(volume));
    }

    pub(super) fn server_moved(&mut self, name: &str) {
        self.due.insert(Key::Server(name.to_owned()));
    }

    pub(super) fn forget_volume(&mut self, volume: VolumeId) {
        self.volumes.remove(&volume);
    }

    pub(super) fn policy(&mut self, name: String, policy: Option<Policy>, volumes: u64) {
        let shown = self.policies.entry(name.clone()).or_default();
        (shown.policy, shown.volumes) = (policy, volumes);
        self.due.insert(Key::Policy(name));
    }

    pub(super) fn forget_policy(&mut self, name: &str) {
        self.policies.remove(name);
    }

    pub(super) fn forget_server(&mut self, name: &str) {
        self.servers.remove(name);
    }

    pub(super) fn conditions(&mut self, volume: VolumeId, conditions: Vec<Condition>) {
        self.volumes.entry(volume).or_default().conditions = conditions;
        self.volume_moved(volume);
    }

    pub(super) fn progress(&mut self, volume: VolumeId, copies: Vec<CopyProgress>) {
        let now = clock::now();
        let shown = self.volumes.entry(volume).or_default();
        let before = |copy: &CopyProgress| shown.progress.iter().find(|b| (b.copy, b.boot) == (copy.copy, copy.boot));
        let rate =
            |copy: &CopyProgress| Some((copy.copy, Rate::between(before(copy)?, copy, now.since(shown.reported))));
        shown.rates = copies.iter().filter_map(rate).collect();
        (shown.reported, shown.progress) = (now, copies);
        self.volume_moved(volume);
        self.due.extend(self.servers.keys().map(|name| Key::Server(name.clone())));
    }

    pub(super) fn view(&mut self, name: Option<String>, view: ServerView) {
        let Some(name) = name else { return };
        self.servers.entry(name.clone()).or_default().view = Some(view);
        self.due.insert(Key::Server(name));
        // Servers and their room decide whether a policy can be obeyed.
        self.due.extend(self.policies.keys().cloned().map(Key::Policy));
    }

    pub(super) fn orphans(&mut self, name: Option<String>, _server: ServerId, orphans: Vec<Orphan>) {
        let Some(name) = name else { return };
        self.servers.entry(name.clone()).or_default().orphans = orphans;
        self.due.insert(Key::Server(name));
    }

    pub(super) fn described(&mut self, what: Key, worked: bool) {
        self.under_way.remove(&what);
        if !worked {
            match &what {
                Key::Volume(volume) => self.volumes.entry(*volume).or_default().last = None,
                Key::Server(name) => self.servers.entry(name.clone()).or_default().last = None,
                Key::Policy(name) => {
                    self.policies.get_mut(name).into_iter().for_each(|shown| shown.last = None);
                }
            }
            self.due.insert(what);
        }
    }
}

impl Names for Runtime {
    fn server(&self, id: ServerId) -> String {
        self.server_name(id)
    }

    fn volume(&self, id: VolumeId) -> String {
        self.volume_name(id)
    }
}

impl Runtime {
    /// Starts to describe what is due.
    pub(super) fn shown_again(&mut self) {
        while self.shown.under_way.len() < MOST_AT_ONCE {
            let Some(key) = self.shown.due.iter().find(|key| !self.shown.under_way.contains(key)).cloned() else {
                return;
            };
            self.shown.due.remove(&key);
            match key {
                Key::Volume(volume) => self.describe_volume(volume),
                Key::Server(name) => self.describe_server(name),
                Key::Policy(name) => self.describe_policy(name),
            }
        }
    }

    fn describe_volume(&mut self, volume: VolumeId) {
        let (Some(object), Some(shown)) = (self.leader.volume(volume), self.shown.volumes.get(&volume)) else { return };
        let next = summary::of_volume(object, &shown.conditions, &shown.progress, &shown.rates, self);
        if shown.last.as_ref() == Some(&next) {
            return;
        }
        self.count_volume(volume);
        self.shown.volumes.entry(volume).or_default().last = Some(next.clone());
        let key = Key::Volume(volume);
        self.shown.under_way.insert(key.clone());
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            let result = store.describe_volume(volume, &next).await;
            finish(key, result).await
        });
    }

    fn count_volume(&self, volume: VolumeId) {
        let Some(object) = self.leader.volume(volume) else { return };
        let metrics = &self.options.metrics;
        let name = object.name.clone();
        metrics.generation.get_or_create(&Named { name: name.clone() }).set(object.status.generation.0 as i64);
        let left = self
            .shown
            .volumes
            .get(&volume)
            .map_or(0, |s| s.progress.iter().fold(0, |sum: u64, p| sum.saturating_add(p.unsynced)));
        metrics.pages_left.get_or_create(&Named { name: name.clone() }).set(left as i64);
        let states =
            [(MemberState::Active, "active"), (MemberState::Syncing, "syncing"), (MemberState::Failed, "failed")];
        for (state, text) in states {
            let members = object.status.map.iter().flat_map(|map| map.members()).filter(|m| m.state == state);
            let labels = MemberLabels { volume: name.clone(), state: text };
            metrics.members.get_or_create(&labels).set(members.count() as i64);
        }
    }

    fn describe_server(&mut self, name: String) {
        let Some(shown) = self.shown.servers.get(&name) else { return };
        let Some(view) = &shown.view else { return };
        let known = self.servers.get(&name);
        let next = summary::of_server(view, &shown.orphans, &self.filling_at(view.id), known, self);
        if shown.last.as_ref() == Some(&next) {
            return;
        }
        let up = i64::from(view.health == ServerHealth::Alive);
        self.options.metrics.server_up.get_or_create(&Named { name: name.clone() }).set(up);
        self.shown.servers.entry(name.clone()).or_default().last = Some(next.clone());
        let key = Key::Server(name.clone());
        self.shown.under_way.insert(key.clone());
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            let result = store.describe_server(&name, &next).await;
            finish(key, result).await
        });
    }

    fn describe_policy(&mut self, name: String) {
        let Some(shown) = self.shown.policies.get(&name) else { return };
        let refusal = match &shown.policy {
            Some(policy) => self.leader.unsatisfiable(policy),
            None => Some(Refusal::InvalidWish),
        };
        let next = summary::of_policy(shown.volumes, refusal);
        if shown.last.as_ref() == Some(&next) {
            return;
        }
        self.shown.policies.entry(name.clone()).or_default().last = Some(next.clone());
        let key = Key::Policy(name.clone());
        self.shown.under_way.insert(key.clone());
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            let result = store.describe_policy(&name, &next).await;
            finish(key, result).await
        });
    }

    /// Volumes with copies that are being filled on a server, and how far, in percent.
    fn filling_at(&self, server: ServerId) -> Vec<(VolumeId, i32)> {
        let mut filling = Vec::new();
        for (id, shown) in &self.shown.volumes {
            let map = self.leader.volume(*id).and_then(|object| object.status.map.as_ref());
            let here = |p: &&CopyProgress| {
                map.and_then(|map| map.place_of(p.copy)).is_some_and(|(_, _, m)| m.server == server)
            };
            for p in shown.progress.iter().filter(here).filter(|p| p.unsynced > 0) {
                let done = p.pages.saturating_sub(p.unsynced) * 100 / p.pages.max(1);
                filling.push((*id, done.min(99) as i32));
            }
        }
        filling
    }
}

async fn finish(what: Key, result: Result<(), crate::store::StoreError>) -> Done {
    match result {
        Ok(()) | Err(crate::store::StoreError::Gone) => Done::Described { what, worked: true },
        Err(why) => {
            tracing::warn!(?what, %why, "could not be described");
            // sleep: back-off after the API server refused what people are shown.
            tokio::time::sleep(AGAIN).await;
            Done::Described { what, worked: false }
        }
    }
}

/// Tells people, at a bounded rate.
pub(super) async fn tell_notices(store: Arc<dyn Store>, mut notices: mpsc::Receiver<Notice>) -> Done {
    let mut pace = tokio::time::interval(NOTICE_EVERY);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while let Some(notice) = notices.recv().await {
        pace.tick().await;
        if let Err(why) = store.tell(&notice).await {
            tracing::warn!(%why, reason = notice.reason, "an event could not be told");
        }
    }
    Done::Nothing
}
