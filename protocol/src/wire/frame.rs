//! Frames to bytes and back; the byte table is in the parent module.

use super::{
    Class, HEADER_BYTES, HandleId, ReplyFrame, ReplyHeader, RequestBody, RequestFrame, RequestHeader, RequestId,
    WIRE_VERSION,
};
use crate::codec::{DecodeError, Reader, Wire};
use crate::ids::{BootId, Generation, Seq, ServerId};
use crate::limits::MAX_FRAME_BYTES;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest, checksum};

/// Why bytes are not a frame: close the connection.
pub type Framing = DecodeError;

fn crc(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    digest.finalize() as u32
}

/// CRC-32C of a payload, 0 if there is none.
fn payload_crc(payload: &[u8]) -> u32 {
    if payload.is_empty() { 0 } else { checksum(CrcAlgorithm::Crc32Iscsi, payload) as u32 }
}

/// The length of the frame that starts here, once its first four bytes are there. An error closes the connection before
/// anything of that length is allocated.
pub fn frame_length(start: &[u8]) -> Result<Option<usize>, Framing> {
    let Some(bytes) = start.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*bytes);
    if length < HEADER_BYTES as u32 || length > MAX_FRAME_BYTES {
        return Err(DecodeError::OutOfRange { what: "frame length", value: length.into() });
    }
    Ok(Some(length as usize))
}

/// The eight numbers of a header that differ between requests and replies.
struct Numbers {
    request: u64,
    handle: u64,
    id: u128,
    generation: u64,
    second: u64,
    seq: u64,
    confirmed: u64,
}

/// Everything but the payload. The body comes first, so that nothing but the frame itself is allocated: its tag falls on
/// the header's last byte, where it is read before the header is put over it.
fn put_head(out: &mut Vec<u8>, class: Class, numbers: &Numbers, body: &impl Wire, payload: &[u8]) {
    let start = out.len();
    out.resize(start + HEADER_BYTES - 1, 0);
    body.put(out);
    let kind = out[start + HEADER_BYTES - 1];
    let body_bytes = out.len() - start - HEADER_BYTES;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&((HEADER_BYTES + body_bytes + payload.len()) as u32).to_le_bytes());
    header[4..6].copy_from_slice(&WIRE_VERSION.to_le_bytes());
    header[6] = kind;
    header[8] = class_byte(class);
    header[12..16].copy_from_slice(&(body_bytes as u32).to_le_bytes());
    header[16..24].copy_from_slice(&numbers.request.to_le_bytes());
    header[24..32].copy_from_slice(&numbers.handle.to_le_bytes());
    header[32..48].copy_from_slice(&numbers.id.to_le_bytes());
    let rest = [numbers.generation, numbers.second, numbers.seq, numbers.confirmed];
    for (place, number) in header[48..80].chunks_mut(8).zip(rest) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    header[80..84].copy_from_slice(&payload_crc(payload).to_le_bytes());
    let header_crc = crc(&[&header[..HEADER_BYTES - 4], &out[start + HEADER_BYTES..]]);
    header[84..].copy_from_slice(&header_crc.to_le_bytes());
    out[start..start + HEADER_BYTES].copy_from_slice(&header);
}

fn class_byte(class: Class) -> u8 {
    match class {
        Class::Foreground => 1,
        Class::Fill => 2,
        Class::Scrub => 3,
    }
}

struct Parts<'a> {
    kind: u8,
    class: Class,
    numbers: Numbers,
    body: &'a [u8],
    payload: Bytes,
}

fn zero(what: &'static str, value: u64) -> Result<(), Framing> {
    if value == 0 { Ok(()) } else { Err(DecodeError::Unknown { what, value }) }
}

fn read_frame(frame: &Bytes) -> Result<Parts<'_>, Framing> {
    let mut reader = Reader::new(frame);
    let length = u32::take(&mut reader)? as usize;
    if length != frame.len() {
        return Err(DecodeError::Truncated { at: frame.len() });
    }
    let version = u16::take(&mut reader)?;
    if version != WIRE_VERSION {
        return Err(DecodeError::Unknown { what: "wire version", value: version.into() });
    }
    let kind = u8::take(&mut reader)?;
    zero("flags", u8::take(&mut reader)?.into())?;
    let class = Class::take(&mut reader)?;
    for byte in reader.take(3)? {
        zero("reserved byte", (*byte).into())?;
    }
    let body_length = u32::take(&mut reader)? as usize;
    let numbers = Numbers {
        request: u64::take(&mut reader)?,
        handle: u64::take(&mut reader)?,
        id: u128::take(&mut reader)?,
        generation: u64::take(&mut reader)?,
        second: u64::take(&mut reader)?,
        seq: u64::take(&mut reader)?,
        confirmed: u64::take(&mut reader)?,
    };
    let payload_checksum = u32::take(&mut reader)?;
    let header_checksum = u32::take(&mut reader)?;
    let body = reader.take(body_length)?;
    if crc(&[&frame[..HEADER_BYTES - 4], body]) != header_checksum {
        return Err(DecodeError::Checksum { what: "header" });
    }
    let payload = frame.slice(HEADER_BYTES + body_length..);
    if payload_crc(&payload) != payload_checksum {
        return Err(DecodeError::Checksum { what: "payload" });
    }
    Ok(Parts { kind, class, numbers, body, payload })
}

fn read_body<T: Wire>(kind: u8, body: &[u8]) -> Result<T, Framing> {
    let mut reader = Reader::tagged(kind, body);
    let value = T::take(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

/// Appends a request.
pub fn put_request(frame: &RequestFrame, out: &mut Vec<u8>) {
    put_request_head(frame, out);
    out.extend_from_slice(&frame.payload);
}

/// Appends a request without its payload, which must follow: a sender of large payloads does not copy them.
pub fn put_request_head(frame: &RequestFrame, out: &mut Vec<u8>) {
    let h = &frame.header;
    let numbers = Numbers {
        request: h.request.0,
        handle: h.handle.0,
        id: h.target.0,
        generation: h.generation.0,
        second: h.shared_generation.0,
        seq: h.seq.0,
        confirmed: h.confirmed.0,
    };
    put_head(out, h.class, &numbers, &frame.body, &frame.payload);
}

/// Appends a reply.
pub fn put_reply(frame: &ReplyFrame, out: &mut Vec<u8>) {
    put_reply_head(frame, out);
    out.extend_from_slice(&frame.payload);
}

/// Appends a reply without its payload, which must follow: a sender of large payloads does not copy them.
pub fn put_reply_head(frame: &ReplyFrame, out: &mut Vec<u8>) {
    let h = &frame.header;
    let numbers = Numbers {
        request: h.request.0,
        handle: h.handle.0,
        id: h.boot.0,
        generation: h.generation.0,
        second: h.credit,
        seq: h.token.0,
        confirmed: 0,
    };
    put_head(out, h.class, &numbers, &frame.body, &frame.payload);
}

/// Reads one whole request frame; its payload shares the frame's memory.
pub fn read_request(frame: &Bytes) -> Result<RequestFrame, Framing> {
    let parts = read_frame(frame)?;
    let n = parts.numbers;
    let header = RequestHeader {
        request: RequestId(n.request),
        handle: HandleId(n.handle),
        class: parts.class,
        target: ServerId(n.id),
        generation: Generation(n.generation),
        shared_generation: Generation(n.second),
        seq: Seq(n.seq),
        confirmed: Seq(n.confirmed),
    };
    let body: RequestBody = read_body(parts.kind, parts.body)?;
    let expected = if let RequestBody::Write { place } = &body { place.length as usize } else { 0 };
    if parts.payload.len() != expected {
        return Err(DecodeError::OutOfRange { what: "payload length", value: parts.payload.len() as u64 });
    }
    Ok(RequestFrame { header, body, payload: parts.payload })
}

/// Reads one whole reply frame; its payload shares the frame's memory.
pub fn read_reply(frame: &Bytes) -> Result<ReplyFrame, Framing> {
    let parts = read_frame(frame)?;
    let n = parts.numbers;
    zero("reserved number", n.confirmed)?;
    let header = ReplyHeader {
        request: RequestId(n.request),
        handle: HandleId(n.handle),
        class: parts.class,
        boot: BootId(n.id),
        generation: Generation(n.generation),
        credit: n.second,
        token: Seq(n.seq),
    };
    Ok(ReplyFrame { header, body: read_body(parts.kind, parts.body)?, payload: parts.payload })
}

#[cfg(test)]
mod tests {
    use super::super::{Place, ReplyBody};
    use super::*;
    use crate::ids::LayerId;
    use proptest::prelude::*;

    fn write() -> RequestFrame {
        let place = Place { layer: LayerId(7), group: 1, page: 3, offset: 4096, length: 4096 };
        let header = RequestHeader {
            request: RequestId(9),
            handle: HandleId(2),
            generation: Generation(5),
            seq: Seq(11),
            confirmed: Seq(10),
            ..RequestHeader::default()
        };
        RequestFrame { header, body: RequestBody::Write { place }, payload: Bytes::from(vec![0xab; 4096]) }
    }

    fn bytes_of(frame: &RequestFrame) -> Vec<u8> {
        let mut out = Vec::new();
        put_request(frame, &mut out);
        out
    }

    #[test]
    fn a_frame_reads_back() {
        let bytes = bytes_of(&write());
        assert_eq!(frame_length(&bytes), Ok(Some(bytes.len())));
        assert_eq!(read_request(&Bytes::from(bytes)), Ok(write()));
        let reply = ReplyFrame {
            header: ReplyHeader { credit: 3, token: Seq(11), boot: BootId(1), ..ReplyHeader::default() },
            body: ReplyBody::BadBlock { blocks: vec![0, 2] },
            payload: Bytes::from_static(b"abc"),
        };
        let mut out = Vec::new();
        put_reply(&reply, &mut out);
        assert_eq!(read_reply(&Bytes::from(out)), Ok(reply));
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let bytes = bytes_of(&write());
        for at in (0..bytes.len()).step_by(7) {
            let mut broken = bytes.clone();
            broken[at] ^= 1 << (at % 8);
            assert!(read_request(&Bytes::from(broken)).is_err(), "byte {at}");
        }
    }

    #[test]
    fn an_oversized_length_is_refused_at_its_first_four_bytes() {
        assert!(frame_length(&u32::MAX.to_le_bytes()).is_err());
        assert!(frame_length(&3u32.to_le_bytes()).is_err());
        assert_eq!(frame_length(&[1, 2]), Ok(None));
    }

    #[test]
    fn another_version_is_refused_and_named() {
        let mut bytes = bytes_of(&write());
        bytes[4] = 9;
        assert_eq!(read_request(&Bytes::from(bytes)), Err(DecodeError::Unknown { what: "wire version", value: 9 }));
    }

    proptest! {
        #[test]
        fn garbage_and_truncation_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 0usize..4000) {
            let _ = read_request(&Bytes::from(bytes.clone()));
            let _ = read_reply(&Bytes::from(bytes));
            let whole = bytes_of(&write());
            let part = Bytes::copy_from_slice(&whole[..cut.min(whole.len() - 1)]);
            prop_assert!(read_request(&part).is_err());
        }
    }
}
