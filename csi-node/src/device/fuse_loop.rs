//! A volume as one file of a FUSE mount, under a loop device: works on any kernel that has the two.
//!
//! ```text
//! kernel user -> /dev/loopN -> <directory>/<volume handle> -> /dev/fuse -> readers -> target -> Replies -> /dev/fuse
//! ```
//! Take-over (data-path.md, Attach): the descriptor lies with the device holder together with [`HeldState`]; a
//! successor takes both, tells the kernel to send again what nobody answered, and serves on. Everything that the kernel
//! knows of us (node numbers, handles, what was negotiated) is constant for that reason.
//!
//! Invariant: the holder has the descriptor before anything of the kernel's can wait in it, so a process that is killed
//! in the middle of attaching leaves nothing that hangs for ever.

use super::loop_device::LoopDevice;
use super::mounts::{self, Mount};
use super::{Device, DeviceError, DeviceKind, DeviceSpec};
use crate::holder::HolderClient;
use channel::Channel;
use lamina_client::merge::Aligned;
use replies::Replies;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

mod abi;
mod channel;
mod replies;
mod resident;
mod serve;

/// The type under which the mount is listed.
const MOUNT_KIND: &str = "fuse.lamina";

/// What a successor has to know, kept by the holder as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HeldState {
    directory: PathBuf,
    /// The kernel's number of the FUSE connection.
    connection: u32,
    /// `None` until the loop device exists.
    loop_number: Option<u32>,
    read_only: bool,
    can_resend: bool,
}

impl HeldState {
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a structure of plain fields")
    }
}

/// A volume's FUSE file and loop device.
pub struct FuseLoop {
    volume: String,
    directory: PathBuf,
    connection: u32,
    loop_device: LoopDevice,
    replies: Arc<Replies>,
    readers: Mutex<Vec<JoinHandle<()>>>,
    holder: Option<HolderClient>,
}

impl FuseLoop {
    /// Mount, serve, put the loop device on top. On an error everything is undone.
    pub fn attach(spec: DeviceSpec, holder: Option<&HolderClient>) -> Result<Self, DeviceError> {
        check_handle(&spec.volume)?;
        if fuse_mount(&spec.directory)?.is_some() || !loop_devices(&spec.volume)?.is_empty() {
            return Err(DeviceError::Busy);
        }
        std::fs::create_dir_all(&spec.directory).map_err(DeviceError::at_io("create the mount's directory"))?;
        let (volume, directory) = (spec.volume.clone(), spec.directory.clone());
        Self::build(spec, holder).inspect_err(|_| {
            if let Err(error) = clear(&volume, &directory) {
                tracing::error!(volume, %error, "what was begun of a device could not be undone");
            }
            // If it never got there, or is another's, there is nothing to let go of.
            let _ = holder.map(|holder| holder.release(&volume));
        })
    }

    fn build(spec: DeviceSpec, holder: Option<&HolderClient>) -> Result<Self, DeviceError> {
        let channel = Channel::mount(&spec.directory, &spec.volume)?;
        let can_resend = serve::greet(&channel)?;
        let mount = fuse_mount(&spec.directory)?.ok_or(DeviceError::Gone)?;
        let state = HeldState {
            directory: spec.directory.clone(),
            connection: mount.device.1,
            loop_number: None,
            read_only: spec.target.read_only(),
            can_resend,
        };
        if let Some(holder) = holder {
            holder.put(&spec.volume, channel.fd(), state.encode())?;
        }
        Self::serve(spec, holder, channel, state)
    }

    /// Take the device over from the holder and go on. The process that served it is ended if it still lives.
    pub fn resume(spec: DeviceSpec, holder: &HolderClient) -> Result<Self, DeviceError> {
        check_handle(&spec.volume)?;
        let taken = holder.take(&spec.volume)?.ok_or(DeviceError::Gone)?;
        let state: HeldState = serde_json::from_slice(&taken.state).map_err(|_| DeviceError::Gone)?;
        let channel = Channel::from_fd(taken.fd);
        if !channel.is_connected() {
            return Err(DeviceError::Gone);
        }
        if !state.can_resend {
            return Err(DeviceError::CannotResume);
        }
        let wanted = spec.target.read_only();
        if state.read_only != wanted {
            return Err(DeviceError::WrongMode { found: state.read_only, wanted });
        }
        channel.ask_again()?;
        Self::serve(spec, Some(holder), channel, state)
    }

    fn serve(
        spec: DeviceSpec,
        holder: Option<&HolderClient>,
        channel: Channel,
        mut state: HeldState,
    ) -> Result<Self, DeviceError> {
        let target = Arc::new(Aligned::new(spec.target));
        let replies = Replies::new(channel, target, spec.on_superseded);
        let readers = serve::start(&replies, &spec.volume)?;
        // The state may lag one step behind: ask the kernel what there is.
        let loop_device = match loop_devices(&spec.volume)?.pop() {
            Some(device) => device,
            None => put_loop_device(&state.directory, &spec.volume, state.read_only)?,
        };
        if state.loop_number != Some(loop_device.number()) {
            state.loop_number = Some(loop_device.number());
            if let Some(holder) = holder {
                holder.update(&spec.volume, state.encode())?;
            }
        }
        Ok(Self {
            volume: spec.volume,
            directory: state.directory,
            connection: state.connection,
            loop_device,
            replies,
            readers: Mutex::new(readers),
            holder: holder.cloned(),
        })
    }

    fn release(&self) -> Result<(), DeviceError> {
        if let Some(holder) = &self.holder {
            holder.release(&self.volume)?;
        }
        Ok(())
    }

    fn join_readers(&self) {
        let readers = std::mem::take(&mut *self.readers.lock().expect("nothing panics under this lock"));
        for reader in readers {
            let _ = reader.join();
        }
    }
}

impl Device for FuseLoop {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fuse
    }

    fn path(&self) -> &Path {
        self.loop_device.path()
    }

    fn grow(&self) -> Result<u64, DeviceError> {
        // The kernel learns of the new size when it asks for the attributes, not before.
        let file = self.directory.join(&self.volume);
        rustix::fs::stat(&file).map_err(DeviceError::at("look at the FUSE file"))?;
        self.loop_device.set_capacity()?;
        Ok(self.replies.target().size())
    }

    fn set_read_only(&self, read_only: bool) -> Result<(), DeviceError> {
        // The kernel refuses write(2) and discards at once; what is written through a mapping is refused here.
        self.loop_device.set_read_only(read_only)?;
        self.replies.set_only_read(read_only);
        Ok(())
    }

    fn detach(&self) -> Result<(), DeviceError> {
        self.loop_device.detach(&self.volume)?;
        unmount(&self.directory, UnmountFlags::empty())?;
        self.join_readers();
        self.release()
    }

    fn force_detach(&self) -> Result<(), DeviceError> {
        abort(self.connection, &self.directory)?;
        self.join_readers();
        self.loop_device.detach_in_use(&self.volume)?;
        unmount(&self.directory, UnmountFlags::DETACH)?;
        self.release()
    }
}

/// Remove the mount and the loop device of a volume that nobody serves; their users get I/O errors.
pub(super) fn clear(volume: &str, directory: &Path) -> Result<(), DeviceError> {
    check_handle(volume)?;
    while let Some(mount) = fuse_mount(directory)? {
        abort(mount.device.1, directory)?;
        unmount(directory, UnmountFlags::DETACH)?;
    }
    for device in loop_devices(volume)? {
        device.detach_in_use(volume)?;
    }
    Ok(())
}

fn check_handle(volume: &str) -> Result<(), DeviceError> {
    let fine = !volume.is_empty() && volume.len() <= 255 && volume != "." && volume != "..";
    if fine && !volume.contains(['/', '\0', '\n']) { Ok(()) } else { Err(DeviceError::BadHandle) }
}

fn fuse_mount(directory: &Path) -> Result<Option<Mount>, DeviceError> {
    let mount = mounts::at(directory).map_err(DeviceError::at_io("list mounts"))?;
    Ok(mount.filter(|mount| mount.kind == MOUNT_KIND))
}

fn loop_devices(volume: &str) -> Result<Vec<LoopDevice>, DeviceError> {
    LoopDevice::over_file(volume).map_err(DeviceError::at_io("list loop devices"))
}

fn put_loop_device(directory: &Path, volume: &str, read_only: bool) -> Result<LoopDevice, DeviceError> {
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory.join(volume), flags, Mode::empty());
    let file = file.map_err(DeviceError::at("open the FUSE file"))?;
    LoopDevice::attach(std::os::fd::AsFd::as_fd(&file), read_only)
}

fn unmount(directory: &Path, flags: UnmountFlags) -> Result<(), DeviceError> {
    match rustix::mount::unmount(directory, flags) {
        // Nothing is mounted there (any more).
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(DeviceError::Busy),
        Err(errno) => Err(DeviceError::at("unmount the FUSE file")(errno)),
    }
}

/// Fail everything that waits in a FUSE connection, and all that comes.
///
/// The kernel's control file system is mounted for the moment beside `directory`: hosts rarely have it mounted.
fn abort(connection: u32, directory: &Path) -> Result<(), DeviceError> {
    let mut control = directory.as_os_str().to_owned();
    control.push(".abort");
    let control = PathBuf::from(control);
    std::fs::create_dir_all(&control).map_err(DeviceError::at_io("create a directory for fusectl"))?;
    let none: Option<&std::ffi::CStr> = None;
    let mounted = rustix::mount::mount("fusectl", &control, "fusectl", MountFlags::empty(), none);
    let written = mounted.map_err(DeviceError::at("mount fusectl")).and_then(|()| {
        match std::fs::write(control.join(connection.to_string()).join("abort"), "1") {
            // Unmounted meanwhile: nothing waits in it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            written => written.map_err(DeviceError::at_io("abort the FUSE connection")),
        }
    });
    let _ = unmount(&control, UnmountFlags::DETACH);
    let _ = std::fs::remove_dir(&control);
    written
}
