//! Makes the kubelet's requests acceptable to our HTTP/2 library.
//!
//! The kubelet dials a registration socket by its bare path, and grpc-go then sends that path, percent-encoded, as the
//! request's `:authority` (`%2Fvar%2Flib%2F…`). RFC 3986 allows a percent sign in a host, the `http` crate does not, and
//! `h2` resets the stream with PROTOCOL_ERROR: no kubelet could register the plugin. So every incoming byte passes here, and
//! in each `:authority` every `%` becomes `-`. Nothing reads the authority on a unix socket.
//!
//! Invariants: the number of bytes never changes, and the decoded length of the authority does not either, so both sides'
//! HPACK tables stay equal; whatever is not understood passes unchanged, and `h2` judges it. Memory: one HEADERS frame, at
//! most 16 KiB, which is also what `h2` admits.
//!
//! Sources: RFC 9113 §3.4, §4.1, §6.2 (frames); RFC 7541 §5, §6 and appendix B (header fields, strings, Huffman code).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// The client's preface, RFC 9113 §3.4.
const PREFACE_BYTES: usize = 24;
/// RFC 9113 §4.1.
const FRAME_HEADER_BYTES: usize = 9;
/// The largest frame that `h2` takes unless told otherwise.
const MAX_HEADERS_BYTES: usize = 16 << 10;
/// RFC 9113 §6.2.
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// `:authority` in HPACK's static table.
const AUTHORITY_INDEX: usize = 1;
/// Bytes taken from the socket at once.
const READ_BYTES: usize = 8 << 10;

/// A connection whose requests have an authority that `http` takes.
#[derive(Debug)]
pub(super) struct TamedAuthority<IO> {
    io: IO,
    filter: Filter,
}

impl<IO> TamedAuthority<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, filter: Filter::default() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for TamedAuthority<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let mut bytes = [0; READ_BYTES];
        while this.filter.passed.is_empty() {
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut read))?;
            match read.filled() {
                // What was held back is an unfinished frame: h2 sees it end early, as it did.
                [] if this.filter.held.is_empty() => return Poll::Ready(Ok(())),
                [] => this.filter.passed.append(&mut this.filter.held),
                some => this.filter.take(some),
            }
        }
        let fits = buf.remaining().min(this.filter.passed.len());
        buf.put_slice(&this.filter.passed[..fits]);
        this.filter.passed.drain(..fits);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for TamedAuthority<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<IO: Connected> Connected for TamedAuthority<IO> {
    type ConnectInfo = IO::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

/// Follows the frames of one connection.
///
/// ```text
/// Pass(preface) ─► Collect(frame header) ─► Pass(payload) ─────► Collect(frame header) …
///                                        └► Collect(HEADERS) ──┘
/// ```
#[derive(Debug)]
struct Filter {
    state: State,
    /// Bytes of what is being collected.
    held: Vec<u8>,
    /// Bytes that may go on.
    passed: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// So many bytes go on as they are.
    Pass(usize),
    /// The header of a frame, then its payload.
    FrameHeader,
    /// A whole HEADERS frame of so many bytes with these flags.
    Headers { bytes: usize, flags: u8 },
}

impl Default for Filter {
    fn default() -> Self {
        Self { state: State::Pass(PREFACE_BYTES), held: Vec::new(), passed: Vec::new() }
    }
}

impl Filter {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let wanted = match self.state {
                State::Pass(left) => left,
                State::FrameHeader => FRAME_HEADER_BYTES - self.held.len(),
                State::Headers { bytes, .. } => bytes - self.held.len(),
            };
            let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            match self.state {
                State::Pass(_) => self.passed.extend_from_slice(now),
                State::FrameHeader | State::Headers { .. } => self.held.extend_from_slice(now),
            }
            if now.len() == wanted {
                self.state = self.finish();
            } else if let State::Pass(left) = &mut self.state {
                *left -= now.len();
            }
        }
    }

    /// The state is complete; what comes next.
    fn finish(&mut self) -> State {
        let next = match self.state {
            State::Pass(_) => State::FrameHeader,
            State::FrameHeader => {
                let header = &self.held;
                let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
                match (header[3], length) {
                    (_, 0) => State::FrameHeader,
                    (HEADERS, 1..=MAX_HEADERS_BYTES) => State::Headers { bytes: length, flags: header[4] },
                    _ => State::Pass(length),
                }
            }
            State::Headers { flags, .. } => {
                // Not understood means unchanged from there on.
                let _ = tame_headers(&mut self.held, flags);
                State::FrameHeader
            }
        };
        self.passed.append(&mut self.held);
        next
    }
}

/// Goes through the payload of a HEADERS frame. `None`: it ended early or was not understood.
fn tame_headers(payload: &mut [u8], flags: u8) -> Option<()> {
    let padded = flags & PADDED != 0;
    let padding = if padded { usize::from(*payload.first()?) } else { 0 };
    let before = usize::from(padded) + if flags & PRIORITY != 0 { 5 } else { 0 };
    let end = payload.len().checked_sub(padding)?;
    let mut fields = Cursor { bytes: payload.get_mut(before..end)?, at: 0 };
    while fields.at < fields.bytes.len() {
        tame_field(&mut fields)?;
    }
    Some(())
}

/// One field representation, RFC 7541 §6.
fn tame_field(fields: &mut Cursor<'_>) -> Option<()> {
    let first = *fields.bytes.get(fields.at)?;
    let name = match first {
        0x80.. => return fields.integer(7).map(|_| ()),
        0x40..=0x7f => fields.integer(6)?,
        0x20..=0x3f => return fields.integer(5).map(|_| ()),
        _ => fields.integer(4)?,
    };
    if name == 0 {
        fields.string()?;
    }
    let (huffman, value) = fields.string()?;
    match (name == AUTHORITY_INDEX, huffman) {
        (true, true) => tame_huffman(value),
        (true, false) => value.iter_mut().filter(|byte| **byte == b'%').for_each(|byte| *byte = b'-'),
        (false, _) => {}
    }
    Some(())
}

/// A place in a header block.
struct Cursor<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Cursor<'_> {
    /// RFC 7541 §5.1. Four bytes beyond the prefix are more than any frame needs.
    fn integer(&mut self, prefix_bits: u32) -> Option<usize> {
        let mask = (1_usize << prefix_bits) - 1;
        let mut value = usize::from(self.byte()?) & mask;
        if value < mask {
            return Some(value);
        }
        for shift in [0, 7, 14, 21] {
            let byte = usize::from(self.byte()?);
            value += (byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// RFC 7541 §5.2: whether the bytes are Huffman code, and the bytes.
    fn string(&mut self) -> Option<(bool, &mut [u8])> {
        let huffman = *self.bytes.get(self.at)? & 0x80 != 0;
        let length = self.integer(7)?;
        let from = self.at;
        self.at = from.checked_add(length)?;
        Some((huffman, self.bytes.get_mut(from..self.at)?))
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }
}

/// In Huffman code `%` is 010101 and `-` is 010110: six bits both. The code is canonical, so lengths follow from ranges; a
/// symbol of over eight bits (none of a percent-encoded path) ends the walk, and so does the padding.
fn tame_huffman(code: &mut [u8]) {
    const PERCENT: u32 = 0b01_0101;
    let bits = code.len() * 8;
    let mut at = 0;
    while let Some(length) = symbol_bits(code, at, bits) {
        if length == 6 && peek(code, at, 6) == PERCENT {
            // 01 becomes 10 in the last two bits.
            flip(code, at + 4);
            flip(code, at + 5);
        }
        at += length;
    }
}

/// Length of the symbol at this bit, if it has at most eight and lies within.
fn symbol_bits(code: &[u8], at: usize, bits: usize) -> Option<usize> {
    let within = |length: usize| at + length <= bits;
    [(5, 0x00..=0x09), (6, 0x14..=0x2d), (7, 0x5c..=0x7b), (8, 0xf8..=0xfd)]
        .into_iter()
        .find_map(|(length, range)| (within(length) && range.contains(&peek(code, at, length))).then_some(length))
}

/// So many bits from there, the first highest.
fn peek(code: &[u8], at: usize, length: usize) -> u32 {
    (at..at + length).fold(0, |value, bit| value << 1 | u32::from(code[bit / 8] >> (7 - bit % 8) & 1))
}

fn flip(code: &mut [u8], bit: usize) {
    code[bit / 8] ^= 0x80 >> (bit % 8);
}

#[cfg(test)]
mod tests;
