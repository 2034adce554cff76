//! One connection, of a client to this server or of this server to a peer: frames in and out in batches.
//!
//! Invariants: everything in a buffer is parsed before the answers to it are sent; what is sent in a batch leaves in one
//! vectored write; payloads beyond [`COPY_BYTES`] are not copied (data-path.md, Network). Nothing more is read while more
//! than [`MAX_WAITING_BYTES`] wait to be written, so one that reads no answers costs that and its windows, no more.

use bytes::{Buf, Bytes, BytesMut};
use lamina_protocol::wire::{Framing, ReplyFrame, RequestFrame, frame_length, put_reply_head, put_request_head};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time::timeout;

/// A payload up to this is copied behind its header: cheaper than a segment of its own.
const COPY_BYTES: usize = 8 << 10;
/// Segments of one vectored write.
const MAX_SEGMENTS: usize = 64;
/// What a read asks for at least; small frames then come many at a time.
const READ_BYTES: usize = 128 << 10;
/// Nothing more is read while more than this waits to be written.
const MAX_WAITING_BYTES: usize = 8 << 20;
/// The rest of a frame comes within this time, or never.
const FRAME_PATIENCE: Duration = Duration::from_secs(30);

/// Why a connection is given up. The other side sees it closed; a count and one log line say why.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The socket failed.
    #[error("connection lost: {0}")]
    Socket(#[from] io::Error),
    /// The other side closed it.
    #[error("closed by the other side")]
    Closed,
    /// It closed it in the middle of a frame.
    #[error("closed in the middle of a frame")]
    Truncated,
    /// What came is no frame.
    #[error("not a frame: {0}")]
    Framing(#[from] Framing),
    /// A frame began and did not go on.
    #[error("a frame began and did not go on")]
    Stuck,
    /// Nothing was said in the time for a greeting.
    #[error("no greeting in time")]
    NoGreeting,
}

/// A frame that can be sent.
pub(crate) trait Outgoing {
    /// Appends everything but the payload.
    fn put_head(&self, out: &mut Vec<u8>);
    /// The payload.
    fn payload(&self) -> &Bytes;
}

impl Outgoing for ReplyFrame {
    fn put_head(&self, out: &mut Vec<u8>) {
        put_reply_head(self, out);
    }
    fn payload(&self) -> &Bytes {
        &self.payload
    }
}

impl Outgoing for RequestFrame {
    fn put_head(&self, out: &mut Vec<u8>) {
        put_request_head(self, out);
    }
    fn payload(&self) -> &Bytes {
        &self.payload
    }
}

/// What waits to be written.
#[derive(Default)]
struct Outbox {
    segments: VecDeque<Bytes>,
    /// Small frames that are being gathered into the next segment.
    tail: Vec<u8>,
    /// Bytes in `segments`.
    bytes: usize,
}

/// An open connection.
pub(crate) struct Link {
    /// Until the task that reads takes it: its way of reading knows from a buffer that was not filled that the socket is
    /// empty, and saves the system call that says so.
    reader: Cell<Option<OwnedReadHalf>>,
    stream: OwnedWriteHalf,
    outbox: RefCell<Outbox>,
    /// It has something to write that was not there when the batch began.
    in_batch: Cell<bool>,
    /// Something is left that the socket did not take.
    more: Notify,
    /// Little enough waits again.
    room: Notify,
}

impl Link {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let (reader, stream) = stream.into_split();
        let (reader, outbox) = (Cell::new(Some(reader)), RefCell::default());
        Self { reader, stream, outbox, in_batch: Cell::new(false), more: Notify::new(), room: Notify::new() }
    }

    /// Puts a frame behind the others. True = the link has something new to write in this batch.
    pub(crate) fn push(&self, frame: &impl Outgoing) -> bool {
        let mut outbox = self.outbox.borrow_mut();
        frame.put_head(&mut outbox.tail);
        let payload = frame.payload();
        if payload.len() <= COPY_BYTES {
            outbox.tail.extend_from_slice(payload);
        } else {
            outbox.close_tail();
            outbox.bytes += payload.len();
            outbox.segments.push_back(payload.clone());
        }
        !self.in_batch.replace(true)
    }

    /// Writes what the socket takes; the rest is left to [`Self::write_rest`].
    pub(crate) fn flush(&self) {
        self.in_batch.set(false);
        // An error is met again there. The reader may not see it: with too much waiting to be written it reads nothing.
        if !matches!(self.write_some(), Ok(true)) {
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
        if outbox.tail.is_empty() {
            return Ok(true);
        }
        match self.stream.try_write(&outbox.tail) {
            Ok(written) => {
                outbox.tail.drain(..written);
                Ok(outbox.tail.is_empty())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes what the socket did not take at once, whenever there is some. Ends with an error only.
    pub(crate) async fn write_rest(&self) -> LinkError {
        loop {
            self.more.notified().await;
            loop {
                if let Err(error) = self.stream.writable().await {
                    return error.into();
                }
                let written = self.write_some();
                if !self.is_full() {
                    self.room.notify_one();
                }
                match written {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(error) => return error.into(),
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        let outbox = self.outbox.borrow();
        outbox.bytes + outbox.tail.len() > MAX_WAITING_BYTES
    }

    /// Reads what is there and hands over all whole frames of it at once. Ends with an error only. The first frame comes
    /// within `greeting`.
    pub(crate) async fn read_frames<F>(
        &self,
        greeting: Duration,
        decode: fn(&Bytes) -> Result<F, Framing>,
        mut each_batch: impl FnMut(&mut Vec<F>),
    ) -> LinkError {
        let mut reader = self.reader.take().expect("one task reads a connection");
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let mut frames = Vec::new();
        let mut greeted = false;
        loop {
            while self.is_full() {
                self.room.notified().await;
            }
            if let Err(error) = more_bytes(&mut reader, &mut buffer, greeted, greeting).await {
                return error;
            }
            let taken = take_frames(&mut buffer, &mut frames, decode);
            if !frames.is_empty() {
                greeted = true;
                each_batch(&mut frames);
                frames.clear();
            }
            match taken {
                Ok(missing) if buffer.capacity() - buffer.len() < missing.max(READ_BYTES / 8) => {
                    buffer.reserve(missing.max(READ_BYTES));
                }
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    }
}

/// Waits for bytes and takes them: without end between frames, with patience for a greeting and within a frame.
async fn more_bytes(
    reader: &mut OwnedReadHalf,
    buffer: &mut BytesMut,
    greeted: bool,
    greeting: Duration,
) -> Result<(), LinkError> {
    let between = buffer.is_empty();
    let read = reader.read_buf(buffer);
    let taken = match (greeted, between) {
        (true, true) => read.await?,
        (true, false) => timeout(FRAME_PATIENCE, read).await.map_err(|_| LinkError::Stuck)??,
        (false, _) => timeout(greeting, read).await.map_err(|_| LinkError::NoGreeting)??,
    };
    match (taken, between) {
        (0, true) => Err(LinkError::Closed),
        (0, false) => Err(LinkError::Truncated),
        _ => Ok(()),
    }
}

impl Outbox {
    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            let next = Vec::with_capacity(self.tail.len().min(COPY_BYTES));
            let tail = std::mem::replace(&mut self.tail, next);
            self.bytes += tail.len();
            self.segments.push_back(Bytes::from(tail));
        }
    }

    /// These many bytes are written.
    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while written > 0 {
            let first = self.segments.front_mut().expect("no more is written than there was");
            if written < first.len() {
                return first.advance(written);
            }
            written -= first.len();
            self.segments.pop_front();
        }
    }
}

/// Takes all whole frames off the front; how many bytes are missing to the next one. Frames before a broken one are
/// taken, too.
fn take_frames<F>(
    buffer: &mut BytesMut,
    frames: &mut Vec<F>,
    decode: fn(&Bytes) -> Result<F, Framing>,
) -> Result<usize, Framing> {
    loop {
        match frame_length(buffer)? {
            Some(length) if length <= buffer.len() => {
                let frame = buffer.split_to(length).freeze();
                frames.push(decode(&frame)?);
            }
            Some(length) => return Ok(length - buffer.len()),
            None => return Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_protocol::wire::{ReplyBody, ReplyHeader, read_request};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_link_that_breaks_while_too_much_waits_to_be_written_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (ours, _) = listener.accept().await.unwrap();
        let link = Link::new(ours);
        link.stream.writable().await.unwrap();
        // It resets the connection, as a process that is killed with unread bytes does.
        rustix::net::sockopt::set_socket_linger(&theirs, Some(Duration::ZERO)).unwrap();
        drop(theirs);
        let payload = Bytes::from(vec![7; 1 << 20]);
        for _ in 0..10 {
            link.push(&ReplyFrame { header: ReplyHeader::default(), body: ReplyBody::Data, payload: payload.clone() });
        }
        assert!(link.is_full());
        link.flush();
        let ended = async {
            tokio::select! {
                error = link.read_frames(FRAME_PATIENCE, read_request, |_| {}) => error,
                error = link.write_rest() => error,
            }
        };
        let ended = timeout(Duration::from_secs(20), ended).await;
        assert!(matches!(ended, Ok(LinkError::Socket(_) | LinkError::Closed)), "{ended:?}");
    }
}
