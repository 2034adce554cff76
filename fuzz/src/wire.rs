//! Frames of the block protocol: as they come, and with lengths and checksums made to fit, so that what lies behind the
//! checksums is reached too.

use crate::within_memory;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, checksum};
use lamina_protocol::limits::MAX_FRAME_BYTES;
use lamina_protocol::wire::{
    HEADER_BYTES, WIRE_VERSION, frame_length, put_reply, put_request, read_reply, read_request,
};

/// Decodes requests and replies. What is taken encodes to the same bytes again.
pub fn wire(bytes: &[u8]) {
    if let Ok(Some(length)) = frame_length(bytes) {
        assert!((HEADER_BYTES..=MAX_FRAME_BYTES as usize).contains(&length), "a frame of {length} bytes");
    }
    read_both(Bytes::copy_from_slice(bytes));
    if let Some(sealed) = sealed(bytes) {
        read_both(sealed);
    }
}

fn read_both(frame: Bytes) {
    let mut again = Vec::new();
    if let Ok(request) = within_memory(frame.len(), || read_request(&frame)) {
        put_request(&request, &mut again);
        assert!(again == frame, "a request that is written otherwise than it was read: {request:?}");
    }
    again.clear();
    if let Ok(reply) = within_memory(frame.len(), || read_reply(&frame)) {
        put_reply(&reply, &mut again);
        assert!(again == frame, "a reply that is written otherwise than it was read: {reply:?}");
    }
}

/// The same frame with length, version, length of the body and both checksums in order; `None` if it is too short.
fn sealed(bytes: &[u8]) -> Option<Bytes> {
    let mut frame = bytes.get(..HEADER_BYTES)?.to_vec();
    let after = &bytes[HEADER_BYTES..];
    let body = (u32::from_le_bytes(frame[12..16].try_into().ok()?) as usize).min(after.len());
    frame.extend_from_slice(after);
    let payload = &after[body..];
    let payload_crc = if payload.is_empty() { 0 } else { crc(payload) };
    let length = frame.len() as u32;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    frame[4..6].copy_from_slice(&WIRE_VERSION.to_le_bytes());
    frame[12..16].copy_from_slice(&(body as u32).to_le_bytes());
    frame[80..84].copy_from_slice(&payload_crc.to_le_bytes());
    let covered = [&frame[..HEADER_BYTES - 4], &after[..body]].concat();
    frame[84..88].copy_from_slice(&crc(&covered).to_le_bytes());
    Some(frame.into())
}

fn crc(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}
