//! One value of every kind, with every field different from every other, so that exchanged fields show.

use bytes::Bytes;
use lamina_protocol::control::{
    Alive, ControlReply, ControlRequest, CopyInventory, CopyProgress, CopyReport, DeviceReport, DriverReport, Fence,
    FillLimit, PageList, Promised, Rejoin, SettleName, Trouble, VolumeReport,
};
use lamina_protocol::ids::{
    BootId, ClusterId, CopyId, DeviceId, Generation, Incarnation, LayerId, OpenNumber, Seq, ServerId, SessionId,
    VolumeId,
};
use lamina_protocol::layer::{BlockState, BlockStates};
use lamina_protocol::map::{
    AccessMode, Group, Layer, MAP_FORMAT, Member, MemberState, Placement, Revocation, Scheme, ServerEntry, Session,
    Settle, Standing, VolumeMap,
};
use lamina_protocol::wire::{
    Class, HandleId, Opener, Place, ReplyBody, ReplyFrame, ReplyHeader, RequestBody, RequestFrame, RequestHeader,
    RequestId, Start,
};

const VOLUME: VolumeId = VolumeId(0x1010);
const LAYER: LayerId = LayerId(0x2020);
const COPY: CopyId = CopyId(0x3030);
const SERVER: ServerId = ServerId(0x4040);
const SESSION: SessionId = SessionId(0x5050);
const BOOT: BootId = BootId(0x6060);
const DEVICE: DeviceId = DeviceId(0x7070);
const CLUSTER: ClusterId = ClusterId(0x8080);

fn place() -> Place {
    Place { layer: LAYER, group: 3, page: 0x99, offset: 0x1000, length: 0x1000 }
}

/// Counts up at the start of each block; zeroes after that cost no rows.
fn payload(bytes: usize) -> Bytes {
    (0..bytes).map(|at| if at % 4096 < 32 { (at / 4096 + at % 4096 + 1) as u8 } else { 0 }).collect()
}

/// A map with every part of it in use.
pub(crate) fn map() -> VolumeMap {
    let member = |ordinal, copy, state| Member {
        ordinal,
        copy: CopyId(copy),
        server: SERVER,
        boot: BOOT,
        state,
        avoid: ordinal == 1,
        unpromised: ordinal == 2,
    };
    let running = Settle::Running { authoritative: COPY, boot: BOOT, begun: Generation(0x16) };
    let groups = vec![
        Group {
            members: vec![
                member(0, COPY.0, MemberState::Active),
                member(1, 0x3131, MemberState::Syncing),
                member(2, 0x3232, MemberState::Failed),
            ],
            loss: Generation(0x15),
            settle: running,
        },
        Group { members: vec![member(5, 0x3535, MemberState::Active)], loss: Generation(0), settle: Settle::Over },
    ];
    let session = |id, mode, standing| Session {
        id,
        node: "node-1".into(),
        mode,
        incarnation: Incarnation(2),
        handled: Generation(0x14),
        standing,
    };
    VolumeMap {
        volume: VOLUME,
        generation: Generation(0x17),
        format: MAP_FORMAT,
        required_features: 0,
        size: 64 << 20,
        multi_session: false,
        servers: vec![ServerEntry {
            id: SERVER,
            addresses: vec!["192.0.2.1:7700".into(), "[2001:db8::1]:7700".into()],
        }],
        placements: vec![Placement { groups }],
        layers: vec![layer(LAYER, None), layer(LayerId(0x2121), Some(Generation(0x12)))],
        sessions: vec![
            session(SESSION, AccessMode::ReadWrite, Standing::Admitted),
            session(SessionId(0x5151), AccessMode::ReadOnly, Standing::Held),
        ],
        revoked: vec![Revocation { session: SESSION, below: Generation(0x13), ranges: vec![(0x1000, 0x2000)] }],
    }
}

fn layer(id: LayerId, sealed: Option<Generation>) -> Layer {
    let (page_bytes, chunk_bytes) = (1 << 20, 64 << 10);
    Layer { id, size: 64 << 20, page_bytes, scheme: Scheme::Replicate, chunk_bytes, placement: 0, sealed }
}

/// Every request.
pub(crate) fn requests() -> Vec<RequestFrame> {
    let open = RequestBody::Open {
        volume: VOLUME,
        opener: Opener::Session { session: SESSION },
        incarnation: Incarnation(2),
        number: OpenNumber(3),
        start: Start::Resume,
        grant: Bytes::from_static(b"grant"),
    };
    let hello = RequestBody::Hello {
        cluster: CLUSTER,
        server: SERVER,
        min_version: 1,
        max_version: 2,
        features: 0x0102,
        max_frame_bytes: 0x0042_0000,
    };
    let bodies = vec![
        hello,
        open,
        RequestBody::Join,
        RequestBody::Read { place: place() },
        RequestBody::Write { place: place() },
        RequestBody::Discard { place: place() },
        RequestBody::Flush,
        RequestBody::Reserve { pages: vec![(LAYER, (1, 7)), (LAYER, (2, 8))] },
        RequestBody::GetMap,
        RequestBody::Ping,
        RequestBody::Confirm,
        RequestBody::Adopt { incarnation: Incarnation(1) },
        RequestBody::Handled { loss: Generation(0x15) },
        RequestBody::Fill { layer: LAYER, group: 1, page: 0x98 },
        RequestBody::Settle { layer: LAYER, group: 1, page: 0x97 },
        RequestBody::Suspects { layer: LAYER, group: 1 },
        RequestBody::Written { layer: LAYER, group: 1, from: 0x96 },
        RequestBody::Release { pages: vec![(LAYER, (1, 7)), (LAYER, (2, 8))] },
    ];
    bodies.into_iter().enumerate().map(|(nth, body)| request(nth as u64, body)).collect()
}

fn request(nth: u64, body: RequestBody) -> RequestFrame {
    let header = RequestHeader {
        request: RequestId(0x0100 + nth),
        handle: HandleId(0x0200),
        class: [Class::Foreground, Class::Fill, Class::Scrub][nth as usize % 3],
        target: ServerId(0x0300),
        generation: Generation(0x17),
        shared_generation: Generation(0x18),
        seq: Seq(0x19),
        confirmed: Seq(0x1a),
    };
    let bytes = if let RequestBody::Write { place } = &body { place.length as usize } else { 0 };
    RequestFrame { header, body, payload: payload(bytes) }
}

/// Every reply.
pub(crate) fn replies() -> Vec<ReplyFrame> {
    let mut bodies = vec![
        (hello(), 0),
        (opened(), 0),
        (ReplyBody::Done, 0),
        (ReplyBody::Data, 4096),
        (ReplyBody::Map { map: map() }, 0),
        (page(), 8192),
        (ReplyBody::Pages { pages: vec![1, 0x0203] }, 0),
        (ReplyBody::Written { pages: vec![4, 0x0506], next: 0x0507 }, 0),
    ];
    bodies.extend(refusals().into_iter().map(|body| (body, 0)));
    bodies.into_iter().enumerate().map(|(nth, (body, bytes))| reply(nth as u64, body, bytes)).collect()
}

fn hello() -> ReplyBody {
    ReplyBody::Hello {
        server: SERVER,
        version: 1,
        features: 0x0102,
        max_frame_bytes: 0x0042_0000,
        window_requests: 256,
        window_bytes: 16 << 20,
    }
}

fn opened() -> ReplyBody {
    ReplyBody::Opened {
        handle: HandleId(0x0200),
        incarnation: Incarnation(2),
        handled: Generation(0x14),
        map: Some(map()),
    }
}

fn page() -> ReplyBody {
    let mut blocks = BlockStates::absent(256);
    blocks.set_range(1..3, BlockState::Present);
    blocks.set(9, BlockState::Hole);
    blocks.set(255, BlockState::Stale);
    let pending = vec![(SESSION, (Incarnation(2), Seq(0x1b)))];
    ReplyBody::Page { blocks, pending, pending_before_start: true, missed: 0x8001, next: u64::MAX }
}

fn refusals() -> Vec<ReplyBody> {
    vec![
        ReplyBody::Superseded { highest: Incarnation(4) },
        ReplyBody::Behind { own: Generation(0x11) },
        ReplyBody::Ended,
        ReplyBody::Revoked,
        ReplyBody::Stale { wait_for: Generation(0x1c) },
        ReplyBody::NotServing,
        ReplyBody::NoCopy,
        ReplyBody::NoSpace,
        ReplyBody::BadBlock { blocks: vec![0, 5] },
        ReplyBody::Below { layer: LayerId(0x2121) },
        ReplyBody::Unsupported,
        ReplyBody::OpenRefused { highest: OpenNumber(9) },
    ]
}

fn reply(nth: u64, body: ReplyBody, bytes: usize) -> ReplyFrame {
    let header = ReplyHeader {
        request: RequestId(0x0100 + nth),
        handle: HandleId(0x0200),
        class: [Class::Foreground, Class::Fill, Class::Scrub][nth as usize % 3],
        boot: BOOT,
        generation: Generation(0x17),
        credit: 0x40,
        token: Seq(0x19),
    };
    ReplyFrame { header, body, payload: payload(bytes) }
}

/// Every request of the control stream.
pub(crate) fn control_requests() -> Vec<ControlRequest> {
    let (volume, generation) = (VOLUME, Generation(0x17));
    let fence = Fence { volume, generation, flush: true, unsync: vec![COPY] };
    vec![
        ControlRequest::Heartbeat { lease_number: 0x21 },
        ControlRequest::PutCopy {
            volume,
            generation,
            copy: COPY,
            device: DEVICE,
            placement: 1,
            group: 2,
            layers: vec![(LAYER, 1 << 20)],
            unsynced: true,
        },
        ControlRequest::Fence(fence),
        ControlRequest::Serve { map: map() },
        ControlRequest::PrepareFlush { volume, generation },
        ControlRequest::DeleteCopy { volume, copy: COPY, generation },
        ControlRequest::GetVolume { volume },
        ControlRequest::Inventory,
        ControlRequest::LimitFills { volume, limit: FillLimit { bytes_per_second: 0x0020_0000, pages: 9 } },
        ControlRequest::ListSuspects { volume, generation, copy: COPY, boot: BOOT, towards: 3, from: 0x94 },
        ControlRequest::Rejoin(Rejoin { volume, generation, copy: COPY, source: 2, list: list() }),
        ControlRequest::Reach { server: SERVER, addresses: vec!["10.0.0.7:4711".to_owned()] },
    ]
}

fn list() -> PageList {
    PageList { layer: LAYER, from: 0x91, first: 0x92, bits: Bytes::from_static(&[0x81, 0x02]), next: 0x93 }
}

/// Every reply of the control stream.
pub(crate) fn control_replies() -> Vec<ControlReply> {
    let inventory = CopyInventory { volume: VOLUME, copy: COPY, device: DEVICE, stored: Generation(0x17) };
    vec![
        ControlReply::Alive(alive()),
        ControlReply::Done,
        ControlReply::Promised(promised()),
        ControlReply::Refused { promised: Generation(0x18), stored: Generation(0x17) },
        ControlReply::NoCopy { copy: COPY },
        ControlReply::NoSpace,
        ControlReply::DeviceClosed,
        ControlReply::Volume { volume: Some(VolumeReport { promised: Generation(0x18), map: Some(map()) }) },
        ControlReply::Inventory { copies: vec![inventory] },
        ControlReply::Suspects(list()),
        ControlReply::Reached { server: SERVER, reached: true },
    ]
}

fn alive() -> Alive {
    let device = DeviceReport { device: DEVICE, boot: BOOT, capacity_bytes: 0x0100_0000, free_bytes: 0x0040_0000 };
    let progress = CopyProgress {
        volume: VOLUME,
        copy: COPY,
        boot: BOOT,
        stored: Generation(0x17),
        unsynced: 5,
        pages: 64,
        to_settle: 6,
        filled_bytes: 0x0030_0000,
    };
    Alive {
        server: SERVER,
        cluster: CLUSTER,
        lease_number: 0x21,
        leaving: true,
        devices: vec![device],
        copies: vec![progress],
        behind: vec![(VOLUME, Generation(0x18))],
    }
}

fn promised() -> Promised {
    let settled_for = Some(SettleName { authoritative: COPY, boot: BOOT, begun: Generation(0x16) });
    let report = CopyReport {
        copy: COPY,
        boot: BOOT,
        unsynced: 5,
        pending: vec![(SESSION, (Incarnation(2), 7))],
        pending_before_start: 8,
        settled_for,
        to_settle: 6,
        listed: true,
    };
    Promised {
        server: SERVER,
        generation: Generation(0x18),
        stored: Generation(0x17),
        sessions: vec![(SESSION, (Incarnation(2), Generation(0x14)))],
        copies: vec![report],
    }
}

/// What a driver tells the leader.
pub(crate) fn driver_report() -> DriverReport {
    DriverReport {
        volume: VOLUME,
        session: SESSION,
        generation: Generation(0x17),
        copy: COPY,
        server: SERVER,
        trouble: Trouble::Stalled,
    }
}
