//! `serve`: listeners, threads, the main loop, and how the process stops.
//!
//! ```text
//! main thread: one current-thread runtime: machine, connections, peers, devices with their rings, timer
//! side thread: one current-thread runtime: gRPC of leaders, /metrics, Kubernetes
//! ```
//! The first SIGTERM or SIGINT asks the leader to leave this server's copies out and waits for that; the second ends the
//! process at once, which is as safe as any crash.

use crate::args::{DeviceSpec, Serve};
use crate::connections;
use crate::control;
use crate::devices::{DeviceView, Slots};
use crate::events::Inbox;
use crate::health::{self, Asker, Question, Snapshot};
use crate::metrics::Metrics;
use crate::server::Server;
use crate::{clock, devices};
use lamina_control_api::storage::{ServerIdentity, Session};
use std::future::pending;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until};

/// Why the server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen {
        /// For what.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A thread, a reactor or a signal handler could not be made.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// The side thread ended before it had begun.
    #[error("the control service could not be started")]
    Side,
    /// Kubernetes cannot be reached as configured.
    #[error("cannot set up the Kubernetes client: {0}")]
    Kubernetes(Box<kube::Error>),
}

/// What the side thread shares with the main one.
struct Side {
    sessions: mpsc::Receiver<Session>,
    specs: mpsc::Receiver<Listed>,
    control: SocketAddr,
    metrics: SocketAddr,
}

/// The devices that people list, with the server's id if it is known there.
pub(crate) struct Listed {
    pub(crate) server: Option<lamina_protocol::ids::ServerId>,
    pub(crate) devices: Vec<DeviceSpec>,
    /// Those on which copies were when they were taken off the list.
    pub(crate) unlisted: Vec<DeviceSpec>,
}

/// What the main thread shares with the side one.
struct Main {
    args: Serve,
    presence: watch::Receiver<ServerIdentity>,
    views: watch::Receiver<Vec<DeviceView>>,
    asker: Asker,
    metrics: Metrics,
    block: SocketAddr,
}

/// Serves until it is told to stop.
pub fn serve(args: Serve) -> Result<(), ServeError> {
    let reactor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&reactor, run(args))?;
    // Blocking work ends with the process.
    reactor.shutdown_background();
    Ok(())
}

async fn run(args: Serve) -> Result<(), ServeError> {
    let metrics = Metrics::new();
    let inbox = Rc::new(Inbox::default());
    let server = Server::new(args.cluster, inbox, metrics.clone());
    let listener = bind("block requests", args.listen).await?;
    let block = listener.local_addr()?;
    let host = args.advertise.clone().unwrap_or_else(|| block.ip().to_string());
    let identity = ServerIdentity {
        cluster: args.cluster,
        server: server.id(),
        process: devices::id(),
        addresses: vec![host_port(&host, block.port())],
    };
    let (present, presence) = watch::channel(identity);
    let (shown, views) = watch::channel(Vec::new());
    let (questions, asked) = mpsc::channel(health::QUESTIONS);
    let leave_for = Duration::from_secs(args.leave_seconds);
    let slots = Slots::new(args.cluster, args.server);
    let main = Main { args, presence, views, asker: Asker(questions), metrics, block };
    let side = start_side(main).await?;
    tracing::info!(%block, control = %side.control, metrics = %side.metrics, version = env!("CARGO_PKG_VERSION"), "listening");
    tokio::task::spawn_local(connections::accept_all(server.clone(), listener));
    tokio::task::spawn_local(control::take_all(server.clone(), side.sessions));
    tokio::task::spawn_local(device_events(server.clone()));
    tokio::task::spawn_local(timer(server.clone()));
    let stop = Stop { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())?, until: None };
    let program = Program { server, slots, present, shown, leave_for, stop };
    program.live(asked, side.specs).await;
    Ok(())
}

pub(crate) fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { what, address, source })
}

async fn start_side(main: Main) -> Result<Side, ServeError> {
    let (started, outcome) = oneshot::channel();
    let reactor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("side".into()).spawn(move || {
        reactor.block_on(async move {
            let _ = started.send(side(main).await);
            pending::<()>().await;
        });
    })?;
    outcome.await.map_err(|_| ServeError::Side)?
}

async fn side(main: Main) -> Result<Side, ServeError> {
    let control = bind("control", main.args.control).await?;
    let scraped = bind("metrics", main.args.metrics).await?;
    let (control_at, metrics_at) = (control.local_addr()?, scraped.local_addr()?);
    let sessions = control::listen(control, main.presence.clone());
    health::listen(scraped, main.asker.clone(), main.metrics);
    let (listed, specs) = mpsc::channel(4);
    if main.args.kubernetes {
        let own = crate::kubernetes::Own {
            node: main.args.node.clone().unwrap_or_default(),
            cluster: main.args.cluster,
            data: main.presence.borrow().addresses.clone(),
            control: vec![host_port(&main.args.advertise.unwrap_or(main.block.ip().to_string()), control_at.port())],
        };
        crate::kubernetes::start(own, listed, main.asker, main.views).await?;
    } else {
        let first = Listed { server: main.args.server, devices: main.args.devices, unlisted: vec![] };
        listed.try_send(first).unwrap_or_else(|_| unreachable!("the queue is new and empty"));
    }
    Ok(Side { sessions, specs, control: control_at, metrics: metrics_at })
}

async fn device_events(server: Rc<Server>) {
    let inbox = server.inbox.clone();
    loop {
        inbox.came.notified().await;
        server.device_events();
    }
}

/// The machine's one timer.
async fn timer(server: Rc<Server>) {
    loop {
        let wake = async {
            match clock::until(server.wake_at()) {
                // sleep: this is the machine's one timer, armed by WakeAt.
                Some(time) => tokio::time::sleep(time).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = wake => server.timer(),
            () = server.timer_set.notified() => {}
        }
    }
}

struct Stop {
    term: Signal,
    int: Signal,
    until: Option<Instant>,
}

impl Stop {
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

struct Program {
    server: Rc<Server>,
    slots: Slots,
    present: watch::Sender<ServerIdentity>,
    shown: watch::Sender<Vec<DeviceView>>,
    leave_for: Duration,
    stop: Stop,
}

impl Program {
    /// The main loop: everything that is neither a block request nor an event of a device.
    async fn live(mut self, mut asked: mpsc::Receiver<Question>, mut specs: mpsc::Receiver<Listed>) {
        while !self.is_over() {
            let until = [self.slots.again(), self.stop.until].into_iter().flatten().min();
            let due = async {
                match until {
                    Some(at) => sleep_until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = self.stop.asked() => self.asked_to_stop(),
                Some(outcome) = self.slots.opened.recv() => self.slots.took(outcome, &self.server),
                Some(listed) = specs.recv() => self.slots.list(listed, &self.server),
                Some(question) = asked.recv() => {
                    // Copies may have moved away meanwhile.
                    self.slots.drop_unlisted(&self.server);
                    // Whoever asked may have gone.
                    let _ = question.send(self.snapshot());
                }
                () = self.server.attention.notified() => {}
                () = due => self.slots.begin(),
            }
            for boot in self.server.take_closed() {
                self.slots.closed(boot);
            }
            self.show();
        }
        tracing::info!("stopped");
    }

    fn asked_to_stop(&mut self) {
        if self.stop.until.is_some() {
            tracing::warn!("asked to stop again: stopping at once");
            std::process::exit(0);
        }
        tracing::info!("asked to stop: waiting until the leader has left this server's copies out");
        self.stop.until = Some(Instant::now() + self.leave_for);
        self.server.leave();
    }

    fn is_over(&self) -> bool {
        self.stop.until.is_some_and(|until| Instant::now() >= until || self.server.has_left())
    }

    fn show(&self) {
        let views = self.slots.views();
        self.shown.send_if_modified(|shown| {
            let changed = *shown != views;
            *shown = views;
            changed
        });
        let id = self.server.id();
        self.present.send_if_modified(|present| std::mem::replace(&mut present.server, id) != id);
    }

    fn snapshot(&self) -> Snapshot {
        let with_stats = |view: DeviceView| {
            let stats = view.boot.and_then(|boot| self.server.stats(boot));
            (view, stats)
        };
        Snapshot {
            cluster: self.server.cluster(),
            server: self.server.id(),
            devices: self.slots.views().into_iter().map(with_stats).collect(),
            copies: self.server.copies(),
            connections: self.server.connections(),
            heard_leader: self.server.heard_leader(),
        }
    }
}
