//! Network namespaces for the programs of one test, joined by a bridge; cuts between them, one way or both.
//!
//! ```text
//! operator 10.77.0.1 (bridge) ──┬── driver 10.77.0.2
//!                               ├── server 10.77.0.10
//!                               ├── server 10.77.0.11 …
//! ```
//! Invariant: a namespace has no name: a process of this test holds it, which the kernel ends with the test's thread
//! (`setpriv --pdeathsig`), so that namespaces, links and rules are gone however the test ends. A cut drops at the
//! receiver, as a network does: the sender learns nothing.

use anyhow::{Context, Result, ensure};
use lamina_bench::place::Place;
use lamina_bench::process::Program;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Who has a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spot {
    Operator,
    Driver,
    Server(usize),
}

impl Spot {
    fn address(self) -> Ipv4Addr {
        match self {
            Self::Operator => Ipv4Addr::new(10, 77, 0, 1),
            Self::Driver => Ipv4Addr::new(10, 77, 0, 2),
            Self::Server(n) => Ipv4Addr::new(10, 77, 0, 10 + n as u8),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Operator => "operator".into(),
            Self::Driver => "driver".into(),
            Self::Server(n) => format!("server{n}"),
        }
    }
}

/// The namespaces, each with the process that holds it.
pub(crate) struct Network(Vec<(Spot, Program)>);

impl Network {
    /// Makes them, for so many servers.
    pub(crate) fn new(folder: &Path, servers: usize) -> Result<Self> {
        let spots = [Spot::Operator, Spot::Driver].into_iter().chain((0..servers).map(Spot::Server));
        let held = spots.map(|spot| Ok((spot, hold(folder, spot)?))).collect::<Result<Vec<_>>>()?;
        let network = Self(held);
        network.inside(Spot::Operator, &["ip", "link", "add", "br0", "type", "bridge"])?;
        network.up(Spot::Operator, "br0")?;
        for spot in network.others(Spot::Operator) {
            let (name, holder) = (spot.name(), network.holder(spot).to_string());
            let cable = ["ip", "link", "add", &name, "type", "veth", "peer", "name", "eth0", "netns", &holder];
            network.inside(Spot::Operator, &cable)?;
            network.inside(Spot::Operator, &["ip", "link", "set", &name, "master", "br0", "up"])?;
            network.up(spot, "eth0")?;
        }
        // Whether this kernel drops packets for us is known before anything depends on it.
        network.inside(Spot::Driver, &["iptables", "-w", "-A", "INPUT", "-s", "192.0.2.1", "-j", "DROP"])?;
        Ok(network)
    }

    fn up(&self, spot: Spot, interface: &str) -> Result<()> {
        let address = format!("{}/24", spot.address());
        self.inside(spot, &["ip", "addr", "add", &address, "dev", interface])?;
        self.inside(spot, &["ip", "link", "set", interface, "up"])?;
        self.inside(spot, &["ip", "link", "set", "lo", "up"])
    }

    fn holder(&self, spot: Spot) -> u32 {
        self.0.iter().find(|(s, _)| *s == spot).unwrap().1.id()
    }

    fn inside(&self, spot: Spot, words: &[&str]) -> Result<()> {
        let done = self.place(spot).command(Path::new(words[0])).args(&words[1..]).output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{} for {spot:?}: {said}", words.join(" "));
        Ok(())
    }

    /// Where a program of this spot runs.
    pub(crate) fn place(&self, spot: Spot) -> Place {
        Place::held_by(self.holder(spot), IpAddr::V4(spot.address()))
    }

    /// All but this one.
    pub(crate) fn others(&self, of: Spot) -> impl Iterator<Item = Spot> + use<> {
        let spots: Vec<Spot> = self.0.iter().map(|(spot, _)| *spot).filter(|spot| *spot != of).collect();
        spots.into_iter()
    }

    /// Nothing from the one arrives at the other any more; the other way it does.
    pub(crate) fn cut(&self, from: Spot, to: Spot) {
        let source = from.address().to_string();
        self.inside(to, &["iptables", "-w", "-A", "INPUT", "-s", &source, "-j", "DROP"]).unwrap();
    }

    /// These are cut off from all others, both ways; among themselves they still talk.
    pub(crate) fn part(&self, island: &[Spot]) {
        for inside in island {
            for outside in self.others(*inside).filter(|spot| !island.contains(spot)) {
                self.cut(*inside, outside);
                self.cut(outside, *inside);
            }
        }
    }

    /// All arrives again.
    pub(crate) fn heal(&self) {
        self.0.iter().for_each(|(spot, _)| self.inside(*spot, &["iptables", "-w", "-F", "INPUT"]).unwrap());
    }
}

/// A process in a new network namespace.
fn hold(folder: &Path, spot: Spot) -> Result<Program> {
    let mut command = Command::new("unshare");
    command.args(["--net", "--", "sleep", "infinity"]);
    let program = Program::start(&format!("namespace of {}", spot.name()), folder, command)?;
    let space = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net"));
    let (own, begun) = (space("self")?, Instant::now());
    while space(&program.id().to_string()).is_ok_and(|there| there == own) {
        ensure!(program.is_running()?, "unshare --net: {}", program.output()?);
        ensure!(begun.elapsed() < Duration::from_secs(30), "unshare makes no namespace");
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(program.is_running()?, "unshare --net: {}", program.output()?);
    Ok(program)
}

/// The first thing that this machine lacks, if any.
pub(crate) fn missing(programs: &Path) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &&&str| std::env::split_paths(&paths).any(|path| path.join(name).is_file());
    let others = ["fio", "ip", "iptables", "nsenter", "setpriv", "unshare"].iter().find(|name| !found(name));
    let own = ["lamina-operator", "lamina-storage-node", "lamina-csi-node"];
    let own = own.iter().find(|name| !programs.join(name).is_file());
    if let Some(name) = others.or(own) {
        return Some(format!("needs {name}"));
    }
    let engines = Command::new("fio").arg("--enghelp").output().context("fio").ok()?;
    let has_nbd = String::from_utf8_lossy(&engines.stdout).lines().any(|line| line.trim() == "nbd");
    if has_nbd { None } else { Some("this fio has no nbd engine".into()) }
}
