//! From a frame to an execution: handle, window, comparator, copy (PROTOCOL.md, Comparator).

use super::compare::{Facts, Needs, compare, member_serves};
use super::contract::{ConnId, Output, StaleSeen, Violation};
use super::handles::ReplyTo;
use super::medium::MediumOp;
use super::page_ops::{Exec, Work};
use super::{Due, Owner, StorageServer};
use crate::ids::{BootId, Generation, ServerId, SessionId, VolumeId};
use crate::layer::PageKey;
use crate::limits::{BEHIND_ASK_MEMBER_MS, MAX_GENERATIONS_AHEAD, WINDOW_BYTES, WINDOW_REQUESTS};
use crate::map::AccessMode;
use crate::mutants::{Mutant, on};
use crate::wire::{Opener, Place, ReplyBody, RequestBody, RequestFrame, RequestHeader};
use bytes::Bytes;
use std::collections::BTreeMap;

impl StorageServer {
    pub(super) fn frame(&mut self, conn: ConnId, frame: RequestFrame) {
        let RequestFrame { header, body, payload } = frame;
        if !self.conns.contains_key(&conn) {
            return self.hello(conn, header, &body);
        }
        match &body {
            RequestBody::Hello { .. } => self.violation(conn, Violation::Hello),
            RequestBody::Open { .. } => self.open(conn, header, &body),
            RequestBody::Join => self.join(conn, header),
            _ => self.volume_request(conn, header, body, payload),
        }
    }

    fn volume_request(&mut self, conn: ConnId, header: RequestHeader, body: RequestBody, payload: Bytes) {
        let Some(handle) = self.handles.get(&header.handle) else {
            let highest = self.highest_of(header.handle);
            return self.answer(conn, &header, BootId::NONE, ReplyBody::Superseded { highest }, Bytes::new());
        };
        let bytes = request_bytes(&body);
        if !handle.conns.contains(&conn) {
            return self.violation(conn, Violation::Handle);
        }
        if handle.requests >= WINDOW_REQUESTS || handle.bytes + bytes > WINDOW_BYTES {
            return self.violation(conn, Violation::Window);
        }
        let volume = handle.volume;
        if matches!(body, RequestBody::GetMap) {
            let known = &self.volumes[&volume];
            let reply =
                known.map.clone().map_or(ReplyBody::Behind { own: Generation(0) }, |map| ReplyBody::Map { map });
            return self.answer(conn, &header, BootId::NONE, reply, Bytes::new());
        }
        if let Err(reply) = self.compare_request(volume, &header, &body) {
            self.refused(volume, &header, &reply);
            return self.answer(conn, &header, BootId::NONE, reply, Bytes::new());
        }
        let to = ReplyTo { conn, header, bytes };
        match (self.handles[&header.handle].opener, body) {
            (Opener::Session { session }, body) => self.session_request(to, volume, session, body, payload),
            (Opener::Peer { server }, body) => self.peer_request(to, volume, server, body),
        }
    }

    fn compare_request(&self, volume: VolumeId, header: &RequestHeader, body: &RequestBody) -> Result<(), ReplyBody> {
        let handle = &self.handles[&header.handle];
        let known = &self.volumes[&volume];
        let highest = self.highest_of(header.handle);
        let map = known.map.as_ref();
        let range = map.and_then(|map| {
            let place = place_of(body)?;
            let layer = map.layers.iter().find(|l| l.id == place.layer)?;
            let geometry = map.geometry(layer);
            if place.group >= geometry.groups || place.page >= geometry.pages(place.group) {
                return None;
            }
            let start = geometry.address_of(place.group, place.page, place.offset);
            let last =
                geometry.address_of(place.group, place.page, place.offset.saturating_add(place.length).max(1) - 1);
            Some((start, last + 1 - start))
        });
        let compared = compare(&Facts {
            map,
            promised: known.promised,
            superseded: handle.dead
                || (matches!(handle.opener, Opener::Session { .. })
                    && handle.incarnation < highest
                    && !on(Mutant::IncarnationNotCompared)),
            highest,
            opener: handle.opener,
            generation: header.generation,
            range,
        });
        match known.not_yet(header.generation) {
            Some(own) => compared.and(Err(ReplyBody::Behind { own })),
            None => compared,
        }
    }

    /// What follows from a refusal beside the reply: a stale client is told to the operator, a server that is behind
    /// asks for the map.
    fn refused(&mut self, volume: VolumeId, header: &RequestHeader, reply: &ReplyBody) {
        let session = match self.handles[&header.handle].opener {
            Opener::Session { session } => session,
            Opener::Peer { .. } => SessionId::NONE,
        };
        let own = self.volumes[&volume].stored();
        match reply {
            ReplyBody::Behind { .. } if header.generation > own => self.note_behind(volume, header.generation),
            ReplyBody::Stale { wait_for } => {
                self.out.push(Output::StaleSeen(StaleSeen {
                    volume,
                    session,
                    had: header.generation,
                    need: *wait_for,
                }));
            }
            ReplyBody::Ended => {
                self.out.push(Output::StaleSeen(StaleSeen { volume, session, had: header.generation, need: own }));
            }
            _ => {}
        }
    }

    fn session_request(
        &mut self,
        to: ReplyTo,
        volume: VolumeId,
        session: SessionId,
        body: RequestBody,
        payload: Bytes,
    ) {
        let map = self.volumes[&volume].map.as_ref().expect("compared");
        let mode = map.session(session).map(|s| s.mode);
        assert!(mode.is_some() || on(Mutant::EndedGoesOn), "compared");
        if mode == Some(AccessMode::ReadOnly) && body.changes_blocks() {
            return self.violation(to.conn, Violation::NotAllowed);
        }
        self.note_confirmed(volume, session, to.header.handle, to.header.confirmed);
        match body {
            RequestBody::Read { place } => {
                self.begin_place(to, volume, place, Needs::Active, |blocks| Work::read(to, blocks))
            }
            RequestBody::Write { place } => {
                self.begin_place(to, volume, place, Needs::Writer, |_| Work::Write { to, data: payload });
            }
            RequestBody::Discard { place } => {
                self.begin_place(to, volume, place, Needs::Writer, |_| Work::Discard { to })
            }
            RequestBody::Flush => self.flush(to, volume),
            RequestBody::Reserve { pages } => self.reserve(to, volume, &pages),
            RequestBody::Release { pages } => self.give_back(to, volume, session, &pages),
            RequestBody::Written { layer, group, from } => self.survey(to, volume, (layer, group), from),
            RequestBody::Ping => self.all_serve(to, volume, Needs::Active),
            RequestBody::Confirm => self.simple(to, ReplyBody::Done),
            RequestBody::Adopt { incarnation } => {
                self.adopt(volume, session, to.header.handle, incarnation);
                self.simple(to, ReplyBody::Done);
            }
            RequestBody::Handled { loss } => self.handled(to.conn, to.header, volume, session, loss),
            _ => self.violation(to.conn, Violation::NotAllowed),
        }
    }

    fn peer_request(&mut self, to: ReplyTo, volume: VolumeId, peer: ServerId, body: RequestBody) {
        match body {
            RequestBody::Fill { layer, group, page } => self.serve_page(to, volume, (layer, group), page, false),
            RequestBody::Settle { layer, group, page } => self.serve_page(to, volume, (layer, group), page, true),
            RequestBody::Suspects { layer, group } => self.serve_suspects(to, volume, peer, (layer, group)),
            _ => self.violation(to.conn, Violation::NotAllowed),
        }
    }

    pub(super) fn simple(&mut self, to: ReplyTo, body: ReplyBody) {
        self.grant(to.header.handle);
        self.answer(to.conn, &to.header, BootId::NONE, body, Bytes::new());
    }

    /// Finds the copy that the map names for a place, with its open device (row 6 of the comparator).
    pub(super) fn locate(
        &self,
        volume: VolumeId,
        place: &Place,
        needs: Needs,
    ) -> Result<(BootId, PageKey, u32), Located> {
        let known = &self.volumes[&volume];
        let map = known.map.as_ref().expect("compared");
        let layer = map.layers.iter().find(|l| l.id == place.layer).ok_or(Located::Reply(ReplyBody::NoCopy))?;
        let geometry = map.geometry(layer);
        if place.group >= geometry.groups || place.page >= geometry.pages(place.group) || !place.fits(layer.page_bytes)
        {
            return Err(Located::Nonsense);
        }
        let copy = known.copy_in_group(layer.placement, place.group, self.config.server);
        let copy = copy.filter(|c| c.layers.contains_key(&layer.id)).ok_or(Located::Reply(ReplyBody::NoCopy))?;
        member_serves(map, layer.placement, place.group, self.config.server, copy.boot, needs)
            .map_err(Located::Reply)?;
        if needs == Needs::Writer && layer.sealed.is_some() {
            return Err(Located::Reply(ReplyBody::NotServing));
        }
        let boot = copy.boot.expect("member_serves has compared it");
        Ok((boot, copy.key(layer.id, place.page), layer.page_bytes))
    }

    fn begin_place(
        &mut self,
        to: ReplyTo,
        volume: VolumeId,
        place: Place,
        needs: Needs,
        work: impl FnOnce(std::ops::Range<u32>) -> Work,
    ) {
        match self.locate(volume, &place, needs) {
            Err(Located::Nonsense) => self.violation(to.conn, Violation::Place),
            Err(Located::Reply(reply)) => self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok((boot, page, _)) => {
                let blocks = place.blocks();
                let work = work(blocks.clone());
                self.begin(Exec::new(volume, boot, page, blocks, work));
            }
        }
    }

    /// A ping: answered as a read would be, by every copy of the volume that the map lists here as a reader.
    fn all_serve(&mut self, to: ReplyTo, volume: VolumeId, needs: Needs) {
        let boots = self.serving_boots(volume, needs);
        match boots {
            Ok(boots) => {
                let boot = boots.keys().next().copied().unwrap_or_default();
                self.answer(to.conn, &to.header, boot, ReplyBody::Done, Bytes::new());
            }
            Err(reply) => self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
        }
    }

    /// The openings of all copies that the map lists here as serving; an error if any of them is not as listed, or there
    /// is none.
    pub(super) fn serving_boots(&self, volume: VolumeId, needs: Needs) -> Result<BTreeMap<BootId, ()>, ReplyBody> {
        let known = &self.volumes[&volume];
        let map = known.map.as_ref().expect("compared");
        let mut boots = BTreeMap::new();
        let mut listed = false;
        for (placement, group, members) in map.groups() {
            let Some(member) = members.members.iter().find(|m| m.server == self.config.server) else { continue };
            listed = true;
            let serves = member.state == crate::map::MemberState::Active
                || (needs == Needs::Writer && member.state == crate::map::MemberState::Syncing);
            if serves {
                let open = known.copies.get(&member.copy).and_then(|copy| copy.boot);
                member_serves(map, placement, group, self.config.server, open, needs)?;
                boots.insert(member.boot, ());
            }
        }
        match (boots.is_empty(), listed) {
            (false, _) => Ok(boots),
            (true, true) => Err(ReplyBody::NotServing),
            (true, false) => Err(ReplyBody::NoCopy),
        }
    }

    fn flush(&mut self, to: ReplyTo, volume: VolumeId) {
        match self.serving_boots(volume, Needs::Writer) {
            Err(reply) => self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok(boots) => {
                let first = *boots.keys().next().expect("not empty");
                let boots: Vec<BootId> = boots.into_keys().collect();
                if on(Mutant::FlushWithoutDisk) {
                    return self.answer(to.conn, &to.header, first, ReplyBody::Done, Bytes::new());
                }
                let exec = self.admit(Exec::flush(volume, first, to, boots.clone()));
                for boot in boots {
                    self.medium(boot, Owner::Flush(exec), MediumOp::Flush);
                }
            }
        }
    }

    /// A request is ahead of this server: ask the operator now, and again until the map is here.
    pub(super) fn note_behind(&mut self, volume: VolumeId, at_least: Generation) {
        let Some(known) = self.volumes.get_mut(&volume) else { return };
        let beyond_reach = at_least.0.saturating_sub(known.stored().0) > MAX_GENERATIONS_AHEAD;
        if beyond_reach || known.behind.is_some_and(|asked| asked >= at_least) {
            return;
        }
        let first = known.behind.replace(at_least).is_none();
        self.out.push(Output::AskMap { volume, at_least });
        if first {
            self.due(self.now.after(BEHIND_ASK_MEMBER_MS), Due::Behind(volume));
        }
    }

    pub(super) fn behind_due(&mut self, volume: VolumeId) {
        let Some(known) = self.volumes.get_mut(&volume) else { return };
        let Some(at_least) = known.behind else { return };
        if known.stored() >= at_least {
            known.behind = None;
        } else {
            self.out.push(Output::AskMap { volume, at_least });
            self.due(self.now.after(BEHIND_ASK_MEMBER_MS), Due::Behind(volume));
        }
    }
}

/// Why a place leads to no copy.
pub(super) enum Located {
    /// Say so.
    Reply(ReplyBody),
    /// Not a place at all: the client breaks the protocol.
    Nonsense,
}

fn place_of(body: &RequestBody) -> Option<&Place> {
    match body {
        RequestBody::Read { place } | RequestBody::Write { place } | RequestBody::Discard { place } => Some(place),
        _ => None,
    }
}

/// Bytes that a request takes of its handle's window: what is moved.
fn request_bytes(body: &RequestBody) -> u64 {
    match body {
        RequestBody::Read { place } | RequestBody::Write { place } => u64::from(place.length),
        _ => 0,
    }
}
