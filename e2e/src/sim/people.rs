//! What people do to a volume and its cluster, and what becomes of the API server: growth, deletion, drains, an old copy
//! put in place of the objects (R6), and the word of a person who is asked for one.
//!
//! The person here is careful: adopts only the highest map that lies on any disk, deletes only what nobody uses.

use super::event::{Event, Process};
use super::world::{VOLUME, World};
use lamina_protocol::ids::{CopyId, Generation};
use lamina_protocol::management::{Condition, ConditionKind, Force, Input, Reason, VolumeObject};
use lamina_protocol::map::{Group, Member, MemberState, VolumeMap};
use std::collections::BTreeSet;
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
        self.person_forces();
        self.person_deletes_kept();
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

    // ---- a copy that is behind is forced (I8) ----

    /// A person goes on with copies that are behind when all up-to-date ones of a group are down for long, and stops the
    /// nodes that use the volume.
    fn person_forces(&mut self) {
        let after_us = self.plan.setup.force_after_ms * 1_000;
        let free = self.store.gone || self.deleting() || self.store.restored || self.healed || after_us == 0;
        let Some(copies) = self.waiting_groups().filter(|_| !free) else {
            self.store.waits_since = None;
            return;
        };
        let since = *self.store.waits_since.get_or_insert(self.now);
        let generation = self.store.object.status.generation;
        let said = self.store.object.wishes.force.as_ref().is_some_and(|force| force.generation == generation);
        if said || self.now - since < after_us {
            return;
        }
        for client in 0..self.clients.len() {
            self.power_off_client(client, 1_000_000);
        }
        self.counters.count("reached: a person forces a copy");
        self.note(|| format!("a person forces {copies:?} for generation {generation}"));
        self.wish(|wishes| wishes.force = Some(Force { generation, copies }));
    }

    /// A copy that is behind for each group whose `Active` members are all down; `None` = no such group, or a group has
    /// nothing at all.
    fn waiting_groups(&self) -> Option<BTreeSet<CopyId>> {
        let map = self.store.map()?;
        let server = |m: &Member| self.servers.iter().find(|s| s.id == m.server);
        let up = |m: &Member| server(m).is_some_and(|s| s.machine.is_some());
        let there = |m: &&Member| {
            up(m) && server(m).is_some_and(|s| s.disks.iter().any(|d| d.boot().is_some() && d.has_copy(m.copy)))
        };
        let waits = |group: &&Group| !group.in_state(MemberState::Active).any(up);
        let waiting: Vec<&Group> = map.groups().map(|(_, _, group)| group).filter(waits).collect();
        let chosen: Option<BTreeSet<_>> =
            waiting.iter().map(|g| g.members.iter().find(there).map(|m| m.copy)).collect();
        chosen.filter(|copies| !copies.is_empty())
    }

    /// When all is well again nobody needs what was kept beside a forced copy.
    fn person_deletes_kept(&mut self) {
        let retired = &self.store.object.status.retired;
        let kept: Vec<CopyId> = retired.iter().filter(|r| r.kept).map(|r| r.copy).collect();
        let told = &self.store.object.wishes.delete_kept;
        if self.healed && !self.store.gone && kept.iter().any(|copy| !told.contains(copy)) {
            self.wish(|wishes| wishes.delete_kept.extend(kept));
        }
    }

    /// Whether this very map forced a copy of this group.
    pub(super) fn is_forced(&self, map: &VolumeMap, group: &Group) -> bool {
        let forced = &self.store.object.status.forced;
        forced.iter().any(|f| f.generation == map.generation && group.member(f.copy).is_some())
    }

    /// I8: what a forced group held may go back; its copy was named by a person, for the generation before.
    pub(super) fn forced_now(&mut self, map: &VolumeMap) {
        let groups: Vec<u32> =
            map.groups().filter(|(_, _, group)| self.is_forced(map, group)).map(|(_, number, _)| number).collect();
        let geometry = map.geometry(map.top());
        for number in groups {
            self.counters.count("reached: a copy was forced");
            let pages =
                (0..geometry.pages(number)).flat_map(|page| (0..geometry.page_blocks()).map(move |b| (page, b)));
            let address = |(page, block): (u64, u32)| geometry.address_of(number, page, block * 4096) / 4096;
            self.register.forced(pages.map(address));
        }
        let named = |copy| self.store.object.wishes.force.as_ref().is_some_and(|force| force.copies.contains(&copy));
        let forced = &self.store.object.status.forced;
        let unnamed = forced.iter().find(|f| f.generation == map.generation && !named(f.copy)).copied();
        if let Some(forced) = unnamed {
            self.fail("I8", format!("nobody named {forced:?}"));
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

    /// Every copy on every disk, open or not, but for those that are orphans: their disk was away for good.
    fn lying(&self) -> Vec<(usize, CopyId)> {
        let disks = self.servers.iter().enumerate().flat_map(|(n, s)| s.disks.iter().map(move |d| (n, d)));
        let disks = disks.filter(|(_, d)| !d.was_away);
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
            if host.draining && host.disks.iter().all(|d| d.was_away || d.copies().next().is_none()) {
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
