//! The disk process: requests of NBD off a TCP connection, by one io_uring to a file with O_DIRECT, answers back.
//!
//! Invariant: memory that the kernel may touch (the buffers of requests under way, and what the connection is read into)
//! is neither moved nor given back before the kernel is done with it; a connection is left only when nothing is under way.

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::{Mode, OFlags};
use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const ANSWER_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
const INPUT_BYTES: usize = 256 << 10;
const ENTRIES: u32 = 256;
const RECEIVED: u64 = u64::MAX;

/// 4 KiB as O_DIRECT takes them.
#[repr(align(4096))]
#[derive(Clone)]
struct Block(#[expect(dead_code, reason = "seen as bytes only")] [u8; 4096]);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Goodbye,
}

struct Request {
    kind: Kind,
    cookie: [u8; 8],
    at: u64,
    bytes: usize,
    memory: Vec<Block>,
}

struct Connection<'a> {
    ring: &'a mut IoUring,
    file: &'a OwnedFd,
    stream: TcpStream,
    requests: Vec<Option<Request>>,
    unused: Vec<usize>,
    spare: Vec<Vec<Block>>,
    input: Vec<u8>,
    filled: usize,
    /// A write whose payload is still coming: its request, and how much is there.
    coming: Option<(Request, usize)>,
    under_way: usize,
}

/// Serves one connection after the other; prints where it listens.
///
/// # Errors
/// The file or the listener cannot be had; the kernel refuses a transfer.
pub fn serve(path: &Path) -> Result<()> {
    let file = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| path.display().to_string())?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("listens on {}", listener.local_addr()?);
    let mut ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(ENTRIES)?;
    for stream in listener.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        Connection {
            ring: &mut ring,
            file: &file,
            stream,
            requests: Vec::new(),
            unused: Vec::new(),
            spare: Vec::new(),
            input: vec![0; INPUT_BYTES],
            filled: 0,
            coming: None,
            under_way: 0,
        }
        .live()?;
    }
    Ok(())
}

fn bytes_of(blocks: &mut [Block]) -> &mut [u8] {
    let length = size_of_val(blocks);
    // SAFETY: blocks are bytes without gaps, all initialised, and borrowed for as long as the result.
    unsafe { std::slice::from_raw_parts_mut(blocks.as_mut_ptr().cast(), length) }
}

impl Connection<'_> {
    fn live(mut self) -> Result<()> {
        self.receive();
        let (mut open, mut ended) = (true, Vec::new());
        while open || self.under_way > 0 {
            self.ring.submit_and_wait(1)?;
            ended.extend(self.ring.completion().map(|end| (end.user_data(), end.result())));
            for (id, result) in ended.drain(..) {
                if id != RECEIVED {
                    self.done(id as usize, result)?;
                    continue;
                }
                open = result > 0;
                if open {
                    self.take(result as usize)?;
                    self.receive();
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what it points to lives in `requests`, `coming` or `input`, whose memory does not move, until its end.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("fewer requests than entries");
    }

    /// Asks for more: the rest of a payload where it belongs, else whatever comes.
    fn receive(&mut self) {
        let rest = match &mut self.coming {
            Some((request, there)) => &mut bytes_of(&mut request.memory)[*there..request.bytes],
            None => &mut self.input[self.filled..],
        };
        let fd = types::Fd(self.stream.as_raw_fd());
        let entry = opcode::Recv::new(fd, rest.as_mut_ptr(), rest.len() as u32).build().user_data(RECEIVED);
        self.push(&entry);
    }

    /// So many bytes have come.
    fn take(&mut self, count: usize) -> Result<()> {
        if let Some((request, there)) = self.coming.take() {
            self.payload(request, there + count);
            return Ok(());
        }
        self.filled += count;
        let (mut from, input) = (0, std::mem::take(&mut self.input));
        while self.filled - from >= REQUEST_BYTES && self.coming.is_none() {
            let mut request = self.request(&input[from..from + REQUEST_BYTES])?;
            from += REQUEST_BYTES;
            if request.kind == Kind::Goodbye {
                continue;
            }
            if request.kind != Kind::Write {
                self.begin(request);
                continue;
            }
            let there = request.bytes.min(self.filled - from);
            bytes_of(&mut request.memory)[..there].copy_from_slice(&input[from..from + there]);
            from += there;
            self.payload(request, there);
        }
        self.input = input;
        self.input.copy_within(from..self.filled, 0);
        self.filled -= from;
        Ok(())
    }

    fn payload(&mut self, request: Request, there: usize) {
        if there == request.bytes { self.begin(request) } else { self.coming = Some((request, there)) }
    }

    fn request(&mut self, head: &[u8]) -> Result<Request> {
        let number = |from: usize| u32::from_be_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]);
        ensure!(number(0) == REQUEST_MAGIC, "not a request");
        let (kind, bytes) = match head[7] {
            0 => (Kind::Read, number(24) as usize),
            1 => (Kind::Write, number(24) as usize),
            2 => (Kind::Goodbye, 0),
            3 => (Kind::Flush, 0),
            other => bail!("a request of kind {other}"),
        };
        ensure!(bytes.is_multiple_of(4096), "a request that is not in whole blocks");
        let mut memory = self.spare.pop().unwrap_or_default();
        memory.resize(bytes / 4096, Block([0; 4096]));
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&head[8..16]);
        Ok(Request { kind, cookie, at: u64::from(number(16)) << 32 | u64::from(number(20)), bytes, memory })
    }

    fn begin(&mut self, mut request: Request) {
        let fd = types::Fd(self.file.as_raw_fd());
        let (memory, length, at) = (request.memory.as_mut_ptr().cast::<u8>(), request.bytes as u32, request.at);
        let entry = match request.kind {
            Kind::Read => opcode::Read::new(fd, memory, length).offset(at).build(),
            Kind::Write => opcode::Write::new(fd, memory, length).offset(at).build(),
            Kind::Flush | Kind::Goodbye => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let id = self.unused.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[id] = Some(request);
        self.under_way += 1;
        self.push(&entry.user_data(id as u64));
    }

    fn done(&mut self, id: usize, result: i32) -> Result<()> {
        let mut request = self.requests[id].take().context("it was under way")?;
        self.unused.push(id);
        self.under_way -= 1;
        ensure!(result == request.bytes as i32, "a transfer ended with {result}");
        let mut head = [0; 16];
        head[..4].copy_from_slice(&ANSWER_MAGIC.to_be_bytes());
        head[8..].copy_from_slice(&request.cookie);
        let data = if request.kind == Kind::Read { bytes_of(&mut request.memory) } else { &mut [] };
        // A client that went away in the middle gets nothing.
        let _ = self.answer(&head, data);
        self.spare.push(request.memory);
        Ok(())
    }

    fn answer(&mut self, head: &[u8], data: &[u8]) -> std::io::Result<()> {
        let mut slices = [IoSlice::new(head), IoSlice::new(data)];
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            let written = self.stream.write_vectored(rest)?;
            IoSlice::advance_slices(&mut rest, written);
        }
        Ok(())
    }
}
