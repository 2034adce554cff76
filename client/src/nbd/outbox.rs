//! Answers on their way out: short ones gathered in one buffer, long payloads by reference, one vectored write for all.

use super::wire;
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

/// Payloads up to this are copied beside their header, in bytes: cheaper than a segment of their own.
const COPY_BYTES: usize = 16 << 10;
/// Segments per write.
const SEGMENTS: usize = 64;

/// Encoded answers that the socket has not taken yet.
#[derive(Default)]
pub(super) struct Outbox {
    segments: VecDeque<Bytes>,
    tail: BytesMut,
    bytes: usize,
}

impl Outbox {
    /// Bytes that wait here.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    /// Queue a reply; `payload` is empty unless it answers a read.
    pub(super) fn push(&mut self, error: u32, cookie: u64, payload: Bytes) {
        let header = wire::reply_header(error, cookie);
        self.bytes += header.len() + payload.len();
        self.tail.extend_from_slice(&header);
        if payload.len() <= COPY_BYTES {
            self.tail.extend_from_slice(&payload);
        } else {
            self.segments.push_back(self.tail.split().freeze());
            self.segments.push_back(payload);
        }
    }

    /// Write until all is gone or the socket is full.
    pub(super) fn poll_write<S>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>>
    where
        S: AsyncWrite + Unpin,
    {
        while self.bytes > 0 {
            let mut slices = [IoSlice::new(&[]); SEGMENTS];
            let queued = self.segments.iter().map(|segment| &segment[..]).chain([&self.tail[..]]);
            let count = slices.iter_mut().zip(queued).map(|(slice, segment)| *slice = IoSlice::new(segment)).count();
            let written = ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written);
        }
        Pin::new(stream).poll_flush(cx)
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(segment) = self.segments.front_mut() {
            if segment.len() > written {
                segment.advance(written);
                return;
            }
            written -= segment.len();
            self.segments.pop_front();
        }
        self.tail.advance(written);
    }
}
