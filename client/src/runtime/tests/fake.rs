//! A storage server in memory, one thread per connection, that does as it is told.

use bytes::Bytes;
use lamina_protocol::ids::{Generation, ServerId};
use lamina_protocol::limits::{MAX_FRAME_BYTES, WINDOW_BYTES, WINDOW_REQUESTS};
use lamina_protocol::map::VolumeMap;
use lamina_protocol::wire::{
    HandleId, Place, ReplyBody, ReplyFrame, ReplyHeader, RequestBody, RequestFrame, RequestId, WIRE_VERSION,
    frame_length, put_reply, read_request,
};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// How requests on handles are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serving {
    Yes,
    Stale(Generation),
    Superseded,
    Silent,
}

/// (group, page, block) -> bytes.
pub(super) type Blocks = BTreeMap<(u32, u64, u32), Bytes>;

struct State {
    id: ServerId,
    serving: Serving,
    blocks: Blocks,
    counts: BTreeMap<&'static str, usize>,
    connections: Vec<TcpStream>,
    next_handle: u64,
    break_at_write: bool,
}

/// The server. It stops listening when it is dropped.
pub(super) struct Fake {
    address: String,
    state: Arc<Mutex<State>>,
    stop: Arc<std::sync::atomic::AtomicBool>,
}

impl Fake {
    pub(super) fn start(id: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            id: ServerId(id.into()),
            serving: Serving::Yes,
            blocks: BTreeMap::new(),
            counts: BTreeMap::new(),
            connections: Vec::new(),
            next_handle: 0,
            break_at_write: false,
        }));
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (for_thread, stopped) = (state.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(std::sync::atomic::Ordering::Acquire) {
                    return;
                }
                stream.set_nodelay(true).unwrap();
                lock(&for_thread).connections.push(stream.try_clone().unwrap());
                let state = for_thread.clone();
                std::thread::spawn(move || drop(serve(&state, &stream)));
            }
        });
        Self { address, state, stop }
    }

    pub(super) fn address(&self) -> String {
        self.address.clone()
    }

    pub(super) fn set(&self, serving: Serving) {
        lock(&self.state).serving = serving;
    }

    pub(super) fn blocks(&self) -> Blocks {
        lock(&self.state).blocks.clone()
    }

    /// How many requests of this kind it has seen.
    pub(super) fn count(&self, kind: &str) -> usize {
        lock(&self.state).counts.get(kind).copied().unwrap_or(0)
    }

    /// The next write is not executed: its connection breaks.
    pub(super) fn break_at_next_write(&self) {
        lock(&self.state).break_at_write = true;
    }

    pub(super) fn push(&self, map: &VolumeMap) {
        let header = ReplyHeader { generation: map.generation, ..ReplyHeader::default() };
        let frame = ReplyFrame { header, body: ReplyBody::Map { map: map.clone() }, payload: Bytes::new() };
        self.send(&bytes_of(&frame));
    }

    pub(super) fn send_garbage(&self) {
        self.send(&[0xa5; 300]);
    }

    fn send(&self, bytes: &[u8]) {
        let mut stream = lock(&self.state).connections.last().unwrap().try_clone().unwrap();
        stream.write_all(bytes).unwrap();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        let _ = TcpStream::connect(&self.address);
        for connection in &lock(&self.state).connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap()
}

fn bytes_of(frame: &ReplyFrame) -> Vec<u8> {
    let mut out = Vec::new();
    put_reply(frame, &mut out);
    out
}

fn read_frame(mut stream: &TcpStream) -> io::Result<RequestFrame> {
    let mut bytes = vec![0; 4];
    stream.read_exact(&mut bytes)?;
    let length = frame_length(&bytes).unwrap().unwrap();
    bytes.resize(length, 0);
    stream.read_exact(&mut bytes[4..])?;
    Ok(read_request(&Bytes::from(bytes)).expect("a driver sends frames only"))
}

fn serve(state: &Mutex<State>, mut stream: &TcpStream) -> io::Result<()> {
    loop {
        let request = read_frame(stream)?;
        let Some((body, payload)) = lock(state).answer(&request) else {
            return stream.shutdown(Shutdown::Both);
        };
        let Some(body) = body else { continue };
        let header = ReplyHeader {
            request: request.header.request,
            handle: request.header.handle,
            generation: request.header.generation,
            credit: 1 << 40,
            token: request.header.seq,
            ..ReplyHeader::default()
        };
        assert!(header.request != RequestId(0) || matches!(body, ReplyBody::Hello { .. }));
        stream.write_all(&bytes_of(&ReplyFrame { header, body, payload }))?;
    }
}

impl State {
    /// The answer; `Some(None)` = none, `None` = break the connection.
    fn answer(&mut self, request: &RequestFrame) -> Option<(Option<ReplyBody>, Bytes)> {
        let (kind, body) = match &request.body {
            RequestBody::Hello { server, .. } if *server != self.id => return None,
            RequestBody::Hello { .. } => ("hello", self.hello()),
            RequestBody::Open { incarnation, .. } => {
                self.next_handle += 1;
                let (handle, handled) = (HandleId(self.next_handle), Generation(0));
                ("open", ReplyBody::Opened { handle, incarnation: *incarnation, handled, map: None })
            }
            other => return self.block_request(other, &request.payload),
        };
        *self.counts.entry(kind).or_default() += 1;
        Some((Some(body), Bytes::new()))
    }

    fn hello(&self) -> ReplyBody {
        ReplyBody::Hello {
            server: self.id,
            version: WIRE_VERSION,
            features: 0,
            max_frame_bytes: MAX_FRAME_BYTES,
            window_requests: WINDOW_REQUESTS,
            window_bytes: WINDOW_BYTES,
        }
    }

    fn block_request(&mut self, body: &RequestBody, payload: &Bytes) -> Option<(Option<ReplyBody>, Bytes)> {
        match self.serving {
            Serving::Yes => {}
            Serving::Silent => return Some((None, Bytes::new())),
            Serving::Stale(wait_for) => return Some((Some(ReplyBody::Stale { wait_for }), Bytes::new())),
            Serving::Superseded => {
                let highest = lamina_protocol::ids::Incarnation(99);
                return Some((Some(ReplyBody::Superseded { highest }), Bytes::new()));
            }
        }
        let mut data = Bytes::new();
        let kind = match body {
            RequestBody::Write { .. } if std::mem::take(&mut self.break_at_write) => return None,
            RequestBody::Write { place } => {
                for (i, key) in keys(place).enumerate() {
                    self.blocks.insert(key, Bytes::copy_from_slice(&payload[i * 4096..][..4096]));
                }
                "write"
            }
            RequestBody::Discard { place } => {
                keys(place).for_each(|key| drop(self.blocks.remove(&key)));
                "discard"
            }
            RequestBody::Read { place } => {
                let zeroes = Bytes::from_static(&[0; 4096]);
                let blocks = keys(place).flat_map(|key| self.blocks.get(&key).unwrap_or(&zeroes).clone());
                data = blocks.collect();
                "read"
            }
            RequestBody::Flush => "flush",
            RequestBody::Written { group, from, .. } => {
                let first = self.blocks.keys().find(|(g, page, _)| g == group && page >= from);
                let pages = first.map(|(_, page, _)| *page).into_iter().collect();
                return Some((Some(ReplyBody::Written { pages, next: u64::MAX }), data));
            }
            _ => "other",
        };
        *self.counts.entry(kind).or_default() += 1;
        let body = if kind == "read" { ReplyBody::Data } else { ReplyBody::Done };
        Some((Some(body), data))
    }
}

fn keys(place: &Place) -> impl Iterator<Item = (u32, u64, u32)> + use<> {
    let (group, page) = (place.group, place.page);
    place.blocks().map(move |block| (group, page, block))
}
