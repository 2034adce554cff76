//! The load: what fio does to a contender, and what it says came of it.
//!
//! Every contender gets the same load by the same fio; those that speak NBD by its engine `nbd`, the raw file by `libaio`,
//! which does its flushes in the thread that fio counts. Invariant, the same flush rule for all: where the row asks for
//! none itself, a flush follows every [`FLUSH_BYTES`] of writes; Lamina's driver does that by itself (PROTOCOL.md, kept
//! writes), the others are told by fio.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Half of what a driver keeps unflushed: at that it flushes by itself.
pub const FLUSH_BYTES: u64 = 32 << 20;

/// What the load goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A server of NBD on a unix socket.
    Nbd(PathBuf),
    /// A file, opened with O_DIRECT.
    Raw(PathBuf),
}

/// One row of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// For people.
    pub name: &'static str,
    /// As fio calls it.
    pub pattern: &'static str,
    /// Bytes of one request.
    pub block: u64,
    /// Requests at a time.
    pub depth: u32,
    /// A flush follows each write.
    pub synced: bool,
}

/// The rows.
pub const WORKS: [Work; 7] = [
    Work { name: "4 KiB random read, depth 1", pattern: "randread", block: 4096, depth: 1, synced: false },
    Work { name: "4 KiB random read, depth 32", pattern: "randread", block: 4096, depth: 32, synced: false },
    Work { name: "4 KiB random write, depth 1", pattern: "randwrite", block: 4096, depth: 1, synced: false },
    Work { name: "4 KiB random write, depth 32", pattern: "randwrite", block: 4096, depth: 32, synced: false },
    Work { name: "4 KiB random write + fsync, depth 1", pattern: "randwrite", block: 4096, depth: 1, synced: true },
    Work { name: "1 MiB sequential read, depth 4", pattern: "read", block: 1 << 20, depth: 4, synced: false },
    Work { name: "1 MiB sequential write, depth 4", pattern: "write", block: 1 << 20, depth: 4, synced: false },
];

/// Random writes of 4 KiB, for so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes {
    /// Bytes from the beginning of the volume that they go to; every block once before any is written again.
    pub region: u64,
    /// At a time.
    pub depth: u32,
    /// What is measured.
    pub time: Duration,
    /// Before that, not measured.
    pub before: Duration,
}

/// What one run of fio measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Reads and writes; flushes are not counted.
    pub requests: u64,
    /// Requests a second.
    pub rate: f64,
    /// Median latency, microseconds; of a row with flushes that of the write plus that of the flush.
    pub p50: f64,
    /// 99th percentile, likewise.
    pub p99: f64,
    /// Longest of all, likewise: while something is killed, how long nothing came back.
    pub longest: f64,
    /// CPU time of fio itself.
    pub client_cpu: Duration,
}

impl Target {
    /// Fills all of it once, so that rows overwrite and read what is there.
    ///
    /// # Errors
    /// fio's.
    pub fn fill(&self, bytes: u64) -> Result<()> {
        let mut command = self.fio(bytes);
        command.args(["--rw=write", "--bs=1M", "--iodepth=4", "--end_fsync=1"]);
        run(command).map(drop)
    }

    /// Runs a row for so long.
    ///
    /// # Errors
    /// fio's.
    pub fn run(&self, work: Work, bytes: u64, time: Duration) -> Result<Outcome> {
        let mut command = self.fio(bytes);
        command.arg(format!("--rw={}", work.pattern)).arg(format!("--bs={}", work.block));
        command.arg(format!("--iodepth={}", work.depth));
        command.args(["--norandommap", "--randrepeat=0", "--time_based"]);
        command.arg(format!("--runtime={}ms", time.as_millis()));
        if work.synced || work.pattern.ends_with("write") {
            let every = if work.synced { 1 } else { FLUSH_BYTES / work.block };
            let flush = if matches!(self, Self::Raw(_)) { "fdatasync" } else { "fsync" };
            command.arg(format!("--{flush}={every}"));
        }
        outcome(&run(command)?, work)
    }

    /// Random writes.
    ///
    /// # Errors
    /// fio's.
    pub fn write(&self, writes: Writes) -> Result<Outcome> {
        let Writes { region, depth, time, before } = writes;
        let mut command = self.fio(region);
        command.args(["--rw=randwrite", "--bs=4096", "--randrepeat=0", "--time_based"]);
        command.arg(format!("--iodepth={depth}")).arg(format!("--fsync={}", FLUSH_BYTES / 4096));
        command.arg(format!("--runtime={}ms", time.as_millis()));
        if !before.is_zero() {
            command.arg(format!("--ramp_time={}ms", before.as_millis()));
        }
        let work = Work { name: "writes", pattern: "randwrite", block: 4096, depth, synced: false };
        outcome(&run(command)?, work)
    }

    fn fio(&self, bytes: u64) -> Command {
        let mut command = Command::new("fio");
        command.args([
            "--name=bench",
            "--thread=1",
            "--output-format=json",
            "--clat_percentiles=0",
            "--lat_percentiles=1",
        ]);
        command.arg(format!("--size={bytes}"));
        match self {
            Self::Nbd(socket) => {
                command.arg("--ioengine=nbd").arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
            }
            Self::Raw(path) => {
                command.args(["--ioengine=libaio", "--direct=1"]).arg(format!("--filename={}", path.display()))
            }
        };
        command
    }
}

fn run(mut command: Command) -> Result<Value> {
    let done = command.output().context("start fio")?;
    let text = String::from_utf8_lossy(&done.stdout);
    if !done.status.success() {
        bail!("fio ended with {}: {}{}", done.status, text, String::from_utf8_lossy(&done.stderr));
    }
    // Its notes come before the object.
    let json = &text[text.find('{').context("fio printed no object")?..];
    serde_json::from_str(json).context("fio's object")
}

fn outcome(report: &Value, work: Work) -> Result<Outcome> {
    let job = &report["jobs"][0];
    let side = if work.pattern.ends_with("read") { &job["read"] } else { &job["write"] };
    let number =
        |of: &Value, path: &str| of.pointer(path).and_then(Value::as_f64).with_context(|| format!("{path} of fio"));
    let requests = number(side, "/total_ios")?;
    let percent = number(job, "/usr_cpu")? + number(job, "/sys_cpu")?;
    let runtime = number(job, "/job_runtime")? / 1000.0;
    let latency = |name: &str| -> Result<f64> {
        let flush = if work.synced { number(&job["sync"], &format!("/lat_ns/{name}"))? } else { 0.0 };
        Ok((number(side, &format!("/lat_ns/{name}"))? + flush) / 1000.0)
    };
    anyhow::ensure!(requests > 0.0, "fio did nothing");
    Ok(Outcome {
        requests: requests as u64,
        rate: number(side, "/iops")?,
        p50: latency("percentile/50.000000")?,
        p99: latency("percentile/99.000000")?,
        longest: latency("max")?,
        client_cpu: Duration::from_secs_f64(percent / 100.0 * runtime),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn report() -> Value {
        let percentile =
            |p50: u32, p99: u32| json!({"percentile": {"50.000000": p50, "99.000000": p99}, "max": 2 * p99});
        json!({"jobs": [{
            "usr_cpu": 10.0, "sys_cpu": 15.0, "job_runtime": 2000,
            "write": {"total_ios": 100, "iops": 50.0, "lat_ns": percentile(1000, 3000)},
            "sync": {"lat_ns": percentile(40_000, 50_000)},
        }]})
    }

    #[test]
    fn a_flush_counts_to_the_latency_of_its_write_and_not_as_a_request() {
        let synced = outcome(&report(), WORKS[4]).unwrap();
        assert_eq!((synced.requests, synced.p50, synced.p99), (100, 41.0, 53.0));
        assert_eq!(synced.client_cpu, Duration::from_millis(500));
        let plain = outcome(&report(), WORKS[2]).unwrap();
        assert_eq!((plain.p50, plain.longest), (1.0, 6.0));
    }

    #[test]
    fn a_report_without_the_row_is_an_error_never_a_zero() {
        assert!(outcome(&report(), WORKS[0]).is_err());
        let mut none = report();
        none["jobs"][0]["write"]["total_ios"] = json!(0);
        assert!(outcome(&none, WORKS[2]).is_err());
    }
}
