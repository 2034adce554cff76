//! Writes and discards: every part to every `Active` and `Syncing` member of its group (seed 002 Fig. 7B; R8, H5).
//!
//! Invariants: a change is answered when all members of all its groups have acknowledged it under one map; its first
//! frame leaves only when its pages are paid for, and from then on it never ends with ENOSPC; what is answered is kept
//! until it is flushed.

use super::Driver;
use super::kept::Change;
use super::op::{Kind, Op, OpId, Origin, Purpose, State};
use super::peer::{Outgoing, What};
use super::view::View;
use crate::geometry::Geometry;
use crate::ids::{LayerId, ServerId};
use crate::limits::IDLE_CONFIRM_MS;
use crate::mutants::{Mutant, on};
use crate::wire::{Place, RequestBody};
use bytes::Bytes;
use std::collections::BTreeMap;

/// A page of the top layer: group and number.
type PageOf = (u32, u64);

impl Driver {
    /// Count a change of the OS among those that are kept; if they are too many it waits for a flush (H5).
    pub(super) fn find_room(&mut self, id: OpId) -> bool {
        let op = self.ops.get_mut(&id).expect("the caller found it");
        if op.kept_bytes > 0 || !matches!(op.origin, Origin::Os(_)) {
            return true;
        }
        let cost = Change::cost(if let Kind::Write { data, .. } = &op.kind { data.len() } else { 0 });
        if self.awaiting_room.is_empty() && self.kept.admit(cost) {
            op.kept_bytes = cost;
            return true;
        }
        op.state = State::AwaitingRoom;
        self.awaiting_room.push_back(id);
        self.flush_by_itself();
        false
    }

    /// Room may have come: let those in that waited, in order, as far as it reaches.
    pub(super) fn admit_waiting(&mut self) {
        while let Some(id) = self.awaiting_room.front().copied() {
            let Some(op) = self.ops.get_mut(&id) else {
                self.awaiting_room.pop_front();
                continue;
            };
            let cost = Change::cost(if let Kind::Write { data, .. } = &op.kind { data.len() } else { 0 });
            if !self.kept.admit(cost) {
                return self.flush_by_itself();
            }
            op.kept_bytes = cost;
            op.state = State::Ready;
            self.awaiting_room.pop_front();
            self.ready.push_back(id);
        }
    }

    /// Pay for the pages of a first attempt; if the credit does not reach, ask all receivers for room and say so (R8).
    pub(super) fn ask_for_room(&mut self, id: OpId, view: &View) -> bool {
        let pages = self.unpaid_pages(id, view);
        if pages.is_empty() {
            return false;
        }
        let mut wanted: BTreeMap<ServerId, Vec<(LayerId, PageOf)>> = BTreeMap::new();
        for &page in &pages {
            for &server in &view.routes[page.0 as usize].writers {
                wanted.entry(server).or_default().push((view.layer, page));
            }
        }
        let covered = wanted.iter().all(|(server, pages)| {
            let peer = &self.peers[server];
            peer.is_open() && peer.credit.covers(pages.len() as u64)
        });
        if covered {
            self.pay(&pages, view);
            return false;
        }
        let op = self.ops.get_mut(&id).expect("the caller found it");
        op.state = State::Reserving;
        op.attempt.outstanding = wanted.len() as u32;
        op.attempt.groups = pages.iter().fold(0, |mask, (group, _)| mask | 1 << group);
        let attempt = op.attempt.number;
        for (server, pages) in wanted {
            let (what, body) = (What::Part { op: id, attempt }, RequestBody::Reserve { pages });
            self.transmit(server, Outgoing { what, body, payload: Bytes::new(), seq: crate::ids::Seq(0) });
        }
        true
    }

    fn unpaid_pages(&self, id: OpId, view: &View) -> Vec<PageOf> {
        let range = self.ops[&id].kind.range();
        let mut pages = Vec::new();
        for extent in view.geometry.split(range.start, range.end - range.start) {
            let page = (extent.group, extent.page);
            if !self.allocated.contains(page.0, page.1) && !pages.contains(&page) {
                pages.push(page);
            }
        }
        pages
    }

    fn pay(&mut self, pages: &[PageOf], view: &View) {
        for &(group, page) in pages {
            self.allocated.insert(group, page);
            for server in &view.routes[group as usize].writers {
                self.peers.get_mut(server).expect("a writer has a peer").credit.spend(1);
            }
        }
    }

    /// All receivers have made slots for its pages, beside the credit: the write goes out.
    pub(super) fn room_granted(&mut self, id: OpId) {
        let view = self.view.clone().expect("the attempt runs under a map");
        for (group, page) in self.unpaid_pages(id, &view) {
            self.allocated.insert(group, page);
        }
        let op = self.ops.get_mut(&id).expect("the caller found it");
        op.state = State::Running;
        op.attempt.next = Some(0);
        self.issue(id);
    }

    /// A receiver has no room: what the others have set aside is free again, but for pages that another write asks for.
    pub(super) fn give_room_back(&mut self, id: OpId) {
        let view = self.view.clone().expect("the attempt ran under a map");
        let asking = self.ops.iter().filter(|(other, op)| **other != id && op.state == State::Reserving);
        let wanted: Vec<PageOf> = asking.flat_map(|(other, _)| self.unpaid_pages(*other, &view)).collect();
        let mut given: BTreeMap<ServerId, Vec<(LayerId, PageOf)>> = BTreeMap::new();
        for page in self.unpaid_pages(id, &view).into_iter().filter(|page| !wanted.contains(page)) {
            for &server in &view.routes[page.0 as usize].writers {
                given.entry(server).or_default().push((view.layer, page));
            }
        }
        for (server, pages) in given {
            let body = RequestBody::Release { pages };
            self.transmit(
                server,
                Outgoing { what: What::Release, body, payload: Bytes::new(), seq: crate::ids::Seq(0) },
            );
        }
    }

    /// Send the part of a write that starts `at` bytes into it to every writer.
    pub(super) fn issue_write(&mut self, id: OpId, view: &View, at: u64) {
        let op = self.ops.get_mut(&id).expect("the caller found it");
        let Kind::Write { address, data } = &op.kind else { unreachable!("the caller saw a write") };
        let length = data.len() as u64;
        let extent = view.geometry.split(address + at, length - at).next().expect("a part is left");
        let next = at + u64::from(extent.length);
        let payload = data.slice(at as usize..next as usize);
        op.attempt.next = (next < length).then_some(next);
        let (page, offset, length) = (extent.page, extent.offset, extent.length);
        let place = Place { layer: view.layer, group: extent.group, page, offset, length };
        self.send_change(id, view, place, payload);
    }

    /// Send the part of a discard with the number `at`, counted over pages and groups, to every writer.
    pub(super) fn issue_discard(&mut self, id: OpId, view: &View, address: u64, length: u64, at: u64) {
        let (run, next) = next_discard(&view.geometry, address, address + length, at);
        self.ops.get_mut(&id).expect("the caller found it").attempt.next = next;
        let Some((group, page, offset, length)) = run else { return };
        self.allocated.remove(group, page);
        let place = Place { layer: view.layer, group, page, offset, length };
        self.send_change(id, view, place, Bytes::new());
    }

    /// One frame to every member that must have it, all with the same new `seq`.
    fn send_change(&mut self, id: OpId, view: &View, place: Place, payload: Bytes) {
        let seq = self.seqs.take();
        let writers = &view.routes[place.group as usize].writers;
        let op = self.ops.get_mut(&id).expect("the caller found it");
        op.sent = true;
        op.attempt.groups |= 1 << place.group;
        op.attempt.outstanding += if on(Mutant::AckOnOneCopy) { 1 } else { writers.len() as u32 };
        if op.first_seq.is_none() {
            op.first_seq = Some(seq);
            self.seqs.begin(seq);
        }
        let attempt = op.attempt.number;
        let writes = matches!(op.kind, Kind::Write { .. });
        for &server in writers {
            let body = if writes { RequestBody::Write { place } } else { RequestBody::Discard { place } };
            let what = What::Part { op: id, attempt };
            self.transmit(server, Outgoing { what, body, payload: payload.clone(), seq });
        }
    }

    /// All members have acknowledged.
    pub(super) fn change_succeeded(&mut self, id: OpId) {
        let op = self.finish(id, Ok(Bytes::new()));
        self.seqs.succeed(op.first_seq.expect("a change has at least one part"));
        if on(Mutant::ConfirmedUnflushed) {
            self.seqs.confirm(self.seqs.acknowledged());
        }
        match op.origin {
            Origin::Os(_) => self.keep(op),
            Origin::Own(Purpose::Rewrite) => self.rewritten(),
            Origin::Own(_) => unreachable!("the driver changes nothing by itself but to write it again"),
        }
    }

    /// Keep what was acknowledged until a flush covers it (H5), and see to it that one comes.
    fn keep(&mut self, op: Op) {
        let range = op.kind.range();
        let single = self.view.as_ref().is_some_and(|view| !view.map.multi_session);
        let change = match op.kind {
            Kind::Write { address, data } => Change::Write { address, data },
            Kind::Discard { address, length } => Change::Discard { address, length },
            Kind::Read { .. } | Kind::Written | Kind::Broadcast(_) => unreachable!("only changes are kept"),
        };
        self.kept.acknowledge(op.kept_bytes, single.then_some(change));
        if let Some(view) = self.view.as_ref() {
            let extents = view.geometry.split(range.start, range.end - range.start);
            self.kept.touch(extents.map(|extent| (extent.group, extent.page)));
        }
        self.changed_at = self.now;
        self.unflushed_since.get_or_insert(self.now);
        self.wake_by(self.now.after(IDLE_CONFIRM_MS));
        if self.kept.presses() {
            self.flush_by_itself();
        }
        if !self.awaiting_room.is_empty() {
            self.admit_waiting();
        }
    }
}

/// A run of bytes of one page: group, page, offset, length.
type Run = (u32, u64, u32, u32);

/// The run of a discard's bytes in the page with this number, and the number of the next one. Pages are counted by rows
/// of the stripe: all groups' first pages, then all groups' second pages. A run may be empty; then it is `None`.
fn next_discard(geometry: &Geometry, start: u64, end: u64, at: u64) -> (Option<Run>, Option<u64>) {
    let (groups, page_bytes) = (u64::from(geometry.groups), u64::from(geometry.page_bytes));
    let row = page_bytes * groups;
    let number = start / row * groups + at;
    let (page, group) = (number / groups, (number % groups) as u32);
    let from = local(geometry, start, group).max(page * page_bytes);
    let to = local(geometry, end, group).min((page + 1) * page_bytes);
    let last = (end - 1) / row * groups + groups - 1;
    let run = (from < to).then(|| (group, page, (from % page_bytes) as u32, (to - from) as u32));
    (run, (number < last).then_some(at + 1))
}

/// How many bytes of a group's share lie before an address of the volume.
fn local(geometry: &Geometry, address: u64, group: u32) -> u64 {
    let (chunk, groups) = (u64::from(geometry.chunk_bytes), u64::from(geometry.groups));
    let number = address / chunk;
    let rest = match (number % groups).cmp(&u64::from(group)) {
        std::cmp::Ordering::Greater => chunk,
        std::cmp::Ordering::Equal => address % chunk,
        std::cmp::Ordering::Less => 0,
    };
    number / groups * chunk + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_discard_covers_its_range_exactly_one_frame_per_page(
            groups in 1u32..=5, page_log in 0u32..=2, start in 0u64..800, length in 1u64..800,
        ) {
            let geometry = Geometry { groups, chunk_bytes: 65536, page_bytes: 65536 << page_log, size: 1 << 30 };
            let (start, end) = (start * 4096, (start + length) * 4096);
            let mut blocks = Vec::new();
            let mut pages = Vec::new();
            let mut at = Some(0);
            while let Some(number) = at {
                let (run, next) = next_discard(&geometry, start, end, number);
                at = next;
                let Some((group, page, offset, length)) = run else { continue };
                prop_assert!(!pages.contains(&(group, page)));
                pages.push((group, page));
                for block in (offset..offset + length).step_by(4096) {
                    blocks.push(geometry.address_of(group, page, block));
                }
            }
            blocks.sort_unstable();
            prop_assert_eq!(blocks, (start..end).step_by(4096).collect::<Vec<_>>());
        }
    }
}
