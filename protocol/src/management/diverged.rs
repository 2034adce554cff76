//! An API server restored from an old copy, and objects applied without their status (PROTOCOL.md §3, R6).
//!
//! ```text
//! Unasked ──a higher Lease number was heard, or a map is missing──> Asking ──all answered, none newer──> Clear
//!    │                                                                │
//!    └──a stored committed generation above the object's──> Diverged <┘  ──a person adopts a map──> Clear
//! ```
//!
//! In `Asking` and `Diverged` nothing of the volume is changed.

use super::condition::EventReason;
use super::object::{Proposal, Purpose, RetiredCopy, Status, WriteKind};
use super::serve::{AGAIN_MS, retire};
use super::volume::{Volume, What, World};
use crate::control::{ControlReply, ControlRequest, VolumeReport};
use crate::ids::{Generation, ServerId};
use crate::map::VolumeMap;
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet};

/// What is doubted about a volume's object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Nobody was asked, for there is no reason.
    Unasked,
    /// All that must answer did, or a person decided.
    Clear,
    /// Servers are asked what they store.
    Asking(Asked),
    /// One stores a newer committed map.
    Diverged(Asked),
}

/// Who was asked, and what was found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Asked {
    at: BTreeMap<ServerId, Millis>,
    found: BTreeMap<ServerId, Option<VolumeReport>>,
    /// The highest stored generation heard of.
    highest: Generation,
    /// The object was read since that was heard: another leader may have committed what is stored.
    compared: bool,
}

impl Asked {
    /// The highest committed generation that a server stores.
    pub(super) fn highest(&self) -> Generation {
        self.highest
    }

    fn heard(&mut self, stored: Generation) {
        if stored > self.highest {
            self.highest = stored;
            self.compared = false;
        }
    }

    /// The committed map of this generation, as some server stores it.
    fn map_of(&self, generation: Generation) -> Option<&VolumeMap> {
        let mut maps = self.found.values().flatten().filter_map(|report| report.map.as_ref());
        maps.rfind(|map| map.generation == generation && map.validate().is_ok())
    }
}

impl Volume {
    /// Another reason to ask everybody.
    pub(super) fn doubt_anew(&mut self) {
        if self.doubt == Doubt::Clear {
            self.doubt = Doubt::Unasked;
        }
    }

    /// Everybody was asked, and there is no doubt.
    pub(super) fn is_clear(&self) -> bool {
        self.doubt == Doubt::Clear
    }

    /// Whether this volume may be changed. Asks servers if it is not known.
    pub(super) fn is_beyond_doubt(&mut self, world: &mut World<'_>) -> bool {
        if !self.is_sound() {
            return false;
        }
        let blank = self.map().is_none() && self.status().generation == Generation(0);
        let reapplied = blank && !self.object.id_is_new && self.status().proposed.is_none();
        if self.doubt == Doubt::Unasked && (world.restored || reapplied) {
            self.doubt = Doubt::Asking(Asked::default());
        }
        match self.doubt {
            Doubt::Unasked | Doubt::Clear => return true,
            Doubt::Asking(_) | Doubt::Diverged(_) => {}
        }
        self.ask_all(world);
        self.settle_doubt(world)
    }

    /// Everybody known, and whoever the object or a stored map names.
    pub(super) fn must_answer(&self, world: &World<'_>) -> BTreeSet<ServerId> {
        let mut all: BTreeSet<_> = world.servers.by_id.keys().copied().collect();
        let (Doubt::Asking(asked) | Doubt::Diverged(asked)) = &self.doubt else { return all };
        let stored = asked.found.values().flatten().filter_map(|report| report.map.as_ref());
        for map in stored.chain(self.map()) {
            all.extend(map.members().map(|m| m.server));
        }
        all.extend(self.status().proposed.iter().flat_map(|p| &p.copies).map(|new| new.server));
        all
    }

    /// Those that have not answered yet.
    pub(super) fn unanswered(&self, world: &World<'_>) -> Vec<ServerId> {
        let (Doubt::Asking(asked) | Doubt::Diverged(asked)) = &self.doubt else { return Vec::new() };
        self.must_answer(world).into_iter().filter(|id| !asked.found.contains_key(id)).collect()
    }

    fn ask_all(&mut self, world: &mut World<'_>) {
        let volume = self.id();
        for id in self.unanswered(world) {
            world.servers.meet(world.now, id);
            let (Doubt::Asking(asked) | Doubt::Diverged(asked)) = &mut self.doubt else { return };
            let due = asked.at.get(&id).is_none_or(|at| world.now.since(*at) >= AGAIN_MS);
            if due && world.servers.is_alive(id) {
                asked.at.insert(id, world.now);
                world.ask(id, volume, What::Ask, ControlRequest::GetVolume { volume });
            }
            world.wake_at(world.now.after(AGAIN_MS));
        }
    }

    pub(super) fn ask_answered(&mut self, server: ServerId, reply: Option<ControlReply>) {
        let (Doubt::Asking(asked) | Doubt::Diverged(asked)) = &mut self.doubt else { return };
        let Some(ControlReply::Volume { volume }) = reply else { return };
        if let Some(report) = &volume {
            self.floor = self.floor.max(report.promised);
            asked.heard(report.map.as_ref().map_or(Generation(0), |map| map.generation));
        }
        asked.found.insert(server, volume);
    }

    /// Takes a decision if there is one; `true` = the volume may be changed.
    fn settle_doubt(&mut self, world: &mut World<'_>) -> bool {
        let generation = self.tolerated();
        match &self.doubt {
            // What this leader knows of the object may be older than what is stored: it is read before anything is said.
            Doubt::Asking(asked) if asked.highest > generation && !asked.compared => {
                if !self.reading {
                    self.read(world);
                }
                false
            }
            Doubt::Asking(asked) if asked.highest > generation => {
                let asked = asked.clone();
                let text = format!(
                    "a server stores the committed generation {}, the object has {generation}: nothing is changed until \
                     a person says which map to adopt (`adopt`, by default {})",
                    asked.highest, asked.highest
                );
                self.doubt = Doubt::Diverged(asked.clone());
                self.tell(world, EventReason::Diverged, text);
                // A person may have said so before: nobody wakes this volume when all have answered.
                self.adopt(world, &asked);
                false
            }
            Doubt::Asking(_) if self.unanswered(world).is_empty() => {
                self.doubt = Doubt::Clear;
                true
            }
            Doubt::Diverged(asked) if asked.highest <= generation => {
                self.doubt = Doubt::Unasked;
                true
            }
            Doubt::Diverged(asked) => {
                let asked = asked.clone();
                self.adopt(world, &asked);
                false
            }
            Doubt::Asking(_) | Doubt::Unasked | Doubt::Clear => false,
        }
    }

    /// Stored generations up to this are no surprise: the object's own, or what a person decided to give up.
    fn tolerated(&self) -> Generation {
        let status = self.status();
        let adopted = status.proposed.as_ref().filter(|p| p.purpose == Purpose::Adopted);
        adopted.map_or(status.generation, |p| p.generation.max(status.generation)).max(self.adopted)
    }

    fn adopt(&mut self, world: &mut World<'_>, asked: &Asked) {
        let Some(wanted) = self.object.wishes.adopt else { return };
        let status = self.status().clone();
        let map = if wanted == status.generation { status.map.clone() } else { asked.map_of(wanted).cloned() };
        let Some(map) = map.filter(|map| map.generation >= status.generation) else { return };
        let above = status.highest().max(self.floor).max(asked.highest);
        let mut retired: Vec<_> = status.retired.iter().filter(|r| map.place_of(r.copy).is_none()).copied().collect();
        let named = status.map.iter().flat_map(|m| m.members()).map(|m| (m.copy, m.server));
        let made = status.proposed.iter().flat_map(|p| &p.copies).map(|new| (new.copy, new.server));
        for (copy, server) in named.chain(made).filter(|(copy, _)| map.place_of(*copy).is_none()) {
            retire(&mut retired, RetiredCopy { copy, server, generation: map.generation, kept: false });
        }
        let proposal =
            Proposal { generation: above, name: (world.mint)(), purpose: Purpose::Adopted, copies: Vec::new() };
        self.adopted = above;
        self.doubt = Doubt::Clear;
        let generation = map.generation;
        let next = Status { generation, map: Some(map), proposed: Some(proposal), retired, ..status };
        self.write(world, WriteKind::Adopt, next);
    }

    /// Any reply that shows a stored committed generation above the object's stops every change of the volume.
    pub(super) fn compare_stored(&mut self, world: &mut World<'_>, reply: Option<&ControlReply>) {
        let stored = match reply {
            Some(ControlReply::Promised(promised)) => promised.stored,
            Some(ControlReply::Refused { stored, .. }) => *stored,
            _ => return,
        };
        self.heard_stored(world, stored);
    }

    /// A server stores this committed generation. Another leader may have committed it just now: the object is read
    /// first.
    pub(super) fn heard_stored(&mut self, world: &mut World<'_>, stored: Generation) {
        if on(Mutant::StoredNotCompared)
            || stored <= self.tolerated()
            || (self.map().is_none() && self.object.wishes.deleted)
        {
            return;
        }
        match &mut self.doubt {
            Doubt::Diverged(asked) | Doubt::Asking(asked) => asked.heard(stored),
            Doubt::Unasked | Doubt::Clear => {
                // A write under way whose outcome is not known may be what is stored.
                let ours = self.write.as_ref().is_some_and(|w| w.next.generation >= stored);
                if !ours && !self.reading {
                    self.heard = stored;
                    self.read(world);
                }
            }
        }
    }

    /// The object was read anew: does it still lag behind what a server stores, has it gone back, and does a decision to
    /// adopt a map stand in it?
    pub(super) fn doubt_what_was_read(&mut self, went_back: bool) {
        let heard = std::mem::take(&mut self.heard);
        let adopted = std::mem::take(&mut self.adopted);
        let tolerated = self.tolerated();
        let doubtful = heard > tolerated || adopted > tolerated || went_back;
        if doubtful && !matches!(self.doubt, Doubt::Diverged(_)) {
            self.doubt = Doubt::Asking(Asked { highest: heard, ..Asked::default() });
        }
        if let Doubt::Asking(asked) = &mut self.doubt {
            asked.compared = true;
        }
    }

    /// A map that contradicts itself or its object is nothing to plan from.
    pub(super) fn is_sound(&self) -> bool {
        self.map().is_none_or(|map| {
            map.volume == self.id() && map.generation == self.status().generation && map.validate().is_ok()
        })
    }
}
