//! One volume in the leader: what is known of it, and what it takes up next.
//!
//! Nothing here is durable; a new leader starts from the object alone and counts every wait from its own start.

use super::cluster::Inventory;
use super::condition::{Condition, Event, EventReason};
use super::diverged::Doubt;
use super::heartbeat::Servers;
use super::object::{Guard, Purpose, Status, VolumeObject, WriteKind};
use super::pace::{FillBudget, Filling, Pace};
use super::reconfigure::Change;
use super::serve::{Deleting, Served};
use super::{CallId, Output, Source, Step, Written};
use crate::control::{ControlReply, ControlRequest};
use crate::ids::{CopyId, Generation, ServerId, VolumeId};
use crate::map::{MemberState, VolumeMap};
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// A write whose outcome nobody knows is sent again after this long, milliseconds.
const REWRITE_MS: u64 = 500;
/// A member that a driver got no progress out of stays out for so long, milliseconds.
const STALLED_OUT_MS: u64 = 30_000;
/// A newer state of the object with an older status is a leader's own write still on its way for so long, milliseconds.
const OLDER_MS: u64 = 2_000;
/// While a settle runs its servers are asked this often, milliseconds.
const HURRY_MS: u64 = 100;

/// What a call to a server is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Heartbeat,
    Inventory,
    Put(CopyId),
    Flush,
    Fence(Generation),
    Suspects(Generation, CopyId),
    Rejoin(Generation, CopyId),
    Serve(Generation),
    Delete(CopyId),
    Ask,
    Limit,
    Reach(ServerId),
}

/// A call that was not answered yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) server: ServerId,
    pub(super) volume: Option<VolumeId>,
    pub(super) what: What,
    pub(super) sent: Millis,
}

/// All calls and writes under way.
#[derive(Debug, Default)]
pub(super) struct Calls {
    last: u64,
    pub(super) pending: BTreeMap<CallId, Call>,
}

impl Calls {
    pub(super) fn name(&mut self) -> CallId {
        self.last += 1;
        CallId(self.last)
    }
}

/// What a volume may see and do while it is advanced.
pub(super) struct World<'a> {
    pub(super) now: Millis,
    pub(super) servers: &'a mut Servers,
    pub(super) calls: &'a mut Calls,
    pub(super) mint: &'a mut (dyn FnMut() -> u128 + Send),
    /// Bytes promised on servers, by volume.
    pub(super) rooms: &'a BTreeMap<VolumeId, Vec<(ServerId, u64)>>,
    /// Copies that are filled, by volume, as of when each volume was looked at last.
    pub(super) filling: &'a BTreeMap<VolumeId, Filling>,
    pub(super) fill_budget: FillBudget,
    pub(super) inventories: &'a BTreeMap<ServerId, Inventory>,
    /// A number of the Lease above the one found was heard: every server is asked before a change (R6).
    pub(super) restored: bool,
    pub(super) out: &'a mut Vec<Output>,
    /// When the volume wants to be looked at again.
    pub(super) wake: Millis,
}

impl World<'_> {
    pub(super) fn ask(&mut self, server: ServerId, volume: VolumeId, what: What, request: ControlRequest) {
        let call = self.calls.name();
        self.calls.pending.insert(call, Call { server, volume: Some(volume), what, sent: self.now });
        self.out.push(Output::Control { server, call, request });
    }

    pub(super) fn wake_at(&mut self, at: Millis) {
        self.wake = self.wake.min(at);
    }
}

/// A write that was not answered yet.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) call: Option<CallId>,
    pub(super) kind: WriteKind,
    pub(super) guard: Guard,
    pub(super) next: Status,
    again_at: Millis,
}

/// Fences that a server left unanswered.
#[derive(Clone, Copy, Debug)]
pub(super) struct FenceSilence {
    /// Since the first of them.
    pub(super) since: Millis,
    /// The last of them was sent then.
    pub(super) asked: Millis,
}

/// One volume.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) object: VolumeObject,
    /// The object is being read anew; nothing is done until it is here.
    pub(super) reading: bool,
    /// The last that a watch brought since then: it may be later than what is read.
    watched_meanwhile: Option<VolumeObject>,
    /// A watch brought a state older than the one known: it was late, or the API server has gone back (R6).
    to_read: bool,
    /// Since when the newest state that a watch brought has an older status than the one known: what this leader wrote is
    /// not in it yet, or the API server has gone back under new versions (R6).
    older_since: Option<Millis>,
    pub(super) change: Option<Change>,
    pub(super) write: Option<Write>,
    pub(super) release: Option<CallId>,
    /// The finalizer is gone; the object soon will be.
    released: bool,
    /// A promise above the committed generation is known, or a proposal that is not ours: fence again.
    pub(super) must: bool,
    /// Highest promise heard of.
    pub(super) floor: Generation,
    pub(super) retry_at: Millis,
    pub(super) tries: u32,
    pub(super) served: BTreeMap<ServerId, Served>,
    pub(super) serving_told: Generation,
    /// The generation of which servers' views have heard.
    pub(super) viewed: Generation,
    pub(super) deleting: BTreeMap<CopyId, Deleting>,
    /// Since when a member is `Failed` as this leader knows.
    pub(super) failed_since: BTreeMap<CopyId, Millis>,
    /// Members that a driver got no progress out of, under the committed generation, and when it said so.
    pub(super) stalled: BTreeMap<CopyId, Millis>,
    /// `Failed` members that do not rejoin before then.
    pub(super) barred_until: BTreeMap<CopyId, Millis>,
    /// How often the list of suspect pages for a member that is out came too late.
    pub(super) late_lists: BTreeMap<CopyId, u8>,
    /// Copies that their server did not have when it was asked, and since when: it may not have opened all devices.
    pub(super) missing: BTreeMap<CopyId, Millis>,
    /// Copies that their server does not have any more.
    pub(super) lost: BTreeSet<CopyId>,
    /// Members of which a driver says that they do not serve: a fence finds out.
    pub(super) suspects: BTreeSet<CopyId>,
    /// Since when a server has left fences unanswered.
    pub(super) fence_silent: BTreeMap<ServerId, FenceSilence>,
    /// Servers that had no room lately.
    pub(super) full: BTreeMap<ServerId, Millis>,
    /// When the map with members left out was first known to this leader (M7).
    pub(super) unpromised_since: Option<Millis>,
    /// Since when restarted members wait for a silent one (R15).
    pub(super) silent_since: Option<Millis>,
    pub(super) doubt: Doubt,
    /// A stored generation above the object's, heard before it was read anew.
    pub(super) heard: Generation,
    /// A person decided that stored maps up to this generation are given up (R6).
    pub(super) adopted: Generation,
    pub(super) conditions: Vec<Condition>,
    pub(super) refusal: Option<super::placement::Refusal>,
    pub(super) hold: Option<super::plan::Hold>,
    pub(super) progress: super::progress::Progress,
    /// What servers were told of the pace of fills.
    pub(super) paces: BTreeMap<ServerId, Pace>,
}

impl Volume {
    pub(super) fn new(object: VolumeObject, now: Millis) -> Self {
        let mut volume = Self {
            object,
            reading: false,
            watched_meanwhile: None,
            to_read: false,
            older_since: None,
            change: None,
            write: None,
            release: None,
            released: false,
            must: false,
            floor: Generation(0),
            retry_at: Millis(0),
            tries: 0,
            served: BTreeMap::new(),
            serving_told: Generation(0),
            viewed: Generation(0),
            deleting: BTreeMap::new(),
            failed_since: BTreeMap::new(),
            stalled: BTreeMap::new(),
            barred_until: BTreeMap::new(),
            late_lists: BTreeMap::new(),
            missing: BTreeMap::new(),
            lost: BTreeSet::new(),
            suspects: BTreeSet::new(),
            fence_silent: BTreeMap::new(),
            full: BTreeMap::new(),
            unpromised_since: None,
            silent_since: None,
            doubt: Doubt::Unasked,
            heard: Generation(0),
            adopted: Generation(0),
            conditions: Vec::new(),
            refusal: None,
            hold: None,
            progress: super::progress::Progress::default(),
            paces: BTreeMap::new(),
        };
        volume.found(now);
        volume
    }

    pub(super) fn id(&self) -> VolumeId {
        self.object.id
    }

    pub(super) fn status(&self) -> &Status {
        &self.object.status
    }

    pub(super) fn map(&self) -> Option<&VolumeMap> {
        self.object.status.map.as_ref()
    }

    /// The object is new or changed. What a watch brings may be older than what this leader wrote itself, and older than
    /// what it has read: wishes never go back, or a session that is out would be admitted a second time.
    pub(super) fn take(&mut self, now: Millis, object: VolumeObject, source: Source) {
        match source {
            Source::Watched => self.take_watched(now, object),
            Source::Read => self.take_read(now, object),
        }
    }

    fn take_watched(&mut self, now: Millis, object: VolumeObject) {
        if object.version < self.object.version {
            self.to_read = true;
            return;
        }
        if self.reading {
            self.watched_meanwhile = Some(object.clone());
        }
        let older = rank(&object.status) < rank(self.status());
        self.older_since = if older { self.older_since.or(Some(now)) } else { None };
        if older || self.reading || self.write.is_some() || self.change.is_some() {
            self.object = VolumeObject { status: std::mem::take(&mut self.object.status), ..object };
            return;
        }
        let news = object.status != *self.status();
        self.object = object;
        if news {
            self.found(now);
        }
    }

    /// What is read is believed. Nobody makes an object older but who puts back an old copy of all of them (R6).
    fn take_read(&mut self, now: Millis, object: VolumeObject) {
        let object = match self.watched_meanwhile.take() {
            Some(watched) if watched.version > object.version => watched,
            _ => object,
        };
        let went_back = object.version < self.object.version || rank(&object.status) < rank(self.status());
        self.object = object;
        self.found(now);
        (self.reading, self.older_since) = (false, None);
        self.doubt_what_was_read(went_back);
    }

    /// Looks at a status that this leader did not write, or reads again.
    fn found(&mut self, now: Millis) {
        self.change = None;
        let proposed = self.object.status.proposed.as_ref();
        self.must |= proposed.is_some_and(|p| p.purpose != Purpose::Void);
        self.committed(now);
    }

    /// A committed map is new here: what was known of members by their old state is brought up to date.
    pub(super) fn committed(&mut self, now: Millis) {
        let Some(map) = self.object.status.map.as_ref() else { return };
        let unpromised = map.members().any(|m| m.unpromised);
        self.unpromised_since = if unpromised { self.unpromised_since.or(Some(now)) } else { None };
        let failed: BTreeSet<_> = map.members().filter(|m| m.state == MemberState::Failed).map(|m| m.copy).collect();
        self.failed_since.retain(|copy, _| failed.contains(copy));
        for copy in failed {
            if self.stalled.contains_key(&copy) {
                self.barred_until.insert(copy, now.after(STALLED_OUT_MS));
            }
            self.failed_since.entry(copy).or_insert(now);
        }
        let there = |copy: &CopyId| map.place_of(*copy).is_some();
        self.lost.retain(there);
        self.suspects.clear();
        // What stalled under an older generation may have been parked by the change.
        self.stalled.clear();
        let serving = super::reconfigure::serving(map);
        self.fence_silent.retain(|server, _| serving.contains(server));
        self.barred_until.retain(|copy, until| there(copy) && *until > now);
    }

    /// Reads the object anew, past every cache.
    pub(super) fn read(&mut self, world: &mut World<'_>) {
        self.reading = true;
        (self.to_read, self.older_since) = (false, None);
        self.watched_meanwhile = None;
        self.change = None;
        self.write = None;
        world.out.push(Output::Read { volume: self.id() });
    }

    /// Sends a write whose guard is what is known to stand there.
    pub(super) fn write(&mut self, world: &mut World<'_>, kind: WriteKind, next: Status) {
        assert!(self.write.is_none(), "one write at a time");
        let guard = self.status().guard();
        self.write = Some(Write { call: None, kind, guard, next, again_at: world.now });
        self.send_write(world);
    }

    fn send_write(&mut self, world: &mut World<'_>) {
        let volume = self.id();
        let Some(write) = self.write.as_mut().filter(|w| w.call.is_none() && w.again_at <= world.now) else { return };
        let call = world.calls.name();
        write.call = Some(call);
        let (kind, guard, next) = (write.kind, write.guard.clone(), write.next.clone());
        world.out.push(Output::Write { volume, call, kind, guard, next });
    }

    /// A write of this volume ended; `false` = it is not one that is awaited.
    pub(super) fn written(&mut self, world: &mut World<'_>, call: CallId, outcome: Written) {
        if self.release == Some(call) {
            self.release = None;
            match outcome {
                Written::Done => self.released = true,
                Written::Conflict | Written::Unknown => self.read(world),
            }
            return;
        }
        let Some(write) = self.write.as_mut().filter(|w| w.call == Some(call)) else { return };
        match outcome {
            Written::Conflict => self.read(world),
            Written::Unknown => {
                write.call = None;
                write.again_at = world.now.after(REWRITE_MS);
            }
            Written::Done => {
                let write = self.write.take().expect("found above");
                let before = std::mem::replace(&mut self.object.status, write.next);
                self.stands(world, write.kind, before);
            }
        }
    }

    /// A write stands.
    fn stands(&mut self, world: &mut World<'_>, kind: WriteKind, before: Status) {
        match kind {
            WriteKind::Intent => self.intended(world),
            WriteKind::Commit | WriteKind::GiveUp => self.change_committed(world, kind, &before),
            WriteKind::Retract => self.change = None,
            WriteKind::Retired => {}
            WriteKind::Delete => self.change = None,
            WriteKind::Adopt => {
                self.must = true;
                self.committed(world.now);
                let text = format!("the map of generation {} was adopted", self.status().generation);
                self.tell(world, EventReason::Adopted, text);
            }
        }
    }

    pub(super) fn tell(&self, world: &mut World<'_>, reason: EventReason, text: String) {
        world.out.push(Output::Event(Event { volume: Some(self.id()), server: None, reason, text }));
    }

    pub(super) fn passed(&self, world: &mut World<'_>, generation: Generation, step: Step) {
        world.out.push(Output::Passed { volume: self.id(), generation, step });
    }

    /// A server answered a call of this volume, or could not (`None`).
    pub(super) fn answered(&mut self, world: &mut World<'_>, call: Call, reply: Option<ControlReply>) {
        self.compare_stored(world, reply.as_ref());
        match call.what {
            What::Serve(generation) => self.serve_answered(world, call.server, generation, reply),
            What::Delete(copy) => self.delete_answered(world, call.server, copy, reply),
            What::Ask => self.ask_answered(call.server, reply),
            What::Limit => self.limit_answered(call.server, reply),
            What::Put(copy) => self.put_answered(world, copy, call.server, reply),
            What::Flush => self.flush_answered(call.server),
            What::Fence(generation) => self.fence_answered(world, call.server, generation, reply),
            What::Suspects(generation, copy) => self.suspects_answered(world, (generation, copy), reply),
            What::Rejoin(generation, copy) => self.rejoin_answered(world, call.server, (generation, copy), reply),
            What::Heartbeat | What::Inventory | What::Reach(_) => {}
        }
    }

    /// Whether a heartbeat's answer from this server may end a wait of this volume.
    pub(super) fn waits_for_word(&self, server: ServerId) -> bool {
        let works = |m: &crate::map::Member| m.state == MemberState::Syncing;
        self.map().is_some_and(|map| map.members().any(|m| m.server == server && (map.settling() || works(m))))
    }

    /// Does all that can be done now.
    pub(super) fn advance(&mut self, world: &mut World<'_>) {
        self.send_write(world);
        if let Some(write) = self.write.as_ref().filter(|w| w.call.is_none()) {
            world.wake_at(write.again_at);
        }
        if self.released {
            return;
        }
        self.wait_for_own_status(world);
        if self.to_read && !self.reading && self.is_at_rest() {
            self.read(world);
        }
        if !self.reading && self.write.is_none() && self.release.is_none() && self.is_beyond_doubt(world) {
            if self.map().is_some_and(VolumeMap::settling) {
                // Sessions are held: the end of the settle is to be heard of soon.
                let serving = self.map().map(super::reconfigure::serving).unwrap_or_default();
                serving.into_iter().for_each(|id| world.servers.hurry(id, world.now.after(HURRY_MS)));
            }
            if self.change.is_some() {
                self.advance_change(world);
            }
            if self.write.is_none() && self.change.is_none() {
                self.take_up(world);
            }
            self.limit_fills(world);
            self.serve(world);
        }
        self.show(world);
    }

    /// The watch brought an older status under a newer version: what follows it tells whether that was late.
    fn wait_for_own_status(&mut self, world: &mut World<'_>) {
        let Some(since) = self.older_since else { return };
        if world.now.since(since) >= OLDER_MS {
            (self.to_read, self.older_since) = (true, None);
        } else {
            world.wake_at(since.after(OLDER_MS));
        }
    }

    /// Nothing of this leader's own is under way.
    fn is_at_rest(&self) -> bool {
        self.change.is_none() && self.write.is_none() && self.release.is_none()
    }

    /// Nothing is under way: deletion first, then what was retired, then whatever the plan wants.
    fn take_up(&mut self, world: &mut World<'_>) {
        if self.delete(world) {
            return;
        }
        self.delete_retired(world);
        if self.write.is_none() && !self.object.wishes.deleted | self.map().is_some() {
            self.start_change(world);
        }
    }
}

/// Which of two statuses is the later one; equal = they may be the same.
fn rank(status: &Status) -> (Generation, Generation) {
    (status.highest(), status.generation)
}
