//! What the tests' processes do: a device holder, or the node service over a file of bytes.

use lamina_client::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget};
use lamina_client::runtime::{Metrics, OpenError, Status};
use lamina_control_api::leader::Replaced;
use lamina_crds::volume::Filesystem;
use lamina_csi_api::in_flight::InFlight;
use lamina_csi_api::name::VolumeHandle;
use lamina_csi_api::socket::serve_uds;
use lamina_csi_api::topology::NodeTopology;
use lamina_csi_node::device::DeviceKind;
use lamina_csi_node::holder::Holder;
use lamina_csi_node::host::linux::LinuxHost;
use lamina_csi_node::node::{Node, Parts, Patience};
use lamina_csi_node::objects::{Followed, ObjectError, Seen, VolumeObjects};
use lamina_csi_node::opener::{OpenVolume, Opener, Wish};
use lamina_csi_node::record::Records;
use lamina_csi_node::service::{About, NodeService};
use lamina_csi_node::sessions::{SessionError, Sessions};
use lamina_protocol::ids::{Generation, Incarnation, SessionId, VolumeId};
use lamina_protocol::map::{AccessMode, MAP_FORMAT, Session, Standing, VolumeMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::watch;

pub(crate) const HOLDER: &str = "holder";
pub(crate) const SERVE: &str = "serve";
pub(crate) const ROLE: &str = "LAMINA_TEST_ROLE";
pub(crate) const VOLUME: &str = "LAMINA_TEST_VOLUME";
pub(crate) const DIRECTORY: &str = "LAMINA_TEST_DIRECTORY";
pub(crate) const SESSION: u128 = 0x5e55;

pub(crate) fn main() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    std::thread::spawn(|| {
        // The parent is gone.
        let _ = std::io::stdin().lines().count();
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let holder = directory.join("holder.sock");
    match std::env::var(ROLE).unwrap().as_str() {
        HOLDER => runtime.block_on(Holder::new().serve_at(&holder)).unwrap(),
        SERVE => runtime.block_on(serve(&directory, holder)),
        other => panic!("no such role: {other}"),
    }
}

async fn serve(directory: &Path, holder: PathBuf) {
    let volume: VolumeHandle = std::env::var(VOLUME).unwrap().parse().unwrap();
    let files = Arc::new(Files { volume, directory: directory.to_owned() });
    let node = Node::new(Parts {
        objects: files.clone(),
        opener: files.clone(),
        sessions: files,
        host: Arc::new(LinuxHost::new(DeviceKind::Auto, Some(holder), "n1")),
        records: Records::open(&directory.join("volumes")).unwrap(),
        exit: Arc::new(|| std::process::exit(3)),
        patience: Patience::default(),
    });
    let calls = InFlight::new(64);
    let mut recoveries = Box::pin(node.recover(&calls)).await.unwrap();
    while recoveries.join_next().await.is_some() {}
    let topology = NodeTopology::new("n1".parse().unwrap(), None).unwrap();
    let service = NodeService::new(node, calls, About { topology, max_volumes: 16 });
    let router = tonic::transport::Server::builder().add_service(service.into_server());
    serve_uds(directory.join("csi.sock"), router, std::future::pending()).await.unwrap();
}

/// Objects and drivers out of files: the note of the filesystem is a file, the volume's bytes are one.
struct Files {
    volume: VolumeHandle,
    directory: PathBuf,
}

impl Files {
    fn noted(&self) -> Option<Filesystem> {
        let text = std::fs::read(self.directory.join("filesystem.json")).ok()?;
        serde_json::from_slice(&text).unwrap()
    }

    fn map(&self) -> VolumeMap {
        let session = Session {
            id: SessionId(SESSION),
            node: "n1".into(),
            mode: AccessMode::ReadWrite,
            incarnation: Incarnation(0),
            handled: Generation(1),
            standing: Standing::Admitted,
        };
        VolumeMap {
            volume: VolumeId(self.volume.id()),
            generation: Generation(1),
            format: MAP_FORMAT,
            required_features: 0,
            size: 4096,
            multi_session: false,
            servers: Vec::new(),
            placements: Vec::new(),
            layers: Vec::new(),
            sessions: vec![session],
            revoked: Vec::new(),
        }
    }
}

#[tonic::async_trait]
impl VolumeObjects for Files {
    async fn find(&self, volume: VolumeHandle) -> Result<Option<Seen>, ObjectError> {
        let seen = Seen { map: Some(self.map()), filesystem: self.noted(), ..Seen::default() };
        Ok((volume == self.volume).then_some(seen))
    }

    fn follow(&self, _volume: VolumeHandle) -> Followed {
        Followed { maps: watch::channel(Some(self.map())).1, task: None }
    }

    async fn note_filesystem(
        &self,
        _volume: VolumeHandle,
        was: Option<&Filesystem>,
        now: Option<&Filesystem>,
    ) -> Result<(), ObjectError> {
        if self.noted().as_ref() != was {
            return Err(ObjectError::Changed);
        }
        std::fs::write(self.directory.join("filesystem.json"), serde_json::to_vec(&now).unwrap()).unwrap();
        Ok(())
    }
}

#[tonic::async_trait]
impl Sessions for Files {
    async fn replace(&self, _volume: VolumeHandle, _session: u128) -> Result<Replaced, SessionError> {
        Err(SessionError::NobodyLeads)
    }
}

impl Opener for Files {
    fn open(&self, _wish: Wish) -> Result<Arc<dyn OpenVolume>, OpenError> {
        Ok(Arc::new(FileVolume::open(&self.directory.join("bytes"))))
    }
}

/// Bytes in a file. Requests take effect in order and are answered some later, so that a process that is killed leaves
/// requests that took effect and were never answered.
struct FileVolume {
    file: File,
    queue: Sender<BlockRequest>,
    status: watch::Sender<Status>,
    metrics: Metrics,
}

impl FileVolume {
    fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (queue, requests) = channel();
        let worker = file.try_clone().unwrap();
        std::thread::spawn(move || work(&worker, &requests));
        // A driver learns of growth from maps; this one looks at its file.
        let status = watch::channel(Status { serving: true, size: u64::MAX, ..Status::default() }).0;
        Self { file, queue, status, metrics: Metrics::default() }
    }
}

#[tonic::async_trait]
impl OpenVolume for FileVolume {
    fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    fn replayed(&self) {}

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    async fn written(&self) -> Result<Option<u64>, BlockError> {
        // What was never written is a hole of the file.
        let found = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(0));
        Ok(found.ok())
    }
}

impl BlockTarget for FileVolume {
    fn size(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        self.queue.send(request).unwrap();
    }
}

fn work(file: &File, requests: &Receiver<BlockRequest>) {
    while let Ok(first) = requests.recv() {
        let batch: Vec<_> = std::iter::once(first).chain(requests.try_iter().take(15)).collect();
        let answers: Vec<_> = batch.iter().map(|request| apply(file, &request.op)).collect();
        std::thread::sleep(Duration::from_millis(1));
        for (request, answer) in batch.into_iter().zip(answers) {
            request.completions.complete(request.tag, answer);
        }
    }
}

fn apply(file: &File, op: &BlockOp) -> BlockResult {
    let done = match op {
        BlockOp::Read { address, length } => {
            let mut bytes = vec![0; *length as usize];
            file.read_exact_at(&mut bytes, *address).map_err(|_| BlockError::Io)?;
            bytes
        }
        BlockOp::Write { address, payload, .. } => {
            file.write_all_at(payload, *address).map_err(|_| BlockError::Io)?;
            Vec::new()
        }
        BlockOp::Discard { address, length } | BlockOp::WriteZeroes { address, length, .. } => {
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(file, flags, *address, *length).map_err(|_| BlockError::Io)?;
            Vec::new()
        }
        BlockOp::Flush => Vec::new(),
    };
    Ok(done.into())
}
