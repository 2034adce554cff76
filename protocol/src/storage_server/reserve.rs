//! `Reserve`: slots for pages before their first write, or ENOSPC before anything was sent (PROTOCOL.md §4.2, R8).
//!
//! Invariant: a page that has a slot is never refused. What is not in memory is looked up before anything is refused for
//! lack of room; a page that has none is given one only beside the reserve of its device and all that others were promised.
//! What is reserved here counts neither as credit nor against it: a page that is asked for twice is there once. A slot that
//! was made here and that no write took is free again when all who asked for it have given it back or are out of the map.

use super::compare::Needs;
use super::handles::ReplyTo;
use super::medium::{MediumAnswer, MediumOp};
use super::page_ops::{Exec, ExecId, Work};
use super::requests::Located;
use super::{Owner, StorageServer, Violation};
use crate::ids::{BootId, LayerId, SessionId, VolumeId};
use crate::layer::{BLOCK_BYTES, PageKey};
use crate::limits::SPACE_RESERVE_DIVISOR;
use crate::wire::{Opener, Place, ReplyBody};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

/// Pages that are to have a slot.
#[derive(Debug)]
pub(super) struct Reserve {
    pub(super) to: ReplyTo,
    pages: Vec<Wanted>,
    /// The records of pages that are not in memory are being loaded.
    looking: bool,
    /// The devices are making the slots.
    taking: bool,
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

    /// Bytes that it takes of a device just now, which do not show in what is free there yet.
    fn takes(&self, boot: BootId) -> u64 {
        let lacking = self.pages.iter().filter(|wanted| self.taking && wanted.boot == boot && !wanted.allocated);
        lacking.map(|wanted| wanted.bytes).sum()
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
        let exec =
            self.admit(Exec::reserve(volume, first, Reserve { to, pages: wanted, looking: false, taking: false }));
        if self.has_room(exec) {
            return self.allocate(exec);
        }
        self.look_for_slots(exec);
        self.finish_if_done(exec);
    }

    /// Bytes that are wanted of each device for pages that are not known to have a slot.
    fn lacking(&self, id: ExecId) -> BTreeMap<BootId, u64> {
        let Work::Reserve(reserve) = &self.execs[&id].work else { unreachable!("a reservation") };
        let mut lacking: BTreeMap<BootId, u64> = BTreeMap::new();
        for wanted in reserve.pages.iter().filter(|wanted| !wanted.allocated) {
            *lacking.entry(wanted.boot).or_default() += wanted.bytes;
        }
        lacking
    }

    fn has_room(&self, id: ExecId) -> bool {
        self.lacking(id).iter().all(|(boot, bytes)| *bytes <= self.room_bytes(*boot))
    }

    fn refuse_room(&mut self, id: ExecId) {
        for (boot, bytes) in self.lacking(id) {
            let is_lacking = bytes > self.room_bytes(boot);
            if let Some(device) = self.devices.get_mut(&boot).filter(|_| is_lacking) {
                device.lacked_bytes = bytes;
            }
        }
        self.execs.get_mut(&id).expect("looked at by the caller").refuse_room();
    }

    /// What the leader hears is free: no more than the reserve while a page is refused, whoever was promised the rest.
    pub(super) fn free_to_tell(&self, boot: BootId) -> u64 {
        let device = &self.devices[&boot];
        let reserve = device.capacity_bytes / SPACE_RESERVE_DIVISOR;
        let refuses = device.lacked_bytes > self.room_bytes(boot);
        if refuses { device.free_bytes.min(reserve) } else { device.free_bytes }
    }

    /// Bytes of a device that nobody has, beside its reserve and all that was promised. A device that just failed is gone
    /// before its copies know: there is no room on it.
    pub(super) fn room_bytes(&self, boot: BootId) -> u64 {
        let Some(device) = self.devices.get(&boot) else { return 0 };
        let taken = self.execs.values().filter_map(Exec::as_reserve).map(|reserve| reserve.takes(boot)).sum::<u64>();
        let reserve = device.capacity_bytes / SPACE_RESERVE_DIVISOR;
        device.free_bytes.saturating_sub(reserve + taken + self.promised_bytes())
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
            return self.refuse_room(id);
        }
        exec.await_answers(unknown.len() as u32);
        for (number, Wanted { boot, page, .. }) in unknown {
            self.medium(boot, Owner::Exec(id, number), MediumOp::Load(page));
        }
    }

    fn allocate(&mut self, id: ExecId) {
        let exec = self.execs.get_mut(&id).expect("looked at by the caller");
        let Work::Reserve(reserve) = &mut exec.work else { unreachable!("a reservation") };
        reserve.taking = true;
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
            self.refuse_room(id);
        }
        self.finish_if_done(id);
    }

    /// The slots are there.
    pub(super) fn reserved(&mut self, reserve: &Reserve) {
        let opener = self.handles.get(&reserve.to.header.handle).map(|handle| handle.opener);
        for wanted in &reserve.pages {
            let Some(device) = self.devices.get_mut(&wanted.boot) else { continue };
            if let Some(record) = device.records.get_mut(&wanted.page) {
                record.allocated = true;
            }
            let is_new = !wanted.allocated || device.reserved.contains_key(&wanted.page);
            if let (true, Some(Opener::Session { session })) = (is_new, opener) {
                device.reserved.entry(wanted.page).or_default().insert(session);
            }
        }
    }

    /// The session will not write these pages now: one of the others had no room for them.
    pub(super) fn give_back(
        &mut self,
        to: ReplyTo,
        volume: VolumeId,
        session: SessionId,
        pages: &[(LayerId, (u32, u64))],
    ) {
        let mut given: BTreeMap<BootId, Vec<PageKey>> = BTreeMap::new();
        for &(layer, (group, page)) in pages {
            let place = Place { layer, group, page, offset: 0, length: BLOCK_BYTES };
            match self.locate(volume, &place, Needs::Writer) {
                Err(Located::Nonsense) => return self.violation(to.conn, Violation::Place),
                Err(Located::Reply(reply)) => {
                    return self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new());
                }
                Ok((boot, page, _)) => given.entry(boot).or_default().push(page),
            }
        }
        for (boot, pages) in given {
            self.let_go(boot, &pages, |by| *by == session);
        }
        self.simple(to, ReplyBody::Done);
    }

    /// A session that is out of the stored map writes nothing any more.
    pub(super) fn give_back_of_ended(&mut self, volume: VolumeId) {
        let Some((known, map)) = self.volumes.get(&volume).and_then(|known| Some((known, known.map.as_ref()?))) else {
            return;
        };
        let listed: BTreeSet<SessionId> = map.sessions.iter().map(|session| session.id).collect();
        let of_volume = |page: &&PageKey| known.copies.contains_key(&page.copy);
        let reserved = |boot: &BootId| {
            let device = self.devices.get(boot)?;
            let pages: Vec<PageKey> = device.reserved.keys().filter(of_volume).copied().collect();
            Some((*boot, pages))
        };
        let all: Vec<_> = known.boots().iter().filter_map(reserved).collect();
        for (boot, pages) in all {
            self.let_go(boot, &pages, |by| !listed.contains(by));
        }
    }

    /// These no longer want the pages. One on which something runs keeps its slot: a write there takes it.
    fn let_go(&mut self, boot: BootId, pages: &[PageKey], gone: impl Fn(&SessionId) -> bool) {
        let Some(device) = self.devices.get_mut(&boot) else { return };
        let mut free = Vec::new();
        for page in pages.iter().filter(|page| !device.pages.contains_key(page)) {
            let Some(wanted_by) = device.reserved.get_mut(page) else { continue };
            wanted_by.retain(|session| !gone(session));
            if wanted_by.is_empty() {
                device.reserved.remove(page);
                // Whether it has a slot now, the device knows.
                device.records.remove(page);
                free.push(*page);
            }
        }
        if !free.is_empty() {
            self.medium(boot, Owner::Nobody, MediumOp::Release(free));
        }
    }
}
