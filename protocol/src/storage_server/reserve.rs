//! `Reserve`: slots for pages before their first write, or ENOSPC before anything was sent (PROTOCOL.md §4.2, R8).
//!
//! Invariant: a page that has a slot is never refused. What is not in memory is looked up before anything is refused for
//! lack of room; a page that has none is given one only beside the reserve of its device.

use super::compare::Needs;
use super::handles::ReplyTo;
use super::medium::{MediumAnswer, MediumOp};
use super::page_ops::{Exec, ExecId, Work};
use super::requests::Located;
use super::{Owner, StorageServer, Violation};
use crate::ids::{BootId, LayerId, VolumeId};
use crate::layer::{BLOCK_BYTES, PageKey};
use crate::limits::SPACE_RESERVE_DIVISOR;
use crate::wire::{Place, ReplyBody};
use bytes::Bytes;
use std::collections::BTreeMap;

/// Pages that are to have a slot.
#[derive(Debug)]
pub(super) struct Reserve {
    pub(super) to: ReplyTo,
    pages: Vec<Wanted>,
    /// The records of pages that are not in memory are being loaded.
    looking: bool,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    boot: BootId,
    page: PageKey,
    bytes: u64,
    /// It is known to have a slot.
    allocated: bool,
}

impl Reserve {
    pub(super) fn uses(&self, boot: BootId) -> bool {
        self.pages.iter().any(|wanted| wanted.boot == boot)
    }

    /// What is reserved now.
    pub(super) fn pages(&self) -> impl ExactSizeIterator<Item = (BootId, PageKey)> + '_ {
        self.pages.iter().map(|wanted| (wanted.boot, wanted.page))
    }
}

impl StorageServer {
    /// Slots for these pages now, or ENOSPC.
    pub(super) fn reserve(&mut self, to: ReplyTo, volume: VolumeId, pages: &[(LayerId, (u32, u64))]) {
        let mut wanted = Vec::new();
        for &(layer, (group, page)) in pages {
            let place = Place { layer, group, page, offset: 0, length: BLOCK_BYTES };
            match self.locate(volume, &place, Needs::Writer) {
                Err(Located::Nonsense) => return self.violation(to.conn, Violation::Place),
                Err(Located::Reply(reply)) => {
                    return self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new());
                }
                Ok((boot, page, bytes)) => {
                    let allocated = self.devices[&boot].records.get(&page).is_some_and(|record| record.allocated);
                    wanted.push(Wanted { boot, page, bytes: bytes.into(), allocated });
                }
            }
        }
        let Some(first) = wanted.first().map(|wanted| wanted.boot) else { return self.simple(to, ReplyBody::Done) };
        let exec = self.admit(Exec::reserve(volume, first, Reserve { to, pages: wanted, looking: false }));
        if self.has_room(exec) {
            return self.allocate(exec);
        }
        self.look_for_slots(exec);
        self.finish_if_done(exec);
    }

    /// Whether every device has room for those that are not known to have a slot.
    fn has_room(&self, id: ExecId) -> bool {
        let Work::Reserve(reserve) = &self.execs[&id].work else { unreachable!("a reservation") };
        let mut lacking: BTreeMap<BootId, u64> = BTreeMap::new();
        for wanted in reserve.pages.iter().filter(|wanted| !wanted.allocated) {
            *lacking.entry(wanted.boot).or_default() += wanted.bytes;
        }
        lacking.iter().all(|(boot, bytes)| {
            let device = &self.devices[boot];
            device.free_bytes >= bytes + device.capacity_bytes / SPACE_RESERVE_DIVISOR
        })
    }

    /// Loads the records that are not in memory; without any there is no room.
    fn look_for_slots(&mut self, id: ExecId) {
        let exec = self.execs.get_mut(&id).expect("admitted by the caller");
        let Work::Reserve(reserve) = &mut exec.work else { unreachable!("a reservation") };
        let unknown = |wanted: &Wanted| !self.devices[&wanted.boot].records.contains_key(&wanted.page);
        let all = (0..).zip(reserve.pages.iter().copied());
        let unknown: Vec<(u32, Wanted)> = all.filter(|(_, wanted)| unknown(wanted)).collect();
        reserve.looking = !unknown.is_empty();
        if unknown.is_empty() {
            return exec.refuse_room();
        }
        exec.await_answers(unknown.len() as u32);
        for (number, Wanted { boot, page, .. }) in unknown {
            self.medium(boot, Owner::Exec(id, number), MediumOp::Load(page));
        }
    }

    fn allocate(&mut self, id: ExecId) {
        let exec = self.execs.get_mut(&id).expect("looked at by the caller");
        let Work::Reserve(reserve) = &exec.work else { unreachable!("a reservation") };
        let mut pages: BTreeMap<BootId, Vec<PageKey>> = BTreeMap::new();
        for (boot, page) in reserve.pages() {
            pages.entry(boot).or_default().push(page);
        }
        exec.await_answers(pages.len() as u32);
        for (boot, pages) in pages {
            self.medium(boot, Owner::Exec(id, 0), MediumOp::Allocate(pages));
        }
    }

    /// A record was looked up, or the slots of a device are there.
    pub(super) fn reserve_answered(&mut self, id: ExecId, number: u32, answer: MediumAnswer) {
        let exec = self.execs.get_mut(&id).expect("looked at by the caller");
        let all_answered = exec.is_answered();
        let Work::Reserve(reserve) = &mut exec.work else { unreachable!("a reservation") };
        match answer {
            MediumAnswer::Page(record) => {
                reserve.pages[number as usize].allocated = record.is_some_and(|record| record.allocated);
            }
            MediumAnswer::NoSpace => exec.refuse_room(),
            _ => {}
        }
        let Work::Reserve(reserve) = &mut exec.work else { unreachable!("a reservation") };
        if all_answered && std::mem::take(&mut reserve.looking) {
            if self.has_room(id) {
                return self.allocate(id);
            }
            self.execs.get_mut(&id).expect("looked at above").refuse_room();
        }
        self.finish_if_done(id);
    }

    /// The slots are there: they count as promised and taken.
    pub(super) fn reserved(&mut self, reserve: &Reserve) {
        if let Some(handle) = self.handles.get_mut(&reserve.to.header.handle) {
            handle.granted += reserve.pages().len() as u64;
            handle.used += reserve.pages().len() as u64;
        }
        for (boot, page) in reserve.pages() {
            if let Some(record) = self.devices.get_mut(&boot).and_then(|d| d.records.get_mut(&page)) {
                record.allocated = true;
            }
        }
    }
}
