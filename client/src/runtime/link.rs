//! One connection to one storage server: frames in and out in batches.
//!
//! Invariants: everything in a buffer is parsed before the driver's answers to it are sent; what is sent in a batch
//! leaves in one vectored write; payloads beyond [`COPY_BYTES`] are not copied. What waits to be sent is bounded by the
//! window of the handle.

use bytes::{Bytes, BytesMut};
use lamina_protocol::wire::{Framing, ReplyFrame, RequestFrame, frame_length, put_request_head, read_reply};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

/// A payload up to this is copied behind its header: cheaper than a segment of its own.
const COPY_BYTES: usize = 8 << 10;
/// Segments of one vectored write.
const MAX_SEGMENTS: usize = 64;
/// What a read asks for at least; small frames then come many at a time.
const READ_BYTES: usize = 128 << 10;

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The socket failed, or the other side closed it.
    #[error("connection lost: {0}")]
    Socket(#[from] io::Error),
    /// What came is no frame.
    #[error("the server sent what is no frame: {0}")]
    Framing(#[from] Framing),
}

impl LinkError {
    /// Whether the other side refused, reset or closed it: the process there is gone.
    pub(super) fn refused(&self) -> bool {
        match self {
            Self::Socket(error) => is_refusal(error),
            Self::Framing(_) => false,
        }
    }
}

/// Whether the error says that nobody is there, rather than that nothing was heard.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof)
}

/// What waits to be written.
#[derive(Default)]
struct Outbox {
    segments: VecDeque<Bytes>,
    /// Small frames that are being gathered into the next segment.
    tail: Vec<u8>,
}

/// An open connection.
pub(super) struct Link {
    /// Until the task that reads takes it: its way of reading knows from a buffer that was not filled that the socket is
    /// empty, and saves the system call that says so.
    reader: Cell<Option<OwnedReadHalf>>,
    stream: OwnedWriteHalf,
    outbox: RefCell<Outbox>,
    /// It has something to write that was not there when the batch began.
    pub(super) in_batch: Cell<bool>,
    /// Something is left that the socket did not take.
    more: Notify,
}

impl Link {
    pub(super) fn new(stream: TcpStream) -> Self {
        let (reader, stream) = stream.into_split();
        let reader = Cell::new(Some(reader));
        Self { reader, stream, outbox: RefCell::default(), in_batch: Cell::new(false), more: Notify::new() }
    }

    /// Put a frame behind the others.
    pub(super) fn push(&self, frame: &RequestFrame) {
        let mut outbox = self.outbox.borrow_mut();
        put_request_head(frame, &mut outbox.tail);
        if frame.payload.len() <= COPY_BYTES {
            outbox.tail.extend_from_slice(&frame.payload);
        } else {
            outbox.close_tail();
            outbox.segments.push_back(frame.payload.clone());
        }
    }

    /// Write what the socket takes; the rest is left to [`Self::write_rest`].
    pub(super) fn flush(&self) {
        // An error shows up in the reader too, which ends the connection.
        if let Ok(false) = self.write_some() {
            self.more.notify_one();
        }
    }

    /// Whether everything is written.
    fn write_some(&self) -> io::Result<bool> {
        let mut outbox = self.outbox.borrow_mut();
        if outbox.segments.is_empty() && self.write_tail(&mut outbox)? {
            return Ok(true);
        }
        outbox.close_tail();
        while !outbox.segments.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SEGMENTS];
            let segments = outbox.segments.iter().take(MAX_SEGMENTS);
            let count = segments.zip(&mut slices).map(|(segment, slice)| *slice = IoSlice::new(segment)).count();
            match self.stream.try_write_vectored(&slices[..count]) {
                Ok(written) => outbox.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// The usual case, small frames only: nothing is allocated. Whether all of it went.
    fn write_tail(&self, outbox: &mut Outbox) -> io::Result<bool> {
        match self.stream.try_write(&outbox.tail) {
            Ok(written) => {
                outbox.tail.drain(..written);
                Ok(outbox.tail.is_empty())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Write what the socket did not take at once, whenever there is some. Ends with an error only.
    pub(super) async fn write_rest(&self) -> io::Error {
        loop {
            self.more.notified().await;
            loop {
                if let Err(error) = self.stream.writable().await {
                    return error;
                }
                match self.write_some() {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(error) => return error,
                }
            }
        }
    }

    /// Read what is there and hand over all whole frames of it at once. Ends with an error only.
    pub(super) async fn read_frames(&self, mut each_batch: impl FnMut(&mut Vec<ReplyFrame>)) -> LinkError {
        let mut reader = self.reader.take().expect("one task reads a connection");
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let mut frames = Vec::new();
        loop {
            match reader.read_buf(&mut buffer).await {
                Ok(0) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
            let missing = match take_frames(&mut buffer, &mut frames) {
                Ok(missing) => missing,
                Err(error) => return error.into(),
            };
            if !frames.is_empty() {
                each_batch(&mut frames);
                frames.clear();
            }
            if buffer.capacity() - buffer.len() < missing.max(READ_BYTES / 8) {
                buffer.reserve(missing.max(READ_BYTES));
            }
        }
    }
}

impl Outbox {
    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            let next = Vec::with_capacity(self.tail.len().min(COPY_BYTES));
            let tail = std::mem::replace(&mut self.tail, next);
            self.segments.push_back(Bytes::from(tail));
        }
    }

    /// These many bytes are written.
    fn advance(&mut self, mut written: usize) {
        while written > 0 {
            let first = self.segments.front_mut().expect("no more is written than there was");
            if written < first.len() {
                return bytes::Buf::advance(first, written);
            }
            written -= first.len();
            self.segments.pop_front();
        }
    }
}

/// Take all whole frames off the front; how many bytes are missing to the next one.
fn take_frames(buffer: &mut BytesMut, frames: &mut Vec<ReplyFrame>) -> Result<usize, Framing> {
    loop {
        match frame_length(buffer)? {
            Some(length) if length <= buffer.len() => {
                let frame = buffer.split_to(length).freeze();
                frames.push(read_reply(&frame)?);
            }
            Some(length) => return Ok(length - buffer.len()),
            None => return Ok(0),
        }
    }
}
