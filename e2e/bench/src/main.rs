//! `lamina-bench`: arguments, the rounds, the report.
//!
//! Lamina's volumes through their NBD export beside qemu-nbd, nbdkit and the raw file, in one run: all contenders are up
//! from the beginning, and each round takes every row through all of them in turn, beginning with another one.

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use lamina_bench::contender::Contender;
use lamina_bench::figures::{Figures, Sample};
use lamina_bench::lamina::{Cluster, Mode, Shape};
use lamina_bench::load::WORKS;
use lamina_bench::replication::{PARTS, Settings};
use lamina_bench::report::{self, Conditions};
use lamina_bench::{floor, idle, peers};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const EXAMPLES: &str = "Examples:
  lamina-bench run                           5 rounds, about 25 minutes
  lamina-bench run --dir /mnt/disk --output results.md
  lamina-bench run --short                   one short round, only to see that it works
  lamina-bench idle                          an attached volume that nobody uses, for 60 s
  lamina-bench replication                   what sync bits, outages, lost servers and fills cost, about 10 minutes
  lamina-bench replication --only outage --mebibytes 1024

Needs Lamina's programs beside this one (cargo build --release), fio, qemu-nbd and nbdkit (Debian: fio qemu-utils nbdkit).";

/// Lamina's volumes beside other servers of NBD and the raw disk, in one run.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// Where the files go; the disk below is what is measured
    #[arg(long, global = true, default_value = "target")]
    dir: PathBuf,
    /// Where Lamina's programs are [default: beside this one]
    #[arg(long, global = true)]
    programs: Option<PathBuf>,
    /// Little time and small files: shows that it works, measures nothing
    #[arg(long, global = true)]
    short: bool,
    /// Write the report here, too
    #[arg(long, global = true)]
    output: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// All rows by all contenders, then the idle volumes
    Run {
        /// Rounds
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=50))]
        rounds: u8,
        /// Seconds of each run
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=600))]
        seconds: u16,
        /// MiB of each volume
        #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=65536))]
        mebibytes: u64,
        /// Only rows whose names contain this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// What replication costs: sync bits, an outage of 10 s, ten killed servers, a fill beside writes
    Replication {
        /// Rounds of what is compared
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
        rounds: u8,
        /// Seconds of each measured run
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=600))]
        seconds: u16,
        /// MiB of each volume; four times that, and 3 GiB more, must be free below --dir
        #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u64).range(64..=65536))]
        mebibytes: u64,
        /// Only the part of this name
        #[arg(long, value_parser = ["cold", "outage", "gap", "fill"])]
        only: Option<String>,
    },
    /// Only idle volumes: CPU of all processes
    Idle {
        /// Seconds
        #[arg(long, default_value_t = 60)]
        seconds: u16,
    },
    /// The front of the two processes that only copy
    #[command(hide = true)]
    FloorFront {
        /// Where it listens for NBD
        socket: PathBuf,
        /// Where its disk process is
        disk: String,
        /// Of the disk
        bytes: u64,
    },
    /// The disk process of the two that only copy
    #[command(hide = true)]
    FloorDisk {
        /// Read and written
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    match act(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lamina-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: &Arguments) -> Result<()> {
    match &arguments.verb {
        Verb::FloorFront { socket, disk, bytes } => return floor::serve_front(socket, disk, *bytes),
        Verb::FloorDisk { file } => return floor::serve_disk(file),
        Verb::Run { .. } | Verb::Idle { .. } | Verb::Replication { .. } => {}
    }
    std::fs::create_dir_all(&arguments.dir)?;
    let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(arguments.dir.canonicalize()?)?;
    let programs = match &arguments.programs {
        Some(programs) => programs.canonicalize()?,
        None => std::env::current_exe()?.parent().context("this program lies in a folder")?.to_owned(),
    };
    let text = match (&arguments.verb, arguments.short) {
        (Verb::Run { only, .. }, true) => {
            run(&Bench { programs, folder, rounds: 1, time: Duration::from_millis(250), mebibytes: 64, only }, true)?
        }
        (Verb::Run { rounds, seconds, mebibytes, only }, false) => {
            let (rounds, time) = (usize::from(*rounds), Duration::from_secs((*seconds).into()));
            run(&Bench { programs, folder, rounds, time, mebibytes: *mebibytes, only }, false)?
        }
        (Verb::FloorFront { .. } | Verb::FloorDisk { .. }, _) => return Ok(()),
        (Verb::Replication { rounds, seconds, mebibytes, only }, short) => {
            let folder = folder.path().to_owned();
            let time = Duration::from_secs((*seconds).into());
            let (away, volume_bytes) = (Duration::from_secs(10), mebibytes << 20);
            let all =
                Settings { programs, folder, rounds: (*rounds).into(), time, volume_bytes, away, kills: 10, stops: 3 };
            parts(&if short { shorter(all) } else { all }, only.as_deref())?
        }
        (Verb::Idle { seconds }, short) => {
            let bench = Bench { programs, folder, rounds: 0, time: Duration::ZERO, mebibytes: 64, only: "" };
            let (_clusters, contenders) = bench.lamina(&[Mode::InPlace])?;
            let time = Duration::from_secs(if short { 3 } else { (*seconds).into() });
            report::idle(&idle::measure(&contenders[..1], idle::CALM, time)?, time)
        }
    };
    println!("\n{text}");
    arguments
        .output
        .as_ref()
        .map_or(Ok(()), |path| std::fs::write(path, text).with_context(|| path.display().to_string()))
}

/// Little of everything.
fn shorter(settings: Settings) -> Settings {
    let (time, away) = (Duration::from_millis(500), Duration::from_secs(5));
    Settings { rounds: 1, time, volume_bytes: 256 << 20, away, kills: 1, stops: 1, ..settings }
}

fn parts(settings: &Settings, only: Option<&str>) -> Result<String> {
    let mut text = format!("Machine: {}. Load when it began: {}.\n", report::machine(), report::load_average());
    for (name, measure) in PARTS.into_iter().filter(|(name, _)| only.is_none_or(|only| only == *name)) {
        say(format_args!("{name} …"));
        text += "\n";
        text += &measure(settings).context(name)?;
        std::fs::remove_dir_all(settings.folder.join(name))?;
    }
    Ok(text)
}

struct Bench<'a> {
    programs: PathBuf,
    folder: tempfile::TempDir,
    rounds: usize,
    time: Duration,
    mebibytes: u64,
    only: &'a str,
}

impl Bench<'_> {
    /// Clusters of these modes, each with a volume of one copy and one of two.
    fn lamina(&self, modes: &[Mode]) -> Result<(Vec<Cluster>, Vec<Contender>)> {
        let bytes = self.mebibytes << 20;
        let (mut clusters, mut contenders) = (Vec::new(), Vec::new());
        for mode in modes {
            say(format_args!("starting Lamina, data {mode:?} …"));
            let folder = self.folder.path().join(format!("{mode:?}"));
            let shape = Shape::on_loopback(*mode, 2 * bytes + (1 << 30), 2);
            let cluster = Cluster::start(&self.programs, &folder, shape)?;
            contenders.push(cluster.contender(1, bytes)?);
            contenders.push(cluster.contender(2, bytes)?);
            clusters.push(cluster);
        }
        Ok((clusters, contenders))
    }
}

fn say(line: impl std::fmt::Display) {
    eprintln!("{line}");
}

fn run(bench: &Bench<'_>, short: bool) -> Result<String> {
    let bytes = bench.mebibytes << 20;
    let mut contenders = peers::start(bench.folder.path(), bytes)?;
    contenders.push(floor::start(bench.folder.path(), bytes)?);
    let peers = contenders.len();
    let (_clusters, lamina) = bench.lamina(&[Mode::InPlace, Mode::Journal])?;
    contenders.extend(lamina);
    for contender in &contenders {
        say(format_args!("filling {} …", contender.name));
        contender.target.fill(bytes).with_context(|| contender.name)?;
    }
    let figures = rounds(bench, &contenders)?;
    let conditions = Conditions { rounds: bench.rounds, time: bench.time, volume_bytes: bytes };
    let mut text = report::report(&contenders, &figures, conditions);
    let (calm, time) = if short { (1, 2) } else { (idle::CALM.as_secs(), 60) };
    let (calm, time) = (Duration::from_secs(calm), Duration::from_secs(time));
    say(format_args!("idle for {calm:?}, then measured for {time:?} …"));
    let idle = idle::measure(&contenders[peers..peers + 2], calm, time)?;
    text += "\n**Idle: two attached volumes**\n\n";
    text += &report::idle(&idle, time);
    Ok(text)
}

fn rounds(bench: &Bench<'_>, contenders: &[Contender]) -> Result<Figures> {
    let mut figures = Figures::default();
    let rows: Vec<usize> = (0..WORKS.len()).filter(|row| WORKS[*row].name.contains(bench.only)).collect();
    ensure!(!rows.is_empty(), "no row is named like {:?}", bench.only);
    let begun = Instant::now();
    for round in 0..bench.rounds {
        for row in &rows {
            say(format_args!("{:5.0} s, round {}: {}", begun.elapsed().as_secs_f64(), round + 1, WORKS[*row].name));
            for turn in 0..contenders.len() {
                let nth = (turn + round) % contenders.len();
                let contender = &contenders[nth];
                let sample =
                    one(bench, contender, *row).with_context(|| format!("{}, {}", contender.name, WORKS[*row].name))?;
                figures.add((*row, nth), sample);
            }
        }
    }
    Ok(figures)
}

fn one(bench: &Bench<'_>, contender: &Contender, row: usize) -> Result<Sample> {
    let before = contender.cpu_time()?;
    let outcome = contender.target.run(WORKS[row], bench.mebibytes << 20, bench.time)?;
    Ok(Sample { outcome, cpu: contender.cpu_time()?.saturating_sub(before) })
}
