//! The NBD server against clients that others wrote: libnbd, qemu, fio. Loopback and unix sockets only.
//!
//! A test whose client is not installed prints `skipped` with the Debian package that has it.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use lamina_client::merge::Aligned;
use lamina_client::nbd::{Exports, Limits, serve_tcp, serve_unix};
use lamina_client::ram::RamVolume;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use tokio::sync::oneshot;

const SIZE: usize = 64 << 20;

/// A server in a thread of its own; ends when dropped.
struct Server {
    ram: Arc<RamVolume>,
    tcp: String,
    unix: String,
    dir: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(ram: RamVolume) -> Self {
        let ram = Arc::new(ram);
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let exports = Arc::new(Exports::new());
        exports.insert("vol", Arc::new(Aligned::new(ram.clone())));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let tcp = format!("nbd://127.0.0.1:{}/vol", listener.local_addr().unwrap().port());
        let unix = format!("nbd+unix:///vol?socket={}", socket.display());
        let unix_listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        unix_listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let tcp = tokio::net::TcpListener::from_std(listener).unwrap();
                let unix = tokio::net::UnixListener::from_std(unix_listener).unwrap();
                tokio::select! {
                    () = serve_tcp(tcp, exports.clone(), Limits::default()) => {}
                    () = serve_unix(unix, exports, Limits::default()) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { ram, tcp, unix, dir, stop: Some(stop), thread: Some(thread) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Bytes that differ everywhere, in a file.
    fn image(&self, name: &str) -> (PathBuf, Vec<u8>) {
        let words = (0..SIZE as u64 / 8).map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let path = self.file(name);
        std::fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn installed(test: &str, program: &str, package: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|paths| std::env::split_paths(&paths).any(|directory| directory.join(program).is_file()));
    if !found {
        println!("skipped {test}: {program} is not installed (Debian package {package})");
    }
    found
}

/// Run to the end within a minute; what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    // Debian's libnbd module belongs to Debian's Python; fio leaves files where it runs.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("timeout");
    command.args(["60", program]).args(arguments).env("PATH", path).current_dir(std::env::temp_dir());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}\n{err}", output.status);
    out
}

#[test]
fn nbdinfo_sees_size_block_sizes_and_abilities() {
    if !installed("nbdinfo", "nbdinfo", "libnbd-bin") {
        return;
    }
    for read_only in [false, true] {
        let ram = RamVolume::new(SIZE as u64);
        let server = Server::start(if read_only { ram.into_read_only() } else { ram });
        for uri in [&server.tcp, &server.unix] {
            let json = run("nbdinfo", &["--json", uri]);
            let export_size = format!("\"export-size\": {SIZE}");
            let is_read_only = format!("\"is_read_only\": {read_only}");
            for fact in [
                &export_size,
                &is_read_only,
                "\"can_multi_conn\": true",
                "\"can_flush\": true",
                "\"can_fua\": true",
                "\"can_trim\": true",
                "\"can_zero\": true",
                "\"block_size_minimum\": 4096",
                "\"block_size_preferred\": 4096",
                "\"block_size_maximum\": 33554432",
            ] {
                assert!(json.contains(fact), "{fact} is missing in {json}");
            }
        }
        assert!(run("nbdinfo", &["--list", &server.tcp]).contains("export=\"vol\""));
    }
}

#[test]
fn nbdcopy_copies_in_and_out_over_several_connections() {
    if !installed("nbdcopy", "nbdcopy", "libnbd-bin") {
        return;
    }
    let server = Server::start(RamVolume::new(SIZE as u64));
    let (image, bytes) = server.image("in");
    run("nbdcopy", &["--connections=4", "--requests=64", "--flush", image.to_str().unwrap(), &server.tcp]);
    assert!(server.ram.bytes_at(0, SIZE) == bytes, "the volume holds the image");
    assert!(server.ram.flushes() > 0, "a flush was asked for");
    let out = server.file("out");
    std::fs::File::create(&out).unwrap();
    run("nbdcopy", &["--connections=4", &server.unix, out.to_str().unwrap()]);
    assert!(std::fs::read(&out).unwrap() == bytes, "the copy is the image");
}

#[test]
fn qemu_img_converts_to_the_export_and_finds_no_difference() {
    if !installed("qemu_img", "qemu-img", "qemu-utils") {
        return;
    }
    let server = Server::start(RamVolume::new(SIZE as u64));
    let (image, bytes) = server.image("in");
    let image = image.to_str().unwrap();
    run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, &server.unix]);
    assert!(server.ram.bytes_at(0, SIZE) == bytes);
    let compared = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &server.tcp]);
    assert!(compared.contains("identical"), "{compared}");
}

#[test]
fn qemu_io_patterns_discards_zeroes_and_odd_addresses_read_back() {
    if !installed("qemu_io", "qemu-io", "qemu-utils") {
        return;
    }
    let server = Server::start(RamVolume::new(SIZE as u64));
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 100 5000",
        "aio_write -P 0x33 2M 4M",
        "aio_flush",
        "write -z 8192 4096",
        "write -z 20000 3",
        "discard 2M 1M",
        "flush",
        "read -P 0x11 0 100",
        "read -P 0x22 100 5000",
        "read -P 0x11 5100 3092",
        "read -P 0 8192 4096",
        "read -P 0 20000 3",
        "read -P 0x11 20003 4093",
        "read -P 0 2M 1M",
        "read -P 0x33 3M 3M",
    ];
    let mut arguments = vec!["-f", "raw", "-t", "none", "-d", "unmap"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&server.tcp);
    let printed = run("qemu-io", &arguments);
    assert!(!printed.contains("failed"), "{printed}");
    assert_eq!(server.ram.bytes_at(99, 2), [0x11, 0x22]);
    assert_eq!(server.ram.bytes_at(2 << 20, 4096), [0; 4096]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !installed("fio_verifies", "fio", "fio") {
        return;
    }
    if !run("fio", &["--enghelp"]).lines().any(|line| line.trim() == "nbd") {
        println!("skipped fio_verifies: this fio has no nbd engine");
        return;
    }
    let server = Server::start(RamVolume::new(SIZE as u64));
    let uri = format!("--uri={}", server.unix);
    let mut arguments = vec!["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--verify=crc32c", "--fsync=64"];
    arguments.extend([&uri, "--verify_fatal=1", "--bs=4k", "--iodepth=32", "--size=16M", "--verify_state_save=0"]);
    run("fio", &arguments);
    assert!(server.ram.bytes_at(0, 16 << 20).iter().any(|byte| *byte != 0), "fio wrote");
}

/// libnbd told to ignore the announced block size, as older clients do: four connections write the four quarters of the
/// same blocks at once, and each finds its own bytes again.
const SECTORS: &str = r#"
import random
random.seed(7)
uri = URI
handles = []
for lane in range(4):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri(uri)
    handles.append(h)
buffers = []
for block in range(200):
    for lane, h in enumerate(handles):
        data = bytearray([random.randrange(256)]) * 1024
        at = block * 4096 + lane * 1024
        buffers.append((h, at, data, h.aio_pwrite(nbd.Buffer.from_bytearray(data), at)))
for h, at, data, cookie in buffers:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
for h, at, data, cookie in buffers:
    assert handles[0].pread(1024, at) == data, at
handles[1].zero(700, 4000)
assert handles[2].pread(700, 4000) == bytearray(700)
for h in handles:
    h.flush()
    h.shutdown()
"#;

#[test]
fn writers_of_parts_of_the_same_blocks_on_four_connections_lose_nothing() {
    if !installed("sectors_on_four_connections", "nbdsh", "python3-libnbd") {
        return;
    }
    let server = Server::start(RamVolume::new(SIZE as u64));
    for uri in [&server.tcp, &server.unix] {
        run("nbdsh", &["-c", &SECTORS.replace("URI", &format!("{uri:?}"))]);
    }
}
