//! What grpc-go sends when it dials a bare path, as captured, and what `h2` is given instead.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::identity::{IdentityService, Readiness};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tonic::transport::Server;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// `:method: POST`, `:scheme: http`, from the static table.
const POST_HTTP: [u8; 2] = [0x83, 0x86];
/// `%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fcsi.lamina.dev-reg.sock` in Huffman code, by Go's hpack.
const GO_AUTHORITY: &str =
    "54587b8ec545868346a8b0f5b632d054aa2c35d16cc6a91158598c84d9e95161220cbd03a4d50d790bdd6b0b32e8393aff";
/// The same with `-` for `%`, by Go's hpack.
const TAME_AUTHORITY: &str =
    "58587b8ec585868346b0b0f5b632d054ac2c35d16cc6a91158598c84d9e96161220cbd03a4d50d790bdd6b0b32e8393aff";

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

/// A literal field with an indexed or (0) literal name, both strings without Huffman code, entered into the table.
fn literal(index: u8, name: &str, value: &[u8], huffman: bool) -> Vec<u8> {
    let mut field = vec![0x40 | index];
    if index == 0 {
        field.push(u8::try_from(name.len()).unwrap());
        field.extend_from_slice(name.as_bytes());
    }
    assert!(value.len() < 127);
    field.push(u8::try_from(value.len()).unwrap() | if huffman { 0x80 } else { 0 });
    field.extend_from_slice(value);
    field
}

/// The header block of a Probe with this authority.
fn probe_fields(authority: &[u8], huffman: bool) -> Vec<u8> {
    [
        POST_HTTP.to_vec(),
        literal(4, "", b"/csi.v1.Identity/Probe", false),
        literal(1, "", authority, huffman),
        literal(0, "content-type", b"application/grpc", false),
        literal(0, "te", b"trailers", false),
    ]
    .concat()
}

fn filtered(chunks: &[&[u8]]) -> Vec<u8> {
    let mut filter = Filter::default();
    chunks.iter().for_each(|chunk| filter.take(chunk));
    [filter.passed, filter.held].concat()
}

fn conversation(headers_flags: u8, payload: &[u8]) -> Vec<u8> {
    let end_headers = 4;
    let settings = frame(4, 0, 0, &[]);
    let headers = frame(HEADERS, end_headers | headers_flags, 1, payload);
    let end_stream = 1;
    let empty_message = frame(0, end_stream, 1, &[0; 5]);
    [PREFACE, &settings, &headers, &empty_message].concat()
}

#[test]
fn a_percent_encoded_authority_becomes_one_of_the_same_length() {
    for (given, tame, huffman) in [
        (bytes_of(GO_AUTHORITY), bytes_of(TAME_AUTHORITY), true),
        (b"%2Fx%2Fy.sock".to_vec(), b"-2Fx-2Fy.sock".to_vec(), false),
        (b"localhost".to_vec(), b"localhost".to_vec(), false),
    ] {
        let given = conversation(0, &probe_fields(&given, huffman));
        assert_eq!(filtered(&[&given]), conversation(0, &probe_fields(&tame, huffman)));
    }
}

#[test]
fn padding_and_priority_do_not_hide_the_authority() {
    let wrap = |fields: &[u8]| {
        let padding = [0x25; 3];
        [&[3, 0, 0, 0, 0, 16], fields, &padding].concat()
    };
    let given = conversation(PADDED | PRIORITY, &wrap(&probe_fields(b"%2Fx", false)));
    let tame = conversation(PADDED | PRIORITY, &wrap(&probe_fields(b"-2Fx", false)));
    assert_eq!(filtered(&[&given]), tame);
}

#[test]
fn nothing_but_the_authority_changes() {
    let other = [literal(4, "", b"/a%2Fb", false), literal(0, ":authority-like", b"100%", false)].concat();
    let data = frame(0, 0, 1, b"\x41\x04%2Fx");
    let given = [conversation(0, &other), data].concat();
    assert_eq!(filtered(&[&given]), given);
}

#[test]
fn it_does_not_matter_how_the_bytes_arrive() {
    let given = conversation(0, &probe_fields(&bytes_of(GO_AUTHORITY), true));
    let whole = filtered(&[&given]);
    assert_ne!(whole, given);
    for size in 1..given.len() {
        assert_eq!(filtered(&given.chunks(size).collect::<Vec<_>>()), whole, "chunks of {size}");
    }
}

proptest! {
    #[test]
    fn garbage_passes_without_loss_or_panic(fields in proptest::collection::vec(any::<u8>(), 0..300), flags: u8) {
        let given = [PREFACE.to_vec(), frame(HEADERS, flags, 1, &fields)].concat();
        let out = filtered(&[&given]);
        prop_assert_eq!(out.len(), given.len());
        prop_assert_eq!(&out[..PREFACE.len() + FRAME_HEADER_BYTES], &given[..PREFACE.len() + FRAME_HEADER_BYTES]);
    }
}

/// Kinds of the frames that a real server answers on the stream, until it ends.
async fn kinds_answered(request: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("reg.sock");
    let socket = super::super::BoundSocket::bind(&path).await.unwrap();
    let service = IdentityService::new(watch::channel(Readiness::Ready).1).into_server();
    let router = Server::builder().add_service(service);
    let server = tokio::spawn(socket.serve(router, std::future::pending()));
    let mut client = tokio::net::UnixStream::connect(&path).await.unwrap();
    client.write_all(request).await.unwrap();
    let mut kinds = Vec::new();
    loop {
        let mut header = [0; FRAME_HEADER_BYTES];
        client.read_exact(&mut header).await.unwrap();
        let length = usize::from(header[1]) << 8 | usize::from(header[2]);
        client.read_exact(&mut vec![0; length]).await.unwrap();
        let (kind, flags, stream) = (header[3], header[4], header[8]);
        if stream == 1 {
            kinds.push(kind);
            let reset = 3;
            if kind == reset || (kind == HEADERS && flags & 1 != 0) {
                server.abort();
                return kinds;
            }
        }
    }
}

#[tokio::test]
async fn a_caller_that_names_the_socket_by_its_path_is_served() {
    let (headers, data) = (HEADERS, 0);
    for (authority, huffman) in [(bytes_of(GO_AUTHORITY), true), (b"%2Fx%2Fy.sock".to_vec(), false)] {
        let request = conversation(0, &probe_fields(&authority, huffman));
        assert_eq!(kinds_answered(&request).await, [headers, data, headers]);
    }
}
