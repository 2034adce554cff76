//! The machine itself: mount(2), FUSE and loop devices, the device holder.
//!
//! Mounts are made by system calls, not by mount(8), whose namesake in busybox knows fewer options. Nothing here is
//! forced: what is in use stays, unless the caller asks to unmount lazily.

use super::{Host, HostError, Usage, programs};
use crate::device::mounts::{self, Mount};
use crate::device::{self, Device, DeviceError, DeviceKind, DeviceSpec};
use crate::holder::HolderClient;
use lamina_csi_api::capability::Filesystem;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A device's readers take requests in turn: after this many of their answers, those that came before are handed on.
const BARRIER_QUESTIONS: usize = 16;

/// A file's name may have 255 bytes: a volume's handle, a dot, and this many of the node's name.
const NODE_NAME_BYTES: usize = 200;

/// This machine.
pub struct LinuxHost {
    kind: DeviceKind,
    node: String,
    holder: Option<PathBuf>,
    connection: Mutex<Option<HolderClient>>,
}

impl LinuxHost {
    /// Devices of this kind for this node, kept by the holder that listens at this path, if any.
    pub fn new(kind: DeviceKind, holder: Option<PathBuf>, node: &str) -> Self {
        // Node names are ASCII; of an over-long one the end differs.
        let node = node.get(node.len().saturating_sub(NODE_NAME_BYTES)..).unwrap_or(node).to_owned();
        Self { kind, node, holder, connection: Mutex::new(None) }
    }

    /// What a volume's device is called. Loop devices belong to the kernel, and where several nodes share one (kind, a
    /// test), the device that a dead node left must be neither taken for this node's nor taken away by it.
    fn named(&self, volume: &str) -> String {
        format!("{volume}.{}", self.node)
    }

    /// One connection for the life of this process: its end is what frees the devices for a successor.
    fn holder(&self) -> Result<Option<HolderClient>, DeviceError> {
        let Some(path) = &self.holder else { return Ok(None) };
        let mut connection = self.connection.lock().expect("nothing panics under this lock");
        if connection.is_none() {
            *connection = Some(HolderClient::connect(path)?);
        }
        Ok(connection.clone())
    }
}

impl Host for LinuxHost {
    fn attach(&self, spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError> {
        let spec = DeviceSpec { volume: self.named(&spec.volume), ..spec };
        device::attach(self.kind, spec, self.holder()?.as_ref())
    }

    fn held(&self) -> Result<Vec<String>, DeviceError> {
        let all = self.holder()?.map(|holder| holder.list()).transpose()?.unwrap_or_default();
        let own = format!(".{}", self.node);
        Ok(all.iter().filter_map(|name| name.strip_suffix(&own)).map(str::to_owned).collect())
    }

    fn resume(&self, spec: DeviceSpec) -> Result<Box<dyn Device>, DeviceError> {
        let holder = self.holder()?.ok_or(DeviceError::Gone)?;
        let spec = DeviceSpec { volume: self.named(&spec.volume), ..spec };
        let directory = spec.directory.clone();
        let device = device::resume(self.kind, spec, &holder)?;
        // The kernel queues what it gives back before anything that is asked now.
        for _ in 0..BARRIER_QUESTIONS {
            if let Err(error) = rustix::fs::stat(&directory) {
                let directory = directory.display();
                tracing::warn!(%error, %directory, "a device that was taken over does not answer");
            }
        }
        Ok(device)
    }

    fn clear(&self, volume: &str, directory: &Path) -> Result<(), DeviceError> {
        device::clear(&self.named(volume), directory, self.holder()?.as_ref())
    }

    fn mount_at(&self, path: &Path) -> Result<Option<Mount>, HostError> {
        mounts::at(path).map_err(HostError::at("look for a mount at", path))
    }

    fn mount(
        &self,
        device: &Path,
        path: &Path,
        filesystem: Filesystem,
        flags: &[String],
        read_only: bool,
    ) -> Result<(), HostError> {
        fs::create_dir_all(path).map_err(HostError::at("create", path))?;
        let (mut mount_flags, data) = split_flags(flags);
        mount_flags.set(MountFlags::RDONLY, read_only || mount_flags.contains(MountFlags::RDONLY));
        let data = CString::new(data).expect("flags have no control characters");
        rustix::mount::mount(device, path, filesystem.as_str(), mount_flags, data.as_c_str())
            .map_err(HostError::at("mount the filesystem at", path))
    }

    fn bind(&self, source: &Path, target: &Path, read_only: bool) -> Result<(), HostError> {
        let seen = fs::metadata(source).map_err(HostError::at("look at", source))?;
        let made = if seen.is_dir() { fs::create_dir_all(target) } else { make_file(target) };
        made.map_err(HostError::at("create", target))?;
        rustix::mount::mount_bind(source, target).map_err(HostError::at("bind to", target))?;
        if read_only {
            let flags = MountFlags::BIND | MountFlags::RDONLY | kept_flags(source)?;
            if let Err(error) = rustix::mount::mount_remount(target, flags, "") {
                let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
                return Err(HostError::at("make read-only", target)(error));
            }
        }
        Ok(())
    }

    fn unmount(&self, path: &Path, lazily: bool) -> Result<(), HostError> {
        let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        while self.mount_at(path)?.is_some() {
            match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(HostError::at("unmount", path)(error)),
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<(), HostError> {
        let removed = match fs::symlink_metadata(path) {
            Err(error) => Err(error),
            Ok(seen) if seen.is_dir() => fs::remove_dir(path),
            Ok(_) => fs::remove_file(path),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HostError::at("remove", path)(error)),
            _ => Ok(()),
        }
    }

    fn signature(&self, device: &Path) -> Result<Option<String>, HostError> {
        programs::signature(device)
    }

    fn format(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        programs::format(device, filesystem)
    }

    fn check(&self, device: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        let size = size_of(device).map_err(HostError::at("ask the size of", device))?;
        programs::check(device, filesystem, size)
    }

    fn grow(&self, device: &Path, mounted: &Path, filesystem: Filesystem) -> Result<(), HostError> {
        programs::grow(device, mounted, filesystem)
    }

    fn usage(&self, path: &Path) -> Result<Usage, HostError> {
        let seen = rustix::fs::statvfs(path).map_err(HostError::at("ask the usage of", path))?;
        let bytes = |blocks: u64| blocks.saturating_mul(seen.f_frsize);
        Ok(Usage {
            bytes: bytes(seen.f_blocks),
            bytes_free: bytes(seen.f_bavail),
            bytes_used: bytes(seen.f_blocks.saturating_sub(seen.f_bfree)),
            files: seen.f_files,
            files_free: seen.f_ffree,
        })
    }
}

fn size_of(device: &Path) -> io::Result<u64> {
    File::open(device)?.seek(SeekFrom::End(0))
}

fn make_file(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    File::options().create(true).append(true).open(path).map(drop)
}

/// A bind that is made read-only must keep the flags of what it shows, or the kernel refuses.
fn kept_flags(source: &Path) -> Result<MountFlags, HostError> {
    if fs::metadata(source).is_ok_and(|seen| seen.file_type().is_block_device()) {
        return Ok(MountFlags::empty());
    }
    let seen = rustix::fs::statvfs(source).map_err(HostError::at("ask the flags of", source))?;
    // statvfs numbers these as mount(2) does.
    let kept =
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME | MountFlags::NODIRATIME;
    Ok(MountFlags::from_bits_truncate(seen.f_flag.bits() as u32) & kept)
}

/// mount(2) takes some options as bits and the filesystem gets the rest as text.
fn split_flags(flags: &[String]) -> (MountFlags, String) {
    let (mut bits, mut text) = (MountFlags::empty(), Vec::new());
    for option in flags.iter().flat_map(|flag| flag.split(',')) {
        match option {
            "ro" => bits |= MountFlags::RDONLY,
            "noatime" => bits |= MountFlags::NOATIME,
            "nodiratime" => bits |= MountFlags::NODIRATIME,
            "relatime" => bits |= MountFlags::RELATIME,
            "strictatime" => bits |= MountFlags::STRICTATIME,
            "lazytime" => bits |= MountFlags::LAZYTIME,
            "nosuid" => bits |= MountFlags::NOSUID,
            "nodev" => bits |= MountFlags::NODEV,
            "noexec" => bits |= MountFlags::NOEXEC,
            "sync" => bits |= MountFlags::SYNCHRONOUS,
            "dirsync" => bits |= MountFlags::DIRSYNC,
            // What the kernel does anyway, or what only mount(8) knows.
            "rw" | "defaults" | "suid" | "dev" | "exec" | "async" | "atime" | "diratime" | "auto" | "noauto" | ""
            | "_netdev" => {}
            other => text.push(other),
        }
    }
    (bits, text.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_nodes_of_one_kernel_give_a_volumes_devices_two_names() {
        let name = |node: &str| LinuxHost::new(DeviceKind::Auto, None, node).named("0a");
        assert_eq!(name("n1"), "0a.n1");
        let long = "x".repeat(252);
        assert_ne!(name(&(long.clone() + "1")), name(&(long.clone() + "2")));
        let handle = "f".repeat(32);
        assert!(LinuxHost::new(DeviceKind::Auto, None, &long).named(&handle).len() <= 255);
    }

    #[test]
    fn options_of_the_kernel_become_bits_and_the_filesystems_own_stay_text() {
        let flags = ["noatime,discard", "rw", "data=ordered", "ro"].map(str::to_owned);
        let (bits, text) = split_flags(&flags);
        assert_eq!(bits, MountFlags::NOATIME | MountFlags::RDONLY);
        assert_eq!(text, "discard,data=ordered");
    }
}
