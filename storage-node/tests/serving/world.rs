//! A leader and a driver, as small as the wire allows, and the maps that they speak of.

use crate::process::Process;
use bytes::Bytes;
use lamina_control_api::storage::{Connected, Expected, ServerWord, connect};
use lamina_protocol::control::{Alive, ControlReply, ControlRequest, DeviceReport};
use lamina_protocol::ids::{
    BootId, ClusterId, CopyId, DeviceId, Generation, Incarnation, LayerId, OpenNumber, Seq, ServerId, SessionId,
    VolumeId,
};
use lamina_protocol::limits::MAX_FRAME_BYTES;
use lamina_protocol::map::{
    AccessMode, Group, Layer, MAP_FORMAT, Member, MemberState, Placement, Scheme, ServerEntry, Session, Settle,
    Standing, VolumeMap,
};
use lamina_protocol::storage_server::{CallId, StaleSeen};
use lamina_protocol::wire::{
    HandleId, Opener, Place, ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestHeader, RequestId, Start,
    put_request, read_reply,
};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(crate) const CLUSTER: ClusterId = ClusterId(1);
pub(crate) const VOLUME: VolumeId = VolumeId(0x70);
pub(crate) const LAYER: LayerId = LayerId(0x71);
pub(crate) const COPIES: [CopyId; 2] = [CopyId(0x81), CopyId(0x82)];
pub(crate) const SESSION: SessionId = SessionId(0x90);
const PAGE: u32 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

type Place4 = (CopyId, ServerId, BootId, MemberState);

/// A volume of 8 MiB in one group.
pub(crate) fn map(generation: u64, members: &[(&Process, CopyId, ServerId, BootId, MemberState)]) -> VolumeMap {
    let entry = |m: &(&Process, CopyId, ServerId, BootId, MemberState)| ServerEntry {
        id: m.2,
        addresses: vec![m.0.block.to_string()],
    };
    let of = |(n, m): (usize, Place4)| Member {
        ordinal: n as u8,
        copy: m.0,
        server: m.1,
        boot: m.2,
        state: m.3,
        avoid: false,
        unpromised: false,
    };
    let places = members.iter().map(|m| (m.1, m.2, m.3, m.4)).enumerate().map(of).collect();
    let group = Group { members: places, loss: Generation(0), settle: Settle::None };
    let layer = Layer {
        id: LAYER,
        size: 8 << 20,
        page_bytes: PAGE,
        scheme: Scheme::Replicate,
        chunk_bytes: PAGE,
        placement: 0,
        sealed: None,
    };
    let session = Session {
        id: SESSION,
        node: "test".into(),
        mode: AccessMode::ReadWrite,
        incarnation: Incarnation(1),
        handled: Generation(0),
        standing: Standing::Admitted,
    };
    VolumeMap {
        volume: VOLUME,
        generation: Generation(generation),
        format: MAP_FORMAT,
        required_features: 0,
        size: 8 << 20,
        multi_session: false,
        servers: members.iter().map(entry).collect(),
        placements: vec![Placement { groups: vec![group] }],
        layers: vec![layer],
        sessions: vec![session],
        revoked: vec![],
    }
}

/// So many blocks from this one of the volume on, within a page.
pub(crate) fn place(block: u32, blocks: u32) -> Place {
    let (page, offset) = (u64::from(block / 256), block % 256 * 4096);
    Place { layer: LAYER, group: 0, page, offset, length: blocks * 4096 }
}

pub(crate) struct Leader {
    session: Connected,
    calls: u64,
    unasked: VecDeque<ServerWord>,
    pub(crate) server: ServerId,
}

impl Leader {
    /// Connects to a server whose device is open.
    pub(crate) async fn connect(process: &Process) -> Self {
        let leader = Self::connect_to_any(process).await;
        assert!(!leader.server.is_none());
        leader
    }

    pub(crate) async fn connect_to_any(process: &Process) -> Self {
        let expected = Expected { cluster: CLUSTER, server: ServerId::NONE };
        let session = connect(&process.control.to_string(), expected).await.unwrap();
        assert_eq!(session.server.addresses, [process.block.to_string()]);
        let server = session.server.server;
        Self { session, calls: 0, unasked: VecDeque::new(), server }
    }

    pub(crate) fn send(&mut self, request: ControlRequest) {
        self.calls += 1;
        self.session.caller.call(CallId(self.calls), &request).unwrap();
    }

    pub(crate) async fn call(&mut self, request: ControlRequest) -> ControlReply {
        self.send(request);
        loop {
            match self.word().await {
                ServerWord::Answer { call, reply } if call.0 == self.calls => return reply,
                other => self.unasked.push_back(other),
            }
        }
    }

    async fn word(&mut self) -> ServerWord {
        timeout(PATIENCE, self.session.words.next()).await.unwrap().expect("the session lives").unwrap()
    }

    pub(crate) async fn heartbeat(&mut self) -> ControlReply {
        self.call(ControlRequest::Heartbeat { lease_number: 1 }).await
    }

    pub(crate) async fn first_device(&mut self) -> DeviceReport {
        let ControlReply::Alive(alive) = self.heartbeat().await else { panic!("no sign of life") };
        alive.devices[0].clone()
    }

    /// Its sign of life.
    pub(crate) async fn alive(&mut self) -> Alive {
        let ControlReply::Alive(alive) = self.heartbeat().await else { panic!("no sign of life") };
        alive
    }

    /// On which device each copy lies.
    pub(crate) async fn inventory(&mut self) -> BTreeMap<CopyId, DeviceId> {
        let ControlReply::Inventory { copies } = self.call(ControlRequest::Inventory).await else { panic!("no list") };
        copies.iter().map(|copy| (copy.copy, copy.device)).collect()
    }

    pub(crate) async fn put_copy(&mut self, copy: CopyId, unsynced: bool) {
        let generation = Generation(1 + u64::from(unsynced));
        let layers = vec![(LAYER, PAGE)];
        let (volume, device) = (VOLUME, DeviceId::NONE);
        let put =
            ControlRequest::PutCopy { volume, generation, copy, device, placement: 0, group: 0, layers, unsynced };
        assert_eq!(self.call(put).await, ControlReply::Done);
    }

    /// A second copy on this server, of another group.
    pub(crate) async fn put_copy_of_group(&mut self, copy: CopyId, group: u32) {
        let (volume, device, layers) = (VOLUME, DeviceId::NONE, vec![(LAYER, PAGE)]);
        let generation = Generation(1);
        let put =
            ControlRequest::PutCopy { volume, generation, copy, device, placement: 0, group, layers, unsynced: false };
        assert_eq!(self.call(put).await, ControlReply::Done);
    }

    /// Words that came unasked so far.
    pub(crate) fn heard(&self) -> usize {
        self.unasked.len()
    }

    pub(crate) async fn stale_seen(&mut self) -> StaleSeen {
        loop {
            let word = match self.unasked.pop_front() {
                Some(word) => word,
                None => self.word().await,
            };
            if let ServerWord::StaleSeen(seen) = word {
                return seen;
            }
        }
    }

    /// Until no copy of this server has a page to fill.
    pub(crate) async fn until_filled(&mut self) {
        let filled = async {
            loop {
                let ControlReply::Alive(alive) = self.heartbeat().await else { panic!("no sign of life") };
                if alive.copies.iter().all(|copy| copy.unsynced == 0) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, filled).await.unwrap();
    }
}

pub(crate) struct Client {
    stream: TcpStream,
    handle: HandleId,
    requests: u64,
    seq: u64,
}

impl Client {
    pub(crate) async fn open(process: &Process, server: ServerId, number: u64) -> Self {
        Self::open_as(process, server, Opener::Session { session: SESSION }, (1, number)).await
    }

    /// Opens a handle under a generation, with the number of the `Open`.
    pub(crate) async fn open_as(
        process: &Process,
        server: ServerId,
        opener: Opener,
        (generation, number): (u64, u64),
    ) -> Self {
        let (mut client, answer) = Self::try_open(process, server, opener, (generation, number)).await;
        match answer {
            ReplyBody::Opened { handle, .. } => client.handle = handle,
            other => panic!("not opened: {other:?}"),
        }
        client
    }

    /// What a driver's `Open` gets that must not succeed.
    pub(crate) async fn refused(process: &Process, server: ServerId) -> ReplyBody {
        let (_, answer) = Self::try_open(process, server, Opener::Session { session: SESSION }, (2, 1)).await;
        assert!(!answer.is_success(), "opened: {answer:?}");
        answer
    }

    async fn try_open(
        process: &Process,
        server: ServerId,
        opener: Opener,
        (generation, number): (u64, u64),
    ) -> (Self, ReplyBody) {
        let stream = TcpStream::connect(process.block).await.unwrap();
        let mut client = Self { stream, handle: HandleId(0), requests: 0, seq: 0 };
        client.stream.write_all(&Self::hello_bytes(server)).await.unwrap();
        assert!(matches!(client.reply().await.body, ReplyBody::Hello { server: there, .. } if there == server));
        let open = RequestBody::Open {
            volume: VOLUME,
            opener,
            incarnation: Incarnation(1),
            number: OpenNumber(number),
            start: Start::Fresh,
            grant: Bytes::new(),
        };
        let answer = client.ask(generation, open, vec![]).await.body;
        (client, answer)
    }

    pub(crate) fn hello_bytes(server: ServerId) -> Vec<u8> {
        Self::hello_to(CLUSTER, server)
    }

    pub(crate) fn hello_to(cluster: ClusterId, server: ServerId) -> Vec<u8> {
        let body = RequestBody::Hello {
            cluster,
            server,
            min_version: 1,
            max_version: 1,
            features: 0,
            max_frame_bytes: MAX_FRAME_BYTES,
        };
        let mut bytes = Vec::new();
        put_request(&RequestFrame { header: RequestHeader::default(), body, payload: Bytes::new() }, &mut bytes);
        bytes
    }

    pub(crate) async fn write(&mut self, generation: u64, block: u32, data: Vec<u8>) -> ReplyFrame {
        let blocks = data.len() as u32 / 4096;
        self.ask(generation, RequestBody::Write { place: place(block, blocks) }, data).await
    }

    /// Asks and waits for the answer; maps that are pushed meanwhile are left out.
    pub(crate) async fn ask(&mut self, generation: u64, body: RequestBody, payload: Vec<u8>) -> ReplyFrame {
        self.requests += 1;
        let changes = body.changes_blocks();
        self.seq += u64::from(changes);
        let header = RequestHeader {
            request: RequestId(self.requests),
            handle: self.handle,
            generation: Generation(generation),
            seq: Seq(if changes { self.seq } else { 0 }),
            ..RequestHeader::default()
        };
        let mut bytes = Vec::new();
        put_request(&RequestFrame { header, body, payload: payload.into() }, &mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
        loop {
            let reply = self.reply().await;
            if reply.header.request == header.request {
                return reply;
            }
        }
    }

    async fn reply(&mut self) -> ReplyFrame {
        let mut frame = vec![0; 4];
        timeout(PATIENCE, self.stream.read_exact(&mut frame)).await.expect("an answer comes").unwrap();
        frame.resize(u32::from_le_bytes(frame[..].try_into().unwrap()) as usize, 0);
        self.stream.read_exact(&mut frame[4..]).await.unwrap();
        read_reply(&frame.into()).unwrap()
    }
}
