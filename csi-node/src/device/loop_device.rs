//! Loop devices over a file that this project serves.
//!
//! Invariant: a loop device is changed only when its backing file's name is the volume's handle, as sysfs tells it.
//! Neither that nor anything else here asks the backing file's server, but for [`LoopDevice::attach`] and
//! [`LoopDevice::set_capacity`], so a device whose server hangs can be removed. Numbers and structures:
//! `linux/loop.h`.

use super::DeviceError;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};
use std::ffi::c_void;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const CLR_FD: Opcode = 0x4C01;
const SET_CAPACITY: Opcode = 0x4C07;
const CONFIGURE: Opcode = 0x4C0A;
const CTL_GET_FREE: Opcode = 0x4C82;
/// `BLKROSET` of `linux/fs.h`.
const SET_READ_ONLY: Opcode = 0x125D;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_DIRECT_IO: u32 = 16;

/// Others look for a free device at the same time: this often at most, a device that was free is not any more.
const ATTEMPTS: usize = 64;
/// How long a device may take to go after its last user closed it (the kernel's own, or udev).
const DETACH_PATIENCE: Duration = Duration::from_secs(5);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Status {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Config {
    fd: u32,
    block_size: u32,
    status: Status,
    reserved: [u64; 8],
}

/// `LOOP_CTL_GET_FREE`: the number is the ioctl's result.
struct GetFree;

// SAFETY: the request takes no argument, writes no memory, and answers with a number.
unsafe impl Ioctl for GetFree {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        u32::try_from(output).map_err(|_| Errno::INVAL)
    }
}

/// A loop device by its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoopDevice {
    number: u32,
    path: PathBuf,
}

impl LoopDevice {
    pub(super) fn from_number(number: u32) -> Self {
        Self { number, path: format!("/dev/loop{number}").into() }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The loop devices whose backing file is called `name`.
    pub(super) fn over_file(name: &str) -> std::io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/sys/block")? {
            let entry = entry?.file_name();
            let number = entry.to_str().and_then(|entry| entry.strip_prefix("loop")?.parse().ok());
            found.extend(number.map(Self::from_number).filter(|device| device.is_over(name)));
        }
        Ok(found)
    }

    /// A new loop device over `file`, with direct I/O and blocks of 4096 bytes.
    pub(super) fn attach(file: BorrowedFd<'_>, read_only: bool) -> Result<Self, DeviceError> {
        let control =
            open(Path::new("/dev/loop-control"), OFlags::RDWR).map_err(DeviceError::at("open loop-control"))?;
        for _ in 0..ATTEMPTS {
            // SAFETY: `GetFree` describes the request as `linux/loop.h` does.
            let number = unsafe { ioctl(&control, GetFree) }.map_err(DeviceError::at("find a free loop device"))?;
            let device = Self::from_number(number);
            match device.configure(file, read_only) {
                Ok(()) => return device.checked(read_only),
                Err(Errno::BUSY) => {}
                Err(errno) => return Err(DeviceError::at("configure the loop device")(errno)),
            }
        }
        Err(DeviceError::at("configure the loop device")(Errno::BUSY))
    }

    fn configure(&self, file: BorrowedFd<'_>, read_only: bool) -> rustix::io::Result<()> {
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let node = open(&self.path, access)?;
        let flags = FLAG_DIRECT_IO | if read_only { FLAG_READ_ONLY } else { 0 };
        let mut file_name = [0; 64];
        file_name[..6].copy_from_slice(b"lamina");
        let status = Status {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        let config = Config { fd: file.as_raw_fd() as u32, block_size: 4096, status, reserved: [0; 8] };
        // SAFETY: `CONFIGURE` takes a `struct loop_config`, which `Config` is field by field.
        let request = unsafe { Setter::<CONFIGURE, Config>::new(config) };
        // SAFETY: the request only reads the structure, for the length of the call.
        unsafe { ioctl(&node, request) }
    }

    /// The kernel falls back silently, to read-only above all: believe what it did, not what it was asked.
    fn checked(self, wanted: bool) -> Result<Self, DeviceError> {
        let found = self.attribute("ro").is_some_and(|value| value == "1");
        if found != wanted {
            let _ = self.clear();
            return Err(DeviceError::WrongMode { found, wanted });
        }
        if self.attribute("loop/dio").is_none_or(|value| value != "1") {
            tracing::warn!(device = %self.path.display(), "loop device without direct I/O: cached twice");
        }
        Ok(self)
    }

    /// Whether the backing file is called `name`. The path before it is as some mount namespace saw it: no matter.
    pub(super) fn is_over(&self, name: &str) -> bool {
        let file = self.attribute("loop/backing_file");
        // After a lost mount the kernel appends a remark to the path.
        file.is_some_and(|path| {
            Path::new(path.trim_end_matches(" (deleted)")).file_name().is_some_and(|last| last == name)
        })
    }

    fn attribute(&self, name: &str) -> Option<String> {
        let path = format!("/sys/block/loop{}/{name}", self.number);
        std::fs::read_to_string(path).ok().map(|value| value.trim_end().to_owned())
    }

    /// Take over the backing file's new size.
    pub(super) fn set_capacity(&self) -> Result<(), DeviceError> {
        let step = "grow the loop device";
        let node = open(&self.path, OFlags::RDONLY).map_err(DeviceError::at(step))?;
        // SAFETY: `SET_CAPACITY` takes no argument.
        let request = unsafe { NoArg::<SET_CAPACITY>::new() };
        // SAFETY: the request touches no memory of this process.
        unsafe { ioctl(&node, request) }.map_err(DeviceError::at(step))
    }

    /// Let all users only read, or write again. Users that have it open are bound by it too.
    pub(super) fn set_read_only(&self, read_only: bool) -> Result<(), DeviceError> {
        let step = "set whether the loop device takes writes";
        let node = open(&self.path, OFlags::RDONLY).map_err(DeviceError::at(step))?;
        // SAFETY: `BLKROSET` takes a pointer to an int.
        let request = unsafe { Setter::<SET_READ_ONLY, i32>::new(i32::from(read_only)) };
        // SAFETY: the request only reads the number, for the length of the call.
        unsafe { ioctl(&node, request) }.map_err(DeviceError::at(step))
    }

    /// Remove the device if its backing file is called `name`; [`DeviceError::Busy`] while it has a user. Asking twice
    /// is fine.
    pub(super) fn detach(&self, name: &str) -> Result<(), DeviceError> {
        if !self.is_over(name) {
            return Ok(());
        }
        // A mounted file system claims the device, in whatever namespace: nobody else can open it exclusively.
        match open(&self.path, OFlags::RDONLY | OFlags::EXCL) {
            Ok(_) => {}
            Err(Errno::BUSY) => return Err(DeviceError::Busy),
            Err(errno) => return Err(DeviceError::at("open the loop device")(errno)),
        }
        self.clear().map_err(DeviceError::at("detach the loop device"))?;
        self.wait_until_gone(name)
    }

    /// Remove the device whoever uses it: it goes with its last user.
    pub(super) fn detach_in_use(&self, name: &str) -> Result<(), DeviceError> {
        if self.is_over(name) {
            self.clear().map_err(DeviceError::at("detach the loop device"))?;
        }
        Ok(())
    }

    fn clear(&self) -> rustix::io::Result<()> {
        let node = open(&self.path, OFlags::RDONLY)?;
        // SAFETY: `CLR_FD` takes no argument.
        let request = unsafe { NoArg::<CLR_FD>::new() };
        // SAFETY: the request touches no memory of this process.
        match unsafe { ioctl(&node, request) } {
            Ok(()) | Err(Errno::NXIO) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// The kernel removes the device when its last user closes it and has no event for that which needs no socket of
    /// its own; the last user is a probe of udev, if any.
    fn wait_until_gone(&self, name: &str) -> Result<(), DeviceError> {
        let asked = Instant::now();
        while self.is_over(name) {
            if asked.elapsed() > DETACH_PATIENCE {
                return Err(DeviceError::Busy);
            }
            // sleep: the kernel gives no event when another user lets go of the loop device; bounded by a deadline.
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}
