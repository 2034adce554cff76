//! The surroundings of one test: directory, mounts, children; all removed when it is dropped.

use super::child::{HOLDER, Process};
use lamina_client::block::BlockTarget;
use lamina_csi_node::device::{self, Device, DeviceError, DeviceKind, DeviceSpec, mounts};
use lamina_csi_node::holder::HolderClient;
use rustix::mount::UnmountFlags;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

pub(crate) const MIB: u64 = 1 << 20;

/// The first thing that this machine lacks, if any.
pub(crate) fn missing(programs: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root".into());
    }
    let devices = ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| !Path::new(path).exists());
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = |program: &&&str| std::env::split_paths(&paths).any(|path| path.join(program).is_file());
    devices.or_else(|| programs.iter().find(|program| !found(program)).copied()).map(str::to_owned)
}

/// A test that takes longer hangs: its device is then cut off, which turns waiting for ever into an I/O error.
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) struct Scene {
    /// Dropped with the scene, which ends the watch.
    _watch: Sender<()>,
    pub(crate) volume: String,
    /// Where the FUSE file is mounted.
    pub(crate) fuse: PathBuf,
    pub(crate) directory: tempfile::TempDir,
}

impl Scene {
    /// `None`, and says so, if the machine lacks something.
    pub(crate) fn new(test: &str, programs: &[&str]) -> Option<Self> {
        if let Some(missing) = missing(programs) {
            println!("skipped {test}: needs {missing}");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::File::create(directory.path().join("bytes")).unwrap().set_len(64 * MIB).unwrap();
        let volume = format!("test-{test}-{}", std::process::id());
        let fuse = directory.path().join("fuse");
        let _watch = watch(volume.clone(), fuse.clone());
        Some(Self { _watch, volume, fuse, directory })
    }

    pub(crate) fn spec(&self, target: Arc<dyn BlockTarget>) -> DeviceSpec {
        let on_superseded = Arc::new(|| panic!("nobody takes this device"));
        DeviceSpec { volume: self.volume.clone(), directory: self.fuse.clone(), target, on_superseded }
    }

    pub(crate) fn attach(&self, target: Arc<dyn BlockTarget>) -> Result<Box<dyn Device>, DeviceError> {
        device::attach(DeviceKind::Auto, self.spec(target), None)
    }

    pub(crate) fn start_holder(&self) -> Process {
        let holder = Process::start(HOLDER, &self.volume, self.directory.path());
        let asked = Instant::now();
        while HolderClient::connect(&self.socket()).is_err() {
            assert!(asked.elapsed() < Duration::from_secs(20), "the holder comes up");
            std::thread::sleep(Duration::from_millis(10));
        }
        holder
    }

    pub(crate) fn holder_client(&self) -> HolderClient {
        HolderClient::connect(&self.socket()).unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("holder.sock")
    }

    pub(crate) fn start_serving(&self, role: &str) -> Process {
        Process::start(role, &self.volume, self.directory.path())
    }

    pub(crate) fn start_fio(&self, device: &Path, size: &str) -> Fio {
        let mut command = Command::new("fio");
        command.args(fio_arguments(device, "4k", size)).current_dir(self.directory.path());
        Fio { child: command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap() }
    }

    /// Mount a file system of a device until the guard is dropped.
    pub(crate) fn mount_fs(&self, kind: &str, device: &Path) -> MountedFs {
        let path = self.directory.path().join("fs");
        std::fs::create_dir_all(&path).unwrap();
        run("mount", &["-t", kind, device.to_str().unwrap(), path.to_str().unwrap()]);
        MountedFs { path }
    }

    pub(crate) fn assert_nothing_left(&self) {
        let below = |mount: &mounts::Mount| mount.point.starts_with(self.directory.path());
        assert_eq!(mounts::list().unwrap().into_iter().find(below), None, "no mount is left");
        assert_eq!(self.loop_devices(), [""; 0], "no loop device is left");
    }

    fn loop_devices(&self) -> Vec<String> {
        let blocks = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
        let files = blocks.filter_map(|block| std::fs::read_to_string(block.join("loop/backing_file")).ok());
        files.filter(|file| file.contains(&self.volume)).collect()
    }
}

fn watch(volume: String, fuse: PathBuf) -> Sender<()> {
    let (watch, ended) = channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{volume}: hangs, cutting its device off");
            let _ = device::clear(&volume, &fuse, None);
        }
    });
    watch
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.directory.path().join("fs"), UnmountFlags::DETACH);
        if let Err(error) = device::clear(&self.volume, &self.fuse, None) {
            eprintln!("{}: not cleared: {error}", self.volume);
        }
    }
}

pub(crate) struct MountedFs {
    pub(crate) path: PathBuf,
}

impl Drop for MountedFs {
    fn drop(&mut self) {
        let flags = if std::thread::panicking() { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        let _ = rustix::mount::unmount(&self.path, flags);
    }
}

/// A running fio; killed when dropped.
pub(crate) struct Fio {
    child: Child,
}

impl Fio {
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Wait for its end, which must be a good one.
    pub(crate) fn finish(&mut self) {
        let status = self.child.wait().unwrap();
        let mut text = String::new();
        for stream in [self.child.stdout.take().map(read), self.child.stderr.take().map(read)] {
            text += &stream.unwrap_or_default();
        }
        assert!(status.success(), "fio saw an error: {text}");
    }
}

fn read(mut stream: impl std::io::Read) -> String {
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    text
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// Random writes of all of `size` at depth 16, then everything is read and its checksums compared.
pub(crate) fn fio_arguments(device: &Path, block: &str, size: &str) -> Vec<String> {
    let mut arguments: Vec<String> = vec![format!("--filename={}", device.display())];
    arguments.extend([format!("--bs={block}"), format!("--size={size}")]);
    let fixed = "--name=verify --ioengine=libaio --direct=1 --rw=randwrite --iodepth=16 --verify=crc32c \
        --verify_fatal=1 --verify_state_save=0 --fsync=256 --output-format=terse";
    arguments.extend(fixed.split_whitespace().map(str::to_owned));
    arguments
}

/// A number that the kernel tells of a block device.
pub(crate) fn attribute(device: &Path, attribute: &str) -> u64 {
    let name = device.file_name().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(format!("/sys/block/{name}/{attribute}")).unwrap();
    text.trim().parse().unwrap()
}

/// In bytes.
pub(crate) fn size_of(device: &Path) -> u64 {
    attribute(device, "size") * 512
}

fn output(program: &str, arguments: &[impl AsRef<str>]) -> std::process::Output {
    let arguments = arguments.iter().map(AsRef::as_ref);
    Command::new("timeout").args(["-k", "5", "60", program]).args(arguments).current_dir("/tmp").output().unwrap()
}

/// Run to a good end within a minute.
pub(crate) fn run(program: &str, arguments: &[impl AsRef<str>]) {
    let output = output(program, arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program}: {}\n{out}\n{err}", output.status);
}

/// Run to an error of its own within a minute.
pub(crate) fn run_fails(program: &str, arguments: &[impl AsRef<str>]) {
    let status = output(program, arguments).status;
    assert!(status.code().is_some_and(|code| code != 0 && code < 124), "{program}: {status}");
}
