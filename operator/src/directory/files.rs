//! The files of a [`Directory`](super::Directory): locked, read, and replaced whole.
//!
//! Assumed of the file system: a rename within a folder is atomic, and after the flush of the file and of its folder both
//! survive a power cut (POSIX with `fsync`). `flock` locks end with the process that holds them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kube::ResourceExt;
use lamina_crds::{ReplicationPolicy, StorageServer, Volume};
use lamina_protocol::ids::ClusterId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::index::Index;
use crate::store::{Change, StoreError};

/// A kind that is kept in files.
pub trait Stored: Serialize + DeserializeOwned + ResourceExt + Clone + PartialEq + Send + 'static {
    /// Its kind, as the API spells it.
    const KIND: &'static str;
    /// Its folder.
    const FOLDER: &'static str;
    /// As an index has it.
    fn known<'a>(index: &'a Index, name: &str) -> Option<&'a Self>;
    /// Puts it into an index.
    fn apply(index: &mut Index, object: Self) -> Vec<Change>;
    /// Takes it out.
    fn delete(index: &mut Index, name: &str) -> Vec<Change>;
}

impl Stored for Volume {
    const KIND: &'static str = "Volume";
    const FOLDER: &'static str = "volumes";
    fn known<'a>(index: &'a Index, name: &str) -> Option<&'a Self> {
        index.volume(name)
    }
    fn apply(index: &mut Index, object: Self) -> Vec<Change> {
        index.apply_volume(object)
    }
    fn delete(index: &mut Index, name: &str) -> Vec<Change> {
        index.delete_volume(name)
    }
}

impl Stored for StorageServer {
    const KIND: &'static str = "StorageServer";
    const FOLDER: &'static str = "servers";
    fn known<'a>(index: &'a Index, name: &str) -> Option<&'a Self> {
        index.server(name)
    }
    fn apply(index: &mut Index, object: Self) -> Vec<Change> {
        index.apply_server(object)
    }
    fn delete(index: &mut Index, name: &str) -> Vec<Change> {
        index.delete_server(name)
    }
}

impl Stored for ReplicationPolicy {
    const KIND: &'static str = "ReplicationPolicy";
    const FOLDER: &'static str = "policies";
    fn known<'a>(index: &'a Index, name: &str) -> Option<&'a Self> {
        index.policy(name)
    }
    fn apply(index: &mut Index, object: Self) -> Vec<Change> {
        index.apply_policy(object)
    }
    fn delete(index: &mut Index, name: &str) -> Vec<Change> {
        index.delete_policy(name)
    }
}

/// A folder with objects; may be cloned.
#[derive(Clone, Debug)]
pub struct Files {
    root: PathBuf,
}

/// The exclusive lock, or the sign of the serving operator; given back when dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

impl Files {
    /// Files below this folder, which is made when it is first locked.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Waits for the exclusive lock.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn lock(&self) -> Result<Lock, StoreError> {
        let (file, path) = self.open_lock(".lock")?;
        file.lock().map_err(|source| StoreError::File { path, source })?;
        Ok(Lock(file))
    }

    /// Takes the place of the one operator that serves; `None` if another process has it.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn serve(&self) -> Result<Option<Lock>, StoreError> {
        let (file, path) = self.open_lock(".serving")?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(source)) => Err(StoreError::File { path, source }),
        }
    }

    fn open_lock(&self, name: &str) -> Result<(File, PathBuf), StoreError> {
        let path = self.root.join(name);
        let open = || {
            fs::create_dir_all(&self.root)?;
            OpenOptions::new().create(true).truncate(false).write(true).open(&path)
        };
        let file = open().map_err(|source| StoreError::File { path: path.clone(), source })?;
        Ok((file, path))
    }

    fn path<K: Stored>(&self, name: &str) -> PathBuf {
        self.root.join(K::FOLDER).join(format!("{name}.yaml"))
    }

    /// One object.
    ///
    /// # Errors
    /// [`StoreError::File`], or [`StoreError::Yaml`] for what is no object.
    pub fn read<K: Stored>(&self, _lock: &Lock, name: &str) -> Result<Option<K>, StoreError> {
        read_yaml(&self.path::<K>(name))
    }

    /// All objects of a kind, by name.
    ///
    /// # Errors
    /// As [`Files::read`].
    pub fn all<K: Stored>(&self, _lock: &Lock) -> Result<Vec<K>, StoreError> {
        let folder = self.root.join(K::FOLDER);
        let failed = |source| StoreError::File { path: folder.clone(), source };
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
        paths.sort();
        let objects = paths.iter().map(|path| read_yaml::<K>(path)).collect::<Result<Vec<_>, _>>()?;
        Ok(objects.into_iter().flatten().collect())
    }

    /// Replaces an object's file, durably.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn write<K: Stored>(&self, _lock: &Lock, name: &str, object: &K) -> Result<(), StoreError> {
        let path = self.path::<K>(name);
        let text = serde_yaml::to_string(object).map_err(|source| StoreError::Yaml { path: path.clone(), source })?;
        replace(&path, text.as_bytes()).map_err(|source| StoreError::File { path, source })
    }

    /// Takes an object's file away, durably.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn remove<K: Stored>(&self, _lock: &Lock, name: &str) -> Result<(), StoreError> {
        let path = self.path::<K>(name);
        let removed = fs::remove_file(&path).and_then(|()| flush_folder(&path));
        removed.map_err(|source| StoreError::File { path, source })
    }

    /// Counts the Lease's number up, to more than `above`; gives the new one.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn count_lease_up(&self, above: u64) -> Result<u64, StoreError> {
        let _lock = self.lock()?;
        let path = self.root.join("lease");
        let step = || {
            let found = read_text(&path)?.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
            let next = found.max(above) + 1;
            replace(&path, format!("{next}\n").as_bytes()).map(|()| next)
        };
        step().map_err(|source| StoreError::File { path: path.clone(), source })
    }

    /// The cluster id; minted by `mint` when there is none yet.
    ///
    /// # Errors
    /// [`StoreError::File`], also for a file that holds no id.
    pub fn cluster(&self, mint: fn() -> u128) -> Result<ClusterId, StoreError> {
        let _lock = self.lock()?;
        let path = self.root.join("cluster");
        let find = || match read_text(&path)? {
            Some(text) => text.trim().parse().map_err(io::Error::other),
            None => {
                let id = ClusterId(mint());
                replace(&path, format!("{id}\n").as_bytes()).map(|()| id)
            }
        };
        find().map_err(|source| StoreError::File { path: path.clone(), source })
    }
}

fn read_text(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn read_yaml<K: Stored>(path: &Path) -> Result<Option<K>, StoreError> {
    let text = read_text(path).map_err(|source| StoreError::File { path: path.to_owned(), source })?;
    let parse = |text: String| serde_yaml::from_str(&text);
    text.map(parse).transpose().map_err(|source| StoreError::Yaml { path: path.to_owned(), source })
}

/// Written aside, flushed, renamed, the folder flushed: the file is old or new, whatever happens in between.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let aside = path.with_extension("part");
    let mut file = File::create(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    flush_folder(path)
}

fn flush_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}
