//! Golden frames: every request, reply and control message once, as bytes of each released version (PROTOCOL.md §8).
//!
//! Invariant: what a release wrote, this code reads; what this code writes under the same version is the same bytes. A
//! change of a frame is a new version with a file of its own beside the old one.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // The golden files are files.

use bytes::Bytes;
use lamina_protocol::codec::{DecodeError, Wire, decode, encode};
use lamina_protocol::control::{ControlReply, ControlRequest, DriverReport};
use lamina_protocol::map::VolumeMap;
use lamina_protocol::wire::{ReplyBody, RequestBody, put_reply, put_request, read_reply, read_request};
use std::collections::BTreeSet;
use std::path::PathBuf;

#[path = "golden/samples.rs"]
mod samples;
#[path = "golden/table.rs"]
mod table;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn kept(name: &str) -> std::collections::BTreeMap<String, Vec<u8>> {
    table::from_text(&std::fs::read_to_string(file(name)).unwrap())
}

/// The first word of a value's debug text: the variant's name.
fn variant(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").split(|c: char| !c.is_alphanumeric()).next().unwrap().to_owned()
}

fn frames() -> Vec<(String, Vec<u8>)> {
    let mut records = Vec::new();
    for frame in samples::requests() {
        let mut bytes = Vec::new();
        put_request(&frame, &mut bytes);
        records.push((format!("request {}", variant(&frame.body)), bytes));
    }
    for frame in samples::replies() {
        let mut bytes = Vec::new();
        put_reply(&frame, &mut bytes);
        records.push((format!("reply {}", variant(&frame.body)), bytes));
    }
    records
}

fn messages() -> Vec<(String, Vec<u8>)> {
    let requests = samples::control_requests();
    let replies = samples::control_replies();
    let mut records = vec![("map".to_owned(), encode(&samples::map()))];
    records.extend(requests.iter().map(|m| (format!("request {}", variant(m)), encode(m))));
    records.extend(replies.iter().map(|m| (format!("reply {}", variant(m)), encode(m))));
    records.push(("driver report".to_owned(), encode(&samples::driver_report())));
    records
}

/// First bytes that the decoder of this enum knows.
fn known<T: Wire>(name: &str) -> BTreeSet<u8> {
    let unknown = |tag: &u8| match decode::<T>(&[*tag]) {
        Err(DecodeError::Unknown { what, value }) => what == name && value == u64::from(*tag),
        _ => false,
    };
    (0..=u8::MAX).filter(|tag| !unknown(tag)).collect()
}

#[test]
fn frames_are_the_bytes_of_version_1_and_read_back() {
    table::check(&file("wire-v1.txt"), &frames());
    let kept = kept("wire-v1.txt");
    let (requests, replies) = (samples::requests(), samples::replies());
    assert_eq!(kept.len(), requests.len() + replies.len());
    for frame in requests {
        let bytes = kept[&format!("request {}", variant(&frame.body))].clone();
        assert_eq!(read_request(&Bytes::from(bytes)), Ok(frame));
    }
    for frame in replies {
        let bytes = kept[&format!("reply {}", variant(&frame.body))].clone();
        assert_eq!(read_reply(&Bytes::from(bytes)), Ok(frame));
    }
}

#[test]
fn control_messages_are_the_bytes_of_version_1_and_read_back() {
    table::check(&file("control-v1.txt"), &messages());
    let kept = kept("control-v1.txt");
    assert_eq!(decode::<VolumeMap>(&kept["map"]), Ok(samples::map()));
    assert_eq!(decode::<DriverReport>(&kept["driver report"]), Ok(samples::driver_report()));
    for message in samples::control_requests() {
        assert_eq!(decode::<ControlRequest>(&kept[&format!("request {}", variant(&message))]), Ok(message));
    }
    for message in samples::control_replies() {
        assert_eq!(decode::<ControlReply>(&kept[&format!("reply {}", variant(&message))]), Ok(message));
    }
}

/// A new kind needs a sample here, in `golden/samples.rs`; then `make golden`.
#[test]
fn no_kind_is_without_its_golden_bytes() {
    let kinds = |bodies: Vec<Vec<u8>>| bodies.into_iter().map(|bytes| bytes[0]).collect::<BTreeSet<u8>>();
    let requests = kinds(samples::requests().iter().map(|f| encode(&f.body)).collect());
    assert_eq!(requests, known::<RequestBody>("RequestBody"));
    let replies = kinds(samples::replies().iter().map(|f| encode(&f.body)).collect());
    assert_eq!(replies, known::<ReplyBody>("ReplyBody"));
    let requests = kinds(samples::control_requests().iter().map(encode).collect());
    assert_eq!(requests, known::<ControlRequest>("ControlRequest"));
    let replies = kinds(samples::control_replies().iter().map(encode).collect());
    assert_eq!(replies, known::<ControlReply>("ControlReply"));
}

#[test]
fn one_changed_byte_is_named_by_its_line() {
    let records = frames();
    let text = table::to_text(&records);
    assert_eq!(table::difference(&text, &text), None);
    let mut changed = records.clone();
    changed[0].1[0] ^= 1;
    assert_eq!(table::difference(&text, &table::to_text(&changed)), Some(2));
    assert_eq!(table::from_text(&text).into_iter().collect::<Vec<_>>(), {
        let mut sorted = records;
        sorted.sort();
        sorted
    });
}
