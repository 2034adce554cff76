//! One storage server as a process: started, killed, stopped, started again, blank or not; what its metrics count.

use crate::place::Place;
use crate::process::Program;
use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A storage server with one file as its device.
#[derive(Debug)]
pub struct Server {
    name: String,
    place: Place,
    folder: PathBuf,
    program: PathBuf,
    cluster: String,
    device: PathBuf,
    /// What follows the device's path on the command line.
    options: String,
    addresses: Option<Addresses>,
    running: Arc<Program>,
    starts: u32,
}

#[derive(Clone, Copy, Debug)]
struct Addresses {
    block: SocketAddr,
    control: SocketAddr,
    metrics: SocketAddr,
}

/// What a server is started with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start<'a> {
    pub(super) name: &'a str,
    pub(super) place: Place,
    pub(super) folder: &'a Path,
    pub(super) program: &'a Path,
    pub(super) cluster: &'a str,
    /// What follows the device's path on the command line.
    pub(super) options: &'a str,
}

impl Server {
    /// Starts it with a blank device, and waits until that is open.
    pub(super) fn start(start: Start<'_>) -> Result<Self> {
        let Start { name, place, folder, program, cluster, options } = start;
        let device = folder.join(format!("{name}.img"));
        let mut server = Self {
            name: name.to_owned(),
            place,
            folder: folder.to_owned(),
            program: program.to_owned(),
            cluster: cluster.to_owned(),
            options: options.to_owned(),
            addresses: None,
            running: Arc::new(run(&start, &device, None, None)?),
            device,
            starts: 1,
        };
        server.up()?;
        Ok(server)
    }

    /// Waits until it listens and its device is open.
    fn up(&mut self) -> Result<()> {
        let fields = self.running.wait_for("its address", |text| {
            let line = text.lines().find(|line| line.contains("listening"))?;
            Some(serde_json::from_str::<Value>(line).ok()?["fields"].clone())
        })?;
        let at = |what: &str| fields[what].as_str().and_then(|text| text.parse().ok()).with_context(|| what.to_owned());
        self.addresses = Some(Addresses { block: at("block")?, control: at("control")?, metrics: at("metrics")? });
        self.running.wait_for("its device", |text| text.contains("device opened").then_some(()))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// The file that is its device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Its process.
    #[must_use]
    pub fn program(&self) -> &Arc<Program> {
        &self.running
    }

    /// Where the leader reaches it.
    #[must_use]
    pub fn control(&self) -> Option<SocketAddr> {
        self.addresses.map(|addresses| addresses.control)
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(&self) -> Result<()> {
        self.running.kill()
    }

    /// SIGSTOP: silent, with all its connections open.
    ///
    /// # Errors
    /// It has ended.
    pub fn stop(&self) -> Result<()> {
        self.running.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// It has ended.
    pub fn go_on(&self) -> Result<()> {
        self.running.signal(Signal::CONT)
    }

    /// Starts a killed one again, on its device and its addresses, and waits until the device is open.
    ///
    /// # Errors
    /// It does not come up.
    pub fn again(&mut self) -> Result<()> {
        self.start_again(None)
    }

    /// Starts a killed one again under its id, with a blank device in place of the one that it had.
    ///
    /// # Errors
    /// It does not come up.
    pub fn again_blank(&mut self, id: &str) -> Result<()> {
        std::fs::remove_file(&self.device)?;
        self.start_again(Some(id))
    }

    fn start_again(&mut self, id: Option<&str>) -> Result<()> {
        self.starts += 1;
        let name = format!("{}.{}", self.name, self.starts);
        let start = Start {
            name: &name,
            place: self.place,
            folder: &self.folder,
            program: &self.program,
            cluster: &self.cluster,
            options: &self.options,
        };
        self.running = Arc::new(run(&start, &self.device, self.addresses, id)?);
        self.up()
    }

    /// The sum of all series of a metric with this label; read on loopback only.
    ///
    /// # Errors
    /// It does not answer, or says no number.
    pub fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let addresses = self.addresses.context("it is up")?;
        let mut stream = TcpStream::connect(addresses.metrics)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        sum_of(&text, name, label)
    }
}

fn run(start: &Start<'_>, device: &Path, addresses: Option<Addresses>, id: Option<&str>) -> Result<Program> {
    let mut command = start.place.command(start.program);
    command.args(["serve", "--log-format", "json", "--cluster", start.cluster]);
    command.arg("--device").arg(format!("{},{}", device.display(), start.options));
    let any = start.place.any_port();
    let Addresses { block, control, metrics } =
        addresses.unwrap_or(Addresses { block: any, control: any, metrics: any });
    for (flag, address) in [("--listen", block), ("--control", control), ("--metrics", metrics)] {
        command.args([flag, &address.to_string()]);
    }
    if let Some(id) = id {
        command.args(["--server", id]);
    }
    Program::start(&format!("server {}", start.name), start.folder, command)
}

/// The sum of all series of a name with a label.
fn sum_of(text: &str, name: &str, label: &str) -> Result<f64> {
    let is_of = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{') && rest.contains(label));
    let numbers = text.lines().filter(is_of);
    numbers.map(|line| line.rsplit(' ').next().unwrap_or("").parse::<f64>().with_context(|| line.to_owned())).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn series_of_a_name_are_summed_up_and_what_is_no_number_is_an_error() {
        let text =
            "# HELP x y\nx_total{op=\"fill\",v=\"1\"} 5\nx_total{op=\"fill\",v=\"2\"} 7\nx_total{op=\"read\"} 1\n";
        assert_eq!(sum_of(text, "x_total", "op=\"fill\"").unwrap(), 12.0);
        assert_eq!(sum_of(text, "x", "op").unwrap(), 0.0);
        assert!(sum_of("x{op} y", "x", "op").is_err());
    }
}
