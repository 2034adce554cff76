//! A counter between drivers and a server: bytes both ways, and the requests by kind.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Kinds of requests, as numbered in the byte table of `protocol/src/wire.rs`.
pub(crate) const READ: u8 = 4;
pub(crate) const WRITE: u8 = 5;
pub(crate) const FLUSH: u8 = 7;
pub(crate) const PING: u8 = 10;
pub(crate) const CONFIRM: u8 = 11;
pub(crate) const HANDLED: u8 = 13;

/// Requests that were sent, by kind.
pub(crate) type Kinds = BTreeMap<u8, u64>;

/// Passes every connection on and counts.
pub(crate) struct Counted {
    pub(crate) address: SocketAddr,
    bytes: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
    kinds: Arc<Mutex<Kinds>>,
    task: tokio::task::JoinHandle<()>,
}

impl Counted {
    pub(crate) async fn before(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (bytes, connections) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let kinds = Arc::<Mutex<Kinds>>::default();
        let (counted, opened, seen) = (bytes.clone(), connections.clone(), kinds.clone());
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::SeqCst);
                let Ok(far) = TcpStream::connect(to).await else { continue };
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                tokio::spawn(pass(near_in, far_out, counted.clone(), Some(seen.clone())));
                tokio::spawn(pass(far_in, near_out, counted.clone(), None));
            }
        });
        Self { address, bytes, connections, kinds, task }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// What was sent since this was asked last.
    pub(crate) fn take_kinds(&self) -> Kinds {
        std::mem::take(&mut *self.kinds.lock().unwrap())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    counted: Arc<AtomicU64>,
    kinds: Option<Arc<Mutex<Kinds>>>,
) {
    let (mut buffer, mut frames) = (vec![0; 64 << 10], Frames::default());
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        counted.fetch_add(count as u64, Ordering::SeqCst);
        if let Some(kinds) = &kinds {
            frames.take(&buffer[..count], &mut kinds.lock().unwrap());
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// Where a stream of frames is: each begins with its length (4 bytes), its version (2) and its kind (1).
#[derive(Default)]
struct Frames {
    head: Vec<u8>,
    rest: usize,
}

impl Frames {
    fn take(&mut self, mut bytes: &[u8], kinds: &mut Kinds) {
        while !bytes.is_empty() {
            let wanted = if self.rest > 0 { self.rest } else { 7 - self.head.len() };
            let (these, others) = bytes.split_at(wanted.min(bytes.len()));
            bytes = others;
            if self.rest > 0 {
                self.rest -= these.len();
                continue;
            }
            self.head.extend(these);
            if let [a, b, c, d, _, _, kind] = self.head[..] {
                *kinds.entry(kind).or_default() += 1;
                self.rest = u32::from_le_bytes([a, b, c, d]) as usize - 7;
                self.head.clear();
            }
        }
    }
}
