//! Loop devices of a node. The kernel keeps them machine-wide, so they outlive the processes and mount namespaces that used them.
//!
//! Invariant: a device is detached by its name, and only if its file was on a file system that the node mounted and the machine
//! did not, or lies on the node's disk.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroup;
use crate::host::{HostError, at, run};

/// An attached loop device: its path, and device and inode of its file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loop {
    /// `/dev/loopN`.
    pub path: String,
    device: String,
    inode: u64,
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
    let own: BTreeSet<&str> = devices_of(&own).collect();
    let mut theirs = BTreeSet::new();
    for pid in cgroup::pids(name) {
        let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        theirs.extend(devices_of(&table).filter(|device| !own.contains(device)).map(str::to_owned));
    }
    Ok(all.into_iter().filter(|device| theirs.contains(&device.device)).collect())
}

/// Devices whose file lies below `dir`.
///
/// # Errors
/// The devices cannot be listed.
pub fn on_files_below(dir: &Path) -> Result<BTreeSet<Loop>, HostError> {
    let mut all = attached()?;
    if all.is_empty() || !dir.exists() {
        return Ok(BTreeSet::new());
    }
    let mut files = BTreeSet::new();
    collect_files(dir, &mut files);
    all.retain(|device| files.contains(&(device.device.clone(), device.inode)));
    Ok(all.into_iter().collect())
}

/// Detaches these devices, each by its name.
///
/// # Errors
/// The kernel refuses; one that is gone already is no error.
pub fn detach(devices: &BTreeSet<Loop>) -> Result<(), HostError> {
    for device in devices {
        // Looked up again: it may have gone with its last user, and its name may have a new owner.
        if attached()?.contains(device) {
            run(&["losetup", "-d", &device.path])?;
        }
    }
    Ok(())
}

fn attached() -> Result<Vec<Loop>, HostError> {
    let text = run(&["losetup", "--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN,BACK-INO"])?;
    Ok(text.lines().filter_map(read_line).collect())
}

fn read_line(line: &str) -> Option<Loop> {
    let mut words = line.split_whitespace();
    let path = words.next()?.to_owned();
    let device = words.next()?.to_owned();
    let inode = words.next()?.parse().ok()?;
    Some(Loop { path, device, inode })
}

/// The third field of a mountinfo line: major:minor of the file system.
fn devices_of(mountinfo: &str) -> impl Iterator<Item = &str> {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(2))
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

    #[test]
    fn a_device_is_read_with_the_file_system_and_inode_of_its_file() {
        let device = read_line("/dev/loop3  0:51 2").unwrap();
        assert_eq!(device, Loop { path: "/dev/loop3".into(), device: "0:51".into(), inode: 2 });
        assert_eq!(read_line("/dev/loop3"), None);
    }

    #[test]
    fn a_mount_table_names_its_file_systems() {
        let table = "22 1 254:0 / / rw - ext4 /dev/vda rw\n40 22 0:51 / /mnt rw - fuse x rw\n";
        assert_eq!(devices_of(table).collect::<Vec<_>>(), ["254:0", "0:51"]);
    }
}
