//! Objects as they change, told to the leader; Volumes that lack something are prepared first.
//!
//! Invariant: `Listed` is said once, after every kind was listed whole; after a broken watch everything is listed and told
//! anew, though it be older (R6), and what is no longer there is told as gone. A Volume is told when it has its id, so
//! preparing one never holds up others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt, select_all};
use k8s_openapi::api::core::v1::Node;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use lamina_crds::{ReplicationPolicy, StorageServer, Volume};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::prepare::{self, WantedPv};
use crate::index::Index;
use crate::store::{Change, StoreError};

/// Label of a Node with its zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Between two tries to prepare a Volume, or to watch, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// An object of any kind that is watched.
enum Seen {
    Volume(Box<Volume>),
    Policy(Box<ReplicationPolicy>),
    Server(Box<StorageServer>),
    Node(Box<Node>),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Policy,
    Node,
    Server,
    Volume,
}

enum Word {
    Began(Kind),
    There(Seen),
    Listed(Kind),
    Gone(Kind, String),
}

/// Nobody listens any more.
struct Over;

struct Watch {
    client: Client,
    index: Arc<Mutex<Index>>,
    changes: mpsc::Sender<Change>,
    /// Names by kind; during a list those not seen yet.
    known: BTreeMap<Kind, BTreeSet<String>>,
    unseen: BTreeMap<Kind, BTreeSet<String>>,
    listed: BTreeSet<Kind>,
    preparing: JoinSet<(Box<Volume>, WantedPv)>,
    under_way: BTreeSet<String>,
    /// What was done about the PersistentVolume of each Volume.
    pvs: BTreeMap<String, WantedPv>,
}

/// Watches until nobody listens.
pub(super) async fn run(client: Client, index: Arc<Mutex<Index>>, changes: mpsc::Sender<Change>) {
    let mut words = select_all([
        words(Kind::Policy, Api::<ReplicationPolicy>::all(client.clone()), |o| Seen::Policy(Box::new(o))),
        words(Kind::Node, Api::<Node>::all(client.clone()), |o| Seen::Node(Box::new(o))),
        words(Kind::Server, Api::<StorageServer>::all(client.clone()), |o| Seen::Server(Box::new(o))),
        words(Kind::Volume, Api::<Volume>::all(client.clone()), |o| Seen::Volume(Box::new(o))),
    ]);
    let mut watch = Watch {
        client,
        index,
        changes,
        known: BTreeMap::new(),
        unseen: BTreeMap::new(),
        listed: BTreeSet::new(),
        preparing: JoinSet::new(),
        under_way: BTreeSet::new(),
        pvs: BTreeMap::new(),
    };
    loop {
        let step = tokio::select! {
            Some(word) = words.next() => watch.take(word).await,
            Some(done) = watch.preparing.join_next() => {
                let (seen, pv) = done.expect("preparing a Volume does not panic and is not aborted while it runs");
                watch.prepared(&seen, pv);
                Ok(())
            }
        };
        if step.is_err() {
            return;
        }
    }
}

fn words<K>(kind: Kind, api: Api<K>, seen: fn(K) -> Seen) -> BoxStream<'static, Word>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let began = Relisting { events: from_a_list(api.clone()), api, pause: PAUSES.0 };
    let events = stream::unfold(began, |mut watch| async move { Some((watch.next().await, watch)) });
    let word = move |event: Option<Event<K>>| async move {
        match event? {
            Event::Init => Some(Word::Began(kind)),
            Event::InitApply(object) | Event::Apply(object) => Some(Word::There(seen(object))),
            Event::InitDone => Some(Word::Listed(kind)),
            Event::Delete(object) => Some(Word::Gone(kind, object.name_any())),
        }
    };
    events.filter_map(word).boxed()
}

/// A watch that lists anew when the API server went away, for it may come back with an older state (R6): a watch that goes
/// on from a version that does not exist yet would be told nothing before the versions catch up.
struct Relisting<K> {
    api: Api<K>,
    events: BoxStream<'static, Result<Event<K>, watcher::Error>>,
    pause: Duration,
}

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + 'static> Relisting<K> {
    /// `None` = it broke, and begins anew.
    async fn next(&mut self) -> Option<Event<K>> {
        match self.events.next().await {
            Some(Ok(event)) => {
                if matches!(event, Event::InitDone) {
                    self.pause = PAUSES.0;
                }
                return Some(event);
            }
            Some(Err(why)) => {
                tracing::warn!(%why, kind = std::any::type_name::<K>(), "the watch broke: all is listed anew");
            }
            None => {}
        }
        // sleep: back-off after the API server refused; it says nothing when it would not.
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        self.events = from_a_list(self.api.clone());
        None
    }
}

/// A watch that begins with a list.
fn from_a_list<K>(api: Api<K>) -> BoxStream<'static, Result<Event<K>, watcher::Error>>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, watcher::Config::default()).boxed()
}

impl Watch {
    async fn take(&mut self, word: Word) -> Result<(), Over> {
        match word {
            Word::Began(kind) => {
                self.unseen.insert(kind, self.known.get(&kind).cloned().unwrap_or_default());
                Ok(())
            }
            Word::There(seen) => self.there(seen).await,
            Word::Gone(kind, name) => self.gone(kind, &name).await,
            Word::Listed(kind) => {
                for name in self.unseen.remove(&kind).unwrap_or_default() {
                    self.gone(kind, &name).await?;
                }
                if self.listed.insert(kind) && self.listed.len() == 4 {
                    return self.say([Change::Listed]).await;
                }
                Ok(())
            }
        }
    }

    async fn there(&mut self, seen: Seen) -> Result<(), Over> {
        let (kind, name) = match &seen {
            Seen::Volume(o) => (Kind::Volume, o.name_any()),
            Seen::Policy(o) => (Kind::Policy, o.name_any()),
            Seen::Server(o) => (Kind::Server, o.name_any()),
            Seen::Node(o) => (Kind::Node, o.name_any()),
        };
        self.known.entry(kind).or_default().insert(name.clone());
        self.unseen.entry(kind).or_default().remove(&name);
        if let Seen::Volume(volume) = &seen {
            self.prepare_if_needed(volume);
        }
        let changes = {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            match seen {
                Seen::Volume(volume) => index.apply_volume(*volume),
                Seen::Policy(policy) => index.apply_policy(*policy),
                Seen::Server(server) => index.apply_server(*server),
                Seen::Node(node) => index.apply_node(&name, node.labels().get(ZONE).map_or("", String::as_str)),
            }
        };
        self.say(changes).await
    }

    async fn gone(&mut self, kind: Kind, name: &str) -> Result<(), Over> {
        self.known.entry(kind).or_default().remove(name);
        let changes = {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            match kind {
                Kind::Volume => index.delete_volume(name),
                Kind::Policy => index.delete_policy(name),
                Kind::Server => index.delete_server(name),
                Kind::Node => index.delete_node(name),
            }
        };
        if kind == Kind::Volume {
            self.pvs.remove(name);
        }
        self.say(changes).await
    }

    async fn say(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), Over> {
        for change in changes {
            self.changes.send(change).await.map_err(|_| Over)?;
        }
        Ok(())
    }

    fn prepare_if_needed(&mut self, volume: &Volume) {
        let name = volume.name_any();
        let needed = prepare::lacks(volume, self.pvs.get(&name));
        if !needed || !self.under_way.insert(name.clone()) {
            return;
        }
        let (client, index, seen) = (self.client.clone(), Arc::clone(&self.index), Box::new(volume.clone()));
        self.preparing.spawn(async move {
            let (mut pause, longest) = PAUSES;
            loop {
                let why = match prepare::prepare(&client, &index, &seen).await {
                    Ok(pv) => return (seen, pv),
                    Err(why) => why,
                };
                if !is_conflict(&why) {
                    tracing::warn!(volume = name, %why, "the Volume could not be prepared");
                }
                // sleep: back-off after the API server refused; it says nothing when it would not.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        });
    }

    fn prepared(&mut self, seen: &Volume, pv: WantedPv) {
        let name = seen.name_any();
        self.under_way.remove(&name);
        let now = {
            let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            index.volume(&name).cloned()
        };
        let Some(now) = now else { return };
        self.pvs.insert(name, pv);
        // What the watch brought meanwhile it does not bring again.
        if now.resource_version() != seen.resource_version() {
            self.prepare_if_needed(&now);
        }
    }
}

/// Somebody else changed the object in between: read anew and done again.
fn is_conflict(why: &StoreError) -> bool {
    let StoreError::Api(why) = why else { return false };
    matches!(&**why, kube::Error::Api(status) if matches!(status.code, 409 | 422))
}

#[cfg(test)]
mod tests;
