//! The surroundings of one test: directory, bytes, mounts, children; all removed when it is dropped.

use super::process::{Killed, Process, start};
use super::program::HOLDER;
use lamina_csi_api::v1;
use lamina_csi_api::v1::volume_capability::access_mode::Mode;
use lamina_csi_api::v1::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use lamina_csi_node::device::{self, mounts};
use rustix::mount::UnmountFlags;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The first thing that this machine lacks, if any.
fn missing(programs: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root".into());
    }
    let devices = ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| !Path::new(path).exists());
    let directories = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let found = |program: &&&str| directories.iter().any(|path| Path::new(path).join(program).is_file());
    devices.or_else(|| programs.iter().find(|program| !found(program)).copied()).map(str::to_owned)
}

pub(crate) struct Scene {
    volume: String,
    holder: Option<Killed>,
    directory: tempfile::TempDir,
}

impl Scene {
    /// `None`, and says so, if the machine lacks something.
    pub(crate) fn new(test: &str, size: u64, programs: &[&str]) -> Option<Self> {
        if let Some(missing) = missing(programs) {
            eprintln!("skipped: {test}: needs {missing}");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::File::create(directory.path().join("bytes")).unwrap().set_len(size).unwrap();
        // A handle of its own, for loop devices belong to the whole machine.
        let name: String = test.bytes().map(|byte| format!("{byte:02x}")).collect();
        let volume = format!("{:0>32}", format!("{:x}{name:.20}", std::process::id()));
        let holder = Some(start(HOLDER, &volume, directory.path()));
        Some(Self { volume, holder, directory })
    }

    pub(crate) async fn start_serving(&self) -> Process {
        Process::start(&self.volume, self.directory.path(), self.staging()).await
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.directory.path().join("staging")
    }

    pub(crate) fn target(&self, name: &str) -> PathBuf {
        self.directory.path().join("pods").join(name)
    }

    pub(crate) fn bytes(&self) -> PathBuf {
        self.directory.path().join("bytes")
    }

    /// Random writes to a file, then everything is read and its checksums compared.
    pub(crate) fn start_fio(&self, at: &Path) -> Child {
        let arguments = "--name=verify --ioengine=libaio --direct=1 --rw=randwrite --iodepth=16 --bs=4k --size=96M \
            --verify=crc32c --verify_fatal=1 --verify_state_save=0 --fsync=256 --output-format=terse";
        let mut command = Command::new("fio");
        command.arg(format!("--directory={}", at.display())).args(arguments.split_whitespace());
        command.current_dir(self.directory.path()).stdout(Stdio::null()).spawn().unwrap()
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let all = mounts::list().unwrap().into_iter().map(|mount| mount.point);
        all.filter(|point| point.starts_with(self.directory.path())).collect()
    }

    fn loop_devices(&self) -> Vec<String> {
        let blocks = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
        let files = blocks.filter_map(|block| std::fs::read_to_string(block.join("loop/backing_file")).ok());
        files.filter(|file| file.contains(&self.volume)).collect()
    }

    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), [""; 0].map(PathBuf::from), "no mount is left");
        assert_eq!(self.loop_devices(), [""; 0], "no loop device is left");
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.holder = None;
        let device = self.directory.path().join("volumes").join(&self.volume).join("device");
        for point in self.mounts().into_iter().rev().filter(|point| *point != device) {
            let _ = rustix::mount::unmount(point, UnmountFlags::DETACH);
        }
        if let Err(error) = device::clear(&self.volume, &device, None) {
            eprintln!("{}: not cleared: {error}", self.volume);
        }
    }
}

pub(crate) fn mounted(filesystem: &str, mode: Mode) -> v1::VolumeCapability {
    let mount =
        MountVolume { fs_type: filesystem.to_owned(), mount_flags: vec!["noatime".to_owned()], ..Default::default() };
    v1::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(mount)),
    }
}

pub(crate) fn block(mode: Mode) -> v1::VolumeCapability {
    v1::VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Block(BlockVolume {})),
    }
}

/// Run to a good end within a minute.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new("timeout").args(["-k", "5", "60", program]).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program}: {}\n{out}\n{err}", output.status);
}
