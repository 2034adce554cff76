//! What people do to a volume and its cluster, and what becomes of the API server: growth, deletion, drains, an old copy
//! put in place of the objects (R6), and the word of a person who is asked for one.
//!
//! The person here is careful: adopts only the highest map that lies on any disk, deletes only what nobody uses.

use super::event::{Event, Process};
use super::world::{VOLUME, World};
use lamina_protocol::ids::{CopyId, Generation};
use lamina_protocol::management::{Condition, ConditionKind, Input, Reason, VolumeObject};
use std::rc::Rc;

/// The API server as it was at one time.
pub(super) struct Backup {
    at: u64,
    object: Rc<VolumeObject>,
    lease_number: u64,
}

impl World {
    // ---- an old copy of the API server's data (R6) ----

    /// Keeps the state of the API server as it is now; somebody may put it back later.
    pub(super) fn back_up(&mut self) {
        let (object, lease_number) = (self.store.object.clone(), self.store.lease_number);
        self.store.backups.push(Backup { at: self.now, object, lease_number });
    }

    /// Everything that the API server keeps is as it was so long ago. Wishes are those of now: who restores the objects
    /// of a cluster lets those who use volumes say anew what they use.
    pub(super) fn restore_api(&mut self, back_us: u64, versions: bool) -> bool {
        let then = self.now.saturating_sub(back_us);
        let Some(backup) = self.store.backups.iter().rfind(|b| b.at <= then) else { return false };
        if backup.object.status.map.is_none() || self.store.gone || self.deleting() {
            return false;
        }
        let (old, lease_number) = (backup.object.clone(), backup.lease_number);
        if old.status.generation < self.store.object.status.generation {
            self.counters.count("reached: an API server restored from before a commit");
        }
        let version = if versions { old.version } else { self.store.object.version + 1 };
        let mut wishes = self.store.object.wishes.clone();
        wishes.adopt = None;
        self.note(|| format!("generation {} is in the object again, version {version}", old.status.generation));
        self.store.object = Rc::new(VolumeObject { version, wishes, ..(*old).clone() });
        self.store.lease_number = lease_number;
        self.store.restored = true;
        self.tell_watchers();
        true
    }

    /// The highest committed generation on disks, and whether every disk that has it is open.
    fn highest_stored(&self) -> (Generation, bool) {
        let mut highest = (Generation(0), true);
        for server in &self.servers {
            for disk in &server.disks {
                let stored = disk.blob(VOLUME).and_then(|blob| blob.map).map_or(Generation(0), |map| map.generation);
                let open = server.machine.is_some() && disk.boot().is_some();
                if stored > highest.0 || (stored == highest.0 && open) {
                    highest = (stored, open);
                }
            }
        }
        highest
    }

    /// R6: nothing is committed on top of an object that is older than what an open disk stores.
    pub(super) fn check_lineage(&mut self, before: Generation) {
        if !self.store.restored {
            return;
        }
        let (stored, open) = self.highest_stored();
        let adopted = self.store.object.wishes.adopt.is_some_and(|adopted| adopted >= stored);
        if open && stored > before && !adopted {
            let what = format!("generation {before} was changed although a server stores {stored}");
            self.fail("R6", what);
        }
    }

    /// What leaders say of the volume.
    pub(super) fn conditions_told(&mut self, conditions: &[Condition]) {
        let diverged =
            |c: &Condition| c.kind == ConditionKind::Diverged && c.reason == Reason::NewerMapFound && c.holds;
        self.store.diverged = conditions.iter().any(diverged);
    }

    /// What a person says when asked.
    pub(super) fn people_look(&mut self) {
        if !self.store.diverged || self.store.gone {
            return;
        }
        let (highest, open) = self.highest_stored();
        if open && self.store.object.wishes.adopt != Some(highest) {
            self.store.diverged = false;
            self.counters.count("reached: a person adopts a map");
            self.note(|| format!("a person adopts generation {highest}"));
            self.wish(|wishes| wishes.adopt = Some(highest));
        }
    }

    // ---- growth ----

    pub(super) fn grow(&mut self, blocks: u64) {
        if blocks * 4096 > self.store.object.wishes.size && !self.deleting() {
            self.counters.count("reached: growth is wished for");
            self.wish(|wishes| wishes.size = blocks * 4096);
        }
    }

    // ---- deletion ----

    pub(super) fn deleting(&self) -> bool {
        self.store.object.wishes.deleted
    }

    /// Nobody is to use the volume any more, and nothing of it is to stay.
    pub(super) fn delete_volume(&mut self) {
        if self.deleting() {
            return;
        }
        for client in 0..self.clients.len() {
            self.detach(client, false);
        }
        self.counters.count("reached: deletion is wished for");
        self.wish(|wishes| wishes.deleted = true);
    }

    /// R14: the finalizer goes only when nothing lies anywhere.
    pub(super) fn released(&mut self, process: Process) {
        self.note(|| format!("{} lets the object go", process.host));
        self.counters.count("reached: a volume was deleted");
        self.store.gone = true;
        if let Some((n, copy)) = self.lying().first().filter(|_| !self.store.restored) {
            self.fail("R14", format!("the object is gone, copy {copy} lies on server {n}"));
        }
        self.tell_watchers();
    }

    /// R14: whatever copy lies on a disk, the object names it, or the server has taken the order to delete it.
    pub(super) fn check_named(&mut self) {
        if self.store.restored || self.store.gone {
            return;
        }
        let status = &self.store.object.status;
        let named = |copy| {
            status.map.as_ref().is_some_and(|map| map.place_of(copy).is_some())
                || status.retired.iter().any(|r| r.copy == copy)
                || status.proposed.as_ref().is_some_and(|p| p.copies.iter().any(|c| c.copy == copy))
        };
        if let Some((n, copy)) = self.lying().into_iter().find(|(_, copy)| !named(*copy)) {
            self.fail("R14", format!("copy {copy} lies on server {n}, the object does not name it"));
        }
    }

    /// Every copy on every disk, open or not.
    fn lying(&self) -> Vec<(usize, CopyId)> {
        let disks = self.servers.iter().enumerate().flat_map(|(n, s)| s.disks.iter().map(move |d| (n, d)));
        disks.flat_map(|(n, d)| d.copies().map(move |c| (n, c.copy))).collect()
    }

    // ---- drains ----

    pub(super) fn drain(&mut self, server: usize, drain: bool) {
        self.servers[server].draining = drain;
        for n in 0..self.operators.len() {
            let object = self.server_object(server);
            self.leader_input(n, Input::Server(object));
        }
    }

    pub(super) fn undrain(&mut self, server: usize) {
        self.servers[server].drained = false;
        self.drain(server, false);
    }

    /// Whether a server that is to be empty is.
    pub(super) fn look_at_drains(&mut self) {
        for n in 0..self.servers.len() {
            let host = &self.servers[n];
            if host.draining && host.disks.iter().all(|d| d.copies().next().is_none()) {
                self.counters.count("reached: a drained server is empty");
                self.servers[n].draining = false;
                self.servers[n].drained = true;
            }
        }
    }

    // ---- what comes twice ----

    /// A word of a watch comes again, late: another cache serves it.
    pub(super) fn now_and_then_again(&mut self, event: Event) {
        if !self.healed && self.dice.chance(1, 100) {
            let at = self.now + self.dice.within(1_000, 2_000_000);
            self.counters.count("fault: a word of a watch comes again");
            self.queue.push(at, event);
        }
    }
}
