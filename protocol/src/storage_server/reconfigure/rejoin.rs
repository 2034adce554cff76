//! A member that returns: the list of suspect pages, from its source and from itself (PROTOCOL.md §5.9; H7, M4).
//!
//! ```text
//! source: fence answered ─► lists, piece by piece, as long as nothing above that promise was stored
//! member: fence answered ─► first piece, with its own list ─► … ─► last piece durable ─► answers anew
//! ```
//! Invariant: [`CopyReport::listed`](crate::control::CopyReport::listed) is said only when every page that either of the
//! two calls suspect was marked unsynced under this very promise, durably.

use super::super::StorageServer;
use super::super::contract::CallId;
use super::super::medium::Record;
use super::super::volume::{Copy, CopyLayer, Marking};
use super::{Order, Stage};
use crate::control::{ControlReply, PageList, Rejoin};
use crate::ids::{BootId, CopyId, Generation, VolumeId};
use crate::layer::PageKey;
use crate::mutants::{Mutant, on};
use std::collections::{BTreeMap, BTreeSet};

impl StorageServer {
    /// The source's side. Nothing changes here any more but what was fenced with it.
    pub(super) fn list_suspects(
        &mut self,
        volume: VolumeId,
        generation: Generation,
        (copy, boot): (CopyId, BootId),
        (towards, from): (u8, u64),
    ) -> ControlReply {
        let Some(known) = self.volumes.get(&volume) else { return ControlReply::NoCopy { copy } };
        let fenced = known.promised == generation && known.stored() < generation && known.changes.is_empty();
        if !fenced && !on(Mutant::ListBeforeFence) {
            return ControlReply::Refused { promised: known.promised, stored: known.stored() };
        }
        let Some(held) = known.copies.get(&copy) else { return ControlReply::NoCopy { copy } };
        if held.boot != Some(boot) {
            return ControlReply::DeviceClosed;
        }
        let Some((id, layer)) = held.layers.iter().next() else { return ControlReply::NoCopy { copy } };
        let pages = layer.suspects(towards, self.pages_of(volume, copy, *id));
        ControlReply::Suspects(PageList::piece(*id, from, pages.into_iter()))
    }

    /// The returning member's side: a piece is marked like a step of the fence that was answered before.
    pub(super) fn order_rejoin(&mut self, call: CallId, rejoin: Rejoin) {
        let (volume, copy) = (rejoin.volume, rejoin.copy);
        let Some(known) = self.volumes.get(&volume) else {
            return self.control_reply(call, ControlReply::NoCopy { copy });
        };
        let Some(held) = known.copies.get(&copy) else {
            return self.control_reply(call, ControlReply::NoCopy { copy });
        };
        if held.boot.is_none() {
            return self.control_reply(call, ControlReply::DeviceClosed);
        }
        let fenced = known.promised == rejoin.generation && known.stored() < rejoin.generation;
        let follows = rejoin.list.from <= held.marking.next_of(rejoin.generation);
        if !fenced || !follows {
            return self.refuse(call, volume);
        }
        self.enqueue(volume, call, Order::Rejoin(rejoin), Stage::Marking);
    }

    /// Marks what a piece names, and with the first one what the copy itself knows; the number of commits.
    pub(super) fn mark_listed(&mut self, volume: VolumeId, rejoin: &Rejoin) -> usize {
        let Some(copy) = self.known(volume).copies.get_mut(&rejoin.copy) else { return 0 };
        let Some(boot) = copy.boot else { return 0 };
        let first = rejoin.list.from == 0;
        if on(Mutant::SettledKept) && copy.settled.is_some() {
            return 0;
        }
        if first {
            copy.filled_bytes = 0;
            copy.settled = None;
        }
        let records = copy.mark_list(rejoin, first);
        self.forget_records(boot, rejoin.copy);
        self.commit_all(volume, BTreeMap::from([(boot, records)]))
    }

    /// A piece is durable: after the last one the copy counts as listed.
    pub(super) fn listed_durably(&mut self, volume: VolumeId, rejoin: &Rejoin) -> ControlReply {
        let Some(copy) = self.known(volume).copies.get_mut(&rejoin.copy) else {
            return ControlReply::NoCopy { copy: rejoin.copy };
        };
        let next = rejoin.list.next.max(copy.marking.next_of(rejoin.generation));
        copy.marking = Marking { generation: rejoin.generation, next };
        if next == u64::MAX { self.promised_report(volume) } else { ControlReply::Done }
    }

    /// H7 without a list: every page of these copies is out of date, durably, each time; what they settled is forgotten (M4).
    pub(super) fn mark_rejoining(&mut self, volume: VolumeId) -> usize {
        let known = self.known(volume);
        let boots = known.boots();
        let change = known.changes.front_mut().expect("an order is under way");
        change.marked = boots;
        let Order::Fence(fence) = &change.order else { return 0 };
        let mut records: BTreeMap<BootId, Vec<Record>> = BTreeMap::new();
        for copy_id in &fence.unsync {
            let Some(copy) = known.copies.get_mut(copy_id) else { continue };
            let Some(boot) = copy.boot else { continue };
            copy.marking = Marking { generation: fence.generation, next: u64::MAX };
            if on(Mutant::SettledKept) && copy.settled.is_some() {
                continue;
            }
            copy.settled = None;
            copy.filled_bytes = 0;
            for (layer_id, layer) in &mut copy.layers {
                let records = records.entry(boot).or_default();
                records.push(if on(Mutant::RejoinKeepsBlocks) {
                    Record::Cursor { copy: *copy_id, layer: *layer_id, cursor: 0 }
                } else {
                    Record::MarkLayerUnsynced { copy: *copy_id, layer: *layer_id }
                });
                // What was pending says that this copy may have writes that others lack; all of them are stale now.
                for page in layer.mark_whole() {
                    let page = PageKey { copy: *copy_id, layer: *layer_id, page };
                    records.push(Record::Pending { page, set: false });
                }
            }
        }
        let marked: Vec<(BootId, CopyId)> =
            records.keys().flat_map(|boot| fence.unsync.iter().map(|c| (*boot, *c))).collect();
        for (boot, copy) in marked {
            self.forget_records(boot, copy);
        }
        self.commit_all(volume, records)
    }
}

impl Copy {
    fn mark_list(&mut self, rejoin: &Rejoin, first: bool) -> Vec<Record> {
        let copy = self.record.copy;
        let mut records = Vec::new();
        for (layer_id, layer) in &mut self.layers {
            let page = |page| PageKey { copy, layer: *layer_id, page };
            if *layer_id != rejoin.list.layer {
                // The source said nothing of this layer.
                if first {
                    records
                        .extend(layer.mark_whole().into_iter().map(|p| Record::Pending { page: page(p), set: false }));
                    records.push(Record::MarkLayerUnsynced { copy, layer: *layer_id });
                }
                continue;
            }
            let own = if first { layer.suspects(rejoin.source, u64::MAX) } else { BTreeSet::new() };
            let own = own.into_iter().filter(|_| !on(Mutant::OwnListForgotten));
            let pages: BTreeSet<u64> = own.chain(rejoin.list.pages()).collect();
            for p in pages {
                let was = layer.unsynced.contains(&p) || p >= layer.cursor;
                if was && on(Mutant::UnsyncedNotMarked) {
                    continue;
                }
                layer.unsynced.insert(p);
                if !on(Mutant::RejoinKeepsBlocks) {
                    records.push(Record::MarkUnsynced(page(p)));
                }
                // What was pending says that this copy may have writes that others lack; all of them are stale now.
                if layer.pending.remove(&p).is_some() {
                    records.push(Record::Pending { page: page(p), set: false });
                }
            }
        }
        records
    }
}

impl CopyLayer {
    /// Every page is unsynced by the layer's mark; those that were pending and are no more.
    fn mark_whole(&mut self) -> Vec<u64> {
        self.cursor = 0;
        self.unsynced.clear();
        std::mem::take(&mut self.pending).into_keys().collect()
    }
}
