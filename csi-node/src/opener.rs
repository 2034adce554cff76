//! A volume's driver as the node service uses it, behind a trait so that the service is tested without servers.

use crate::device;
use lamina_client::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions};
use lamina_client::runtime::{Clock, Metrics, OpenError, Options, Status, SteadyClock, Volume};
use lamina_protocol::control::DriverReport;
use lamina_protocol::driver::Config;
use lamina_protocol::ids::{ClusterId, ServerId, SessionId, VolumeId};
use lamina_protocol::limits::KEPT_WRITES_BYTES;
use lamina_protocol::map::VolumeMap;
use lamina_protocol::time::Millis;
use lamina_protocol::wire::Start;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};

/// A volume that a driver serves. Dropping the last reference ends the driver.
#[tonic::async_trait]
pub trait OpenVolume: BlockTarget {
    /// What it is doing; the receiver wakes at every change.
    fn status(&self) -> watch::Receiver<Status>;
    /// Of a take-over: all that was unanswered has been submitted again.
    fn replayed(&self);
    /// Counters.
    fn metrics(&self) -> &Metrics;
    /// The address of a page that was ever written, bytes; `None` = every group says that none was. Waits while storage
    /// servers are away.
    ///
    /// # Errors
    /// As [`Volume::written`]: nothing is known then.
    async fn written(&self) -> Result<Option<u64>, BlockError>;
    /// Where tasks of a front end cost least: the driver's own thread if it has one, else the caller's runtime.
    fn thread(&self) -> tokio::runtime::Handle {
        tokio::runtime::Handle::current()
    }
}

#[tonic::async_trait]
impl OpenVolume for Volume {
    fn status(&self) -> watch::Receiver<Status> {
        Self::status(self)
    }

    fn replayed(&self) {
        Self::replayed(self);
    }

    fn metrics(&self) -> &Metrics {
        Self::metrics(self)
    }

    async fn written(&self) -> Result<Option<u64>, BlockError> {
        Self::written(self).await
    }

    fn thread(&self) -> tokio::runtime::Handle {
        Self::thread(self).clone()
    }
}

/// What is to be opened.
pub struct Wish {
    /// Which volume.
    pub volume: VolumeId,
    /// Under which session.
    pub session: SessionId,
    /// First stage or take-over.
    pub start: Start,
    /// Committed maps as they become known.
    pub maps: watch::Receiver<Option<VolumeMap>>,
    /// Called when a successor owns the device: nothing more may be answered (R10).
    pub on_superseded: Arc<dyn Fn() + Send + Sync>,
}

/// Opens volumes.
pub trait Opener: Send + Sync {
    /// Start a driver; it serves when its status says so.
    ///
    /// # Errors
    /// [`OpenError`].
    fn open(&self, wish: Wish) -> Result<Arc<dyn OpenVolume>, OpenError>;
}

/// Opens volumes on the storage servers of a cluster.
pub struct ClusterOpener {
    /// Which.
    pub cluster: ClusterId,
    /// For the leader.
    pub reports: mpsc::Sender<DriverReport>,
    /// The storage servers on this node and in its zone, nearest first, as far as they are known.
    pub near: watch::Receiver<Vec<ServerId>>,
}

impl Opener for ClusterOpener {
    fn open(&self, wish: Wish) -> Result<Arc<dyn OpenVolume>, OpenError> {
        let on_superseded = wish.on_superseded;
        let driver =
            Config { volume: wish.volume, session: wish.session, start: wish.start, kept_bytes: KEPT_WRITES_BYTES };
        let volume = Volume::open(Options {
            cluster: self.cluster,
            driver,
            prefer: self.near.borrow().clone(),
            maps: wish.maps,
            reports: self.reports.clone(),
            on_exit: Box::new(move || on_superseded()),
            clock: boot_clock(),
        })?;
        Ok(Arc::new(volume))
    }
}

/// A clock that is known to run during suspend (R5), where there is one. It is called on the volume's own thread first,
/// which is the moment to mark that thread as one that writes memory back.
fn boot_clock() -> Box<dyn Clock> {
    if cfg!(target_os = "linux") { Box::new(BootClock { marked: false }) } else { Box::<SteadyClock>::default() }
}

#[derive(Debug)]
struct BootClock {
    marked: bool,
}

impl Clock for BootClock {
    fn now(&mut self) -> Millis {
        if !std::mem::replace(&mut self.marked, true) {
            device::serve_memory_pressure();
        }
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Millis(time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
    }
}

/// Everything that was answered before is durable when this is over.
///
/// # Errors
/// What the driver says; [`BlockError::Io`] too when the driver ended meanwhile.
pub async fn flush(volume: &dyn OpenVolume) -> Result<(), BlockError> {
    let (answer, answered) = oneshot::channel();
    let completions = Arc::new(Once(Mutex::new(Some(answer))));
    volume.submit(BlockRequest { op: BlockOp::Flush, tag: 0, completions });
    answered.await.unwrap_or(Err(BlockError::Io)).map(drop)
}

struct Once(Mutex<Option<oneshot::Sender<BlockResult>>>);

impl Completions for Once {
    fn complete(&self, _tag: u64, result: BlockResult) {
        let answer = self.0.lock().expect("nothing panics under this lock").take();
        if let Some(answer) = answer {
            // Nobody waits any longer: nothing to tell.
            let _ = answer.send(result);
        }
    }
}
