//! Numbers and frames of the NBD protocol, as in its `proto.md`. Everything is big-endian.
//!
//! ```text
//! request      u32 0x25609513 | u16 flags | u16 kind | u64 cookie | u64 offset | u32 length | payload of a write
//! simple reply u32 0x67446698 | u32 error | u64 cookie | payload of a read
//! option       u64 "IHAVEOPT" | u32 option | u32 length | payload
//! option reply u64 0x3e889045565a9 | u32 option | u32 kind | u32 length | payload
//! ```

use crate::block::{BLOCK_BYTES, BlockError, BlockTarget, MAX_REQUEST_BYTES};

pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags, the server's and (same bits) the client's.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
}

pub(super) mod option_reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
}

pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

pub(super) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;

    /// Force unit access.
    pub(crate) const FLAG_FUA: u16 = 1;
    /// Zeroes must not be a hole. A volume is thin in all it does: accepted, and means nothing.
    pub(crate) const FLAG_NO_HOLE: u16 = 2;
}

pub(super) mod error {
    pub(crate) const EPERM: u32 = 1;
    pub(crate) const EIO: u32 = 5;
    pub(crate) const EINVAL: u32 = 22;
    pub(crate) const ENOSPC: u32 = 28;
}

/// Length of a request before its payload, in bytes.
pub(super) const REQUEST_BYTES: usize = 28;

/// The fixed part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    /// The client's name for it, given back with the answer.
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// `None` if the magic number is wrong: the stream cannot be understood any further.
    pub(super) fn parse(frame: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let [m0, m1, m2, m3, f0, f1, k0, k1, rest @ ..] = frame;
        let (cookie, rest) = rest.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let length = rest.first_chunk::<4>()?;
        (u32::from_be_bytes([*m0, *m1, *m2, *m3]) == REQUEST_MAGIC).then(|| Self {
            flags: u16::from_be_bytes([*f0, *f1]),
            kind: u16::from_be_bytes([*k0, *k1]),
            cookie: u64::from_be_bytes(*cookie),
            offset: u64::from_be_bytes(*offset),
            length: u32::from_be_bytes(*length),
        })
    }
}

/// A simple reply without its payload.
pub(super) fn reply_header(error: u32, cookie: u64) -> [u8; 16] {
    let mut frame = [0; 16];
    frame[..4].copy_from_slice(&REPLY_MAGIC.to_be_bytes());
    frame[4..8].copy_from_slice(&error.to_be_bytes());
    frame[8..].copy_from_slice(&cookie.to_be_bytes());
    frame
}

/// The error number that a client sees; `None` for [`BlockError::Superseded`], which is never answered.
pub(super) fn error_number(error: BlockError) -> Option<u32> {
    match error {
        BlockError::Io => Some(error::EIO),
        BlockError::NoSpace => Some(error::ENOSPC),
        BlockError::ReadOnly => Some(error::EPERM),
        BlockError::Invalid => Some(error::EINVAL),
        BlockError::Superseded => None,
    }
}

/// Transmission flags of an export.
pub(super) fn transmission_flags(target: &dyn BlockTarget) -> u16 {
    const HAS_FLAGS: u16 = 1;
    const READ_ONLY: u16 = 1 << 1;
    const SEND_FLUSH: u16 = 1 << 2;
    const SEND_FUA: u16 = 1 << 3;
    const SEND_TRIM: u16 = 1 << 5;
    const SEND_WRITE_ZEROES: u16 = 1 << 6;
    const CAN_MULTI_CONN: u16 = 1 << 8;
    let all = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN;
    if target.read_only() { all | READ_ONLY } else { all }
}

/// Least, preferred and greatest length of a request, as announced.
pub(super) const BLOCK_SIZES: [u32; 3] = [BLOCK_BYTES as u32, BLOCK_BYTES as u32, MAX_REQUEST_BYTES];
