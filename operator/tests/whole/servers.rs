//! Storage servers in this process: the real state machine behind the real control service on loopback, a device in
//! memory, and peers that reach each other through this module instead of the block listener.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lamina_control_api::storage::{Answerer, ServerIdentity, ServerWord, Service, Session};
use lamina_operator::runtime::clock;
use lamina_protocol::control::ControlRequest;
use lamina_protocol::ids::{BootId, ClusterId, ServerId};
use lamina_protocol::storage_server::medium::MediumEvent;
use lamina_protocol::storage_server::{CallId, Config, ConnId, Input, Output, PeerId, StorageServer};
use lamina_protocol::time::Millis;
use lamina_protocol::wire::{ReplyBody, ReplyFrame, RequestBody, RequestFrame, RequestHeader, WIRE_VERSION};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

use super::medium::Medium;

/// What reaches a server's task.
enum Word {
    Call { from: Answerer, call: CallId, request: ControlRequest },
    Connected { conn: ConnId, back: mpsc::UnboundedSender<Word>, peer: PeerId },
    Frame { conn: ConnId, frame: RequestFrame },
    PeerFrame { peer: PeerId, frame: ReplyFrame },
    Input(Input),
}

type Hub = Arc<Mutex<BTreeMap<ServerId, mpsc::UnboundedSender<Word>>>>;

/// Some servers that know each other.
pub(crate) struct Servers {
    cluster: ClusterId,
    hub: Hub,
    pub(crate) all: Vec<Server>,
}

/// One of them; its device outlives its process.
pub(crate) struct Server {
    pub(crate) id: ServerId,
    pub(crate) address: SocketAddr,
    /// Fences are not answered while this is set.
    pub(crate) deaf: Arc<AtomicBool>,
    medium: Arc<Mutex<Medium>>,
    running: Option<Vec<JoinHandle<()>>>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.all.iter_mut().for_each(Server::stop);
    }
}

impl Server {
    fn stop(&mut self) {
        self.running.take().into_iter().flatten().for_each(|task| task.abort());
    }

    /// Copies that lie there.
    pub(crate) fn copies(&self) -> usize {
        self.medium.lock().unwrap().copies.len()
    }
}

impl Servers {
    pub(crate) async fn start(cluster: ClusterId, count: usize) -> Self {
        let mut servers = Self { cluster, hub: Hub::default(), all: Vec::new() };
        for n in 0..count {
            let id = ServerId(0x5e00 + n as u128);
            let address = "127.0.0.1:0".parse().unwrap();
            servers.all.push(Server { id, address, deaf: Arc::default(), medium: Arc::default(), running: None });
            servers.run(n).await;
        }
        servers
    }

    /// As SIGKILL does.
    pub(crate) fn kill(&mut self, n: usize) {
        self.all[n].stop();
        self.hub.lock().unwrap().remove(&self.all[n].id);
    }

    /// Runs it, at its old address if it had one, under a new boot id.
    pub(crate) async fn run(&mut self, n: usize) {
        let server = &mut self.all[n];
        let listener = loop {
            match tokio::net::TcpListener::bind(server.address).await {
                Ok(listener) => break listener,
                // The old listener's task is still being dropped.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        server.address = listener.local_addr().unwrap();
        let addresses = vec![format!("127.0.0.1:{}", 40_000 + n)];
        let process = lamina_operator::mint();
        let identity = ServerIdentity { cluster: self.cluster, server: server.id, process, addresses };
        let (present, presence) = watch::channel(identity);
        let (service, sessions) = Service::new(presence);
        let (words, taken) = mpsc::unbounded_channel();
        self.hub.lock().unwrap().insert(server.id, words.clone());
        let serve = async move {
            let _present = present;
            let incoming = TcpListenerStream::new(listener);
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        };
        let machine = Machine {
            id: server.id,
            boot: BootId(lamina_operator::mint()),
            cluster: self.cluster,
            machine: StorageServer::new(Config { server: server.id, cluster: self.cluster }),
            deaf: Arc::clone(&server.deaf),
            medium: Arc::clone(&server.medium),
            hub: Arc::clone(&self.hub),
            words: words.clone(),
            calls: BTreeMap::new(),
            conns: BTreeMap::new(),
            peers: BTreeMap::new(),
            count: 0,
            wake: Millis::NEVER,
        };
        let tasks =
            vec![tokio::spawn(serve), tokio::spawn(take_sessions(sessions, words)), tokio::spawn(machine.run(taken))];
        server.running = Some(tasks);
    }
}

async fn take_sessions(mut sessions: mpsc::Receiver<Session>, words: mpsc::UnboundedSender<Word>) {
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(mut session) = sessions.recv().await {
        let words = words.clone();
        tasks.spawn(async move {
            while let Some(Ok((call, request))) = session.next().await {
                let _ = words.send(Word::Call { from: session.answerer(), call, request });
            }
        });
    }
}

struct Machine {
    id: ServerId,
    boot: BootId,
    cluster: ClusterId,
    machine: StorageServer,
    deaf: Arc<AtomicBool>,
    medium: Arc<Mutex<Medium>>,
    hub: Hub,
    words: mpsc::UnboundedSender<Word>,
    calls: BTreeMap<CallId, (Answerer, CallId)>,
    /// Accepted from peers.
    conns: BTreeMap<ConnId, (mpsc::UnboundedSender<Word>, PeerId)>,
    /// Made to peers.
    peers: BTreeMap<PeerId, (mpsc::UnboundedSender<Word>, ConnId)>,
    count: u64,
    wake: Millis,
}

impl Machine {
    async fn run(mut self, mut taken: mpsc::UnboundedReceiver<Word>) {
        let opened = self.medium.lock().unwrap().opened(self.cluster, self.id, self.boot);
        self.input(Input::DeviceOpened(opened));
        loop {
            tokio::select! {
                word = taken.recv() => match word {
                    Some(word) => self.word(word),
                    None => return,
                },
                () = tokio::time::sleep(clock::until(self.wake)) => self.input(Input::Timer),
            }
        }
    }

    fn word(&mut self, word: Word) {
        match word {
            Word::Call { request: ControlRequest::Fence(_), .. } if self.deaf.load(Ordering::Relaxed) => {}
            Word::Call { from, call, request } => {
                self.count += 1;
                let own = CallId(self.count);
                self.calls.insert(own, (from, call));
                self.input(Input::Control { call: own, request });
            }
            Word::Connected { conn, back, peer } => drop(self.conns.insert(conn, (back, peer))),
            Word::Frame { conn, frame } => self.input(Input::Frame { conn, frame }),
            Word::PeerFrame { peer, frame } => self.input(Input::PeerFrame { peer, frame }),
            Word::Input(input) => self.input(input),
        }
    }

    fn input(&mut self, input: Input) {
        let mut out = Vec::new();
        self.machine.handle(clock::now(), input, &mut out);
        for output in out {
            self.output(output);
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Medium { boot, op, what } => {
                let answer = self.medium.lock().unwrap().apply(what);
                let event = MediumEvent::Answered { op, answer, free_bytes: super::medium::CAPACITY };
                let _ = self.words.send(Word::Input(Input::Device { boot, event }));
            }
            Output::ControlReply { call, reply } => {
                if let Some((to, call)) = self.calls.remove(&call) {
                    let _ = to.say(&ServerWord::Answer { call, reply });
                }
            }
            Output::Reply { frame, .. } if matches!(frame.body, ReplyBody::Hello { .. }) => {}
            Output::Reply { conn, frame } => {
                if let Some((back, peer)) = self.conns.get(&conn) {
                    let _ = back.send(Word::PeerFrame { peer: *peer, frame });
                }
            }
            Output::PeerConnect { peer, server, .. } => self.connect(peer, server),
            Output::PeerSend { peer, frame } => {
                if let Some((to, conn)) = self.peers.get(&peer) {
                    let _ = to.send(Word::Frame { conn: *conn, frame });
                }
            }
            Output::PeerClose { peer } => drop(self.peers.remove(&peer)),
            Output::WakeAt(then) => self.wake = then,
            Output::CloseDevice { .. }
            | Output::Close { .. }
            | Output::StaleSeen(_)
            | Output::Rot(_)
            | Output::AskMap { .. } => {}
        }
    }

    fn connect(&mut self, peer: PeerId, server: ServerId) {
        let there = self.hub.lock().unwrap().get(&server).cloned();
        let Some(there) = there else {
            let _ = self.words.send(Word::Input(Input::PeerBroken { peer }));
            return;
        };
        let conn = ConnId(lamina_operator::mint() as u64);
        let _ = there.send(Word::Connected { conn, back: self.words.clone(), peer });
        self.peers.insert(peer, (there.clone(), conn));
        let _ = there.send(Word::Frame { conn, frame: hello(self.cluster, server) });
        let _ = self.words.send(Word::Input(Input::PeerConnected { peer }));
    }
}

/// The runtime says hello for the machine.
fn hello(cluster: ClusterId, to: ServerId) -> RequestFrame {
    let body = RequestBody::Hello {
        cluster,
        server: to,
        min_version: WIRE_VERSION,
        max_version: WIRE_VERSION,
        features: 0,
        max_frame_bytes: lamina_protocol::limits::MAX_FRAME_BYTES,
    };
    RequestFrame { header: RequestHeader::default(), body, payload: bytes::Bytes::new() }
}
