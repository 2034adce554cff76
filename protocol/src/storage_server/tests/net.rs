//! A few whole servers, a medium that answers at once (or is held), and peers that are connected by the net.

use super::*;
use std::collections::{BTreeMap, VecDeque};

pub(super) const CLIENT: u64 = 1 << 32;

/// A device in memory. Everything is durable at once: crashes with loss are the simulator's matter.
#[derive(Clone, Debug, Default)]
pub(super) struct Medium {
    pub(super) pages: BTreeMap<PageKey, (PageRecord, Vec<u8>)>,
    pub(super) copies: BTreeMap<CopyId, CopyRecord>,
    pub(super) volumes: BTreeMap<VolumeId, Bytes>,
    pub(super) log: Vec<MediumOp>,
    pub(super) hold: bool,
    /// While held: one operation goes through.
    pub(super) release_one: bool,
    pub(super) free: u64,
    pub(super) rotten: Vec<(PageKey, u32)>,
    /// A page without a slot gets none.
    pub(super) full: bool,
    /// A page without an entry gets none, also not for its marks.
    pub(super) table_full: bool,
    /// Flushes are not answered while this is set, all else is.
    pub(super) hold_flushes: bool,
    flushes: VecDeque<(BootId, OpId)>,
    held: VecDeque<(BootId, OpId, MediumOp)>,
}

const PAGE: u32 = 65536;

impl Medium {
    fn entry(&mut self, page: PageKey) -> &mut (PageRecord, Vec<u8>) {
        self.pages.entry(page).or_insert_with(|| {
            let blocks = BlockStates::absent(PAGE / 4096);
            let record = PageRecord { allocated: false, blocks, unsynced: false, pending: false, missed: 0 };
            (record, vec![0; PAGE as usize])
        })
    }

    /// What gets its place takes of what is free.
    fn take_room(&mut self, op: &MediumOp) {
        let pages = match op {
            MediumOp::Write { page, .. } if !self.full => std::slice::from_ref(page),
            MediumOp::Allocate(pages) => pages,
            _ => return,
        };
        let new = pages.iter().filter(|page| !self.pages.get(page).is_some_and(|(record, _)| record.allocated));
        self.free = self.free.saturating_sub(new.count() as u64 * u64::from(PAGE));
    }

    /// Whether it needs an entry that is not there.
    fn lacks_entry(&self, record: &Record) -> bool {
        let page = match record {
            Record::Pending { page, set: true } | Record::Missed { page, .. } | Record::MarkUnsynced(page) => page,
            _ => return false,
        };
        self.table_full && !self.pages.contains_key(page)
    }

    fn apply(&mut self, op: MediumOp) -> MediumAnswer {
        self.log.push(op.clone());
        self.take_room(&op);
        if let MediumOp::Commit(records) = &op
            && records.iter().any(|record| self.lacks_entry(record))
        {
            return MediumAnswer::NoSpace;
        }
        match op {
            MediumOp::Write { page, .. } if self.full && !self.entry(page).0.allocated => return MediumAnswer::NoSpace,
            MediumOp::Load(page) => return MediumAnswer::Page(self.pages.get(&page).map(|(record, _)| record.clone())),
            MediumOp::Read { page, blocks } => return self.read(page, blocks),
            MediumOp::Write { page, first, data } => {
                let (record, bytes) = self.entry(page);
                record.allocated = true;
                record.blocks.set_range(first..first + data.len() as u32 / 4096, BlockState::Present);
                bytes[first as usize * 4096..][..data.len()].copy_from_slice(&data);
                self.rotten.retain(|(p, b)| *p != page || *b < first || *b >= first + data.len() as u32 / 4096);
            }
            MediumOp::Shape { page, changes } => {
                for (run, state) in changes {
                    self.entry(page).0.blocks.set_range(run, state);
                }
            }
            MediumOp::NextPage { copy, layer, from } => {
                let from = PageKey { copy, layer, page: from };
                let next = self.pages.range(from..).next().filter(|(k, _)| k.copy == copy && k.layer == layer);
                return MediumAnswer::NextPage(next.map(|(k, _)| k.page));
            }
            MediumOp::Commit(records) => records.into_iter().for_each(|record| self.commit(record)),
            MediumOp::Allocate(pages) => pages.into_iter().for_each(|page| self.entry(page).0.allocated = true),
            MediumOp::Release(pages) => pages.into_iter().for_each(|page| self.release(page)),
            MediumOp::Flush => {}
        }
        MediumAnswer::Done
    }

    fn release(&mut self, page: PageKey) {
        let record = &mut self.entry(page).0;
        if std::mem::replace(&mut record.allocated, !record.blocks.all(BlockState::Absent)) && !record.allocated {
            self.free += u64::from(PAGE);
        }
    }

    fn read(&mut self, page: PageKey, blocks: std::ops::Range<u32>) -> MediumAnswer {
        let mut data = self.entry(page).1[blocks.start as usize * 4096..blocks.end as usize * 4096].to_vec();
        let bad: Vec<u32> =
            blocks.clone().filter(|b| self.rotten.contains(&(page, *b))).map(|b| b - blocks.start).collect();
        for block in &bad {
            data[*block as usize * 4096..][..4096].fill(0);
        }
        MediumAnswer::Data { data: data.into(), bad }
    }

    fn commit(&mut self, record: Record) {
        match record {
            Record::Pending { page, set } => self.entry(page).0.pending = set,
            Record::MarkUnsynced(page) => {
                let record = &mut self.entry(page).0;
                record.unsynced = true;
                record.blocks.make_stale();
            }
            Record::ClearUnsynced(page) => self.entry(page).0.unsynced = false,
            Record::MarkLayerUnsynced { copy, layer } => {
                for (key, (record, _)) in &mut self.pages {
                    if key.copy == copy && key.layer == layer {
                        record.blocks.make_stale();
                    }
                }
                self.copies.get_mut(&copy).unwrap().layers[0].cursor = 0;
            }
            Record::TrustLayer { copy, layer } => {
                for (key, (record, _)) in &mut self.pages {
                    if key.copy == copy && key.layer == layer {
                        record.blocks.trust_stale(record.allocated);
                    }
                }
                self.copies.get_mut(&copy).unwrap().layers[0].cursor = u64::MAX;
            }
            Record::Cursor { copy, cursor, .. } => self.copies.get_mut(&copy).unwrap().layers[0].cursor = cursor,
            Record::Stale { page, blocks } => {
                blocks.iter().for_each(|b| self.entry(page).0.blocks.set(*b, BlockState::Stale));
            }
            Record::PutCopy(copy) => drop(self.copies.insert(copy.copy, copy)),
            Record::DropCopy(copy) => {
                self.copies.remove(&copy);
                self.pages.retain(|key, _| key.copy != copy);
            }
            Record::PutVolume { volume, blob } => drop(self.volumes.insert(volume, blob)),
            Record::DropVolume(volume) => drop(self.volumes.remove(&volume)),
            Record::Missed { page, mask } => self.entry(page).0.missed = mask,
            Record::DropPage(_) | Record::LeaseNumber(_) => {}
        }
    }

    pub(super) fn opened(&self, server: u128, boot: BootId) -> Opened {
        let flagged =
            |f: fn(&PageRecord) -> bool| self.pages.iter().filter(|(_, (r, _))| f(r)).map(|(k, _)| *k).collect();
        Opened {
            cluster: ClusterId(9),
            server: ServerId(server),
            device: DeviceId(server),
            boot,
            copies: self.copies.values().cloned().collect(),
            volumes: self.volumes.iter().map(|(v, b)| (*v, b.clone())).collect(),
            pending: flagged(|r| r.pending),
            missed: self.pages.iter().filter(|(_, (r, _))| r.missed != 0).map(|(k, (r, _))| (*k, r.missed)).collect(),
            unsynced: flagged(|r| r.unsynced),
            lease_number: 0,
            capacity_bytes: 1 << 30,
            free_bytes: self.free,
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) machine: StorageServer,
    pub(super) medium: Medium,
    pub(super) boot: BootId,
    /// A second device, if it is open.
    pub(super) other: Medium,
    pub(super) other_boot: Option<BootId>,
}

/// Servers 0…n-1 with ids 10…, copies 100…, one group, one page of 64 KiB per chunk.
#[derive(Debug)]
pub(super) struct Net {
    pub(super) servers: Vec<Node>,
    pub(super) replies: Vec<ReplyFrame>,
    pub(super) answers: BTreeMap<CallId, ControlReply>,
    pub(super) closed: Vec<Violation>,
    pub(super) stale: Vec<StaleSeen>,
    pub(super) rot: Vec<Rot>,
    /// Generations of maps that the leader was asked for.
    pub(super) asked: Vec<Generation>,
    /// Generations of maps pushed to clients.
    pub(super) pushed: Vec<Generation>,
    /// Frames of peers are not delivered while this is set.
    pub(super) cut: bool,
    mute: bool,
    /// How often a server has called another one.
    pub(super) connected: u64,
    work: VecDeque<(usize, Input)>,
    peers: BTreeMap<ConnId, (usize, PeerId)>,
    now: Millis,
    count: u64,
}

pub(super) fn block(byte: u8) -> Bytes {
    vec![byte; 4096].into()
}

pub(super) fn map_of(generation: u64, boots: &[BootId]) -> VolumeMap {
    let member = |(n, boot): (usize, &BootId)| Member {
        ordinal: n as u8,
        copy: CopyId(100 + n as u128),
        server: ServerId(10 + n as u128),
        boot: *boot,
        state: MemberState::Active,
        avoid: false,
        unpromised: false,
    };
    let members = boots.iter().enumerate().map(member).collect();
    let group = Group { members, loss: Generation(0), settle: Settle::None };
    let layer = Layer {
        id: LAYER,
        size: 1 << 20,
        page_bytes: PAGE,
        scheme: Scheme::Replicate,
        chunk_bytes: PAGE,
        placement: 0,
        sealed: None,
    };
    let session = Session {
        id: SESSION,
        node: "node".into(),
        mode: AccessMode::ReadWrite,
        incarnation: Incarnation(0),
        handled: Generation(0),
        standing: Standing::Admitted,
    };
    VolumeMap {
        volume: VOLUME,
        generation: Generation(generation),
        format: MAP_FORMAT,
        required_features: 0,
        size: 1 << 20,
        multi_session: false,
        servers: (0..boots.len()).map(|n| ServerEntry { id: ServerId(10 + n as u128), addresses: vec![] }).collect(),
        placements: vec![Placement { groups: vec![group] }],
        layers: vec![layer],
        sessions: vec![session],
        revoked: vec![],
    }
}

impl Net {
    /// Servers with one copy each, a first map stored, all `Active`.
    pub(super) fn started(servers: usize) -> Self {
        let node = |n: usize| {
            let config = Config { server: ServerId(10 + n as u128), cluster: ClusterId(9) };
            let medium = Medium { free: 1 << 30, ..Medium::default() };
            let (other, other_boot) = (medium.clone(), None);
            Node { machine: StorageServer::new(config), medium, boot: BootId(1000 + n as u128), other, other_boot }
        };
        let mut net = Self {
            servers: (0..servers).map(node).collect(),
            replies: Vec::new(),
            answers: BTreeMap::new(),
            closed: Vec::new(),
            stale: Vec::new(),
            rot: Vec::new(),
            asked: Vec::new(),
            pushed: Vec::new(),
            cut: false,
            mute: false,
            connected: 0,
            work: VecDeque::new(),
            peers: BTreeMap::new(),
            now: Millis(0),
            count: 0,
        };
        for n in 0..servers {
            net.open_device(n);
            assert_eq!(net.put_copy(n, false), ControlReply::Done);
        }
        net.serve(net.map_with_boots(1, |_| {}));
        net
    }

    fn open_device(&mut self, n: usize) {
        let opened = self.servers[n].medium.opened(10 + n as u128, self.servers[n].boot);
        self.input(n, Input::DeviceOpened(opened));
    }

    pub(super) fn put_copy(&mut self, n: usize, unsynced: bool) -> ControlReply {
        let put = ControlRequest::PutCopy {
            volume: VOLUME,
            generation: Generation(1),
            copy: CopyId(100 + n as u128),
            device: DeviceId::NONE,
            placement: 0,
            group: 0,
            layers: vec![(LAYER, PAGE)],
            unsynced,
        };
        self.control(n, put)
    }

    pub(super) fn map_with_boots(&self, generation: u64, change: impl FnOnce(&mut VolumeMap)) -> VolumeMap {
        let boots: Vec<BootId> = self.servers.iter().map(|s| s.boot).collect();
        let mut map = map_of(generation, &boots);
        change(&mut map);
        map
    }

    pub(super) fn serve(&mut self, map: VolumeMap) {
        for n in 0..self.servers.len() {
            assert_eq!(self.control(n, ControlRequest::Serve { map: map.clone() }), ControlReply::Done);
        }
    }

    pub(super) fn fence(&mut self, n: usize, generation: u64, unsync: Vec<CopyId>) -> Promised {
        let fence = Fence { volume: VOLUME, generation: Generation(generation), flush: true, unsync };
        match self.control(n, ControlRequest::Fence(fence)) {
            ControlReply::Promised(promised) => promised,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn fresh(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    pub(super) fn input(&mut self, n: usize, input: Input) {
        self.work.push_back((n, input));
        self.run();
    }

    pub(super) fn advance(&mut self, ms: u64) {
        self.now = self.now.after(ms);
        for n in 0..self.servers.len() {
            self.input(n, Input::Timer);
        }
    }

    pub(super) fn run(&mut self) {
        loop {
            for n in 0..self.servers.len() {
                self.drain_medium(n);
            }
            let Some((n, input)) = self.work.pop_front() else { return };
            let mut out = Vec::new();
            self.servers[n].machine.handle(self.now, input, &mut out);
            for output in out {
                self.output(n, output);
            }
        }
    }

    fn drain_medium(&mut self, n: usize) {
        while !self.servers[n].medium.hold || std::mem::take(&mut self.servers[n].medium.release_one) {
            let Some((boot, op, what)) = self.servers[n].medium.held.pop_front() else { return };
            let node = &mut self.servers[n];
            let other = node.other_boot == Some(boot);
            if node.medium.hold_flushes && what == MediumOp::Flush {
                node.medium.flushes.push_back((boot, op));
            } else if boot == node.boot || other {
                let answer = if other { node.other.apply(what) } else { node.medium.apply(what) };
                let free_bytes = self.servers[n].medium.free;
                let event = MediumEvent::Answered { op, answer, free_bytes };
                self.work.push_back((n, Input::Device { boot, event }));
            }
        }
    }

    fn output(&mut self, n: usize, output: Output) {
        match output {
            Output::Medium { boot, op, what } => self.servers[n].medium.held.push_back((boot, op, what)),
            // The answer to Hello is the runtime's matter.
            Output::Reply { frame, .. } if matches!(frame.body, ReplyBody::Hello { .. }) => {}
            Output::Reply { conn, frame } => match self.peers.get(&conn) {
                None if matches!(frame.body, ReplyBody::Map { .. }) => {
                    let ReplyBody::Map { map } = frame.body else { return };
                    self.pushed.push(map.generation);
                }
                None => self.replies.push(frame),
                Some(&(to, peer)) if !self.cut => self.work.push_back((to, Input::PeerFrame { peer, frame })),
                Some(_) => {}
            },
            Output::ControlReply { call, reply } => drop(self.answers.insert(call, reply)),
            Output::Close { why, .. } => self.closed.push(why),
            Output::PeerConnect { peer, server, .. } => self.connect_peer(n, peer, server),
            Output::PeerSend { peer, frame } => {
                let found = self.peers.iter().find(|(_, p)| **p == (n, peer)).map(|(conn, _)| *conn);
                if let Some(conn) = found {
                    let to = (conn.0 % 100) as usize;
                    self.work.push_back((to, Input::Frame { conn, frame }));
                }
            }
            Output::StaleSeen(seen) => self.stale.push(seen),
            Output::Rot(rot) => self.rot.push(rot),
            Output::AskMap { at_least, .. } => self.asked.push(at_least),
            Output::CloseDevice { .. } | Output::PeerClose { .. } | Output::WakeAt(_) => {}
        }
    }

    /// Peers that are connected to meanwhile never answer.
    pub(super) fn silent_peers<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        self.mute = true;
        let result = act(self);
        self.run();
        self.mute = false;
        result
    }

    fn connect_peer(&mut self, from: usize, peer: PeerId, server: ServerId) {
        if self.mute {
            return;
        }
        self.connected += 1;
        let to = (server.0 - 10) as usize;
        let conn = ConnId(self.fresh() * 100 + to as u64);
        self.peers.insert(conn, (from, peer));
        self.work.push_back((to, Input::Frame { conn, frame: hello(server) }));
        // The reply to Hello is the runtime's; the net drops it and says that the connection is there.
        self.work.push_back((from, Input::PeerConnected { peer }));
    }

    pub(super) fn control_later(&mut self, n: usize, request: ControlRequest) -> CallId {
        let call = CallId(self.fresh());
        self.work.push_back((n, Input::Control { call, request }));
        call
    }

    pub(super) fn control(&mut self, n: usize, request: ControlRequest) -> ControlReply {
        let call = self.control_later(n, request);
        self.run();
        self.answers.remove(&call).expect("answered")
    }

    pub(super) fn send_open(&mut self, n: usize, generation: u64, incarnation: Incarnation, number: OpenNumber) {
        let opener = Opener::Session { session: SESSION };
        let body =
            RequestBody::Open { volume: VOLUME, opener, incarnation, number, start: Start::Fresh, grant: Bytes::new() };
        self.push(n, HandleId(0), generation, Seq(0), body, Bytes::new());
    }

    pub(super) fn try_open(
        &mut self,
        n: usize,
        generation: u64,
        incarnation: Incarnation,
        number: OpenNumber,
    ) -> ReplyBody {
        let conn = ConnId(CLIENT + n as u64);
        if !self.servers[n].machine.conns.contains_key(&conn) {
            self.input(n, Input::Frame { conn, frame: hello(ServerId(10 + n as u128)) });
        }
        let opener = Opener::Session { session: SESSION };
        let body =
            RequestBody::Open { volume: VOLUME, opener, incarnation, number, start: Start::Fresh, grant: Bytes::new() };
        self.push(n, HandleId(0), generation, Seq(0), body, Bytes::new());
        self.run();
        self.replies.pop().expect("answered").body
    }

    pub(super) fn open_incarnation(&mut self, n: usize, generation: u64, incarnation: u64, number: u64) -> HandleId {
        match self.try_open(n, generation, Incarnation(incarnation), OpenNumber(number)) {
            ReplyBody::Opened { handle, .. } => handle,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn open(&mut self, n: usize, generation: u64, number: u64) -> HandleId {
        self.open_incarnation(n, generation, 1, number)
    }

    fn push(&mut self, n: usize, handle: HandleId, generation: u64, confirmed: Seq, body: RequestBody, payload: Bytes) {
        let request = self.fresh();
        let header = RequestHeader {
            request: RequestId(request),
            handle,
            generation: Generation(generation),
            seq: if body.changes_blocks() { Seq(request) } else { Seq(0) },
            confirmed,
            ..RequestHeader::default()
        };
        let frame = RequestFrame { header, body, payload };
        self.work.push_back((n, Input::Frame { conn: ConnId(CLIENT + n as u64), frame }));
    }

    pub(super) fn send(&mut self, n: usize, handle: HandleId, generation: u64, body: RequestBody, payload: Bytes) {
        self.push(n, handle, generation, Seq(0), body, payload);
    }

    pub(super) fn ask(
        &mut self,
        n: usize,
        handle: HandleId,
        generation: u64,
        body: RequestBody,
        payload: Bytes,
    ) -> ReplyFrame {
        self.send(n, handle, generation, body, payload);
        self.run();
        self.replies.pop().expect("answered")
    }

    pub(super) fn confirm(&mut self, n: usize, handle: HandleId, generation: u64, confirmed: Seq) {
        self.push(n, handle, generation, confirmed, RequestBody::Confirm, Bytes::new());
        self.run();
    }

    /// Pages that are pending on disk.
    pub(super) fn pending(&self, n: usize) -> usize {
        self.servers[n].medium.pages.values().filter(|(record, _)| record.pending).count()
    }

    pub(super) fn restart(&mut self, n: usize) {
        let config = Config { server: ServerId(10 + n as u128), cluster: ClusterId(9) };
        self.servers[n].machine = StorageServer::new(config);
        self.servers[n].boot = BootId(self.servers[n].boot.0 + 1000);
        self.servers[n].medium.held.clear();
        self.open_device(n);
    }

    /// Pulls that a cut left waiting for a peer are broken off and begin again.
    pub(super) fn restart_pulls(&mut self) {
        let waiting: Vec<_> = std::mem::take(&mut self.peers).into_iter().collect();
        for (conn, (n, peer)) in waiting {
            self.input((conn.0 % 100) as usize, Input::Closed { conn });
            self.input(n, Input::PeerBroken { peer });
        }
        self.advance(2_000);
    }

    pub(super) fn replace_by_blank(&mut self, n: usize) {
        self.servers[n].medium = Medium { free: 1 << 30, ..Medium::default() };
        self.restart(n);
    }

    /// A held medium answers the oldest of what it was asked.
    pub(super) fn answer_one(&mut self, n: usize) {
        let node = &mut self.servers[n];
        let (boot, op, what) = node.medium.held.pop_front().expect("it was asked something");
        let (answer, free_bytes) = (node.medium.apply(what), node.medium.free);
        self.input(n, Input::Device { boot, event: MediumEvent::Answered { op, answer, free_bytes } });
    }

    /// Of the flushes that are held the oldest is answered.
    pub(super) fn answer_flush(&mut self, n: usize) {
        let medium = &mut self.servers[n].medium;
        let (boot, op) = medium.flushes.pop_front().expect("it was asked to flush");
        let (answer, free_bytes) = (medium.apply(MediumOp::Flush), medium.free);
        self.input(n, Input::Device { boot, event: MediumEvent::Answered { op, answer, free_bytes } });
    }

    pub(super) fn fail_device(&mut self, n: usize) {
        self.run();
        let boot = self.servers[n].boot;
        self.input(n, Input::Device { boot, event: MediumEvent::Failed });
    }
}

impl Net {
    /// The same process opens its device anew.
    pub(super) fn restart_device(&mut self, n: usize) {
        self.servers[n].boot = BootId(self.servers[n].boot.0 + 1000);
        self.servers[n].medium.held.clear();
        self.open_device(n);
    }
}

fn hello(server: ServerId) -> RequestFrame {
    let body = RequestBody::Hello {
        cluster: ClusterId(9),
        server,
        min_version: WIRE_VERSION,
        max_version: WIRE_VERSION,
        features: 0,
        max_frame_bytes: crate::limits::MAX_FRAME_BYTES,
    };
    RequestFrame { header: RequestHeader::default(), body, payload: Bytes::new() }
}
