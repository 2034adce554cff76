//! What a fill costs those who write meanwhile: 99th percentiles with and without it.
//!
//! A server comes back with a blank disk, so that all of its copy is filled.

use super::{Settings, Stand, is_healthy, shown, verdict};
use anyhow::{Result, ensure};
use std::time::Duration;

/// Aim.
const MOST: f64 = 2.0;
const DEPTH: u32 = 4;
/// Longest time until a fill begins.
const BEGINS: Duration = Duration::from_secs(60);

pub(super) fn measure(settings: &Settings) -> Result<String> {
    let mut stand = Stand::new(settings, "fill", 2)?;
    let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        let calm = stand.export.target.write(stand.writes(DEPTH, settings.time))?.p99;
        let busy = beside_a_fill(&mut stand, settings.time)?;
        ratios.push(busy / calm);
        without.push(calm);
        with.push(busy);
    }
    let ((without, _), (with, _), (ratio, spread)) = (shown(without, 0)?, shown(with, 0)?, shown(ratios, 2)?);
    Ok(format!(
        "**4 KiB random writes, {DEPTH} at a time, while a copy of {} MiB is filled**\n\n\
         | p99 µs without | p99 µs during the fill | ratio, aim ≤ {MOST} |\n|--:|--:|--:|\n\
         | {without} | {with} | {ratio}, {} |\n",
        settings.volume_bytes >> 20,
        verdict(spread.median, MOST),
    ))
}

fn beside_a_fill(stand: &mut Stand, time: Duration) -> Result<f64> {
    let id = stand.cluster.id_of(1)?;
    stand.cluster.servers[1].kill()?;
    stand.cluster.until("v", "left out", BEGINS, |volume| !is_healthy(volume))?;
    stand.cluster.servers[1].again_blank(&id)?;
    stand
        .cluster
        .until("v", "being filled", BEGINS, |volume| volume["status"]["map"].to_string().contains("Syncing"))?;
    let outcome = stand.export.target.write(stand.writes(DEPTH, time))?;
    let over = is_healthy(&stand.cluster.volume("v")?);
    ensure!(!over, "the fill was over before the load: take more --mebibytes or fewer --seconds");
    stand.until_whole()?;
    Ok(outcome.p99)
}
