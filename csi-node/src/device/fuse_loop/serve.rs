//! The threads that read the kernel's requests.
//!
//! Two of them read the same descriptor: while one parses, the other takes the next request. What needs the target goes
//! there and is answered by [`Replies`]; all else is answered at once.

use super::abi::{self, Ask, HEADER_BYTES, ROOT_NODE, Request, WRITE_HEADER_BYTES};
use super::channel::{Channel, Received};
use super::replies::{Answer, Replies};
use super::resident::Resident;
use crate::device::{self, DeviceError};
use bytes::Bytes;
use lamina_client::block::BlockOp;
use rustix::io::Errno;
use std::sync::Arc;
use std::thread::JoinHandle;

const READERS: usize = 2;
/// A whole WRITE, and what the kernel wants beyond it.
const BUFFER_BYTES: usize = abi::MAX_WRITE as usize + 4096;

/// Answer the kernel's first request, the only one before the mount works. Whether the kernel can resend.
pub(super) fn greet(channel: &Channel) -> Result<bool, DeviceError> {
    let step = "greet the kernel's FUSE";
    let mut buffer = vec![0; BUFFER_BYTES];
    let Received::Frame(length) = channel.receive(&mut buffer) else {
        return Err(DeviceError::at(step)(Errno::NODEV));
    };
    match Request::parse(&buffer[..length]) {
        Some(Request { unique, ask: Ask::Init { major, minor, max_readahead, flags }, .. }) => {
            let answer = abi::init_answer(major, minor, max_readahead, flags);
            channel.answer(unique, &answer.ok_or(Errno::PROTO).map_err(DeviceError::at(step))?);
            Ok(abi::can_resend(flags))
        }
        _ => Err(DeviceError::at(step)(Errno::PROTO)),
    }
}

/// Serve until the mount is gone or this process is superseded.
pub(super) fn start(replies: &Arc<Replies>, volume: &str) -> Result<Vec<JoinHandle<()>>, DeviceError> {
    (0..READERS)
        .map(|_| {
            let buffer = Resident::new(BUFFER_BYTES).map_err(DeviceError::at("get a buffer for /dev/fuse"))?;
            let reader = Reader { replies: replies.clone(), volume: volume.to_owned() };
            let thread = std::thread::Builder::new().name("fuse-reader".into());
            thread.spawn(move || reader.run(buffer)).map_err(DeviceError::at_io("start a reader of /dev/fuse"))
        })
        .collect()
}

struct Reader {
    replies: Arc<Replies>,
    /// The file's name.
    volume: String,
}

impl Reader {
    fn run(&self, mut buffer: Resident) {
        device::serve_memory_pressure();
        while let Received::Frame(length) = self.replies.channel().receive(&mut buffer) {
            if self.replies.silenced() {
                return;
            }
            match Request::parse(&buffer[..length]) {
                Some(request) => self.serve(request, &buffer[..length]),
                None => tracing::error!(length, "the kernel sent a FUSE request that cannot be understood"),
            }
        }
    }

    fn serve(&self, Request { unique, node, ask }: Request, frame: &[u8]) {
        let (size, read_only) = (self.replies.target().size(), self.replies.target().read_only());
        let channel = self.replies.channel();
        match ask {
            Ask::Lookup if self.is_file(node, &frame[HEADER_BYTES..]) => {
                channel.answer(unique, &abi::entry_answer(size, read_only));
            }
            Ask::Lookup => channel.refuse(unique, Errno::NOENT),
            Ask::SetAttributes { size: true } => channel.refuse(unique, Errno::INVAL),
            Ask::GetAttributes | Ask::SetAttributes { .. } => {
                channel.answer(unique, &abi::attributes_answer(node, size, read_only));
            }
            Ask::Open { writing: true } if read_only => channel.refuse(unique, Errno::ROFS),
            Ask::Open { .. } => channel.answer(unique, &abi::open_answer()),
            Ask::OpenDirectory => channel.answer(unique, &abi::open_directory_answer()),
            Ask::ReadDirectory | Ask::Nod => channel.answer(unique, &[]),
            Ask::FileSystem => channel.answer(unique, &abi::file_system_answer(size)),
            Ask::Read { offset, length } => self.read(unique, offset, length, size),
            Ask::Write { .. } | Ask::Zero { .. } if self.replies.only_read() => channel.refuse(unique, Errno::ROFS),
            Ask::Write { offset, length } => {
                let payload = Bytes::copy_from_slice(&frame[WRITE_HEADER_BYTES..]);
                let op = BlockOp::Write { address: offset, payload, fua: false };
                self.replies.ask(unique, op, Answer::Written(length));
            }
            Ask::Fsync => self.replies.ask(unique, BlockOp::Flush, Answer::Done),
            Ask::Zero { offset, length } => match offset.checked_add(length).filter(|end| *end <= size) {
                Some(end) => self.replies.zero(unique, offset, end),
                None => channel.refuse(unique, Errno::INVAL),
            },
            Ask::Init { .. } => channel.refuse(unique, Errno::PROTO),
            Ask::Refuse(error) => channel.refuse(unique, error),
            Ask::Silent => {}
        }
    }

    /// The name in a LOOKUP ends with a zero byte.
    fn is_file(&self, node: u64, name: &[u8]) -> bool {
        node == ROOT_NODE && name.strip_suffix(&[0]) == Some(self.volume.as_bytes())
    }

    /// A read beyond the end of a file gives less.
    fn read(&self, unique: u64, offset: u64, length: u32, size: u64) {
        let left = size.saturating_sub(offset).min(u64::from(length));
        if left == 0 {
            return self.replies.channel().answer(unique, &[]);
        }
        self.replies.ask(unique, BlockOp::Read { address: offset, length: left as u32 }, Answer::Bytes);
    }
}
