//! FUSE connections of a node whose servers were killed.
//!
//! A file system that lies, through a loop device, on a file of FUSE is unmounted by the last process of the mount namespace.
//! If that is the dying FUSE server itself, the kernel unmounts before it closes the server's descriptor: the unmount waits for
//! writes that nobody will ever answer, and the process never ends. So the connections are aborted, which a power cut does too.
//!
//! Invariant: only connections that the node mounted and the machine did not are aborted, and only once their servers are killed.

use std::collections::BTreeSet;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::cgroup;
use crate::host::{HostError, at};

/// The connections (the kernel's numbers) that the processes of a cgroup have mounted and this process has not.
///
/// # Errors
/// The mounts of this process cannot be read.
pub fn of_cgroup(name: &str) -> Result<BTreeSet<u32>, HostError> {
    let table = Path::new("/proc/self/mountinfo");
    let own: BTreeSet<u32> = connections(&at(table, std::fs::read_to_string(table))?).collect();
    let mut theirs = BTreeSet::new();
    for pid in cgroup::pids(name) {
        let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        theirs.extend(connections(&table).filter(|number| !own.contains(number)));
    }
    Ok(theirs)
}

/// Fails what waits in these connections. The kernel's control file system is mounted at `folder` for the moment.
///
/// # Errors
/// It cannot be mounted, or the kernel refuses; a connection that is gone already is no error.
pub fn abort(connections: &BTreeSet<u32>, folder: &Path) -> Result<(), HostError> {
    if connections.is_empty() {
        return Ok(());
    }
    at(folder, std::fs::create_dir_all(folder))?;
    let none: Option<&std::ffi::CStr> = None;
    at(folder, mount("fusectl", folder, "fusectl", MountFlags::empty(), none).map_err(Into::into))?;
    let mut done = Ok(());
    for number in connections {
        let file = folder.join(number.to_string()).join("abort");
        if file.exists()
            && let Err(source) = std::fs::write(&file, "1")
            && file.exists()
        {
            done = Err(HostError::File { path: file, source });
        }
    }
    at(folder, unmount(folder, UnmountFlags::DETACH).map_err(Into::into))?;
    at(folder, std::fs::remove_dir(folder))?;
    done
}

/// The minor numbers of mounted FUSE file systems: `40 22 0:51 / /mnt rw - fuse.lamina x rw`.
fn connections(mountinfo: &str) -> impl Iterator<Item = u32> {
    mountinfo.lines().filter_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let kind = tail.split(' ').next()?;
        let is_fuse = kind == "fuse" || kind == "fuseblk" || kind.starts_with("fuse.");
        let (_, minor) = head.split(' ').nth(2)?.split_once(':')?;
        is_fuse.then(|| minor.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_fuse_are_connections() {
        let table = "22 1 254:0 / / rw - ext4 /dev/vda rw\n40 22 0:51 / /mnt rw shared:3 - fuse.lamina x rw\n\
                     41 22 0:52 / /sys/fs/fuse/connections rw - fusectl fusectl rw\n42 22 0:53 / /y rw - fuse z rw\n";
        assert_eq!(connections(table).collect::<Vec<_>>(), [51, 53]);
    }
}
