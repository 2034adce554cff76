//! Loop devices of a node. The kernel keeps them machine-wide, so they outlive the processes and mount namespaces that used them.
//!
//! Invariants:
//! - A device is detached by its name, and only if its file was on a file system that the node mounted and the machine did not,
//!   or lies on the node's disk, or under a mount point that is on the node's disk and nowhere on the machine.
//! - Nothing here waits for whoever serves such a file: a FUSE server that was killed or stopped answers nothing, and its
//!   device has to go all the same. What sysfs says asks no server; where a server is asked, it is given 2 s.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cgroup;
use crate::host::{HostError, at, run, wait_until};

/// How long a device may take to go when its last user, such as a dying mount namespace, lets go of it.
const GONE: Duration = Duration::from_secs(10);

/// An attached loop device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loop {
    /// `/dev/loopN`.
    pub path: PathBuf,
    /// Its file, as the namespace that attached it saw it.
    pub file: PathBuf,
    /// Device (major:minor) and inode of the file; `None` if whoever serves it answers no more.
    identity: Option<(String, u64)>,
}

/// A mounted file system: its device and where it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Mounted {
    device: String,
    point: PathBuf,
}

/// Devices whose file is on a file system mounted by the processes of a cgroup and not by this process.
///
/// # Errors
/// The devices or mounts cannot be listed.
pub fn of_cgroup(name: &str) -> Result<BTreeSet<Loop>, HostError> {
    let all = attached()?;
    if all.is_empty() {
        return Ok(BTreeSet::new());
    }
    let own = at(Path::new("/proc/self/mountinfo"), std::fs::read_to_string("/proc/self/mountinfo"))?;
    let own: BTreeSet<String> = mounted(&own).map(|mount| mount.device).collect();
    let mut theirs = BTreeSet::new();
    for pid in cgroup::pids(name) {
        let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        theirs.extend(mounted(&table).filter(|mount| !own.contains(&mount.device)));
    }
    Ok(all.into_iter().filter(|device| device.is_on(&theirs)).collect())
}

/// Devices whose file lies on a node's disk (`dir`), or did while its server lived: the node mounts `<dir>/lib` as `/var/lib`
/// and `<dir>/log` as `/var/log`.
///
/// # Errors
/// The devices cannot be listed.
pub fn on_disk(dir: &Path) -> Result<BTreeSet<Loop>, HostError> {
    let mut all = attached()?;
    if all.is_empty() || !dir.exists() {
        return Ok(BTreeSet::new());
    }
    let mut files = BTreeSet::new();
    collect_files(dir, &mut files);
    all.retain(|device| match &device.identity {
        Some(identity) => files.contains(identity),
        None => is_mount_point_of(dir, &device.file),
    });
    Ok(all.into_iter().collect())
}

/// Detaches these devices, each by its name, and waits until they are gone.
///
/// # Errors
/// The kernel refuses, or somebody uses a device still; one that is gone already is no error.
pub fn detach(devices: &BTreeSet<Loop>) -> Result<(), HostError> {
    for device in devices {
        // Looked up again: it may have gone with its last user, and its name may have a new owner.
        if device.is_there() {
            run(&["losetup", "-d", &device.path.display().to_string()])?;
        }
    }
    for device in devices {
        wait_until(&format!("{} over {} to go", device.path.display(), device.file.display()), GONE, || {
            Ok::<_, HostError>(!device.is_there())
        })?;
    }
    Ok(())
}

impl Loop {
    /// Whether its file is on one of these. Its path alone decides where its server answers no more.
    fn is_on(&self, mounts: &BTreeSet<Mounted>) -> bool {
        match &self.identity {
            Some((device, _)) => mounts.iter().any(|mount| mount.device == *device),
            None => mounts.iter().any(|mount| self.file.starts_with(&mount.point) && mount.point != Path::new("/")),
        }
    }

    /// Whether the device is still over this file. Only the name counts: the path before it changes when the mount goes.
    fn is_there(&self) -> bool {
        backing_file(&self.path).is_some_and(|file| file.file_name() == self.file.file_name())
    }
}

fn attached() -> Result<Vec<Loop>, HostError> {
    let block = Path::new("/sys/block");
    let mut found = Vec::new();
    for entry in at(block, std::fs::read_dir(block))?.flatten() {
        let path = Path::new("/dev").join(entry.file_name());
        if let Some(file) = backing_file(&path) {
            found.push(Loop { identity: identity(&path), path, file });
        }
    }
    Ok(found)
}

/// As sysfs tells it; `None` if the device is free.
fn backing_file(device: &Path) -> Option<PathBuf> {
    let name = device.file_name()?;
    let text = std::fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file")).ok()?;
    let text = text.trim_end_matches('\n');
    // After a lost mount the kernel appends a remark to the path.
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}

/// The kernel asks the file's server for this.
fn identity(device: &Path) -> Option<(String, u64)> {
    let device = device.display().to_string();
    let argv = ["timeout", "-s", "KILL", "2", "losetup", "--list", "--noheadings", "--output", "BACK-MAJ:MIN,BACK-INO"];
    read_identity(&run(&[argv.as_slice(), &[&device]].concat()).ok()?)
}

fn read_identity(line: &str) -> Option<(String, u64)> {
    let mut words = line.split_whitespace();
    Some((words.next().filter(|word| word.contains(':'))?.to_owned(), words.next()?.parse().ok()?))
}

/// Whether a file that a node saw below `/var` was on a mount point that is a folder of its disk and not one of the machine.
fn is_mount_point_of(disk: &Path, file: &Path) -> bool {
    let Some(folder) = file.parent() else { return false };
    folder.strip_prefix("/var").is_ok_and(|below| disk.join(below).is_dir()) && !folder.exists()
}

/// Lines of mountinfo: `36 35 98:0 /root /point options …`, with the octal escapes of blanks.
fn mounted(mountinfo: &str) -> impl Iterator<Item = Mounted> {
    mountinfo.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(2);
        let (device, point) = (words.next()?.to_owned(), words.nth(1)?);
        Some(Mounted { device, point: PathBuf::from(point.replace("\\040", " ")) })
    })
}

fn collect_files(dir: &Path, into: &mut BTreeSet<(String, u64)>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            // Image layers are many files and hold no volumes.
            if entry.file_name() != "containerd" {
                collect_files(&entry.path(), into);
            }
        } else if meta.is_file() {
            let device = format!("{}:{}", rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
            into.insert((device, meta.ino()));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn device(identity: Option<(&str, u64)>) -> Loop {
        let file = "/var/lib/kubelet/plugins/p/0a/device/0a".into();
        Loop { path: "/dev/loop3".into(), file, identity: identity.map(|(device, inode)| (device.to_owned(), inode)) }
    }

    #[test]
    fn a_file_is_known_by_its_file_system_and_inode_or_its_server_answers_nothing() {
        assert_eq!(read_identity("  0:51 2\n"), Some(("0:51".to_owned(), 2)));
        assert_eq!(read_identity("\n"), None);
        assert_eq!(read_identity("2\n"), None);
    }

    #[test]
    fn a_device_belongs_to_the_mount_of_its_file_also_when_the_server_is_dead() {
        let table =
            "22 1 254:0 / / rw - ext4 /dev/vda rw\n40 22 0:51 / /var/lib/kubelet/plugins/p/0a/device rw - fuse x rw\n";
        let all: BTreeSet<Mounted> = mounted(table).collect();
        assert_eq!(all.len(), 2);
        let other: BTreeSet<Mounted> = mounted("22 1 254:0 / / rw - ext4 /dev/vda rw\n").collect();
        for (found, on) in [(device(Some(("0:51", 2))), true), (device(Some(("0:52", 2))), false), (device(None), true)]
        {
            assert_eq!(found.is_on(&all), on, "{found:?}");
        }
        assert!(!device(None).is_on(&other), "the root of the machine proves nothing");
    }

    #[test]
    fn a_dead_device_belongs_to_the_disk_that_has_its_mount_point() {
        let disk = tempfile::tempdir().unwrap();
        assert!(!is_mount_point_of(disk.path(), &device(None).file));
        std::fs::create_dir_all(disk.path().join("lib/kubelet/plugins/p/0a/device")).unwrap();
        assert!(is_mount_point_of(disk.path(), &device(None).file));
        std::fs::create_dir_all(disk.path().join("lib/misc")).unwrap();
        assert!(!is_mount_point_of(disk.path(), Path::new("/var/lib/misc/x")), "a folder that the machine has too");
    }
}
