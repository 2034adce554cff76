//! Pending marks and `confirmed` (I3, H3, H4; seed 002 \[0041\]–\[0047\]).
//!
//! ```text
//!         first touch                  commit durable                  confirmed covers every writer
//! clean ─────────────► being marked ─────────────────► pending ─────────────────────────────────────► clean
//! ```
//! The mark is durable before the write's data is acknowledged, can be read or copied by a fill, or can be durable. It
//! is cleared lazily and batched. A page that was pending when the device was opened is suspect and never cleared by
//! `confirmed`, only by the end of a settle.

use super::medium::{MAX_COMMIT_RECORDS, MediumOp, Record};
use super::page_ops::{Exec, ExecId, Work};
use super::volume::CopyLayer;
use super::{Due, Owner, StorageServer};
use crate::ids::{BootId, CopyId, Incarnation, Seq, SessionId, VolumeId};
use crate::layer::PageKey;
use crate::map::VolumeMap;
use crate::mutants::{Mutant, on};
use crate::wire::{HandleId, Opener};

/// How long marks that may go wait for others to go with them, in milliseconds.
const CLEAR_BATCH_MS: u64 = 50;

/// The pending mark of one page.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    /// Last seq of each (session, incarnation) that wrote to it, or whose writes a fill brought.
    pub(super) writers: Vec<((SessionId, Incarnation), Seq)>,
    /// Set on disk when the device was opened, here or where a fill came from.
    pub(super) before_start: bool,
    /// The mark is on disk.
    pub(super) durable: bool,
    /// Executions under way that need it.
    pub(super) busy: u32,
}

impl Pending {
    pub(super) fn note(&mut self, writer: (SessionId, Incarnation), seq: Seq) {
        match self.writers.iter_mut().find(|(w, _)| *w == writer) {
            Some((_, last)) => *last = seq.max(*last),
            None => self.writers.push((writer, seq)),
        }
    }
}

impl CopyLayer {
    pub(super) fn pending_from_disk(&mut self, page: u64) {
        self.pending.insert(page, Pending { before_start: true, durable: true, ..Pending::default() });
    }
}

impl StorageServer {
    /// Sees to it that the page of an execution that changes blocks is marked.
    pub(super) fn mark_for(&mut self, id: ExecId) {
        let exec = &self.execs[&id];
        let (volume, boot, page) = (exec.volume, exec.boot, exec.page);
        let (writers, before_start) = match &exec.work {
            Work::Write { to, .. } | Work::Discard { to } => {
                let handle = &self.handles[&to.header.handle];
                let Opener::Session { session } = handle.opener else { unreachable!("peers do not write") };
                (vec![((session, handle.incarnation), to.header.seq)], false)
            }
            Work::Apply(apply) if apply.needs_mark() => (apply.writers.clone(), apply.before_start),
            Work::Apply(_) => {
                let missed = self.miss_for(id);
                return self.commit_marks(boot, volume, page, false, missed);
            }
            _ => return,
        };
        let layer = self.known(volume).layer_mut(&page).expect("located");
        let pending = layer.pending.entry(page.page).or_default();
        let first = !pending.durable && pending.busy == 0;
        pending.busy += 1;
        pending.before_start |= before_start;
        for (writer, seq) in writers {
            pending.note(writer, seq);
        }
        self.execs.get_mut(&id).expect("looked at above").is_marked = true;
        let missed = self.miss_for(id);
        self.commit_marks(boot, volume, page, first, missed);
    }

    /// Makes the marks durable that are not yet, or on their way: in one commit.
    fn commit_marks(
        &mut self,
        boot: BootId,
        volume: VolumeId,
        page: PageKey,
        pending: bool,
        missed: Option<(Record, u16)>,
    ) {
        let mask = missed.as_ref().map_or(0, |(_, mask)| *mask);
        let mark = pending.then_some(Record::Pending { page, set: true });
        let records: Vec<Record> = mark.into_iter().chain(missed.map(|(record, _)| record)).collect();
        if !records.is_empty() {
            self.medium(boot, Owner::Mark(volume, page, pending, mask), MediumOp::Commit(records));
        }
    }

    pub(super) fn marked(&mut self, boot: BootId, volume: VolumeId, page: PageKey, (marks, missed): (bool, u16)) {
        self.missed_durable(volume, page, missed);
        // A commit that held no pending mark came after one that did.
        let pending = self.known(volume).layer_mut(&page).and_then(|l| l.pending.get_mut(&page.page));
        if let Some(pending) = pending.filter(|_| marks) {
            pending.durable = true;
        }
        self.run_prepared(boot, page);
    }

    pub(super) fn mark_is_durable(&self, exec: &Exec) -> bool {
        let needs = match &exec.work {
            Work::Write { .. } | Work::Discard { .. } => true,
            Work::Apply(apply) => apply.needs_mark(),
            _ => false,
        };
        let layer = || self.volumes.get(&exec.volume)?.copies.get(&exec.page.copy)?.layers.get(&exec.page.layer);
        let pending = !needs || layer().and_then(|l| l.pending.get(&exec.page.page)).is_some_and(|p| p.durable);
        pending && self.is_miss_durable(exec)
    }

    /// An execution that needed the mark is over.
    pub(super) fn unmark_for(&mut self, exec: &Exec) {
        if !exec.is_marked {
            return;
        }
        let layer = self.known(exec.volume).layer_mut(&exec.page);
        if let Some(pending) = layer.and_then(|l| l.pending.get_mut(&exec.page.page)) {
            pending.busy -= 1;
        }
        // What a fill brings may be of writers whose last `confirmed` has been heard here already.
        if matches!(exec.work, Work::Apply(_)) {
            self.clear_soon(exec.volume);
        }
    }

    /// A driver says up to where its writes are acknowledged and durable on all copies.
    pub(super) fn note_confirmed(&mut self, volume: VolumeId, session: SessionId, handle: HandleId, confirmed: Seq) {
        let incarnation = self.handles[&handle].incarnation;
        let known = self.known(volume);
        let heard = known.sessions.entry(session).or_default().confirmed.entry(incarnation).or_default();
        if confirmed > *heard {
            *heard = confirmed;
            self.clear_soon(volume);
        }
    }

    pub(super) fn clear_soon(&mut self, volume: VolumeId) {
        if !std::mem::replace(&mut self.known(volume).clearing, true) {
            self.due(self.now.after(CLEAR_BATCH_MS), Due::Clear(volume));
        }
    }

    pub(super) fn clear_due(&mut self, volume: VolumeId) {
        if let Some(known) = self.volumes.get_mut(&volume) {
            known.clearing = false;
            self.clear_confirmed(volume);
            self.write_restored(volume);
        }
    }

    /// Clears the mark of every page all of whose writers have confirmed.
    pub(super) fn clear_confirmed(&mut self, volume: VolumeId) {
        let known = self.known(volume);
        let sessions = &known.sessions;
        let covered = |pending: &Pending| {
            let confirmed = |(session, incarnation): (SessionId, Incarnation), seq: Seq| {
                if on(Mutant::ConfirmedAcross) {
                    return sessions.values().flat_map(|s| s.confirmed.values()).any(|&heard| heard >= seq);
                }
                let Some(known) = sessions.get(&session) else { return false };
                incarnation <= known.adopted || known.confirmed.get(&incarnation).is_some_and(|&heard| heard >= seq)
            };
            (!pending.before_start || on(Mutant::BeforeStartCleared))
                && pending.writers.iter().all(|&(writer, seq)| confirmed(writer, seq))
        };
        let cleared = remove_pending(&mut known.copies, covered);
        for (copy, boot, records) in cleared {
            self.restore_cleared(volume, copy, &records);
            for piece in records.chunks(MAX_COMMIT_RECORDS) {
                self.known(volume).executing += 1;
                self.medium(boot, Owner::Clear(volume), MediumOp::Commit(piece.to_vec()));
            }
        }
    }

    /// H11: with what is pending no more goes what members missed of it that are `Active` now; written a little later.
    fn restore_cleared(&mut self, volume: VolumeId, copy: CopyId, cleared: &[Record]) {
        let known = self.known(volume);
        let (Some(map), Some(copy)) = (known.map.as_ref(), known.copies.get_mut(&copy)) else { return };
        let page = |record: &Record| if let Record::Pending { page, .. } = record { Some(*page) } else { None };
        let pages: Vec<PageKey> = cleared.iter().filter_map(page).collect();
        copy.restore_pages(map, &pages);
        if copy.layers.values().any(|layer| !layer.unwritten.is_empty()) {
            self.clear_soon(volume);
        }
    }

    /// The pending writes of older incarnations count as the opener's own from now on.
    pub(super) fn adopt(&mut self, volume: VolumeId, session: SessionId, handle: HandleId, up_to: Incarnation) {
        let own = self.handles[&handle].incarnation;
        // A successor that writes nothing itself never confirms more than it has: this may be the last occasion.
        self.clear_soon(volume);
        // A fill may still bring such writes from a source that has not heard this yet.
        let adopted = Incarnation(up_to.0.min(own.0.saturating_sub(1)));
        let heard = self.known(volume).sessions.entry(session).or_default();
        heard.adopted = heard.adopted.max(adopted);
        for layer in self.known(volume).copies.values_mut().flat_map(|c| c.layers.values_mut()) {
            for pending in layer.pending.values_mut() {
                let older = |w: &(SessionId, Incarnation)| w.0 == session && w.1 <= up_to && w.1 < own;
                let had = pending.writers.len();
                pending.writers.retain(|(writer, _)| !older(writer));
                if pending.writers.len() < had {
                    pending.note((session, own), Seq(0));
                }
            }
        }
    }
}

/// Takes the marks that may go out of memory; the records that make it durable, per opening.
fn remove_pending(
    copies: &mut std::collections::BTreeMap<CopyId, super::volume::Copy>,
    may_go: impl Fn(&Pending) -> bool,
) -> Vec<(CopyId, BootId, Vec<Record>)> {
    let mut cleared = Vec::new();
    for copy in copies.values_mut() {
        let Some(boot) = copy.boot else { continue };
        let copy_id = copy.record.copy;
        let mut records = Vec::new();
        for (layer_id, layer) in &mut copy.layers {
            layer.pending.retain(|page, pending| {
                let goes = pending.durable && pending.busy == 0 && may_go(pending);
                if goes {
                    let page = PageKey { copy: copy_id, layer: *layer_id, page: *page };
                    records.push(Record::Pending { page, set: false });
                }
                !goes
            });
        }
        if !records.is_empty() {
            cleared.push((copy_id, boot, records));
        }
    }
    cleared
}

/// What the generation that ends a settle clears on a member that it lists with its own boot id: what is pending of
/// ended sessions, of older incarnations and from before the start (M1). What a live session has pending stays.
pub(super) fn end_of_settle(copy: &mut super::volume::Copy, map: &VolumeMap) -> Vec<Record> {
    let lives = |(session, incarnation): (SessionId, Incarnation)| {
        map.session(session).is_some_and(|s| incarnation >= s.incarnation)
    };
    let copy_id = copy.record.copy;
    let mut records = Vec::new();
    for (layer_id, layer) in &mut copy.layers {
        layer.pending.retain(|page, pending| {
            assert!(pending.busy == 0 || on(Mutant::FenceWithoutDrain), "a map is stored when nothing executes");
            pending.writers.retain(|(writer, _)| lives(*writer));
            pending.before_start = false;
            let stays = !pending.writers.is_empty();
            if !stays {
                let page = PageKey { copy: copy_id, layer: *layer_id, page: *page };
                records.push(Record::Pending { page, set: false });
            }
            stays
        });
    }
    records
}

/// Takes every mark of a copy away, confirmed or not: only a deliberate mistake does (H11).
pub(super) fn unmark_all(copy: &mut super::volume::Copy) -> Vec<Record> {
    let copy_id = copy.record.copy;
    let mut records = Vec::new();
    for (layer, known) in &mut copy.layers {
        let pages = std::mem::take(&mut known.pending).into_keys();
        records.extend(pages.map(|page| {
            let page = PageKey { copy: copy_id, layer: *layer, page };
            Record::Pending { page, set: false }
        }));
    }
    records
}
