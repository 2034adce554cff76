//! Real block devices: loop devices with sectors of 512 bytes and of 4 KiB. Skipped where none can be made.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/loops.rs"]
mod loops;

use lamina_protocol::ids::{BootId, ClusterId, DeviceId, ServerId};
use lamina_storage_node::store::{Device, DeviceError, FormatOptions, Identity, OpenOptions, format, open};
use loops::Loop;
use std::path::Path;

const IDENTITY: Identity = Identity { cluster: ClusterId(1), server: ServerId(2) };

fn open_device(path: &Path, atomic4k: Option<bool>) -> Result<Device, DeviceError> {
    let options = OpenOptions { identity: IDENTITY, boot: BootId(9), atomic4k };
    open(path, &options)?.0.start(Box::new(|_| {}))
}

fn formatted(path: &Path) {
    let options = FormatOptions {
        identity: IDENTITY,
        device: DeviceId(3),
        overwrite: false,
        create_bytes: None,
        journal_bytes: None,
    };
    format(path, &options).unwrap();
}

#[test]
fn r11_a_device_with_4k_sectors_is_written_in_place_and_one_with_512_byte_sectors_through_the_journal() {
    let test = "r11_a_device_with_4k_sectors_is_written_in_place_and_one_with_512_byte_sectors_through_the_journal";
    let dir = tempfile::tempdir().unwrap();
    for (sector_bytes, in_place) in [(4096, true), (512, false)] {
        let Some(device) = Loop::of(test, &dir.path().join(sector_bytes.to_string()), sector_bytes) else { return };
        formatted(&device.path);
        assert_eq!(open_device(&device.path, None).unwrap().stats().in_place, in_place, "{sector_bytes} bytes");
        assert!(open_device(&device.path, Some(true)).unwrap().stats().in_place, "a person's word counts");
    }
}

#[test]
fn a_block_device_that_is_held_is_busy_for_everyone_else() {
    let test = "a_block_device_that_is_held_is_busy_for_everyone_else";
    let dir = tempfile::tempdir().unwrap();
    let Some(device) = Loop::of(test, &dir.path().join("a"), 512) else { return };
    formatted(&device.path);
    let held = open_device(&device.path, None).unwrap();
    assert!(matches!(open_device(&device.path, None), Err(DeviceError::Busy)), "O_EXCL");
    drop(held);
    assert!(open_device(&device.path, None).is_ok(), "free again");
}
