//! What replication costs: sync bits, an outage, the gap when a server is lost, a fill beside foreground writes.
//!
//! Invariant: each part has a cluster of its own on loopback, and says what it did beside what it measured, so that a
//! ratio of nothing cannot pass for a good one: a load too slow to write its region is an error, and a fill that was over
//! before the load gives no figure. Aims are shown, never asserted.

use crate::figures::Spread;
use crate::lamina::{Cluster, Export, Mode, Shape};
use crate::load::{Outcome, Writes};
use anyhow::{Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

mod cold;
mod fill;
mod gap;
mod outage;

/// Where the clusters stand, and how much is done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where Lamina's programs are.
    pub programs: PathBuf,
    /// Where devices lie.
    pub folder: PathBuf,
    /// Rounds of what is compared.
    pub rounds: usize,
    /// Of each measured run.
    pub time: Duration,
    /// Bytes of the volume of each part.
    pub volume_bytes: u64,
    /// How long the server is away in the part about an outage.
    pub away: Duration,
    /// Servers killed, one after the other.
    pub kills: usize,
    /// Servers stopped silently, one after the other.
    pub stops: usize,
}

/// A part by its name: measures, and gives its table.
pub type Part = (&'static str, fn(&Settings) -> Result<String>);

/// The parts.
pub const PARTS: [Part; 4] =
    [("cold", cold::measure), ("outage", outage::measure), ("gap", gap::measure), ("fill", fill::measure)];

/// Longest time until a volume is whole again.
const WHOLE: Duration = Duration::from_secs(600);

/// A cluster of so many servers with an exported, written volume of two copies.
struct Stand {
    cluster: Cluster,
    export: Export,
}

impl Stand {
    fn new(settings: &Settings, part: &str, servers: usize) -> Result<Self> {
        let folder = folder_of(settings, part);
        let shape = Shape::on_loopback(Mode::InPlace, settings.volume_bytes + (1 << 30), servers);
        let cluster = Cluster::start(&settings.programs, &folder, shape)?;
        let export = cluster.export("v", "two", settings.volume_bytes)?;
        export.target.fill(settings.volume_bytes)?;
        Ok(Self { cluster, export })
    }

    /// Waits until all copies serve; how long that took.
    fn until_whole(&self) -> Result<Duration> {
        let begun = Instant::now();
        self.cluster.until("v", "whole", WHOLE, is_healthy)?;
        Ok(begun.elapsed())
    }

    fn writes(&self, depth: u32, time: Duration) -> Writes {
        Writes { region: self.volume_bytes(), depth, time, before: Duration::ZERO }
    }

    fn volume_bytes(&self) -> u64 {
        self.export.bytes
    }

    /// Writes while something is done to the cluster after a while; what came of the writes.
    fn write_while(
        &mut self,
        writes: Writes,
        after: Duration,
        act: impl FnOnce(&mut Cluster) -> Result<()>,
    ) -> Result<Outcome> {
        let target = &self.export.target;
        std::thread::scope(|scope| {
            let load = scope.spawn(move || target.write(writes));
            std::thread::sleep(after);
            let acted = act(&mut self.cluster);
            let outcome = load.join().expect("it does not panic");
            acted.and(outcome)
        })
    }
}

fn folder_of(settings: &Settings, part: &str) -> PathBuf {
    Path::new(&settings.folder).join(part)
}

fn is_healthy(volume: &Value) -> bool {
    volume["status"]["state"] == "Healthy"
}

/// `median (least–greatest)`, with so many digits.
fn shown(numbers: Vec<f64>, digits: usize) -> Result<(String, Spread)> {
    let spread = Spread::of(numbers);
    ensure!(spread.is_some(), "nothing was measured");
    let Spread { median, least, greatest } = spread.unwrap_or(Spread { median: 0.0, least: 0.0, greatest: 0.0 });
    let text = format!("{median:.digits$} ({least:.digits$}–{greatest:.digits$})");
    Ok((text, Spread { median, least, greatest }))
}

/// Whether an aim is met, in a word.
fn verdict(measured: f64, aim: f64) -> &'static str {
    if measured <= aim { "met" } else { "missed" }
}
