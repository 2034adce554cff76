//! The guarantees of the device holder.
#![allow(clippy::unwrap_used)]

use super::*;
use rustix::io::{read, write};
use std::path::PathBuf;
use std::time::Instant;

struct Running {
    dir: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Running {
    fn start() -> Self {
        let mut running = Self { dir: tempfile::tempdir().unwrap(), runtime: None };
        running.restart();
        running
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("holder.sock")
    }

    /// A new, empty holder at the same place. (Threads of old connections end with those.)
    fn restart(&mut self) {
        self.runtime = None;
        let _ = std::fs::remove_file(self.socket());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let socket = self.socket();
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(socket).unwrap() });
        runtime.spawn(Holder::new().serve(listener));
        self.runtime = Some(runtime);
    }

    fn client(&self) -> HolderClient {
        HolderClient::connect(&self.socket()).unwrap()
    }
}

/// Both ends of a pipe: what is written to a descriptor that came back shows at the other end.
fn pipe() -> (OwnedFd, Arc<OwnedFd>) {
    let (from, to) = rustix::pipe::pipe().unwrap();
    (from, Arc::new(to))
}

fn says(from: &OwnedFd, to: &OwnedFd, byte: u8) {
    write(to, &[byte]).unwrap();
    let mut got = [0];
    assert_eq!(read(from, &mut got).unwrap(), 1);
    assert_eq!(got, [byte]);
}

#[test]
fn a_descriptor_and_its_state_outlive_the_process_that_put_them() {
    let holder = Running::start();
    let (from, to) = pipe();
    let first = holder.client();
    first.put("vol-a", to, b"one".to_vec()).unwrap();
    first.update("vol-a", b"two".to_vec()).unwrap();
    assert_eq!(first.list().unwrap(), ["vol-a"]);
    drop(first);
    let second = holder.client();
    let Taken { fd: to, state } = second.take("vol-a").unwrap().unwrap();
    assert_eq!(state, b"two");
    says(&from, &to, 7);
    assert!(second.take("vol-b").unwrap().is_none());
    second.release("vol-a").unwrap();
    assert!(second.list().unwrap().is_empty());
    drop((second, to));
    let mut rest = [0];
    assert_eq!(read(&from, &mut rest).unwrap(), 0, "released means closed");
}

#[test]
fn a_taker_waits_until_the_last_one_is_gone() {
    let holder = Running::start();
    let first = holder.client();
    first.put("vol", pipe().1, vec![]).unwrap();
    let second = holder.client();
    let taker = std::thread::spawn(move || (second.take("vol").unwrap().is_some(), Instant::now()));
    std::thread::sleep(PATIENCE / 4);
    assert!(!taker.is_finished());
    let left = Instant::now();
    drop(first);
    let (got, when) = taker.join().unwrap();
    assert!(got && when >= left);
}

#[test]
fn what_belongs_to_another_process_cannot_be_changed() {
    let holder = Running::start();
    let (first, second) = (holder.client(), holder.client());
    first.put("vol", pipe().1, vec![]).unwrap();
    assert!(matches!(second.put("vol", pipe().1, vec![]), Err(HolderError::Exists)));
    assert!(matches!(second.update("vol", vec![]), Err(HolderError::NotYours)));
    assert!(matches!(second.release("vol"), Err(HolderError::NotYours)));
    assert!(matches!(second.put("big", pipe().1, vec![0; 1 << 20]), Err(HolderError::Unreachable(_))));
}

#[test]
fn garbage_is_cut_off_and_the_holder_goes_on() {
    use std::io::{Read, Write};
    let holder = Running::start();
    for garbage in [&[0xFF; 40][..], &[0; 40], &[2, 0, 0, 0, 99, 0, 0], &[4, 0, 0, 0, 1, 9, 9, 0, 0]] {
        let mut stream = UnixStream::connect(holder.socket()).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    holder.client().put("vol", pipe().1, vec![]).unwrap();
}

#[test]
fn a_new_holder_gets_everything_again() {
    let mut holder = Running::start();
    let (from, to) = pipe();
    let first = holder.client();
    first.put("vol", to, b"state".to_vec()).unwrap();
    // The old holder's thread for this client ends when the connection does; break it as the holder's end would.
    holder.restart();
    first.lose_connection();
    let other = holder.client();
    let deadline = Instant::now() + Duration::from_secs(10);
    while other.list().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the client puts its device again");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(first);
    let Taken { fd: to, state } = other.take("vol").unwrap().unwrap();
    assert_eq!(state, b"state");
    says(&from, &to, 9);
}
