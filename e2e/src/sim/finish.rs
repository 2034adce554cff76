//! The end of a run, after all is healed: every request is answered, the volume becomes whole, everything that was
//! acknowledged is read, all copies are equal and nothing is pending, each within a bound of virtual time.

use super::plan::Ask;
use super::world::World;
use lamina_protocol::map::{MemberState, VolumeMap};

/// Bound on the time from the healing until the volume is whole and everything answered, beside `rebuildAfter`.
const WHOLE_US: u64 = 150_000_000;
/// Bound on the time for the last reads.
const READ_US: u64 = 60_000_000;
/// Idle time after which nothing may be pending: a driver confirms within a second, marks go in batches.
const QUIET_US: u64 = 8_000_000;
/// Within so long nothing is done any more: an idle volume costs nothing.
const IDLE_US: u64 = 3_000_000;
/// Bound on the time until it is so.
const REST_US: u64 = 60_000_000;
/// Bound on the maps committed from the healing to the end.
const MOST_COMMITS: u64 = 30;
/// Bound on how often each page of each member is filled from the healing to the end.
const MOST_FILLS: u64 = 3;
/// Bytes of a page.
const PAGE: u64 = 64 << 10;

/// How far the end is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    NotYet,
    Healing {
        since: u64,
    },
    Reading {
        healed: u64,
        since: u64,
        tags: Vec<u64>,
    },
    /// With what was done, and when that was.
    Quiet {
        healed: u64,
        since: u64,
        work: Option<(u64, Work)>,
    },
}

/// What was done so far and must come to an end when nothing more happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Requests of drivers and of storage servers to each other.
    pub(super) requests: u64,
    /// Pages that one server handed to another.
    pub(super) pages: u64,
    /// Maps committed.
    pub(super) commits: u64,
}

impl World {
    pub(super) fn begin_the_end(&mut self) {
        self.ending = Ending::Healing { since: self.now };
        self.work = Work::default();
        // Somebody must use the volume, so that it can be read.
        if !self.deleting() && !self.clients.iter().any(|c| c.wanted) {
            self.clients[0].wanted = true;
        }
    }

    pub(super) fn watch_the_end(&mut self) {
        match self.ending.clone() {
            Ending::NotYet => {}
            Ending::Healing { since } => self.until_whole(since),
            Ending::Reading { healed, since, tags } => self.until_read(healed, since, &tags),
            Ending::Quiet { healed, since, work } => {
                // What was broken before may still be found out, and must then be mended again.
                if self.missing().is_some() {
                    self.ending = Ending::Healing { since: healed };
                } else {
                    self.until_idle(healed, since, work);
                }
            }
        }
    }

    /// Nothing is done any more for a while, after a time in which it may be: leaders that got in each other's way try
    /// again after a pause.
    fn until_idle(&mut self, healed: u64, since: u64, work: Option<(u64, Work)>) {
        let now = self.now;
        match work {
            Some((at, before)) if before == self.work && now - at > IDLE_US && now - since > QUIET_US => {
                self.last_look();
                self.check_work();
                self.stopped = true;
            }
            Some((_, before)) if before == self.work => {}
            Some((_, before)) if now - since > REST_US => {
                let now = self.work;
                self.fail("bounded work", format!("{REST_US} us after all is quiet {before:?} becomes {now:?}"));
            }
            _ => self.ending = Ending::Quiet { healed, since, work: Some((now, self.work)) },
        }
    }

    /// Bounded work: what came after the healing was in proportion.
    fn check_work(&mut self) {
        let Work { pages, commits, .. } = self.work;
        self.counters.most("most commits after the healing", commits);
        self.counters.most("most pages filled after the healing", pages);
        let all_pages =
            self.store.map().map_or(u64::MAX / MOST_FILLS, |map| map.members().count() as u64 * map.size / PAGE + 1);
        let most_pages = MOST_FILLS * all_pages;
        if commits > MOST_COMMITS || pages > most_pages {
            self.fail("bounded work", format!("{commits} maps and {pages} pages after all was healed"));
        }
    }

    fn until_whole(&mut self, since: u64) {
        let missing = self.missing();
        let Some(missing) = missing else {
            return match self.deleting() {
                true => self.ending = Ending::Quiet { healed: since, since: self.now, work: None },
                false => self.read_everything(since),
            };
        };
        let bound = WHOLE_US + self.plan.setup.rebuild_after_ms * 1_000;
        if self.now - since > bound {
            self.fail("liveness", format!("{} s after all was healed: {missing}", bound / 1_000_000));
        }
    }

    /// What is not yet as it should be.
    fn missing(&self) -> Option<String> {
        if self.deleting() {
            return (!self.store.gone).then(|| format!("the deleted volume is there: {:?}", self.store.object.status));
        }
        let Some(map) = self.store.map() else { return Some("no map was ever committed".into()) };
        if map.size < self.store.object.wishes.size {
            return Some(format!("the volume has {} bytes and is to have more", map.size));
        }
        if let Some(what) = self.not_whole(map) {
            return Some(what);
        }
        for (n, client) in self.clients.iter().enumerate() {
            if !client.device.is_empty() {
                let tags: Vec<String> =
                    client.device.iter().take(4).map(|(t, r)| format!("{t:x} ({})", r.ask)).collect();
                return Some(format!("client {n} waits for {} requests: {}", client.device.len(), tags.join(", ")));
            }
        }
        let reader = self.reader();
        reader.is_none().then(|| "no session was admitted".into())
    }

    fn not_whole(&self, map: &VolumeMap) -> Option<String> {
        let copies = usize::from(self.plan.setup.copies);
        for (_, number, group) in map.groups() {
            let open = |boot| self.servers.iter().any(|s| s.disks.iter().any(|d| d.boot() == Some(boot)));
            let active = group.in_state(MemberState::Active).filter(|m| open(m.boot)).count();
            if active != copies || group.members.len() != active {
                return Some(format!("group {number} of generation {} is {:?}", map.generation, group.members));
            }
        }
        if let Some(what) = self.left_behind(map).filter(|_| !self.store.restored) {
            return Some(what);
        }
        map.settling().then(|| format!("generation {} is still settling", map.generation))
    }

    /// R14: no copy lies where nobody knows of it, and what is retired goes.
    fn left_behind(&self, map: &VolumeMap) -> Option<String> {
        let disks = self.servers.iter().enumerate().flat_map(|(n, s)| s.disks.iter().map(move |d| (n, d)));
        let retired = |copy| self.store.object.status.retired.iter().any(|r| r.copy == copy);
        let known = |disk: &super::disk::Disk, copy| !disk.was_away || retired(copy);
        let lies = disks.flat_map(|(n, d)| d.copies().filter(move |c| known(d, c.copy)).map(move |c| (n, c.copy)));
        let mut stray = lies.filter(|(_, copy)| map.place_of(*copy).is_none());
        let words = |retired| if retired { "it is retired" } else { "it was forgotten" };
        stray
            .next()
            .map(|(n, copy)| format!("copy {copy} lies on server {n}, no map names it, {} (R14)", words(retired(copy))))
    }

    fn reader(&self) -> Option<usize> {
        let map = self.store.map()?;
        self.clients.iter().position(|c| {
            let usable = |a: &super::clients::Attachment| {
                a.staged && !a.lost && !a.dead && !a.draining && a.wished && map.session(a.id).is_some()
            };
            c.attached.as_ref().is_some_and(usable) && !c.processes.is_empty()
        })
    }

    fn read_everything(&mut self, healed: u64) {
        let client = self.reader().expect("looked for before");
        let blocks = self.store.map().map_or(0, |map| map.size / 4096);
        let mut tags = Vec::new();
        let mut at = 0;
        while at < blocks {
            let count = (blocks - at).min(16);
            tags.push(self.ask_now(client, Ask::Read(at, count)));
            at += count;
        }
        self.ending = Ending::Reading { healed, since: self.now, tags };
    }

    fn until_read(&mut self, healed: u64, since: u64, tags: &[u64]) {
        let waiting = tags.iter().find(|tag| self.clients.iter().any(|c| c.device.contains_key(tag)));
        match waiting {
            None => self.ending = Ending::Quiet { healed, since: self.now, work: None },
            Some(tag) if self.now - since > READ_US => {
                self.fail("liveness", format!("the last read {tag:x} was not answered within a minute"));
            }
            Some(_) => {}
        }
    }

    /// H11: no missed bit is left among `Active` members.
    fn left_missed(&self, map: &VolumeMap) -> Option<String> {
        for (_, _, group) in map.groups() {
            let active: u16 = group.in_state(MemberState::Active).map(|m| 1 << m.ordinal).sum();
            for member in group.in_state(MemberState::Active) {
                let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(member.copy));
                let missed = disk.map(|d| d.missed_pages(member.copy, active)).unwrap_or_default();
                if !missed.is_empty() {
                    return Some(format!("{member:?} has pages {missed:?} as missed by members that are Active"));
                }
            }
        }
        None
    }

    fn last_look(&mut self) {
        let Some(map) = self.store.map().cloned() else { return self.counters.count("runs to the end") };
        if let Some((oracle, what)) = self.look_at(&map, true) {
            return self.fail(oracle, format!("after all was quiet: {what}"));
        }
        for member in map.members() {
            let disk = self.servers.iter().flat_map(|s| &s.disks).find(|d| d.has_copy(member.copy));
            let pending = disk.map(|d| d.pending_pages(member.copy)).unwrap_or_default();
            if !pending.is_empty() {
                return self
                    .fail("pending", format!("after all was quiet pages {pending:?} of {member:?} are pending"));
            }
        }
        if let Some(what) = self.left_missed(&map) {
            return self.fail("missed", format!("after all was quiet {what}"));
        }
        self.counters.count("runs to the end");
    }
}
