//! The benchmark works: its short form takes every row through every contender. Nothing about speed is asserted.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

/// The first thing that this machine lacks, if any.
fn missing(programs: &Path) -> Option<String> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &&&str| std::env::split_paths(&paths).any(|path| path.join(name).is_file());
    let others = ["fio", "qemu-nbd", "nbdkit", "setpriv"].iter().find(|name| !found(name));
    let own = ["lamina-operator", "lamina-storage-node", "lamina-csi-node"];
    let own = own.iter().find(|name| !programs.join(name).is_file());
    others.or(own).map(|name| (*name).to_owned())
}

#[test]
fn every_contender_goes_through_every_row_of_the_benchmark() {
    let bench = Path::new(env!("CARGO_BIN_EXE_lamina-bench"));
    if let Some(missing) = missing(bench.parent().unwrap()) {
        println!("skipped: every_contender_goes_through_every_row_of_the_benchmark: needs {missing}");
        return;
    }
    let dir = tempfile::tempdir_in(bench.parent().unwrap()).unwrap();
    let done = Command::new(bench).args(["run", "--short", "--dir"]).arg(dir.path()).output().unwrap();
    let (report, said) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}");
    let figures = report
        .lines()
        .filter(|line| ["| raw", "| qemu", "| nbdkit", "| floor", "| Lamina"].iter().any(|n| line.starts_with(n)));
    let figures: Vec<&str> = figures.collect();
    assert_eq!(figures.len(), 7 * 8, "seven rows of eight contenders:\n{report}");
    assert!(
        figures.iter().all(|line| line.contains("(") || line.starts_with("| raw")),
        "each with its ratio:\n{report}"
    );
    assert!(report.contains("| all, aim < 0.1 |"), "{report}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn every_part_of_what_replication_costs_is_measured() {
    let bench = Path::new(env!("CARGO_BIN_EXE_lamina-bench"));
    if let Some(missing) = missing(bench.parent().unwrap()) {
        println!("skipped: every_part_of_what_replication_costs_is_measured: needs {missing}");
        return;
    }
    let dir = tempfile::tempdir_in(bench.parent().unwrap()).unwrap();
    let done = Command::new(bench).args(["replication", "--short", "--dir"]).arg(dir.path()).output().unwrap();
    let (report, said) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{said}");
    for part in ["Cost of sync bits", "An outage of", "Longest time without an answer", "while a copy is filled"] {
        assert!(report.contains(part), "{part}:\n{report}");
    }
    for row in ["| 1 | ", "| 32 | ", "| moved to written, aim", "| killed | 1 | ", "| stopped | 1 | "] {
        assert!(
            report.lines().any(|line| line.starts_with(row) && line.contains(char::is_numeric)),
            "{row}:\n{report}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}
