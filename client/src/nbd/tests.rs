//! The guarantees of the NBD server, with a hand-made client on an in-memory stream. Real peers: `tests/nbd_peers.rs`.
#![allow(clippy::unwrap_used)]

use super::wire::{self, command, error, option, option_reply};
use super::*;
use crate::block::{BLOCK_BYTES, BlockError, BlockRequest, MAX_REQUEST_BYTES};
use crate::merge::Aligned;
use crate::ram::RamVolume;
use proptest::prelude::*;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

const SIZE: u64 = 64 << 20;

fn exports(ram: &Arc<RamVolume>) -> Exports {
    let exports = Exports::new();
    exports.insert("vol", Arc::new(Aligned::new(ram.clone())));
    exports
}

type Served = JoinHandle<Result<Ended, NbdError>>;

fn serve(exports: Exports, limits: Limits) -> (DuplexStream, Served) {
    let (client, server) = tokio::io::duplex(1 << 20);
    let served = tokio::spawn(async move { serve_connection(server, &exports, limits).await });
    (client, served)
}

fn option_frame(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    frame.extend(option.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame
}

fn go_payload(name: &str, wishes: &[u16]) -> Vec<u8> {
    let mut payload = (name.len() as u32).to_be_bytes().to_vec();
    payload.extend(name.as_bytes());
    payload.extend((wishes.len() as u16).to_be_bytes());
    payload.extend(wishes.iter().flat_map(|wish| wish.to_be_bytes()));
    payload
}

fn frame(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut frame = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    frame.extend(flags.to_be_bytes());
    frame.extend(kind.to_be_bytes());
    frame.extend(cookie.to_be_bytes());
    frame.extend(offset.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame
}

async fn greet(client: &mut DuplexStream) {
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    client.write_u32(3).await.unwrap();
}

async fn option_answer(client: &mut DuplexStream) -> (u32, u32, Vec<u8>) {
    assert_eq!(client.read_u64().await.unwrap(), wire::OPTION_REPLY_MAGIC);
    let (option, kind) = (client.read_u32().await.unwrap(), client.read_u32().await.unwrap());
    let mut payload = vec![0; client.read_u32().await.unwrap() as usize];
    client.read_exact(&mut payload).await.unwrap();
    (option, kind, payload)
}

/// Through GO into transmission.
async fn opened(exports: Exports, limits: Limits) -> (DuplexStream, Served) {
    let (mut client, served) = serve(exports, limits);
    greet(&mut client).await;
    client.write_all(&option_frame(option::GO, &go_payload("vol", &[]))).await.unwrap();
    while option_answer(&mut client).await.1 != option_reply::ACK {}
    (client, served)
}

async fn answer(client: &mut DuplexStream) -> (u32, u64) {
    assert_eq!(client.read_u32().await.unwrap(), wire::REPLY_MAGIC);
    (client.read_u32().await.unwrap(), client.read_u64().await.unwrap())
}

async fn ask(client: &mut DuplexStream, frame: &[u8]) -> u32 {
    client.write_all(frame).await.unwrap();
    answer(client).await.0
}

#[tokio::test]
async fn options_are_answered_and_unknown_ones_refused() {
    let (mut client, served) = serve(exports(&Arc::new(RamVolume::new(SIZE))), Limits::default());
    greet(&mut client).await;
    for (option, payload, expected) in [
        (8, vec![], option_reply::ERR_UNSUP),
        (5, vec![], option_reply::ERR_UNSUP),
        (4711, vec![1; 3000], option_reply::ERR_UNSUP),
        (option::LIST, vec![1], option_reply::ERR_INVALID),
        (option::INFO, go_payload("other", &[]), option_reply::ERR_UNKNOWN),
        (option::INFO, vec![0, 0, 1, 0], option_reply::ERR_INVALID),
        (option::GO, vec![], option_reply::ERR_INVALID),
        (option::GO, vec![0, 0, 0, 0, 0, 2, 0, 0], option_reply::ERR_INVALID),
    ] {
        client.write_all(&option_frame(option, &payload)).await.unwrap();
        assert_eq!(option_answer(&mut client).await, (option, expected, vec![]));
    }
    client.write_all(&option_frame(option::LIST, &[])).await.unwrap();
    assert_eq!(option_answer(&mut client).await, (3, option_reply::SERVER, b"\0\0\0\x03vol".to_vec()));
    assert_eq!(option_answer(&mut client).await, (3, option_reply::ACK, vec![]));
    client.write_all(&option_frame(option::ABORT, &[])).await.unwrap();
    assert_eq!(option_answer(&mut client).await.1, option_reply::ACK);
    assert_eq!(served.await.unwrap().unwrap(), Ended::ByClient);
}

#[tokio::test]
async fn info_tells_size_flags_block_sizes_and_name() {
    let ram = Arc::new(RamVolume::new(SIZE).into_read_only());
    let (mut client, _served) = serve(exports(&ram), Limits::default());
    greet(&mut client).await;
    client.write_all(&option_frame(option::INFO, &go_payload("", &[1, 3]))).await.unwrap();
    let export = option_answer(&mut client).await.2;
    assert_eq!(export[2..10], SIZE.to_be_bytes());
    assert_eq!(export[10..], 0b1_0110_1111u16.to_be_bytes(), "READ_ONLY and all that is served");
    let sizes = option_answer(&mut client).await.2;
    assert_eq!(sizes, [0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
    assert_eq!(option_answer(&mut client).await.2, [0, 1]);
    assert_eq!(option_answer(&mut client).await.1, option_reply::ACK);
}

#[tokio::test]
async fn the_old_export_name_option_opens_too_and_closes_on_an_unknown_name() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let (mut client, _served) = serve(exports(&ram), Limits::default());
    greet(&mut client).await;
    client.write_all(&option_frame(option::EXPORT_NAME, b"vol")).await.unwrap();
    assert_eq!(client.read_u64().await.unwrap(), SIZE);
    assert_eq!(client.read_u16().await.unwrap(), 0b1_0110_1101);
    assert_eq!(ask(&mut client, &frame(0, command::FLUSH, 1, 0, 0)).await, 0);

    let (mut client, served) = serve(exports(&ram), Limits::default());
    greet(&mut client).await;
    client.write_all(&option_frame(option::EXPORT_NAME, b"other")).await.unwrap();
    assert_eq!(served.await.unwrap().unwrap(), Ended::ByClient);
}

#[tokio::test]
async fn what_is_written_reads_back_at_any_alignment() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let (mut client, served) = opened(exports(&ram), Limits::default()).await;
    for (cookie, (offset, length)) in
        [(0u64, 4096usize), (777, 3), (5000, 100_000), (1 << 20, 4 << 20)].iter().enumerate()
    {
        let mut write = frame(command::FLAG_FUA, command::WRITE, cookie as u64, *offset, *length as u32);
        write.extend(std::iter::repeat_n(cookie as u8 + 1, *length));
        assert_eq!(ask(&mut client, &write).await, 0);
        assert_eq!(ask(&mut client, &frame(0, command::READ, 9, *offset, *length as u32)).await, 0);
        let mut got = vec![0; *length];
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(got, vec![cookie as u8 + 1; *length]);
    }
    assert_eq!(ask(&mut client, &frame(2, command::WRITE_ZEROES, 1, 1, 5)).await, 0);
    assert_eq!(ram.bytes_at(0, 7), [1, 0, 0, 0, 0, 0, 1]);
    let flushes = ram.flushes();
    assert_eq!(ask(&mut client, &frame(command::FLAG_FUA, command::TRIM, 1, 0, 8192)).await, 0);
    assert_eq!(ram.flushes(), flushes + 1, "a trim with forced access is followed by a flush");
    client.write_all(&frame(0, command::DISCONNECT, 0, 0, 0)).await.unwrap();
    assert_eq!(served.await.unwrap().unwrap(), Ended::ByClient);
}

#[tokio::test]
async fn every_bad_request_gets_its_error_and_the_connection_goes_on() {
    let (mut client, _served) = opened(exports(&Arc::new(RamVolume::new(SIZE))), Limits::default()).await;
    let long = MAX_REQUEST_BYTES + 1;
    let mut outside = frame(0, command::WRITE, 5, SIZE - 1, 2);
    outside.extend([1, 2]);
    for (request, expected) in [
        (frame(0, 77, 1, 0, 0), error::EINVAL),
        (frame(1 << 9, command::READ, 1, 0, 4096), error::EINVAL),
        (frame(2, command::TRIM, 1, 0, 4096), error::EINVAL),
        (frame(0, command::READ, 1, SIZE, 1), error::EINVAL),
        (frame(0, command::READ, 1, u64::MAX, 4096), error::EINVAL),
        (frame(0, command::READ, 1, 0, long), error::EINVAL),
        (frame(0, command::TRIM, 1, SIZE, u32::MAX), error::ENOSPC),
        (frame(0, command::WRITE_ZEROES, 1, u64::MAX, u32::MAX), error::ENOSPC),
        (outside, error::ENOSPC),
        (frame(0, command::READ, 1, 0, 0), 0),
    ] {
        assert_eq!(ask(&mut client, &request).await, expected, "{request:?}");
    }
    assert_eq!(ask(&mut client, &frame(0, command::WRITE, 8, 0, long)).await, error::EINVAL);
    client.write_all(&vec![0xEE; long as usize]).await.unwrap();
    assert_eq!(ask(&mut client, &frame(0, command::FLUSH, 1, 0, 0)).await, 0, "the long payload was skipped");
}

#[tokio::test]
async fn a_read_only_export_refuses_changes_with_eperm() {
    let ram = Arc::new(RamVolume::new(SIZE).into_read_only());
    let (mut client, _served) = opened(exports(&ram), Limits::default()).await;
    let mut write = frame(0, command::WRITE, 1, 0, 1);
    write.push(1);
    assert_eq!(ask(&mut client, &write).await, error::EPERM);
    assert_eq!(ask(&mut client, &frame(0, command::TRIM, 1, 0, 4096)).await, error::EPERM);
    assert_eq!(ask(&mut client, &frame(0, command::WRITE_ZEROES, 1, 0, 4096)).await, error::EPERM);
}

#[tokio::test]
async fn errors_of_the_volume_reach_the_client_by_number() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let (mut client, _served) = opened(exports(&ram), Limits::default()).await;
    for (error, number) in [(BlockError::Io, error::EIO), (BlockError::NoSpace, error::ENOSPC)] {
        ram.fail_with(Some(error));
        assert_eq!(ask(&mut client, &frame(0, command::READ, 1, 0, 4096)).await, number);
    }
}

#[tokio::test]
async fn a_superseded_process_answers_nothing() {
    let ram = Arc::new(RamVolume::new(SIZE));
    let (mut client, served) = opened(exports(&ram), Limits::default()).await;
    ram.fail_with(Some(BlockError::Superseded));
    client.write_all(&frame(0, command::READ, 1, 0, 4096)).await.unwrap();
    assert_eq!(served.await.unwrap().unwrap(), Ended::Superseded);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
}

/// Never answers, but counts what it has been given.
#[derive(Default)]
struct Silent {
    requests: AtomicUsize,
    kept: Mutex<Vec<BlockRequest>>,
}

impl BlockTarget for Silent {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_only(&self) -> bool {
        false
    }

    fn submit(&self, request: BlockRequest) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.kept.lock().unwrap().push(request);
    }
}

/// Lets every other task run until nothing can go on without input.
async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn beyond_the_window_the_socket_is_not_read() {
    for (requests, bytes, expected) in [(5, 64 << 20, 5), (1000, 3 * 4096, 3)] {
        let silent = Arc::new(Silent::default());
        let exports = Exports::new();
        exports.insert("vol", silent.clone());
        let limits = Limits { requests, bytes, ..Limits::default() };
        let (mut client, served) = opened(exports, limits).await;
        let batch: Vec<u8> = (0..50).flat_map(|cookie| frame(0, command::READ, cookie, 0, 4096)).collect();
        client.write_all(&batch).await.unwrap();
        settle().await;
        assert_eq!(silent.requests.load(Ordering::Relaxed), expected);
        let kept = std::mem::take(&mut *silent.kept.lock().unwrap());
        for request in kept {
            request.completions.complete(request.tag, Ok(vec![0; 4096].into()));
        }
        settle().await;
        assert_eq!(silent.requests.load(Ordering::Relaxed), 2 * expected, "answers open the window again");
        served.abort();
    }
}

#[tokio::test]
async fn a_client_that_leaves_gets_what_it_asked_for_first() {
    let silent = Arc::new(Silent::default());
    let exports = Exports::new();
    exports.insert("vol", silent.clone());
    let (mut client, served) = opened(exports, Limits::default()).await;
    client.write_all(&frame(0, command::FLUSH, 42, 0, 0)).await.unwrap();
    client.write_all(&frame(0, command::DISCONNECT, 0, 0, 0)).await.unwrap();
    settle().await;
    assert!(!served.is_finished(), "the flush is still under way");
    let request = silent.kept.lock().unwrap().remove(0);
    request.completions.complete(request.tag, Ok(bytes::Bytes::new()));
    assert_eq!(answer(&mut client).await, (0, 42));
    assert_eq!(served.await.unwrap().unwrap(), Ended::ByClient);
}

#[tokio::test]
async fn a_client_that_never_chooses_is_cut_off() {
    let limits = Limits { handshake: Duration::from_millis(30), ..Limits::default() };
    let (_client, served) = serve(exports(&Arc::new(RamVolume::new(SIZE))), limits);
    assert!(matches!(served.await.unwrap(), Err(NbdError::HandshakeTimeout)));
}

/// Feed `bytes` and close; the server must come to an end by itself, and at most fill its window.
fn feed(bytes: &[u8], transmission: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ram = Arc::new(RamVolume::new(16 * BLOCK_BYTES));
        let (mut client, served) = if transmission {
            opened(exports(&ram), Limits::default()).await
        } else {
            let (mut client, served) = serve(exports(&ram), Limits::default());
            greet(&mut client).await;
            (client, served)
        };
        let (mut from, mut to) = tokio::io::split(&mut client);
        let drained = async { tokio::io::copy(&mut from, &mut tokio::io::sink()).await.ok() };
        let fed = async {
            let _ = to.write_all(bytes).await;
            let _ = to.shutdown().await;
        };
        let both = async { tokio::join!(drained, fed) };
        tokio::time::timeout(Duration::from_secs(20), both).await.expect("the server closes");
        assert!(!matches!(served.await, Err(panic) if panic.is_panic()));
    });
}

fn plausible_requests() -> impl Strategy<Value = Vec<u8>> {
    let size = 16 * BLOCK_BYTES;
    let offset = prop_oneof![0..size, any::<u64>()];
    let length = prop_oneof![0..40_000u32, any::<u32>()];
    let one = (prop_oneof![0..3u16, any::<u16>()], 0..9u16, any::<u64>(), offset, length, any::<bool>());
    let one = one.prop_map(|(flags, kind, cookie, offset, length, honest)| {
        let mut bytes = frame(flags, kind, cookie, offset, length);
        if honest && kind == command::WRITE {
            bytes.resize(bytes.len() + length.min(40_000) as usize, 3);
        }
        bytes
    });
    prop::collection::vec(one, 0..12).prop_map(|frames| frames.concat())
}

fn plausible_options() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        Just(go_payload("vol", &[1, 3])),
        Just(go_payload("no", &[]))
    ];
    let one = (0..12u32, payload).prop_map(|(option, payload)| option_frame(option, &payload));
    prop::collection::vec(one, 0..8).prop_map(|frames| frames.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_hangs_or_panics_the_negotiation(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        feed(&bytes, false);
    }

    #[test]
    fn garbage_never_hangs_or_panics_the_transmission(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        feed(&bytes, true);
    }

    #[test]
    fn truncated_and_odd_options_never_hang_or_panic(bytes in plausible_options(), keep in 0.0..1.0f64) {
        let keep = (bytes.len() as f64 * keep) as usize;
        feed(&[&bytes[..keep], b"odd"].concat(), false);
        feed(&bytes, false);
    }

    #[test]
    fn truncated_and_odd_requests_never_hang_or_panic(bytes in plausible_requests(), keep in 0.0..1.0f64) {
        let keep = (bytes.len() as f64 * keep) as usize;
        feed(&bytes[..keep], true);
        feed(&bytes, true);
    }
}
