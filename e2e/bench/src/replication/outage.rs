//! What an outage of one server costs when it is back: bytes that were moved to it, against bytes of the pages that were
//! written meanwhile (PROTOCOL.md §5.9; H23).

use super::{Settings, Stand, verdict};
use crate::load::Writes;
use anyhow::{Result, ensure};
use std::time::Duration;

/// Aim.
const MOST: f64 = 1.2;
/// Load before the outage.
const BEFORE: Duration = Duration::from_secs(1);
/// Load after it, while the server is filled.
const AFTER: Duration = Duration::from_secs(4);

pub(super) fn measure(settings: &Settings) -> Result<String> {
    let mut stand = Stand::new(settings, "outage", 2)?;
    // A part of the volume, so that moving all of it would show; small enough that every page of it is written.
    let region = (settings.volume_bytes / 32).min(32 << 20);
    let time = BEFORE + settings.away + AFTER;
    let before = moved(&stand)?;
    let (away, survivor) = (settings.away, 0);
    let writes = Writes { region, depth: 8, time, before: Duration::ZERO };
    let outcome = stand.write_while(writes, BEFORE, |cluster| {
        cluster.servers[1].kill()?;
        std::thread::sleep(away);
        cluster.servers[1].again()
    })?;
    let whole = stand.until_whole()?;
    // The counters of the one that was killed began anew at zero.
    let moved = moved(&stand)? - before;
    let share = settings.away.as_secs_f64() / time.as_secs_f64();
    let written = outcome.requests as f64 * 4096.0 * share;
    ensure!(written > region as f64, "the load is too slow to write {} MiB during the outage", region >> 20);
    let ratio = moved / region as f64;
    let mebibytes = |bytes: f64| bytes / f64::from(1 << 20);
    Ok(format!(
        "**An outage of {} s of server b, under 4 KiB random writes to {} MiB of {} MiB**\n\n\
         | | |\n|---|--:|\n\
         | requests a second over all of it | {:.0} |\n\
         | MiB of the pages written meanwhile | {:.0} |\n\
         | MiB moved by fills (metrics of server {}) | {:.1} |\n\
         | moved to written, aim ≤ {MOST} | {ratio:.2}, {} |\n\
         | moved to the size of the volume | {:.2} |\n\
         | s from the end of the load until whole | {:.1} |\n",
        away.as_secs(),
        region >> 20,
        settings.volume_bytes >> 20,
        outcome.rate,
        mebibytes(region as f64),
        stand.cluster.servers[survivor].name(),
        mebibytes(moved),
        verdict(ratio, MOST),
        moved / settings.volume_bytes as f64,
        whole.as_secs_f64(),
    ))
}

/// Bytes that the server that stays has given for fills so far.
fn moved(stand: &Stand) -> Result<f64> {
    stand.cluster.servers[0].metric("lamina_storage_request_bytes_total", "op=\"Fill\"")
}
