//! What an attached volume costs while nobody uses it, and what memory storage servers take.

use crate::contender::Contender;
use crate::process::{Program, cpu_time_of_threads, resident_bytes};
use anyhow::Result;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// After the last request: flushes and confirmations of a driver that falls idle are over (PROTOCOL.md, kept writes).
pub const CALM: Duration = Duration::from_secs(15);

/// One process.
#[derive(Clone, Debug)]
pub struct Idle {
    /// Its name.
    pub name: String,
    /// CPU time in percent of one core.
    pub percent: f64,
    /// Resident memory in bytes.
    pub resident: u64,
}

/// CPU time of every process of these contenders while nothing is asked of them for so long.
///
/// # Errors
/// A process is gone.
pub fn measure(contenders: &[Contender], calm: Duration, time: Duration) -> Result<Vec<Idle>> {
    let mut programs: Vec<&Arc<Program>> = contenders.iter().flat_map(|contender| &contender.programs).collect();
    programs.sort_by_key(|program| program.id());
    programs.dedup_by_key(|program| program.id());
    std::thread::sleep(calm);
    let read = || programs.iter().map(|program| cpu_time_of_threads(program.id())).collect::<Result<Vec<_>>>();
    let (before, begun) = (read()?, Instant::now());
    std::thread::sleep(time);
    let (after, took) = (read()?, begun.elapsed());
    let each = programs.iter().zip(before.into_iter().zip(after));
    each.map(|(program, (before, after))| {
        let percent = after.saturating_sub(before).as_secs_f64() / took.as_secs_f64() * 100.0;
        Ok(Idle { name: program.name().to_owned(), percent, resident: resident_bytes(program.id())? })
    })
    .collect()
}
