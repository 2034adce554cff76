//! Blocking access to a device: for probing, formatting, recovery and inspection, and under the power-cut test.
//!
//! Invariant: every address and length is a multiple of 4096, every buffer is aligned, so O_DIRECT takes them. Once a
//! store runs, its ring does the same operations without blocking (ring.rs).

use crate::store::DeviceError;
use crate::store::aligned::AlignedBuf;
use crate::store::geometry::BLOCK;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A device as the store sees it before its ring runs.
pub(crate) trait Disk {
    /// Fills the buffer from this byte on.
    fn read(&self, at: u64, buf: &mut AlignedBuf) -> io::Result<()>;
    /// Writes whole blocks.
    fn write(&self, at: u64, data: &[u8]) -> io::Result<()>;
    /// Everything written before is durable when this returns.
    fn sync(&self) -> io::Result<()>;
    /// Bytes in all.
    fn bytes(&self) -> io::Result<u64>;

    /// Reads into a new buffer.
    fn read_new(&self, at: u64, len: usize) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(len);
        self.read(at, &mut buf).map(|()| buf)
    }
}

/// A file or a block device, held alone.
#[derive(Debug)]
pub(crate) struct FileDisk {
    pub(crate) fd: OwnedFd,
    pub(crate) is_block: bool,
}

/// How to open a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Alone, for writing.
    Exclusive,
    /// For reading, beside others who read.
    Inspect,
}

impl FileDisk {
    /// Opens and takes hold: O_EXCL for a block device, a lock for a file.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, DeviceError> {
        let kind = rustix::fs::stat(path).map_err(|e| DeviceError::io("look at the device", e))?;
        let is_block = match FileType::from_raw_mode(kind.st_mode) {
            FileType::BlockDevice => true,
            FileType::RegularFile => false,
            _ => return Err(DeviceError::NotADevice),
        };
        let mut flags = OFlags::CLOEXEC;
        flags |= if access == Access::Exclusive { OFlags::RDWR } else { OFlags::RDONLY };
        if is_block && access == Access::Exclusive {
            flags |= OFlags::EXCL;
        }
        let (fd, direct) = match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
            Err(rustix::io::Errno::INVAL) => (rustix::fs::open(path, flags, Mode::empty()), false),
            opened => (opened, true),
        };
        let fd = fd.map_err(|e| match e {
            rustix::io::Errno::BUSY => DeviceError::Busy,
            e => DeviceError::io("open the device", e),
        })?;
        let lock = match access {
            Access::Exclusive => FlockOperation::NonBlockingLockExclusive,
            Access::Inspect => FlockOperation::NonBlockingLockShared,
        };
        match rustix::fs::flock(&fd, lock) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DeviceError::Busy),
            Err(e) => return Err(DeviceError::io("lock the device", e)),
            Ok(()) => {}
        }
        if !direct {
            tracing::warn!("the filesystem below has no O_DIRECT; the device goes through its cache");
        }
        Ok(Self { fd, is_block })
    }

    /// Makes a file of this size, or grows it; the space is there afterwards. If there is none, nothing is taken of it.
    pub(crate) fn allocate(path: &Path, bytes: u64) -> Result<(), DeviceError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
        let fd = fd.map_err(|e| DeviceError::io("create the file", e))?;
        let is_new = rustix::fs::fstat(&fd).is_ok_and(|file| file.st_size == 0);
        let allocated = Self::has_room(&fd, bytes)
            .and_then(|()| rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, bytes));
        if let Err(e) = allocated {
            if is_new {
                // An empty file would be too small for ever; without it the next try makes one.
                let _ = std::fs::remove_file(path);
            }
            return Err(DeviceError::io("allocate the file", e));
        }
        rustix::fs::fsync(&fd).map_err(|e| DeviceError::io("sync the file", e))
    }
}

impl FileDisk {
    /// Looked at first, for a filesystem may hand out all it has before it says that it is not enough.
    fn has_room(fd: &OwnedFd, bytes: u64) -> rustix::io::Result<()> {
        let (file, below) = (rustix::fs::fstat(fd)?, rustix::fs::fstatvfs(fd)?);
        let missing = bytes.saturating_sub(file.st_blocks as u64 * 512);
        if missing > below.f_bavail.saturating_mul(below.f_frsize) { Err(rustix::io::Errno::NOSPC) } else { Ok(()) }
    }
}

impl Disk for FileDisk {
    fn read(&self, at: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&self.fd, &mut buf[done..], at + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        debug_assert!((data.len() as u64).is_multiple_of(BLOCK));
        let mut done = 0;
        while done < data.len() {
            done += rustix::io::pwrite(&self.fd, &data[done..], at + done as u64)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))?)
    }
}

/// Whether the device keeps 4 KiB whole by what its kernel queue announces (R11). Files never do.
pub(crate) fn announces_atomic_4k(disk: &FileDisk) -> bool {
    let Ok(stat) = rustix::fs::fstat(&disk.fd) else { return false };
    if !disk.is_block {
        return false;
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let number = |name: &str| -> u64 {
        let of = |dir: &str| std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{dir}queue/{name}"));
        let text = of("").or_else(|_| of("../")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let whole = number("physical_block_size") >= BLOCK || number("atomic_write_unit_max_bytes") >= BLOCK;
    number("logical_block_size") == BLOCK && whole || number("atomic_write_unit_max_bytes") >= BLOCK
}
