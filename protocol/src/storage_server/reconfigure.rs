//! Promise, fence, serve, and copies that come and go (PROTOCOL.md §3; I1, I2, H2, H19, M2).
//!
//! ```text
//! fence: Draining ─► Clearing ─► Marking (H7) ─► Flushing (H11b) ─► Promising ─► answered
//! rejoin: Marking ─► Over, behind a fence of the same generation
//! serve: Draining ─► Storing (one durable step) ─► answered, map pushed, pulls begin
//! ```
//! The promise counts in memory from the moment the order arrives: nothing older is admitted from then on, what is under
//! way is waited for. It is answered only when it is durable. Orders for one volume are carried out one after another.

use super::contract::{CallId, Output};
use super::medium::{CopyRecord, LayerRecord, MAX_COMMIT_RECORDS, MediumAnswer, MediumOp, Record};
use super::report::settle_in;
use super::volume::{Copy, Volume};
use super::{Owner, StorageServer};
use crate::control::{ControlReply, ControlRequest, Fence, Rejoin};
use crate::ids::{BootId, CopyId, DeviceId, Generation, LayerId, VolumeId};
use crate::layer::PageKey;
use crate::map::VolumeMap;
use crate::mutants::{Mutant, on};
use std::collections::BTreeMap;

mod rejoin;
mod store_map;

/// Orders that wait for one volume; more than the steps of two leaders at once is nonsense and refused.
const MAX_WAITING_CHANGES: usize = 16;
/// Copies ordered deleted that are remembered: orders to make one come a connection late, not so many deletions late.
const MOST_BURIED: usize = 1_024;

/// An order being carried out.
#[derive(Debug)]
pub(super) struct Change {
    call: CallId,
    order: Order,
    stage: Stage,
    outstanding: usize,
    /// A device failed meanwhile: nothing about it can be promised.
    lost: bool,
    /// The openings that a fence has marked: one that comes later is marked, too, before the fence is answered.
    marked: Vec<BootId>,
    /// Of a map: pages that it makes missed (H3b), with their masks, durable with it.
    missed: Vec<(BootId, PageKey, u16)>,
}

impl Change {
    fn is_fence(&self) -> bool {
        matches!(self.order, Order::Fence(_))
    }
}

#[derive(Debug)]
enum Order {
    Fence(Fence),
    Serve(VolumeMap),
    Put { copy: CopyRecord, device: BootId },
    Delete { copy: CopyId },
    Rejoin(Rejoin),
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Draining,
    Clearing,
    Marking,
    Flushing,
    Promising,
    Storing,
    Over,
}

impl StorageServer {
    pub(super) fn control(&mut self, call: CallId, request: ControlRequest) {
        let reply = match request {
            ControlRequest::Heartbeat { lease_number } => self.heartbeat(lease_number),
            ControlRequest::GetVolume { volume } => self.volume_report(volume),
            ControlRequest::Inventory => self.inventory(),
            ControlRequest::LimitFills { volume, limit } => self.limit_fills(volume, limit),
            ControlRequest::Reach { server, addresses } => return self.reach(call, server, addresses),
            ControlRequest::Fence(fence) => return self.order_fence(call, fence),
            ControlRequest::Serve { map } => return self.order_serve(call, map),
            ControlRequest::ListSuspects { volume, generation, copy, boot, towards, from } => {
                self.list_suspects(volume, generation, (copy, boot), (towards, from))
            }
            ControlRequest::Rejoin(rejoin) => return self.order_rejoin(call, rejoin),
            ControlRequest::PutCopy { volume, generation, copy, device, placement, group, layers, unsynced } => {
                let cursor = if unsynced && !on(Mutant::ReplacementTrusted) { 0 } else { u64::MAX };
                let layers = layers.iter().map(|&(layer, page_bytes)| LayerRecord { layer, page_bytes, cursor });
                let record = CopyRecord { copy, volume, placement, group, layers: layers.collect() };
                return self.order_put(call, generation, device, record);
            }
            ControlRequest::PrepareFlush { volume, generation } => return self.order_flush(call, volume, generation),
            ControlRequest::DeleteCopy { volume, copy, generation } => {
                return self.order_delete(call, volume, copy, generation);
            }
        };
        self.control_reply(call, reply);
    }

    fn control_reply(&mut self, call: CallId, reply: ControlReply) {
        self.out.push(Output::ControlReply { call, reply });
    }

    fn refuse(&mut self, call: CallId, volume: VolumeId) {
        let known = self.volumes.get(&volume);
        let promised = known.map_or(Generation(0), |v| v.promised);
        let stored = known.map_or(Generation(0), Volume::stored);
        self.control_reply(call, ControlReply::Refused { promised, stored });
    }

    fn order_fence(&mut self, call: CallId, fence: Fence) {
        let volume = fence.volume;
        let Some(known) = self.volumes.get(&volume).filter(|v| !v.copies.is_empty()) else {
            return self.control_reply(call, ControlReply::NoCopy { copy: CopyId::NONE });
        };
        if known.boots().is_empty() {
            return self.control_reply(call, ControlReply::DeviceClosed);
        }
        // The same number again is the same plan (a proposal's generation belongs to it for ever): a lost reply.
        let older = fence.generation < known.promised || fence.generation <= known.stored();
        if older && !on(Mutant::DeposedObeyed) {
            return self.refuse(call, volume);
        }
        self.promise(volume, fence.generation);
        self.enqueue(volume, call, Order::Fence(fence), Stage::Draining);
    }

    fn order_serve(&mut self, call: CallId, map: VolumeMap) {
        let volume = map.volume;
        let mine = map.members().find(|m| m.server == self.config.server).map_or(CopyId::NONE, |m| m.copy);
        let Some(known) = self.volumes.get(&volume).filter(|v| !v.copies.is_empty()) else {
            return self.control_reply(call, ControlReply::NoCopy { copy: mine });
        };
        // Another map under the same number can only come of an API server restored from an old copy (R6): refused.
        if known.map.as_ref() == Some(&map) && known.promised == map.generation {
            return self.control_reply(call, ControlReply::Done);
        }
        // Layers below the top come with snapshots; a map that has some is not one that this version can serve.
        let servable = map.validate().is_ok() && map.layers.len() == 1;
        let older = map.generation < known.promised || map.generation <= known.stored();
        if older && !on(Mutant::DeposedObeyed) || !servable {
            return self.refuse(call, volume);
        }
        self.promise(volume, map.generation);
        self.enqueue(volume, call, Order::Serve(map), Stage::Draining);
    }

    fn order_put(&mut self, call: CallId, generation: Generation, device: DeviceId, record: CopyRecord) {
        let volume = record.volume;
        if self.deleted.contains(&record.copy) {
            return self.refuse(call, volume);
        }
        if let Some(known) = self.volumes.get(&volume) {
            if generation < known.promised || generation <= known.stored() {
                return self.refuse(call, volume);
            }
            if let Some(copy) = known.copies.get(&record.copy) {
                let same = |a: &CopyRecord, b: &CopyRecord| {
                    a.layers.iter().map(|l| l.layer).eq(b.layers.iter().map(|l| l.layer)) && a.group == b.group
                };
                let reply = if copy.boot.is_none() {
                    ControlReply::DeviceClosed
                } else if same(&copy.record, &record) {
                    ControlReply::Done
                } else {
                    ControlReply::NoCopy { copy: record.copy }
                };
                return self.control_reply(call, reply);
            }
        }
        let fits = |d: &super::Device| device.is_none() || d.device == device;
        // Copies take room when they are written, so those that are empty count, too.
        let share = |boot: BootId, d: &super::Device| d.free_bytes / (1 + self.copies_on(boot));
        let fitting = self.devices.iter().filter(|(_, d)| fits(d));
        let roomiest = fitting.max_by_key(|(boot, d)| share(**boot, d));
        let Some((&boot, _)) = roomiest else { return self.control_reply(call, ControlReply::NoSpace) };
        self.volumes.entry(volume).or_default();
        self.enqueue(volume, call, Order::Put { copy: record, device: boot }, Stage::Storing);
    }

    /// Copies that lie on this opening's device.
    fn copies_on(&self, boot: BootId) -> u64 {
        let copies = self.volumes.values().flat_map(|known| known.copies.values());
        copies.filter(|copy| copy.boot == Some(boot)).count() as u64
    }

    fn order_flush(&mut self, call: CallId, volume: VolumeId, generation: Generation) {
        let Some(known) = self.volumes.get(&volume) else {
            return self.control_reply(call, ControlReply::NoCopy { copy: CopyId::NONE });
        };
        if known.promised > generation || known.stored() > generation {
            return self.refuse(call, volume);
        }
        self.enqueue(volume, call, Order::Flush, Stage::Flushing);
    }

    fn order_delete(&mut self, call: CallId, volume: VolumeId, copy: CopyId, generation: Generation) {
        let known = self.volumes.get(&volume);
        let under_way = |change: &Change| matches!(&change.order, Order::Delete { copy: gone } if *gone == copy);
        let Some(known) = known.filter(|v| v.copies.contains_key(&copy)) else {
            // R14: a deletion that its device may still lose has not happened.
            let goes = known.is_some_and(|v| v.changes.iter().any(under_way));
            let reply = if goes { ControlReply::DeviceClosed } else { ControlReply::NoCopy { copy } };
            self.bury(copy);
            return self.control_reply(call, reply);
        };
        let listed = known.map.as_ref().is_some_and(|map| map.place_of(copy).is_some());
        let own_map_says_keep = listed && known.stored() >= generation;
        if known.promised > generation || known.stored() > generation || own_map_says_keep {
            return self.refuse(call, volume);
        }
        if known.copies[&copy].boot.is_none() {
            return self.control_reply(call, ControlReply::DeviceClosed);
        }
        // A map as new as the order no longer lists it: what an older one admitted must end first.
        let stage = if known.stored() < generation { Stage::Draining } else { Stage::Storing };
        if stage == Stage::Draining {
            self.promise(volume, generation);
        }
        self.drop_pull(copy);
        self.bury(copy);
        self.enqueue(volume, call, Order::Delete { copy }, stage);
    }

    /// R14: the order to make this copy may still be on its way, over a connection that its leader has given up. It comes
    /// to this process or never.
    fn bury(&mut self, copy: CopyId) {
        if !self.deleted.contains(&copy) {
            self.deleted.truncate(MOST_BURIED - 1);
            self.deleted.push_front(copy);
        }
    }

    /// From here on nothing older is admitted; what is under way from peers is dropped (H6).
    fn promise(&mut self, volume: VolumeId, generation: Generation) {
        let known = self.known(volume);
        if generation > known.promised {
            known.promised = generation;
            let copies: Vec<CopyId> = known.copies.keys().copied().collect();
            for copy in copies.into_iter().filter(|_| !on(Mutant::LateFillApplied)) {
                self.drop_pull(copy);
            }
        }
    }

    fn enqueue(&mut self, volume: VolumeId, call: CallId, order: Order, stage: Stage) {
        let known = self.known(volume);
        if known.changes.len() >= MAX_WAITING_CHANGES {
            return self.refuse(call, volume);
        }
        known.changes.push_back(Change {
            call,
            order,
            stage,
            outstanding: 0,
            lost: false,
            marked: Vec::new(),
            missed: Vec::new(),
        });
        if known.changes.len() == 1 {
            self.begin_change(volume);
        }
    }

    fn begin_change(&mut self, volume: VolumeId) {
        let Some(change) = self.known(volume).changes.front() else { return };
        match change.stage {
            Stage::Draining => self.advance_change(volume),
            stage => self.enter(volume, stage),
        }
    }

    /// Goes on with the order under way if what it waited for is over.
    pub(super) fn advance_change(&mut self, volume: VolumeId) {
        let Some(known) = self.volumes.get(&volume) else { return };
        let Some(change) = known.changes.front() else { return };
        let waits_for_work = matches!(change.stage, Stage::Draining | Stage::Clearing);
        if change.outstanding > 0 || (waits_for_work && known.executing > 0 && !on(Mutant::FenceWithoutDrain)) {
            return;
        }
        if self.is_overtaken(volume) {
            let change = self.known(volume).changes.pop_front().expect("looked at above");
            self.refuse(change.call, volume);
            return self.begin_change(volume);
        }
        let known = self.known(volume);
        let change = known.changes.front().expect("looked at above");
        let next = match next_stage(change) {
            Stage::Over if change.is_fence() && !change.lost && change.marked != known.boots() => Stage::Marking,
            next => next,
        };
        self.enter(volume, next);
    }

    /// A later order has promised more: this one must not be answered as done.
    fn is_overtaken(&self, volume: VolumeId) -> bool {
        let known = &self.volumes[&volume];
        let heeded = !on(Mutant::DeposedObeyed);
        heeded
            && known.changes.front().is_some_and(|change| match &change.order {
                Order::Fence(fence) => fence.generation < known.promised,
                Order::Serve(map) => map.generation < known.promised && change.stage != Stage::Storing,
                Order::Rejoin(rejoin) => rejoin.generation < known.promised,
                Order::Put { .. } | Order::Delete { .. } | Order::Flush => false,
            })
    }

    fn enter(&mut self, volume: VolumeId, stage: Stage) {
        let change = self.known(volume).changes.front_mut().expect("an order is under way");
        change.stage = stage;
        let outstanding = match stage {
            Stage::Draining => 0,
            Stage::Clearing => {
                self.clear_confirmed(volume);
                0
            }
            Stage::Marking => self.mark(volume),
            Stage::Flushing => self.flush_all(volume),
            Stage::Promising if on(Mutant::PromiseVolatile) => 0,
            Stage::Promising => self.persist(volume, Owner::Change(volume)),
            Stage::Storing => self.store(volume),
            Stage::Over => return self.finish_change(volume),
        };
        if let Some(change) = self.known(volume).changes.front_mut() {
            change.outstanding = outstanding;
        }
        if outstanding == 0 {
            self.advance_change(volume);
        }
    }

    pub(super) fn change_answered(&mut self, volume: VolumeId, answer: MediumAnswer) {
        let change = self.known(volume).changes.front_mut().expect("an order is under way");
        let needs_room = matches!(change.order, Order::Rejoin(_) | Order::Put { .. });
        assert!(answer == MediumAnswer::Done || needs_room, "other commits and flushes need no room");
        // No room for the entries of pages that are to be marked, or for the copy: then nothing is promised of it.
        change.lost |= answer == MediumAnswer::NoSpace;
        change.outstanding -= 1;
        self.advance_change(volume);
    }

    pub(super) fn change_lost(&mut self, volume: VolumeId) {
        let change = self.known(volume).changes.front_mut().expect("an order is under way");
        change.outstanding -= 1;
        change.lost = true;
        self.advance_change(volume);
    }

    fn mark(&mut self, volume: VolumeId) -> usize {
        let change = self.known(volume).changes.front().expect("an order is under way");
        match &change.order {
            Order::Rejoin(rejoin) => {
                let rejoin = rejoin.clone();
                self.mark_listed(volume, &rejoin)
            }
            _ => self.mark_rejoining(volume),
        }
    }

    fn commit_all(&mut self, volume: VolumeId, records: BTreeMap<BootId, Vec<Record>>) -> usize {
        let mut commits = 0;
        for (boot, records) in records {
            for piece in records.chunks(MAX_COMMIT_RECORDS) {
                self.medium(boot, Owner::Change(volume), MediumOp::Commit(piece.to_vec()));
                commits += 1;
            }
        }
        commits
    }

    /// Makes durable what is in the devices' caches (H11b); the number of flushes.
    fn flush_all(&mut self, volume: VolumeId) -> usize {
        let known = self.known(volume);
        let boots = known.boots();
        let under_way = |copy: &Copy| known.map.as_ref().and_then(|map| settle_in(map, copy.record.copy));
        let settled = |copy: &Copy| copy.settled.is_some() && copy.settled == under_way(copy);
        let forgets = on(Mutant::SettleUnflushed) && known.copies.values().any(settled);
        if forgets || on(Mutant::FenceWithoutFlush) {
            return 0;
        }
        for boot in &boots {
            self.medium(*boot, Owner::Change(volume), MediumOp::Flush);
        }
        boots.len()
    }

    /// Makes promise, map, incarnations and `handled` durable on every device with a copy; the number of commits.
    pub(super) fn persist(&mut self, volume: VolumeId, owner: Owner) -> usize {
        let known = self.known(volume);
        let (boots, blob) = (known.boots(), known.blob());
        for boot in &boots {
            let record = Record::PutVolume { volume, blob: blob.clone() };
            self.medium(*boot, owner, MediumOp::Commit(vec![record]));
        }
        boots.len()
    }

    fn store(&mut self, volume: VolumeId) -> usize {
        let change = self.known(volume).changes.front().expect("an order is under way");
        match &change.order {
            Order::Serve(map) => {
                let map = map.clone();
                self.store_map(volume, map)
            }
            Order::Put { copy, device } => {
                let (copy, boot) = (copy.clone(), *device);
                self.store_copy(volume, copy, boot)
            }
            Order::Delete { copy } => {
                let copy = *copy;
                self.store_deletion(volume, copy)
            }
            Order::Fence(_) | Order::Rejoin(_) | Order::Flush => unreachable!("stores nothing"),
        }
    }

    fn store_copy(&mut self, volume: VolumeId, copy: CopyRecord, boot: BootId) -> usize {
        if !self.devices.contains_key(&boot) {
            if let Some(change) = self.known(volume).changes.front_mut() {
                change.lost = true;
            }
            return 0;
        }
        let blob = self.known(volume).blob();
        let records = vec![Record::PutCopy(copy), Record::PutVolume { volume, blob }];
        self.commit_all(volume, BTreeMap::from([(boot, records)]))
    }

    fn store_deletion(&mut self, volume: VolumeId, copy: CopyId) -> usize {
        let known = self.known(volume);
        let Some(boot) = known.copies.get(&copy).and_then(|gone| gone.boot) else {
            // R14: its device failed while the order waited, or an earlier order to delete it may have been lost so.
            known.changes.front_mut().expect("an order is under way").lost = true;
            return 0;
        };
        known.copies.remove(&copy);
        let mut records = vec![Record::DropCopy(copy)];
        if !known.copies.values().any(|c| c.boot == Some(boot)) {
            records.push(Record::DropVolume(volume));
        }
        self.forget_records(boot, copy);
        if let Some(device) = self.devices.get_mut(&boot) {
            device.reserved.retain(|page, _| page.copy != copy);
        }
        self.commit_all(volume, BTreeMap::from([(boot, records)]))
    }

    fn finish_change(&mut self, volume: VolumeId) {
        let change = self.known(volume).changes.pop_front().expect("an order is under way");
        let reply = match &change.order {
            _ if change.lost => ControlReply::DeviceClosed,
            Order::Fence(_) => self.promised_report(volume),
            Order::Rejoin(rejoin) => self.listed_durably(volume, rejoin),
            _ => ControlReply::Done,
        };
        match change.order {
            Order::Serve(_) => {
                self.known(volume).storing_after = None;
                self.map_stored(volume, change.missed);
            }
            Order::Put { copy, device } if !change.lost => {
                let minted = self.devices.get(&device).map(|d| d.device);
                if let Some(id) = minted {
                    self.known(volume).add_copy(copy, device, id);
                }
            }
            _ => {}
        }
        self.control_reply(change.call, reply);
        if self.known(volume).copies.is_empty() && self.known(volume).changes.is_empty() {
            self.forget_volume(volume);
        } else {
            self.begin_change(volume);
        }
    }

    fn forget_volume(&mut self, volume: VolumeId) {
        self.volumes.remove(&volume);
        self.opens.retain(|open| !open.is_of(volume));
        self.handles.retain(|_, handle| handle.volume != volume);
    }

    /// The volume, which is known to be known.
    pub(super) fn known(&mut self, volume: VolumeId) -> &mut Volume {
        self.volumes.get_mut(&volume).expect("a volume stays known while anything of it is under way")
    }

    /// The pages of a copy's layer by the stored map; 0 if the map does not know it.
    pub(super) fn pages_of(&self, volume: VolumeId, copy: CopyId, layer: LayerId) -> u64 {
        let Some(map) = self.volumes.get(&volume).and_then(|v| v.map.as_ref()) else { return 0 };
        let Some((placement, group, _)) = map.place_of(copy) else { return 0 };
        let layer = map.layers.iter().find(|l| l.id == layer && l.placement == placement);
        layer.map_or(0, |layer| map.geometry(layer).pages(group))
    }
}

fn next_stage(change: &Change) -> Stage {
    match (&change.order, change.stage) {
        (_, Stage::Storing | Stage::Over) => Stage::Over,
        (Order::Fence(_), Stage::Draining) => Stage::Clearing,
        (Order::Fence(_), Stage::Clearing) => Stage::Marking,
        (Order::Fence(fence), Stage::Marking) if fence.flush => Stage::Flushing,
        (Order::Fence(_), Stage::Marking | Stage::Flushing) => Stage::Promising,
        (Order::Fence(_), Stage::Promising) | (Order::Rejoin(_) | Order::Flush, _) => Stage::Over,
        (Order::Serve(_) | Order::Delete { .. } | Order::Put { .. }, _) => Stage::Storing,
    }
}
