//! Everything that exists, by name, and what the leader hears of it: pure.
//!
//! A volume is told anew when its policy or the zone of its node changes. Invariants: a volume is told only with its id; one
//! id is told for one object only, so a copied object never acts on another's data; what cannot be read is not told, and
//! left alone.

use std::collections::{BTreeMap, BTreeSet};

use kube::ResourceExt;
use lamina_crds::{ReplicationPolicy, StorageServer, Volume};
use lamina_protocol::ids::{ServerId, VolumeId};
use lamina_protocol::management::VolumeObject;

use crate::store::Change;
use crate::translate;

/// All objects of an operator.
#[derive(Debug, Default)]
pub struct Index {
    volumes: BTreeMap<String, Volume>,
    policies: BTreeMap<String, ReplicationPolicy>,
    servers: BTreeMap<String, StorageServer>,
    zones: BTreeMap<String, String>,
    names: BTreeMap<VolumeId, String>,
    new_ids: BTreeSet<VolumeId>,
}

impl Index {
    /// An id that was minted just now and stands nowhere else.
    pub fn minted(&mut self, id: VolumeId) {
        self.new_ids.insert(id);
    }

    /// The volume of that name.
    pub fn volume(&self, name: &str) -> Option<&Volume> {
        self.volumes.get(name)
    }

    /// The volume with that id.
    pub fn volume_by_id(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(self.names.get(&id)?)
    }

    /// The policy of that name.
    pub fn policy(&self, name: &str) -> Option<&ReplicationPolicy> {
        self.policies.get(name)
    }

    /// The server of that name.
    pub fn server(&self, name: &str) -> Option<&StorageServer> {
        self.servers.get(name)
    }

    /// The name of the server with that id.
    pub fn server_name(&self, id: ServerId) -> Option<&str> {
        let is = |s: &&StorageServer| s.status.as_ref().and_then(|s| s.server_id.as_ref()?.value()) == Some(id.0);
        self.servers.values().find(is).and_then(|s| s.metadata.name.as_deref())
    }

    /// Every volume, by name.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.volumes.values()
    }

    /// Every server, by name.
    pub fn servers(&self) -> impl Iterator<Item = &StorageServer> {
        self.servers.values()
    }

    /// Every policy, by name.
    pub fn policies(&self) -> impl Iterator<Item = &ReplicationPolicy> {
        self.policies.values()
    }

    /// A volume is new or changed.
    pub fn apply_volume(&mut self, volume: Volume) -> Vec<Change> {
        let name = volume.name_any();
        let mut changes = Vec::new();
        let before = self.volumes.get(&name).and_then(translate::id_of);
        let id = translate::id_of(&volume);
        if let Some(gone) = before.filter(|before| Some(*before) != id) {
            changes.extend(self.forget(gone, &name));
        }
        let policy = volume.spec.policy.clone();
        if self.volumes.insert(name.clone(), volume).is_none() {
            changes.extend(self.policy_told(&policy));
        }
        if let Some(id) = id {
            let owner = self.names.entry(id).or_insert_with(|| name.clone());
            if *owner != name {
                tracing::error!(volume = name, %id, owner, "two Volumes carry the same id: the later one is left alone");
                return changes;
            }
        }
        changes.extend(self.told(&name));
        changes
    }

    /// The volume of that name is gone.
    pub fn delete_volume(&mut self, name: &str) -> Vec<Change> {
        let Some(volume) = self.volumes.remove(name) else { return Vec::new() };
        let gone = translate::id_of(&volume).and_then(|id| self.forget(id, name));
        gone.into_iter().chain(self.policy_told(&volume.spec.policy)).collect()
    }

    fn forget(&mut self, id: VolumeId, name: &str) -> Option<Change> {
        if self.names.get(&id).is_some_and(|owner| owner == name) {
            self.names.remove(&id);
            self.new_ids.remove(&id);
            return Some(Change::VolumeGone(id));
        }
        None
    }

    /// A policy is new or changed.
    pub fn apply_policy(&mut self, policy: ReplicationPolicy) -> Vec<Change> {
        let name = policy.name_any();
        self.policies.insert(name.clone(), policy);
        self.users_of(&name).into_iter().chain(self.policy_told(&name)).collect()
    }

    fn policy_told(&self, name: &str) -> Option<Change> {
        let policy = translate::plain_policy(self.policies.get(name)?);
        let volumes = self.volumes.values().filter(|v| v.spec.policy == name).count() as u64;
        Some(Change::Policy { name: name.to_owned(), policy, volumes })
    }

    /// The policy of that name is gone.
    pub fn delete_policy(&mut self, name: &str) -> Vec<Change> {
        self.policies.remove(name);
        self.users_of(name).into_iter().chain([Change::PolicyGone(name.to_owned())]).collect()
    }

    fn users_of(&self, policy: &str) -> Vec<Change> {
        let users = self.volumes.iter().filter(|(_, v)| v.spec.policy == policy);
        users.filter_map(|(name, _)| self.told(name)).collect()
    }

    /// A server is new or changed.
    pub fn apply_server(&mut self, server: StorageServer) -> Vec<Change> {
        let name = server.name_any();
        let zone_before = self.zone(&name);
        self.servers.insert(name.clone(), server);
        let mut changes: Vec<_> = self.server_told(&name).into_iter().collect();
        if zone_before != self.zone(&name) {
            changes.extend(self.near(&name));
        }
        changes
    }

    /// The server of that name is gone.
    pub fn delete_server(&mut self, name: &str) -> Vec<Change> {
        self.servers.remove(name);
        vec![Change::ServerGone(name.to_owned())]
    }

    /// The zone of a Node, empty = none.
    pub fn apply_node(&mut self, name: &str, zone: &str) -> Vec<Change> {
        if self.zones.get(name).is_some_and(|before| before == zone) {
            return Vec::new();
        }
        self.zones.insert(name.to_owned(), zone.to_owned());
        self.server_told(name).into_iter().chain(self.near(name)).collect()
    }

    /// A Node is gone. Its server's zone stays what it was: copies do not move because a Node object went.
    pub fn delete_node(&mut self, _name: &str) -> Vec<Change> {
        Vec::new()
    }

    fn zone(&self, node: &str) -> String {
        let of_server = self.servers.get(node).and_then(|s| s.spec.zone.clone()).filter(|zone| !zone.is_empty());
        of_server.or_else(|| self.zones.get(node).cloned()).unwrap_or_default()
    }

    /// Volumes that wish to lie near this node and have no place yet.
    fn near(&self, node: &str) -> Vec<Change> {
        let near = |v: &Volume| v.spec.near.as_ref().and_then(|near| near.node.as_deref()) == Some(node);
        let unplaced = |v: &Volume| v.status.as_ref().is_none_or(|s| s.map.is_none());
        let names = self.volumes.iter().filter(|(_, v)| near(v) && unplaced(v)).map(|(name, _)| name);
        names.filter_map(|name| self.told(name)).collect()
    }

    fn server_told(&self, name: &str) -> Option<Change> {
        let server = self.servers.get(name)?;
        match translate::known_server(server, self.zones.get(name).map_or("", String::as_str)) {
            Ok(known) => Some(Change::Server(known)),
            Err(why) => {
                tracing::error!(server = name, %why, "the StorageServer is left alone");
                None
            }
        }
    }

    fn told(&self, name: &str) -> Option<Change> {
        self.object(self.volumes.get(name)?).map(|object| Change::Volume(Box::new(object)))
    }

    /// A volume as the leader is handed it; `None` if it has no id yet or cannot be read.
    pub fn object(&self, volume: &Volume) -> Option<VolumeObject> {
        let name = volume.name_any();
        let near_zone = volume.spec.near.as_ref().and_then(|near| near.node.as_deref()).map(|node| self.zone(node));
        let id_is_new = translate::id_of(volume).is_some_and(|id| self.new_ids.contains(&id));
        let policy = self.policies.get(&volume.spec.policy);
        let object = translate::volume_object(volume, policy, near_zone.as_deref().unwrap_or(""), id_is_new);
        object.unwrap_or_else(|why| {
            tracing::error!(volume = name, %why, "the Volume is left alone");
            None
        })
    }
}
