//! Mounts as the kernel lists them, and whether anybody still serves them.
//!
//! Nothing here may hang on a mount whose server is gone: the list comes from `/proc/self/mountinfo`, which asks no
//! server, and the one question that does go to the server is asked from a thread that nobody waits for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// The file system's type, such as `ext4`.
    pub kind: String,
    /// What is mounted, such as `/dev/loop7`.
    pub source: String,
    /// Major and minor number of the file system's device. For FUSE the minor number names the connection.
    pub device: (u32, u32),
}

/// Whether a mounted file system answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountState {
    /// Nothing is mounted there.
    Absent,
    /// Its server answers.
    Live,
    /// Its server is gone for good; every access fails.
    Dead,
    /// No answer in time: the server hangs, or its successor has not come yet.
    Stalled,
}

/// All mounts that this process sees, in order; of several on one point the last is on top.
pub fn list() -> io::Result<Vec<Mount>> {
    Ok(std::fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse).collect())
}

/// What is mounted on `point`, if anything: the topmost.
pub fn at(point: &Path) -> io::Result<Option<Mount>> {
    let point = as_listed(point);
    Ok(list()?.into_iter().rfind(|mount| mount.point == point))
}

/// The kernel lists mounts by their real paths. The last part is left as it is: to look at it may hang.
fn as_listed(point: &Path) -> PathBuf {
    let real = point.parent().and_then(|parent| parent.canonicalize().ok());
    real.zip(point.file_name()).map_or_else(|| point.to_owned(), |(parent, name)| parent.join(name))
}

/// Ask the server of what is mounted on `point`, and wait for its answer at most `patience`. A stalled server costs a
/// thread until it answers or is aborted.
pub fn probe(point: &Path, patience: Duration) -> io::Result<MountState> {
    if at(point)?.is_none() {
        return Ok(MountState::Absent);
    }
    let (answer, answered) = mpsc::sync_channel(1);
    let point = point.to_owned();
    std::thread::Builder::new().name("mount-probe".into()).spawn(move || {
        let _ = answer.send(rustix::fs::stat(&point).map(drop));
    })?;
    Ok(match answered.recv_timeout(patience) {
        Ok(Ok(())) => MountState::Live,
        Ok(Err(_)) => MountState::Dead,
        Err(_) => MountState::Stalled,
    })
}

/// `36 35 98:0 /root /point options optional* - kind source options`
fn parse(line: &str) -> Option<Mount> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    let (major, minor) = head.next()?.split_once(':')?;
    let point = unescape(head.nth(1)?);
    let mut tail = tail.split(' ');
    Some(Mount {
        point: PathBuf::from(point),
        kind: tail.next()?.to_owned(),
        source: unescape(tail.next()?),
        device: (major.parse().ok()?, minor.parse().ok()?),
    })
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(word: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(word.to_owned(), |word, (code, plain)| word.replace(code, plain))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_understood() {
        let line = r"36 35 0:47 / /a\040b rw,noatime shared:1 master:2 - fuse.lamina lamina rw,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new("/a b"));
        assert_eq!((mount.kind.as_str(), mount.source.as_str(), mount.device), ("fuse.lamina", "lamina", (0, 47)));
        assert_eq!(parse("garbage"), None);
    }

    #[test]
    fn a_mount_is_found_by_a_path_with_a_symbolic_link() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("root")).unwrap();
        assert_eq!(at(&directory.path().join("root/proc")).unwrap().unwrap().kind, "proc");
        assert_eq!(at(&directory.path().join("none")).unwrap(), None);
    }

    #[test]
    fn the_proc_mount_is_live_and_a_plain_directory_is_absent() {
        let patience = Duration::from_secs(5);
        assert_eq!(probe(Path::new("/proc"), patience).unwrap(), MountState::Live);
        assert_eq!(probe(Path::new("/proc/self"), patience).unwrap(), MountState::Absent);
    }
}
