//! What a fill costs those who write meanwhile: 99th percentiles with and without it.
//!
//! A server comes back with a blank disk, so that all of its copy is filled.

use super::{Settings, Stand, is_healthy, shown, verdict};
use anyhow::Result;
use std::time::Duration;

/// Aim.
const MOST: f64 = 2.0;
const DEPTH: u32 = 4;
const TITLE: &str = "**4 KiB random writes while a copy is filled**";
const TOO_SHORT: &str = "the fill was over before the load; take more --mebibytes or fewer --seconds";
/// Longest time until a fill begins.
const BEGINS: Duration = Duration::from_secs(60);

pub(super) fn measure(settings: &Settings) -> Result<String> {
    let mut stand = Stand::new(settings, "fill", 2)?;
    let (mut without, mut with, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        let calm = stand.export.target.write(stand.writes(DEPTH, settings.time))?.p99;
        let Some(busy) = beside_a_fill(&mut stand, settings.time)? else {
            return Ok(format!("{TITLE}\n\nNot measured: {TOO_SHORT}.\n"));
        };
        ratios.push(busy / calm);
        without.push(calm);
        with.push(busy);
    }
    let ((without, _), (with, _), (ratio, spread)) = (shown(without, 0)?, shown(with, 0)?, shown(ratios, 2)?);
    Ok(format!(
        "{TITLE}\n\nA copy of {} MiB is filled, {DEPTH} writes are under way at a time.\n\n\
         | p99 µs without | p99 µs during the fill | ratio, aim ≤ {MOST} |\n|--:|--:|--:|\n\
         | {without} | {with} | {ratio}, {} |\n",
        settings.volume_bytes >> 20,
        verdict(spread.median, MOST),
    ))
}

/// `None` = the fill was over before the load.
fn beside_a_fill(stand: &mut Stand, time: Duration) -> Result<Option<f64>> {
    let id = stand.cluster.id_of(1)?;
    stand.cluster.servers[1].kill()?;
    stand.cluster.until("v", "left out", BEGINS, |volume| !is_healthy(volume))?;
    stand.cluster.servers[1].again_blank(&id)?;
    stand
        .cluster
        .until("v", "being filled", BEGINS, |volume| volume["status"]["map"].to_string().contains("Syncing"))?;
    let outcome = stand.export.target.write(stand.writes(DEPTH, time))?;
    let over = is_healthy(&stand.cluster.volume("v")?);
    stand.until_whole()?;
    Ok((!over).then_some(outcome.p99))
}
