//! The figures as Markdown: a table for each row of the benchmark, the aims beside what was measured.

use crate::contender::Contender;
use crate::figures::{Figures, Sample, Spread};
use crate::idle::Idle;
use crate::load::{FLUSH_BYTES, WORKS};
use crate::peers::QEMU;
use std::fmt::Write as _;
use std::time::Duration;

/// How the benchmark was run.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// Rounds of all rows by all contenders.
    pub rounds: usize,
    /// Of each run.
    pub time: Duration,
    /// Of each volume.
    pub volume_bytes: u64,
}

/// What kind of machine this is, without its name.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let model = read("/proc/cpuinfo");
    let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |m| m.1);
    let memory = read("/proc/meminfo");
    let kibibytes = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let gibibytes = kibibytes.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) >> 20;
    let release = read("/proc/sys/kernel/osrelease");
    let kernel: Vec<&str> = release.trim().split(['.', '-']).take(2).collect();
    format!("{cores} cores ({model}), {gibibytes} GiB of memory, Linux {}", kernel.join("."))
}

/// How busy the machine is with others, over the last minute; a part of a core each.
#[must_use]
pub fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// The whole report.
#[must_use]
pub fn report(contenders: &[Contender], figures: &Figures, conditions: Conditions) -> String {
    let mut text = format!("Machine: {}. ", machine());
    let Conditions { rounds, time, volume_bytes } = conditions;
    let _ = write!(
        text,
        "{rounds} interleaved rounds of {:.1} s, volumes of {} MiB written before, all files on one disk and filesystem. \
         A flush follows every {} MiB of writes for each contender. Medians of the rounds; CPU is microseconds a request \
         over all of the contender's processes, fio's own apart; ratios are taken within a round, in brackets their least \
         and greatest.\n\n",
        time.as_secs_f64(),
        volume_bytes >> 20,
        FLUSH_BYTES >> 20,
    );
    for contender in contenders.iter().filter(|contender| !contender.note.is_empty()) {
        let _ = writeln!(text, "- {}: {}", contender.name, contender.note);
    }
    for row in 0..WORKS.len() {
        table(&mut text, contenders, figures, row);
    }
    aims(&mut text, contenders, figures);
    text
}

fn table(text: &mut String, contenders: &[Contender], figures: &Figures, row: usize) {
    let qemu = contenders.iter().position(|contender| contender.name == QEMU).unwrap_or(0);
    let _ = writeln!(text, "\n**{}**\n", WORKS[row].name);
    text.push_str("| | IOPS | p50 µs | p99 µs | CPU | fio's CPU | CPU to qemu-nbd | IOPS to qemu-nbd |\n");
    text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|\n");
    for (nth, contender) in contenders.iter().enumerate() {
        let of = |figure| figures.of((row, nth), figure);
        let to = |figure| figures.ratio((row, nth), qemu, figure);
        let own = |spread| if contender.programs.is_empty() { "–".to_owned() } else { spread };
        let cells = [
            plain(of(Sample::rate), 0),
            plain(of(Sample::p50), 0),
            plain(of(Sample::p99), 0),
            own(plain(of(Sample::cpu_each), 1)),
            plain(of(Sample::client_cpu_each), 1),
            own(with_spread(to(Sample::cpu_each))),
            with_spread(to(Sample::rate)),
        ];
        let _ = writeln!(text, "| {} | {} |", contender.name, cells.join(" | "));
    }
}

fn plain(spread: Option<Spread>, digits: usize) -> String {
    spread.map_or("–".to_owned(), |spread| format!("{:.digits$}", spread.median))
}

fn with_spread(spread: Option<Spread>) -> String {
    spread.map_or("–".to_owned(), |s| format!("{:.2} ({:.2}–{:.2})", s.median, s.least, s.greatest))
}

/// The aims of CPU, data in place.
fn aims(text: &mut String, contenders: &[Contender], figures: &Figures) {
    let Some(qemu) = contenders.iter().position(|contender| contender.name == QEMU) else { return };
    text.push_str("\n**Aims: CPU a request to qemu-nbd's, data in place**\n\n| row | 1 copy, aim ≤ 1.2 | 2 copies, aim ≤ 2 for writes |\n|---|--:|--:|\n");
    let at = |name: &str| contenders.iter().position(|contender| contender.name == name);
    let (one, two) = (at("Lamina, 1 copy"), at("Lamina, 2 copies"));
    for (row, work) in WORKS.iter().enumerate() {
        let cell = |nth: Option<usize>, aim: Option<f64>| {
            let ratio = nth.and_then(|nth| figures.ratio((row, nth), qemu, Sample::cpu_each));
            let verdict = match (ratio, aim) {
                (Some(ratio), Some(aim)) => {
                    if ratio.median <= aim {
                        ", met"
                    } else {
                        ", missed"
                    }
                }
                _ => "",
            };
            format!("{}{verdict}", with_spread(ratio))
        };
        let writes = work.pattern.ends_with("write");
        let _ = writeln!(text, "| {} | {} | {} |", work.name, cell(one, Some(1.2)), cell(two, writes.then_some(2.0)));
    }
}

/// The idle processes as a table.
#[must_use]
pub fn idle(processes: &[Idle], time: Duration) -> String {
    let mut text = format!("| process, idle for {} s | % of a core | resident MiB |\n|---|--:|--:|\n", time.as_secs());
    for Idle { name, percent, resident } in processes {
        let _ = writeln!(text, "| {name} | {percent:.4} | {} |", resident >> 20);
    }
    let sum: f64 = processes.iter().map(|process| process.percent).sum();
    let verdict = if sum < 0.1 { "met" } else { "missed" };
    let _ = writeln!(text, "| all, aim < 0.1 | {sum:.4}, {verdict} | |");
    text
}
