//! The `/dev/fuse` descriptor of one mount.
//!
//! Never cloned with `FUSE_DEV_IOC_CLONE` and never driven by io_uring: both would keep requests from a successor
//! (data-path.md, Attach).

use super::abi;
use crate::device::DeviceError;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

/// What a reader gets from the kernel.
pub(super) enum Received {
    /// A frame of this many bytes.
    Frame(usize),
    /// The mount is gone or was aborted: nothing will ever come again.
    Closed,
}

/// The kernel's requests, and the way back.
#[derive(Clone)]
pub(super) struct Channel {
    fd: Arc<OwnedFd>,
}

impl Channel {
    /// A new mount on `point`, shown as of type `fuse.lamina`.
    pub(super) fn mount(point: &Path, volume: &str) -> Result<Self, DeviceError> {
        let fd = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(DeviceError::at("open /dev/fuse"))?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,max_read={}", fd.as_raw_fd(), abi::MAX_WRITE);
        let options = CString::new(options).expect("no zero bytes in it");
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
        rustix::mount::mount(volume, point, "fuse.lamina", flags, options.as_c_str())
            .map_err(DeviceError::at("mount the FUSE file"))?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// The one that another process had.
    pub(super) fn from_fd(fd: Arc<OwnedFd>) -> Self {
        Self { fd }
    }

    /// For the holder.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Whether requests can still come.
    pub(super) fn is_connected(&self) -> bool {
        let mut fds = [PollFd::new(&*self.fd, PollFlags::IN)];
        let polled = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        polled.is_ok() && !fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
    }

    /// Wait for the next request.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        loop {
            match rustix::io::read(&*self.fd, &mut *buffer) {
                Ok(length) => return Received::Frame(length),
                // Not there any more: the one who asked was killed.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => return Received::Closed,
                Err(error) => {
                    tracing::error!(%error, "/dev/fuse cannot be read");
                    return Received::Closed;
                }
            }
        }
    }

    /// Answer with a body. That the asker is gone meanwhile is no error.
    pub(super) fn answer(&self, unique: u64, body: &[u8]) {
        self.write(&abi::answer_header(unique, None, body.len()), body);
    }

    /// Answer with an error.
    pub(super) fn refuse(&self, unique: u64, error: Errno) {
        self.write(&abi::answer_header(unique, Some(error), 0), &[]);
    }

    /// Ask for everything again that a process before this one has not answered.
    pub(super) fn ask_again(&self) -> Result<(), DeviceError> {
        match rustix::io::write(&*self.fd, &abi::resend_notice()) {
            Ok(_) => Ok(()),
            Err(Errno::INVAL) => Err(DeviceError::CannotResume),
            Err(errno) => Err(DeviceError::at("ask for unanswered requests")(errno)),
        }
    }

    fn write(&self, header: &[u8], body: &[u8]) {
        let slices = [IoSlice::new(header), IoSlice::new(body)];
        match rustix::io::writev(&*self.fd, if body.is_empty() { &slices[..1] } else { &slices }) {
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(error) => tracing::error!(%error, "/dev/fuse does not take an answer"),
        }
    }
}
