//! The negotiation: the client asks what there is and chooses an export.
//!
//! ```text
//! greeting -> client flags -> option* -> GO or EXPORT_NAME -> transmission
//!                                     -> ABORT, or the client leaves -> closed
//! ```
//! Every option gets an answer, those not known a refusal. An option's payload is at most [`MAX_OPTION_BYTES`], and the
//! caller bounds the time of the whole.

use super::wire::{self, info, option, option_reply};
use super::{Exports, NbdError};
use crate::block::BlockTarget;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest option payload that is read: names are at most 4096 bytes by the protocol, lists of wishes are short.
const MAX_OPTION_BYTES: u32 = 16 << 10;

/// What an option led to.
enum Step {
    Next,
    Serve(Arc<dyn BlockTarget>),
    Close,
}

/// Greet the client and answer its options. `None`: it left without choosing an export.
pub(super) async fn negotiate<S>(stream: &mut S, exports: &Exports) -> Result<Option<Arc<dyn BlockTarget>>, NbdError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&wire::NBD_MAGIC.to_be_bytes());
    greeting[8..16].copy_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    greeting[16..].copy_from_slice(&(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;
    let client_flags = stream.read_u32().await?;
    if client_flags & !u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES) != 0 {
        return Err(NbdError::Protocol("unknown client flags"));
    }
    if client_flags & u32::from(wire::FIXED_NEWSTYLE) == 0 {
        return Err(NbdError::Protocol("client does not speak fixed newstyle"));
    }
    let mut talk = Negotiation { stream, exports, no_zeroes: client_flags & u32::from(wire::NO_ZEROES) != 0 };
    loop {
        match talk.answer_option().await? {
            Step::Next => {}
            Step::Serve(target) => return Ok(Some(target)),
            Step::Close => return Ok(None),
        }
    }
}

struct Negotiation<'a, S> {
    stream: &'a mut S,
    exports: &'a Exports,
    no_zeroes: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Negotiation<'_, S> {
    async fn answer_option(&mut self) -> Result<Step, NbdError> {
        if self.stream.read_u64().await? != wire::OPTION_MAGIC {
            return Err(NbdError::Protocol("wrong option magic"));
        }
        let option = self.stream.read_u32().await?;
        let length = self.stream.read_u32().await?;
        if length > MAX_OPTION_BYTES {
            return Err(NbdError::Protocol("option too long"));
        }
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        match option {
            option::EXPORT_NAME => self.export_name(&payload).await,
            option::ABORT => self.abort().await,
            option::LIST => self.list(&payload).await,
            option::INFO | option::GO => self.describe(option, &payload).await,
            _ => self.reply(option, option_reply::ERR_UNSUP, &[]).await,
        }
    }

    /// The old way to choose: no way to refuse but to close.
    async fn export_name(&mut self, name: &[u8]) -> Result<Step, NbdError> {
        let name = std::str::from_utf8(name).map_err(|_| NbdError::Protocol("export name is not UTF-8"))?;
        let Some(target) = self.exports.find(name) else {
            return Ok(Step::Close);
        };
        let mut answer = Vec::with_capacity(134);
        answer.extend_from_slice(&target.size().to_be_bytes());
        answer.extend_from_slice(&wire::transmission_flags(&*target).to_be_bytes());
        if !self.no_zeroes {
            answer.resize(134, 0);
        }
        self.stream.write_all(&answer).await?;
        Ok(Step::Serve(target))
    }

    async fn abort(&mut self) -> Result<Step, NbdError> {
        // The client may close without waiting for this.
        let _ = self.reply(option::ABORT, option_reply::ACK, &[]).await;
        Ok(Step::Close)
    }

    async fn list(&mut self, payload: &[u8]) -> Result<Step, NbdError> {
        if !payload.is_empty() {
            return self.reply(option::LIST, option_reply::ERR_INVALID, &[]).await;
        }
        for name in self.exports.names() {
            let mut entry = (name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(name.as_bytes());
            self.reply(option::LIST, option_reply::SERVER, &entry).await?;
        }
        self.reply(option::LIST, option_reply::ACK, &[]).await
    }

    /// INFO and GO: describe the export; GO then serves it.
    async fn describe(&mut self, option: u32, payload: &[u8]) -> Result<Step, NbdError> {
        let Some((name, wishes)) = parse_describe(payload) else {
            return self.reply(option, option_reply::ERR_INVALID, &[]).await;
        };
        let Some(target) = self.exports.find(name) else {
            return self.reply(option, option_reply::ERR_UNKNOWN, &[]).await;
        };
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&target.size().to_be_bytes());
        export.extend_from_slice(&wire::transmission_flags(&*target).to_be_bytes());
        self.reply(option, option_reply::INFO, &export).await?;
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        sizes.extend(wire::BLOCK_SIZES.iter().flat_map(|size| size.to_be_bytes()));
        self.reply(option, option_reply::INFO, &sizes).await?;
        if wishes.contains(&info::NAME) {
            let mut answer = info::NAME.to_be_bytes().to_vec();
            answer.extend_from_slice(name.as_bytes());
            self.reply(option, option_reply::INFO, &answer).await?;
        }
        self.reply(option, option_reply::ACK, &[]).await?;
        Ok(if option == option::GO { Step::Serve(target) } else { Step::Next })
    }

    async fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) -> Result<Step, NbdError> {
        let mut frame = Vec::with_capacity(20 + payload.len());
        frame.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        frame.extend_from_slice(&option.to_be_bytes());
        frame.extend_from_slice(&kind.to_be_bytes());
        frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        frame.extend_from_slice(payload);
        self.stream.write_all(&frame).await?;
        Ok(Step::Next)
    }
}

/// The payload of INFO and GO: u32 length and name, u16 count and kinds of information asked for.
fn parse_describe(payload: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (length, rest) = payload.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let (kinds, odd) = rest.as_chunks::<2>();
    if kinds.len() != usize::from(u16::from_be_bytes(*count)) || !odd.is_empty() {
        return None;
    }
    Some((std::str::from_utf8(name).ok()?, kinds.iter().map(|kind| u16::from_be_bytes(*kind)).collect()))
}
