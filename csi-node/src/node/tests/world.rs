//! A made-up machine, made-up `Volume` objects and drivers over memory. What is done to them is written down in order.

use crate::device::mounts::Mount;
use crate::device::{Device, DeviceError, DeviceKind, DeviceSpec};
use crate::host::{Host, HostError, Usage};
use crate::node::{Node, Parts, Patience};
use crate::objects::{Attachment, Followed, ObjectError, Seen, VolumeObjects, may_note};
use crate::opener::{OpenVolume, Opener, Wish};
use crate::record::{Record, Records};
use crate::sessions::{SessionError, Sessions};
use lamina_client::block::{BlockError, BlockRequest, BlockTarget};
use lamina_client::ram::RamVolume;
use lamina_client::runtime::{Metrics, OpenError, Status};
use lamina_control_api::leader::{LeaderError, Replaced};
use lamina_crds::id::Id;
use lamina_crds::volume::{Filesystem as Noted, FilesystemState};
use lamina_csi_api::capability::Filesystem;
use lamina_csi_api::name::VolumeHandle;
use lamina_protocol::ids::{Generation, Incarnation, SessionId, VolumeId};
use lamina_protocol::map::{AccessMode, MAP_FORMAT, Session, Standing, VolumeMap};
use lamina_protocol::wire::Start;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;

pub(super) const VOLUME: u128 = 7;
const DEVICE: &str = "/dev/made-up";

pub(super) fn handle() -> VolumeHandle {
    VolumeHandle::new(VOLUME)
}

#[derive(Default)]
struct State {
    done: Vec<String>,
    mounts: BTreeMap<PathBuf, String>,
    attached: bool,
    held: bool,
    opened: Vec<(u128, Start)>,
    replays: usize,
    signature: Option<String>,
    blank: bool,
    servers_away: bool,
    attachments: Vec<Attachment>,
    replies_lost: usize,
    replacements: Vec<u128>,
    noted: Option<Noted>,
    fail_once: Option<String>,
    /// Happens once, at this step.
    then: Option<(String, Then)>,
}

type Then = Box<dyn FnOnce(&World) + Send>;

/// Everything; clones share it.
#[derive(Clone)]
pub(super) struct World {
    state: Arc<Mutex<State>>,
    ram: Arc<RamVolume>,
    maps: watch::Sender<Option<VolumeMap>>,
    status: watch::Sender<Status>,
    directory: Arc<tempfile::TempDir>,
}

impl World {
    /// A blank volume with a map of this generation that admits these sessions.
    pub(super) fn new(generation: u64, sessions: &[u128]) -> Self {
        let world = Self {
            state: Arc::default(),
            ram: Arc::new(RamVolume::new(64 << 20)),
            maps: watch::channel(None).0,
            status: watch::channel(Status { size: 64 << 20, serving: true, ..Status::default() }).0,
            directory: Arc::new(tempfile::tempdir().unwrap()),
        };
        world.lock().blank = true;
        world.admit(generation, sessions);
        world
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn records(&self) -> Records {
        Records::open(self.directory.path()).unwrap()
    }

    /// A process.
    pub(super) fn node(&self) -> Arc<Node> {
        let short = Duration::from_millis(50);
        Node::new(Parts {
            objects: Arc::new(self.clone()),
            opener: Arc::new(self.clone()),
            sessions: Arc::new(self.clone()),
            host: Arc::new(self.clone()),
            records: self.records(),
            exit: Arc::new(|| panic!("nobody supersedes this process")),
            patience: Patience { map: short, serving: short, growth: short },
        })
    }

    /// The wishes are these, and a map admits them.
    pub(super) fn admit(&self, generation: u64, sessions: &[u128]) {
        let wish = |id: &u128| Attachment { session: *id, replaced: Vec::new() };
        self.lock().attachments = sessions.iter().map(wish).collect();
        self.commit(generation, sessions);
    }

    fn commit(&self, generation: u64, sessions: &[u128]) {
        let sessions = sessions.iter().map(|id| Session {
            id: SessionId(*id),
            node: "n1".into(),
            mode: AccessMode::ReadWrite,
            incarnation: Incarnation(0),
            handled: Generation(generation),
            standing: Standing::Admitted,
        });
        self.maps.send_replace(Some(VolumeMap {
            volume: VolumeId(VOLUME),
            generation: Generation(generation),
            format: MAP_FORMAT,
            required_features: 0,
            size: 64 << 20,
            multi_session: false,
            servers: Vec::new(),
            placements: Vec::new(),
            layers: Vec::new(),
            sessions: sessions.collect(),
            revoked: Vec::new(),
        }));
    }

    pub(super) fn incarnation(&self, incarnation: u64) {
        self.maps.send_modify(|map| {
            for session in &mut map.as_mut().unwrap().sessions {
                session.incarnation = Incarnation(incarnation);
            }
        });
    }

    pub(super) fn done(&self) -> Vec<String> {
        self.lock().done.clone()
    }

    pub(super) fn mounts(&self) -> Vec<String> {
        self.lock().mounts.keys().map(|path| path.display().to_string()).collect()
    }

    pub(super) fn attached(&self) -> bool {
        self.lock().attached
    }

    pub(super) fn opened(&self) -> Vec<(u128, Start)> {
        self.lock().opened.clone()
    }

    pub(super) fn replays(&self) -> usize {
        self.lock().replays
    }

    pub(super) fn flushes(&self) -> u64 {
        self.ram.flushes()
    }

    pub(super) fn record(&self) -> Option<Record> {
        self.records().read(handle()).unwrap()
    }

    pub(super) fn noted(&self) -> Option<(String, FilesystemState)> {
        self.lock().noted.as_ref().map(|noted| (noted.kind.clone(), noted.state))
    }

    pub(super) fn filesystem(&self, noted: Option<(&str, FilesystemState)>, signature: Option<&str>, blank: bool) {
        let mut state = self.lock();
        state.noted = noted.map(|(kind, state)| Noted { kind: kind.into(), state, session: Some(Id::of(99)) });
        state.signature = signature.map(str::to_owned);
        state.blank = blank;
    }

    pub(super) fn servers_away(&self, away: bool) {
        self.lock().servers_away = away;
    }

    /// What the device was told about writes.
    pub(super) fn modes(&self) -> Vec<String> {
        let done = self.done();
        done.into_iter().filter(|step| step == "only read" || step == "write again").collect()
    }

    pub(super) fn foreign_mount(&self, path: &str) {
        self.lock().mounts.insert(path.into(), "/dev/other".into());
    }

    /// Mounts and devices are gone, files stay.
    pub(super) fn reboot(&self) {
        let mut state = self.lock();
        state.mounts.clear();
        (state.attached, state.held) = (false, false);
    }

    /// The process is killed; the kernel's side stays, with the holder.
    pub(super) fn node_dies(&self) {
        self.lock().done.push("killed".into());
    }

    pub(super) fn end_session(&self) {
        self.status.send_modify(|status| status.ended = true);
    }

    /// Drivers that are opened from now on serve.
    pub(super) fn serves_again(&self) {
        self.status.send_modify(|status| status.ended = false);
    }

    /// The wishes stand, but a map ends their sessions.
    pub(super) fn commit_without_sessions(&self) {
        let generation = self.maps.borrow().as_ref().unwrap().generation.next();
        self.commit(generation.0, &[]);
    }

    /// The holder is gone, and the devices with it; what was mounted is dead.
    pub(super) fn holder_dies(&self) {
        let mut state = self.lock();
        (state.attached, state.held) = (false, false);
    }

    /// The leader does what it is asked, and its next answers do not come through.
    pub(super) fn lose_replies(&self, replies: usize) {
        self.lock().replies_lost = replies;
    }

    /// The sessions that were replaced, in order.
    pub(super) fn replacements(&self) -> Vec<u128> {
        self.lock().replacements.clone()
    }

    pub(super) fn lose_record(&self) {
        std::fs::remove_dir_all(self.directory.path().join(handle().to_string())).unwrap();
    }

    pub(super) fn grow(&self, size: u64) {
        self.ram.grow(size);
        self.status.send_modify(|status| status.size = size);
    }

    pub(super) fn fail_once(&self, step: &str) {
        self.lock().fail_once = Some(step.to_owned());
    }

    pub(super) async fn until(&self, condition: impl Fn(&Self) -> bool) {
        let reached = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), reached).await.expect("it comes to that");
    }

    /// When this step is done next, something else happens too.
    pub(super) fn at(&self, step: &str, then: impl FnOnce(&Self) + Send + 'static) {
        self.lock().then = Some((step.to_owned(), Box::new(then)));
    }

    /// Write a step down, or fail it.
    fn step(&self, step: &str) -> io::Result<MutexGuard<'_, State>> {
        let then = self.lock().then.take_if(|(at, _)| at == step);
        if let Some((_, then)) = then {
            then(self);
        }
        let mut state = self.lock();
        if state.fail_once.as_deref() == Some(step) {
            state.fail_once = None;
            return Err(io::Error::other("made to fail"));
        }
        state.done.push(step.to_owned());
        Ok(state)
    }

    fn host_step(&self, step: &str, path: &Path) -> Result<MutexGuard<'_, State>, HostError> {
        self.step(step).map_err(HostError::at("do what was asked with", path))
    }

    fn device_step(&self, step: &'static str) -> Result<MutexGuard<'_, State>, DeviceError> {
        self.step(step).map_err(|source| DeviceError::Step { step, source })
    }
}

impl Host for World {
    fn attach(&self, _spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError> {
        let mut state = self.device_step("attach")?;
        assert!(!state.attached, "attached twice");
        (state.attached, state.held) = (true, true);
        Ok(Box::new(MadeUp(self.clone())))
    }

    fn held(&self) -> Result<Vec<String>, DeviceError> {
        Ok(if self.lock().held { vec![handle().to_string()] } else { Vec::new() })
    }

    fn resume(&self, _spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError> {
        assert!(self.device_step("resume")?.held);
        Ok(Box::new(MadeUp(self.clone())))
    }

    fn clear(&self, volume: &str, _directory: &Path) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if volume == handle().to_string() {
            (state.attached, state.held) = (false, false);
        }
        Ok(())
    }

    fn mount_at(&self, path: &Path) -> Result<Option<Mount>, HostError> {
        let state = self.lock();
        let mount = |source: &String| Mount {
            point: path.to_owned(),
            kind: "ext4".into(),
            source: source.clone(),
            device: (7, 0),
        };
        Ok(state.mounts.get(path).map(mount))
    }

    fn mount(
        &self,
        device: &Path,
        path: &Path,
        filesystem: Filesystem,
        _flags: &[String],
        _read_only: bool,
    ) -> Result<(), HostError> {
        let mut state = self.host_step(&format!("mount {filesystem}"), path)?;
        assert!(state.attached);
        assert_eq!(state.mounts.insert(path.to_owned(), device.display().to_string()), None);
        Ok(())
    }

    fn bind(&self, source: &Path, target: &Path, _read_only: bool) -> Result<(), HostError> {
        let mut state = self.host_step("bind", target)?;
        assert!(source == Path::new(DEVICE) || state.mounts.contains_key(source), "{}", source.display());
        assert_eq!(state.mounts.insert(target.to_owned(), DEVICE.into()), None);
        Ok(())
    }

    fn unmount(&self, path: &Path, _lazily: bool) -> Result<(), HostError> {
        self.lock().mounts.remove(path);
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), HostError> {
        assert!(!self.lock().mounts.contains_key(path), "removed under a mount");
        Ok(())
    }

    fn signature(&self, _device: &Path) -> Result<Option<String>, HostError> {
        Ok(self.lock().signature.clone())
    }

    fn format(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        let mut state = self.host_step(&format!("format {filesystem}"), device)?;
        state.signature = Some(filesystem.to_string());
        state.blank = false;
        Ok(())
    }

    fn check(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        self.host_step(&format!("check {filesystem}"), device).map(drop)
    }

    fn grow(&self, device: &Path, _mounted: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        self.host_step(&format!("grow {filesystem}"), device).map(drop)
    }

    fn usage(&self, _path: &Path) -> Result<Usage, HostError> {
        Ok(Usage { bytes: 100, bytes_free: 40, bytes_used: 60, files: 10, files_free: 9 })
    }
}

struct MadeUp(World);

impl Device for MadeUp {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fuse
    }

    fn path(&self) -> &Path {
        Path::new(DEVICE)
    }

    fn grow(&self) -> Result<u64, DeviceError> {
        drop(self.0.device_step("grow device")?);
        Ok(self.0.ram.size())
    }

    fn set_read_only(&self, read_only: bool) -> Result<(), DeviceError> {
        self.0.device_step(if read_only { "only read" } else { "write again" }).map(drop)
    }

    fn detach(&self) -> Result<(), DeviceError> {
        let mut state = self.0.device_step("detach")?;
        if state.mounts.values().any(|source| source == DEVICE) {
            return Err(DeviceError::Busy);
        }
        (state.attached, state.held) = (false, false);
        Ok(())
    }

    fn force_detach(&self) -> Result<(), DeviceError> {
        let mut state = self.0.device_step("force_detach")?;
        (state.attached, state.held) = (false, false);
        Ok(())
    }
}

impl Opener for World {
    fn open(&self, wish: Wish) -> Result<Arc<dyn OpenVolume>, OpenError> {
        let mut state = self.lock();
        state.opened.push((wish.session.0, wish.start));
        state.done.push(format!("open {:?}", wish.start));
        // As the storage servers have it: an incarnation is opened by one process.
        let used = wish.start == Start::Fresh
            && state.opened[..state.opened.len() - 1].contains(&(wish.session.0, Start::Fresh));
        drop(state);
        let status = if used {
            (wish.on_superseded)();
            watch::channel(Status { superseded: true, ..Status::default() }).1
        } else {
            self.status.subscribe()
        };
        Ok(Arc::new(Driver { world: self.clone(), status, metrics: Metrics::default() }))
    }
}

struct Driver {
    world: World,
    status: watch::Receiver<Status>,
    metrics: Metrics,
}

impl BlockTarget for Driver {
    fn size(&self) -> u64 {
        self.world.ram.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        self.world.ram.submit(request);
    }
}

#[tonic::async_trait]
impl OpenVolume for Driver {
    fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    fn replayed(&self) {
        self.world.lock().replays += 1;
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn written(&self) -> Result<Option<u64>, BlockError> {
        if self.world.lock().servers_away {
            std::future::pending::<()>().await;
        }
        Ok((!self.world.lock().blank).then_some(40 << 20))
    }
}

/// As the leader answers.
#[tonic::async_trait]
impl Sessions for World {
    async fn replace(&self, _volume: VolumeHandle, session: u128) -> Result<Replaced, SessionError> {
        let generation = self.maps.borrow().as_ref().unwrap().generation.next();
        let (present, replied) = {
            let mut state = self.lock();
            let named = |a: &&mut Attachment| a.session == session || a.replaced.contains(&session);
            let Some(attachment) = state.attachments.iter_mut().find(named) else {
                let refused = LeaderError::from(tonic::Status::failed_precondition("not attached"));
                return Err(SessionError::Refused(refused));
            };
            if attachment.session == session {
                attachment.replaced.push(session);
                attachment.session += 100;
                state.replacements.push(session);
            }
            let present = state.attachments.iter().map(|a| a.session).collect::<Vec<_>>();
            let replied = state.replies_lost == 0;
            state.replies_lost = state.replies_lost.saturating_sub(1);
            (present, replied)
        };
        self.commit(generation.0, &present);
        match present.last() {
            Some(last) if replied => Ok(Replaced { session: SessionId(*last), generation }),
            _ => Err(SessionError::NobodyLeads),
        }
    }
}

#[tonic::async_trait]
impl VolumeObjects for World {
    async fn find(&self, volume: VolumeHandle) -> Result<Option<Seen>, ObjectError> {
        let seen = Seen { map: self.maps.borrow().clone(), filesystem: self.lock().noted.clone(), ..Seen::default() };
        let seen = Seen { attachments: self.lock().attachments.clone(), ..seen };
        Ok((volume == handle()).then_some(seen))
    }

    fn follow(&self, _volume: VolumeHandle) -> Followed {
        Followed { maps: self.maps.subscribe(), task: None }
    }

    async fn note_filesystem(
        &self,
        _volume: VolumeHandle,
        was: Option<&Noted>,
        now: Option<&Noted>,
    ) -> Result<(), ObjectError> {
        let step = now.map_or("note none".to_owned(), |now| format!("note {:?}", now.state));
        let Ok(mut state) = self.step(&step) else { return Err(ObjectError::Contended) };
        if state.noted.as_ref() != was {
            return Err(ObjectError::Changed);
        }
        if !may_note(self.maps.borrow().as_ref(), now) {
            return Err(ObjectError::NotListed);
        }
        state.noted = now.cloned();
        Ok(())
    }
}
