//! What sync bits cost: 4 KiB random writes over a set of pages that are all clean, so that nearly every write is a first
//! touch and marks its page before it is acknowledged (PROTOCOL.md I3; seed 002 \[0039\]–\[0047\]).
//!
//! The second copy costs something without any mark, too. So each is measured over a hot region as well, whose pages are
//! marked already: cost = (cold, one copy : two copies) ÷ (hot, one copy : two copies), of requests a second.

use super::{Settings, folder_of, shown, verdict};
use crate::contender::Contender;
use crate::lamina::{Cluster, Mode, Shape};
use crate::load::Writes;
use anyhow::Result;
use std::fmt::Write as _;
use std::time::Duration;

/// Pages of the hot region are few and marked within moments.
const HOT_BYTES: u64 = 16 << 20;
/// Before a hot run is measured.
const WARM_UP: Duration = Duration::from_millis(500);
/// An idle driver has confirmed everything after that, and every page is clean.
const CLEAN: Duration = Duration::from_secs(3);
/// Aim.
const MOST: f64 = 1.3;

pub(super) fn measure(settings: &Settings) -> Result<String> {
    let folder = folder_of(settings, "cold");
    let shape = Shape::on_loopback(Mode::InPlace, 2 * settings.volume_bytes + (1 << 30), 2);
    let cluster = Cluster::start(&settings.programs, &folder, shape)?;
    let copies = [cluster.contender(1, settings.volume_bytes)?, cluster.contender(2, settings.volume_bytes)?];
    for contender in &copies {
        contender.target.fill(settings.volume_bytes)?;
    }
    let mut text = format!(
        "**Cost of sync bits: 4 KiB random writes over {} MiB of clean pages**\n\n\
         | depth | cold, 1 copy | cold, 2 copies | hot, 1 copy | hot, 2 copies | cost beyond the second copy, aim ≤ {MOST} |\n\
         |--:|--:|--:|--:|--:|--:|\n",
        settings.volume_bytes >> 20
    );
    for depth in [1, 32] {
        let (mut rates, mut costs) = ([const { Vec::new() }; 4], Vec::new());
        for _ in 0..settings.rounds {
            let [one, two] = copies.each_ref();
            let cold = [cold(settings, one, depth)?, cold(settings, two, depth)?];
            let hot = [hot(settings, one, depth)?, hot(settings, two, depth)?];
            costs.push((cold[0] / cold[1]) / (hot[0] / hot[1]));
            rates.iter_mut().zip(cold.into_iter().chain(hot)).for_each(|(all, rate)| all.push(rate));
        }
        let rates = rates.map(|rates| shown(rates, 0));
        let (cost, spread) = shown(costs, 2)?;
        let cells: Vec<String> = rates.into_iter().map(|rate| Ok(rate?.0)).collect::<Result<_>>()?;
        let _ = writeln!(text, "| {depth} | {} | {cost}, {} |", cells.join(" | "), verdict(spread.median, MOST));
    }
    text += "\nRates are requests a second; medians of the rounds, in brackets their least and greatest.\n";
    Ok(text)
}

fn cold(settings: &Settings, contender: &Contender, depth: u32) -> Result<f64> {
    std::thread::sleep(CLEAN);
    let (region, time) = (settings.volume_bytes, settings.time);
    Ok(contender.target.write(Writes { region, depth, time, before: Duration::ZERO })?.rate)
}

fn hot(settings: &Settings, contender: &Contender, depth: u32) -> Result<f64> {
    let (region, time) = (HOT_BYTES.min(settings.volume_bytes), settings.time);
    Ok(contender.target.write(Writes { region, depth, time, before: WARM_UP })?.rate)
}
