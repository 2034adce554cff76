//! The production runtime around [`lamina_protocol::driver`]: one thread per attached volume with its connections, its
//! one timer and the queue of what front ends hand in.
//!
//! It decides nothing: every event becomes an input of the driver, every output a frame, an answer or a timer (PROTOCOL.md
//! §1, sans-IO). Invariants: each request is answered exactly once, or the exit callback has run (R10); nothing is queued
//! beyond what front ends may have under way and the windows of the handles; no lock is held across I/O or a completion.
//! All frames of a buffer are parsed before anything is sent, and all that is to be sent on a connection leaves in one
//! vectored write (data-path.md, Network).

use crate::block::{
    BLOCK_BYTES, BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions, MAX_REQUEST_BYTES,
};
use bytes::Bytes;
use lamina_protocol::control::DriverReport;
use lamina_protocol::driver;
use lamina_protocol::ids::{ClusterId, Generation, ServerId};
use lamina_protocol::map::VolumeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, oneshot, watch};

mod clock;
mod core;
mod dial;
mod link;
mod metrics;
mod pending;

pub use clock::{Clock, SteadyClock};
pub use metrics::{LATENCY_BUCKETS, Metrics, OpMetrics};

/// Requests that may wait for the volume's thread. Front ends bound what they have under way far below (64 connections
/// of 256 requests); one that does not is answered with an error rather than given memory without end.
const MAX_WAITING: usize = 64 << 10;

/// What a volume is opened with.
pub struct Options {
    /// Servers of another cluster are refused.
    pub cluster: ClusterId,
    /// Volume, session, first stage or take-over.
    pub driver: driver::Config,
    /// Read from these servers, nearest first, where their members are as good as others (locality).
    pub prefer: Vec<ServerId>,
    /// Committed maps as they become known; `None` = none yet. Older ones are ignored by the driver.
    pub maps: watch::Receiver<Option<VolumeMap>>,
    /// For the leader. A report that finds it full is dropped and counted: the driver repeats what stays wrong.
    pub reports: mpsc::Sender<DriverReport>,
    /// Runs once, on the volume's thread, when a successor owns the device: the process must answer the kernel nothing
    /// and exit (R10).
    pub on_exit: Box<dyn FnOnce() + Send>,
    /// The time; [`SteadyClock`] unless the caller has one that is known to run during suspend (R5).
    pub clock: Box<dyn Clock>,
}

/// What a volume is doing, for those who wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Status {
    /// Bytes; 0 before the first map.
    pub size: u64,
    /// The generation that the driver works under; 0 before the first map.
    pub generation: Generation,
    /// Requests are being served, not parked as a whole.
    pub serving: bool,
    /// Every member refuses the process before: only now may the kernel be asked to give back what that one left
    /// unanswered ([`driver::Driver::owns_device`]).
    pub owns_device: bool,
    /// The session is over: every request fails.
    pub ended: bool,
    /// A successor owns the device.
    pub superseded: bool,
}

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The thread or its reactor could not be made: the process is out of descriptors, threads or memory.
    #[error("the volume's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// One attached volume.
pub struct Volume {
    shared: Arc<Shared>,
    status: watch::Receiver<Status>,
    thread: tokio::runtime::Handle,
}

/// What the volume's thread and its users share.
pub(crate) struct Shared {
    inbox: Mutex<Vec<Order>>,
    /// Something is in the inbox, or the volume is to be closed.
    wake: Notify,
    size: AtomicU64,
    read_only: AtomicBool,
    superseded: AtomicBool,
    closing: AtomicBool,
    metrics: Metrics,
}

/// What is handed to the volume's thread.
pub(crate) enum Order {
    /// A request that has passed the checks, with the time at which it came.
    Request(BlockRequest, std::time::Instant),
    /// Everything that the process before left unanswered was handed in.
    Replayed,
    /// Whether anything was ever written.
    AskWritten(Arc<dyn Completions>),
}

impl Volume {
    /// Start the volume's thread. It serves as soon as a map lists the session; until then requests are refused as
    /// outside of a volume of no size: wait for [`Self::status`].
    pub fn open(options: Options) -> Result<Self, OpenError> {
        let reactor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (status_out, status) = watch::channel(Status::default());
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Vec::new()),
            wake: Notify::new(),
            size: AtomicU64::new(0),
            read_only: AtomicBool::new(false),
            superseded: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            metrics: Metrics::default(),
        });
        let for_thread = shared.clone();
        let handle = reactor.handle().clone();
        let thread = std::thread::Builder::new().name("lamina-volume".into());
        thread.spawn(move || {
            let set = tokio::task::LocalSet::new();
            set.block_on(&reactor, core::run(options, for_thread, status_out));
        })?;
        Ok(Self { shared, status, thread: handle })
    }

    /// The volume's own thread, for the tasks of a front end: a request from there reaches the driver, and its answer
    /// comes back, without a change of threads. They must not block; they end with the volume.
    pub fn thread(&self) -> &tokio::runtime::Handle {
        &self.thread
    }

    /// What it is doing; the receiver wakes at every change.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Wait until requests are served for the first time, or never will be.
    pub async fn served(&self) -> Status {
        let mut status = self.status.clone();
        let settled = status.wait_for(|s| s.serving || s.ended || s.superseded).await.map(|s| *s);
        // The thread is gone only when the volume is closed.
        settled.unwrap_or_else(|_| *self.status.borrow())
    }

    /// Of a take-over: every request that the process before left unanswered has been submitted again (R2).
    pub fn replayed(&self) {
        // A volume that is being closed has no replay to end.
        let _ = self.shared.hand_in(Order::Replayed);
    }

    /// Whether any block was ever written, of what was answered before this call: the address of a page that was, in
    /// bytes; `None` = every group of every layer says that none was (PROTOCOL.md §2.9, Blank). Waits while members are
    /// away, as a read does.
    ///
    /// # Errors
    /// [`BlockError::Io`]: the session is over, or not every layer can be asked: nothing is known then.
    /// [`BlockError::Superseded`].
    pub async fn written(&self) -> Result<Option<u64>, BlockError> {
        if self.shared.superseded.load(Ordering::Acquire) {
            return Err(BlockError::Superseded);
        }
        let (answer, answered) = oneshot::channel();
        let asker = Arc::new(Asker(Mutex::new(Some(answer))));
        if self.shared.hand_in(Order::AskWritten(asker)).is_err() {
            return Err(BlockError::Io);
        }
        let found = answered.await.unwrap_or(Err(BlockError::Io))?;
        Ok(found.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)))
    }

    /// Counters since it was opened.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }
}

/// Where the answer to one question goes.
struct Asker(Mutex<Option<oneshot::Sender<BlockResult>>>);

impl Completions for Asker {
    fn complete(&self, _tag: u64, result: BlockResult) {
        let answer = self.0.lock().expect("nothing panics under this lock").take();
        if let Some(answer) = answer {
            // Nobody waits any longer: nothing to tell.
            let _ = answer.send(result);
        }
    }
}

impl Drop for Volume {
    /// Ends the thread; what is unanswered then is answered with EIO, so a device is taken away from its users before.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.wake.notify_one();
    }
}

impl BlockTarget for Volume {
    fn size(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.shared.read_only.load(Ordering::Acquire)
    }

    fn submit(&self, request: BlockRequest) {
        let refusal = match self.shared.check(&request.op) {
            Ok(()) => match self.shared.queue(request) {
                Ok(()) => return,
                Err(request) => (request, Err(BlockError::Io)),
            },
            Err(answer) => (request, answer),
        };
        let (request, answer) = refusal;
        request.completions.complete(request.tag, answer);
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Vec<Order>> {
        self.inbox.lock().expect("nothing panics under this lock")
    }

    /// Whether the request may go on; `Err` holds its answer.
    fn check(&self, op: &BlockOp) -> Result<(), BlockResult> {
        if self.superseded.load(Ordering::Acquire) {
            return Err(Err(BlockError::Superseded));
        }
        let (address, length, bounded) = match op {
            BlockOp::Read { address, length } => (*address, u64::from(*length), true),
            BlockOp::Write { address, payload, .. } => (*address, payload.len() as u64, true),
            BlockOp::Discard { address, length } => (*address, *length, false),
            BlockOp::WriteZeroes { address, length, .. } => (*address, *length, false),
            BlockOp::Flush => return Ok(()),
        };
        if !matches!(op, BlockOp::Read { .. }) && self.read_only.load(Ordering::Acquire) {
            return Err(Err(BlockError::ReadOnly));
        }
        let size = self.size.load(Ordering::Acquire);
        let inside = address.checked_add(length).is_some_and(|end| end <= size);
        let whole = address.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES);
        let rounds = matches!(op, BlockOp::Discard { .. });
        if !inside || (!whole && !rounds) || (bounded && length > u64::from(MAX_REQUEST_BYTES)) {
            return Err(Err(BlockError::Invalid));
        }
        if length == 0 { Err(Ok(Bytes::new())) } else { Ok(()) }
    }

    /// Hand a request to the thread. Gives it back when there is no room.
    fn queue(&self, request: BlockRequest) -> Result<(), BlockRequest> {
        match self.hand_in(Order::Request(request, std::time::Instant::now())) {
            Err(Order::Request(request, _)) => Err(request),
            _ => Ok(()),
        }
    }

    /// Hand something to the thread, in order; wakes it if it found nothing there before. Gives it back when there is no room.
    fn hand_in(&self, order: Order) -> Result<(), Order> {
        let was_empty = {
            let mut inbox = self.inbox();
            if inbox.len() >= MAX_WAITING || self.closing.load(Ordering::Acquire) {
                return Err(order);
            }
            inbox.push(order);
            inbox.len() == 1
        };
        if was_empty {
            self.wake.notify_one();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
