//! The part of the FUSE protocol that one file needs, as in `linux/fuse.h` (7.31 and later). Native byte order.
//!
//! ```text
//! request  u32 length | u32 opcode | u64 unique | u64 node | u32 uid, gid, pid | u16 extensions, u16 padding | body
//! answer   u32 length | i32 -errno | u64 unique | body
//! notice   u32 length | i32 number | u64 0
//! ```

use rustix::io::Errno;

/// Length of a request before its body, in bytes.
pub(super) const HEADER_BYTES: usize = 40;
/// Length of a WRITE before its payload, in bytes.
pub(super) const WRITE_HEADER_BYTES: usize = HEADER_BYTES + 40;
/// The longest read or write, in bytes: 256 pages.
pub(super) const MAX_WRITE: u32 = 1 << 20;

/// The root directory and the only file. Fixed, so that a successor knows what the kernel knows.
pub(super) const ROOT_NODE: u64 = 1;
pub(super) const FILE_NODE: u64 = 2;

const NOTIFY_RESEND: i32 = 7;

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;

const FOPEN_DIRECT_IO: u32 = 1;
const FATTR_SIZE: u32 = 1 << 3;
const FALLOC_KEEP_SIZE: u32 = 1;
const FALLOC_PUNCH_HOLE: u32 = 2;
const FALLOC_ZERO_RANGE: u32 = 16;

/// What the kernel asks, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Lookup,
    GetAttributes,
    SetAttributes {
        size: bool,
    },
    Open {
        writing: bool,
    },
    OpenDirectory,
    ReadDirectory,
    FileSystem,
    Read {
        offset: u64,
        length: u32,
    },
    /// The payload follows the header in the buffer.
    Write {
        offset: u64,
        length: u32,
    },
    Fsync,
    Zero {
        offset: u64,
        length: u64,
    },
    /// Nothing to do but to say so.
    Nod,
    /// Must not be answered.
    Silent,
    /// Answered with this error.
    Refuse(Errno),
}

/// One request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Its name; bit 63 says that it was sent before, to a process that is no more.
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) ask: Ask,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

impl Request {
    /// `None` if the frame is shorter than it says or than its opcode needs.
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        if word(frame, 0)? as usize != frame.len() {
            return None;
        }
        let (unique, node) = (long(frame, 8)?, long(frame, 16)?);
        let ask = Ask::parse(word(frame, 4)?, frame.get(HEADER_BYTES..)?)?;
        Some(Self { unique, node, ask })
    }
}

impl Ask {
    /// Opcodes in the kernel's order. Flat and long because it is a table.
    fn parse(opcode: u32, body: &[u8]) -> Option<Self> {
        Some(match opcode {
            1 => Self::Lookup,
            2 | 36 | 42 => Self::Silent,
            3 => Self::GetAttributes,
            4 => Self::SetAttributes { size: word(body, 0)? & FATTR_SIZE != 0 },
            14 => Self::Open { writing: word(body, 0)? & 3 != 0 },
            15 => Self::Read { offset: long(body, 8)?, length: word(body, 16)? },
            16 => {
                let length = word(body, 16)?;
                let payload = body.len().checked_sub(WRITE_HEADER_BYTES - HEADER_BYTES)?;
                if payload != length as usize {
                    return None;
                }
                Self::Write { offset: long(body, 8)?, length }
            }
            17 => Self::FileSystem,
            18 | 25 | 29 | 30 | 38 => Self::Nod,
            20 => Self::Fsync,
            26 => Self::init(body)?,
            27 => Self::OpenDirectory,
            28 => Self::ReadDirectory,
            43 => Self::fallocate(long(body, 8)?, long(body, 16)?, word(body, 24)?),
            _ => Self::Refuse(Errno::NOSYS),
        })
    }

    fn init(body: &[u8]) -> Option<Self> {
        let (major, minor, max_readahead) = (word(body, 0)?, word(body, 4)?, word(body, 8)?);
        let low = u64::from(word(body, 12)?);
        let high = if low & INIT_EXT != 0 { u64::from(word(body, 16)?) } else { 0 };
        Some(Self::Init { major, minor, max_readahead, flags: low | high << 32 })
    }

    /// A loop device sends discards and write-zeroes alike as holes to punch; both must read back as zeroes.
    fn fallocate(offset: u64, length: u64, mode: u32) -> Self {
        match mode & !FALLOC_KEEP_SIZE {
            FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE => Self::Zero { offset, length },
            _ => Self::Refuse(Errno::OPNOTSUPP),
        }
    }
}

/// Whether a kernel with these flags can send unanswered requests again.
pub(super) fn can_resend(flags: u64) -> bool {
    flags & HAS_RESEND != 0
}

/// The header of an answer with `body_bytes` behind it.
pub(super) fn answer_header(unique: u64, error: Option<Errno>, body_bytes: usize) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(16 + body_bytes as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.map_or(0, |error| -error.raw_os_error()).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// The notice that asks for all unanswered requests again.
pub(super) fn resend_notice() -> [u8; 16] {
    let mut notice = [0; 16];
    notice[..4].copy_from_slice(&16u32.to_ne_bytes());
    notice[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    notice
}

/// Fields of a structure, appended in order.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn words(mut self, words: &[u32]) -> Self {
        self.0.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        self
    }

    fn longs(mut self, longs: &[u64]) -> Self {
        self.0.extend(longs.iter().flat_map(|long| long.to_ne_bytes()));
        self
    }
}

/// `fuse_init_out`; `None` if the kernel speaks another protocol.
pub(super) fn init_answer(major: u32, minor: u32, max_readahead: u32, flags: u64) -> Option<Vec<u8>> {
    /// What was true of the structures above when they were written down.
    const MINOR: u32 = 41;
    const OLDEST_MINOR: u32 = 31;
    if major != 7 || minor < OLDEST_MINOR {
        return None;
    }
    let flags = flags & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXT | HAS_RESEND);
    let (max_background, congestion) = (256u16, 192u16);
    let background =
        u32::from_ne_bytes([max_background.to_ne_bytes(), congestion.to_ne_bytes()].concat().try_into().ok()?);
    let pages = (MAX_WRITE / 4096) as u16;
    let pages = u32::from_ne_bytes([pages.to_ne_bytes(), [0; 2]].concat().try_into().ok()?);
    let fields = Fields::default()
        .words(&[7, minor.min(MINOR), max_readahead, flags as u32, background, MAX_WRITE, 1, pages])
        .words(&[(flags >> 32) as u32])
        .words(&[0; 7]);
    Some(fields.0)
}

/// The `fuse_attr` of a node.
fn attributes(fields: Fields, node: u64, size: u64, read_only: bool) -> Fields {
    let mode = match (node, read_only) {
        (ROOT_NODE, _) => 0o040_500,
        (_, true) => 0o100_400,
        (_, false) => 0o100_600,
    };
    let size = if node == ROOT_NODE { 0 } else { size };
    // ino, size, blocks, three times; their nanoseconds, mode, links, uid, gid, rdev, block size, flags.
    fields.longs(&[node, size, size / 512, 0, 0, 0]).words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])
}

/// `fuse_attr_out`, valid for no time: a volume grows.
pub(super) fn attributes_answer(node: u64, size: u64, read_only: bool) -> Vec<u8> {
    attributes(Fields::default().longs(&[0]).words(&[0, 0]), node, size, read_only).0
}

/// `fuse_entry_out` of the file.
pub(super) fn entry_answer(size: u64, read_only: bool) -> Vec<u8> {
    attributes(Fields::default().longs(&[FILE_NODE, 0, 0, 0]).words(&[0, 0]), FILE_NODE, size, read_only).0
}

/// `fuse_open_out` of the file: every read and write comes through, nothing is cached.
pub(super) fn open_answer() -> Vec<u8> {
    Fields::default().longs(&[FILE_NODE]).words(&[FOPEN_DIRECT_IO, 0]).0
}

/// `fuse_open_out` of the directory.
pub(super) fn open_directory_answer() -> Vec<u8> {
    Fields::default().longs(&[ROOT_NODE]).words(&[0, 0]).0
}

/// `fuse_write_out`.
pub(super) fn write_answer(length: u32) -> [u8; 8] {
    let mut answer = [0; 8];
    answer[..4].copy_from_slice(&length.to_ne_bytes());
    answer
}

/// `fuse_statfs_out`: loop devices take their discard granularity from the block size.
pub(super) fn file_system_answer(size: u64) -> Vec<u8> {
    Fields::default().longs(&[size / 4096, 0, 0, 1, 0]).words(&[4096, 255, 4096, 0]).words(&[0; 6]).0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(opcode: u32, body: &[u8]) -> Vec<u8> {
        let header =
            Fields::default().words(&[(HEADER_BYTES + body.len()) as u32, opcode]).longs(&[99, 2]).words(&[0; 4]);
        [header.0, body.to_vec()].concat()
    }

    #[test]
    fn answers_are_as_long_as_the_kernel_wants_them() {
        assert_eq!(init_answer(7, 45, 131_072, u64::MAX).unwrap().len(), 64);
        assert_eq!(attributes_answer(2, 4096, false).len(), 104);
        assert_eq!(entry_answer(4096, true).len(), 128);
        assert_eq!(open_answer().len(), 16);
        assert_eq!(file_system_answer(4096).len(), 80);
        assert_eq!(init_answer(7, 30, 0, 0), None);
    }

    #[test]
    fn init_takes_only_the_flags_that_are_wanted() {
        let answer = init_answer(7, 45, 0, u64::MAX).unwrap();
        let flags = u64::from(word(&answer, 12).unwrap()) | u64::from(word(&answer, 32).unwrap()) << 32;
        assert_eq!(flags, 1 | 1 << 5 | 1 << 15 | 1 << 22 | 1 << 30 | 1 << 39);
        assert!(can_resend(flags));
    }

    #[test]
    fn frames_that_lie_about_their_length_are_refused() {
        let write = Fields::default().longs(&[2, 4096]).words(&[3, 0]).longs(&[0]).words(&[0, 0]).0;
        let good = frame(16, &[&write[..], b"abc"].concat());
        assert_eq!(Request::parse(&good).unwrap().ask, Ask::Write { offset: 4096, length: 3 });
        assert_eq!(Request::parse(&frame(16, &[&write[..], b"ab"].concat())), None);
        for length in 0..good.len() {
            assert_eq!(Request::parse(&good[..length]), None, "{length} bytes");
        }
        for opcode in 0..60 {
            let _ = Request::parse(&frame(opcode, &[]));
        }
    }

    #[test]
    fn holes_and_zeroes_are_zeroes_and_other_fallocates_are_refused() {
        for (mode, expected) in [
            (3, Ask::Zero { offset: 7, length: 9 }),
            (17, Ask::Zero { offset: 7, length: 9 }),
            (0, Ask::Refuse(Errno::OPNOTSUPP)),
            (8, Ask::Refuse(Errno::OPNOTSUPP)),
        ] {
            let body = Fields::default().longs(&[2, 7, 9]).words(&[mode, 0]).0;
            assert_eq!(Request::parse(&frame(43, &body)).unwrap().ask, expected);
        }
    }
}
