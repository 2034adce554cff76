//! fio, writing and verifying in passes: a pass writes the hot region in random order, and reads back as it goes.

use anyhow::{Context, Result, bail};
use lamina_bench::load::Target;
use std::ops::Range;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::stage::PATIENCE;

/// What every pass writes again.
pub(crate) const HOT: Range<u64> = 0..4 << 20;
/// What is written once, in the beginning.
pub(crate) const COLD: Range<u64> = 4 << 20..12 << 20;
/// What is written by the test of full disks alone: more than a driver was promised room for before (R8).
pub(crate) const BEHIND: Range<u64> = 12 << 20..24 << 20;
/// Bytes of the volume.
pub(crate) const VOLUME_BYTES: u64 = 24 << 20;

/// Passes, until it is ended.
pub(crate) struct Load {
    end: Arc<AtomicBool>,
    passes: Arc<AtomicU32>,
    thread: JoinHandle<Result<()>>,
}

impl Load {
    pub(crate) fn start(target: &Target) -> Self {
        let (end, passes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(1)));
        let (target, stop, count) = (target.clone(), end.clone(), passes.clone());
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                write_and_verify(&target, count.load(Ordering::SeqCst) + 1)?;
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Self { end, passes, thread }
    }

    /// Waits until so many passes that begin from now on went through.
    pub(crate) fn more_passes(&self, more: u32) {
        let (wanted, begun) = (self.passes.load(Ordering::SeqCst) + 1 + more, Instant::now());
        while self.passes.load(Ordering::SeqCst) < wanted && !self.thread.is_finished() {
            assert!(begun.elapsed() < PATIENCE, "fio gets nowhere");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The number of the last pass, after all went well.
    pub(crate) fn end(self) -> u32 {
        self.end.store(true, Ordering::SeqCst);
        self.thread.join().unwrap().unwrap();
        self.passes.load(Ordering::SeqCst)
    }
}

impl Load {
    /// It ends with whatever it reads from.
    pub(crate) fn abandon(self) {
        self.end.store(true, Ordering::SeqCst);
        assert!(self.thread.join().unwrap().is_err(), "fio lost what it read from");
    }
}

/// A read that waits as long as this looks.
pub(crate) fn gets_no_answer(target: &Target) {
    let mut command = fio(target, 1, &COLD);
    let mut reading = command.args(["--rw=read", "--bs=4k"]).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let ended = reading.try_wait().unwrap();
    reading.kill().unwrap();
    reading.wait().unwrap();
    assert_eq!(ended, None, "it was answered");
}

/// The number of the pass and the address, in every 9 bytes.
fn pattern(pass: u32) -> String {
    format!("--verify_pattern=0x{:02x}%o", pass % 256)
}

fn fio(target: &Target, pass: u32, region: &Range<u64>) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=faults", "--thread=1", "--verify=pattern", "--verify_fatal=1", "--verify_state_save=0"]);
    command.args([&format!("--offset={}", region.start), &format!("--size={}", region.end - region.start)]);
    command.arg(pattern(pass));
    match target {
        Target::Nbd(socket) => {
            command.arg("--ioengine=nbd").arg(format!("--uri=nbd+unix:///?socket={}", socket.display()));
        }
        Target::Raw(path) => {
            command.arg("--ioengine=psync").arg(format!("--filename={}", path.display()));
        }
    }
    // It leaves nothing where it runs, but must be able to.
    command.current_dir(std::env::temp_dir());
    command
}

fn run(mut command: Command) -> Result<Output> {
    let done = command.output().context("start fio")?;
    if done.status.success() {
        return Ok(done);
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().take(20).collect::<Vec<_>>().join("\n");
    bail!("fio ended with {}:\n{}\n{}", done.status, text(&done.stdout), text(&done.stderr));
}

fn write_and_verify(target: &Target, pass: u32) -> Result<()> {
    let mut command = fio(target, pass, &HOT);
    command.args(["--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=100", "--verify_backlog=128"]);
    // Another order in every pass.
    command.arg(format!("--randseed={pass}"));
    run(command).map(drop)
}

/// Writes a region and flushes.
pub(crate) fn write(target: &Target, pass: u32, region: Range<u64>) -> Result<()> {
    let mut command = fio(target, pass, &region);
    command.args(["--rw=write", "--bs=4k", "--iodepth=32", "--do_verify=0", "--end_fsync=1"]);
    run(command).map(drop)
}

/// Writes one block of a region as if it stood elsewhere, and flushes.
pub(crate) fn write_displaced(target: &Target, pass: u32, region: Range<u64>) -> Result<()> {
    let mut command = fio(target, pass, &(region.start + 8192..region.start + 12288));
    command.args(["--rw=write", "--bs=4k", "--do_verify=0", "--end_fsync=1"]);
    command.arg(format!("--verify_pattern=0x{pass:02x}0000000000000000"));
    run(command).map(drop)
}

/// Reads a region back.
pub(crate) fn verify(target: &Target, pass: u32, region: Range<u64>) -> Result<()> {
    let mut command = fio(target, pass, &region);
    command.args(["--rw=read", "--bs=4k", "--iodepth=16"]);
    run(command).map(drop)
}

/// Writes all of a volume, on and on past every refusal for want of space; how many there were.
pub(crate) fn write_until_full(target: &Target, bytes: u64) -> u64 {
    let mut command = fio(target, 3, &(0..bytes));
    command.args(["--rw=write", "--bs=128k", "--iodepth=4", "--do_verify=0"]);
    past_refusals(command)
}

/// Likewise what lies behind all that is there, with what was taken read back; how many refusals there were.
pub(crate) fn write_behind(target: &Target) -> u64 {
    let mut command = fio(target, 3, &BEHIND);
    command.args(["--rw=write", "--bs=4k", "--iodepth=32"]);
    past_refusals(command)
}

fn past_refusals(mut command: Command) -> u64 {
    command.args(["--output-format=json", "--continue_on_error=io", "--ignore_error=ENOSPC,ENOSPC,ENOSPC"]);
    let done = run(command).unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let report: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    report["jobs"][0]["total_err"].as_u64().unwrap()
}
