//! What this node must still know of a volume after its process or the whole node has gone: one small file for each.
//!
//! ```text
//! (none) --stage--> Opening --device--> Attached --unstage--> Closed --stage, same session--> Opening
//! ```
//! Invariant: the file says `Attached` before the kernel can send the first request and until the last one is answered
//! and durable. So a file in any other state proves that no request of the kernel is unanswered, and the session may be
//! resumed with nothing to give back (PROTOCOL.md R10); `Attached` without a device that is held means that requests
//! may be lost: the session must be replaced. Files are replaced whole and are synced before their effect.

use lamina_csi_api::capability::Filesystem;
use lamina_csi_api::name::VolumeHandle;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const FILE: &str = "record.json";
const FORMAT: u32 = 1;

/// How far the attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// A driver may have been opened; the kernel has no device yet.
    Opening,
    /// The kernel has a device.
    Attached,
    /// The device is gone, everything it was asked is answered and durable.
    Closed,
}

/// What consumers see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The block device itself.
    Block,
    /// An ext4.
    Ext4,
    /// An xfs.
    Xfs,
}

impl Kind {
    /// Of a capability.
    pub fn of(filesystem: Option<Filesystem>) -> Self {
        match filesystem {
            None => Self::Block,
            Some(Filesystem::Ext4) => Self::Ext4,
            Some(Filesystem::Xfs) => Self::Xfs,
        }
    }

    /// The filesystem, if there is one.
    pub fn filesystem(self) -> Option<Filesystem> {
        match self {
            Self::Block => None,
            Self::Ext4 => Some(Filesystem::Ext4),
            Self::Xfs => Some(Filesystem::Xfs),
        }
    }
}

/// A place where a consumer has the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// As the kubelet named it.
    pub path: PathBuf,
    /// The consumer may only read.
    pub read_only: bool,
}

/// One volume on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// The session under which the driver works, 32 hexadecimal digits.
    session: String,
    /// The session that the attachment was made with, if the one above took its place (R10).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    published: Option<String>,
    /// How far it is.
    pub standing: Standing,
    /// What consumers see.
    pub kind: Kind,
    /// Where it is staged, once it is.
    pub staged: Option<PathBuf>,
    /// Where it is published.
    pub targets: Vec<Target>,
}

impl Record {
    /// A volume that is about to be opened under a session of the attachment that was published with this one.
    pub fn opening(session: u128, published: u128, kind: Kind) -> Self {
        let published = (published != session).then(|| format!("{published:032x}"));
        let session = format!("{session:032x}");
        Self {
            format: FORMAT,
            session,
            published,
            standing: Standing::Opening,
            kind,
            staged: None,
            targets: Vec::new(),
        }
    }

    /// The session.
    pub fn session(&self) -> u128 {
        u128::from_str_radix(&self.session, 16).unwrap_or_default()
    }

    /// Whether a consumer that was given this session means this attachment.
    pub fn is_of(&self, published: u128) -> bool {
        let first = self.published.as_deref().and_then(|text| u128::from_str_radix(text, 16).ok());
        self.session() == published || first == Some(published)
    }

    /// The target at this path.
    pub fn target(&self, path: &Path) -> Option<&Target> {
        self.targets.iter().find(|target| target.path == path)
    }
}

/// Why a record could not be read or written. The caller reports it; nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The disk.
    #[error("cannot {step} {}: {source}", path.display())]
    Disk {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Not what this program writes; a person has to look.
    #[error("{} is not a record of this program", path.display())]
    Unreadable {
        /// Where.
        path: PathBuf,
    },
}

/// The records of this node: `<root>/<volume handle>/record.json`.
#[derive(Clone, Debug)]
pub struct Records {
    root: PathBuf,
}

impl Records {
    /// Keep them below this directory, made if missing.
    ///
    /// # Errors
    /// [`RecordError::Disk`].
    pub fn open(root: &Path) -> Result<Self, RecordError> {
        std::fs::create_dir_all(root).map_err(disk("create", root))?;
        Ok(Self { root: root.to_owned() })
    }

    /// The directory of a volume's own device.
    pub fn device_directory(&self, volume: VolumeHandle) -> PathBuf {
        self.directory(volume).join("device")
    }

    fn directory(&self, volume: VolumeHandle) -> PathBuf {
        self.root.join(volume.to_string())
    }

    /// The volumes of which there is a record, each with what it says.
    ///
    /// # Errors
    /// [`RecordError::Disk`] if there is no telling which there are.
    #[allow(clippy::type_complexity)]
    pub fn all(&self) -> Result<Vec<(VolumeHandle, Result<Record, RecordError>)>, RecordError> {
        let entries = std::fs::read_dir(&self.root).map_err(disk("list", &self.root))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<VolumeHandle>().ok());
        Ok(names.filter_map(|volume| Some((volume, self.read(volume).transpose()?))).collect())
    }

    /// The record of a volume.
    ///
    /// # Errors
    /// Any [`RecordError`].
    pub fn read(&self, volume: VolumeHandle) -> Result<Option<Record>, RecordError> {
        let path = self.directory(volume).join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(disk("read", &path)(error)),
        };
        let record: Record =
            serde_json::from_slice(&text).map_err(|_| RecordError::Unreadable { path: path.clone() })?;
        if record.format != FORMAT || record.session() == 0 {
            return Err(RecordError::Unreadable { path });
        }
        Ok(Some(record))
    }

    /// Replace the record of a volume; it is durable afterwards.
    ///
    /// # Errors
    /// [`RecordError::Disk`].
    pub fn write(&self, volume: VolumeHandle, record: &Record) -> Result<(), RecordError> {
        let directory = self.directory(volume);
        std::fs::create_dir_all(&directory).map_err(disk("create", &directory))?;
        let text = serde_json::to_vec(record).expect("a structure of plain fields");
        let (path, new) = (directory.join(FILE), directory.join(".record.new"));
        let mut options = OpenOptions::new();
        let written = options.write(true).create(true).truncate(true).mode(0o600).open(&new).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.map_err(disk("write", &new))?;
        std::fs::rename(&new, &path).map_err(disk("replace", &path))?;
        File::open(&directory).and_then(|directory| directory.sync_all()).map_err(disk("sync", &directory))
    }

    /// Forget a volume. Fine if nothing is known of it.
    ///
    /// # Errors
    /// [`RecordError::Disk`].
    pub fn remove(&self, volume: VolumeHandle) -> Result<(), RecordError> {
        let directory = self.directory(volume);
        match std::fs::remove_file(directory.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk("remove", &directory)(error)),
            _ => {}
        }
        // Only if empty: a device may still be mounted there.
        let _ = std::fs::remove_dir(self.device_directory(volume));
        let _ = std::fs::remove_dir(directory);
        Ok(())
    }
}

fn disk(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Disk { step, path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn records() -> (tempfile::TempDir, Records) {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(&directory.path().join("volumes")).unwrap();
        (directory, records)
    }

    #[test]
    fn a_successor_reads_what_was_written_last() {
        let (_directory, records) = records();
        let volume = VolumeHandle::new(7);
        let mut record = Record::opening(0xabc, 0xdef, Kind::Xfs);
        assert!(record.is_of(0xabc) && record.is_of(0xdef) && !record.is_of(0));
        records.write(volume, &record).unwrap();
        record.standing = Standing::Attached;
        record.targets.push(Target { path: "/pods/x".into(), read_only: true });
        records.write(volume, &record).unwrap();
        let successor = Records::open(&records.root).unwrap();
        let all = successor.all().unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].0, all[0].1.as_ref().unwrap()), (volume, &record));
        assert_eq!(all[0].1.as_ref().unwrap().session(), 0xabc);
        successor.remove(volume).unwrap();
        successor.remove(volume).unwrap();
        assert!(successor.all().unwrap().is_empty());
        assert_eq!(records.read(volume).unwrap(), None);
    }

    #[test]
    fn a_torn_or_foreign_file_is_never_taken_for_no_record() {
        let (_directory, records) = records();
        let volume = VolumeHandle::new(7);
        records.write(volume, &Record::opening(1, 1, Kind::Block)).unwrap();
        let path = records.directory(volume).join(FILE);
        let whole = std::fs::read(&path).unwrap();
        for torn in [&whole[..whole.len() / 2], b"", b"{}"] {
            std::fs::write(&path, torn).unwrap();
            assert!(matches!(records.read(volume), Err(RecordError::Unreadable { .. })));
            assert!(records.all().unwrap()[0].1.is_err());
        }
    }
}
