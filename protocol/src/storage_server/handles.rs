//! Connections and handles: `Hello`, `Open`, `Join`, windows and credits (PROTOCOL.md, Attempts; H1, R7, H20, R8).
//!
//! ```text
//! Open ──► lower handles of the session dead ──► their executing requests over ──► incarnation durable ──► Opened
//! ```

use super::contract::{ConnId, Output, Violation};
use super::{Owner, StorageServer};
use crate::ids::{BootId, Generation, Incarnation, OpenNumber, SessionId, VolumeId};
use crate::limits::{CREDIT_PAGES, CREDIT_SHARE, MAX_FRAME_BYTES, MAX_HANDLES, WINDOW_BYTES, WINDOW_REQUESTS};
use crate::mutants::{Mutant, on};
use crate::wire::{
    Class, HandleId, Opener, ReplyBody, ReplyFrame, ReplyHeader, RequestBody, RequestHeader, RequestId, WIRE_VERSION,
};
use bytes::Bytes;
use std::collections::BTreeSet;

/// An accepted connection.
#[derive(Debug, Default)]
pub(super) struct Conn {
    pub(super) handles: BTreeSet<HandleId>,
}

/// What an `Open` made.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) volume: VolumeId,
    pub(super) opener: Opener,
    pub(super) incarnation: Incarnation,
    pub(super) conns: BTreeSet<ConnId>,
    /// A higher handle was opened, or its connections are gone: nothing more is admitted.
    pub(super) dead: bool,
    pub(super) requests: u32,
    pub(super) bytes: u64,
    /// Pages granted since it was opened, and those that a write has taken (R8).
    pub(super) granted: u64,
    pub(super) used: u64,
}

/// Names a [`WaitingOpen`] to what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenId(u64);

/// An answer that waits for something durable, or for lower handles to fall silent.
#[derive(Debug)]
pub(super) struct WaitingOpen {
    id: OpenId,
    conn: ConnId,
    header: RequestHeader,
    volume: VolumeId,
    /// The new handle; `None` for a `Handled`.
    handle: Option<HandleId>,
    /// Commits not yet durable.
    commits: usize,
}

impl WaitingOpen {
    pub(super) fn is_of(&self, volume: VolumeId) -> bool {
        self.volume == volume
    }
}

/// Where a reply goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReplyTo {
    pub(super) conn: ConnId,
    pub(super) header: RequestHeader,
    pub(super) bytes: u64,
}

impl StorageServer {
    /// First frame of a connection.
    pub(super) fn hello(&mut self, conn: ConnId, header: RequestHeader, body: &RequestBody) {
        let RequestBody::Hello { cluster, server, min_version, max_version, .. } = body else {
            return self.violation(conn, Violation::Hello);
        };
        if *cluster != self.config.cluster {
            return self.violation(conn, Violation::WrongCluster);
        }
        if *server != self.config.server {
            return self.violation(conn, Violation::WrongServer);
        }
        if !(*min_version..=*max_version).contains(&WIRE_VERSION) {
            return self.violation(conn, Violation::Version);
        }
        self.conns.insert(conn, Conn::default());
        let hello = ReplyBody::Hello {
            server: self.config.server,
            version: WIRE_VERSION,
            features: 0,
            max_frame_bytes: MAX_FRAME_BYTES,
            window_requests: WINDOW_REQUESTS,
            window_bytes: WINDOW_BYTES,
        };
        self.answer(conn, &header, BootId::NONE, hello, Bytes::new());
    }

    pub(super) fn violation(&mut self, conn: ConnId, why: Violation) {
        self.out.push(Output::Close { conn, why });
        self.conn_closed(conn);
    }

    pub(super) fn conn_closed(&mut self, conn: ConnId) {
        let Some(gone) = self.conns.remove(&conn) else { return };
        for id in gone.handles {
            let Some(handle) = self.handles.get_mut(&id) else { continue };
            handle.conns.remove(&conn);
            handle.dead |= handle.conns.is_empty();
            self.forget_handle(id);
        }
        self.opens.retain(|open| open.conn != conn);
        for known in self.volumes.values_mut() {
            known.ahead.remove(&conn);
        }
        self.finish_opens();
    }

    /// A handle is kept while a request of it executes or a connection may still name it.
    pub(super) fn forget_handle(&mut self, id: HandleId) {
        if self.handles.get(&id).is_some_and(|h| h.dead && h.requests == 0 && h.conns.is_empty()) {
            self.handles.remove(&id);
        }
    }

    pub(super) fn open(&mut self, conn: ConnId, header: RequestHeader, body: &RequestBody) {
        let RequestBody::Open { volume, opener, incarnation, number, .. } = *body else { unreachable!("dispatched") };
        match self.may_open(volume, opener, incarnation, number, header.generation) {
            Err(refusal) => {
                if let (ReplyBody::Behind { .. }, Some(known)) = (&refusal, self.volumes.get_mut(&volume)) {
                    known.ahead.insert(conn);
                }
                self.answer(conn, &header, BootId::NONE, refusal, Bytes::new());
            }
            Ok(()) if self.handles.len() >= MAX_HANDLES => {
                self.answer(conn, &header, BootId::NONE, ReplyBody::Unsupported, Bytes::new());
            }
            Ok(()) => self.begin_open(conn, header, volume, opener, (incarnation, number)),
        }
    }

    fn may_open(
        &mut self,
        volume: VolumeId,
        opener: Opener,
        incarnation: Incarnation,
        number: OpenNumber,
        generation: Generation,
    ) -> Result<(), ReplyBody> {
        let Some(known) = self.volumes.get(&volume).filter(|v| !v.copies.is_empty()) else {
            return Err(ReplyBody::NoCopy);
        };
        let own = known.stored();
        if generation > own || own == Generation(0) {
            self.note_behind(volume, generation);
            return Err(ReplyBody::Behind { own });
        }
        if let Some(own) = known.not_yet(generation) {
            return Err(ReplyBody::Behind { own });
        }
        let map = known.map.as_ref().expect("a stored generation has a map");
        let session = match opener {
            Opener::Peer { server } => return map.server(server).map(|_| ()).ok_or(ReplyBody::Ended),
            Opener::Session { session } => session,
        };
        if map.session(session).is_none() {
            return Err(ReplyBody::Ended);
        }
        // R3: nothing here could keep the incarnation.
        if known.boots().is_empty() {
            return Err(ReplyBody::NotServing);
        }
        let Some(heard) = known.sessions.get(&session) else { return Ok(()) };
        if heard.incarnation > incarnation && !on(Mutant::IncarnationNotCompared) {
            return Err(ReplyBody::Superseded { highest: heard.incarnation });
        }
        match heard.opens.get(&incarnation) {
            Some(&highest) if highest >= number && !on(Mutant::LowerOpenTaken) => {
                Err(ReplyBody::OpenRefused { highest })
            }
            _ => Ok(()),
        }
    }

    fn begin_open(
        &mut self,
        conn: ConnId,
        header: RequestHeader,
        volume: VolumeId,
        opener: Opener,
        (incarnation, number): (Incarnation, OpenNumber),
    ) {
        let (mut commits, waiting) = (0, OpenId(self.mint()));
        if let Opener::Session { session } = opener {
            let heard = self.known(volume).sessions.entry(session).or_default();
            heard.opens.insert(incarnation, number);
            let kept = heard.durable >= incarnation;
            heard.incarnation = heard.incarnation.max(incarnation);
            self.kill_handles(volume, session);
            if !kept && !on(Mutant::IncarnationVolatile) {
                commits = self.persist(volume, Owner::Open(waiting));
            }
        }
        let id = HandleId(self.mint());
        let handle = Handle {
            volume,
            opener,
            incarnation,
            conns: BTreeSet::from([conn]),
            dead: false,
            requests: 0,
            bytes: 0,
            granted: 0,
            used: 0,
        };
        self.handles.insert(id, handle);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.handles.insert(id);
        }
        self.opens.push(WaitingOpen { id: waiting, conn, header, volume, handle: Some(id), commits });
        self.finish_opens();
    }

    fn kill_handles(&mut self, volume: VolumeId, session: SessionId) {
        if on(Mutant::OldHandlesLive) || on(Mutant::IncarnationNotCompared) {
            return;
        }
        let opener = Opener::Session { session };
        for handle in self.handles.values_mut().filter(|h| h.volume == volume && h.opener == opener) {
            handle.dead = true;
        }
        // An `Open` that was still waiting is answered by nothing: its handle is dead before it was ever named.
        let dead = &self.handles;
        self.opens.retain(|open| open.handle.is_none_or(|id| dead.get(&id).is_some_and(|h| !h.dead)));
    }

    /// A commit is durable that an `Open` or `Handled` waits for; it may have been given up meanwhile.
    pub(super) fn open_durable(&mut self, id: OpenId) {
        let Some(open) = self.opens.iter_mut().find(|o| o.id == id) else { return };
        open.commits -= 1;
        let (commits, volume) = (open.commits, open.volume);
        let by = open.handle.and_then(|id| self.handles.get(&id)).map(|h| (h.opener, h.incarnation));
        if let (0, Some((Opener::Session { session }, incarnation))) = (commits, by) {
            let known = self.known(volume).sessions.entry(session).or_default();
            known.durable = known.durable.max(incarnation);
        }
        self.finish_opens();
    }

    /// The device failed before it kept what an `Open` or `Handled` waits for: that is no success (R3).
    pub(super) fn open_lost(&mut self, id: OpenId) {
        let Some(at) = self.opens.iter().position(|o| o.id == id) else { return };
        let open = self.opens.remove(at);
        if let Some(handle) = open.handle {
            if let Some(conn) = self.conns.get_mut(&open.conn) {
                conn.handles.remove(&handle);
            }
            self.handles.remove(&handle);
        }
        self.answer(open.conn, &open.header, BootId::NONE, ReplyBody::NotServing, Bytes::new());
    }

    /// Answers every `Open` whose lower handles have fallen silent (H1) and whose incarnation is durable (H20).
    pub(super) fn finish_opens(&mut self) {
        if self.opens.is_empty() {
            return;
        }
        let waiting = std::mem::take(&mut self.opens);
        let (ready, rest) = waiting.into_iter().partition(|open| open.commits == 0 && self.lower_are_silent(open));
        self.opens = rest;
        for open in ready {
            self.finish_open(&open);
        }
    }

    fn lower_are_silent(&self, open: &WaitingOpen) -> bool {
        let Some(own) = open.handle.and_then(|id| self.handles.get(&id)) else { return true };
        let same = |h: &Handle| h.volume == own.volume && h.opener == own.opener;
        let waits = !matches!(own.opener, Opener::Peer { .. }) && !on(Mutant::OpenWithoutSilence);
        !waits || !self.handles.values().any(|h| same(h) && h.dead && h.requests > 0)
    }

    fn finish_open(&mut self, open: &WaitingOpen) {
        let Some(id) = open.handle else {
            return self.answer(open.conn, &open.header, BootId::NONE, ReplyBody::Done, Bytes::new());
        };
        self.grant(id);
        let known = self.known(open.volume);
        let map = known.map.clone();
        let (incarnation, handled) = match self.handles[&id].opener {
            Opener::Peer { .. } => (Incarnation(0), Generation(0)),
            Opener::Session { session } => self
                .known(open.volume)
                .sessions
                .get(&session)
                .map_or_else(Default::default, |s| (s.incarnation, s.handled)),
        };
        let body = ReplyBody::Opened { handle: id, incarnation, handled, map };
        let header = RequestHeader { handle: id, ..open.header };
        self.answer(open.conn, &header, BootId::NONE, body, Bytes::new());
    }

    /// The driver has written again what a loss took (R2): durable before it is answered.
    pub(super) fn handled(
        &mut self,
        conn: ConnId,
        header: RequestHeader,
        volume: VolumeId,
        session: SessionId,
        loss: Generation,
    ) {
        let heard = self.known(volume).sessions.entry(session).or_default();
        heard.handled = heard.handled.max(loss);
        let id = OpenId(self.mint());
        let commits = self.persist(volume, Owner::Open(id));
        self.opens.push(WaitingOpen { id, conn, header, volume, handle: None, commits });
        self.finish_opens();
    }

    pub(super) fn join(&mut self, conn: ConnId, header: RequestHeader) {
        let Some(handle) = self.handles.get_mut(&header.handle).filter(|h| !h.dead) else {
            let highest = self.highest_of(header.handle);
            return self.answer(conn, &header, BootId::NONE, ReplyBody::Superseded { highest }, Bytes::new());
        };
        handle.conns.insert(conn);
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.handles.insert(header.handle);
        }
        self.answer(conn, &header, BootId::NONE, ReplyBody::Done, Bytes::new());
    }

    /// The highest incarnation known of a handle's session; 0 for a handle that nobody knows.
    pub(super) fn highest_of(&self, id: HandleId) -> Incarnation {
        let known = self.handles.get(&id).and_then(|h| match h.opener {
            Opener::Session { session } => self.volumes.get(&h.volume)?.sessions.get(&session),
            Opener::Peer { .. } => None,
        });
        known.map_or(Incarnation(0), |s| s.incarnation)
    }

    /// Keeps a handle's credit at a working level while there is room beyond the reserve (R8).
    pub(super) fn grant(&mut self, id: HandleId) {
        let Some(handle) = self.handles.get(&id) else { return };
        if handle.granted - handle.used.min(handle.granted) > CREDIT_PAGES / 2 {
            return;
        }
        let room = self.room_pages(handle.volume);
        if let Some(handle) = self.handles.get_mut(&id) {
            // Of little room each gets a little: who takes nothing of it does not starve the others.
            handle.granted += (room / CREDIT_SHARE).min(CREDIT_PAGES);
        }
    }

    /// Pages that can still be promised to somebody, on the device of this volume with least room.
    fn room_pages(&self, volume: VolumeId) -> u64 {
        let Some(known) = self.volumes.get(&volume) else { return 0 };
        let least = known.boots().iter().map(|boot| self.room_bytes(*boot)).min().unwrap_or(0);
        least / u64::from(largest_page(known).unwrap_or(u32::MAX)).max(1)
    }

    /// Bytes of pages that handles were promised and have not taken.
    pub(super) fn promised_bytes(&self) -> u64 {
        let live = self.handles.values().filter(|h| !h.dead);
        let promised = live.map(|h| {
            let bytes = self.volumes.get(&h.volume).and_then(largest_page).unwrap_or(0);
            h.granted.saturating_sub(h.used) * u64::from(bytes)
        });
        promised.sum()
    }

    /// Sends a reply; the boot id is that of the copy's device, the credit that of the handle.
    pub(super) fn answer(&mut self, conn: ConnId, to: &RequestHeader, boot: BootId, body: ReplyBody, payload: Bytes) {
        let handle = self.handles.get(&to.handle);
        let generation = handle.and_then(|h| self.volumes.get(&h.volume)).map_or(Generation(0), super::Volume::stored);
        let header = ReplyHeader {
            request: to.request,
            handle: to.handle,
            class: to.class,
            boot,
            generation,
            credit: handle.map_or(0, |h| h.granted),
            token: to.seq,
        };
        self.out.push(Output::Reply { conn, frame: ReplyFrame { header, body, payload } });
    }

    /// Hands a stored map to every open session of the volume, over each of its connections.
    pub(super) fn push_map(&mut self, volume: VolumeId) {
        let Some(map) = self.volumes.get(&volume).and_then(|v| v.map.clone()) else { return };
        let opening: BTreeSet<_> = self.opens.iter().filter_map(|o| o.handle).collect();
        let live = self.handles.iter().filter(|(id, h)| h.volume == volume && !h.dead && !opening.contains(id));
        let mut to: Vec<_> = live.flat_map(|(id, h)| h.conns.iter().map(|conn| (*conn, *id))).collect();
        let ahead = std::mem::take(&mut self.known(volume).ahead);
        to.extend(ahead.into_iter().filter(|conn| self.conns.contains_key(conn)).map(|conn| (conn, HandleId(0))));
        for (conn, handle) in to {
            let header =
                RequestHeader { request: RequestId(0), handle, class: Class::Foreground, ..Default::default() };
            self.answer(conn, &header, BootId::NONE, ReplyBody::Map { map: map.clone() }, Bytes::new());
        }
    }
}

fn largest_page(volume: &super::Volume) -> Option<u32> {
    volume.copies.values().flat_map(|c| c.layers.values()).map(|l| l.page_bytes).max()
}
