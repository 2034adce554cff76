//! How long nothing comes back when a storage server is lost: killed, so that its connections break, or stopped, so that
//! only silence tells.
//!
//! The gap is the longest latency of a load of one write at a time: what was under way when the server was lost.

use super::{Settings, Stand, shown, verdict};
use anyhow::Result;
use std::time::Duration;

/// Aim for a killed server, seconds.
const KILLED: f64 = 0.5;
/// Aim for a stopped one, seconds.
const STOPPED: f64 = 4.0;
/// Load before the server is lost.
const BEFORE: Duration = Duration::from_millis(700);
/// Load in all, when one is killed.
const KILL_TIME: Duration = Duration::from_secs(3);
/// Load in all, when one is stopped.
const STOP_TIME: Duration = Duration::from_secs(9);

pub(super) fn measure(settings: &Settings) -> Result<String> {
    let mut stand = Stand::new(settings, "gap", 2)?;
    let mut text = "**Longest time without an answer, one 4 KiB write at a time**\n\n\
                    | a server is | times | s, median (least–greatest) | longest, aim |\n|---|--:|--:|--:|\n"
        .to_owned();
    let quiet = stand.export.target.write(stand.writes(1, KILL_TIME))?.longest / 1e6;
    let killed = (0..settings.kills).map(|n| killed(&mut stand, n % 2)).collect::<Result<Vec<f64>>>()?;
    let stopped = (0..settings.stops).map(|n| stopped(&mut stand, n % 2)).collect::<Result<Vec<f64>>>()?;
    for (what, gaps, aim) in [("killed", killed, KILLED), ("stopped", stopped, STOPPED)] {
        let (times, (gap, spread)) = (gaps.len(), shown(gaps, 2)?);
        text += &format!("| {what} | {times} | {gap} | ≤ {aim} s, {} |\n", verdict(spread.greatest, aim));
    }
    text += &format!("| left alone | 1 | {quiet:.2} | |\n");
    Ok(text)
}

fn killed(stand: &mut Stand, server: usize) -> Result<f64> {
    let outcome = stand.write_while(stand.writes(1, KILL_TIME), BEFORE, |cluster| cluster.servers[server].kill())?;
    stand.cluster.servers[server].again()?;
    stand.until_whole()?;
    Ok(outcome.longest / 1e6)
}

fn stopped(stand: &mut Stand, server: usize) -> Result<f64> {
    let outcome = stand.write_while(stand.writes(1, STOP_TIME), BEFORE, |cluster| cluster.servers[server].stop());
    stand.cluster.servers[server].go_on()?;
    stand.until_whole()?;
    Ok(outcome?.longest / 1e6)
}
