//! Messages of the control stream, reports of drivers, maps, and what a device keeps of a volume.

use crate::within_memory;
use lamina_protocol::codec::{Wire, decode, encode};
use lamina_protocol::control::{ControlReply, ControlRequest, DriverReport};
use lamina_protocol::map::VolumeMap;
use lamina_protocol::storage_server::{VolumeBlob, read_blob};

/// The first byte chooses what the others are decoded as. What is taken encodes to the same bytes again.
pub fn control(bytes: &[u8]) {
    let Some((what, rest)) = bytes.split_first() else { return };
    match what % 5 {
        0 => same::<ControlRequest>(rest),
        1 => same::<ControlReply>(rest),
        2 => same::<DriverReport>(rest),
        3 => map(rest),
        _ => blob(rest),
    }
}

fn same<T: Wire>(bytes: &[u8]) {
    if let Ok(value) = within_memory(bytes.len(), || decode::<T>(bytes)) {
        assert!(encode(&value) == bytes, "it is written otherwise than it was read");
    }
}

/// A map's own checks take any map that can be encoded.
fn map(bytes: &[u8]) {
    same::<VolumeMap>(bytes);
    if let Ok(map) = decode::<VolumeMap>(bytes) {
        let _ = map.validate();
    }
}

fn blob(bytes: &[u8]) {
    same::<VolumeBlob>(bytes);
    let _ = read_blob(bytes);
}
