//! From the bytes of a connection to requests.
//!
//! Invariant: the buffer holds at most one chunk and one request of [`MAX_REQUEST_BYTES`]; that of a longer write is
//! skipped as it arrives. A payload that is handed on pins about as much memory as it has bytes: short ones are
//! copied out of the shared buffer, because the driver keeps them until they are flushed.

use super::wire::{REQUEST_BYTES, Request, command};
use crate::block::MAX_REQUEST_BYTES;
use bytes::{Buf, Bytes, BytesMut};

/// How much is read at once, in bytes.
const CHUNK_BYTES: usize = 128 << 10;
/// Payloads up to this are copied, in bytes.
const COPY_BYTES: usize = 32 << 10;

/// One request as it came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Whole; the payload is empty unless it is a write.
    Request(Request, Bytes),
    /// A write longer than any may be; its payload is being skipped.
    TooLong(Request),
}

/// The bytes were not a request: nothing that follows can be understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Garbage;

/// The bytes received and not yet understood.
#[derive(Default)]
pub(super) struct Decoder {
    buffer: BytesMut,
    skip: usize,
    /// What the next request needs to be whole, in bytes.
    wanted: usize,
}

impl Decoder {
    /// Where to read into; has room.
    pub(super) fn room(&mut self) -> &mut BytesMut {
        let missing = self.wanted.saturating_sub(self.buffer.len());
        if self.buffer.capacity() - self.buffer.len() < missing.max(CHUNK_BYTES / 2) {
            self.buffer.reserve(missing.max(CHUNK_BYTES));
        }
        &mut self.buffer
    }

    /// The next whole request, or `None` until more was read.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, Garbage> {
        let skipped = self.skip.min(self.buffer.len());
        self.buffer.advance(skipped);
        self.skip -= skipped;
        self.wanted = REQUEST_BYTES;
        let Some(header) = self.buffer.first_chunk::<REQUEST_BYTES>() else {
            return Ok(None);
        };
        let request = Request::parse(header).ok_or(Garbage)?;
        let payload_bytes = if request.kind == command::WRITE { request.length as usize } else { 0 };
        if payload_bytes > MAX_REQUEST_BYTES as usize {
            self.buffer.advance(REQUEST_BYTES);
            self.skip = payload_bytes;
            return Ok(Some(Frame::TooLong(request)));
        }
        self.wanted = REQUEST_BYTES + payload_bytes;
        if self.buffer.len() < self.wanted {
            return Ok(None);
        }
        self.buffer.advance(REQUEST_BYTES);
        self.wanted = REQUEST_BYTES;
        Ok(Some(Frame::Request(request, self.payload(payload_bytes))))
    }

    fn payload(&mut self, length: usize) -> Bytes {
        if length > COPY_BYTES {
            return self.buffer.split_to(length).freeze();
        }
        let payload = Bytes::copy_from_slice(&self.buffer[..length]);
        self.buffer.advance(length);
        payload
    }
}
