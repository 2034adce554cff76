//! What the holder and its clients say to each other, on a unix stream socket of one machine and one release.
//!
//! ```text
//! u32 length of the body | u8 kind | body: u16 length of the volume's handle | handle | state
//! ```
//! Native byte order. A descriptor travels with the first byte of the frame (`SCM_RIGHTS`).

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The longest body, in bytes: states are a few hundred; a list of 1024 handles fits.
const MAX_BODY_BYTES: usize = 256 << 10;
const HEADER_BYTES: usize = 5;

/// Requests, then answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Put = 1,
    Update,
    Take,
    Release,
    List,
    /// A put after the connection was lost, which may find the volume as it left it.
    PutAgain,
    Done = 100,
    NotFound,
    Exists,
    NotYours,
    Full,
    /// The last taker does not let go and cannot be ended from here.
    Stuck,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{Done, Exists, Full, List, NotFound, NotYours, Put, PutAgain, Release, Stuck, Take, Update};
        let all = [Put, Update, Take, Release, List, PutAgain, Done, NotFound, Exists, NotYours, Full, Stuck];
        all.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One frame.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) volume: String,
    pub(super) state: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// Send one frame, with a descriptor if there is one.
pub(super) fn send(
    stream: &UnixStream,
    kind: Kind,
    volume: &str,
    state: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let length = 2 + volume.len() + state.len();
    if length > MAX_BODY_BYTES || volume.len() > usize::from(u16::MAX) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut frame = Vec::with_capacity(HEADER_BYTES + length);
    frame.extend((length as u32).to_ne_bytes());
    frame.push(kind as u8);
    frame.extend((volume.len() as u16).to_ne_bytes());
    frame.extend(volume.as_bytes());
    frame.extend(state);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one descriptor");
    }
    let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL)?;
    let mut stream = stream;
    stream.write_all(&frame[sent..])
}

/// The next frame; `None` when the other side closed between frames.
pub(super) fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; HEADER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut header)];
    let received =
        rustix::io::retry_on_intr(|| rustix::net::recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC))?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let fd = fds.next();
    drop(fds);
    let mut stream = stream;
    stream.read_exact(&mut header[received.bytes..])?;
    let [l0, l1, l2, l3, kind] = header;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
    if !(2..=MAX_BODY_BYTES).contains(&length) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    parse(kind, &body, fd).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(kind: u8, body: &[u8], fd: Option<OwnedFd>) -> Option<Message> {
    let (length, rest) = body.split_first_chunk::<2>()?;
    let (volume, state) = rest.split_at_checked(usize::from(u16::from_ne_bytes(*length)))?;
    let volume = String::from_utf8(volume.to_vec()).ok()?;
    Some(Message { kind: Kind::from_byte(kind)?, volume, state: state.to_vec(), fd })
}
