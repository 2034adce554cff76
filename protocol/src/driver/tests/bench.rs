//! A driver with servers whose answers the test writes.

use super::super::*;
use crate::control::Trouble;
use crate::ids::{BootId, CopyId, Generation, Incarnation, LayerId, Seq};
use crate::map::{
    AccessMode, Group, Layer, Member, MemberState, Placement, Scheme, ServerEntry, Session, Settle, Standing,
};
use crate::wire::{HandleId, ReplyBody, ReplyHeader, RequestBody, RequestFrame};

pub(super) const VOLUME: VolumeId = VolumeId(7);
pub(super) const SESSION: SessionId = SessionId(8);
pub(super) const KIB: u64 = 1024;
pub(super) const PAGE: u64 = 64 * KIB;

/// Server `s` of group `g` holds copy `10 * g + s`.
pub(super) fn map(generation: u64, groups: &[&[(u64, MemberState)]]) -> VolumeMap {
    let member = |g: usize, i: usize, (server, state): (u64, MemberState)| Member {
        ordinal: i as u8,
        copy: CopyId(u128::from(10 * g as u64 + server)),
        server: ServerId(server.into()),
        boot: BootId(server.into()),
        state,
        avoid: false,
        unpromised: false,
    };
    let group = |g: usize, members: &[(u64, MemberState)]| Group {
        members: members.iter().enumerate().map(|(i, m)| member(g, i, *m)).collect(),
        loss: Generation(0),
        settle: Settle::None,
    };
    let session = Session {
        id: SESSION,
        node: "n".into(),
        mode: AccessMode::ReadWrite,
        incarnation: Incarnation(0),
        handled: Generation(1),
        standing: Standing::Admitted,
    };
    let entry = |id| ServerEntry { id: ServerId(id), addresses: vec![format!("s{id}:1")] };
    let layer = Layer {
        id: LayerId(5),
        size: 64 << 20,
        page_bytes: PAGE as u32,
        scheme: Scheme::Replicate,
        chunk_bytes: PAGE as u32,
        placement: 0,
        sealed: None,
    };
    let map = VolumeMap {
        volume: VOLUME,
        generation: Generation(generation),
        format: crate::map::MAP_FORMAT,
        required_features: 0,
        size: 64 << 20,
        multi_session: false,
        servers: (0..10).map(entry).collect(),
        placements: vec![Placement { groups: groups.iter().enumerate().map(|(g, m)| group(g, m)).collect() }],
        layers: vec![layer],
        sessions: vec![session],
        revoked: vec![],
    };
    assert_eq!(map.validate(), Ok(()));
    map
}

pub(super) use MemberState::{Active, Failed, Syncing};

/// One group of two `Active` members on servers 1 and 2.
pub(super) fn pair(generation: u64) -> VolumeMap {
    map(generation, &[&[(1, Active), (2, Active)]])
}

/// A frame on its way to a server.
#[derive(Clone, Debug)]
pub(super) struct Flying {
    pub(super) server: u64,
    pub(super) link: LinkId,
    pub(super) frame: RequestFrame,
}

pub(super) struct Bench {
    pub(super) driver: Driver,
    pub(super) now: Millis,
    pub(super) flying: Vec<Flying>,
    pub(super) done: Vec<(u64, Result<Bytes, OpError>)>,
    pub(super) reports: Vec<(u128, Trouble)>,
    pub(super) connects: Vec<u128>,
    pub(super) disconnects: Vec<LinkId>,
    pub(super) exited: bool,
    pub(super) wake_at: Millis,
    pub(super) credit: u64,
    next_link: u64,
    next_handle: u64,
    links: BTreeMap<LinkId, u64>,
}

impl Bench {
    pub(super) fn new(start: Start) -> Self {
        let config = Config { volume: VOLUME, session: SESSION, start, kept_bytes: 4 << 20 };
        Self {
            driver: Driver::new(config),
            now: Millis(1_000),
            flying: vec![],
            done: vec![],
            reports: vec![],
            connects: vec![],
            disconnects: vec![],
            exited: false,
            wake_at: Millis::NEVER,
            credit: 1000,
            next_link: 0,
            next_handle: 100,
            links: BTreeMap::new(),
        }
    }

    /// A fresh driver that serves under this map.
    pub(super) fn serving(map: VolumeMap) -> Self {
        let mut bench = Self::new(Start::Fresh);
        bench.input(Input::Map(map));
        bench.connect_all();
        bench.open_all();
        assert!(bench.driver.is_serving());
        bench
    }

    pub(super) fn input(&mut self, input: Input) {
        let mut out = Vec::new();
        self.driver.handle(self.now, input, &mut out);
        for output in out {
            assert!(!self.exited, "nothing comes after Exit");
            match output {
                Output::Connect { server, .. } => self.connects.push(server.0),
                Output::Disconnect { link } => {
                    self.flying.retain(|f| f.link != link);
                    self.disconnects.push(link);
                }
                Output::Send { link, frame } => {
                    self.flying.push(Flying { server: self.links[&link], link, frame });
                }
                Output::Complete { tag, result } => self.done.push((tag.0, result)),
                Output::Report(report) => self.reports.push((report.server.0, report.trouble)),
                Output::WakeAt(at) => self.wake_at = at,
                Output::Exit => self.exited = true,
            }
        }
    }

    /// Every connection that was asked for is made.
    pub(super) fn connect_all(&mut self) {
        for server in std::mem::take(&mut self.connects) {
            self.next_link += 1;
            let link = LinkId(self.next_link);
            self.links.insert(link, server as u64);
            self.input(Input::Connected { server: ServerId(server), link });
        }
    }

    /// The connection to a server breaks; what is under way on it is lost.
    pub(super) fn cut(&mut self, server: u64, refused: bool) {
        let (&link, _) = self.links.iter().rfind(|(_, s)| **s == server).unwrap();
        self.flying.retain(|f| f.link != link);
        self.input(Input::Broken { server: ServerId(server.into()), link: Some(link), refused });
    }

    /// Time goes on; the timer fires when it is due.
    pub(super) fn wait(&mut self, ms: u64) {
        let until = self.now.after(ms);
        while self.wake_at <= until {
            self.now = self.now.max(self.wake_at);
            self.wake_at = Millis::NEVER;
            self.input(Input::Timer);
        }
        self.now = until;
    }

    pub(super) fn submit(&mut self, tag: u64, op: Op) {
        self.input(Input::Submit { tag: Tag(tag), op });
    }

    pub(super) fn write(&mut self, tag: u64, address: u64, length: u64) {
        let data = Bytes::from(vec![tag as u8; length as usize]);
        self.submit(tag, Op::Write { address, data });
    }

    pub(super) fn read(&mut self, tag: u64, address: u64, length: u64) {
        self.submit(tag, Op::Read { address, length });
    }

    /// Take the first frame to a server that fits.
    pub(super) fn take(&mut self, server: u64, fits: impl Fn(&RequestBody) -> bool) -> Option<Flying> {
        let at = self.flying.iter().position(|f| f.server == server && fits(&f.frame.body))?;
        Some(self.flying.remove(at))
    }

    pub(super) fn take_write(&mut self, server: u64) -> Flying {
        self.take(server, |body| matches!(body, RequestBody::Write { .. })).expect("a write to this server")
    }

    /// What is under way to a server, by name.
    pub(super) fn under_way(&self, server: u64) -> Vec<&'static str> {
        self.flying.iter().filter(|f| f.server == server).map(|f| name(&f.frame.body)).collect()
    }

    pub(super) fn reply(&mut self, to: &Flying, body: ReplyBody) {
        self.reply_with(to, body, Bytes::new());
    }

    pub(super) fn reply_with(&mut self, to: &Flying, body: ReplyBody, payload: Bytes) {
        let request = to.frame.header;
        let header = ReplyHeader {
            request: request.request,
            handle: request.handle,
            generation: request.generation,
            credit: self.credit,
            token: request.seq,
            ..ReplyHeader::default()
        };
        self.input(Input::Frame { link: to.link, frame: ReplyFrame { header, body, payload } });
    }

    /// Answer with success; a read gets bytes that name the server.
    pub(super) fn serve(&mut self, to: &Flying) {
        match &to.frame.body {
            RequestBody::Open { incarnation, .. } => {
                self.next_handle += 1;
                let (handle, incarnation) = (HandleId(self.next_handle), *incarnation);
                let opened = ReplyBody::Opened { handle, incarnation, handled: Generation(0), map: None };
                self.reply(to, opened);
            }
            RequestBody::Read { place } => {
                let data = Bytes::from(vec![to.server as u8; place.length as usize]);
                self.reply_with(to, ReplyBody::Data, data);
            }
            _ => self.reply(to, ReplyBody::Done),
        }
    }

    pub(super) fn open_all(&mut self) {
        while let Some(at) = self.flying.iter().position(|f| matches!(f.frame.body, RequestBody::Open { .. })) {
            let open = self.flying.remove(at);
            self.serve(&open);
        }
    }

    /// Answer everything with success until nothing is under way.
    pub(super) fn serve_all(&mut self) {
        while !self.flying.is_empty() {
            let next = self.flying.remove(0);
            self.serve(&next);
        }
    }

    /// A member pushes a map that it has stored.
    pub(super) fn push(&mut self, server: u64, map: VolumeMap) {
        let (&link, _) = self.links.iter().rfind(|(_, s)| **s == server).unwrap();
        let header = ReplyHeader { generation: map.generation, ..ReplyHeader::default() };
        let frame = ReplyFrame { header, body: ReplyBody::Map { map }, payload: Bytes::new() };
        self.input(Input::Frame { link, frame });
    }

    pub(super) fn result(&self, tag: u64) -> Option<Result<Bytes, OpError>> {
        let results: Vec<_> = self.done.iter().filter(|(t, _)| *t == tag).collect();
        assert!(results.len() <= 1, "a request is answered once");
        results.first().map(|(_, result)| result.clone())
    }

    pub(super) fn is_done(&self, tag: u64) -> bool {
        self.result(tag).is_some()
    }
}

pub(super) fn name(body: &RequestBody) -> &'static str {
    match body {
        RequestBody::Open { .. } => "open",
        RequestBody::Read { .. } => "read",
        RequestBody::Write { .. } => "write",
        RequestBody::Discard { .. } => "discard",
        RequestBody::Flush => "flush",
        RequestBody::Reserve { .. } => "reserve",
        RequestBody::Release { .. } => "release",
        RequestBody::Ping => "ping",
        RequestBody::Written { .. } => "written",
        RequestBody::Confirm => "confirm",
        RequestBody::Adopt { .. } => "adopt",
        RequestBody::Handled { .. } => "handled",
        _ => "other",
    }
}

pub(super) fn is_write(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Write { .. })
}

pub(super) fn seq(flying: &Flying) -> Seq {
    flying.frame.header.seq
}
