//! What other members lack, and which pages are suspect (PROTOCOL.md §5.2, §5.3; seed 002 \[0039\]–\[0047\]).
//!
//! ```text
//!        write while j is out, or map without j while pending (H3b)         j is Active again (H11)
//! bit j set ───────────────────────────────────────────────────► missed[j] ────────────────────────► bit j set
//! ```
//! A bit is set durably with or before the write's data, like the pending mark. It is cleared in memory when a map is
//! stored that lists j as `Active`, on disk lazily: a bit that is set on disk for too long costs a page of a later fill,
//! nothing else. Invariant (I6): where two copies differ, one of them says so, or has the page unsynced.

use super::medium::{MAX_COMMIT_RECORDS, MediumOp, Record};
use super::page_ops::{Exec, Work};
use super::volume::{Copy, CopyLayer};
use super::{Owner, StorageServer};
use crate::ids::{BootId, CopyId, VolumeId};
use crate::layer::PageKey;
use crate::map::{Group, MemberState, VolumeMap};
use crate::mutants::{Mutant, on};
use std::collections::BTreeSet;

/// The `missed` mask of one page: bit j = the member of ordinal j may lack a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Missed {
    /// What holds.
    pub(super) mask: u16,
    /// What was handed to the device last.
    disk: u16,
    /// Bits of that which are durable.
    durable: u16,
}

impl Missed {
    pub(super) fn from_disk(mask: u16) -> Self {
        Self { mask, disk: mask, durable: mask }
    }
}

/// The bit of an ordinal.
pub(super) fn bit(ordinal: u8) -> u16 {
    1 << ordinal
}

/// The group of a copy in a map.
pub(super) fn group_of(map: &VolumeMap, copy: CopyId) -> Option<&Group> {
    let (placement, group, _) = map.place_of(copy)?;
    Some(&map.placements[placement as usize].groups[group as usize])
}

/// The members that a write to this copy under this map does not reach.
fn left_out(map: &VolumeMap, copy: CopyId) -> u16 {
    let out =
        |group: &Group| group.in_state(MemberState::Failed).filter(|m| m.copy != copy).map(|m| bit(m.ordinal)).sum();
    group_of(map, copy).map_or(0, out)
}

/// H3b: the members that may have lost, or never got, what is pending when this map is stored.
fn not_kept(map: &VolumeMap, old: Option<&VolumeMap>, copy: CopyId) -> u16 {
    let before = old.and_then(|old| group_of(old, copy));
    let kept = |m: &crate::map::Member| {
        let same = before.and_then(|group| group.member(m.copy)).is_some_and(|was| was.boot == m.boot);
        m.copy == copy || m.state == MemberState::Active && same
    };
    let out = |group: &Group| group.members.iter().filter(|m| !kept(m)).map(|m| bit(m.ordinal)).sum();
    group_of(map, copy).map_or(0, out)
}

/// H11: the members of which an `Active` copy knows by this map that they have everything but what is pending. Ordinals
/// that no member has any more are nobody's.
fn whole(map: &VolumeMap, copy: CopyId, boot: Option<BootId>) -> u16 {
    let Some(group) = group_of(map, copy) else { return 0 };
    let own = group.member(copy).is_some_and(|m| m.state == MemberState::Active && Some(m.boot) == boot);
    if !own {
        return 0;
    }
    let filled = |m: &&crate::map::Member| m.state == MemberState::Active || on(Mutant::RestoredEarly);
    let active: u16 = group.members.iter().filter(filled).map(|m| bit(m.ordinal)).sum();
    let listed: u16 = group.members.iter().map(|m| bit(m.ordinal)).sum();
    active | !listed
}

impl CopyLayer {
    /// Bit j is clear: the page is pending, or missed by that member.
    fn lacks_bit(&self, page: u64, towards: u8) -> bool {
        let missed = self.missed.get(&page).is_some_and(|missed| missed.mask & bit(towards) != 0);
        missed || self.pending.contains_key(&page)
    }

    /// `suspect(a, j)` (PROTOCOL.md §5.3), the half that this copy knows, towards the member of that ordinal: its bit is
    /// clear here, or the page is unsynced here. A page is suspect if either of the two copies says so.
    pub(super) fn is_suspect(&self, page: u64, towards: u8) -> bool {
        self.lacks_bit(page, towards) || page >= self.cursor || self.unsynced.contains(&page)
    }

    /// The suspect pages below a number of pages, but for those that are unsynced by the mark of the layer and no more: of
    /// such a page nothing is known here, and what clients or a fill made of it since is what the others have, or its bits
    /// say otherwise.
    pub(super) fn suspects(&self, towards: u8, pages: u64) -> BTreeSet<u64> {
        let known = self.pending.keys().chain(self.missed.keys()).chain(&self.unsynced).copied();
        known.filter(|page| *page < pages && self.is_suspect(*page, towards)).collect()
    }

    /// The same without what is unsynced and no more: that is filled anyway.
    pub(super) fn suspects_to_settle(&self, towards: u8, pages: u64) -> BTreeSet<u64> {
        let known = self.pending.keys().chain(self.missed.keys()).copied();
        known.filter(|page| *page < pages && self.lacks_bit(*page, towards)).collect()
    }

    /// Sets bits of a page; the mask that is to be made durable, if that is not under way.
    fn miss(&mut self, page: u64, bits: u16) -> Option<u16> {
        if bits == 0 {
            return None;
        }
        let missed = self.missed.entry(page).or_default();
        missed.mask |= bits;
        if missed.mask == missed.disk {
            return None;
        }
        missed.disk = missed.mask;
        Some(missed.mask)
    }

    /// What was handed to the device last for a page found no room there. Bits that are set stay: they say too much.
    pub(super) fn miss_refused(&mut self, page: u64) {
        if let Some(missed) = self.missed.get_mut(&page) {
            missed.disk = missed.durable;
        }
    }

    /// Clears bits of a page that is not pending, in memory.
    fn restore(&mut self, page: u64, bits: u16) {
        let Some(missed) = self.missed.get_mut(&page) else { return };
        missed.mask &= !bits;
        if missed.mask != missed.disk {
            self.unwritten.insert(page);
        }
    }

    /// The mask to be written, if the device has another one. Forgets a page that nobody misses.
    fn take_unwritten(&mut self, page: u64) -> Option<u16> {
        let missed = self.missed.get_mut(&page)?;
        let Missed { mask, disk, .. } = *missed;
        (missed.disk, missed.durable) = (mask, missed.durable & mask);
        if mask == 0 {
            self.missed.remove(&page);
        }
        (mask != disk).then_some(mask)
    }
}

impl Copy {
    /// H3b: what is pending when a map is stored may be lacking at every member that is not `Active` in it under an
    /// unchanged boot id.
    pub(super) fn miss_pending(&mut self, map: &VolumeMap, old: Option<&VolumeMap>) -> Vec<Record> {
        let (copy, bits) = (self.record.copy, not_kept(map, old, self.record.copy));
        let mut records = Vec::new();
        if on(Mutant::PendingNotMissed) {
            return records;
        }
        for (layer_id, layer) in &mut self.layers {
            let pages: Vec<u64> = layer.pending.keys().copied().collect();
            for page in pages {
                if let Some(mask) = layer.miss(page, bits) {
                    records.push(Record::Missed { page: PageKey { copy, layer: *layer_id, page }, mask });
                }
            }
        }
        records
    }

    /// H11: every member that this map lists as `Active` has all of every page that is not pending.
    pub(super) fn restore_all(&mut self, map: &VolumeMap) {
        let bits = whole(map, self.record.copy, self.boot);
        for layer in self.layers.values_mut() {
            let idle = layer.missed.keys().filter(|page| !layer.pending.contains_key(*page));
            let pages: Vec<u64> = idle.copied().collect();
            pages.into_iter().for_each(|page| layer.restore(page, bits));
        }
    }

    /// H11 for pages that are pending no more.
    pub(super) fn restore_pages(&mut self, map: &VolumeMap, cleared: &[PageKey]) {
        let bits = whole(map, self.record.copy, self.boot);
        for page in cleared {
            if let Some(layer) = self.layers.get_mut(&page.layer) {
                layer.restore(page.page, bits);
            }
        }
    }

    /// Some of the masks that differ on disk, and whether those are all.
    pub(super) fn take_unwritten(&mut self) -> (Vec<Record>, bool) {
        let copy = self.record.copy;
        let mut records = Vec::new();
        for (layer_id, layer) in &mut self.layers {
            while let Some(page) = layer.unwritten.pop_first() {
                if records.len() == MAX_COMMIT_RECORDS {
                    layer.unwritten.insert(page);
                    return (records, false);
                }
                if let Some(mask) = layer.take_unwritten(page) {
                    records.push(Record::Missed { page: PageKey { copy, layer: *layer_id, page }, mask });
                }
            }
        }
        (records, true)
    }
}

impl StorageServer {
    /// The members that will lack what an execution does to its page, or that a peer says lack it (H8, H9).
    fn missed_by(&self, exec: &Exec) -> u16 {
        let Some(map) = self.volumes.get(&exec.volume).and_then(|known| known.map.as_ref()) else { return 0 };
        let copy = exec.page.copy;
        match &exec.work {
            Work::Write { .. } | Work::Discard { .. } if !on(Mutant::MissedNotSet) => left_out(map, copy),
            Work::Apply(apply) if !on(Mutant::FillDropsMissed) => {
                let own = group_of(map, copy).and_then(|group| group.member(copy)).map_or(0, |m| bit(m.ordinal));
                apply.missed & !own
            }
            _ => 0,
        }
    }

    /// Notes who lacks what an execution does; the record that makes it durable, if it is not on its way.
    pub(super) fn miss_for(&mut self, exec: super::page_ops::ExecId) -> Option<(Record, u16)> {
        let exec = &self.execs[&exec];
        let (bits, page) = (self.missed_by(exec), exec.page);
        let mask = self.known(exec.volume).layer_mut(&page)?.miss(page.page, bits)?;
        Some((Record::Missed { page, mask }, mask))
    }

    /// A commit that held this mask is durable.
    pub(super) fn missed_durable(&mut self, volume: VolumeId, page: PageKey, mask: u16) {
        let missed = self.known(volume).layer_mut(&page).and_then(|layer| layer.missed.get_mut(&page.page));
        if let Some(missed) = missed {
            missed.durable |= mask & missed.disk;
        }
    }

    /// Whether it is durable who lacks what an execution does.
    pub(super) fn is_miss_durable(&self, exec: &Exec) -> bool {
        let bits = self.missed_by(exec);
        let layer = || self.volumes.get(&exec.volume)?.copies.get(&exec.page.copy)?.layers.get(&exec.page.layer);
        let durable = || layer().and_then(|l| l.missed.get(&exec.page.page)).map_or(0, |missed| missed.durable);
        bits == 0 || bits & !durable() == 0
    }

    /// Writes some of the masks that were cleared in memory; more of them after that.
    pub(super) fn write_restored(&mut self, volume: VolumeId) {
        let known = self.known(volume);
        let mut commits = Vec::new();
        let mut all = true;
        for copy in known.copies.values_mut() {
            let Some(boot) = copy.boot else { continue };
            let (records, whole) = copy.take_unwritten();
            all &= whole;
            commits.extend((!records.is_empty()).then_some((boot, records)));
        }
        for (boot, records) in commits {
            self.known(volume).executing += 1;
            self.medium(boot, Owner::Clear(volume), MediumOp::Commit(records));
        }
        if !all {
            self.clear_soon(volume);
        }
    }
}
